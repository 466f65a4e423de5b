"""Completions sampled by vLLM through TRL's wrapper, with a stand-in for the package: weights, prompts, a step."""

import copy
import importlib.machinery
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import trl.generation.vllm_generation as wrapper
from peft import get_peft_model

from test_completions import SETTINGS, rows
from test_trainer_step import LORA, check_step, oracle_documents
from training import config, read_rollouts, small_model, train

EOS = range(20, 30)  # the engine's own idea of it, which is not ours
PARAMETERS = ("temperature", "top_p", "top_k", "max_tokens", "n")


@pytest.fixture
def engine(monkeypatch):
    """A package `vllm` whose engine samples from a copy of the model, to which weights can be given; what it saw."""
    seen = SimpleNamespace(options=None, params=[], prompts=[], weights=[], model=None)

    class LLM:
        def __init__(self, **options):
            seen.options = options
            path = ("llm_engine", "model_executor", "driver_worker", "model_runner")
            holder = SimpleNamespace(model=self)
            for name in reversed(path[1:]):
                holder = SimpleNamespace(**{name: holder})
            self.llm_engine, self.generator, self.given = holder, torch.Generator().manual_seed(0), {}

        def load_weights(self, weights):
            self.given |= {name: value.clone() for name, value in weights}

        def reset_prefix_cache(self):
            seen.weights.append(self.given)
            seen.model.load_state_dict(self.given, strict=False)

        def generate(self, prompts, sampling_params, use_tqdm):
            seen.params.append(sampling_params)
            seen.prompts += [prompt["prompt_token_ids"] for prompt in prompts]
            return [self._one(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

        @torch.no_grad()
        def _one(self, prompt, params):
            ids, scores = [], []
            ends = {*params.stop_token_ids, *([] if getattr(params, "ignore_eos", False) else EOS)}
            while len(ids) < params.max_tokens and not ends & set(ids[-1:]):
                logits = seen.model(torch.tensor([[*prompt, *ids]])).logits[0, -1] / params.temperature
                ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=self.generator)))
                score = SimpleNamespace(rank=1, logprob=float(logits.log_softmax(-1)[ids[-1]]))
                scores.append({ids[-1]: score})
            return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=ids, logprobs=scores)])

    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(wrapper, "is_vllm_available", lambda: True)
    monkeypatch.setattr(wrapper, "LLM", LLM, raising=False)
    monkeypatch.setattr(wrapper, "SamplingParams", lambda **options: SimpleNamespace(**options), raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # which the wrapper sets
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return seen


@pytest.mark.parametrize("adapted", [False, True])
def test_step(tmp_path, engine, adapted):
    """The engine has the policy's weights of each step, adapters merged, and the update is that of its completions."""
    model = small_model(dtype=torch.float64, scale=4.0)
    engine.model = copy.deepcopy(model)
    torch.manual_seed(5)
    model = get_peft_model(model, LORA) if adapted else model
    plain = copy.deepcopy(model)
    settings = SETTINGS | dict(
        use_vllm=True, max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=2
    )
    run = train(model, rows(), tmp_path, settings=settings)

    for step in (1, 2):
        check_step(run, plain, oracle_documents(rows()), step=step)
    assert len(engine.weights) == 2  # once per step, not per micro-batch
    now = copy.deepcopy(plain)
    now.load_state_dict(run.weights[1])
    merged = now.merge_and_unload() if adapted else now
    for name, value in merged.state_dict().items():
        if name in engine.weights[1]:
            torch.testing.assert_close(engine.weights[1][name], value, rtol=0, atol=1e-12)
    assert set(engine.weights[1]) >= {name for name, _ in merged.named_parameters() if "head" not in name}

    prompts = {tuple(row["input_ids"][: row["completion_mask"].index(1)]) for row in rows()}
    assert set(map(tuple, engine.prompts)) == prompts
    assert [engine.prompts.count(list(prompt)) for prompt in prompts] == [2 * 3] * 6  # steps, rollouts
    first = engine.params[0]
    assert [getattr(first, name) for name in PARAMETERS] == [1.0, 1.0, 0, 11, 1]
    assert first.stop_token_ids == SETTINGS["stop_token_ids"]
    for group in read_rollouts(tmp_path).values():
        assert all(row["log_prob"] < 0 for row in group)
        for ids in (row["token_ids"] for row in group):
            assert len(ids) == 11 or ids[-1] in SETTINGS["stop_token_ids"]


def test_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="use_vllm=True: vLLM cannot sample blocks"):
        config(tmp_path, use_vllm=True)
    with pytest.raises(ValueError, match=r"vllm_gpu_memory_utilization=1.5 must be in \(0, 1\)"):
        config(tmp_path, **SETTINGS, use_vllm=True, vllm_gpu_memory_utilization=1.5)
    for settings in (
        dict(vllm_server_base_url="http://here:8000"),
        dict(vllm_mode="server", vllm_gpu_memory_utilization=0.5),
        dict(vllm_mode="server", vllm_enable_sleep_mode=True),
    ):
        with pytest.raises(ValueError, match=rf"{list(settings)[-1]}=.* does nothing without vllm_mode: "):
            config(tmp_path, **SETTINGS, use_vllm=True, **settings)
    with pytest.raises(ValueError, match="vllm_mode='server' does nothing without use_vllm: true"):
        config(tmp_path, **SETTINGS, vllm_mode="server")
    with pytest.raises(ValueError, match=r"stop_token_ids=\[3\] does nothing without rollout: completion"):
        config(tmp_path, stop_token_ids=[3])
    if "vllm" not in sys.modules:
        with pytest.raises(
            ValueError, match=r"use_vllm=True needs vllm, which is not installed: pip install 'ebft\[vllm\]'"
        ):
            config(tmp_path, **SETTINGS, use_vllm=True)
