"""Conversations token by token: what is an answer, behind which history, where blocks start, and what is refused."""

import warnings
from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from trl.chat_template_utils import (
    glm4moe_chat_template,
    gptoss_chat_template,
    qwen2_5_chat_template,
    qwen3_chat_template,
)

from ebft.data import BlockCollator, pack_documents, tokenize_documents
from ebft.layouts import batch_layout
from ebft.prepare import prepare_datasets
from tiny import CHAT_TEMPLATE, EOS, UNMARKED_CHAT_TEMPLATE, byte_bpe_tokenizer
from training import config

disable_progress_bars()

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the fox?"},
    {"role": "assistant", "content": "quick and brown it is"},
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "lazy"},
    {"role": "user", "content": "thanks"},
]
GREETING = [{"role": "assistant", "content": "hello"}, *TALK[1:3]]
THOUGHT = [{**m, "reasoning_content": f"hm {m['content']}"} if m["role"] == "assistant" else m for m in TALK[1:5]]
# ChatML that keeps the reasoning of the last message alone, marked or not.
FORGETFUL = CHAT_TEMPLATE.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ ('<think>' + message['reasoning_content'] + '</think>' if loop.last and message['reasoning_content'] else '') "
    "+ message['content'] + '<|im_end|>' }}{% endgeneration %}",
)
# What CHAT_TEMPLATE makes of TALK, by hand, and whether it is an answer: in spans that begin and end with a token.
PIECES = [
    ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\n", 0),
    ("quick and brown it is<|im_end|>", 1),
    ("\n<|im_start|>user\nthe dog?<|im_end|>\n<|im_start|>assistant\n", 0),
    ("lazy<|im_end|>", 1),
    ("\n<|im_start|>user\nthanks<|im_end|>\n", 0),
]


def tokenizer_with(template=CHAT_TEMPLATE):
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tokenize(rows, template=CHAT_TEMPLATE, max_length=512, **options) -> Any:
    return tokenize_documents(Dataset.from_list(rows), tokenizer_with(template), max_length=max_length, **options)


def chats(*conversations) -> list[dict]:
    return [{"messages": messages} for messages in conversations]


def expected_of(pieces) -> dict[str, list[int]]:
    """Tokens of pieces that are tokenised apart, and the flag of each one's piece."""
    tokenizer, ids, mask = byte_bpe_tokenizer(), [], []
    for text, flag in pieces:
        tokens = tokenizer(text)["input_ids"]
        ids += tokens
        mask += [flag] * len(tokens)
    return {"input_ids": ids, "completion_mask": mask}


def answers(document) -> list[str]:
    """The texts of the runs of a document's answer tokens."""
    runs, before = [], 0
    for token, flag in zip(document["input_ids"], document["completion_mask"], strict=True):
        if flag and not before:
            runs.append([])
        if flag:
            runs[-1].append(token)
        before = flag
    return [byte_bpe_tokenizer().decode(run) for run in runs]


def trained(document) -> str:
    pairs = zip(document["input_ids"], document["loss_mask"], strict=True)
    return byte_bpe_tokenizer().decode([token for token, flag in pairs if flag])


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("only", [False, True])
def test_masks_of_a_conversation_token_by_token(only, no_warnings):
    (document,) = tokenize(chats(TALK), assistant_only_loss=only)
    expected = expected_of(PIECES)
    everything = [0] + [1] * (len(expected["input_ids"]) - 1)
    loss = expected["completion_mask"] if only else everything
    assert document == {**expected, "loss_mask": loss, "document_id": 0}


