"""Rules for config fields: a `UserError` names the field, its value and what would be valid.

A rule is a function of a value, of any type. A table has a rule for each field, by its dotted path
or a pattern of paths: `{"views.*.area": ...}`.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from selfsup_jax.errors import bad_field, nearest

# `value -> ""`, or what would be valid, such as `must be from 0 to 1`.
Rule = Callable[[Any], str]
Table = dict[str, Rule]

# Steps, sizes and indices are int32 on devices; float32 has 1e12's square and its inverse.
_WHOLE, _NUMBER = 2**31 - 1, 1e12


def fields(config: Any, table: Table, others: Rule | None = None) -> None:
    """Checks each field that the config has and that the table has a rule for.

    Args:
        config: nested sections; fields that it does not have are not checked.
        table: path or pattern -> rule; a path has precedence over a pattern.
        others: the rule of the fields that the table does not have.

    Raises:
        UserError: for the first field that is not valid.
    """
    patterns = [(key, rule) for key, rule in table.items() if "*" in key]
    for field, value in leaves(config):
        rule = table.get(field) or next(
            (rule for key, rule in patterns if fnmatch.fnmatchcase(field, key)), others
        )
        valid = rule(value) if rule else ""
        if valid:
            raise bad_field(field, tuple(value) if isinstance(value, list) else value, valid)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(Dotted path, value) of all fields in all sections."""
    for name in config:
        value = config[name]
        if hasattr(value, "keys"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def equals(config: Any, field: str, value: Any, why: str) -> None:
    """The field has `value`, the only valid one; raises `UserError`."""
    fields(config, {field: lambda actual: "" if actual == value else f"must be {value}: {why}"})


# ----------------------------------------------------------------------------- the rules


def number(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """A finite number from `low` to `high`; with `above`, `low` itself is not valid."""
    return _bounded("a finite number", int | float, low, high, _NUMBER, above)


def whole(low: float, high: float = math.inf, *, largest: int = _WHOLE) -> Rule:
    """A whole number from `low` to `high`; `largest` is named only where a value is above it."""
    return _bounded("a whole number", int, low, high, largest, False)


def _bounded(kind: str, types: Any, low: float, high: float, largest: float, above: bool) -> Rule:
    if above:
        span = f"above {low:g}" + (f", at most {high:g}" if high < math.inf else "")
    elif high < math.inf:
        span = f"from {low:g} to {high:g}"
    else:
        span = {0: "not negative", -math.inf: ""}.get(low, f"at least {low:g}")

    def rule(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, types) or not abs(value) < math.inf:
            return f"must be {kind}, {span}".rstrip(", ")
        if abs(value) > largest:
            return f"must be at most {largest:,.12g}"
        inside = (low < value if above else low <= value) and value <= high
        return "" if inside else f"must be {span}".replace("be not", "not be")

    return rule


positive, not_negative, share = number(0, above=True), number(0), number(0, 1)
any_number = number(-math.inf)


def flag(value: Any) -> str:
    """True or False."""
    return "" if isinstance(value, bool) else "must be True or False"


def text(value: Any) -> str:
    """A text, which may be a path."""
    return "" if isinstance(value, str) and "\0" not in value else "must be a text"


def patterns(values: Any) -> str:
    """A tuple of regular expressions."""
    valid = each(text, "regular expressions, as \"('bias$',)\"")(values)
    for value in () if valid else values:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as e:
            return f"{value!r} is no regular expression: {e}"
    return valid


def odd(value: Any) -> str:
    """An odd number of pixels."""
    fits = not whole(1, 1023)(value) and value % 2
    return "" if fits else "must be odd and at least 1, at most 1023"


def finite(value: Any) -> str:
    """Anything; numbers in it are finite and not huge: for fields of which no more is known."""
    if isinstance(value, tuple | list):
        return next(filter(None, map(finite, value)), "")
    return any_number(value) if isinstance(value, float) or type(value) is int else ""


def one_of(choices: Collection[Any]) -> Rule:
    """One of a few values; of the keys of a dictionary, also those that come later."""

    def rule(value: Any) -> str:
        if _among(value, choices):
            return ""
        names, words = ", ".join(map(str, choices)), sorted(map(str, choices))
        near = nearest(value, words) if isinstance(value, str) else ""
        hint = f"; did you mean {near}?" if near and near != ", ".join(words) else ""
        return f"must be one of {names}{hint}"

    return rule


def optional(rule: Rule, *empty: Any) -> Rule:
    """One of the values `empty` (None, if there are none), or what the rule accepts."""
    return lambda value: "" if _among(value, empty or (None,)) else rule(value)


def _among(value: Any, choices: Iterable[Any]) -> bool:
    """Whether it is one of them, also in its type: True is not 1."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def each(
    rule: Rule, valid: str, fits: Callable[[tuple[Any, ...]], bool] = lambda values: True
) -> Rule:
    """A tuple of values that the rule accepts and that together fit; `valid` describes them."""

    def of_tuple(values: Any) -> str:
        if not isinstance(values, tuple | list):
            return f"must be {valid}"
        bad = next((f" ({value!r} {rule(value)})" for value in values if rule(value)), "")
        return f"must be {valid}{bad}" if bad or not fits(tuple(values)) else ""

    return of_tuple


def different(rule: Rule, what: str) -> Rule:
    """One or more different values."""
    return each(
        rule,
        f"one or more different {what}, as '(1,2)'",
        lambda values: 0 < len(values) == len(set(values)),
    )


def low_high(top: float = 1000.0) -> Rule:
    """(low, high) with 0 < low <= high <= `top`."""
    return each(
        positive,
        f"(low, high) with 0 < low <= high <= {top}",
        lambda pair: len(pair) == 2 and pair[0] <= pair[1] <= top,
    )


def three(rule: Rule, valid: str) -> Rule:
    """A value for each colour."""
    return each(rule, valid, lambda values: len(values) == 3)
