"""Writes the data of the paper's three settings: `python recipes/paper/prepare.py qa_coding`, then `ebft train`.

Rows come from the Hub, or from local files of the same columns (`--source`), in a shuffled order, and go to
`data/TASK/train.jsonl` and, the first of them, `data/TASK/validation.jsonl`.
"""

import argparse
import ast
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from datasets import load_dataset
from tqdm import tqdm
from transformers import AutoTokenizer

from ebft.evaluation.translation import Segment, translation_prompt

Row = dict[str, Any]
SOURCES = {
    "qa_coding": ("nvidia/OpenCodeInstruct", ("default",)),
    "unstructured_code": ("tokyotech-llm/swallow-code", ("swallow-code",)),
    "translation": ("haoranxu/ALMA-Human-Parallel", ("cs-en", "de-en", "is-en", "ru-en", "zh-en")),
}
COLUMNS = {
    "qa_coding": ("id", "input", "output", "unit_tests"),
    "unstructured_code": ("text",),
    "translation": ("translation",),
}
ROWS = {"qa_coding": 100_000, "translation": 100_000}
TOKENS = 20_000_000  # of unstructured code
FENCE = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)```", re.DOTALL)


def qa_coding(row: Row) -> Iterator[Row]:
    """The question as a program's docstring, the code of the answer behind it: text that its tests can run."""
    code = "\n".join(FENCE.findall(row["output"])) or row["output"]
    prompt = 'r"""\n' + row["input"].strip().replace('"""', "'''") + '\n"""\n'
    tests = row["unit_tests"]
    tests = "\n".join(json.loads(tests) if isinstance(tests, str) else tests)
    if is_python(prompt + code) and is_python(tests):
        yield {"prompt": prompt, "completion": code.strip("\n") + "\n", "tests": tests, "id": str(row["id"])}


def is_python(text: str) -> bool:
    """Whether the text compiles."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return bool(text.strip())


def unstructured_code(row: Row) -> Iterator[Row]:
    """The file as it is."""
    if row["text"].strip():
        yield {"text": row["text"]}


def translation(row: Row) -> Iterator[Row]:
    """Both directions, in the words that `ebft evaluate --translation` asks with."""
    first, second = (code for code in row["translation"] if len(code) == 2)
    for source, target in ((first, second), (second, first)):
        texts = row["translation"][source].strip(), row["translation"][target].strip()
        if all(texts):
            segment = Segment(texts[0], (texts[1],), f"{source}-{target}")
            about = {"source": texts[0], "references": [texts[1]], "direction": segment.direction}
            yield {"prompt": translation_prompt(segment), "completion": f" {texts[1]}", **about}


CONVERTERS = {"qa_coding": qa_coding, "unstructured_code": unstructured_code, "translation": translation}


def rows_of(task: str, source: list[str], seed: int) -> Iterator[Row]:
    """Converted rows in a shuffled order."""
    name, configs = SOURCES[task]
    if absent := [path for path in source if not Path(path).is_file()]:
        raise SystemExit(f"--source {absent[0]}: there is no such file")
    if source:
        parts = [load_dataset("json", data_files=path, split="train", streaming=True) for path in source]
    else:
        parts = [load_dataset(name, config, split="train", streaming=True) for config in configs]
    for row in mixed([iter(part.shuffle(seed=seed, buffer_size=10_000)) for part in parts], Random(seed)):
        if missing := [column for column in COLUMNS[task] if column not in row]:
            raise SystemExit(f"{source or name} has no column {missing[0]!r}, only {sorted(row)}: rename what it has")
        yield from CONVERTERS[task](row)


def mixed(parts: list[Iterator[Row]], rng: Random) -> Iterator[Row]:
    """Rows of all parts in turns of chance; `interleave_datasets` wants the same columns in all, languages differ."""
    while parts:
        part = rng.choice(parts)
        row = next(part, None)
        if row is None:
            parts.remove(part)
        else:
            yield row


def limited(rows: Iterator[Row], tokens: int, tokenizer_name: str) -> Iterator[Row]:
    """Rows until so many tokens are reached, an EOS each included."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    for row in rows:
        if tokens <= 0:
            return
        tokens -= len(tokenizer(row["text"])["input_ids"]) + 1
        yield row


def main() -> None:
    """Read the options and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=CONVERTERS)
    parser.add_argument("--output_dir", type=Path, help="default: data/TASK")
    parser.add_argument(
        "--source", nargs="+", default=[], help="local .json or .jsonl files in place of the Hub's data"
    )
    parser.add_argument("--rows", type=int, help="rows to train on; default: as in the paper")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of unstructured_code, instead of rows")
    parser.add_argument("--tokenizer", default="Qwen/Qwen2.5-1.5B", help="counts those tokens")
    parser.add_argument("--validation", type=int, default=500, help="rows to hold out")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.output_dir or Path("data") / given.task
    rows = rows_of(given.task, given.source, given.seed)
    write(folder / "validation.jsonl", islice(rows, given.validation))
    train = islice(rows, given.rows or ROWS.get(given.task))
    if given.task == "unstructured_code" and given.rows is None:
        train = limited(train, given.tokens, given.tokenizer)
    if not write(folder / "train.jsonl", train):
        raise SystemExit(f"no row is left to train on: hold out fewer than --validation {given.validation}")


def write(path: Path, rows: Iterator[Row]) -> int:
    """Write rows as they come; how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for row in tqdm(rows, desc=path.name, unit=" rows"):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


if __name__ == "__main__":
    main()
