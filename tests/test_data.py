"""Tokenised documents against TRL's own SFT batches; masks, splitting, packing, collating; what bad rows get."""

import logging
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import qwen3_chat_template

from ebft.data import BlockCollator, detect_format, has_prompt, pack_documents, padding_id, tokenize_documents
from tiny import CHAT_TEMPLATE, EOS, UNMARKED_CHAT_TEMPLATE, byte_bpe_tokenizer

disable_progress_bars()

TEXT = [
    {"text": "the quick brown fox"},
    {"text": "the lazy dog" + EOS},
    {"text": "d\u00e9j\u00e0 vu \u4f60\u597d \U0001f98a\r\n"},
]
PAIRS = [
    {"prompt": "two and two is", "completion": " four"},
    {"prompt": "def add(a, b):", "completion": "\n    return a + b" + EOS},
    {"prompt": "", "completion": "the dog"},
    {"prompt": "the quick brown fox jumps over", "completion": " the lazy dog. the dog sleeps; the fox does not."},
]
CHATS = [
    {"messages": [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]},
    {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "the fox?"},
            {"role": "assistant", "content": "quick"},
            {"role": "user", "content": "the dog?"},
            {"role": "assistant", "content": "lazy"},
        ]
    },
]
CHAT_PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in CHATS]
SHAREGPT = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in CHATS]
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
OLD_SHAREGPT = [
    {"conversations": [{"from": ROLES[m["role"]], "value": m["content"]} for m in row["messages"]]} for row in CHATS
]
TOKENS = [{"input_ids": [5, 6, 7, 8, 9]}, {"input_ids": [10, 11, 1]}]
MASKED = [{**row, "completion_mask": [0, 0, *[1] * (len(row["input_ids"]) - 2)]} for row in TOKENS]
LABELLED = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in TOKENS]


def tokenize(rows, tokenizer=None, max_length=64, **options) -> Any:
    tokenizer = tokenizer or byte_bpe_tokenizer(chat_template=True)
    return tokenize_documents(Dataset.from_list(rows), tokenizer, max_length=max_length, **options)


def trl_trainer(rows, tmp_path, template=None, formatting_func=None, **config) -> Any:
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SFTTrainer(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
            args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, **config),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            formatting_func=formatting_func,
        )


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        pytest.param(TEXT, {}, id="text"),
        pytest.param(TEXT, {"formatting_func": lambda row: row["text"].upper()}, id="formatting_func"),
        pytest.param(PAIRS, {}, id="pairs"),
        pytest.param(PAIRS, {"completion_only_loss": False}, id="pairs-all-tokens"),
        pytest.param(PAIRS, {"max_length": 12}, id="pairs-cut"),
        pytest.param([{"prompt": "the d", "completion": "og"}], {}, id="pairs-merged-boundary"),
        pytest.param(CHATS, {}, id="messages"),
        pytest.param(CHATS, {"assistant_only_loss": True}, id="messages-assistant"),
        pytest.param(CHATS, {"assistant_only_loss": True, "max_length": 20}, id="messages-assistant-cut"),
        pytest.param(
            CHATS[:1], {"assistant_only_loss": True, "template": qwen3_chat_template}, id="messages-trl-template"
        ),
        pytest.param([{**row, "tools": "[]"} for row in CHATS], {}, id="messages-tools"),
        pytest.param(SHAREGPT, {}, id="conversations"),
        pytest.param(CHAT_PAIRS, {}, id="chat-pairs"),
        pytest.param(CHAT_PAIRS, {"assistant_only_loss": True}, id="chat-pairs-assistant"),
        pytest.param(
            CHAT_PAIRS, {"assistant_only_loss": True, "completion_only_loss": False}, id="chat-pairs-all-assistant"
        ),
        pytest.param(TOKENS, {}, id="tokens"),
        pytest.param(MASKED, {}, id="tokens-completion-mask"),
        pytest.param(MASKED, {"completion_only_loss": True}, id="tokens-completion-mask-only"),
        pytest.param(LABELLED, {}, id="tokens-labels"),
    ],
)
@pytest.mark.filterwarnings("ignore:train_dataset")
def test_batches_equal_trl(rows, options, tmp_path):
    options = {"max_length": 128, **options}
    trainer = trl_trainer(rows, tmp_path, **options)
    theirs = trainer.data_collator(list(trainer.train_dataset))

    tokenizer = byte_bpe_tokenizer(chat_template=True)
    tokenizer.chat_template = options.pop("template", tokenizer.chat_template)
    documents = tokenize(rows, tokenizer, **options)
    ours = BlockCollator(padding_id(tokenizer))(list(documents))

    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    # The model's shift by one drops the first column of TRL's labels.
    assert torch.equal(ours["labels"][:, 1:], theirs["labels"][:, 1:])
    assert (ours["labels"][:, 0] == -100).all()
    assert (ours["labels"] != -100).any(1).all()


