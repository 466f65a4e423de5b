"""`ebft env`: what this machine offers, for bug reports and for choosing settings."""

import json
import os
import platform
from importlib import metadata
from typing import Any

import ebft

HELP = """\
usage: ebft env [--json]

Shows the versions of everything that matters, the devices, CPU threads, memory, and which attention backends can run
here. Paste it into bug reports.

examples:
  ebft env
  ebft env --json > environment.json
"""

PACKAGES = ("torch", "transformers", "accelerate", "peft", "trl", "datasets", "numpy", "pyarrow", "safetensors")
GIB = 2**30


def run(argv: list[str]) -> None:
    """Print the environment as tables, or as JSON with `--json`.

    Args:
        argv: The words after `ebft env`.

    Raises:
        ValueError: An unknown option.
    """
    unknown = [word for word in argv if word != "--json"]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; `ebft env` takes only --json")
    environment = describe()
    if "--json" in argv:
        print(json.dumps(environment, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    for title, rows in environment.items():
        table = Table(title=title, title_justify="left", show_header=False, min_width=60)
        for name, value in rows.items():
            table.add_row(name, str(value))
        Console().print(table)


def describe() -> dict[str, dict[str, Any]]:
    """Describe versions, devices, memory (GiB) and attention backends.

    Returns:
        One mapping of names to JSON values per section.
    """
    return {"versions": _versions(), "machine": _machine(), "devices": _devices(), "attention": _attention()}


def _versions() -> dict[str, Any]:
    versions = {"ebft": ebft.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    return versions


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory total GiB": round(memory.total / GIB, 1),
        "memory available GiB": round(memory.available / GIB, 1),
    }


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices or {"cpu": "no accelerator found"}


def _attention() -> dict[str, Any]:
    return {
        "sdpa": "block-parallel attention on top of it: the default",
        "eager": "usable, slower",
        "flash_attention_2": "not usable: it takes no mask, and blocks need one",
    }
