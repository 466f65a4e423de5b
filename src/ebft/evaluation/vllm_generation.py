"""Whole completions of prompts by vLLM, an optional package, in place of transformers' generation."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import GenerationConfig

from ..pretrained import end_ids
from .code_benchmarks import cut
from .generation import text_behind
from .settings import GenerationSettings

PROMPTS_AT_A_TIME = 256  # handed over together; what is done of them is kept when the command is interrupted


class VLLMEngine:
    """A checkpoint in vLLM.

    Args:
        path: Of the checkpoint, or its Hub name.
        tokenizer: Its tokenizer.
        dtype: Such as "bfloat16".
        seed: Of the engine; each prompt's samples have seeds of their own.
        gpu_memory_utilization: vLLM's share of a GPU's memory.
        longest: Tokens of the longest prompt with its completion: what it keeps room for.
    """

    def __init__(self, path: str, tokenizer: Any, dtype: str, seed: int, gpu_memory_utilization: float, longest: int):
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        self.tokenizer = tokenizer
        # "vllm": nothing of the checkpoint's own generation settings, such as a repetition penalty.
        options: dict[str, Any] = {"generation_config": "vllm", "gpu_memory_utilization": gpu_memory_utilization}
        options["max_model_len"] = longest
        self.llm = LLM(model=path, dtype=dtype, seed=seed, **options)
        try:
            own = GenerationConfig.from_pretrained(path)
        except OSError:
            own = GenerationConfig.from_model_config(self.llm.llm_engine.model_config.hf_config)
        self.ends = end_ids(own, tokenizer)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        stop: Sequence[tuple[str, ...]],
        done: Sequence[bool],
    ) -> Iterator[dict[int, list[str]]]:
        """Complete prompts as `generation.complete` does; `settings.batch_size` is vLLM's own affair.

        Args:
            prompts: Token ids of each.
            settings: How.
            stop: Strings of each prompt at which its completions end, without them.
            done: Prompts that need not be completed again.

        Yields:
            The samples of each prompt of a chunk, by its index.
        """
        left = [i for i in range(len(prompts)) if not done[i]]
        for start in range(0, len(left), PROMPTS_AT_A_TIME):
            chunk = left[start : start + PROMPTS_AT_A_TIME]
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompts[i])} for i in chunk],
                [self._params(settings, stop[i], i) for i in chunk],
                use_tqdm=False,
            )
            yield {
                i: [
                    cut(text_behind(self.tokenizer, prompts[i], one.token_ids, self.ends), stop[i])
                    for one in found.outputs
                ]
                for i, found in zip(chunk, outputs, strict=True)
            }

    def _params(self, settings: GenerationSettings, stop: tuple[str, ...], index: int) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

        return SamplingParams(
            n=settings.num_samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            stop=list(stop) or None,
            stop_token_ids=self.ends,
            # A prompt's samples take its seed and the next ones.
            seed=settings.seed * 1_000_003 + index * settings.num_samples,
        )

    def close(self) -> None:
        """Give its memory back."""
        del self.llm
        gc.collect()
