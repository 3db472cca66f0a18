"""Checks and reads the section `views` of a config: groups of views with one crop size."""

from __future__ import annotations

from typing import Any

from selfsup_jax import checks
from selfsup_jax.errors import UserError, bad_field

JITTER_STYLES = ("tensorflow", "torchvision")
BLUR_PADDINGS = ("zero", "reflect")
RESIZE_METHODS = ("bicubic", "bilinear", "area", "lanczos3")


def groups_of(config: Any) -> list[tuple[str, Any]]:
    """(name, section) of each group in a section `views`; the global views come first."""
    names = [name for name in ("global", "local") if name in config and config[name].count]
    return [(name, config[name]) for name in names]


def views_of(group: Any) -> list[Any]:
    """The section of each view of a group; further views use the last section `view_N`."""
    sections = [group[f"view_{i}"] for i in range(1, group.count + 1) if f"view_{i}" in group]
    return sections + sections[-1:] * (group.count - len(sections))


def check(config: Any) -> None:
    """Checks the section `views` of a pretraining config.

    Raises:
        UserError: a field is invalid.
    """
    checks.in_range(config, ["views.global.count"], 1)
    for name in config.views:
        if name not in ("global", "local", "mean", "std"):
            raise UserError(f"config.views.{name}: the groups of views are global and local")
    for name, group in groups_of(config.views):
        path = f"views.{name}."
        if "view_1" not in group:
            raise UserError(f"config.views.{name}: needs a section view_1, the views' augmentation")
        checks.in_range(config, [path + "count", path + "size"], 1)
        checks.low_high(config, path + "area", top=1.0)
        checks.low_high(config, path + "aspect")
        for view in (key for key in group if key.startswith("view_")):
            _check_view(config, f"{path}{view}.")
    for field, triple in checks.present(config, ("views.mean", "views.std")):
        if len(triple) != 3 or (field.endswith("std") and not min(triple) > 0):
            raise bad_field(field, tuple(triple), "must be three numbers, deviations above 0")


def _check_view(config: Any, path: str) -> None:
    checks.one_of(config, path + "jitter_style", JITTER_STYLES)
    checks.one_of(config, path + "blur_padding", BLUR_PADDINGS)
    probabilities = ("flip", "jitter", "grayscale", "blur", "solarize")
    checks.in_range(config, [f"{path}{name}_prob" for name in probabilities], 0, 1)
    checks.in_range(config, [path + name for name in ("brightness", "contrast", "saturation")], 0)
    checks.in_range(config, [path + "hue"], 0, 0.5)  # half a turn of the colour circle
    for field, taps in checks.present(config, [path + "blur_kernel"]):
        if taps < 1 or taps % 2 == 0:
            raise bad_field(field, taps, "must be odd and at least 1")
    sigmas = checks.present(config, [path + "blur_sigma_min", path + "blur_sigma_max"])
    if len(sigmas) == 2 and not 0 < sigmas[0][1] <= sigmas[1][1]:
        raise bad_field(*sigmas[0], "must be above 0 and at most blur_sigma_max")
