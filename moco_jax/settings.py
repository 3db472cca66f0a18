"""Checks of a MoCo config, and the lines that a run logs about it."""

from __future__ import annotations

import math
from typing import Any

import jax

from selfsup_jax import checks
from selfsup_jax.devices import collectives
from selfsup_jax.errors import bad_field


def check(config: Any) -> None:
    """Raises `UserError` if the queue or the batch cannot be divided as the config requires."""
    rules: checks.Table = {
        "symmetric": checks.flag,
        "queue_size": checks.whole(-math.inf, largest=2**26),
    }
    rules |= {"tau_base": checks.share, "temperature": checks.positive}
    checks.fields(config, rules)
    groups = collectives.groups_of_microbatch(config.bn_groups, config.accumulate_steps)
    devices = jax.device_count()
    unit = groups * devices * config.accumulate_steps
    if groups > 1 and config.batch_size % unit:
        raise bad_field(
            "batch_size",
            config.batch_size,
            f"must be a multiple of {unit} (groups {groups} x devices {devices} x accumulate_steps "
            f"{config.accumulate_steps}), so that each device can spread its part over all groups "
            f"(bn_groups={config.bn_groups}); nearest: "
            f"{max(1, round(config.batch_size / unit)) * unit}",
        )
    keys = config.batch_size * (2 if config.symmetric else 1)
    if config.queue_size < 1 or config.queue_size % keys:
        both = " x 2 views (symmetric)" if config.symmetric else ""
        raise bad_field(
            "queue_size",
            config.queue_size,
            f"must be a multiple of the {keys} keys of a step (batch_size={config.batch_size}"
            f"{both}); nearest: {max(1, round(config.queue_size / keys)) * keys}",
        )


def notes(config: Any) -> tuple[str, ...]:
    """Lines for the start of a run's log: its queue and its batch-norm groups."""
    keys = config.batch_size * (2 if config.symmetric else 1)
    depth = config.queue_size // keys
    queue_note = f"queue of {config.queue_size:,} keys, those of the last {depth:,} steps"
    groups = collectives.groups_of_microbatch(config.bn_groups, config.accumulate_steps)
    if groups > 1:
        size = config.batch_size // config.accumulate_steps // groups
        return (f"{queue_note}; batch norm in {groups} groups of {size}, keys shuffled over them",)
    return (
        queue_note,
        f"WARNING: config.bn_groups={config.bn_groups} leaves MoCo one batch-norm group: query and "
        "key share their statistics, which can give the positive away without anything being "
        "learned (section 3.3); the paper has 8",
    )
