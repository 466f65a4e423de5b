"""Completions of many prompts at once against one prompt at a time."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

import held_out
from ebft.evaluation import generation
from ebft.evaluation.generation import check_room, complete
from ebft.evaluation.settings import GenerationSettings
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

TEXTS = ["the quick", "def add(a, b):", "x", "the dog sleeps; the fox"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_bpe_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), scale=4.0)


def completed(model, tokenizer, settings, prompts, **options):
    found = {}
    for part in complete(model, tokenizer, prompts, settings, **options):
        assert not part.keys() & found.keys()
        found |= part
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_completions_are_those_of_each_prompt_alone(model, tokenizer, batch_size):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    found = completed(model, tokenizer, GenerationSettings(max_new_tokens=7, batch_size=batch_size), prompts)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        for _ in range(7):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        expected = tokenizer.decode(ids[0, len(prompt) :].tolist()).split("<|endoftext|>")[0]
        assert found[i] == [expected.replace("<|pad|>", "")]


def test_stop_strings_end_each_completion(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings = GenerationSettings(max_new_tokens=12)
    whole = completed(model, tokenizer, settings, prompts)
    stops = [(text[0][2:4],) if len(text[0]) > 4 else ("zzz",) for text in whole.values()]
    stops = [stops[list(whole).index(i)] for i in range(len(prompts))]
    found = completed(model, tokenizer, settings, prompts, stop=stops)
    for i, (stop,) in enumerate(stops):
        assert found[i][0] == whole[i][0].split(stop)[0]


def test_samples_do_not_depend_on_what_is_done(model, tokenizer):
    """An interrupted run draws the rest as an unbroken one."""
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings = GenerationSettings(num_samples=3, max_new_tokens=5, temperature=1.0, batch_size=6, seed=4)
    whole = completed(model, tokenizer, settings, prompts)
    first = next(complete(model, tokenizer, prompts, settings))
    rest = completed(model, tokenizer, settings, prompts, done=[i in first for i in range(len(prompts))])
    assert first | rest == whole
    assert not first.keys() & rest.keys()
    assert len(set(whole[0])) > 1


def test_many_samples_of_one_prompt_come_in_several_parts(model, tokenizer, monkeypatch):
    """No forward has more rows than the batch size, or more tokens than there is memory for."""
    prompts, sizes = [tokenizer(text)["input_ids"] for text in TEXTS], []
    settings = GenerationSettings(num_samples=5, max_new_tokens=3, temperature=1.0, batch_size=2, seed=4)
    generate = type(model).generate

    def counted(self, ids, **options):
        sizes.append(len(ids) * options["num_return_sequences"])
        return generate(self, ids, **options)

    monkeypatch.setattr(type(model), "generate", counted)
    whole = completed(model, tokenizer, settings, prompts)
    assert sizes == [2, 2, 1] * len(prompts) and all(len(set(texts)) == 5 for texts in whole.values())
    done = [i != 0 for i in range(len(prompts))]
    assert completed(model, tokenizer, settings, prompts, done=done) == {0: whole[0]}
    sizes.clear()
    monkeypatch.setattr(generation, "TOKENS_AT_A_TIME", 4 * (len(prompts[0]) + 3))
    completed(model, tokenizer, replace(settings, batch_size=64), prompts[:1])
    assert sizes == [4, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(tokenizer, temperature):
    broken = tiny_model(vocab_size=len(tokenizer))
    broken.config.name_or_path = "runs/broken"
    broken.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="runs/broken: its logits are NaN or infinite"):
        list(complete(broken, tokenizer, [[5, 6]], GenerationSettings(max_new_tokens=2, temperature=temperature)))


def test_an_end_that_is_no_special_token_is_not_part_of_the_text(tokenizer):
    """Of a model that writes the alphabet: nor is what stands behind the end in the batch."""
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnop"]
    table = torch.full((len(tokenizer), len(tokenizer)), -20.0)
    table[letters[:-1], letters[1:]] = 20.0
    model = held_out.markov_model(table)
    model.generation_config = GenerationConfig(eos_token_id=[letters[4]])
    found = completed(model, tokenizer, GenerationSettings(max_new_tokens=6), [[i] for i in letters[:7]])
    assert found == {i: [text] for i, text in enumerate(("bcd", "cd", "d", "", "fghijk", "ghijkl", "hijklm"))}


def test_nothing_of_the_checkpoints_generation_settings_is_taken(model, tokenizer):
    """A repetition penalty or beams would make "greedy" something else than the model; its EOS ids are kept."""
    prompts, settings = [tokenizer(text)["input_ids"] for text in TEXTS], GenerationSettings(max_new_tokens=7)
    plain, before = completed(model, tokenizer, settings, prompts), model.generation_config
    first = int(model(torch.tensor([prompts[0]])).logits[0, -1].argmax())
    try:
        model.generation_config = GenerationConfig(repetition_penalty=5.0, num_beams=3, min_new_tokens=7)
        assert completed(model, tokenizer, settings, prompts) == plain
        model.generation_config = GenerationConfig(eos_token_id=[first])
        assert completed(model, tokenizer, settings, prompts)[0] == [""], "an end need be no special token to go"
    finally:
        model.generation_config = before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_samples=0), "num_samples=0"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature=-1"),
        (dict(num_samples=2), "num_samples=2 at temperature 0"),
        (dict(top_p=0.0), "top_p=0"),
    ],
)
def test_settings_refuse(change, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**change)


def test_prompts_that_do_not_fit_are_named(model):
    positions = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"task/2: its prompt of 9 tokens .* exceed the model's {positions}"):
        check_room([[1], [2] * 9], ["task/1", "task/2"], model.config, positions - 5)
    with pytest.raises(ValueError, match="task/1: the prompt has no tokens"):
        check_room([[]], ["task/1"], model.config, 4)
