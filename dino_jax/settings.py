"""Checks of a DINO config, its teacher's temperature, and how a run tells that it has collapsed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from selfsup_jax import checks
from selfsup_jax.state import Sign


def check(config: Any) -> None:
    """Raises `UserError` if a field that only DINO has is invalid."""
    temperatures = ("student_temperature", "teacher_temperature", "teacher_first_temperature")
    rules: checks.Table = dict.fromkeys(temperatures, checks.positive)
    rules |= {"tau_base": checks.share, "centre_momentum": checks.share}
    rules |= {"prototypes": checks.whole(2, largest=2**22), "unit_prototypes": checks.flag}
    rules["views_share_norm"] = checks.flag
    rules |= dict.fromkeys(
        ("teacher_warmup_steps", "teacher_warmup_examples"), checks.optional(checks.whole(0))
    )
    rules["teacher_warmup_epochs"] = checks.optional(checks.not_negative)
    rules |= dict.fromkeys(
        ("monitor.collapse_entropy", "monitor.collapse_uniform_kl"), checks.share
    )
    checks.fields(config, rules)
    checks.equals(config, "bn_groups", 1, "DINO's batch norm is global")


def teacher_temperature(config: Any) -> Callable[[jax.Array], jax.Array]:
    """step -> the teacher's temperature: a line over the warm-up, then constant."""
    first, last = config.teacher_first_temperature, config.teacher_temperature
    steps = max(1, config.teacher_warmup_steps or 0)
    if not config.teacher_warmup_steps:
        first = last
    return lambda step: first + (last - first) * jnp.minimum(step / steps, 1.0)


def of_loss(config: Any) -> dict[str, Any]:
    """The arguments of the method's loss that are settings."""
    return {
        "student_temperature": config.student_temperature,
        "teacher_temperature": teacher_temperature(config),
        "views_share_norm": config.views_share_norm,
    }


def signs(config: Any) -> tuple[Sign, ...]:
    """The two collapses of section 5.3."""
    most, monitor = math.log(config.prototypes), config.monitor
    uniform = "the teacher's output is uniform for all images, because it is not sharpened enough: "
    uniform += "lower config.teacher_temperature"
    single = "one prototype has nearly all images, because the centring does not hold: lower "
    single += "config.centre_momentum"
    return (
        Sign("teacher_entropy", monitor.collapse_entropy * most, uniform),
        Sign("teacher_uniform_kl", monitor.collapse_uniform_kl * most, single),
    )


def notes(config: Any) -> tuple[str, ...]:
    """Lines for the start of a run's log."""
    groups = [config.views[name] for name in ("global", "local") if name in config.views]
    crops = " and ".join(f"{g.count} of {g.size} px" for g in groups if g.count)
    course = f"teacher's temperature {config.teacher_temperature:g}"
    if config.teacher_warmup_steps:
        course += f", from {config.teacher_first_temperature:g} over the first "
        course += f"{config.teacher_warmup_steps:,} steps"
    lines = [f"crops of an image: {crops}; {config.prototypes:,} prototypes; {course}"]
    if config.centre_momentum == 1:
        lines.append("WARNING: config.centre_momentum=1: no centring; it will collapse")
    if config.teacher_temperature >= config.student_temperature:
        lines.append(
            f"WARNING: config.teacher_temperature={config.teacher_temperature:g} is not below the "
            f"student's {config.student_temperature:g}: no sharpening; it will collapse"
        )
    return tuple(lines)
