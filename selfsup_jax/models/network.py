"""Networks of several parts: the modules that most methods share, and their initialisation.

A network is one module whose fields are its parts: `encoder`, `projector` and, in some networks,
`predictor`, `prototypes` and `classifier` (the online probe; None if there are no labels).
Parameters and statistics have these names as keys; a target network has only some of the parts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.devices.collectives import BatchLayout


class Siamese(nn.Module):
    """Encoder and projector: one network for both views, and an online probe."""

    encoder: nn.Module
    projector: nn.Module
    classifier: nn.Module | None

    def __call__(self, images: jax.Array, layout: BatchLayout) -> tuple[jax.Array, jax.Array]:
        """`[V * b, H, W, 3]` to representation `[V * b, F]` and projection `[V * b, D]`."""
        representation = self.encoder(images, layout)
        return representation, self.projector(representation, layout)


class SiameseWithPredictor(nn.Module):
    """Encoder f, projector g and predictor q, and an online probe: BYOL's section 3.3."""

    encoder: nn.Module
    projector: nn.Module
    predictor: nn.Module | None  # None: the loss compares the projection
    classifier: nn.Module | None

    def __call__(
        self, images: jax.Array, layout: BatchLayout
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[V * b, H, W, 3]` to representation `[V * b, F]`, projection and prediction."""
        representation = self.encoder(images, layout)
        projection = prediction = self.projector(representation, layout)
        if self.predictor is not None:
            prediction = self.predictor(projection, layout)
        return representation, projection, prediction

    def project(self, images: jax.Array, layout: BatchLayout) -> jax.Array:
        """The output of a target network: projections z' `[V * b, D]`."""
        return self.projector(self.encoder(images, layout), layout)


def init(rng: jax.Array, network: Any, image_shape: tuple[int, ...]) -> tuple[dict, dict]:
    """Parameters and batch statistics of every part, float32.

    Args:
        rng: each part has its own key, even if other parts are None.
        network: the module.
        image_shape: `(H, W, C)`.
    """
    sizes = {
        "encoder": image_shape,
        "projector": (network.encoder.num_features,),
        "predictor": (network.projector.output_size,),
        "prototypes": (network.projector.output_size,),
        "classifier": (network.encoder.num_features,),
    }
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    names = parts(network)
    for name, key in zip(names, jax.random.split(rng, len(names)), strict=True):
        module = getattr(network, name)
        if module is None:
            continue
        variables = module.init(key, jnp.zeros((1, *sizes[name])))
        params[name] = variables["params"]
        if "batch_stats" in variables:
            stats[name] = variables["batch_stats"]
    return params, stats


def parts(network: nn.Module) -> list[str]:
    """The names of a network's parts, including those that are None."""
    own = [field.name for field in dataclasses.fields(network)]
    return [name for name in own if name not in ("parent", "name")]
