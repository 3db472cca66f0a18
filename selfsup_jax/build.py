"""Builds a method from a config: the parts that all methods share, and the lookup by name."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax import optim
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.devices import process
from selfsup_jax.errors import UserError, bad_field, nearest
from selfsup_jax.method import Method
from selfsup_jax.models import encoders, heads, network
from selfsup_jax.state import TrainState, fresh_state

# `(config, num_classes or None, total_steps, warmup_steps) -> Method`
Build = Callable[[Any, int | None, int, int], Method]


class Parts(NamedTuple):
    """The objects that every method builds from a config in the same way."""

    encoder: nn.Module
    projector: nn.Module
    predictor: nn.Module | None  # None if the config has no such section
    classifier: nn.Module | None
    image_shape: tuple[int, int, int]
    shared: dict[str, Any]  # the fields of `Method` that are built in the same way


def parts_from_config(
    config: Any,
    num_classes: int | None,
    total_steps: int,
    warmup_steps: int,
    views: Mapping[str, int | None] | None = None,
) -> Parts:
    """Builds encoder, heads, online probe, optimizer and augmentation from a validated config.

    Args:
        config: a pretraining config.
        num_classes: classes of the online probe; None for no probe.
        total_steps, warmup_steps: length of the run and of its warm-up.
        views: view group -> number of views that the method takes, or None for any; None for two
            global views.

    Raises:
        UserError: the config has another number of views.
    """
    dtype = jnp.dtype(process.compute_dtype(config.compute_dtype))
    probe = config.online_probe
    no_ratio = ("^classifier/",) if num_classes and not probe.lars_ratio else ()
    frozen = tuple(f"^encoder/{part}(/|$)" for part in encoders.frozen(config.encoder))
    schedule, optimizer = optim.from_config(
        config.optimizer, config.batch_size, total_steps, warmup_steps, no_ratio, frozen
    )
    augment = Augmentation.from_config(config.views)
    given = {name: len(group) for name, group in augment.groups.items()}
    wanted = dict(views or {"global": 2})
    for name in wanted | given:
        count, needed = given.get(name, 0), wanted.get(name, 0)
        if needed is not None and count != needed:
            raise bad_field(f"views.{name}.count", count, f"must be {needed} for {config.method}")
    image_shape = (config.views["global"].size, config.views["global"].size, 3)
    shared = {
        "start": functools.partial(start_with_copy, image_shape=image_shape),
        "optimizer": optimizer,
        "schedule": schedule,
        "augment": augment,
        "bn_groups": config.bn_groups,
        "accumulate_steps": config.accumulate_steps,
    }
    if "tau_base" in config:
        shared["tau"] = optim.tau_schedule(config.tau_schedule, config.tau_base, total_steps)

    classifier = None
    if num_classes:
        classifier = heads.LinearClassifier(num_classes, probe.kernel_init, probe.every_view)

    def head(section: str) -> nn.Module:
        return heads.from_config(config[section], config.encoder, dtype)

    return Parts(
        encoder=encoders.make_encoder(config.encoder, dtype),
        projector=head("projector"),
        predictor=head("predictor") if "predictor" in config else None,
        classifier=classifier,
        image_shape=image_shape,
        shared=shared,
    )


def start_with_copy(
    rng: jax.Array,
    net: nn.Module,
    *,
    image_shape: tuple[int, ...],
    target_parts: Sequence[str] = (),
) -> TrainState:
    """A method's first state; a target network of these parts starts as a copy."""
    online_rng, step_rng = jax.random.split(rng)
    return fresh_state(*network.init(online_rng, net, image_shape), step_rng, target_parts)


# ------------------------------------------------------------------------------ methods by name


def find(name: str) -> Build:
    """Returns `build` of `{name}_jax.method`, in this repository or elsewhere on Python's path.

    Raises:
        UserError: there is no such module; the message lists the methods that exist.
    """
    package = f"{name}_jax"
    if name.isidentifier() and package != __package__ and _has_method(package):
        return importlib.import_module(f"{package}.method").build
    near = nearest(name, names())
    raise UserError(
        f"config.method={name!r}: there is no package {package} with a method.py; "
        f"there are {', '.join(names())}" + (f"; did you mean {near}?" if near else "")
    )


def _has_method(package: str) -> bool:
    try:
        return importlib.util.find_spec(f"{package}.method") is not None
    except ModuleNotFoundError as e:
        if e.name != package:  # the package exists, but one of its imports fails
            raise
        return False


def names() -> list[str]:
    """Names of all methods: folders `{name}_jax` with a `method.py`, here and on Python's path."""
    folders = {*map(pathlib.Path, sys.path), pathlib.Path(__file__).parents[1]}
    packages = {path.parent.name for folder in folders for path in folder.glob("*_jax/method.py")}
    return sorted(name.removesuffix("_jax") for name in packages - {__package__})