@pytest.mark.parametrize("completion_only", [None, False])
def test_masks_of_a_prompt_and_a_completion_of_several_messages(completion_only, no_warnings):
    """Answers are the completion's turns alone; trained on is what TRL trains on."""
    row = {"prompt": TALK[:4], "completion": [TALK[4], *TALK[1:3]]}
    (document,) = tokenize([row], completion_only_loss=completion_only)
    given = "".join(text for text, _ in PIECES[:3])
    pieces = [(given, 0), *PIECES[3:4], ("\n" + PIECES[0][0].split("\n", 2)[2], 0), *PIECES[1:2], ("\n", 0)]
    expected = expected_of(pieces)
    start = len(expected_of(pieces[:1])["input_ids"])
    rest = len(expected["input_ids"]) - start
    loss = [0] * start + [1] * rest if completion_only is None else [0] + [1] * (start + rest - 1)
    assert document == {**expected, "loss_mask": loss, "document_id": 0}


def test_a_single_answer_needs_no_markers(no_warnings):
    row = {"prompt": TALK[:4], "completion": TALK[4:5]}
    one, other = (
        tokenize([row], template, needs_turns=True, assistant_only_loss=True)[0]
        for template in (CHAT_TEMPLATE, UNMARKED_CHAT_TEMPLATE)
    )
    assert answers(one) == ["lazy<|im_end|>"] and answers(other) == ["lazy<|im_end|>\n"]
    assert trained(one) == answers(one)[0] and trained(other) == answers(other)[0]
    assert one["input_ids"] == other["input_ids"]


def test_an_opening_turn_is_an_answer_of_the_whole_alone(no_warnings):
    (document,) = tokenize(chats(GREETING))
    assert answers(document) == ["hello<|im_end|>", "quick and brown it is<|im_end|>"]
    (document,) = tokenize(chats(GREETING), split_turns=True)
    assert answers(document) == ["quick and brown it is<|im_end|>"]


def test_an_answer_starts_where_the_model_begins_to_write(no_warnings):
    """TRL's Qwen2.5 marks the line break that the generation prompt ends with."""
    (document,) = tokenize(chats(TALK), qwen2_5_chat_template, assistant_only_loss=True)
    assert answers(document) == ["quick and brown it is<|im_end|>\n", "lazy<|im_end|>\n"]
    assert trained(document) == "\nquick and brown it is<|im_end|>\n\nlazy<|im_end|>\n", "as TRL"


@pytest.mark.parametrize(
    ("template", "messages", "split"),
    [
        (qwen3_chat_template, TALK, None),
        (qwen3_chat_template, TALK, True),
        (qwen3_chat_template, THOUGHT, None),
        (qwen3_chat_template, THOUGHT, True),
        (FORGETFUL, THOUGHT, None),
        (FORGETFUL, THOUGHT, True),
        (FORGETFUL, TALK, True),  # where nothing is forgotten
        (UNMARKED_CHAT_TEMPLATE, TALK, True),
    ],
)
@pytest.mark.parametrize("row", ["messages", "pair"])
def test_each_turn_behind_the_history_that_the_model_sees(template, messages, split, row):
    """One document per turn: what the template itself makes of the messages up to the turn, and nothing else."""
    first = 0 if row == "messages" else 2 if messages is TALK else 1
    rows = chats(messages) if not first else [{"prompt": messages[:first], "completion": messages[first:]}]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if split else "ignore")
        documents = tokenize(rows, template, split_turns=split, needs_turns=True)
    tokenizer = tokenizer_with(template)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert len(documents) == len(turns) == 2
    for i, document in zip(turns, documents, strict=True):
        history = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        assert whole.startswith(history)
        turn = whole[len(history) :]
        pieces = (
            [(history, 0), (turn.removesuffix("\n"), 1), ("\n", 0)]
            if template is FORGETFUL
            else [
                (history, 0),
                (turn, 1),
            ]
        )
        expected = expected_of(pieces)
        assert {name: document[name] for name in expected} == expected
        assert document["loss_mask"] == expected["completion_mask"]
        assert ("hm" in turn) == (messages is THOUGHT)


