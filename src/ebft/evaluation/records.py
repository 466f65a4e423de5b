"""Records on disk, a line each, so that an interrupted evaluation goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]
RECORDS = "records"  # the folder of all files


class RecordFile:
    """Records with a unique `id`, and in the first line the settings they belong to.

    Args:
        path: Of the file; read if it is there.
        settings: Everything that the records depend on, as JSON has it.

    Raises:
        ValueError: The file is of other settings, or a line but the last is damaged.
    """

    def __init__(self, path: Path, settings: Record):
        self.path, self.records = path, {}
        settings = json.loads(json.dumps(settings))
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last one may have been cut off
        if not whole:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
            return
        before, *records = [self._parsed(line, number) for number, line in enumerate(whole, 1)]
        check_same(before, settings, path.parent.parent)
        if len(whole) < len(lines):
            path.write_bytes(b"".join(whole))
        self.records = {record["id"]: record for record in records}

    def _parsed(self, line: bytes, number: int) -> Record:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or (number > 1 and ("id" not in found or found.get("verdicts") == [])):
            remedy = "delete that line, what it says is measured again" if number > 1 else "delete the file"
            raise ValueError(f"output_dir: {self.path}, line {number}: no record of an evaluation: {remedy}.")
        return found

    def __contains__(self, key: Any) -> bool:
        return key in self.records

    def append(self, records: list[Record]) -> None:
        """Keep records and write them."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self.records |= {record["id"]: record for record in records}


def check_same(
    before: Record, now: Record, folder: Path, remedy: str = "choose another folder, or delete it."
) -> None:
    """Refuse to mix results of different settings in one folder.

    Raises:
        ValueError: Names what changed.
    """
    changed = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
    if not changed:
        return
    hashes = {
        "data": "the documents, problems or segments",
        "state": "files of the model",
        "phi": "the feature network",
    }
    text = ", ".join(hashes.get(key, f"{key} {before.get(key)!r} -> {now.get(key)!r}") for key in changed)
    raise ValueError(f"output_dir='{folder}' holds results of other settings ({text}): {remedy}")
