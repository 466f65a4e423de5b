"""Which engine shares a run among its processes (DDP, FSDP2, ZeRO), and refusals of what rollouts cannot run on."""

import json
import os
from pathlib import Path
from typing import Any


def check_precision(args: Any, launched: str) -> None:
    """Refuse a precision that accelerate was launched with and the settings do not ask for.

    Args:
        args: The settings.
        launched: `mixed_precision` of the accelerator.

    Raises:
        ValueError: They differ.
    """
    if ("bf16" if args.bf16 else "no") != launched:
        raise ValueError(
            f"bf16={args.bf16} but accelerate was launched with mixed_precision='{launched}' "
            "(ACCELERATE_MIXED_PRECISION): make them agree."
        )


def check_deepspeed(settings: Any) -> None:
    """Refuse a file of DeepSpeed's settings that is not there or not JSON; transformers would name neither.

    Args:
        settings: The option: a file, or what else transformers takes, which is left to it.

    Raises:
        ValueError: Names the file.
    """
    if not isinstance(settings, str) or Path(settings).suffix != ".json":
        return
    try:
        json.loads(Path(settings).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"deepspeed: {settings} cannot be read ({error}): give a file of DeepSpeed's settings, in JSON."
        ) from error


def check_engine(args: Any) -> None:
    """Refuse ways of spreading weights over processes under which rollouts cannot be run.

    Args:
        args: An `EBFTConfig`; what `accelerate launch` says besides is in the environment.

    Raises:
        ValueError: Names the setting and the remedy.
    """
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError(
            f"dynamo_backend={os.environ['ACCELERATE_DYNAMO_BACKEND']} of accelerate's configuration would compile "
            "the model as a whole: take dynamo_config out of it, and set torch_compile: true."
        )
    deepspeed = getattr(args, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's zero_stage=3 fetches weights module by module, which the LM head in chunks does not allow: "
            "use FSDP2, which shards as much (accelerate_config: fsdp2), or zero_stage: 2."
        )
    if deepspeed is not None and deepspeed.zero_stage == 0:
        raise ValueError(
            "DeepSpeed's zero_stage=0 shares nothing out and makes the step before a broken gradient is seen: leave "
            "DeepSpeed out (accelerate_config: ddp), or set stage: 1 or 2."
        )
    fsdp = _fsdp_settings(args)
    if fsdp is None:
        return
    if args.device.type == "cpu":
        raise ValueError(
            "fsdp on a CPU: accelerate shards weights on accelerators alone and would train with DDP: leave it out."
        )
    if int(fsdp["fsdp_version"]) != 2:
        raise ValueError(f"fsdp_version={fsdp['fsdp_version']}: only FSDP2 can run rollouts: set fsdp_version: 2.")
    if str(fsdp["auto_wrap_policy"]).upper() == "SIZE_BASED_WRAP":
        raise ValueError(
            "fsdp_auto_wrap_policy=SIZE_BASED_WRAP could give the LM head a group of its own, whose gathers would "
            "differ between processes: use TRANSFORMER_BASED_WRAP."
        )
    if str(fsdp["cpu_ram_efficient_loading"]).lower() in ("true", "1"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading=true leaves the feature network empty on all processes but one: set it to "
            "false."
        )
    if args.feature_network == "ema":
        raise ValueError("feature_network='ema' needs the policy's whole weights on every process: use pretrained.")


def engine_of_run(args: Any) -> str:
    """How the processes of a run share it, as in `footprint.Footprint`: `ddp`, `fsdp2`, `zero1`, `zero2`."""
    deepspeed = getattr(args, "deepspeed_plugin", None)
    if deepspeed is not None:
        return f"zero{deepspeed.zero_stage}"
    return "ddp" if _fsdp_settings(args) is None else "fsdp2"


def _fsdp_settings(args: Any) -> dict[str, Any] | None:
    """What accelerate's plugin is made of, from the config or the launcher; None without FSDP."""
    defaults = {"fsdp_version": "1", "auto_wrap_policy": "", "cpu_ram_efficient_loading": ""}
    if args.fsdp:
        return defaults | args.fsdp_plugin_args
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    return {name: os.environ.get(f"FSDP_{name.removeprefix('fsdp_').upper()}", x) for name, x in defaults.items()}
