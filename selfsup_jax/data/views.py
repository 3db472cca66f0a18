"""Checks and reads the section `views` of a config: groups of views with one crop size."""

from __future__ import annotations

from typing import Any

from selfsup_jax import checks
from selfsup_jax.errors import UserError, bad_field

RESIZE_METHODS = ("bicubic", "bilinear", "area", "lanczos3")
SIZE = checks.whole(1, largest=2**14)  # pixels
FIELDS: checks.Table = {
    "views.global.count": checks.whole(1, largest=100),
    "views.*.count": checks.whole(0, largest=100),
    "views.*.size": SIZE,
    "views.*.area": checks.low_high(1.0),
    "views.*.aspect": checks.low_high(),
    "views.*.view_*.flip_prob": checks.share,
    "views.*.view_*_prob": checks.share,
    "views.*.view_*.brightness": checks.not_negative,
    "views.*.view_*.contrast": checks.not_negative,
    "views.*.view_*.saturation": checks.not_negative,
    "views.*.view_*.hue": checks.number(0, 0.5),  # half a turn of the colour circle
    "views.*.view_*.jitter_style": checks.one_of(("tensorflow", "torchvision")),
    "views.*.view_*.blur_padding": checks.one_of(("zero", "reflect")),
    "views.*.view_*.blur_kernel": checks.odd,
    "views.*.view_*.blur_sigma_min": checks.positive,
    "views.*.view_*.blur_sigma_max": checks.positive,
    "views.*.view_*.solarize_threshold": checks.share,
    "views.mean": checks.three(checks.any_number, "three numbers"),
    "views.std": checks.three(checks.positive, "three numbers, each above 0"),
}


def groups_of(config: Any) -> list[tuple[str, Any]]:
    """(name, section) of each group in a section `views`; the global views come first."""
    names = [name for name in ("global", "local") if name in config and config[name].count]
    return [(name, config[name]) for name in names]


def views_of(group: Any) -> list[Any]:
    """The section of each view of a group; further views use the last section `view_N`."""
    sections = [group[f"view_{i}"] for i in range(1, group.count + 1) if f"view_{i}" in group]
    return sections + sections[-1:] * (group.count - len(sections))


def sizes(config: Any) -> list[tuple[str, int]]:
    """(field, pixels) of each group's crops, of a config that may have no groups."""
    groups = groups_of(config.views) if "views" in config else []
    return [(f"views.{name}.size", group.size) for name, group in groups]


def check(config: Any) -> None:
    """Checks the section `views` of a pretraining config.

    Raises:
        UserError: a field is invalid.
    """
    for name in config.views:
        if name not in ("global", "local", "mean", "std"):
            raise UserError(f"config.views.{name}: the groups of views are global and local")
    for name, group in groups_of(config.views):
        if "view_1" not in group:
            raise UserError(f"config.views.{name}: needs a section view_1, the views' augmentation")
        for view in (key for key in group if key.startswith("view_")):
            low, high = group[view].blur_sigma_min, group[view].blur_sigma_max
            if low > high:
                field = f"views.{name}.{view}.blur_sigma_min"
                raise bad_field(field, low, f"must be at most blur_sigma_max={high}")
