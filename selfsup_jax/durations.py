"""Durations in steps, examples or epochs, turned into steps here and nowhere else."""

from __future__ import annotations

from typing import Any

from selfsup_jax.errors import bad_field


def to_steps(
    section: Any, num_examples: int, batch_size: int, prefix: str = "", path: str = ""
) -> int:
    """The steps that a config section's duration comes to.

    Args:
        section: has the fields `{prefix}steps`, `{prefix}examples` and `{prefix}epochs`; the first
            of them that is not None counts.
        num_examples: of an epoch. An epoch has `num_examples // batch_size` steps.
        batch_size: global.
        prefix: such as `warmup_`.
        path: of the section in the config, for messages.

    Raises:
        UserError: the duration is negative, or none is given.
    """
    units = {
        "steps": 1.0,
        "examples": 1.0 / batch_size,
        "epochs": float(num_examples // batch_size),
    }
    for unit, steps in units.items():
        value = section[prefix + unit]
        if value is not None:
            if value < 0:
                raise bad_field(f"{path}{prefix}{unit}", value, "must not be negative")
            return round(value * steps)
    raise bad_field(f"{path}{prefix}epochs", None, f"give {prefix}steps, _examples or _epochs")
