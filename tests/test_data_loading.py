"""Files, folders and names that `load_documents` reads, and the file and line it names when it cannot."""

import gzip
import json
import re
import socket
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ebft import data

datasets.disable_progress_bars()

LINES = b'{"text": "a"}\n{"text": "b"}\n'
ROWS = [{"text": "a"}, {"text": "b"}]


@pytest.fixture(autouse=True)
def own_cache_and_no_network(tmp_path_factory, monkeypatch):
    """The builders' cache is not the user's, and whoever opens a connection fails."""

    def refuse(*_):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def load_documents(*args, **options) -> Any:
    return data.load_documents(*args, **options)


def write(folder, files):
    """Write files by their names, compressed where these end in .gz."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", LINES, ROWS),
        ("a.jsonl", LINES.rstrip(b"\n"), ROWS),
        ("a.jsonl", LINES + b"\n\r\n \n", ROWS),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n\n"), ROWS),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES, ROWS),
        ("a.jsonl", '{"text": "d\u00e9j\u00e0 \\ud83e\\udd8a"}\n', [{"text": "d\u00e9j\u00e0 \U0001f98a"}]),
        ("odd [1]*.jsonl", LINES, ROWS),
        ("a.JSONL", LINES, ROWS),
        ("a.jsonl.gz", LINES, ROWS),
        ("a.json", LINES, ROWS),
        ("a.json", json.dumps(ROWS, indent=1), ROWS),
        ("a.json.gz", json.dumps(ROWS), ROWS),
        (
            "a.csv",
            'prompt,completion\r\n1 + 1,two\r\n"a\nb","c,d"\r\n',
            [{"prompt": "1 + 1", "completion": "two"}, {"prompt": "a\nb", "completion": "c,d"}],
        ),
        ("a.csv.gz", b"\xef\xbb\xbftext\na\nb\n", ROWS),
        ("a.txt", b"\xef\xbb\xbfone document\r\nof two lines, d\xc3\xa9j\xc3\xa0", None),
        ("a.txt.gz", b"one document\nof two lines, d\xc3\xa9j\xc3\xa0", None),
        ("a.py", b"one document\nof two lines, d\xc3\xa9j\xc3\xa0", None),
    ],
)
def test_files(tmp_path, name, content, rows, streaming):
    write(tmp_path, {name: content})
    dataset = load_documents(str(tmp_path / name), streaming=streaming)
    assert isinstance(dataset, datasets.IterableDataset if streaming else datasets.Dataset)
    assert list(dataset) == (rows or [{"text": "one document\nof two lines, d\u00e9j\u00e0"}])


def test_parquet_and_slices(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert list(load_documents(str(tmp_path / "a.parquet"))) == ROWS
    assert list(load_documents(str(tmp_path / "a.parquet"), split="train[1:]")) == ROWS[1:]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    assert len(load_documents(str(path))) == 2
    path.write_bytes(LINES * 2)
    assert len(load_documents(str(path))) == 4


def test_folder_of_texts_is_one_document_per_file(tmp_path):
    files = {
        "b.py": "b",
        "a/test.py": "a\n",
        "c.md": "",
        ".git/x.py": "hidden",
        "README.md": "readme",
        "x.bin": b"\xff",
    }
    dataset = load_documents(str(write(tmp_path, files)))
    assert dataset["text"][:] == ["a\n", "b", ""]


def test_folder_of_tables_has_the_splits_its_names_say(tmp_path):
    files = {"train.jsonl.gz": LINES, "test.jsonl.gz": b'{"text": "t"}\n', "README.md": "readme"}
    folder = str(write(tmp_path, files))
    assert list(load_documents(folder)) == ROWS
    assert list(load_documents(folder, split="test")) == [{"text": "t"}]
    with pytest.raises(ValueError, match=r"split='validation': Unknown split"):
        load_documents(folder, split="validation")


def test_a_local_path_wins_over_a_hub_name(tmp_path, monkeypatch):
    write(tmp_path, {"owner/name/a.jsonl": LINES})
    monkeypatch.chdir(tmp_path)
    assert list(load_documents("owner/name")) == ROWS


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.jsonl": LINES + b'{"text": oops}\n'},
            r"a\.jsonl, line 3, column 10: invalid JSON .*correct or remove it",
        ),
        ({"a.jsonl": b'{"text":\n "pretty"}\n'}, r"a\.jsonl, line 1.*one object per line"),
        ({"a.jsonl.gz": LINES + b"oops"}, r"a\.jsonl\.gz, line 3, column 1: invalid JSON"),
        ({"a.json": '[{"text": "a"},\n{"text" "b"}]'}, r"a\.json, line 2, column 9: invalid JSON"),
        ({"a.json": '[{"text": "a"}, 3]'}, r"a\.json, row 1: int where a row"),
        ({"a.jsonl": LINES + b"[1]\n"}, r"a\.jsonl, line 3: list where a row"),
        ({"a.jsonl": LINES + b"null\n"}, r"a\.jsonl, line 3: NoneType where a row"),
        ({"a.jsonl": LINES + b'{"text": "\xff"}\n'}, r"a\.jsonl, line 3: not UTF-8"),
        ({"a.csv": b"text\na\n\xff\n"}, r"a\.csv, line 3: not UTF-8"),
        ({"d/a.py": b"a\n", "d/b.py": b"\n\n\xe9 = 1\n"}, r"b\.py, line 3: not UTF-8"),
        ({"a.jsonl": LINES + b'\n{"text": null}\n'}, r"a\.jsonl, line 4: `text` is null: make it a string"),
        ({"a.jsonl": b'{"prompt": "a", "completion": 3}\n'}, r"a\.jsonl, line 1: `completion` is int: .* or a list"),
        ({"a.jsonl": b'{"messages": "hi"}\n'}, r"a\.jsonl, line 1: `messages` is str: make it a list"),
        ({"a.jsonl": b""}, r"a\.jsonl: no rows"),
        ({"a.jsonl": b"\n\n"}, r"a\.jsonl: no rows"),
        ({"a.json": b"[]"}, r"a\.json: no rows"),
        ({"a.csv": b"text\n"}, r"a\.csv: no rows"),
        ({"a.txt": b""}, r"a\.txt: no rows"),
        (
            {"a.jsonl": LINES + b'{"prompt": "a", "completion": "b"}\n'},
            r"line 3 has the columns \['completion', 'prompt'",
        ),
        ({"d/a.jsonl": LINES, "d/b.jsonl": b'{"messages": []}'}, r"b\.jsonl, line 1 has .*a\.jsonl, line 1 has"),
        ({"d/a.csv": "text\na\n", "d/b.csv": "prompt,completion\na,b\n"}, "have the same columns and types"),
        ({"a.csv": "text\na\nb,c\n"}, r"Expected 1 fields in line 3, saw 2"),
        ({"d/a.csv": "text\na\n", "d/b.py": "b"}, r"mixes kinds of files \(a.csv and b.py\)"),
        ({"d/a.bin": "a"}, r"holds no file of a known kind: \.jsonl"),
        ({"a.docx": "a"}, r"has the suffix '\.docx', not one of a known kind: \.jsonl"),
        ({"a.parquet": "no parquet"}, r"a\.parquet', split='train'"),
    ],
)
def test_bad_files(tmp_path, files, message):
    write(tmp_path, files)
    name = next(iter(files)).split("/")[0]
    with pytest.raises(ValueError, match=message):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_empty_streams(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="no rows"):
        load_documents(str(tmp_path / name), streaming=True)


def test_the_beginning_of_a_streamed_file_is_checked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES + b'{"text": null}\n')
    with pytest.raises(ValueError, match="line 3: `text` is null"):
        load_documents(str(path), streaming=True)
    path.write_bytes(LINES * 500 + b'{"text": null}\n')
    assert next(iter(load_documents(str(path), streaming=True))) == ROWS[0]


def test_the_message_names_the_option(tmp_path):
    with pytest.raises(ValueError, match="^eval_dataset_name='nosuch.jsonl': no such file"):
        load_documents("nosuch.jsonl", field="eval_dataset_name")


def test_truncated_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES * 999)[:-20])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        load_documents(str(path))
    path.write_bytes(LINES)
    with pytest.raises(ValueError, match="not a complete gzip file"):
        load_documents(str(path))


@pytest.mark.parametrize("name", ["./here", "/no/where", "~/none", "a/b/c", "data/my.jsonl", "notes.txt", "a\\b"])
def test_missing_paths_never_reach_the_hub(name):
    with pytest.raises(ValueError, match=re.escape(f"dataset_name={name!r}: no such file or folder")) as error:
        load_documents(name)
    assert "not a Hub name either" in str(error.value)


@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_missing_hub_datasets(name):
    with pytest.raises(ValueError, match=f"dataset_name='{name}' is no local file or folder, and the Hub"):
        load_documents(name)


@pytest.mark.parametrize("target", ["../secret.jsonl", "../*.jsonl", "{absolute}"])
def test_readme_of_a_folder_cannot_name_files_elsewhere(tmp_path, target):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "fine"}\n')
    target = target.format(absolute=tmp_path / "secret.jsonl")
    readme = folder / "README.md"
    readme.write_text(f"---\nconfigs:\n- config_name: default\n  data_files: '{target}'\n---\n")
    with pytest.raises(ValueError, match="dataset_name=.*not in that folder"):
        load_documents(str(folder))
    readme.write_text("---\nconfigs:\n- config_name: default\n  data_files: 'a.jsonl'\n---\n")
    assert load_documents(str(folder))["text"][:] == ["fine"]


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_links_of_a_folder_cannot_leave_it(tmp_path, suffix):
    secret = tmp_path / f"secret.{suffix}"
    secret.write_text('{"text": "secret"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / f"b.{suffix}").symlink_to(secret)
    with pytest.raises(ValueError, match=rf"names .*b\.{suffix}, which is not in that folder"):
        load_documents(str(folder))
    assert len(load_documents(str(folder / f"b.{suffix}"))) == 1  # asked for by name


def test_folder_of_the_hubs_cache_may_link_to_its_blobs(tmp_path):
    blob, snapshot = tmp_path / "blobs" / "0a", tmp_path / "snapshots" / "1f"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    blob.write_text('{"text": "fine"}\n')
    (snapshot / "a.jsonl").symlink_to(blob)
    assert load_documents(str(snapshot))["text"][:] == ["fine"]
