"""What is measured of a machine: the peak of tensors against sizes known in advance, and a rate that is one."""

import torch

from ebft.measuring import matrix_rate, peak_memory, seconds

CPU = torch.device("cpu")
MIB = 2**20


def test_peak_memory_is_the_most_that_is_held_at_once():
    def run():
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        del first
        second = [torch.empty(MIB, dtype=torch.uint8) for _ in range(4)]
        del second[1:]
        return torch.empty(2 * MIB, dtype=torch.uint8)

    assert abs(peak_memory(run, CPU) - 4 * MIB) < 4096


def test_peak_memory_does_not_count_what_was_there_before():
    before = torch.ones(8 * MIB, dtype=torch.uint8)
    assert abs(peak_memory(lambda: before[:MIB] + 1, CPU) - MIB) < 4096


def test_peak_memory_sees_what_the_backward_holds():
    x = torch.ones(MIB, requires_grad=True)
    peak = peak_memory(lambda: x.exp().exp().sum().backward(), CPU)
    # Both results are kept; the backward then holds the gradient of the second and makes that of the first.
    assert 3 * 4 * MIB <= peak <= 5 * 4 * MIB


def test_rate_and_time_are_positive():
    assert matrix_rate(CPU, torch.float32, repeats=1) > 1e6
    assert seconds(lambda: None, CPU) >= 0