def test_other_history_is_told_once_with_row_and_place():
    rows = chats(TALK[:3], [*THOUGHT, TALK[5]], THOUGHT)
    for split, what, count in ((None, "became one document per assistant turn", 5), (False, "hold a turn or", 3)):
        with pytest.warns(UserWarning, match="train_dataset") as caught:
            documents = tokenize(rows, FORGETFUL, split_turns=split)
        assert len(documents) == count
        (message,) = [str(warning.message) for warning in caught]
        assert message.startswith(f"train_dataset: 2 conversation(s) {what}")
        assert message.endswith(
            "First: train_dataset, row 1: behind 'im_start|>assistant\\n' the whole has 'quick and brown it i', and "
            "the messages up to `messages`[1] alone have '<think>hm quick and '"
        )


def test_kept_whole_it_is_what_trl_trains_on():
    with pytest.warns(UserWarning, match="hold a turn or a history"):
        (document,) = tokenize(chats(THOUGHT), qwen3_chat_template, split_turns=False)
    thoughts = [f"<think>\nhm {m['content']}\n</think>\n\n{m['content']}<|im_end|>\n" for m in THOUGHT[1::2]]
    assert answers(document) == thoughts


def test_another_last_token_is_another_turn():
    """gpt-oss ends a conversation with another token than a turn; an EOS behind a turn's own end is none of its."""
    with pytest.warns(UserWarning, match=r"the whole has 'end\|>.*alone have 'return\|>'"):
        documents = tokenize(chats(TALK[1:5]), gptoss_chat_template)
    assert [answers(document)[0][-10:] for document in documents] == ["<|return|>"] * 2
    ended = CHAT_TEMPLATE.replace(
        "{% if add_gen", f"{{% if not add_generation_prompt %}}{EOS}{{% endif %}}{{% if add_gen"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tokenize(chats(TALK), ended)) == 1
        # GLM's own template ends no turn; TRL's version does, with the token that begins the next.
        assert len(tokenize(chats(TALK), glm4moe_chat_template)) == 1


def test_a_generation_prompt_that_no_turn_begins_with_is_told():
    """As of DeepSeek's distilled models, which open the reasoning there: no split could mend that."""
    template = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
    with pytest.warns(UserWarning, match=r"1 document\(s\) whose tokenised prompt does not begin"):
        (document,) = tokenize(chats(TALK), template)
    assert answers(document) == ["quick and brown it is<|im_end|>", "lazy<|im_end|>"]


def test_a_generation_prompt_that_grows_together_with_the_turn_is_told():
    speech = "the d{% generation %}{{ message['content'] }}{% endgeneration %}"
    template = f"{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}{speech}{{% else %}}"
    template += "{{ message['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}the d{% endif %}"
    tokens = byte_bpe_tokenizer().tokenize("is it the dog")
    assert tokens[-1].endswith("og") and len(tokens[-1]) > 2, "one token of both"
    for said, told in (("og", 1), (" og", 0)):
        messages = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": said}]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokenize(chats(messages), template)
        assert sum("whose tokenised prompt does not begin" in str(warning.message) for warning in caught) == told


def test_what_cannot_be_split_stays_whole_and_is_told():
    opening = [{"role": "assistant", "content": "hello", "reasoning_content": "hm"}, TALK[1]]
    with pytest.warns(UserWarning, match="hold a turn or a history"):
        (document,) = tokenize(chats(opening), FORGETFUL)
    assert answers(document) == ["hello<|im_end|>"]


