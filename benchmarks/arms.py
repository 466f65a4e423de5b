"""The arms by stage: the published scheme, ours with and without the reused forward, and SFT's update as the floor.

Every stage goes through the documents a micro-batch at a time, as the trainer does. All arms share one policy, one
optimiser and one feature network.
Shape letters: B documents, K blocks, N rollouts, G generated tokens, P document tokens, D features.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks import published
from benchmarks.shapes import Workload, build_model
from ebft._compat import set_attention
from ebft.advantages import leave_one_out
from ebft.attention import enable_block_attention
from ebft.compiled import compile_layers
from ebft.features import FeatureNetwork
from ebft.forward import causal_lm
from ebft.liger import take_liger_kernels
from ebft.logprobs import LogProbs, document_and_block_loss
from ebft.losses import cross_entropy, mixed_loss, policy_loss
from ebft.offloading import offload_activations
from ebft.rewards import feature_matching_rewards
from ebft.rollout import Rollouts, sample_and_sum, sample_blocks

RL_COEF, CE_COEF = 1.0, 0.03
LEARNING_RATE = 1e-6
FEATURE_LAYERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Options:
    """How the arms are run, alike in all of them.

    Attributes:
        model: One of `shapes.MODELS`.
        vocab: Another size of its vocabulary.
        device: Where.
        dtype: float32, or bfloat16: float32 masters under autocast.
        attention: `attn_implementation` of ours; the other two take plain sdpa.
        lora: Rank of adapters on all linear layers; 0 for full fine-tuning.
        checkpointing: Gradient checkpointing.
        liger: Liger's kernels in place of the model's own norms, MLPs and rotary embedding.
        compiled: `torch.compile` of norms and MLPs.
        offloading: What checkpointing keeps waits in the CPU's memory; of ours.
        seed: Of weights, documents and noise.
    """

    model: str = "tiny"
    vocab: int | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    lora: int = 0
    checkpointing: bool = False
    liger: bool = False
    compiled: bool = False
    offloading: bool = False
    seed: int = 0


class Bench:
    """Policy, optimiser and feature network that all arms share.

    Args:
        options: How to build them.
        longest: Positions the model must know.

    Raises:
        ValueError: The attention implementation is unknown or cannot express blocks.
    """

    def __init__(self, options: Options, longest: int):
        torch.manual_seed(options.seed)
        self.options = options
        # Trained weights are float32, frozen ones in the dtype of the run.
        weights = options.dtype if options.lora else torch.float32
        self.policy: Any = build_model(
            options.model,
            vocab=options.vocab,
            device=options.device,
            dtype=weights,
            attention="sdpa",
            longest=longest,
        )
        self.policy.eval()
        set_attention(self.policy.config, options.attention)
        enable_block_attention(self.policy)  # refuses what cannot do it
        if options.lora:
            from peft import LoraConfig, get_peft_model

            self.policy = get_peft_model(self.policy, LoraConfig(r=options.lora, target_modules="all-linear"))
            self.feature_model = self.policy  # its adapters are switched off
        else:
            self.feature_model = copy.deepcopy(self.policy).to(options.dtype).requires_grad_(False).eval()
        for model in {causal_lm(x) for x in (self.policy, self.feature_model)} if options.liger else ():
            take_liger_kernels(model)
        if options.compiled:
            compile_layers([causal_lm(x).base_model for x in (self.policy, self.feature_model)])
        if options.checkpointing:
            self.lm.gradient_checkpointing_enable({"use_reentrant": False})
        if options.offloading:
            offload_activations(self.policy)
        self.network = FeatureNetwork(self.feature_model, FEATURE_LAYERS)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.trained = trained

    @property
    def lm(self) -> Any:
        """The causal LM inside the policy."""
        return causal_lm(self.policy)

    def autocast(self):
        """The trainer's mixed precision."""
        options = self.options
        return torch.autocast(options.device.type, torch.bfloat16, enabled=options.dtype == torch.bfloat16)


