"""EBFTTrainer: one optimiser step of energy-based fine-tuning on top of transformers' Trainer. Orchestration only.

A step: documents -> blocks -> rollouts -> features -> rewards -> advantages -> one forward for policy and
cross-entropy. Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens, D features.
"""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from . import advantages as advantage_estimators
from . import best_model, feature_models, losses, models, noise, pretrained
from ._compat import loss_is_whole_steps
from .ahead import SamplingAhead
from .artifacts import check_output_dir
from .base_trainer import RecordedTrainer
from .blocks import BlockLayout
from .config import EBFTConfig
from .config_checks import check_runs_here
from .data import BlockCollator, padding_id
from .engine_checks import check_engine
from .experience import Experience, experience_sums, predictions_of, rollout_rows
from .features import FeatureNetwork, adapters_off, layer_indices
from .forward import causal_lm
from .integrations.vllm import VLLMSampler
from .layouts import documents_without_block, no_rollouts
from .logprobs import LogProbs, block_log_probs, document_and_block_log_probs, document_and_block_loss
from .metrics import COMPLETION_MEANS, EVALUATION_SUMS, cross_entropy_sums, evaluation_statistics, means
from .objective import Objective, StepTotals, block_weights, policy_denominator, token_weights
from .placement import place_feature_network, place_like_policy
from .prepare import prepare_datasets
from .rewards import Gram, Rewards
from .rollout import Rollouts, sample_and_sum, sample_rollouts
from .scoring import fixed_kernel
from .support import check_tokenizer