def test_sharegpts_own_roles():
    """`human` and `gpt`, which TRL leaves to the user."""
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    options = {"tokenizer": tokenizer, "assistant_only_loss": True}
    documents = list(tokenize(OLD_SHAREGPT, **options))
    assert documents == list(tokenize(SHAREGPT, **options)) and sum(documents[0]["loss_mask"]) > 0


def documents_in(ids, labels, doc_ids):
    return Counter(
        (tuple(ids[doc_ids == d].tolist()), tuple(labels[doc_ids == d].tolist())) for d in doc_ids.unique() if d >= 0
    )


def test_packed_documents_equal_trl(tmp_path):
    rows = [PAIRS[i % len(PAIRS)] for i in range(23)]
    trainer = trl_trainer(rows, tmp_path, max_length=80, packing=True)
    theirs = trainer.data_collator(list(trainer.train_dataset))
    starts = theirs["position_ids"][0] == 0

    packed: Any = pack_documents(tokenize(rows, max_length=80), 80)
    ours = BlockCollator(0)(list(packed))
    found = Counter()
    for row in range(len(packed)):
        found += documents_in(*(ours[name][row] for name in ("input_ids", "labels", "doc_ids")))
    assert found == documents_in(theirs["input_ids"][0], theirs["labels"][0], starts.cumsum(0) - 1)
    assert len(packed) == len(trainer.train_dataset) < len(rows)


def test_masks_of_a_prompt_completion_row():
    tokenizer = byte_bpe_tokenizer()
    (row,) = tokenize([{"prompt": "the fox", "completion": " sleeps"}], tokenizer)
    prompt, completion = tokenizer("the fox")["input_ids"], tokenizer(" sleeps" + EOS)["input_ids"]
    assert row == {
        "input_ids": prompt + completion,
        "completion_mask": [0] * len(prompt) + [1] * len(completion),
        "loss_mask": [0] * len(prompt) + [1] * len(completion),
        "document_id": 0,
    }
    assert completion[-1] == tokenizer.eos_token_id


def test_masks_of_text_and_of_marked_assistants():
    (row,) = tokenize(TEXT[:1])
    assert set(row["completion_mask"]) == {1}
    assert row["loss_mask"] == [0] + [1] * (len(row["input_ids"]) - 1)
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    row = tokenize(CHATS, tokenizer, assistant_only_loss=True)[1]
    marked = [token for token, answer in zip(row["input_ids"], row["completion_mask"], strict=True) if answer]
    assert tokenizer.decode(marked) == "quick<|im_end|>lazy<|im_end|>"
    assert row["loss_mask"] == row["completion_mask"]


