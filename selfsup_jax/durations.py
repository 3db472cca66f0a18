"""Converts durations from steps, examples or epochs to steps, for the whole library.

Epochs become steps by one of two rules. PyTorch's code leaves out the last, smaller batch of each
epoch (`drop_last`): epochs x (images // batch) steps. BYOL's and SimCLR's code counts the images of
the whole run: epochs x images // batch steps (SimCLR's one more). The data's own epochs have whole
batches either way, each from a new shuffle; by the second rule a run goes on into further ones, so
that it sees as many images as the authors', and its schedules have the authors' length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from selfsup_jax.errors import UserError, bad_field

_WARMUP = "optimizer.warmup_"


def to_steps(
    section: Any,
    num_examples: int,
    batch_size: int,
    prefix: str = "",
    path: str = "",
    whole_epochs: bool = True,
) -> int:
    """Converts the duration in a config section to steps.

    Args:
        section: has the fields `{prefix}steps`, `{prefix}examples` and `{prefix}epochs`; the first
            of them that is not None is used.
        num_examples: examples in an epoch.
        batch_size: global batch size.
        prefix: of the field names, such as `warmup_`.
        path: the section's path in the config, for error messages.
        whole_epochs: each epoch has `num_examples // batch_size` steps; False: only the last batch
            of the whole duration is left out.

    Raises:
        UserError: the duration is negative or too long, or none is given.
    """
    units = {
        "steps": 1.0,
        "examples": 1.0 / batch_size,
        "epochs": float(num_examples // batch_size),
    }
    for unit, steps in units.items():
        value = section[prefix + unit]
        if value is not None:
            count = round(value * steps)
            if unit == "epochs" and not whole_epochs:
                count = round(value * num_examples) // batch_size
            if not 0 <= count < 2**31:  # the device counts in int32
                raise bad_field(f"{path}{prefix}{unit}", value, "must be from 0 to 2^31 - 1 steps")
            return count
    raise bad_field(f"{path}{prefix}epochs", None, f"give {prefix}steps, _examples or _epochs")


def total_and_warmup(config: Any, num_examples: int) -> tuple[int, int]:
    """The number of training steps, and how many of them are warm-up.

    A warm-up in epochs that is as long as the run, as where a preset's run is cut short with
    `config.steps`, becomes a tenth of it. One that is given in steps or examples is meant so.

    Raises:
        UserError: an epoch is smaller than one batch, the training has no steps, or they are all
            warm-up.
    """
    batch = config.batch_size
    if batch > num_examples:
        split = config.data.train_split
        valid = f"must be at most the {num_examples} images of data.train_split={split!r}"
        raise bad_field("batch_size", batch, valid)
    whole = config.whole_epochs
    total = to_steps(config, num_examples, batch, whole_epochs=whole)
    warmup = _warmup(config, num_examples)
    if total < 1:
        raise UserError("config.epochs, .examples and .steps: the length rounds to 0 steps")
    if warmup < total:
        return total, warmup
    for field in ("warmup_steps", "warmup_examples"):
        if config.optimizer[field] is not None:
            if warmup == total:
                return total, warmup
            valid = f"is {warmup} steps: must be at most the run's {total}"
            raise bad_field(f"optimizer.{field}", config.optimizer[field], valid)
    return total, total // 10


def _warmup(config: Any, num_examples: int) -> int:
    """The steps of the warm-up as the config has them."""
    path, whole = "optimizer.", config.whole_epochs
    return to_steps(config.optimizer, num_examples, config.batch_size, "warmup_", path, whole)


def fill_in(config: Any, num_examples: int) -> None:
    """Gives the steps of a config's other durations, such as `optimizer.freeze_epochs`.

    Where a section has `X_steps`, `X_examples` and `X_epochs` and one of them is given, `X_steps`
    becomes the first that is. The warm-up of the learning rate is left to `total_and_warmup`.
    """
    batch, whole = config.batch_size, config.whole_epochs

    def visit(section: Any, path: str) -> None:
        for name in list(section):
            if hasattr(section[name], "keys"):
                visit(section[name], f"{path}{name}.")
            prefix = name.removesuffix("epochs")
            units = [prefix + unit for unit in ("steps", "examples", "epochs")]
            if not prefix.endswith("_") or prefix == name or f"{path}{prefix}" == _WARMUP:
                continue
            if all(unit in section for unit in units) and any(
                section[u] is not None for u in units
            ):
                section[units[0]] = to_steps(section, num_examples, batch, prefix, path, whole)

    visit(config, "")


def described(config: Any, num_examples: int, total_steps: int) -> str:
    """Describes the length of a training, such as `1,000 steps of 64 images (16 epochs)`.

    And that its warm-up was scaled, if it was: see `total_and_warmup`.
    """
    batch = config.batch_size
    epoch = num_examples // batch if config.whole_epochs else num_examples / batch
    epochs = total_steps / epoch
    warmup, used = _warmup(config, num_examples), total_and_warmup(config, num_examples)[1]
    scaled = f"; the warm-up of {warmup:,} steps does not fit: scaled to {used:,}"
    note = scaled if used != warmup else ""
    return f"{total_steps:,} steps of {config.batch_size} images ({epochs:,.4g} epochs{note})"


class Intervals(NamedTuple):
    """Steps between a run's log lines, diagnostics, kNN measurements and plots; 0: never.

    An interval of -1 in a config fits the length of the run: a log line and diagnostics after each
    fiftieth of it (50 and 500 steps at most), kNN and plots after each tenth (5000 at most). Those
    two come first after a fiftieth of the run, at step `first_knn` and `first_plots` (0: an
    interval was given), so that a mistake in the images is seen early.
    """

    log: int
    diagnostics: int
    knn: int
    plots: int
    first_knn: int
    first_plots: int


def intervals(config: Any, total_steps: int) -> Intervals:
    """The intervals of a config of a run, or of a job that trains, of `total_steps` steps."""
    monitor = config.get("monitor", {})

    def fitted(interval: int, parts: int, most: int) -> int:
        return max(1, min(most, total_steps // parts)) if interval < 0 else interval

    knn, plots = (monitor.get(f"{name}_every_steps", 0) for name in ("knn", "plots"))
    early = max(1, total_steps // 50)
    return Intervals(
        log=fitted(config.log_every_steps, 50, 50),
        diagnostics=fitted(monitor.get("diagnostics_every_steps", 0), 50, 500),
        knn=fitted(knn, 10, 5000),
        plots=fitted(plots, 10, 5000),
        first_knn=early if knn < 0 else 0,
        first_plots=early if plots < 0 else 0,
    )
