"""One micro-batch of a run on the first layers of its models, with random weights, timed stage by stage.

No weights are read: the models are filled from the shapes that a plan holds anyway.
Shape letters: B rows, K blocks, N rollouts, G generated tokens, P document tokens.
"""

import copy
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import noise
from .ahead import joined, split
from .blocks import BlockLayout
from .config import EBFTConfig
from .experience import Experience, experience_sums
from .features import adapters_off, layer_list
from .forward import causal_lm
from .layouts import no_rollouts
from .logprobs import LogProbs, block_log_probs, document_and_block_log_probs, document_and_block_loss
from .measuring import synchronize
from .planning import Method
from .recorder import StepRecorder
from .rollout import Rollouts, sample_and_sum, sample_rollouts
from .scoring import Scorer, kernel_of, kernel_record


class Laps:
    """Seconds between moments, by name, each with the device idle."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}
        synchronize(device)
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        """What went on since the last moment was this."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


class Cut:
    """The first layers of a policy and of its feature network, with random weights, and a run's step on them.

    Args:
        args: Settings of the run.
        policy: The model to train, on the meta device.
        network: Its feature network, likewise, or None.
        depth: Layers.
        vocabulary: Keep so many tokens; None keeps all.
        batch: What the step runs on: a collated micro-batch with its `layout`.
        method: Of the run.
    """

    def __init__(self, args: EBFTConfig, policy, network, depth, vocabulary, batch: dict[str, Any], method: Method):
        self.args, self.method, self.layout = args, method, batch["layout"]
        self.device = device = args.device
        self.batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        self.batch["layout"] = self.layout
        self.policy = cut_model(policy, depth, vocabulary, device).train()
        embeddings: Any = causal_lm(self.policy).get_input_embeddings()
        tokens = embeddings.weight.shape[0]
        self.batch["input_ids"] = self.batch["input_ids"] % tokens
        self.network = None
        if network is not None:
            shared = network.model is policy
            self.network = copy.copy(network)
            self.network.model = self.policy if shared else cut_model(network.model, depth, vocabulary, device)
            self.network.decoder = causal_lm(self.network.model).base_model
            self.network.layer_indices = [min(index, depth) for index in network.layer_indices]
        if args.rl_coef:
            size = None if self.network is None else self.network.size(args.completion_length)
            # Its bandwidth does not matter for the time.
            record = kernel_record(args.kernel, bandwidth=1.0, features=size, **args.kernel_parameters)
            self.scorer = Scorer(self.network, kernel_of(record, device), args.rewarding)
        if args.checkpoints_activations:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its name changed within transformers 5
                causal_lm(self.policy).gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            if hasattr(self.policy, "peft_config"):
                causal_lm(self.policy).enable_input_require_grads()
        if args.bf16:  # per call, as accelerate does it
            model: Any = self.policy
            model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
        wanted = self.batch["labels"][:, 1:] != -100
        self.options: dict[str, Any] = {"document_mask": wanted if args.ce_coef else torch.zeros_like(wanted)}
        self.options |= args.sampling

    def step(self) -> dict[str, float]:
        """Seconds of the stages of a micro-batch, as `EBFTTrainer.compute_loss` and the backward go through them."""
        laps = Laps(self.device)
        if not (self.args.rl_coef and self.layout.num_blocks):
            loss = self._loss(*no_rollouts(self.batch))
        elif self.method.reuses(self.args.checkpoints_activations):

            def weigh(rollouts: Rollouts) -> LogProbs:
                laps.end("sampling")
                with torch.autocast(self.device.type, enabled=False):
                    self._judge(rollouts, laps)
                return self._slopes(rollouts.tokens)

            loss = sample_and_sum(*self._sampled, weigh, uniforms=self._uniforms(), **self.options)[0]
        else:
            rollouts = self._sample_together(laps)
            self._judge(rollouts, laps)
            loss = self._loss(rollouts.tokens, self.layout)
        loss.backward()
        laps.end("update")
        self.policy.zero_grad()
        return laps.seconds

    def _sample_together(self, laps: Laps) -> Rollouts:
        """The micro-batch's rollouts, beside as many like it as a run samples at a time; its share of that time."""
        args = self.args
        count = max(1, args.rows_sampled_on(self.device) // args.per_device_train_batch_size)
        together = joined([self.batch] * count)
        options: dict[str, Any] = {"uniforms": self._uniforms().repeat(count, 1, 1, 1), **self.args.sampling}
        inputs = together["input_ids"], together["layout"], self.method.rollouts
        rollouts = sample_rollouts(self.policy, *inputs, **options)
        laps.end("sampling")
        laps.seconds["sampling"] /= count
        return split(rollouts, [self.batch] * count)[0]

    @property
    def _sampled(self) -> tuple[Any, Any, BlockLayout, int]:
        return self.policy, self.batch["input_ids"], self.layout, self.method.rollouts

    def _uniforms(self) -> Tensor:
        options: dict[str, int] = {"seed": self.args.seed, "purpose": noise.SAMPLING, "step": 0}
        return noise.sampling_uniforms(self.layout, self.batch["document_ids"].cpu(), self.method.rollouts, **options)

    @torch.no_grad()
    def _judge(self, rollouts: Rollouts, laps: Laps) -> None:
        """Features of the rollouts, rewards and metrics out of them; and log-probs of the initial policy."""
        args, ids = self.args, self.batch["input_ids"]
        gram, rewards = self.scorer(ids, rollouts, self.layout)
        StepRecorder().add(experience_sums(Experience(rollouts, gram, rewards), self.layout))
        if self.network is not None:  # rewards of token ids take next to nothing, and go with what follows
            laps.end("features")
        if self.method.reference:
            with adapters_off(self.policy):  # whose place this one takes
                block_log_probs(self.policy, ids, rollouts.tokens, self.layout, **args.sampling)
            laps.end("reference")

    def _slopes(self, tokens: Tensor) -> LogProbs:
        """Weights of the log-probs: none zero, so that no block is left out."""
        ones = torch.ones(self.batch["labels"][:, 1:].shape, device=self.device)
        return LogProbs(ones, torch.ones(tokens.shape, device=self.device))

    def _loss(self, tokens: Tensor, layout: BlockLayout) -> Tensor:
        inputs = self.policy, self.batch["input_ids"], tokens, layout
        if self.method.linear:
            return document_and_block_loss(*inputs, self._slopes(tokens), **self.options)[0]
        log_probs = document_and_block_log_probs(*inputs, **self.options)
        return log_probs.document.sum() + log_probs.blocks.sum()


def cut_model(model: nn.Module, depth: int, vocabulary: int | None, device: torch.device) -> nn.Module:
    """A copy of a model on the meta device, cut to its first layers, with random weights on `device`.

    Args:
        model: A causal LM, a peft model around one, or a decoder.
        depth: Layers that are kept.
        vocabulary: Tokens that are kept, where embeddings and LM head are plain ones; None keeps all.
        device: Of the copy.
    """
    model = copy.deepcopy(model)
    lm: Any = causal_lm(model)
    name, layers = layer_list(lm.base_model)
    setattr(lm.base_model, name, nn.ModuleList(list(layers)[:depth]))
    if vocabulary is not None:
        _keep_tokens(lm, vocabulary)
    model.to_empty(device=device)
    lm.tie_weights()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    for buffer in model.buffers():  # what is in them does not matter, as long as it is a number
        buffer.fill_(1)
    return model


def _keep_tokens(lm: Any, count: int) -> None:
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    for module in (embeddings, head):
        if isinstance(module, (nn.Embedding, nn.Linear)) and len(module.weight) > count:
            module.weight = nn.Parameter(module.weight[:count], requires_grad=module.weight.requires_grad)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias = nn.Parameter(module.bias[:count], requires_grad=module.bias.requires_grad)
    embeddings.padding_idx = None
    config = lm.config.get_text_config()
    config.vocab_size = min(count, config.vocab_size)
