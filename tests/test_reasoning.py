"""Reasoning between tags stays context: no answer token of it, none trained on, no block in it or across it."""

from typing import Any

import pytest
from datasets import Dataset, disable_progress_bars
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from ebft import EBFTConfig
from ebft.baselines.settings import check_read
from ebft.data import BlockCollator, tokenize_documents
from ebft.data.reasoning import check_tags, reasoning_spans
from ebft.layouts import batch_layout
from ebft.prepare import prepare_datasets
from tiny import CHAT_TEMPLATE, EOS, UNMARKED_CHAT_TEMPLATE, byte_bpe_tokenizer
from training import config

disable_progress_bars()

TAGS = ("<think>", "</think>")


def tokenizer_with(special: bool = False):
    """Tags of several tokens each, or special tokens as a reasoning model has them."""
    tokenizer = byte_bpe_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    if special:
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    else:
        assert all(len(tokenizer(tag)["input_ids"]) > 3 for tag in TAGS)
    return tokenizer


def tokenize(rows, tokenizer=None, max_length=512, **options) -> Any:
    options = {"reasoning_tags": TAGS, **options}
    return tokenize_documents(Dataset.from_list(rows), tokenizer or tokenizer_with(), max_length=max_length, **options)


def flagged(tokenizer, text, flags) -> dict[str, list[int]]:
    """Tokens of a text, and whether all characters of a token have a flag: the slow and obvious way."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(all(flags[begin:end])) for begin, end in found["offset_mapping"]]
    return {"input_ids": found["input_ids"], "mask": mask}


def parts(*pieces) -> tuple[str, list[int]]:
    """A text and the flag of each of its characters, from pieces of text and flag."""
    return "".join(text for text, _ in pieces), [flag for text, flag in pieces for _ in text]


ASKED = "<|im_start|>user\nwhat <think> is?</think><|im_end|>\n<|im_start|>assistant\n"  # a user's tags are text
NEXT = "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n"
USER = {"role": "user", "content": "what <think> is?</think>"}
CASES = {
    "at the start": [("<think>hm\n\nso</think>", 0), ("\n\nfour<|im_end|>", 1)],
    "in the middle": [("well ", 1), ("<think>hm</think>", 0), (" four<|im_end|>", 1)],
    "twice": [("<think>a</think>", 0), ("two", 1), ("<think>b</think>", 0), (" four<|im_end|>", 1)],
    "not closed": [("four ", 1), ("<think>hm, or<|im_end|>", 0)],
    "opened by the prompt": [("hm</think>", 0), ("four<|im_end|>", 1)],
    "opened by the prompt and again": [("hm</think>", 0), ("two ", 1), ("<think>b</think>", 0), ("four<|im_end|>", 1)],
    "empty": [("<think></think>", 0), ("four<|im_end|>", 1)],
    "none": [("four > three<|im_end|>", 1)],
    "other writing": [("<think>d\u00e9j\u00e0 \u4f60\u597d \U0001f98a</think>", 0), ("\u4f60\u597d<|im_end|>", 1)],
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_masks_of_a_conversation_token_by_token(case, only, special):
    tokenizer, answer = tokenizer_with(special), CASES[case]
    said = "".join(text for text, _ in answer).removesuffix("<|im_end|>")
    messages = [USER, {"role": "assistant", "content": said}, {"role": "user", "content": "and?"}]
    messages.append({"role": "assistant", "content": "five"})
    (document,) = tokenize([{"messages": messages}], tokenizer, assistant_only_loss=only)
    last = [(NEXT, 0), ("five<|im_end|>", 1), ("\n", 0)]
    expected = flagged(tokenizer, *parts((ASKED, 0), *answer, *last))
    assert document["input_ids"] == expected["input_ids"]
    assert document["completion_mask"] == expected["mask"]
    around = int(not only)  # of what is no answer, everything is trained on or nothing
    pieces = [(ASKED, around), *answer, *((text, flag or around) for text, flag in last)]
    loss = flagged(tokenizer, *parts(*pieces))["mask"]
    assert document["loss_mask"] == [0, *loss[1:]]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_masks_of_strings_token_by_token(case, special):
    tokenizer = tokenizer_with(special)
    answer = [(text.replace("<|im_end|>", EOS), flag) for text, flag in CASES[case]]
    text, flags = parts(*answer)
    (document,) = tokenize([{"text": text}], tokenizer)
    expected = flagged(tokenizer, text, flags)
    assert document["input_ids"] == expected["input_ids"]
    assert document["completion_mask"] == expected["mask"]
    assert document["loss_mask"] == [0, *expected["mask"][1:]]
    (document,) = tokenize([{"prompt": "a <think> b\n", "completion": text}], tokenizer)
    expected = flagged(tokenizer, *parts(("a <think> b\n", 0), *answer))
    assert document["completion_mask"] == document["loss_mask"] == expected["mask"]


def test_a_token_that_joins_a_tag_with_other_text_is_reasoning():
    tokenizer = tokenizer_with()
    text = "see the dog: hm hm /the quick fox" + EOS
    assert {" dog", "the"} <= {tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]}
    (document,) = tokenize([{"text": text}], tokenizer, reasoning_tags=("og:", "/t"))
    expected = flagged(tokenizer, *parts(("see the d", 1), ("og: hm hm /t", 0), ("he quick fox" + EOS, 1)))
    assert document["completion_mask"] == expected["mask"]
    pairs = zip(document["input_ids"], document["completion_mask"], strict=True)
    assert tokenizer.decode([token for token, answer in pairs if answer]) == "see the quick fox" + EOS


def test_reasoning_content_of_a_message():
    tokenizer = tokenizer_with()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{% generation %}",
        "{% generation %}{% if message['reasoning_content'] %}"
        "{{ '<think>\n' + message['reasoning_content'] + '\n</think>\n' }}{% endif %}",
    )
    answer = {"role": "assistant", "content": "four", "reasoning_content": "two, two"}
    (document,) = tokenize([{"messages": [USER, answer]}], tokenizer)
    said = (("<think>\ntwo, two\n</think>", 0), ("\nfour<|im_end|>", 1), ("\n", 0))
    assert document["completion_mask"] == flagged(tokenizer, *parts((ASKED, 0), *said))["mask"]


def test_a_turn_of_its_own_leaves_its_reasoning_out_and_earlier_one_as_context():
    messages = [USER, {"role": "assistant", "content": "<think>a</think>two"}, {"role": "user", "content": "and?"}]
    messages.append({"role": "assistant", "content": "<think>b</think>five"})
    tokenizer = tokenizer_with()
    _, second = tokenize([{"messages": messages}], tokenizer, split_turns=True)
    pieces = [
        (ASKED + "<think>a</think>two<|im_end|>" + NEXT + "<think>b</think>", 0),
        ("five<|im_end|>", 1),
        ("\n", 0),
    ]
    expected = flagged(tokenizer, *parts(*pieces))
    assert second["input_ids"] == expected["input_ids"]
    assert second["completion_mask"] == second["loss_mask"] == expected["mask"]


def asked_and(*answers) -> list[dict]:
    return [{"messages": [USER, {"role": "assistant", "content": answer}]} for answer in answers]


@pytest.mark.parametrize("thought", ["<think>hm</think>", "<think>hm</think>\n\n", "<think>hm", "hm</think>"])
def test_an_answer_that_is_reasoning_alone_is_dropped_and_counted(thought):
    """With its end of turn: an empty answer is nothing to learn."""
    with pytest.warns(UserWarning, match=r"2 document\(s\) dropped in which reasoning_tags") as caught:
        (document,) = tokenize(asked_and(thought, "<think>hm</think>four", thought), assistant_only_loss=True)
    assert len(caught) == 1, "what is dropped is not said to stay"
    assert sum(document["loss_mask"]) == len(tokenizer_with()("four<|im_end|>")["input_ids"])
    with pytest.warns(
        UserWarning, match=r"1 document\(s\) with an answer that is reasoning alone: it stays as context"
    ):
        documents = tokenize(asked_and(thought, "four"))
    assert sum(documents[0]["completion_mask"]) == 0
    asked = len(tokenizer_with()(ASKED)["input_ids"])
    assert documents[0]["loss_mask"][1:asked] == [1] * (asked - 1), "the question is trained on as ever"
    assert set(documents[0]["loss_mask"][asked:-1]) == {0}


@pytest.mark.filterwarnings("ignore:train_dataset")
def test_long_reasoning_is_not_said_to_be_a_long_prompt():
    with pytest.warns(UserWarning, match=r"1 document.*reasoning alone, or comes behind max_length=90"):
        tokenize(asked_and("<think>" + "hm " * 40 + "</think>four", "four"), max_length=90, assistant_only_loss=True)
    with pytest.warns(UserWarning, match=r"2 document.*reasoning alone, or comes behind max_length=20"):
        documents = tokenize([{"text": "the fox <think>" + "hm " * 20 + "</think> sleeps by the dog"}], max_length=20)
    pairs = [pair for row in documents for pair in zip(row["input_ids"], row["completion_mask"], strict=True)]
    answers = tokenizer_with().decode([token for token, answer in pairs if answer])
    assert answers == "the fox  sleeps by the dog" + EOS


def references(documents, completion_length=3, **settings) -> list[str]:
    batch = BlockCollator(0)(list(documents))
    args = config("unused", completion_length=completion_length, stride=1, context_length=1, **settings)
    layout = batch_layout(batch, args, "completion", None)
    return [tokenizer_with().decode(x) for x in layout.references(batch["input_ids"])[layout.valid].tolist()]


@pytest.mark.parametrize("kind", ["messages", "text"])
def test_no_block_in_or_across_reasoning(kind):
    tokenizer, said = tokenizer_with(), ("the quick fox", " jumps over the dog")
    answer = f"{said[0]}<think>hm hm hm</think>{said[1]}"
    rows = asked_and(answer) if kind == "messages" else [{"text": answer}]
    args = config("unused", max_length=400, reasoning_tags=list(TAGS), completion_length=3)
    documents, _, anchors = prepare_datasets(Dataset.from_list(rows), None, tokenizer, args, None)
    assert anchors == "completion"
    expected = []
    for i, (text, end) in enumerate(zip(said, ("", "<|im_end|>" if kind == "messages" else EOS), strict=True)):
        ids = tokenizer(text + end)["input_ids"]
        first = 1 if kind == "text" and i == 0 else 0  # a block needs a prefix
        expected += [tokenizer.decode(ids[k : k + 3]) for k in range(first, len(ids) - 2)]
    assert references(documents) == expected


@given(
    tags=st.sampled_from([TAGS, ("ab", "bc")]),  # of which the second may overlap
    pieces=st.lists(st.integers(0, 5), max_size=12),
    begin=st.integers(0, 20),
    size=st.integers(0, 60),
)
@example(tags=("ab", "bc"), pieces=[0, 3, 4, 1], begin=0, size=60)
@example(tags=TAGS, pieces=[2, 1, 2, 0, 2, 1, 3], begin=0, size=60)
@settings(max_examples=300, deadline=None)
def test_spans_character_by_character(tags, pieces, begin, size):
    """A reader that goes through the answer once, and knows at each character whether it is thinking."""
    text = "".join([*tags, "a", "c", "\n", "\u00e9"][piece] for piece in pieces)
    begin = min(begin, len(text))
    end = min(begin + size, len(text))
    answer = text[begin:end]
    opens, closes = answer.find(tags[0]), answer.find(tags[1])
    thinking = closes >= 0 and (opens < 0 or closes < opens)
    expected, at = set(), 0
    while at < len(answer):
        step = 1
        if not thinking and answer.startswith(tags[0], at):
            thinking, step = True, len(tags[0])
            expected |= set(range(at, at + step))
        elif thinking and answer.startswith(tags[1], at):
            step = len(tags[1])
            expected |= set(range(at, at + step))
            thinking = False
        elif thinking:
            expected.add(at)
        at += step
    spans = reasoning_spans(text, begin, end, tags)
    assert {i - begin for a, b in spans for i in range(a, b)} == expected


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["<think>"], r"reasoning_tags=\['<think>'\] must be two strings: give the opening and the closing tag"),
        (["a", "b", "c"], "must be two strings"),
        ("<think>", "reasoning_tags='<think>' must be two strings"),
        (["<think>", "<think>"], "one is a part of the other, or they are equal"),
        (["think", "/think"], "one is a part of the other"),
        (["<think>", " "], "one of them is no string, or blank"),
        (["<think>", 3], "one of them is no string, or blank"),
    ],
)
def test_bad_tags(tags, message):
    for refuses in (check_tags, lambda tags: EBFTConfig("unused", use_cpu=True, reasoning_tags=tags)):
        with pytest.raises(ValueError, match=message):
            refuses(tags)


def test_tags_where_they_cannot_be_used():
    unmarked = tokenizer_with()
    unmarked.chat_template = UNMARKED_CHAT_TEMPLATE
    with pytest.raises(
        ValueError, match="reasoning_tags are of the assistant's turns, but processing_class.chat_templ"
    ):
        tokenize(asked_and("four"), unmarked)
    with pytest.raises(ValueError, match=r"reasoning_tags=.* but train_dataset holds tokens.*`completion_mask`"):
        tokenize([{"input_ids": [5, 6, 7]}])
    with pytest.raises(ValueError, match="anchors='all' would start blocks in the reasoning"):
        config("unused", reasoning_tags=list(TAGS), anchors="all")
    with pytest.raises(ValueError, match=r"reasoning_tags=.* does nothing with method: rlvr; remove it"):
        check_read(EBFTConfig("unused", use_cpu=True, reasoning_tags=list(TAGS)), "rlvr")