def test_long_text_is_split_and_counted():
    tokenizer = byte_bpe_tokenizer()
    whole = tokenizer("the fox sleeps " * 9 + EOS)["input_ids"]
    rows = [{"text": "the dog"}, {"text": "the fox sleeps " * 9}, {"text": "a fox"}]
    with pytest.warns(UserWarning, match=r"eval_dataset: 1 document\(s\) longer than max_length=10 split"):
        documents = tokenize(rows, tokenizer, max_length=10, dataset_label="eval_dataset")
    pieces = documents["input_ids"][1:-1]
    assert [token for piece in pieces for token in piece] == whole
    assert [len(piece) for piece in pieces] == [10] * (len(whole) // 10) + [len(whole) % 10]
    assert all(mask[0] == 0 and all(mask[1:]) for mask in documents["loss_mask"])
    assert list(documents["document_id"]) == list(range(len(pieces) + 2))


def test_eos_alone_in_the_last_piece_is_trained_on():
    tokenizer = byte_bpe_tokenizer()
    whole = tokenizer("the fox sleeps " * 4 + EOS)["input_ids"]
    with pytest.warns(UserWarning, match="split") as caught:
        documents = tokenize([{"text": "the fox sleeps " * 4}], tokenizer, max_length=len(whole) - 1)
    assert documents["input_ids"][:] == [whole[:-1], whole[-2:]]
    assert documents["loss_mask"][1] == [0, 1]
    assert len(caught) == 1, "nothing is dropped"


def test_short_texts_are_not_said_to_have_a_prompt():
    with pytest.warns(UserWarning, match=r"1 document\(s\) of fewer than two tokens dropped") as caught:
        assert len(tokenize([{"text": ""}, {"text": "a fox"}])) == 1
    assert not any("prompt" in str(warning.message) for warning in caught)


def test_long_rows_are_not_said_to_be_too_long_for_the_tokenizer(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    tokenizer.model_max_length = 2
    for rows in (TEXT[:1], PAIRS[:1], CHATS[:1]):
        tokenize(rows, tokenizer)
    assert "longer than" not in caplog.text
    tokenizer(text="the fox sleeps")
    assert "longer than" in caplog.text, "where it is not silenced"


def test_cut_and_dropped_rows_are_counted():
    rows = [
        {"prompt": "the", "completion": " fox" * 20},
        {"prompt": "the fox " * 20, "completion": "never seen"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "", "completion": ""},
    ]
    with pytest.warns(UserWarning, match="max_length=10") as caught:
        documents = tokenize(rows, max_length=10)
    messages = [str(warning.message) for warning in caught]
    assert any("1 document(s) longer than max_length=10 cut" in message for message in messages), messages
    assert any("2 document(s) without a token to train on dropped" in message for message in messages), messages
    assert len(messages) == 2
    assert list(documents["document_id"]) == [0, 1]
    assert len(documents[0]["input_ids"]) == 10
    assert documents[1]["input_ids"] == byte_bpe_tokenizer()("ab" + EOS)["input_ids"]


def test_shifted_completions_are_counted():
    rows = [{"prompt": "the d", "completion": "og"}, {"prompt": "the", "completion": " dog"}]
    with pytest.warns(UserWarning, match=r"1 document\(s\) whose tokenised prompt does not begin"):
        tokenize(rows)


@pytest.mark.parametrize("rows", [TEXT, PAIRS, CHATS, MASKED], ids=["text", "pairs", "messages", "tokens"])
@pytest.mark.parametrize("known_columns", [True, False])
@pytest.mark.filterwarnings("ignore:train_dataset")
def test_streaming_equals_non_streaming(rows, known_columns):
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    if not known_columns:
        stream = _unknown(rows)
    streamed = tokenize_documents(stream, tokenizer, max_length=8)
    assert list(streamed) == list(tokenize(rows, tokenizer, max_length=8))
    packed = pack_documents(tokenize_documents(stream, tokenizer, max_length=8), 16)
    assert list(packed) == list(pack_documents(tokenize(rows, tokenizer, max_length=8), 16))


def _unknown(rows):
    def generate():
        yield from rows

    stream = IterableDataset.from_generator(generate)
    assert stream.column_names is None
    return stream


def test_streaming_is_lazy():
    def generate():
        yield {"text": "the fox"}
        raise RuntimeError("read too far")

    stream = tokenize_documents(IterableDataset.from_generator(generate), byte_bpe_tokenizer(), max_length=8)
    with pytest.raises(RuntimeError, match="read too far"):
        list(stream)


@pytest.mark.filterwarnings("ignore:train_dataset")
def test_worker_processes_and_tensor_formats_change_nothing():
    rows = TEXT * 3
    expected = list(tokenize(rows, max_length=8))
    assert list(tokenize(rows, max_length=8, num_proc=2)) == expected
    tensors = Dataset.from_list(TOKENS).with_format("torch")
    assert list(tokenize_documents(tensors, byte_bpe_tokenizer(), max_length=8)) == list(tokenize(TOKENS))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "a", "answer": "b"}], {}, r"columns \['answer', 'question'\].*`prompt` and `completion`"),
        ([{"prompt": "a"}], {}, "no known format"),
        ([{"text": "a"}, {"text": None}], {}, r"train_dataset, row 1: `text` is NoneType"),
        ([{"text": 3}], {}, r"row 0: `text` is int \(3\)"),
        (
            [{"text": "a"}],
            {"formatting_func": lambda row: [row["text"]]},
            "row 0: the text of formatting_func is list",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            {},
            "row 1: .*`completion` NoneType",
        ),
        ([{"prompt": CHAT_PAIRS[0]["prompt"], "completion": "b"}], {}, "row 0: .*both strings or both lists"),
        ([{"messages": []}, {"messages": []}], {}, r"row 0: `messages` is list \(\[\]\)"),
        ([{"messages": "user: hi"}], {}, "row 0: `messages` is str"),
        ([{"input_ids": [1, 2], "labels": [2, -100]}], {}, "row 0: a label is neither -100 nor"),
        ([{"input_ids": [1, 2], "completion_mask": [1]}], {}, "row 0: `completion_mask` must be .* 1 for 2 tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], {}, "row 0: `attention_mask` has zeros"),
        (
            [{"input_ids": [1, 2]}, {"input_ids": [1, -1]}],
            {},
            "row 1: `input_ids` has -1, but the tokenizer's ids are 0",
        ),
        ([{"input_ids": [1, 10**6]}], {}, "row 0: `input_ids` has 1000000"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
            {},
            "train_dataset, row 0: the chat template cannot render.*`content` a string",
        ),
        ([{"messages": [{"role": "user"}]}], {}, "train_dataset, row 0: `messages`\\[0\\] has no `content`"),
        ([{"input_ids": "ab"}], {}, "row 0: `input_ids` must be a list of integers"),
        (TEXT, {"max_length": 1}, "max_length=1: a document needs at least 2 tokens"),
        (TEXT, {"assistant_only_loss": True}, "assistant_only_loss=True, but train_dataset holds no messages"),
        (PAIRS, {"assistant_only_loss": True}, "assistant_only_loss=True, but train_dataset holds no messages"),
        (
            CHATS[:1] + [{"messages": CHATS[0]["messages"][:1]}],
            {"assistant_only_loss": True},
            "row 1: no message of `messages` has the role assistant",
        ),
        (TEXT, {"formatting_func": str, "completion_only_loss": True}, "completion_only_loss=True does not go with"),
        ([{"text": ""}], {}, "none of the 1 documents has a token to train on"),
    ],
)
@pytest.mark.filterwarnings("ignore:train_dataset")
def test_bad_rows_and_options(rows, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize(rows, **options)


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"eos_token": None}, TEXT, "processing_class.eos_token is None"),
        ({"chat_template": None}, CHATS, "processing_class.chat_template is None.*use a model with a chat template"),
        (
            {"chat_template": None},
            CHAT_PAIRS,
            "processing_class.chat_template is None.*use a model with a chat template",
        ),
        ({"chat_template": UNMARKED_CHAT_TEMPLATE}, CHATS, r"does not mark the assistant.*\{% generation %\}"),
    ],
)
def test_bad_tokenizers(changes, rows, message):
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    with pytest.raises(ValueError, match=message):
        tokenize(rows, tokenizer, assistant_only_loss=rows is not TEXT)


