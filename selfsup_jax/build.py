"""From a config to a method: what all builds have in common, and finding one by its name."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax import optim
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.errors import UserError, nearest
from selfsup_jax.method import Method
from selfsup_jax.models import encoders, heads, network
from selfsup_jax.state import TrainState, fresh_state

# `(config, num_classes or None, total_steps, warmup_steps) -> Method`
Build = Callable[[Any, int | None, int, int], Method]


class Parts(NamedTuple):
    """What every method makes of a config in the same way."""

    encoder: nn.Module
    projector: nn.Module
    predictor: nn.Module | None  # of configs that have the section
    classifier: nn.Module | None
    image_shape: tuple[int, int, int]
    shared: dict[str, Any]  # further fields of `Method`


def parts_from_config(
    config: Any, num_classes: int | None, total_steps: int, warmup_steps: int
) -> Parts:
    """Encoder, projector, online probe, optimizer and augmentation of a validated config."""
    dtype = jnp.dtype(config.compute_dtype)
    schedule, optimizer = optim.from_config(
        config.optimizer, config.batch_size, total_steps, warmup_steps
    )
    shared = {
        "optimizer": optimizer,
        "schedule": schedule,
        "augment": Augmentation.from_config(config.augment),
        "bn_groups": config.bn_groups,
        "accumulate_steps": config.accumulate_steps,
    }
    if "tau_base" in config:
        shared["tau"] = optim.tau_schedule(config.tau_schedule, config.tau_base, total_steps)

    def head(section: str) -> nn.Module:
        return heads.from_config(config[section], config.encoder, dtype)

    return Parts(
        encoder=encoders.make_encoder(config.encoder, dtype),
        projector=head("projector"),
        predictor=head("predictor") if "predictor" in config else None,
        classifier=heads.LinearClassifier(num_classes) if num_classes else None,
        image_shape=(config.data.image_size, config.data.image_size, 3),
        shared=shared,
    )


def start_without_target(
    rng: jax.Array, net: nn.Module, *, image_shape: tuple[int, ...]
) -> TrainState:
    """A fresh state of a method with one network: nothing is kept as a target."""
    online_rng, step_rng = jax.random.split(rng)
    return fresh_state(*network.init(online_rng, net, image_shape), step_rng)


# ------------------------------------------------------------------------------ methods by name


def find(name: str) -> Build:
    """`build` of the package `{name}_jax.method`, ours or anybody's on the path.

    Raises:
        UserError: there is none, naming those that there are.
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
        if e.name != package:  # it is there, and lacks something itself
            raise
        return False


def names() -> list[str]:
    """The methods beside this package and on the path: folders `{name}_jax` with a `method.py`."""
    folders = {*map(pathlib.Path, sys.path), pathlib.Path(__file__).parents[1]}
    packages = {path.parent.name for folder in folders for path in folder.glob("*_jax/method.py")}
    return sorted(name.removesuffix("_jax") for name in packages - {__package__})
