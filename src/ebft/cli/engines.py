"""How processes share a run: accelerate's configurations, shipped ones by name, and which engine they choose."""

from pathlib import Path
from typing import Any

from ebft.credentials import place_of

CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
SHIPPED = ("ddp", "fsdp2", "zero2", "zero3")
DDP, RUN_EBFT = "ddp", ("ddp", "fsdp2", "zero1", "zero2")


def config_path(name_or_path: str) -> Path:
    """The file of a shipped configuration, or one of one's own.

    Raises:
        ValueError: It is neither.
    """
    path = CONFIGS / f"{name_or_path}.yaml" if name_or_path in SHIPPED else Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"accelerate_config: got {name_or_path!r}; give one of {', '.join(SHIPPED)}, or a file that "
            "`accelerate config` wrote"
        )
    return path


def engine_of(name_or_path: str | None) -> str:
    """`ddp`, `fsdp2`, `zero1`, ... as chosen by a configuration; `ddp` without one.

    Raises:
        ValueError: There is no such file, or EBFT does not run on what it chooses.
    """
    import yaml

    if name_or_path is None:
        return DDP
    path = config_path(name_or_path)
    try:
        config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"accelerate_config: {path}{place_of(error)}") from error
    config = config if isinstance(config, dict) else {}
    kind = str(config.get("distributed_type"))
    if kind == "DEEPSPEED":
        return f"zero{(config.get('deepspeed_config') or {}).get('zero_stage', 2)}"
    if kind == "FSDP":
        return f"fsdp{(config.get('fsdp_config') or {}).get('fsdp_version', 1)}"
    if kind == "NO" or kind.startswith("MULTI_"):
        return DDP
    raise ValueError(
        f"accelerate_config: {path} has distributed_type: {kind}; EBFT runs on MULTI_GPU, FSDP, DEEPSPEED"
    )


def check_runs_ebft(name_or_path: str | None) -> str:
    """The engine of a configuration, on which EBFT itself runs; TRL's trainers run on others as well.

    Raises:
        ValueError: It does not.
    """
    engine = engine_of(name_or_path)
    if engine not in RUN_EBFT:
        raise ValueError(f"accelerate_config: {name_or_path} is {engine}, on which EBFT does not run; use fsdp2")
    return engine
