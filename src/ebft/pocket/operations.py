"""The operations of the Q&A coding task: how each is said in English, written in Python, and what it does.

In the templates stand {xs} for the list so far, {x} for its element, {k} for the parameter and {out} for the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

# What a stage does to a list: filters and maps have templates of one element, the others of the whole list.
FILTER, MAP, WHOLE, AGGREGATE = "filter", "map", "whole", "aggregate"


@dataclass(frozen=True)
class Operation:
    """One stage of a program.

    Attributes:
        name: What it is called in the files.
        kind: FILTER, MAP, WHOLE (list to list) or AGGREGATE (list to number; only the last stage).
        run: What it does to a list and the parameter: the truth that unit tests are made of.
        phrases: Ways to say it, as an imperative.
        code: Ways to write it, the usual one first: a condition or value of {x}, or an expression of {xs}.
        loop: Statements that do it, for WHOLE and AGGREGATE; without, the loop style takes the expression.
        values: Parameters that are drawn; (0,) where there is none.
    """

    name: str
    kind: str
    run: Callable[[list[int], int], Any]
    phrases: tuple[str, ...]
    code: tuple[str, ...] = ()
    loop: tuple[str, ...] = ()
    values: tuple[int, ...] = (0,)


_SMALL, _DIGITS = (2, 3, 4, 5), (2, 3, 4, 5, 6, 7, 8, 9)

FILTERS = (
    Operation(
        "even",
        FILTER,
        lambda xs, k: [x for x in xs if x % 2 == 0],
        ("keep the even numbers", "drop the odd numbers", "take only what is even"),
        ("{x} % 2 == 0", "not {x} % 2"),
    ),
    Operation(
        "odd",
        FILTER,
        lambda xs, k: [x for x in xs if x % 2],
        ("keep the odd numbers", "drop the even numbers", "take only what is odd"),
        ("{x} % 2 == 1", "{x} % 2"),
    ),
    Operation(
        "positive",
        FILTER,
        lambda xs, k: [x for x in xs if x > 0],
        ("keep the positive numbers", "drop everything that is not positive", "take the numbers above zero"),
        ("{x} > 0", "0 < {x}"),
    ),
    Operation(
        "negative",
        FILTER,
        lambda xs, k: [x for x in xs if x < 0],
        ("keep the negative numbers", "drop everything that is not negative", "take the numbers below zero"),
        ("{x} < 0", "0 > {x}"),
    ),
    Operation(
        "greater",
        FILTER,
        lambda xs, k: [x for x in xs if x > k],
        ("keep the numbers above {k}", "drop those up to {k}", "take what is greater than {k}"),
        ("{x} > {k}", "not {x} <= {k}"),
        values=_DIGITS,
    ),
    Operation(
        "less",
        FILTER,
        lambda xs, k: [x for x in xs if x < k],
        ("keep the numbers below {k}", "drop those from {k} on", "take what is smaller than {k}"),
        ("{x} < {k}", "not {x} >= {k}"),
        values=_DIGITS,
    ),
    Operation(
        "divisible",
        FILTER,
        lambda xs, k: [x for x in xs if x % k == 0],
        ("keep the multiples of {k}", "keep what {k} divides", "take only numbers divisible by {k}"),
        ("{x} % {k} == 0", "not {x} % {k}"),
        values=(3, 4, 5, 6),
    ),
    Operation(
        "different",
        FILTER,
        lambda xs, k: [x for x in xs if x != k],
        ("remove every {k}", "drop the numbers equal to {k}", "keep all but the {k}s"),
        ("{x} != {k}", "not {x} == {k}"),
        values=_DIGITS,
    ),
)

MAPS = (
    Operation(
        "add",
        MAP,
        lambda xs, k: [x + k for x in xs],
        ("add {k} to each", "increase every number by {k}", "raise all by {k}"),
        ("{x} + {k}", "{k} + {x}"),
        values=_DIGITS,
    ),
    Operation(
        "subtract",
        MAP,
        lambda xs, k: [x - k for x in xs],
        ("subtract {k} from each", "decrease every number by {k}", "lower all by {k}"),
        ("{x} - {k}", "-{k} + {x}"),
        values=_DIGITS,
    ),
    Operation(
        "multiply",
        MAP,
        lambda xs, k: [x * k for x in xs],
        ("multiply each by {k}", "scale every number by {k}", "take {k} times each"),
        ("{x} * {k}", "{k} * {x}"),
        values=_DIGITS,
    ),
    Operation(
        "square",
        MAP,
        lambda xs, k: [x * x for x in xs],
        ("square each", "replace every number by its square", "raise all to the power of two"),
        ("{x} * {x}", "{x} ** 2"),
    ),
    Operation(
        "negate",
        MAP,
        lambda xs, k: [-x for x in xs],
        ("negate each", "flip every sign", "change the sign of all"),
        ("-{x}", "0 - {x}"),
    ),
    Operation(
        "absolute",
        MAP,
        lambda xs, k: [abs(x) for x in xs],
        ("take absolute values", "remove every minus sign", "make all non-negative by their size"),
        ("abs({x})", "max({x}, -{x})"),
    ),
    Operation(
        "remainder",
        MAP,
        lambda xs, k: [x % k for x in xs],
        ("take each modulo {k}", "replace every number by its remainder by {k}", "reduce all modulo {k}"),
        ("{x} % {k}",),
        values=_DIGITS,
    ),
    Operation(
        "at_most",
        MAP,
        lambda xs, k: [min(x, k) for x in xs],
        ("cap each at {k}", "let no number exceed {k}", "clip all to at most {k}"),
        ("min({x}, {k})", "{x} if {x} < {k} else {k}"),
        values=_DIGITS,
    ),
    Operation(
        "at_least",
        MAP,
        lambda xs, k: [max(x, k) for x in xs],
        ("raise each to at least {k}", "let no number fall below {k}", "clip all from below at {k}"),
        ("max({x}, {k})", "{x} if {x} > {k} else {k}"),
        values=_DIGITS,
    ),
)

WHOLES = (
    Operation(
        "ascending",
        WHOLE,
        lambda xs, k: sorted(xs),
        ("sort them", "order them from small to large", "put them in ascending order"),
        ("sorted({xs})",),
    ),
    Operation(
        "descending",
        WHOLE,
        lambda xs, k: sorted(xs, reverse=True),
        ("sort them in reverse", "order them from large to small", "put them in descending order"),
        ("sorted({xs}, reverse=True)", "sorted({xs})[::-1]"),
    ),
    Operation(
        "reverse",
        WHOLE,
        lambda xs, k: xs[::-1],
        ("reverse the list", "turn the order around", "read them from the back"),
        ("{xs}[::-1]", "list(reversed({xs}))"),
    ),
    Operation(
        "distinct",
        WHOLE,
        lambda xs, k: list(dict.fromkeys(xs)),
        ("remove duplicates", "keep the first of equal numbers", "drop repeated numbers"),
        ("list(dict.fromkeys({xs}))",),
        ("{out} = []", "for {x} in {xs}:", "    if {x} not in {out}:", "        {out}.append({x})"),
    ),
    Operation(
        "first",
        WHOLE,
        lambda xs, k: xs[:k],
        ("take the first {k}", "keep only {k} from the front", "cut the list after {k} numbers"),
        ("{xs}[:{k}]",),
        values=_SMALL,
    ),
    Operation(
        "last",
        WHOLE,
        lambda xs, k: xs[-k:],
        ("take the last {k}", "keep only {k} from the end", "leave just the final {k}"),
        ("{xs}[-{k}:]",),
        values=_SMALL,
    ),
    Operation(
        "skip",
        WHOLE,
        lambda xs, k: xs[k:],
        ("skip the first {k}", "drop {k} from the front", "start after {k} numbers"),
        ("{xs}[{k}:]",),
        values=_SMALL,
    ),
    Operation(
        "without_last",
        WHOLE,
        lambda xs, k: xs[:-k],
        ("leave out the last {k}", "drop {k} from the end", "stop {k} numbers before the end"),
        ("{xs}[:-{k}]",),
        values=_SMALL,
    ),
    Operation(
        "every_other",
        WHOLE,
        lambda xs, k: xs[::2],
        ("take every other one", "keep every second starting with the first", "skip each second number"),
        ("{xs}[::2]",),
    ),
    Operation(
        "running_sum",
        WHOLE,
        lambda xs, k: list(accumulate(xs)),
        ("form running sums", "replace each by the sum up to it", "accumulate them"),
        ("[sum({xs}[:i + 1]) for i in range(len({xs}))]",),
        ("{out} = []", "for i in range(len({xs})):", "    {out}.append(sum({xs}[:i + 1]))"),
    ),
    Operation(
        "differences",
        WHOLE,
        lambda xs, k: [b - a for a, b in pairwise(xs)],
        ("take differences of neighbours", "subtract from each its predecessor", "form the steps between neighbours"),
        ("[q - p for p, q in zip({xs}, {xs}[1:])]",),
        ("{out} = []", "for i in range(1, len({xs})):", "    {out}.append({xs}[i] - {xs}[i - 1])"),
    ),
)

AGGREGATES = (
    Operation(
        "sum",
        AGGREGATE,
        lambda xs, k: sum(xs),
        ("return their sum", "add everything up", "give the total"),
        ("sum({xs})",),
        ("{out} = 0", "for {x} in {xs}:", "    {out} += {x}"),
    ),
    Operation(
        "product",
        AGGREGATE,
        lambda xs, k: prod(xs),
        ("return their product", "multiply everything together", "give the product of all"),
        loop=("{out} = 1", "for {x} in {xs}:", "    {out} *= {x}"),
    ),
    Operation(
        "count",
        AGGREGATE,
        lambda xs, k: len(xs),
        ("return how many there are", "count them", "give the length"),
        ("len({xs})",),
        ("{out} = 0", "for {x} in {xs}:", "    {out} += 1"),
    ),
    Operation(
        "count_distinct",
        AGGREGATE,
        lambda xs, k: len(set(xs)),
        ("return how many different ones there are", "count the distinct numbers", "give the number of unique ones"),
        ("len(set({xs}))",),
    ),
    Operation(
        "largest",
        AGGREGATE,
        lambda xs, k: max(xs, default=0),
        ("return the largest or 0", "find the maximum or 0 if none", "give the biggest or else 0"),
        ("max({xs}, default=0)", "max({xs}) if {xs} else 0"),
        ("{out} = {xs}[0] if {xs} else 0", "for {x} in {xs}:", "    if {x} > {out}:", "        {out} = {x}"),
    ),
    Operation(
        "smallest",
        AGGREGATE,
        lambda xs, k: min(xs, default=0),
        ("return the smallest or 0", "find the minimum or 0 if none", "give the least or else 0"),
        ("min({xs}, default=0)", "min({xs}) if {xs} else 0"),
        ("{out} = {xs}[0] if {xs} else 0", "for {x} in {xs}:", "    if {x} < {out}:", "        {out} = {x}"),
    ),
    Operation(
        "spread",
        AGGREGATE,
        lambda xs, k: max(xs) - min(xs) if xs else 0,
        ("return the range or 0", "find maximum minus minimum or 0 if none", "give how far they spread or 0"),
        ("max({xs}) - min({xs}) if {xs} else 0",),
    ),
    Operation(
        "sum_of_ends",
        AGGREGATE,
        lambda xs, k: xs[0] + xs[-1] if xs else 0,
        ("return first plus last or 0", "add the two ends or give 0 if none", "give the sum of both ends or 0"),
        ("{xs}[0] + {xs}[-1] if {xs} else 0",),
    ),
)

LIST_OPERATIONS = (*FILTERS, *MAPS, *WHOLES)
