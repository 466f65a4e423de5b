"""The translation task from real parallel text: the same files, of any pair of languages that is in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ..evaluation.translation import LANGUAGE_NAMES, Segment, codes_of, load_translations, translation_prompt
from .files import Row, Task
from .translation import ABOUT


@dataclass(frozen=True)
class Sizes:
    """How many segments of each split at most; what the file has beyond held-out ones and train is for pretrain."""

    train: int = 3000
    train_small: int = 300
    validation: int = 100
    test: int = 300
    characters: int = 600  # of source and translation together at most: the base model has 1024 positions
    pretrain: int = 24000  # so that training takes minutes


SMOKE = Sizes(train=40, train_small=10, validation=6, test=8, pretrain=100)


def make(
    path: Path, held_out: Path | None, direction: str | None, names: Mapping[str, str], sizes: Sizes, seed: int
) -> Task:
    """All files of the task.

    Args:
        path: Parallel text in a format of `ebft evaluate --translation`.
        held_out: The same, for validation and test; without, segments of `path` are held out.
        direction: Such as "de-en", where the file does not say.
        names: Language codes -> names in the prompt.
        sizes: How many of each.
        seed: Of the choice.

    Raises:
        ValueError: A file cannot be read, mixes directions, or has too few segments.
    """
    texts = load(path, direction, "parallel_text", sizes.characters)
    rng = Random(f"{seed} parallel")
    rng.shuffle(texts)
    others = texts if held_out is None else load(held_out, direction, "parallel_validation", sizes.characters)
    directions = sorted({segment.direction for segment in (*texts, *others)})
    if len(directions) > 1:
        raise ValueError(f"direction: there are {', '.join(directions)}: choose one with --direction")
    if held_out is not None:
        rng.shuffle(others)
    wanted = sizes.validation + sizes.test
    if len(others) < wanted:
        option, name = ("parallel_text", path) if held_out is None else ("parallel_validation", held_out)
        raise ValueError(f"{option}={str(name)!r} has {len(others)} usable segments, {wanted} are held out: add some")
    parts = {"validation": others[: sizes.validation], "test": others[sizes.validation : wanted]}
    sources = {segment.source for part in parts.values() for segment in part}
    rest = [segment for segment in texts if segment.source not in sources]
    if len(rest) < 2 * sizes.train_small:
        raise ValueError(
            f"parallel_text={str(path)!r} leaves {len(rest)} segments to train on: there have to be "
            f"{2 * sizes.train_small} at least; add some"
        )
    count = min(sizes.train, len(rest) // 2)  # at least as many are left for the base model
    parts |= {"train": rest[:count], "pretrain": rest[count : count + sizes.pretrain]}
    # What `ebft evaluate` has to be told as well, for the same prompts.
    told = [f"{code}={names[code]}" for code in codes_of(directions[0]) if names.get(code) != LANGUAGE_NAMES.get(code)]
    about = {**ABOUT, "direction": directions[0], "parallel_text": path.name, "language_names": " ".join(told)}
    about["left_out"] = f"segments of more than {sizes.characters} characters, and repeated sources"
    splits = {name: [translation_prompt(each, names=names) for each in part] for name, part in parts.items()}
    return Task(files_of(parts, splits, sizes), splits, about)


def load(path: Path, direction: str | None, field: str, characters: int) -> list[Segment]:
    """Segments with different sources that are not too long.

    Raises:
        ValueError: There is no such file, or it cannot be read.
    """
    if not path.expanduser().is_file():  # it would be taken for a name of the Hub, and this command works offline
        raise ValueError(f"{field}={str(path)!r}: no such file; correct the path")
    found: dict[str, Segment] = {}
    for segment in load_translations(str(path), direction=direction, field=field):
        if len(segment.source) + max(map(len, segment.references)) <= characters:
            found.setdefault(segment.source, segment)
    return list(found.values())


def files_of(
    parts: Mapping[str, Sequence[Segment]], splits: Mapping[str, list[str]], sizes: Sizes
) -> dict[str, list[Row]]:
    """Rows of every file, by its name."""
    files: dict[str, list[Row]] = {}
    for name, part in parts.items():
        rows = [
            {
                "id": f"{name}/{i}" if len(segment.references) == 1 else f"{name}/{i}/{j}",
                "prompt": prompt,
                "completion": f" {reference.strip()}",
                "source": segment.source,
                "direction": segment.direction,
            }
            for i, (segment, prompt) in enumerate(zip(part, splits[name], strict=True))
            for j, reference in enumerate(segment.references[:2])
        ]
        if name == "pretrain":
            files[name] = [{"text": row["prompt"] + row["completion"]} for row in rows]
            continue
        files[name] = rows
        if name != "train":
            files[f"{name}_segments"] = [
                {
                    "id": f"{name}/{i}",
                    "source": segment.source,
                    "references": list(segment.references),
                    "direction": segment.direction,
                }
                for i, segment in enumerate(part)
            ]
    files["train_small"] = files["train"][: sizes.train_small]
    return files
