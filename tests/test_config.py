"""EBFTConfig: defaults, what is refused and with which words, how layers and devices are read."""

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.parallelism_config import TorchContextParallelConfig
from torch._inductor import config as inductor
from trl import TrlParser

from ebft import EBFTConfig
from ebft.artifacts import settings_of
from ebft.config_checks import check_runs_here
from ebft.kernels import KERNELS


def make(**settings) -> EBFTConfig:
    return EBFTConfig(output_dir="unused", **(dict(use_cpu=True) | settings))


# The published settings, method section 3 to 5, and what the library fixes for every run.
DEFAULTS = dict(
    max_length=1024,
    stride=8,
    context_length=8,
    completion_length=8,
    num_generations=4,
    temperature=0.6,
    top_p=1.0,
    top_k=0,
    anchors=None,
    max_blocks=None,
    random_anchor_offset=False,
    packing=False,
    document_masking=True,
    feature_layers=[0.25, 0.5, 0.75],
    feature_reduction="concat",
    feature_norm="joint",
    pooling="last_token",
    kernel="linear",
    kernel_scales=[1.0],
    kernel_bandwidth=None,
    kernel_frequencies=512,
    ngram_sizes=[1, 2, 3],
    whitening="paper",
    alignment=None,
    alignment_coef=1.0,
    diversity_coef=1.0,
    rl_coef=1.0,
    ce_coef=0.03,
    beta=0.0,
    advantage_estimator="leave_one_out",
    loss_normalization="token",
    completion_only_loss=None,
    assistant_only_loss=False,
    split_turns=None,
    reasoning_tags=None,
    learning_rate=None,  # 1e-6, or 1e-5 with LoRA: the trainer knows
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=0.03,
    adam_beta1=0.9,
    adam_beta2=0.95,
    weight_decay=0.0,
    max_grad_norm=1.0,
    logging_nan_inf_filter=False,
    remove_unused_columns=False,
    disable_tqdm=False,
    bf16=False,  # without a GPU
)