class Arm:
    """One way to make an update; its `stages` are run in order.

    Args:
        bench: Shared by all arms.
        workload: Sizes of the update.
        keep_gradients: Zero the gradients instead of freeing them, so that they do not count as memory of the update.
    """

    stages: ClassVar[tuple[str, ...]] = ("update",)
    attention = "sdpa"

    def __init__(self, bench: Bench, workload: Workload, keep_gradients: bool = False):
        self.bench, self.workload, self.keep_gradients = bench, workload, keep_gradients
        w, device = workload, bench.options.device
        self.layout = w.layout()
        noise = torch.Generator().manual_seed(bench.options.seed)
        documents = torch.randint(bench.lm.config.vocab_size, (w.batch, w.max_length), generator=noise)
        uniforms = torch.rand(w.batch, self.layout.num_blocks, w.num_generations, w.completion_length, generator=noise)
        self.documents = documents.to(device).split(w.micro_batch)
        self.uniforms = uniforms.to(device).split(w.micro_batch)

    def prepare(self) -> None:
        """Whatever must not be timed, before the stages."""
        for model in (self.bench.policy, self.bench.feature_model):
            set_attention(causal_lm(model).config, self.attention)

    def step(self, loss: Callable[[int], Tensor]) -> Tensor:
        """One optimiser step on the sum of `loss(i)` over the micro-batches, which it returns."""
        bench, total = self.bench, torch.zeros((), device=self.bench.options.device)
        bench.policy.train()  # no model here has dropout; checkpointing asks for it
        bench.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        for i in range(len(self.documents)):
            with bench.autocast():
                value = loss(i)
            value.backward()
            total = total + value.detach()
        nn.utils.clip_grad_norm_(bench.trained, 1.0)
        bench.optimizer.step()
        bench.policy.eval()
        return total

    def forget(self) -> None:
        """Drop what the stages handed to each other."""


class SFT(Arm):
    """Cross-entropy of the documents by the model's own forward."""

    def update(self) -> Tensor:
        """Forward with labels, backward, step."""

        def loss(i: int) -> Tensor:
            ids = self.documents[i]
            return self.bench.policy(input_ids=ids, labels=ids, use_cache=False).loss / len(self.documents)

        return self.step(loss)


