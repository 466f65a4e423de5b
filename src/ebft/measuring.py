"""Measures a machine and what runs on it: seconds, peak memory of tensors, rate of matrix products."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ._compat import memory_events

MATRIX = 4096  # rows and columns of the products that the rate is measured on, on an accelerator
MATRIX_ON_CPU = 2048


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of `run()`, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> float:
    """Floating-point operations per second of this machine's own matrix product: median of `repeats` squares.

    Args:
        device: Where.
        dtype: Of the matrices.
        repeats: How many products are timed, after one that is not.
    """
    size = MATRIX_ON_CPU if device.type == "cpu" else MATRIX
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(repeats + 1)][1:]
    return 2 * size**3 / statistics.median(times)


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes of tensors that `run()` holds at once beyond those that were there before it.

    On a CPU it follows every allocation (and slows `run` down); elsewhere it asks the allocator. Pages, fragments and
    the process itself are not counted.
    """
    gc.collect()  # what earlier runs left in cycles must not be freed, and counted, in this one
    if device.type != "cpu":
        allocator: Any = torch.get_device_module(device)
        allocator.reset_peak_memory_stats(device)
        before = allocator.memory_allocated(device)
        run()
        synchronize(device)
        return allocator.max_memory_allocated(device) - before
    held = peak = 0
    for change in memory_events(run):
        held += change
        peak = max(peak, held)
    return peak