def blocks_of(rows, G=3, **settings) -> list[list[str]]:
    """The references of the blocks of each row, as text."""
    tokenizer = byte_bpe_tokenizer()
    batch = BlockCollator(0)(rows)
    layout = batch_layout(batch, config("unused", completion_length=G, stride=2, **settings), "completion", None)
    references = layout.references(batch["input_ids"])
    return [
        [tokenizer.decode(block) for block, valid in zip(row, kept, strict=True) if valid]
        for row, kept in zip(references.tolist(), layout.valid.tolist(), strict=True)
    ]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_lie_in_every_turn_and_in_none_else(streamed, packed, no_warnings):
    dataset: Any = Dataset.from_list(chats(TALK, TALK[1:], TALK))
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    args = config("unused", max_length=400, completion_length=3, stride=2, packing=packed)
    rows, _, anchors = prepare_datasets(dataset, None, tokenizer_with(), args, None)
    rows = list(rows)
    assert anchors == "completion" and len(rows) == (1 if packed else 3)
    one = []
    for text in ("quick and brown it is<|im_end|>", "lazy<|im_end|>"):
        ids = byte_bpe_tokenizer()(text)["input_ids"]
        assert len(ids) >= 3, "room for a block"
        one += [byte_bpe_tokenizer().decode(ids[start : start + 3]) for start in range(0, len(ids) - 2, 2)]
    assert [block for row in blocks_of(rows) for block in row] == one * 3


def test_settings_of_a_run_reach_the_documents():
    dataset = Dataset.from_list(chats(TALK))
    for split, count in ((True, 2), (None, 1)):
        args = config("unused", max_length=400, split_turns=split)
        assert len(prepare_datasets(dataset, None, tokenizer_with(), args, None)[0]) == count


@pytest.mark.filterwarnings("ignore:train_dataset")
def test_streams_packing_and_worker_processes_change_nothing():
    rows = chats(TALK, THOUGHT, TALK[:3]) * 2
    expected = list(tokenize(rows, FORGETFUL))
    assert len(expected) == 8
    stream: Any = Dataset.from_list(rows).to_iterable_dataset()
    stream = tokenize_documents(stream, tokenizer_with(FORGETFUL), max_length=512)
    assert list(stream) == expected == list(tokenize(rows, FORGETFUL, num_proc=2))
    assert list(pack_documents(stream, 512)) == list(pack_documents(tokenize(rows, FORGETFUL), 512))


def test_a_stream_warns_once():
    stream: Any = Dataset.from_list(chats(THOUGHT, TALK, THOUGHT)).to_iterable_dataset()
    stream = tokenize_documents(stream, tokenizer_with(FORGETFUL), max_length=512)
    with pytest.warns(UserWarning, match="became") as caught:
        assert len(list(stream)) + len(list(stream)) == 10
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("train_dataset: some conversation(s) became") and "train_dataset, row 0" in message


def test_long_conversations_are_cut_and_late_turns_dropped():
    limit = len(expected_of(PIECES[:2])["input_ids"]) + 1  # of the first answer, and no more
    with pytest.warns(UserWarning, match=r"1 document\(s\) longer than max_length=\d+ cut"):
        (document,) = tokenize(chats(TALK), max_length=limit)
    assert answers(document) == ["quick and brown it is<|im_end|>"]
    with pytest.warns(UserWarning, match=r"1 document\(s\) without a token to train on dropped: the prompt alone"):
        (document,) = tokenize(chats(TALK), max_length=limit, split_turns=True)
    assert answers(document) == ["quick and brown it is<|im_end|>"]


def test_where_nothing_needs_turns_unmarked_conversations_are_whole(no_warnings):
    (document,) = tokenize(chats(TALK[:2] + TALK), UNMARKED_CHAT_TEMPLATE)
    assert set(document["completion_mask"]) == {1}
    row = {"prompt": TALK[:2], "completion": TALK[2:]}
    (document,) = tokenize([row], UNMARKED_CHAT_TEMPLATE)
    assert answers(document) == ["".join(text for text, _ in PIECES).removeprefix(PIECES[0][0])]
    for settings in (dict(rl_coef=0.0, ce_coef=1.0), dict(anchors="all")):
        args = config("unused", max_length=400, **settings)
        dataset = Dataset.from_list(chats(TALK))
        assert len(prepare_datasets(dataset, None, tokenizer_with(UNMARKED_CHAT_TEMPLATE), args, None)[0]) == 1
    with pytest.raises(ValueError, match="blocks and reasoning_tags are of the assistant's turns"):
        prepare_datasets(dataset, None, tokenizer_with(UNMARKED_CHAT_TEMPLATE), config("unused"), None)


