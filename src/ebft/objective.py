"""The mixed objective L_FM + gamma L_CE of one micro-batch, as its share of the whole step's loss.

Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import losses
from .blocks import BlockLayout
from .config import EBFTConfig
from .experience import Experience
from .logprobs import LogProbs


@dataclass(frozen=True)
class StepTotals:
    """Denominators of one whole optimiser step, over all micro-batches and ranks; known before sampling.

    Attributes:
        tokens: Sum of the cross-entropy weights.
        blocks: Sum of the block weights.
    """

    tokens: float
    blocks: float


@dataclass
class Objective:
    """What a micro-batch's log-probs are worth.

    Attributes:
        args: Settings.
        inputs: The micro-batch, with its `layout`.
        totals: Denominators of the step.
        coefficients: `rl_coef` and `ce_coef` of this step.
        policy_loss: `EBFTTrainer.compute_policy_loss`.
        experience: The rollouts and what they are worth, once there are any.
        advantages: Of the rollouts, likewise.
    """

    args: EBFTConfig
    inputs: dict[str, Any]
    totals: StepTotals
    coefficients: tuple[float, float]
    policy_loss: Callable[[Tensor, Tensor, BlockLayout, StepTotals], tuple[Tensor, dict[str, Tensor]]]
    experience: Experience | None = None
    advantages: Tensor | None = None

    @property
    def document_mask(self) -> Tensor:
        """BoolTensor [B, P-1]: of which of the documents' tokens the loss wants the log-prob."""
        wanted = self.inputs["labels"][:, 1:] != -100
        return wanted if self.coefficients[1] else torch.zeros_like(wanted)

    def __call__(self, log_probs: LogProbs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and its parts, of log-probs [B, P-1] and [B, K, N, G]."""
        weights = token_weights(self.inputs, self.args).to(log_probs.document.device)
        ce, metrics = losses.cross_entropy(log_probs.document, weights, self.totals.tokens)
        log_probs = self._until_end(log_probs)
        if self.experience is None or self.advantages is None:
            policy, kl = log_probs.blocks.sum(), None  # of no block: 0
        else:
            layout = self.inputs["layout"]
            policy, policy_metrics = self.policy_loss(log_probs.blocks, self.advantages, layout, self.totals)
            kl, kl_metrics = self._kl(log_probs.blocks, self.experience, layout)
            metrics |= policy_metrics | kl_metrics
        rl_coef, ce_coef = self.coefficients
        loss, _ = losses.mixed_loss(policy, ce, kl, rl_coef=rl_coef, ce_coef=ce_coef, beta=self.args.beta)
        return loss, {name: value for name, value in metrics.items() if ce_coef or name != "ce_loss"}

    def slopes(self, tokens: Tensor, dtype: torch.dtype) -> LogProbs:
        """Derivative of the loss with respect to all log-probs; constant where the loss is linear in them.

        Args:
            tokens: LongTensor [B, K, N, G], the rollouts.
            dtype: Of the log-probs.
        """
        B, P = self.inputs["input_ids"].shape
        with torch.enable_grad():
            document, blocks = (
                torch.zeros(shape, dtype=dtype, device=tokens.device, requires_grad=True)
                for shape in ((B, P - 1), tokens.shape)
            )
            loss, _ = self(LogProbs(document, blocks))
            return LogProbs(*torch.autograd.grad(loss, (document, blocks)))

    def _until_end(self, log_probs: LogProbs) -> LogProbs:
        """Without the tokens behind the ends of completions, which were not sampled."""
        mask = None if self.experience is None else self.experience.rollouts.mask
        if mask is None:
            return log_probs
        return log_probs._replace(blocks=log_probs.blocks.where(mask.to(log_probs.blocks.device), 0.0))

    def _kl(self, log_probs: Tensor, experience: Experience, layout: BlockLayout) -> tuple[Any, dict]:
        estimator, reference = self.args.kl_estimator, experience.reference_log_probs
        if reference is None or estimator == "k1":  # k1 is part of the advantages
            return None, {}
        weights = block_weights(layout, self.args).to(log_probs.device)
        denominator = policy_denominator(self.args, self.totals)
        return losses.kl_loss(log_probs, reference, weights, denominator, estimator)


def token_weights(inputs: dict[str, Any], args: EBFTConfig) -> Tensor:
    """Weights [B, P-1] of the cross-entropy."""
    documents = inputs["doc_ids"][:, 1:].cpu()
    return losses.loss_weights(inputs["labels"][:, 1:].cpu() != -100, args.loss_normalization, documents)


def block_weights(layout: BlockLayout, args: EBFTConfig) -> Tensor:
    """Weights [B, K] of the blocks."""
    documents = layout.doc_ids.gather(1, layout.anchors)  # type: ignore[union-attr]
    weights = losses.loss_weights(layout.valid, args.loss_normalization, documents)
    # A mean within each document needs no correction for the blocks that were left out.
    if layout.multiplicity is None or args.loss_normalization == "document":
        return weights
    return weights * layout.multiplicity


def policy_denominator(args: EBFTConfig, totals: StepTotals) -> float:
    """G * N times the step's blocks. Of completions, G is the longest allowed, not what was sampled: a constant."""
    return args.rollout_length * args.num_generations * totals.blocks
