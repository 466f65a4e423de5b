"""What a resumed run may change: every setting has its place, and other data are noticed."""

import dataclasses
import json
import warnings

import pytest
from datasets import Dataset, load_dataset

from ebft.cli.arguments import DataArguments, MethodArguments, ModelArguments
from ebft.config import EBFTConfig
from ebft.data import fingerprint as module
from ebft.data.fingerprint import fingerprint
from ebft.resuming import DOCUMENTS, FREE, WARNED, check_data, check_settings

SETTINGS = {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's manifest, of two processes."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    data = {"rows": 3, "rows_read": 3, "crc32": 5}
    manifest = {"settings": SETTINGS, "processes": 2, "data": data, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_lists_name_settings_that_there_are():
    kinds = (EBFTConfig, DataArguments, MethodArguments, ModelArguments)
    known = {spec.name for kind in kinds for spec in dataclasses.fields(kind)}
    listed = [*FREE, *WARNED, *DOCUMENTS]
    assert len(listed) == len(set(listed)) and set(listed) <= known


@pytest.mark.parametrize(
    ("change", "processes"),
    [
        ({}, 2),
        ({"save_steps": 3, "output_dir": "elsewhere", "dataset_name": "moved.jsonl"}, 2),
        ({"gather_for_sampling": True}, 2),  # sends less, and computes the same
        ({"beta": 0.0, "top_p": 1.0}, 2),  # defaults of settings that came later
    ],
)
def test_what_may_change_without_a_word(checkpoint, change, processes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_settings(checkpoint, SETTINGS | change, processes)


@pytest.mark.parametrize(
    ("change", "processes", "said"),
    [
        ({"max_steps": 8}, 2, "max_steps 4 -> 8"),
        ({"bf16": True}, 2, "bf16 None -> True"),
        ({"accelerate_config": "ddp"}, 2, "accelerate_config None -> ddp"),
        ({"gradient_accumulation_steps": 4}, 1, "gradient_accumulation_steps 2 -> 4, num_processes 2 -> 1"),
        ({"per_device_train_batch_size": 1}, 4, "num_processes 2 -> 4, per_device_train_batch_size 2 -> 1"),
    ],
)
def test_what_may_change_with_a_warning(checkpoint, change, processes, said):
    with pytest.warns(UserWarning, match=f"resuming with other settings .{said}.: no longer the unbroken run"):
        check_settings(checkpoint, SETTINGS | change, processes)


@pytest.mark.parametrize(
    ("change", "processes", "said"),
    [
        ({"learning_rate": 2e-2, "max_steps": 8}, 2, "learning_rate 0.01 -> 0.02"),
        ({"beta": 0.1}, 2, "beta 0.0 -> 0.1"),
        ({"use_peft": True}, 2, "use_peft None -> True"),
        ({}, 1, "num_processes 2 -> 1"),
        ({"gradient_accumulation_steps": 4}, 2, "gradient_accumulation_steps 2 -> 4"),
        ({"a_setting_of_tomorrow": 1}, 2, "a_setting_of_tomorrow None -> 1"),
    ],
)
def test_what_may_not_change(checkpoint, change, processes, said):
    with pytest.raises(ValueError, match=f"was written with other settings .{said}.: set them back, or start a new"):
        check_settings(checkpoint, SETTINGS | change, processes)


def test_other_data_are_refused(checkpoint):
    check_data(checkpoint, {"rows": 3, "rows_read": 3, "crc32": 5})
    with pytest.raises(ValueError, match=r"train_dataset is not the one it was trained on .rows 3 -> 4, .*bring that"):
        check_data(checkpoint, {"rows": 4, "rows_read": 4, "crc32": 6})


ROWS = [
    {"input_ids": [5, 6, 7], "prompt": "a"},
    {"input_ids": [], "prompt": None},
    {"input_ids": [8, 9], "prompt": "\u00e9"},
    {"input_ids": [5], "prompt": "a"},
]


def test_the_fingerprint_is_of_the_rows_not_of_their_container(tmp_path):
    expected = fingerprint(Dataset.from_list(ROWS))
    assert expected["rows"] == expected["rows_read"] == 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    read = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
    assert fingerprint(read) == expected
    assert fingerprint(Dataset.from_list(ROWS[::-1]).select([3, 2, 1, 0])) == expected
    assert fingerprint(Dataset.from_list(ROWS[:2] + ROWS).select(range(2, 6))) == expected


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:3],
        [ROWS[1], ROWS[0], *ROWS[2:]],
        [*ROWS[:3], {"input_ids": [4], "prompt": "a"}],
        [*ROWS[:2], {"input_ids": [8], "prompt": "\u00e9"}, {"input_ids": [9, 5], "prompt": "a"}],
        [*ROWS[:3], {"input_ids": [5], "prompt": "b"}],
    ],
    ids=["a row less", "another order", "a token", "a border", "text"],
)
def test_the_fingerprint_tells_rows_apart(rows):
    assert fingerprint(Dataset.from_list(rows)) != fingerprint(Dataset.from_list(ROWS))


def test_a_stream_is_known_by_its_first_rows(monkeypatch):
    monkeypatch.setattr(module, "FIRST_ROWS", 3)

    def of(rows):
        return fingerprint(Dataset.from_list(rows).to_iterable_dataset())

    assert of(ROWS) == of(ROWS[:3]) == of(ROWS) | {"rows": None, "rows_read": 3}
    assert of(ROWS) != of(ROWS[1:])


def test_of_many_rows_evenly_spaced_ones_are_read(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    rows = [{"input_ids": [i]} for i in range(5)]
    before = fingerprint(Dataset.from_list(rows))
    assert (before["rows"], before["rows_read"]) == (5, 3)
    for i, noticed in ((0, True), (1, False), (2, True), (4, True)):
        changed = [*rows[:i], {"input_ids": [9]}, *rows[i + 1 :]]
        assert (fingerprint(Dataset.from_list(changed)) != before) == noticed
