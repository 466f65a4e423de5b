"""The way to vLLM and back, with a stand-in for the package: what it is asked, and the texts."""

import itertools
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from ebft.evaluation.generation import complete
from ebft.evaluation.settings import GenerationSettings
from ebft.evaluation.vllm_generation import VLLMEngine
from tiny import byte_bpe_tokenizer
from tiny_models import tiny_model

TEXTS = ["the quick", "def add(a, b):", "x", "the dog sleeps; the fox"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with an end of its own and a repetition penalty."""
    tokenizer = byte_bpe_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), scale=4.0)
    model.generation_config.eos_token_id, model.generation_config.repetition_penalty = 9, 1.5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer


@pytest.fixture
def asked(saved, monkeypatch):
    """A module `vllm` that decodes greedily with the model itself; returns what it was asked."""
    _, model, _ = saved
    asked = SimpleNamespace(engine=None, params=[], calls=[])

    class LLM:
        def __init__(self, **options):
            asked.engine = options

        def generate(self, prompts, params, use_tqdm):
            asked.params += params
            asked.calls.append(len(prompts))
            return [SimpleNamespace(outputs=[self._one(p, s)] * s.n) for p, s in zip(prompts, params, strict=True)]

        def _one(self, prompt, params):
            ids = torch.tensor([prompt["prompt_token_ids"]])
            new = []
            while len(new) < params.max_tokens and (not new or new[-1] not in params.stop_token_ids):
                new.append(model(torch.cat([ids, torch.tensor([new]).long()], dim=1)).logits[0, -1].argmax().item())
            return SimpleNamespace(token_ids=new)

    module = types.ModuleType("vllm")
    module.LLM = LLM  # type: ignore[attr-defined]
    module.SamplingParams = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return asked


@torch.no_grad()
def test_texts_are_those_of_transformers(saved, asked):
    path, model, tokenizer = saved
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings, stop = GenerationSettings(max_new_tokens=9), [("e",), (), ("\n", "a"), ()]
    expected: dict = {}
    for part in complete(model, tokenizer, prompts, settings, stop):
        expected |= part
    engine = VLLMEngine(str(path), tokenizer, "float32", 3, 0.5, 64)
    found: dict = {}
    for part in engine.complete(prompts, settings, stop, [False, False, True, False]):
        found |= part
    assert found == {i: expected[i] for i in (0, 1, 3)}
    assert asked.engine == {
        "model": str(path),
        "dtype": "float32",
        "seed": 3,
        "generation_config": "vllm",
        "gpu_memory_utilization": 0.5,
        "max_model_len": 64,
    }


@torch.no_grad()
def test_an_end_that_is_no_special_token_is_not_part_of_the_text(saved, asked):
    path, model, tokenizer = saved
    prompt = tokenizer(TEXTS[3])["input_ids"]
    ids = torch.tensor([prompt])
    for _ in range(9):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    written = ids[0, len(prompt) :].tolist()
    place, end = next((i, token) for i, token in enumerate(written) if i and tokenizer.decode([token]).isascii())
    assert not {*written[: place + 1]} & {*tokenizer.all_special_ids} and end not in written[:place]
    GenerationConfig(eos_token_id=[end]).save_pretrained(path)
    engine = VLLMEngine(str(path), tokenizer, "float32", 3, 0.5, 64)
    (found,) = engine.complete([prompt], GenerationSettings(max_new_tokens=9), [()], [False])
    text = tokenizer.decode([*prompt, *written[:place]], skip_special_tokens=True)
    assert found == {0: [text.removeprefix(tokenizer.decode(prompt))]}


def test_every_sample_has_a_seed_of_its_own(saved, asked, monkeypatch):
    path, _, tokenizer = saved
    monkeypatch.setattr("ebft.evaluation.vllm_generation.PROMPTS_AT_A_TIME", 3)
    settings = GenerationSettings(num_samples=4, max_new_tokens=1, temperature=0.7, top_p=0.9, seed=2)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    engine = VLLMEngine(str(path), tokenizer, "float32", 3, 0.5, 64)
    parts = list(engine.complete(prompts, settings, [("a",)] * 4, [False] * 4))
    assert asked.calls == [3, 1] and [len(texts) for part in parts for texts in part.values()] == [4] * 4
    starts = [params.seed for params in asked.params]
    assert [later - start for start, later in itertools.pairwise(starts)] == [4] * 3
    first = asked.params[0]
    assert (first.temperature, first.top_p, first.stop) == (0.7, 0.9, ["a"])
    assert set(first.stop_token_ids) == {9, tokenizer.eos_token_id}
