"""Checks of the options that choose a kernel and its parameters, and what whitening is by default with each."""

from typing import Any

# Option -> the kernels that read it.
READ_BY = {
    "kernel_scales": ("rbf", "characteristic"),
    "kernel_bandwidth": ("rbf", "characteristic"),
    "kernel_frequencies": ("characteristic",),
    "ngram_sizes": ("ngram",),
}


def default_whitening(kernel: str) -> str:
    """What `whitening` is where it is not set: it whitens features, so only inner products of them have one."""
    return "paper" if kernel == "linear" else "none"


def check_kernel(args: Any) -> None:
    """Refuse parameters that are out of range, or that the chosen kernel does not read.

    Args:
        args: An `EBFTConfig`, its `whitening` resolved.

    Raises:
        ValueError: Names the field and the remedy.
    """
    kernel = args.kernel
    for name, kernels in READ_BY.items():
        if kernel not in kernels and getattr(args, name) != _default(args, name):
            raise ValueError(
                f"{name}={getattr(args, name)} does nothing with kernel='{kernel}': remove it, or set kernel: "
                f"{' or '.join(kernels)}."
            )
    _check_numbers(args)
    if kernel == "linear":
        return
    if args.whitening != "none":
        raise ValueError(
            f"whitening='{args.whitening}' is of inner products of features, and kernel='{kernel}' has none: leave "
            "whitening unset (or none), or set kernel: linear."
        )
    if args.alignment == "cosine":
        raise ValueError(
            f"alignment='cosine' is of inner products of features, and kernel='{kernel}' has none: leave alignment "
            "unset, or set kernel: linear."
        )
    if kernel == "ngram" and args.pooling == "token":
        raise ValueError(
            "pooling='token' rewards each token by its feature, and kernel='ngram' has no features: leave pooling "
            "unset, or choose another kernel."
        )


def _check_numbers(args: Any) -> None:
    for name, kind in (("kernel_scales", float), ("ngram_sizes", int)):
        values, kinds = getattr(args, name), (int, float) if kind is float else (int,)
        listed = isinstance(values, (list, tuple)) and len(values) > 0
        if not listed or any(isinstance(x, bool) or not isinstance(x, kinds) for x in values):
            raise ValueError(f"{name}={values!r} must be a list of {kind.__name__}s, such as {_default(args, name)}.")
        if len(set(values)) < len(values):
            raise ValueError(f"{name}={values}: one is there twice: remove it.")
    bandwidth, count = args.kernel_bandwidth, args.kernel_frequencies
    positive = {f"kernel_scales={args.kernel_scales}": args.kernel_scales}
    if bandwidth is not None:
        if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, float)):
            raise ValueError(f"kernel_bandwidth={bandwidth!r} must be of type float.")
        positive[f"kernel_bandwidth={bandwidth}"] = [bandwidth]
    for text, values in positive.items():
        if not all(0 < value < float("inf") for value in values):
            raise ValueError(f"{text} must be above 0 and finite, in units of the features' distances.")
    if count < len(args.kernel_scales):
        raise ValueError(
            f"kernel_frequencies={count} must be at least 1, and one for each of kernel_scales={args.kernel_scales}."
        )
    length = "completion_length" if args.rollout == "blocks" else "max_completion_length"
    if args.kernel == "ngram" and not 1 <= min(args.ngram_sizes) <= max(args.ngram_sizes) <= args.rollout_length:
        raise ValueError(
            f"ngram_sizes={args.ngram_sizes} must be from 1 to {length}={args.rollout_length}: remove what is "
            f"outside, or raise {length}."
        )


def _default(args: Any, name: str) -> Any:
    field = type(args).__dataclass_fields__[name]
    return field.default_factory() if callable(field.default_factory) else field.default