REFUSED = {
    "stride": (dict(stride=0), "stride=0 must be at least 1"),
    "context_length": (dict(context_length=0), "context_length=0 must be at least 1"),
    "completion_length": (dict(completion_length=-1), "completion_length=-1 must be at least 1"),
    "num_generations": (dict(num_generations=0), "num_generations=0 must be at least 1"),
    "rl_coef": (dict(rl_coef=-1.0), "rl_coef=-1.0 must not be negative"),
    "ce_coef": (dict(ce_coef=-0.1), "ce_coef=-0.1 must not be negative"),
    "beta": (dict(beta=-1.0), "beta=-1.0 must not be negative"),
    "alignment_coef": (dict(alignment_coef=-1.0), "alignment_coef=-1.0 must not be negative"),
    "diversity_coef": (dict(diversity_coef=-1.0), "diversity_coef=-1.0 must not be negative"),
    "rl_warmup_steps": (dict(rl_warmup_steps=-1), "rl_warmup_steps=-1 must not be negative"),
    "top_k": (dict(top_k=-1), "top_k=-1 must not be negative"),
    "rollout_save_steps": (dict(rollout_save_steps=-1), "rollout_save_steps=-1 must not be negative"),
    "temperature": (dict(temperature=0.0), "temperature=0.0 must be positive: training needs sampled rollouts"),
    "top_p": (dict(top_p=0.0), r"top_p=0.0 must be in \(0, 1\]; 1 keeps all"),
    "top_p above 1": (dict(top_p=1.1), "top_p=1.1 must be in"),
    "max_blocks": (dict(max_blocks=0), "max_blocks=0 must be at least 1, or unset"),
    "too long": (
        dict(max_length=32, context_length=8, completion_length=25),
        "completion_length=25 .* context_length=8 in max_length=32: shorten one of the two or raise max_length",
    ),
    "nothing": (dict(rl_coef=0.0, ce_coef=0.0), "rl_coef=0 and ce_coef=0 leave nothing to train on: set one"),
    "no pairs": (
        dict(num_generations=1),
        "num_generations=1 .* diversity_coef=1.0: use num_generations >= 2 or diversity_coef: 0",
    ),
    "no others": (
        dict(num_generations=1, diversity_coef=0.0),
        "num_generations=1 .*advantage_estimator='leave_one_out'.* or advantage_estimator: none",
    ),
    "alignment and whitening": (
        dict(alignment="dot"),
        "alignment='dot' contradicts whitening='paper'.*leave alignment unset or set whitening: none",
    ),
    "whitening of a kernel": (
        dict(kernel="rbf", whitening="paper"),
        "whitening='paper' is of inner products .* kernel='rbf' has none: leave whitening unset",
    ),
    "released whitening of n-grams": (dict(kernel="ngram", whitening="released"), "whitening='released' is of inner"),
    "cosine of a kernel": (
        dict(kernel="energy", alignment="cosine"),
        "alignment='cosine' is of inner .*leave alignment",
    ),
    "n-grams per token": (dict(kernel="ngram", pooling="token"), "pooling='token' .* kernel='ngram' has no features"),
    "scales of another kernel": (
        dict(kernel="energy", kernel_scales=[1.0, 2.0]),
        r"kernel_scales=\[1.0, 2.0\] does nothing with kernel='energy': remove it, or set kernel: rbf or charact",
    ),
    "bandwidth of linear": (dict(kernel_bandwidth=1.0), "kernel_bandwidth=1.0 does nothing with kernel='linear'"),
    "frequencies of rbf": (
        dict(kernel="rbf", kernel_frequencies=64),
        "kernel_frequencies=64 does nothing with kernel='rbf'.* set kernel: characteristic",
    ),
    "sizes of rbf": (dict(kernel="rbf", ngram_sizes=[1]), r"ngram_sizes=\[1\] does nothing .* set kernel: ngram"),
    "kernel_scales": (dict(kernel="rbf", kernel_scales=[1.0, 0.0]), r"kernel_scales=\[1.0, 0.0\] must be above 0"),
    "kernel_scales nan": (dict(kernel="rbf", kernel_scales=[float("nan")]), r"kernel_scales=\[nan\] must be above 0"),
    "kernel_scales twice": (dict(kernel="rbf", kernel_scales=[2.0, 2.0]), "kernel_scales=.*: one is there twice"),
    "kernel_scales empty": (dict(kernel="rbf", kernel_scales=[]), r"kernel_scales=\[\] must be a list of floats"),
    "kernel_scales text": (dict(kernel="rbf", kernel_scales=["1"]), r"kernel_scales=\['1'\] must be a list of floats"),
    "kernel_bandwidth": (
        dict(kernel="rbf", kernel_bandwidth=-1.0),
        "kernel_bandwidth=-1.0 must be above 0 and finite",
    ),
    "kernel_bandwidth text": (dict(kernel="rbf", kernel_bandwidth="1"), "kernel_bandwidth='1' must be of type float"),
    "kernel_frequencies": (
        dict(kernel="characteristic", kernel_frequencies=0),
        "kernel_frequencies=0 must be at least 1",
    ),
    "kernel_frequencies and scales": (
        dict(kernel="characteristic", kernel_frequencies=1, kernel_scales=[1.0, 2.0]),
        r"kernel_frequencies=1 must be at least 1, and one for each of kernel_scales=\[1.0, 2.0\]",
    ),
    "ngram_sizes": (
        dict(kernel="ngram", ngram_sizes=[0, 1]),
        r"ngram_sizes=\[0, 1\] must be from 1 to completion_length=8",
    ),
    "ngram_sizes too long": (
        dict(kernel="ngram", completion_length=2),
        r"ngram_sizes=\[1, 2, 3\] must be from 1 to completion_length=2: remove what is outside, or raise",
    ),
    "ngram_sizes fraction": (dict(kernel="ngram", ngram_sizes=[1.5]), r"ngram_sizes=\[1.5\] must be a list of ints"),
    "fp16": (dict(fp16=True), "fp16=True: .* use bf16: true"),
    "auto_find_batch_size": (
        dict(auto_find_batch_size=True),
        "auto_find_batch_size=True: .* set per_device_train_batch_size",
    ),
    "logging_nan_inf_filter": (dict(logging_nan_inf_filter=True), "logging_nan_inf_filter=True: .* leave it off"),
    "bf16_full_eval": (dict(bf16_full_eval=True), "bf16_full_eval=True: .* leave it off"),
    "fp16_full_eval": (dict(fp16_full_eval=True), "fp16_full_eval=True: .* leave it off"),
    "neftune_noise_alpha": (dict(neftune_noise_alpha=5.0), "neftune_noise_alpha=5.0: .* unset it"),
    "label_smoothing_factor": (dict(label_smoothing_factor=0.1), "label_smoothing_factor=0.1: .* set it to 0"),
    "use_liger_kernel": (
        dict(use_liger_kernel=True, liger_kernel_config={"cross_entropy": True}),
        "liger_kernel_config: cross_entropy replaces the forward",
    ),
    "torch_compile with graphs": (
        dict(torch_compile_mode="reduce-overhead"),
        "torch_compile_mode='reduce-overhead' records CUDA graphs, .* use torch_compile_mode: max-autotune-no-cudagr",
    ),
    "torch_compile with graphs by their backend": (
        dict(torch_compile_backend="cudagraphs"),
        "torch_compile_backend='cudagraphs' records CUDA graphs",
    ),
    "torch_compile_backend": (
        dict(torch_compile_backend="indutcor"),
        "torch_compile_backend='indutcor' is unknown: leave it unset, or use one of aot_eager, .*inductor",
    ),
    "torch_compile_mode": (
        dict(torch_compile_mode="fast"),
        "torch_compile_mode='fast' is unknown: leave it unset, or use one of default, ",
    ),
    "torch_compile and liger": (
        dict(torch_compile=True, use_liger_kernel=True),
        "torch_compile=True and use_liger_kernel=True .* use one",
    ),
    "activation_offloading": (
        dict(activation_offloading=True),
        "activation_offloading=True .* add gradient_checkpointing: true",
    ),
    "remove_unused_columns": (dict(remove_unused_columns=True), "remove_unused_columns=True: .* leave it off"),
    "no pairs without rollouts": (
        dict(num_generations=1, rl_coef=0.0, advantage_estimator="none"),
        "num_generations=1 has no pairs for diversity_coef=1.0",
    ),
    "include_num_input_tokens_seen": (
        dict(include_num_input_tokens_seen="all"),
        "include_num_input_tokens_seen=all: .* leave it at no",
    ),
    "train_sampling_strategy": (
        dict(train_sampling_strategy="group_by_length"),
        "train_sampling_strategy=.*: use random or sequential",
    ),
    "use_seedable_sampler": (
        dict(accelerator_config={"use_seedable_sampler": False}),
        "accelerator_config.use_seedable_sampler=False: .* leave it on",
    ),
    "text for a number": (dict(stride="8"), "stride='8' must be of type int"),
    "yes for a number": (dict(stride=True), "stride=True must be of type int"),
    "text for a float": (dict(temperature="1"), "temperature='1' must be of type float"),
    "learning_rate": (dict(learning_rate=-1.0), "learning_rate=-1.0 must not be negative"),
    "per_device_train_batch_size": (
        dict(per_device_train_batch_size=0),
        "per_device_train_batch_size=0 must be at least 1",
    ),
    "adam_beta2": (dict(adam_beta2=1.5), r"adam_beta2=1.5 must be in \[0, 1\)"),
    **{
        f"{name} nan": ({name: float("nan")}, f"{name}=nan must")
        for name in ("rl_coef", "temperature", "learning_rate", "weight_decay", "adam_beta2", "top_p")
    },
    "feature_layers": (dict(feature_layers=["half"]), "feature_layers: 'half' is not a number; use fractions"),
}
CHOICES = {
    "kernel": "linear, rbf, energy, characteristic, ngram",
    "anchors": "completion, all",
    "pooling": "last_token, mean_pooling, concat, token",
    "feature_norm": "joint, per_layer, none",
    "feature_reduction": "concat, mean",
    "whitening": "none, paper, released",
    "alignment": "dot, cosine",
    "advantage_estimator": "leave_one_out, rloo, group_norm, none",
    "kl_estimator": "k1, k2, k3",
    "ce_decay": "none, linear, cosine",
    "loss_normalization": "token, document",
}


