"""The measure on validation data that chooses among settings: whether it will be measured, and what it chooses."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ..evaluation.config import short_names
from .config import CompareConfig, Options
from .tables import BASE, Row


def check_select(config: CompareConfig) -> None:
    """Refuse a measure that the validation does not measure, where its options tell.

    Raises:
        ValueError: Says what it would take.
    """
    missing = _missing(config.select, config.validation)
    if not missing and config.select.startswith("feature_matching_"):
        lengths = list(config.validation.get("lengths") or [])
        if config.select_length is None:
            missing = "select_length, one of its lengths"
        elif lengths and config.select_length not in lengths:
            missing = f"select_length to be one of its lengths, {lengths}"
    if missing:
        raise ValueError(f"select={config.select!r} is not measured on the validation data: it takes {missing}.")


def _missing(select: str, options: Options) -> str:
    """What the validation lacks for a measure; "" where that is nothing, or cannot be known yet."""
    metrics = options.get("metrics", ("cross_entropy", "feature_matching")) if options.get("dataset_name") else ()
    if select in [f"{name}/{of}" for name in ("cross_entropy", "perplexity") for of in ("all", "answer")]:
        return "" if "cross_entropy" in metrics else "dataset_name, with cross_entropy among the metrics"
    if select.startswith("feature_matching_"):
        if "feature_matching" not in metrics:
            return "dataset_name, with feature_matching among the metrics"
        kernel = select.partition("/")[2]
        return "" if not kernel or kernel in options.get("kernels", ()) else f"kernels, with {kernel} among them"
    if found := re.fullmatch(r"(.+)/(greedy|sampled)/pass@(\d+)", select):
        benchmarks = short_names(options.get("code_benchmark") or [])
        if found[1] not in benchmarks:
            return f"a code_benchmark of that name (there are {', '.join(benchmarks) or 'none'})"
        return _missing_samples(found[2], int(found[3]), options)
    if re.search("/(BLEU|chrF|COMET|sentence)", select):
        return "" if options.get("translation") else "translation"
    if re.fullmatch(r"duplicate_rate|self_bleu|distinct_\d", select):
        return "" if "diversity" in metrics else "dataset_name, with diversity among the metrics"
    if "/" not in select or not options.get("tasks"):
        return "another name (`ebft evaluate` on the base model shows them)"
    return ""


def _missing_samples(kind: str, k: int, options: Options) -> str:
    if kind == "greedy":
        return "" if k == 1 else "sampled in place of greedy"
    enough = int(options.get("num_samples", 1)) > 1 and k in options.get("pass_at_k", [1])
    return "" if enough else f"num_samples above 1, and pass_at_k with {k}"


def choose(config: CompareConfig, rows: Sequence[Row]) -> dict[str, tuple[str, int]]:
    """The setting and part of each method that are best on the validation data, by the mean over seeds.

    Raises:
        ValueError: `select` was not measured there.
    """
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    last = {(row["method"], row["setting"], row["seed"]): row["part"] for row in rows}  # rows are in order of parts
    for row in rows:
        key = (row["method"], row["setting"], row["seed"])
        wanted = (row["measure"], row["length"]) == (config.select, config.select_length)
        if row["method"] != BASE and wanted and (config.checkpoint == "best" or row["part"] == last[key]):
            found[row["method"], row["setting"], row["part"]].append(row["mean"])
    if not found:
        names = sorted({f"{row['measure']}" + (f" (length {row['length']})" if row["length"] else "") for row in rows})
        raise ValueError(
            f"select={config.select!r}, select_length={config.select_length}: not measured on the validation data, "
            f"which has {', '.join(names)}."
        )
    sign = 1 if config.lower_is_better() else -1
    chosen = {}
    for name in dict.fromkeys(method for method, _, _ in found):
        points = {key[1:]: values for key, values in found.items() if key[0] == name}
        most = max(map(len, points.values()))  # a setting that lost seeds is not comparable
        whole = {point: np.mean(values) for point, values in points.items() if len(values) == most}
        chosen[name] = min(whole, key=lambda point: (sign * whole[point], point))
    return chosen
