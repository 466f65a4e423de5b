"""EBFTConfig: every setting of a run, with its default, its help and its checks; transformers' settings included."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from ._compat import DICT_FIELDS
from .advantages import ADVANTAGE_ESTIMATORS
from .best_model import decide_direction
from .config_checks import (
    check_compile,
    check_liger,
    check_offloading,
    check_parts,
    check_refused,
    no_tf32_unasked,
)
from .data.reasoning import check_tags
from .engine_checks import check_deepspeed
from .features import NORMS, POOLINGS, REDUCTIONS
from .kernel_options import check_kernel, default_whitening
from .kernels import KERNELS
from .losses import DECAYS, KL_ESTIMATORS, LOSS_NORMALIZATIONS
from .rewards import ALIGNMENTS, WHITENINGS

ANCHORS = ("completion", "all")
ROLLOUTS = ("blocks", "completion")
FEATURE_NETWORKS = ("pretrained", "random", "ema", "learned")


def _setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"help": help} | ({"choices": list(choices)} if choices else {})
    return field(default=default, metadata=metadata)


LONGEST_REUSED = 16  # tokens of a block
SAMPLED_AT_ONCE = 16  # documents, on an accelerator: with the paper's blocks a step of decoding is then 8,000 tokens


@dataclass
class EBFTConfig(TrainingArguments):
    """Settings of `EBFTTrainer`; the fields' help texts are their documentation. Names and meaning as in TRL where it
    has one.

    Raises:
        ValueError: A value is out of range or contradicts another; the message names the field and the remedy.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*DICT_FIELDS, "model_init_kwargs"]

    # --- transformers' settings with defaults of our own ---
    learning_rate: float | None = _setting(None, "Peak learning rate. Default: 1e-6, or 1e-5 with LoRA.")  # type: ignore
    lr_scheduler_type: str = _setting("constant_with_warmup", "Learning-rate schedule.")
    warmup_steps: float = _setting(0.03, "Warm-up: a number of steps, or below 1 a share of all steps.")
    adam_beta2: float = _setting(0.95, "Second beta of AdamW.")
    weight_decay: float = _setting(0.0, "Weight decay of AdamW.")
    per_device_train_batch_size: int = _setting(
        4, "Documents (not completions) per device and forward; rows when packed. A group never leaves its device."
    )
    gradient_accumulation_steps: int = _setting(4, "Micro-batches per optimiser step.")
    logging_steps: float = _setting(1, "Log every so many steps. Values are those of the logged step, not averages.")
    logging_nan_inf_filter: bool = _setting(False, "Must stay off: a NaN or infinite loss stops the run instead.")
    bf16: bool | None = _setting(None, "bfloat16 autocast over float32 weights. Default: on where a GPU supports it.")  # type: ignore
    remove_unused_columns: bool = _setting(False, "Must stay off: the collator chooses its columns itself.")

    # --- model ---
    model_init_kwargs: dict | str | None = _setting(
        None, "Keyword arguments of `from_pretrained` when the model is given by name."
    )
    feature_model_name_or_path: str | None = _setting(
        None, "The frozen feature network. Default: the base model (adapters off with LoRA, else a copy)."
    )
    feature_model_revision: str | None = _setting(None, "Branch, tag or commit of the feature network on the Hub.")
    feature_network: str = _setting(
        "pretrained",
        "Its weights: those of the model it is; `random`, never trained, of the same shape; `ema`, the moving average "
        "of the policy's; `learned` (experimental), a classifier's layer on top that tells references from rollouts.",
        FEATURE_NETWORKS,
    )
    feature_ema_decay: float = _setting(0.99, "Of feature_network: ema; what remains of the average at each step.")
    feature_classifier_learning_rate: float = _setting(1e-3, "Of feature_network: learned; of the classifier's Adam.")
    # Strings, so that on the command line 1 (an index) and 1.0 (a fraction) stay apart; numbers after __post_init__.
    feature_layers: list[str] = field(
        default_factory=lambda: ["0.25", "0.5", "0.75"],
        metadata={"help": "Hidden states to read: fractions of the depth, or integers into hidden_states."},
    )
    feature_reduction: str = _setting("concat", "How the layers are joined.", REDUCTIONS)
    feature_norm: str = _setting("joint", "L2 norm of each token's features, before pooling.", NORMS)
    pooling: str = _setting("last_token", "How a block's token features become one; `token` keeps each.", POOLINGS)

    # --- blocks and rollouts ---
    rollout: str = _setting(
        "blocks",
        "What is sampled: strided `blocks` of completion_length tokens, or the whole `completion` behind each prompt, "
        "to its EOS or max_completion_length.",
        ROLLOUTS,
    )
    max_completion_length: int = _setting(256, "Longest completion of rollout: completion and of method: rlvr.")
    max_length: int = _setting(1024, "Longest document, in tokens (P).")
    stride: int = _setting(8, "Distance between neighbouring blocks, in tokens (s).")
    context_length: int = _setting(8, "Shortest prefix of a block, in tokens (c).")
    completion_length: int = _setting(8, "Tokens per block (G).")
    stop_token_ids: list[int] | None = _setting(
        None, "Ids that end a completion. Default: EOS of the tokenizer and of the model's generation config."
    )
    num_generations: int = _setting(4, "Rollouts per block (n).")
    temperature: float = _setting(0.6, "Sampling temperature of the rollouts, and of their log-probs.")
    top_k: int = _setting(0, "Sample from the k likeliest tokens only (log-probs on the same support); 0: all.")
    top_p: float = _setting(1.0, "Sample from the likeliest tokens of this mass (log-probs likewise); 1: all.")
    anchors: str | None = _setting(
        None,
        "Blocks in the `completion` only (of conversations: in assistant turns), or over `all` of a document. "
        "Default: by whether there is a prompt or a conversation.",
        ANCHORS,
    )
    max_blocks: int | None = _setting(None, "Random subset of at most so many blocks per document, new at each visit.")
    random_anchor_offset: bool = _setting(False, "Shift the first anchor by a random 0..stride-1 at each visit.")

    reuse_sampling_forward: bool | None = _setting(
        None,
        "Take the gradient from the forward that sampled instead of a second one. Default: on the CPU, without "
        f"gradient checkpointing, for blocks of up to {LONGEST_REUSED} tokens (it keeps every step's keys). Never "
        "with FSDP, DeepSpeed, kl_estimator k2 or k3, or a changed `sample` or `compute_policy_loss`.",
    )

    per_device_generation_batch_size: int | None = _setting(
        None,
        "Documents (rows when packed) whose rollouts are sampled at a time, of one optimiser step; at least a "
        f"micro-batch. Default: {SAMPLED_AT_ONCE}, on the CPU a micro-batch. Without effect where the forward that "
        "samples is reused, or `sample` overridden.",
    )

    activation_offloading: bool = _setting(
        False, "Move what gradient_checkpointing keeps to the CPU's memory until the backward; on a GPU."
    )
    gather_for_sampling: bool = _setting(
        False,
        "With FSDP2: gather all weights once for a rollout, not at each of its tokens. Needs memory for a whole copy.",
    )

    use_vllm: bool = _setting(False, "Let vLLM sample the completions of rollout: completion.")
    vllm_mode: str = _setting("colocate", "vLLM in this process, or a server that is running.", ("colocate", "server"))
    vllm_server_base_url: str | None = _setting(None, "The server's URL. Default: http://0.0.0.0:8000.")
    vllm_gpu_memory_utilization: float = _setting(0.3, "Share of the GPU's memory that a colocated vLLM takes.")
    vllm_enable_sleep_mode: bool = _setting(False, "Let a colocated vLLM give back its memory during the update.")

    # --- data ---
    packing: bool = _setting(False, "Pack whole documents into rows of max_length.")
    document_masking: bool = _setting(
        True, "Documents of a packed row do not see each other, and no block crosses their borders."
    )
    completion_only_loss: bool | None = _setting(
        None, "Cross-entropy on completions only. Default: where there is a prompt. As in TRL."
    )
    assistant_only_loss: bool = _setting(False, "Cross-entropy on assistant turns only. As in TRL.")
    split_turns: bool | None = _setting(
        None,
        "Each assistant turn is a document of its own, behind the history that the model sees at inference. Default: "
        "only in conversations where the chat template renders that history otherwise when more follow.",
    )
    reasoning_tags: list[str] | None = _setting(
        None,
        "Opening and closing tag (<think> </think>) of reasoning, which stays as context: no cross-entropy on it, no "
        "block in it or across it. Default: none.",
    )
    dataset_num_proc: int | None = _setting(None, "Processes that tokenise.")

    # --- objective ---
    rl_coef: float = _setting(1.0, "Weight of the feature-matching term; 0 skips sampling and features (plain SFT).")
    rl_warmup_steps: int = _setting(0, "Steps over which rl_coef rises linearly.")
    ce_coef: float = _setting(0.03, "Weight of the cross-entropy term (gamma).")
    ce_decay: str = _setting("none", "Decay of ce_coef to 0 over the run.", DECAYS)
    beta: float = _setting(0.0, "Weight of the KL divergence to the initial policy.")
    kl_estimator: str = _setting(
        "k1", "k1 (in the reward) and k2 (in the loss) give grad KL(pi||ref), k3 grad KL(ref||pi).", KL_ESTIMATORS
    )
    alignment_coef: float = _setting(1.0, "Weight of the alignment reward.")
    diversity_coef: float = _setting(1.0, "Weight of the diversity reward (alpha); below 1 is mode-seeking.")
    kernel: str = _setting(
        "linear",
        "Which statistic of the rollouts is matched: linear (mean features, the paper), rbf, energy, characteristic "
        "(random Fourier features), or ngram (counts of n-grams of token ids, without a feature network).",
        KERNELS,
    )
    kernel_scales: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Of rbf and characteristic: widths in bandwidths; of several, the mean of the kernels."},
    )
    kernel_bandwidth: float | None = _setting(
        None,
        "Of rbf and characteristic. Default: the median distance between reference features of the first documents.",
    )
    kernel_frequencies: int = _setting(512, "Of characteristic: how many, drawn once from the seed.")
    ngram_sizes: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Of ngram: tokens of an n-gram; the mean over the sizes."}
    )
    whitening: str | None = _setting(
        None, "Whitening of the features within each group. Default: paper with kernel linear, else none.", WHITENINGS
    )
    alignment: str | None = _setting(
        None, "Dot product or cosine, without whitening (whitened rewards are cosines). Default: dot.", ALIGNMENTS
    )
    advantage_estimator: str = _setting(
        "leave_one_out", "Baseline; leave_one_out is the exact one.", ADVANTAGE_ESTIMATORS
    )
    loss_normalization: str = _setting(
        "token", "Mean over all tokens and blocks, or first within each document.", LOSS_NORMALIZATIONS
    )

    # --- artifacts ---
    rollout_save_steps: int = _setting(10, "Write rollouts/step_*.parquet at step 1 and every so many; 0: never.")

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        layers: Any = self.feature_layers
        layers = [_number(x) for x in (layers if isinstance(layers, (list, tuple)) else [layers])]
        self.feature_layers = layers
        if self.eval_strategy == "steps" and self.eval_steps is None:
            self.eval_steps = 100  # transformers takes logging_steps, and here an evaluation samples rollouts
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False
        untyped: Any = self  # transformers declares `fsdp` as text, and takes a bool
        if str(self.fsdp).lower() in ("true", "false"):  # words on the command line and in YAML
            untyped.fsdp = str(self.fsdp).lower() == "true"
        decide_direction(self)
        no_tf32_unasked(self)
        check_deepspeed(self.deepspeed)
        default_rate = self.learning_rate is None
        self.learning_rate = 1e-6 if default_rate else self.learning_rate
        backend = self.torch_compile_backend
        super().__post_init__()
        # Transformers fills it in, and takes it for `torch_compile: true`, whatever is said of that beside a record.
        self.torch_compile_backend = backend
        self.learning_rate = None if default_rate else self.learning_rate  # the trainer knows whether there is LoRA
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches is None:
            # Rank 0 could only hand out batches of one length: let every rank read a stream and take its share.
            accelerator.dispatch_batches = False
        self._check_types()
        self._check_choices()
        self.whitening = self.whitening or default_whitening(self.kernel)
        check_kernel(self)
        self._check_ranges()
        self._check_combinations()
        check_refused(self)
        check_liger(self)
        check_compile(self)
        check_offloading(self)

    def _check_choices(self) -> None:
        for name, spec in self.__dataclass_fields__.items():
            choices, value = spec.metadata.get("choices"), getattr(self, name)
            # transformers' own choices are checked by transformers
            if name in EBFTConfig.__annotations__ and choices and value is not None and value not in choices:
                raise ValueError(f"{name}='{value}' is unknown: use one of {', '.join(choices)}.")

    def _check_types(self) -> None:
        kinds: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float)}
        for name in EBFTConfig.__annotations__:
            # Not the field's own type: the argument parser takes the "| None" off it.
            kind, value = EBFTConfig.__annotations__[name], getattr(self, name, None)
            if kind in kinds and (isinstance(value, bool) or not isinstance(value, kinds[kind])):
                raise ValueError(f"{name}={value!r} must be of type {kind.__name__}.")

    def _check_ranges(self) -> None:
        sizes = ("stride", "context_length", "completion_length", "max_completion_length", "num_generations")
        if self.per_device_generation_batch_size is not None and self.per_device_generation_batch_size < 1:
            raise ValueError(
                f"per_device_generation_batch_size={self.per_device_generation_batch_size} must be at least 1."
            )
        batch = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for name in (*sizes, *batch):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        ours = ("rl_coef", "ce_coef", "beta", "alignment_coef", "diversity_coef", "rl_warmup_steps", "top_k")
        theirs = ("weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "seed")
        for name in (
            *ours,
            *theirs,
            "rollout_save_steps",
            *(["learning_rate"] if self.learning_rate is not None else []),
        ):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must not be negative or infinite.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} trains nothing: set it or max_steps above 0.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be positive: training needs sampled rollouts.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps all tokens.")
        if self.max_blocks is not None and self.max_blocks < 1:
            raise ValueError(f"max_blocks={self.max_blocks} must be at least 1, or unset for all blocks.")
        if self.rollout == "blocks" and self.completion_length > self.max_length - self.context_length:
            raise ValueError(
                f"completion_length={self.completion_length} does not fit behind context_length={self.context_length} "
                f"in max_length={self.max_length}: shorten one of the two or raise max_length."
            )

    def reuses_sampling_forward_on(self, device: torch.device) -> bool:
        """`reuse_sampling_forward`, or its default on `device`."""
        if self.rollout == "completion":
            return False
        if self.reuse_sampling_forward is not None:
            return self.reuse_sampling_forward
        short = self.completion_length <= LONGEST_REUSED
        return device.type == "cpu" and short and not self.checkpoints_activations

    def rows_sampled_on(self, device: torch.device) -> int:
        """Documents whose rollouts are sampled at a time on `device`."""
        chosen = self.per_device_generation_batch_size or (1 if device.type == "cpu" else SAMPLED_AT_ONCE)
        in_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return max(self.per_device_train_batch_size, min(chosen, in_step))

    @property
    def rollout_length(self) -> int:
        """G, tokens of the longest rollout; also what the policy loss divides by, whatever was sampled."""
        return self.completion_length if self.rollout == "blocks" else self.max_completion_length

    @property
    def longest_completion(self) -> int | None:
        """Tokens of the longest whole completion, or None where rollouts are blocks."""
        return self.max_completion_length if self.rollout == "completion" else None

    @property
    def checkpoints_activations(self) -> bool:
        """Gradient checkpointing, by its name before or since transformers 5.23."""
        return bool(self.gradient_checkpointing or getattr(self, "activation_checkpointing", False))

    def _check_combinations(self) -> None:
        if self.reuse_sampling_forward and self.checkpoints_activations:
            raise ValueError(
                "reuse_sampling_forward=True keeps the activations that gradient_checkpointing=True would not: "
                "use one of the two."
            )
        check_parts(self)
        check_tags(self.reasoning_tags)
        if self.reasoning_tags and self.anchors == "all":
            raise ValueError(
                f"anchors='all' would start blocks in the reasoning that reasoning_tags={self.reasoning_tags} leaves "
                "out: leave anchors unset or set anchors: completion."
            )
        if self.rl_coef == 0 and self.ce_coef == 0:
            raise ValueError("rl_coef=0 and ce_coef=0 leave nothing to train on: set one of them.")

    def check_one_device(self) -> None:
        """Refuse several GPUs in one process, which transformers would put under nn.DataParallel.

        Raises:
            ValueError: There is more than one.
        """
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process would use nn.DataParallel, which cannot be right here: start with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling distribution, as keyword arguments of `sample_rollouts` and `block_log_probs`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}

    @property
    def ending(self) -> dict[str, Any]:
        """What ends a rollout, as a keyword argument of `sample_rollouts`."""
        return {"stop_token_ids": self.stop_token_ids or ()} if self.rollout == "completion" else {}

    @property
    def kernel_parameters(self) -> dict[str, Any]:
        """The kernel's parameters but for its bandwidth, as keyword arguments of `scoring.kernel_record`."""
        scales, sizes = self.kernel_scales, self.ngram_sizes
        return {"scales": scales, "frequencies": self.kernel_frequencies, "seed": self.seed, "sizes": sizes}

    @property
    def rewarding(self) -> dict[str, Any]:
        """The reward, as keyword arguments of `rewards_from_gram`."""
        names = ("alignment_coef", "diversity_coef", "whitening", "alignment")
        return {name: getattr(self, name) for name in names}


def _number(text: Any) -> int | float:
    """`"7"` and 7 to an index, `"0.5"` and 0.5 to a fraction."""
    if not isinstance(text, str):
        return text
    try:
        return int(text) if text.strip().lstrip("-").isdigit() else float(text)
    except ValueError:
        raise ValueError(
            f"feature_layers: '{text}' is not a number; use fractions such as 0.5 or layer indices."
        ) from None
