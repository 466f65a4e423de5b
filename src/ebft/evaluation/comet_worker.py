"""Scores translations with COMET; run by the Python of COMET's own environment, where nothing of ours is installed.

`python -I comet_worker.py scores.json < rows.jsonl`: the first line of the input says `model`, `batch_size` and
`gpus`; each further one is a segment with `src`, `mt` and `ref`. A script of its own because COMET needs an older
transformers and numpy than we do. The scores go to a file, for the libraries in between print to stdout.
"""

import json
import os
import sys


def main() -> None:
    """Read all of stdin, score it, write the list of scores."""
    lines = [json.loads(line) for line in sys.stdin]
    settings, segments = lines[0], lines[1:]
    try:
        from comet import download_model, load_from_checkpoint  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        sys.exit(f"unbabel-comet cannot be imported: {error}")
    name = settings["model"]
    path = name if os.path.exists(name) else download_model(name)
    model = load_from_checkpoint(path)
    output = model.predict(segments, batch_size=settings["batch_size"], gpus=settings["gpus"])
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump([float(score) for score in output.scores], file)


if __name__ == "__main__":
    main()
