"""Checks of config fields: a `UserError` names the field, its value and what would be valid.

Fields are dotted paths; a field or section that a config does not have is skipped, and so is a
placeholder that is not set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from selfsup_jax.errors import bad_field, nearest


def in_range(
    config: Any, fields: Iterable[str], low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """Each field is from `low` to `high`; with `above`, `low` itself is not valid."""
    for field, value in present(config, fields):
        fits = low < value <= high if above else low <= value <= high
        if not fits:  # also true for NaN
            limit: dict[tuple[float, float], str] = {
                (0, math.inf): "must not be negative",
                (0, 1): "must be from 0 to 1",
            }
            limit |= {(1, math.inf): "must be at least 1"}
            valid = f"must be from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
            raise bad_field(
                field, value, "must be above 0" if above else limit.get((low, high), valid)
            )


def one_of(config: Any, field: str, choices: Iterable[Any]) -> None:
    """The field has one of the values in `choices`."""
    for path, value in present(config, [field]):
        valid = tuple(choices)
        if value not in valid:
            near = nearest(value, valid) if isinstance(value, str) else ""
            hint = f"; did you mean {near}?" if near and near != ", ".join(sorted(valid)) else ""
            raise bad_field(path, value, f"must be one of {', '.join(map(str, valid))}{hint}")


def equals(config: Any, field: str, value: Any, why: str) -> None:
    """The field has `value`, the only valid one."""
    for path, actual in present(config, [field]):
        if actual != value:
            raise bad_field(path, actual, f"must be {value}: {why}")


def low_high(config: Any, field: str, top: float = math.inf) -> None:
    """The field is `(low, high)` with 0 < low <= high <= `top`."""
    for path, pair in present(config, [field]):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
            raise bad_field(path, tuple(pair), f"must be (low, high) with 0 < low <= high <= {top}")


def numbers(config: Any, field: str, *, whole: bool = False) -> None:
    """The field is a tuple of one or more different numbers above 0."""
    kinds: Any = int if whole else (int, float)
    for path, values in present(config, [field]):
        good = isinstance(values, tuple | list) and len(values) > 0
        good = good and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
        if not good or len(set(values)) < len(values) or not min(values) > 0:
            kind = "whole numbers" if whole else "numbers"
            raise bad_field(
                path, values, f"must be one or more different {kind} above 0, as '(1,2)'"
            )


def present(config: Any, fields: Iterable[str]) -> list[tuple[str, Any]]:
    """The fields that this config has and that are set, with their values."""
    pairs = []
    for field in fields:
        holder, (*sections, leaf) = config, field.split(".")
        for section in sections:
            holder = holder.get(section) if holder is not None else None
        if holder is not None and holder.get(leaf) is not None:
            pairs.append((field, holder[leaf]))
    return pairs