def test_bad_datasets():
    tokenizer = byte_bpe_tokenizer()
    good = Dataset.from_list(TEXT)
    cases: list[tuple[Any, str]] = [
        (good.select([]), "eval_dataset is empty"),
        (IterableDataset.from_generator(lambda: iter(())), "eval_dataset is empty"),
        (DatasetDict({"train": good}), r"eval_dataset is a DatasetDict.*\['train'\]"),
        (TEXT, "eval_dataset is a list"),
        (good.with_transform(lambda batch: batch), "eval_dataset has a transform"),
    ]
    for dataset, message in cases:
        with pytest.raises(ValueError, match=message):
            tokenize_documents(dataset, tokenizer, max_length=8, dataset_label="eval_dataset")


def test_warnings_about_options():
    with pytest.warns(UserWarning, match="formatting_func is ignored"):
        tokenize(TOKENS, formatting_func=str)
    tokenizer = byte_bpe_tokenizer(chat_template=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    with pytest.warns(UserWarning, match="does not learn to stop"):
        tokenize(CHATS, tokenizer, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (TEXT, {}, ("text", False)),
        (PAIRS, {}, ("prompt_completion", True)),
        (PAIRS, {"formatting_func": str}, ("prompt_completion", False)),
        (CHATS, {}, ("messages", True)),
        (CHATS, {"reasoning_tags": ["<a>", "<b>"]}, ("messages", True)),
        (SHAREGPT, {}, ("messages", True)),
        (TOKENS, {}, ("tokenized", False)),
        (MASKED, {"formatting_func": str}, ("tokenized", True)),
        (LABELLED, {}, ("tokenized", True)),
        ([{**CHATS[0], "text": "a"}], {}, ("messages", True)),
        ([{**PAIRS[0], "text": "a"}], {}, ("prompt_completion", True)),
    ],
)
def test_formats(rows, options, expected):
    dataset = Dataset.from_list(rows)
    assert (detect_format(dataset), has_prompt(dataset, **options)) == expected
    assert (detect_format(_unknown(rows)), has_prompt(_unknown(rows), **options)) == expected


def test_a_stream_is_not_read_far_ahead():
    """Of long rows, a thousand at once would be gigabytes of tokens."""
    drawn = []

    def generate():
        for i in range(1000):
            drawn.append(i)
            yield {"text": "a b c"}

    stream = tokenize_documents(IterableDataset.from_generator(generate), byte_bpe_tokenizer(), max_length=8)
    drawn.clear()
    for _ in zip(range(40), stream, strict=False):
        pass
    assert 40 <= len(drawn) < 80


def test_import_needs_neither_trl_nor_datasets():
    code = "import sys, ebft.data; sys.exit(any(name in sys.modules for name in ('trl', 'datasets', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
