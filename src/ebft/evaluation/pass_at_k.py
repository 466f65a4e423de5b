"""pass@k: how often at least one of k samples passes, estimated without bias from n >= k samples of each problem."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """The unbiased estimator of each problem: the share of all k-subsets of its n samples that hold a passing one.

    It is 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq 1),
    computed as one minus a product of k factors 1 - c / (n - j), in logarithms: no binomial is ever formed, and small
    values keep their digits. The mean over problems is the benchmark's pass@k.

    Args:
        n: How many samples each problem has, [problems] or one number for all.
        c: How many of them pass, [problems] or one number.
        k: How many samples may be tried.

    Returns:
        float64 [problems], or a single number where `n` and `c` are numbers.

    Raises:
        ValueError: k is below 1 or above some n, c is not within 0 and n, or a number is not whole.
    """
    samples, passed = np.broadcast_arrays(_whole(n, "n"), _whole(c, "c"))
    smallest = int(samples.min()) if samples.size else k
    check_k([k], smallest, "k")
    wrong = np.flatnonzero((passed < 0) | (passed > samples))
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"c={passed.flat[i]} of problem {i}: give a number from 0 to its n={samples.flat[i]} samples."
        )
    tried = np.arange(k)
    left = samples[..., None] - tried  # samples that are left when the j-th is drawn, [..., k]
    with np.errstate(divide="ignore"):  # log(0): with fewer than k failures, every subset holds a passing sample
        failing = np.log1p(-np.minimum(passed[..., None] / left, 1.0)).sum(-1)
    return -np.expm1(failing)


def check_k(ks: Sequence[int], num_samples: int, field: str = "pass_at_k") -> None:
    """Refuse what cannot be estimated from so many samples, before they are generated.

    Args:
        ks: The k's that are asked for.
        num_samples: How many samples each problem gets.
        field: The option that `ks` come from, for messages.

    Raises:
        ValueError: There is no k, or one is below 1 or above the number of samples.
    """
    if not ks:
        raise ValueError(f"{field} is empty: name at least one k, such as 1.")
    for k in ks:
        if k < 1:
            raise ValueError(f"{field}={k}: pass@k needs a k of at least 1.")
        if k > num_samples:
            raise ValueError(
                f"{field}={k} is larger than the number of samples of a problem ({num_samples}): draw at least {k}, "
                "or ask for a smaller k."
            )


def _whole(values: ArrayLike, name: str) -> NDArray[np.int64]:
    """Values as int64.

    Raises:
        ValueError: One of them is not a whole number.
    """
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        if array.size:
            raise ValueError(f"{name}={values!r}: give whole numbers of samples.")
        array = array.astype(np.int64)
    return array.astype(np.int64)