class EBFTTrainer(RecordedTrainer):
    """Fine-tunes a causal LM by matching features of its rollouts to those of real completions (arXiv 2603.12248).

    Override `sample`, `compute_rewards`, `compute_advantages` or `compute_policy_loss` to change one part of a step.

    Args:
        model: Hub name, path, `PreTrainedModel` or `PeftModel`.
        args: An `EBFTConfig`; defaults if None.
        data_collator: Must return what `ebft.data.BlockCollator` returns, which is the default.
        train_dataset: A `datasets` Dataset or IterableDataset in one of TRL's formats, tokenised or not.
        eval_dataset: Likewise, or a dict of several.
        processing_class: Tokenizer; loaded from the model's name if None.
        feature_model: The frozen feature network: name, path, model or `FeatureNetwork`; by default
            `args.feature_model_name_or_path`, else the base model.
        compute_metrics: Called in evaluation with `predictions` [rows, K, N, G] (rollouts) and `label_ids` [rows, K,
            G] (references), -100 where there is no block; its metrics join ours.
        callbacks: As in transformers.
        optimizers: As in transformers.
        quantization_config: For a model given by name.
        peft_config: Adapter to train instead of the model; the base is then the feature network.
        formatting_func: Makes text of a dataset row, as in TRL.

    Raises:
        ValueError: Settings, data or model do not fit; data are checked before any weight is loaded.
    """

    _tag_names: ClassVar[list[str]] = ["ebft"]

    def __init__(
        self,
        model: str | nn.Module,
        args: EBFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        feature_model: str | nn.Module | FeatureNetwork | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config=None,
        peft_config=None,
        formatting_func: Callable | None = None,
    ):
        args = EBFTConfig("ebft_output") if args is None else copy.copy(args)  # a config may serve several trainers
        if not isinstance(args, EBFTConfig):
            raise ValueError(f"args={type(args).__name__}: pass an EBFTConfig.")
        if not isinstance(model, (str, nn.Module)):
            raise ValueError(f"model={model!r}: pass a name, a path, a PreTrainedModel or a PeftModel.")
        args.check_one_device()
        check_engine(args)
        check_runs_here(args)
        best_model.check_metric(args, eval_dataset, compute_metrics is not None)
        check_output_dir(str(args.output_dir), resuming=True)  # whether it does is known in `train` only
        config = models.check_named_policy(model, args) if isinstance(model, str) else causal_lm(model).config
        base_name = config.name_or_path
        if processing_class is None:
            processing_class = pretrained.load_policy_tokenizer(str(base_name), args)
        check_tokenizer(processing_class, config)
        feature_model = feature_model or args.feature_model_name_or_path
        if isinstance(feature_model, str):
            feature_models.check_named_feature_model(feature_model, args, config, processing_class)
        elif feature_model is None:
            layer_indices(args.feature_layers, config.get_text_config().num_hidden_layers)
        models.complete_stop_token_ids(args, model, processing_class)
        train_dataset, eval_dataset, self.anchors = prepare_datasets(
            train_dataset, eval_dataset, processing_class, args, formatting_func
        )
        policy = models.load_policy(model, args, peft_config, quantization_config)
        if args.learning_rate is None:
            args.learning_rate = models.default_learning_rate(policy)
        scores = args.rl_coef > 0 or eval_dataset is not None
        needs_features = scores and args.kernel != "ngram"
        load = feature_models.load_feature_network
        self.feature_network = load(policy, args, feature_model, processing_class) if needs_features else None
        self.reference_model = (
            models.load_reference(policy, new_adapter=peft_config is not None) if args.beta and args.rl_coef else None
        )
        self._user_metrics, self._formatting_func = compute_metrics, formatting_func
        apart = type(self).sample is not EBFTTrainer.sample  # a `sample` of somebody's own is given micro-batches
        self._ahead = SamplingAhead(self._sample_explained, 1 if apart else args.rows_sampled_on(args.device))
        super().__init__(
            base_name=base_name,
            model=policy,
            args=args,
            data_collator=data_collator or BlockCollator(padding_id(processing_class), args.document_masking),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=self._evaluation_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        loss_is_whole_steps(self)
        self.can_return_loss = True
        self._ahead.in_step = args.per_device_train_batch_size if self.is_fsdp_enabled else 0
        self._place_frozen_networks()
        if scores:
            self._fix_kernel()
        self.vllm = VLLMSampler(self.model, self.accelerator, processing_class, args) if args.use_vllm else None

    def _place_frozen_networks(self) -> None:
        network, where = self.feature_network, (self.accelerator, self.is_fsdp_enabled)
        if self.reference_model is not None and self.reference_model is not self.model:
            self.reference_model = place_like_policy(self.reference_model, *where)
        if network is None:
            return
        self.record_feature_network(feature_models.describe_feature_network(network))
        if network.model is not self.model:
            place_feature_network(network, *where)
        self.update_feature_network()

    def _fix_kernel(self) -> None:
        dataset: Any = self.eval_dataset if self.train_dataset is None else self.train_dataset
        dataset = next(iter(dataset.values())) if isinstance(dataset, dict) else dataset
        self.use_kernel(fixed_kernel(self.args, self.feature_network, dataset, self.data_collator, self.anchors))

    # --- one step ---

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list, Any]:
        """Fetch a step's micro-batches, lay out their blocks, and count the step's denominators over all ranks."""
        started = time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches:
            # The end of a stream. A step that is not whole would leave its gradient to the next one.
            if not self.state.global_step:
                raise ValueError(
                    f"train_dataset ended after {len(batches)} of the {num_batches} micro-batches of one step: lower "
                    "gradient_accumulation_steps or per_device_train_batch_size, or give more documents."
                )
            return [], None
        self.begin_step(started)
        tokens = blocks = count = 0.0
        self.lay_out_blocks(batches, self.state.global_step)
        for batch in batches:
            tokens += token_weights(batch, self.args).sum()
            blocks += block_weights(batch["layout"], self.args).sum()
            count += (batch["doc_ids"] >= 0).sum()
        totals = torch.tensor([float(tokens), float(blocks), float(count)], dtype=torch.float64)
        tokens, blocks, count = self.sum_over_ranks(totals).tolist()
        self.count_tokens(int(count))
        self._ahead.begin_step(batches)
        if self.vllm is not None:
            self.vllm.synchronise(self.state.global_step)  # here, where every rank comes by
        return batches, StepTotals(tokens, blocks)

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch: Any = None):
        """The mixed objective L_FM + gamma L_CE of one micro-batch, as its share of the whole step's loss."""
        objective = Objective(
            self.args, inputs, num_items_in_batch, self.coefficients(), policy_loss=self.compute_policy_loss
        )
        if not (objective.coefficients[0] and inputs["layout"].num_blocks):
            loss, log_probs = self._loss_of_rollouts(model, objective, *no_rollouts(inputs))
        elif self._reuses_sampling_forward():
            loss, log_probs = self._loss_of_one_forward(model, objective)
        else:
            rollouts = self._ahead.rollouts(inputs)
            inputs["layout"] = inputs["layout"].shortened(rollouts.tokens.shape[-1])
            self._judge(objective, rollouts)
            loss, log_probs = self._loss_of_rollouts(model, objective, rollouts.tokens, inputs["layout"])
        self._record(objective, log_probs, loss)
        # DDP averages gradients over ranks, and ours are shares of a sum.
        loss = loss * self.accelerator.num_processes
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    def _sample_explained(self, batch: dict[str, Any]) -> Rollouts:
        with self.memory.sampling(batch):
            return self.sample(batch)

    def _loss_of_rollouts(self, model, objective: Objective, tokens: Tensor, layout: BlockLayout):
        """Loss and log-probs of rollouts that were sampled before; one call of `model`."""
        options = {"document_mask": objective.document_mask, **self.args.sampling}
        ids = objective.inputs["input_ids"]
        if not self._is_linear():
            log_probs = document_and_block_log_probs(model, ids, tokens, layout, **options)
            return objective(log_probs)[0], log_probs
        slopes = objective.slopes(tokens, self._log_prob_dtype())
        return document_and_block_loss(model, ids, tokens, layout, slopes, **options)

    def _loss_of_one_forward(self, model, objective: Objective) -> tuple[Tensor, LogProbs]:
        """Loss and log-probs of rollouts that are sampled in the same call of `model`."""
        inputs, args = objective.inputs, self.args

        def weigh(rollouts: Rollouts) -> LogProbs:
            with torch.autocast(rollouts.tokens.device.type, enabled=False):
                self._judge(objective, rollouts)
                return objective.slopes(rollouts.tokens, self._log_prob_dtype())

        options = {"uniforms": self._uniforms(inputs), "document_mask": objective.document_mask, **args.sampling}
        loss, log_probs, _ = sample_and_sum(
            model, inputs["input_ids"], inputs["layout"], args.num_generations, weigh, **options
        )
        return loss, log_probs

    def _is_linear(self) -> bool:
        """Whether the loss is linear in the log-probs; an overridden policy loss may be anything."""
        ours = type(self).compute_policy_loss is EBFTTrainer.compute_policy_loss
        return ours and (self.reference_model is None or self.args.kl_estimator == "k1")

    def _reuses_sampling_forward(self) -> bool:
        wanted = self.args.reuses_sampling_forward_on(self.args.device)
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)  # FSDP gathers weights a call at a time
        return wanted and whole and self._is_linear() and type(self).sample is EBFTTrainer.sample

    def _log_prob_dtype(self) -> torch.dtype:
        return torch.promote_types(next(self.model.parameters()).dtype, torch.float32)

    # --- its parts: the override points ---

    def sample(self, inputs: dict[str, Any], *, purpose: int = noise.SAMPLING) -> Rollouts:
        """Sample the rollouts of a batch from the current policy.

        Args:
            inputs: A batch on the device, with its `layout`.
            purpose: `noise.SAMPLING` or `noise.EVALUATION`.

        Returns:
            Rollouts, each [B, K, N, G]; a function of (seed, step, document, block, rollout) and the weights.
        """
        # The bare model: ranks may differ in how often they call it, which DDP's hooks would not survive.
        model, layout, n = self.model, inputs["layout"], self.args.num_generations
        if self.vllm is not None:
            self.vllm.synchronise(self.state.global_step)
            return self.vllm.sample(inputs["input_ids"], layout)
        options = {"uniforms": self._uniforms(inputs, purpose), "gather": self.args.gather_for_sampling}
        options |= {**self.args.sampling, **self.args.ending}
        return sample_rollouts(model, inputs["input_ids"], layout, n, **options)

    def _uniforms(self, inputs: dict[str, Any], purpose: int = noise.SAMPLING) -> Tensor:
        documents = inputs["document_ids"].cpu()
        step = 0 if purpose == noise.EVALUATION else self.state.global_step
        sizes = {"seed": self.args.seed, "purpose": purpose, "step": step}
        return noise.sampling_uniforms(inputs["layout"], documents, self.args.num_generations, **sizes)

    def compute_rewards(self, inputs: dict[str, Any], rollouts: Rollouts) -> tuple[Gram, Rewards]:
        """Kernel values of rollouts and references, and the rewards: [B, K, N] or [B, K, G, N]."""
        assert self.scorer is not None, "made whenever rollouts are sampled"
        return self.scorer(inputs["input_ids"], rollouts, inputs["layout"])

    def compute_advantages(self, experience: Experience) -> Tensor:
        """Advantages [B, K, N] (every token of a rollout the same) or [B, K, N, G]; the KL's k1 estimate included."""
        args, rewards = self.args, experience.rewards
        per_token = self.feature_network is not None and self.feature_network.pooling == "token"
        if per_token:
            rewards = Rewards(*map(advantage_estimators.reward_to_go, rewards))
        advantages = advantage_estimators.estimate(
            args.advantage_estimator, rewards, alignment_coef=args.alignment_coef, diversity_coef=args.diversity_coef
        )
        advantages = advantages.mT if per_token else advantages
        if experience.kl is not None and args.kl_estimator == "k1":
            kl = experience.kl.to(advantages)
            kl = advantage_estimators.rloo(kl) if args.advantage_estimator != "none" else kl
            advantages = advantages - args.beta * (kl[..., None] if per_token else kl)
        return advantages

    def compute_policy_loss(
        self, log_probs: Tensor, advantages: Tensor, layout: BlockLayout, totals: StepTotals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """REINFORCE on log_probs [B, K, N, G], over G * N * the step's blocks: `losses.policy_loss`."""
        weights, denominator = block_weights(layout, self.args), policy_denominator(self.args, totals)
        weights = weights.to(log_probs.device)
        return losses.policy_loss(log_probs, advantages.to(log_probs.device), weights, denominator)

    def coefficients(self) -> tuple[float, float]:
        """`rl_coef` and `ce_coef` at the current step: warm-up of the one, decay of the other."""
        args, step, total = self.args, self.state.global_step, max(self.state.max_steps, 1)
        rl = losses.coefficient_at(step, total, args.rl_coef, warmup_steps=args.rl_warmup_steps)
        return rl, losses.coefficient_at(step, total, args.ce_coef, decay=args.ce_decay)

    def _judge(self, objective: Objective, rollouts: Rollouts) -> None:
        """Give the objective its rollouts, with rewards and advantages."""
        objective.experience = self._experience(objective.inputs, rollouts)
        objective.advantages = self.compute_advantages(objective.experience)

    @torch.no_grad()
    def _experience(self, inputs: dict[str, Any], rollouts: Rollouts) -> Experience:
        gram, rewards = self.compute_rewards(inputs, rollouts)
        if self.reference_model is None:
            return Experience(rollouts, gram, rewards)
        with adapters_off(self.model) if self.reference_model is self.model else nullcontext():
            reference = block_log_probs(
                self.reference_model, inputs["input_ids"], rollouts.tokens, inputs["layout"], **self.args.sampling
            )
        reference = reference if rollouts.mask is None else reference.where(rollouts.mask, 0.0)
        kl = losses.kl_estimate(rollouts.log_probs, reference, "k1")
        return Experience(rollouts, gram, rewards, kl, reference)

    # --- what a step leaves behind ---

    @torch.no_grad()
    def _record(self, objective: Objective, log_probs: LogProbs, loss: Tensor) -> None:
        recorder, inputs, experience = self.recorder, objective.inputs, objective.experience
        recorder.add(objective(log_probs)[1])
        recorder.add({"loss": loss, "short": documents_without_block(inputs)})
        advantages = objective.advantages
        if experience is None or advantages is None:
            recorder.keep_inputs(inputs)
            return
        recorder.add(experience_sums(experience, inputs["layout"]))
        recorder.keep_inputs(
            inputs, tokens=experience.rollouts.tokens, rewards=experience.rewards.total, advantages=advantages
        )
        step = self.state.global_step + 1
        if self.saves_rollouts(step):
            recorder.rollout_rows += rollout_rows(inputs, experience, advantages, self.processing_class, step)

    # --- evaluation ---

    def evaluate(self, eval_dataset=None, *args, **kwargs) -> dict[str, float]:
        """As in transformers; a dataset given here may be raw, in any of the formats of training data."""
        raw = "loss_mask" not in (getattr(eval_dataset, "column_names", None) or ["loss_mask"])
        dataset: Any = eval_dataset
        if raw and not isinstance(eval_dataset, dict):
            tokenizer, formatting = self.processing_class, self._formatting_func
            dataset = prepare_datasets(None, eval_dataset, tokenizer, self.args, formatting)[1]
        return super().evaluate(dataset, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Statistics of one evaluation batch, per row, so that Trainer's own gathering makes exact totals of them.

        Returns:
            `(loss, statistics [B, M] or (statistics, rollouts), labels)`.
        """
        inputs = self._prepare_inputs(inputs)
        [layout] = self.lay_out_blocks([inputs], step=None)
        self.memory.at_work(inputs, evaluates=True)
        with torch.no_grad(), self.compute_loss_context_manager():
            document, _ = document_and_block_log_probs(self.model, inputs["input_ids"], *no_rollouts(inputs))
            sums = cross_entropy_sums(document, inputs)
            experience = None
            if layout.num_blocks and self.scorer is not None:
                rollouts = self.sample(inputs, purpose=noise.EVALUATION)
                inputs["layout"] = layout.shortened(rollouts.tokens.shape[-1])
                experience = self._experience(inputs, rollouts)
                sums |= experience_sums(experience, layout)
        statistics = evaluation_statistics(sums, EVALUATION_SUMS)
        if self._user_metrics is None:
            return None, statistics, inputs["labels"][:, :1]
        rollouts = None if experience is None else experience.rollouts
        predictions, references = predictions_of(inputs["input_ids"], layout, rollouts, self.args.num_generations)
        return None, (statistics, predictions), references

    def _evaluation_metrics(self, prediction) -> dict[str, float]:
        predictions = prediction.predictions
        statistics, *rest = predictions if isinstance(predictions, tuple) else [predictions]
        out = means(dict(zip(EVALUATION_SUMS, statistics.sum(0).tolist(), strict=True)))
        absent = ["kl"] * (self.reference_model is None)
        absent += [name for name in COMPLETION_MEANS if self.args.rollout == "blocks"]
        out = {name: value for name, value in out.items() if name not in absent}
        if "ce_loss" in out:
            out = {"loss": out["ce_loss"]} | out
        if self._user_metrics is not None:
            out |= self._user_metrics(EvalPrediction(predictions=rest[0], label_ids=prediction.label_ids))
        return out
