"""What becomes of one setting of another code base, and of a whole file of them."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]
KINDS: tuple[Any, ...] = (bool, (int, float), list)  # of values; in this order, since a bool is an int to Python


@dataclass(frozen=True)
class Rule:
    """What becomes of one setting; made by the functions below.

    Attributes:
        to: Our option, or several; "" where there is none.
        why: What to know: how the value changes, or why there is no counterpart.
        default: The value where a file does not give one.
        values: Their value -> ours, where they differ.
        only: Values that need no counterpart; all others are refused.
        computed: Whether the value is made together with others.
    """

    to: str = ""
    why: str = ""
    default: Any = None
    values: Mapping[Any, Any] | None = None
    only: tuple[Any, ...] | None = None
    computed: bool = False


def same(to: str, default: Any = None, why: str = "") -> Rule:
    """The same value under our name."""
    return Rule(to, why, default)


def mapped(to: str, values: Mapping[Any, Any], default: Any = None, why: str = "") -> Rule:
    """Another value under our name; one that is not named is refused."""
    return Rule(to, why, default, values)


def computed(to: str, default: Any = None, why: str = "") -> Rule:
    """A value that depends on other settings."""
    return Rule(to, why, default, computed=True)


def left_out(why: str) -> Rule:
    """No counterpart, and none is needed."""
    return Rule("", why)


def refused_unless(only: tuple[Any, ...], why: str, default: Any = None) -> Rule:
    """No counterpart: refused, but for values that need none."""
    return Rule("", why, default, only=only)


def convert(table: Mapping[str, Rule], given: Options) -> tuple[Options, list[str], Options]:
    """Ours of settings that are not computed.

    Args:
        table: Name -> rule, of all settings that are known.
        given: Their settings.

    Returns:
        Our options; what to know of the settings given, a line each; and every setting of theirs, with its default.

    Raises:
        ValueError: A setting is unknown or its value has no counterpart; says what to do.
    """
    for name in given:
        if name not in table:
            nearest = difflib.get_close_matches(name, table, n=1)
            remedy = f"did you mean {nearest[0]}?" if nearest else "remove it, and set what it stands for in our YAML"
            raise ValueError(f"{name}: no setting that is known there; {remedy}")
    ours: Options = {}
    notes = [f"{name}: {table[name].why}" for name in given if table[name].why and table[name].only is None]
    values = {name: given.get(name, rule.default) for name, rule in table.items()}
    for name, rule in table.items():
        value = values[name]
        _check_kind(name, value, rule.default)
        if rule.only is not None:
            if value not in rule.only:
                default = "" if name in given else " (their default)"
                raise ValueError(f"{name}={value!r}{default} has no counterpart: {rule.why}")
        elif rule.values is not None and value is not None:
            if isinstance(value, (list, dict)) or value not in rule.values:
                known = ", ".join(map(str, rule.values))
                raise ValueError(f"{name}={value!r} has no counterpart; those with one: {known}. {rule.why}".strip())
            ours[rule.to] = rule.values[value]
        elif rule.to and not rule.computed and value is not None:
            ours[rule.to] = value
    return ours, notes, values


def _check_kind(name: str, value: Any, default: Any) -> None:
    """A value is of the kind of its default, where there is one that says so."""
    kind = next((kind for kind in KINDS if isinstance(default, kind)), object)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} should be of the kind of {default!r}, their default: correct it")


def split_batch(documents: int, per_device: int, devices: int) -> Options:
    """Our batch options for so many documents per update.

    Raises:
        ValueError: They cannot be divided so.
    """
    if documents % (per_device * devices):
        raise ValueError(
            f"{documents} documents per update cannot be divided over {devices} device(s) with {per_device} each: "
            "change the batch sizes there"
        )
    options = {"per_device_train_batch_size": per_device}
    options["gradient_accumulation_steps"] = documents // (per_device * devices)
    return options | ({"num_processes": devices} if devices > 1 else {})


def markdown(table: Mapping[str, Rule]) -> str:
    """The table as a document shows it; neighbours with equal rules share a row."""
    lines, names = ["| theirs | ours | |", "|---|---|---|"], list(table)
    while names:
        together = _equal_to_first(names, table)
        rule = table[names[0]]
        cells = (", ".join(f"`{name}`" for name in together), _ours(rule), rule.why.replace("|", "\\|"))
        lines.append(f"| {cells[0]} | {cells[1]} | {cells[2]} |".replace("|  |", "| |"))
        names = names[len(together) :]
    return "\n".join(lines)


def _equal_to_first(names: list[str], table: Mapping[str, Rule]) -> list[str]:
    end = next((i for i, name in enumerate(names) if table[name] != table[names[0]]), len(names))
    return names[:end]


def _ours(rule: Rule) -> str:
    if rule.only is not None:
        return "refused unless " + " or ".join(f"`{_plain(value)}`" for value in rule.only)
    if not rule.to:
        return "-"
    text = ", ".join(f"`{name}`" for name in rule.to.split(", "))
    changed = {k: v for k, v in (rule.values or {}).items() if k != v}
    return text + "".join(f"; `{_plain(k)}` is `{_plain(v)}`" for k, v in changed.items())


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "unset", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def header(source: str, notes: Iterable[str]) -> str:
    """Comments at the head of a converted file."""
    lines = [f"From {source}, by `ebft convert`.", *notes]
    return "".join(f"# {line}\n" for line in lines)