def test_defaults():
    config = make()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    with pytest.raises(ValueError, match=f"{name}='other' is unknown: use one of {CHOICES[name]}."):
        make(**{name: "other"})
    for value in CHOICES[name].split(", "):
        make(**({"whitening": "none"} | {name: value}))
    if name != "kernel":
        return
    for value in KERNELS:
        assert make(kernel=value).whitening == ("paper" if value == "linear" else "none")


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_generations=1, diversity_coef=0.0, advantage_estimator="none"),
        dict(num_generations=1, diversity_coef=0.0, advantage_estimator="none", rl_coef=0.0, ce_coef=1.0),
        dict(max_length=16),
        dict(ce_coef=0.0),
        dict(alignment="cosine"),
        dict(kernel="rbf", kernel_scales=[0.5, 1, 2], kernel_bandwidth=2, alignment="dot", pooling="token"),
        dict(kernel="characteristic", kernel_frequencies=1, feature_norm="none"),
        dict(kernel="ngram", ngram_sizes=[8], feature_layers=[0.5], feature_model_name_or_path="not read"),
        dict(completion_length=2),
    ],
)
def test_accepted(settings):
    make(**settings)


def test_context_parallelism_is_refused():
    parallelism = ParallelismConfig(cp_size=2, cp_handler=TorchContextParallelConfig())
    with pytest.raises(ValueError, match="parallelism_config: context parallelism .* set cp_size and sp_size to 1"):
        make(parallelism_config=parallelism)


