"""Whole completions by vLLM, through TRL's wrapper of it: in the training process (`colocate`) or by a server.

What vLLM draws follows no seed of ours: neither a run with it nor its resume can be repeated to the bit.
Shape letters: B rows, K blocks, N rollouts, G generated tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks import BlockLayout
from ..config import EBFTConfig
from ..rollout import Rollouts


class VLLMSampler:
    """An engine beside the policy, with the policy's weights of the optimiser step at hand.

    Args:
        model: The policy, as the Trainer has it; an adapter is merged for each synchronisation.
        accelerator: Of the Trainer.
        processing_class: The tokenizer.
        args: Of the run.

    Raises:
        ValueError: Several processes would share one server.
    """

    def __init__(self, model: Any, accelerator: Any, processing_class: Any, args: EBFTConfig):
        from trl.generation.vllm_generation import VLLMGeneration

        if args.vllm_mode == "server" and accelerator.num_processes > 1:
            raise ValueError(
                f"vllm_mode='server' with {accelerator.num_processes} processes: their micro-batches have different "
                "numbers of prompts, which TRL's client does not take: use vllm_mode: colocate."
            )
        self.args, self._step = args, -1
        self.engine = VLLMGeneration(
            model,
            accelerator,
            processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.max_length + args.max_completion_length,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            max_completion_length=args.max_completion_length,
            # The ids alone end a completion: where they leave EOS out, vLLM would stop at it all the same.
            generation_kwargs={"stop_token_ids": list(args.stop_token_ids or ()), "ignore_eos": True},
        )

    def synchronise(self, step: int) -> None:
        """Give the engine the weights before an optimiser step, once; all processes call it together."""
        if step != self._step:
            self.engine.sync_weights()
            self._step = step

    def sample(self, input_ids: Tensor, layout: BlockLayout) -> Rollouts:
        """As `sample_rollouts`; the entropy is an estimate from the sampled tokens, minus their log-probs.

        Args:
            input_ids: LongTensor [B, P].
            layout: One block per completion.

        Returns:
            Rollouts as long as the longest of them.
        """
        N, places = self.args.num_generations, layout.valid.nonzero().tolist()
        ids = input_ids.cpu()
        prompts = [ids[b, layout.prefix_starts[b, k] : layout.anchors[b, k]].tolist() for b, k in places]
        repeated = [prompt for prompt in prompts for _ in range(N)]
        _, completions, log_probs, _ = self.engine.generate(repeated, None, N)
        scores = [[numbers[0] for numbers in row] for row in log_probs]
        lengths = torch.tensor([len(row) for row in completions])
        stops = self.args.stop_token_ids or ()
        clipped = torch.tensor([row[-1] not in stops for row in completions])
        b, k = layout.valid.nonzero(as_tuple=True)

        def placed(values: Tensor) -> Tensor:
            out = values.new_zeros(*layout.valid.shape, N, *values.shape[1:])
            out[b, k] = values.unflatten(0, (len(places), N))
            return out.to(input_ids.device)

        tokens, scores = placed(_padded(completions, torch.long)), placed(_padded(scores, torch.float32))
        return Rollouts(tokens, scores, -scores, placed(lengths), placed(clipped))


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """Rows of numbers as [rows, longest], zeros behind their ends."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=dtype)