def _without(turn: int, **changes) -> list[dict]:
    return [{**m, **changes} if i == turn else m for i, m in enumerate(TALK)]


ALTERNATE = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("rows", "template", "options", "message"),
    [
        (
            chats(TALK, TALK[:2]),
            CHAT_TEMPLATE,
            {},
            r"row 1: no message of `messages` has the role assistant \(roles: system, user\): name the model's turns",
        ),
        (
            [{"prompt": TALK[:3], "completion": TALK[3:4]}],
            CHAT_TEMPLATE,
            {},
            r"row 0: no message of `completion` has the role assistant \(roles: user\)",
        ),
        (
            chats(_without(4, content=" \n")),
            CHAT_TEMPLATE,
            {},
            r"row 0: `messages`\[4\] is an assistant turn that says",
        ),
        (
            [{"prompt": TALK[:4], "completion": _without(4, content="")[4:]}],
            CHAT_TEMPLATE,
            {},
            r"row 0: `completion`\[0\] is an assistant turn that says nothing: fill in its `content`",
        ),
        (
            chats([{**message, "weight": 1} for message in _without(4, content="")]),
            CHAT_TEMPLATE,
            {},
            r"row 0: `messages`\[4\] is an assistant turn that says nothing",
        ),
        ([{"messages": TALK, "tools": "[{"}], CHAT_TEMPLATE, {}, "row 0: `tools` is no JSON .*: make it a list"),
        (
            [{"messages": TALK, "chat_template_kwargs": "no"}],
            CHAT_TEMPLATE,
            {},
            r"row 0: `chat_template_kwargs` is str \('no'\): make it an object",
        ),
        (chats(_without(3, content=None)), CHAT_TEMPLATE, {}, r"row 0: `messages`\[3\] has no `content`"),
        (chats(TALK[1:], TALK), ALTERNATE, {}, r"row 1: the chat template cannot render these.*\(user first\).*roles"),
        (
            chats(TALK),
            CHAT_TEMPLATE.replace(
                "{% for", "{% if messages|length == 4 %}{{ raise_exception('odd') }}{% endif %}{% for", 1
            ),
            {},
            r"row 0: the chat template cannot render these messages as far as `messages`\[3\] \(odd\)",
        ),
        (
            chats(TALK),
            UNMARKED_CHAT_TEMPLATE,
            {},
            r"blocks and .* processing_class.chat_template does not mark",
        ),
        (chats(TALK), UNMARKED_CHAT_TEMPLATE, {}, r"\{% generation %\}.*set split_turns=True.*anchors='all'"),
        (
            [{"prompt": TALK[:2], "completion": TALK[2:]}],
            UNMARKED_CHAT_TEMPLATE,
            {},
            r"row 0: `completion` has several messages, and processing_class.chat_template does not mark",
        ),
        (
            chats(TALK),
            CHAT_TEMPLATE.replace("{% generation %}", "{% generation %}{% endgeneration %}").replace(
                "}}{% endgeneration %}", "}}"
            ),
            {},
            "row 0: the chat template marks no token of an assistant turn here",
        ),
        (
            chats(GREETING[:2]),
            CHAT_TEMPLATE,
            {"split_turns": True},
            r"row 0: `messages`\[0\], the only .* answers nothing",
        ),
        (
            [{"text": "a"}],
            CHAT_TEMPLATE,
            {"split_turns": True},
            "split_turns=True, but train_dataset holds no messages",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the chat template leaves")
def test_what_cannot_be_used_is_refused_by_row_and_field(rows, template, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize(rows, template, needs_turns=True, **options)
