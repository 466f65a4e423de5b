"""The feature-matching reward as a reward function of TRL's `GRPOTrainer` and `RLOOTrainer`."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, RLOOConfig

from ..completion_features import Completion, completion_features
from ..rewards import Gram, Rewards, gram_matrices, loss_from_gram, rewards_from_gram
from .feature_network import load_network
from .tokens import Text, Tokens
from .trl_settings import check_groups_stay_whole, check_leave_one_out, leave_one_out_factors

BASELINES = ("leave_one_out", "trainer")
WITHHELD = ("prompt", "completion", "completion_ids")  # columns that TRL does not pass on to reward functions


class FeatureMatchingReward:
    """Feature-matching reward (eq 6-7) of whole completions: one of the `reward_funcs` of a TRL trainer.

    Args:
        feature_model: The frozen network: Hub name, path, or a model, of which a copy is taken. Given by name it is
            loaded in bfloat16 where `args.bf16` is on, else in float32; a model keeps its dtype.
        args: The `GRPOConfig` or `RLOOConfig` of the trainer that gets this reward: groups, baseline and batches are
            read from it.
        processing_class: The policy's tokenizer.
        reference_column: Column of the dataset with each row's real completion: text, messages behind a prompt of
            messages, or None for a row without this reward. Not `completion`, which TRL keeps for itself.
        feature_model_revision: Branch, tag or commit of the feature network on the Hub.
        feature_layers: Fractions of the depth or indices, as in `FeatureNetwork`.
        pooling: Of a whole completion: `last_token` (EOS, or the last one where it was cut) or `mean_pooling`.
        feature_norm: `joint`, `per_layer` or `none`.
        feature_reduction: `concat` or `mean` over layers.
        whitening: `none`, `paper` or `released`.
        alignment: `dot` or `cosine`; None as in `ebft.rewards`.
        alignment_coef: Weight of the alignment term.
        diversity_coef: Weight of the diversity term.
        baseline: `leave_one_out` returns rewards from which the trainer's own baseline makes the advantages of the
            exact leave-one-out baseline (App. E, eq 94; see `leave_one_out_factors`). `trainer` returns those of
            eq 6-7: without whitening, the mean gradient then has diversity_coef (n - 2) / (n - 1) in place of
            diversity_coef.

    Raises:
        ValueError: A setting is unknown, does not go with the trainer's, or groups would be split; before any weights
            are read.
    """

    __name__ = "feature_matching"  # what TRL calls the reward in its metrics

    def __init__(
        self,
        feature_model: str | nn.Module,
        args: GRPOConfig | RLOOConfig,
        processing_class: PreTrainedTokenizerBase,
        *,
        reference_column: str = "reference",
        feature_model_revision: str | None = None,
        feature_layers: Sequence[float | int] = (0.25, 0.5, 0.75),
        pooling: str = "last_token",
        feature_norm: str = "joint",
        feature_reduction: str = "concat",
        whitening: str = "paper",
        alignment: str | None = None,
        alignment_coef: float = 1.0,
        diversity_coef: float = 1.0,
        baseline: str = "leave_one_out",
    ):
        if reference_column in WITHHELD:
            raise ValueError(
                f"reference_column={reference_column!r}: TRL keeps this column from reward functions; rename it, as "
                f"in dataset.rename_column({reference_column!r}, 'reference'), and leave reference_column out."
            )
        if not isinstance(processing_class, PreTrainedTokenizerBase) or processing_class.eos_token_id is None:
            raise ValueError(
                f"processing_class={type(processing_class).__name__}: pass the policy's tokenizer, with an eos_token."
            )
        check_groups_stay_whole(args)
        n: Any = args.num_generations
        factors = (1.0, 1.0)
        if baseline == "leave_one_out":
            check_leave_one_out(args, diversity_coef)
            factors = leave_one_out_factors(n, rloo=isinstance(args, RLOOConfig))
        elif baseline != "trainer":
            raise ValueError(f"baseline={baseline!r} is unknown: use one of {', '.join(BASELINES)}.")
        self._settings: dict[str, Any] = {
            "alignment_coef": alignment_coef * factors[0],
            "diversity_coef": diversity_coef * factors[1],
            "whitening": whitening,
            "alignment": alignment,
        }
        self.num_generations: int = n
        one = torch.ones(n, n)
        rewards_from_gram(Gram(one, one[0], one[0, 0]), **self._settings)  # refuses what it does not know
        self.reference_column = reference_column
        self.tokens = Tokens(processing_class, args.chat_template_kwargs or {}, args.max_completion_length)  # type: ignore[reportArgumentType]
        self.network = load_network(
            feature_model,
            processing_class,
            revision=feature_model_revision,
            layers=feature_layers,
            pooling=pooling,
            norm=feature_norm,
            reduction=feature_reduction,
            dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )
        self.network.decoder.to(args.device)
        self._batch_size = args.per_device_train_batch_size  # as in the trainer's own forwards without gradient

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        completion_ids: Sequence[Sequence[int]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards of this process's completions, in their order; None for those whose row has no reference.

        Args:
            prompts: One per completion, `num_generations` equal ones after another.
            completions: Not read: their tokens are.
            completion_ids: Tokens as sampled.
            log_metric: Of the trainer.
            columns: The dataset's other columns, and what else TRL passes.

        Raises:
            ValueError: There is no column of references, a reference is neither text nor messages, a group is not
                whole, or a row is too long for the feature network.
        """
        if self.reference_column not in columns:
            raise ValueError(
                f"reference_column={self.reference_column!r}: the dataset's columns that TRL passes on are "
                f"{sorted(columns)}; name the one with the real completions (`completion` has to be renamed)."
            )
        n, references = self.num_generations, columns[self.reference_column]
        self._check_groups(prompts, references)
        rewards: list[float | None] = [None] * len(prompts)
        starts = [start for start in range(0, len(prompts), n) if references[start] is not None]
        if not starts:
            return rewards
        groups = [
            self._group(prompts[start], references[start], completion_ids[start : start + n], f"completion {start}")
            for start in starts
        ]
        rows = list(chain.from_iterable(groups))
        features = completion_features(self.network, rows, self._batch_size).unflatten(0, (-1, n + 1))
        gram = gram_matrices(features[:, :n], features[:, n])
        found = rewards_from_gram(gram, **self._settings)
        for start, values in zip(starts, found.total.tolist(), strict=True):
            rewards[start : start + n] = values
        if log_metric is not None:
            for name, value in (_feature_metrics(gram, found) | self._token_metrics(groups)).items():
                log_metric(name, value)
        return rewards

    def _group(
        self, prompt: Text, reference: Text, completion_ids: Sequence[Sequence[int]], place: str
    ) -> list[Completion]:
        """The completions of a prompt and, last, its reference."""
        context = self.tokens.prompt(prompt)
        real = self.tokens.reference(prompt, reference, f"{place}: {self.reference_column}")
        return [Completion(context, tuple(ids)) for ids in (*completion_ids, real)]

    def _check_groups(self, prompts: Sequence[Text], references: Sequence[Any]) -> None:
        n = self.num_generations
        remedy = (
            "Every group has to be whole within one process: make per_device_train_batch_size x steps_per_generation, "
            "and per_device_eval_batch_size, multiples of num_generations, and leave the trainer's sampler as it is."
        )
        if len(prompts) % n:
            raise ValueError(f"num_generations={n}, but a process got {len(prompts)} completions. {remedy}")
        for index in range(len(prompts)):
            start = index - index % n
            if (prompts[index], references[index]) != (prompts[start], references[start]):
                raise ValueError(
                    f"num_generations={n}, but completions {start} and {index} have different prompts or references. "
                    f"{remedy}"
                )

    def _token_metrics(self, groups: Sequence[Sequence[Completion]]) -> dict[str, float]:
        """Shares of completions that were cut, of references that were, and of completions that repeat another."""
        n, count = self.num_generations, len(groups)
        whole = [[self.tokens.is_whole(row.completion) for row in group] for group in groups]
        return {
            "completions/truncated_rate": 1 - sum(sum(flags[:n]) for flags in whole) / (n * count),
            "references/truncated_rate": 1 - sum(flags[n] for flags in whole) / count,
            "completions/duplicate_rate": 1 - sum(len(set(group[:n])) for group in groups) / (n * count),
        }


def _feature_metrics(gram: Gram, rewards: Rewards) -> dict[str, float]:
    """Means over the groups of a call, named as in `ebft.metrics`."""
    plain = rewards_from_gram(gram, whitening="none")
    means = {
        "rewards/alignment/mean": rewards.alignment,
        "rewards/diversity/mean": rewards.diversity,
        "rewards/alignment_unwhitened/mean": plain.alignment,
        "rewards/diversity_unwhitened/mean": plain.diversity,
        "feature_matching_loss": loss_from_gram(gram),
    }
    return {name: value.mean().item() for name, value in means.items()}