class Scheme(Arm, ABC):
    """An update of Energy-Based Fine-Tuning; subclasses differ in `sample`, `embed` and `loss`."""

    stages = ("sampling", "features", "rewards", "update")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.forget()

    def forget(self) -> None:
        """Drop rollouts, features and advantages."""
        self.tokens: list[Tensor] = []  # [B, K, N, G]
        self.embedded: list[tuple[Tensor, Tensor]] = []  # [B, K, N, D], [B, K, D]
        self.advantages: list[Tensor] = []  # [B, K, N]

    @abstractmethod
    def sample(self, input_ids: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens [B, K, N, G]."""

    @abstractmethod
    def embed(self, input_ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, K, N, D] and [B, K, D]."""

    @abstractmethod
    def loss(self, i: int) -> Tensor:
        """The mixed objective of micro-batch `i`, with gradient."""

    def sampling(self) -> None:
        """Rollouts of all documents."""
        with self.bench.autocast():
            self.tokens = [self.sample(ids, noise) for ids, noise in zip(self.documents, self.uniforms, strict=True)]

    def features(self) -> None:
        """Features of rollouts and references."""
        self.embedded = [self.embed(ids, tokens) for ids, tokens in zip(self.documents, self.tokens, strict=True)]

    def rewards(self) -> None:
        """Rewards and advantages."""
        self.advantages = [leave_one_out(feature_matching_rewards(*features)) for features in self.embedded]

    def update(self) -> Tensor:
        """Forward, mixed objective, backward, step."""
        return self.step(self.loss)

    def objective(self, document: Tensor, rollouts: Tensor, advantages: Tensor) -> Tensor:
        """The mixed objective of log-probs [B, P-1] and [B, K, N, G] and advantages [B, K, N]."""
        w, every_block = self.workload, torch.ones_like(rollouts[:, :, 0, 0])
        blocks = w.batch * self.layout.num_blocks * w.num_generations * w.completion_length
        policy, _ = policy_loss(rollouts, advantages.to(rollouts.device), every_block, blocks)
        ce, _ = cross_entropy(document, torch.ones_like(document), w.batch * (w.max_length - 1))
        return mixed_loss(policy, ce, rl_coef=RL_COEF, ce_coef=CE_COEF)[0]

    def weights(self, advantages: Tensor, tokens: Tensor) -> LogProbs:
        """Slopes of the objective, which is linear in the log-probs; as the trainer finds them."""
        shapes = (len(tokens), self.workload.max_length - 1), tokens.shape
        with torch.enable_grad():
            dtype = torch.promote_types(self.bench.lm.dtype, torch.float32)
            document, rollouts = (
                torch.zeros(shape, dtype=dtype, device=tokens.device, requires_grad=True) for shape in shapes
            )
            loss = self.objective(document, rollouts, advantages)
            return LogProbs(*torch.autograd.grad(loss, (document, rollouts)))


class Published(Scheme):
    """By clones, full forwards and dense masks."""

    def sample(self, input_ids: Tensor, uniforms: Tensor) -> Tensor:
        """See `published.sample`."""
        return published.sample(self.bench.policy, input_ids, self.layout, uniforms, self.workload.temperature)

    def embed(self, input_ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `published.features`."""
        w = self.workload
        return published.features(self.bench.feature_model, input_ids, tokens, self.layout, FEATURE_LAYERS, w.pooling)

    def loss(self, i: int) -> Tensor:
        """See `published.log_probs`; the clones of a document are averaged."""
        w, ids, tokens = self.workload, self.documents[i], self.tokens[i]
        document, rollouts = published.log_probs(self.bench.policy, ids, tokens, self.layout, w.temperature)
        return self.objective(document.unflatten(0, (-1, w.num_generations)).mean(1), rollouts, self.advantages[i])


class Ours(Scheme):
    """By the library's engine."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attention = self.bench.options.attention
        self.network = FeatureNetwork(self.bench.feature_model, FEATURE_LAYERS, self.workload.pooling)

    def sample(self, input_ids: Tensor, uniforms: Tensor) -> Tensor:
        """See `ebft.rollout`. Tokens alone, as the baseline; the trainer also takes their entropy, for its metrics."""
        w = self.workload
        return sample_blocks(
            self.bench.policy, input_ids, self.layout, w.num_generations, temperature=w.temperature, uniforms=uniforms
        )

    def sampling(self) -> None:
        """Rollouts of all documents, of several micro-batches at a time."""
        w = self.workload
        size, self.tokens = max(1, w.generation_batch // w.micro_batch), []
        with self.bench.autocast():
            for first in range(0, len(self.documents), size):
                ids, noise = (torch.cat(x[first : first + size]) for x in (self.documents, self.uniforms))
                self.tokens += self.sample(ids, noise).split(w.micro_batch)

    def embed(self, input_ids: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See `ebft.features`."""
        return self.network(input_ids, tokens, self.layout)

    def loss(self, i: int) -> Tensor:
        """See `ebft.logprobs`."""
        ids, tokens = self.documents[i], self.tokens[i]
        slopes = self.weights(self.advantages[i], tokens)
        return document_and_block_loss(
            self.bench.policy, ids, tokens, self.layout, slopes, temperature=self.workload.temperature
        )[0]


class Reused(Ours):
    """By the library's engine, the gradient taken from the forward that samples; so it has one stage."""

    stages = ("update",)

    def update(self) -> Tensor:
        """Sampling, features, rewards, mixed objective, backward, step."""
        w = self.workload

        def loss(i: int) -> Tensor:
            def weigh(rollouts: Rollouts) -> LogProbs:
                with torch.autocast(rollouts.tokens.device.type, enabled=False):
                    features = self.embed(self.documents[i], rollouts.tokens)
                    return self.weights(leave_one_out(feature_matching_rewards(*features)), rollouts.tokens)

            policy, ids, n = self.bench.policy, self.documents[i], w.num_generations
            return sample_and_sum(
                policy, ids, self.layout, n, weigh, temperature=w.temperature, uniforms=self.uniforms[i]
            )[0]

        return self.step(loss)


ARMS: dict[str, type[Arm]] = {"published": Published, "ours": Ours, "ours_reused": Reused, "sft": SFT}