def test_data_parallel_in_one_process_is_refused():
    config = make()
    config.check_one_device()
    config._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process .* nn.DataParallel.*accelerate launch"):
        config.check_one_device()


def test_feature_layers_on_the_command_line():
    """1 is a layer's index, 1.0 the whole depth."""
    arguments = ["--output_dir", "unused", "--use_cpu", "--feature_layers", "1", "0.5", "1.0"]
    config, *_ = TrlParser([EBFTConfig]).parse_args_and_config(arguments)
    assert [(type(x), x) for x in config.feature_layers] == [(int, 1), (float, 0.5), (float, 1.0)]
    assert [(type(x), x) for x in make(feature_layers=[2, 0.5]).feature_layers] == [(int, 2), (float, 0.5)]


def test_sampling_distribution():
    assert make(top_k=5, top_p=0.9).sampling == {"temperature": 0.6, "top_k": 5, "top_p": 0.9}


def test_bf16_is_on_where_a_gpu_has_it():
    assert make(use_cpu=True).bf16 is False
    assert make(use_cpu=False).bf16 == (torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    assert make(bf16=True).bf16 is True


@pytest.mark.parametrize(("there", "message"), [(False, "pip install 'ebft"), (True, "its kernels need a GPU")])
def test_liger_is_asked_for_where_it_shall_run(tmp_path, monkeypatch, there, message):
    """Not where a run is planned for another machine."""
    monkeypatch.setattr("ebft.extras.find_spec", lambda name: there or None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args = EBFTConfig(str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to=[])
    assert args.liger_kernel_config == {"fused_linear_cross_entropy": False, "cross_entropy": False}
    with pytest.raises(ValueError, match=message):
        check_runs_here(args)


def test_offloading_is_refused_where_there_is_nothing_to_offload_from(tmp_path):
    settings = dict(activation_offloading=True, gradient_checkpointing=True)
    args = EBFTConfig(str(tmp_path), use_cpu=True, report_to=[], **settings)
    with pytest.raises(ValueError, match="activation_offloading=True moves memory from a GPU"):
        check_runs_here(args)


def test_compiling_does_not_round_everything_else(tmp_path):
    """Transformers would allow TF32 for all float32 products."""
    assert EBFTConfig(str(tmp_path), torch_compile=True, report_to=[]).tf32 is False
    assert EBFTConfig(str(tmp_path), report_to=[]).tf32 is None


def test_compiling_can_be_switched_off_beside_what_a_run_has_recorded(tmp_path):
    recorded = settings_of(EBFTConfig(str(tmp_path), torch_compile=True, report_to=[]))
    again = EBFTConfig(**recorded | {"torch_compile": False})
    assert recorded["torch_compile"] is True and again.torch_compile is False


def test_compiling_without_a_compiler_is_refused(tmp_path):
    args = EBFTConfig(str(tmp_path), torch_compile=True, use_cpu=True, report_to=[])
    check_runs_here(args)
    with inductor.patch({"cpp.cxx": ("nowhere",)}), pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        check_runs_here(args)
