"""What every method does with its network: start it, run it, watch it learn.

A network is one module whose fields are its parts: `encoder`, `projector` and, where it has them,
`predictor` and `classifier` (the online probe; None where there are no labels). Parameters and
batch statistics are dictionaries with these names as keys; a target's have some of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.state import PyTree


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
    predictor: nn.Module | None  # None: the projection itself is compared
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
        """What a target network gives: projections z' `[V * b, D]`."""
        return self.projector(self.encoder(images, layout), layout)


def init(rng: jax.Array, network: Any, image_shape: tuple[int, ...]) -> tuple[dict, dict]:
    """Parameters and batch statistics of every part, float32.

    Args:
        rng: each part has a key of its own, whatever the others are.
        network: the module.
        image_shape: `(H, W, C)`.
    """
    sizes = {
        "encoder": image_shape,
        "projector": (network.encoder.num_features,),
        "predictor": (network.projector.output_size,),
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
    """The names of a network's parts, those that are None included."""
    own = [field.name for field in dataclasses.fields(network)]
    return [name for name in own if name not in ("parent", "name")]


def apply(network: nn.Module, variables: PyTree, *args: Any, method: Any = None) -> tuple[Any, Any]:
    """Runs a network in training mode: its result, and the new batch statistics."""
    result, new = network.apply(variables, *args, method=method, mutable=["batch_stats"])
    return result, new.get("batch_stats", {})


def stack_views(views: jax.Array) -> jax.Array:
    """`[V, b, ...]` to `[V * b, ...]`: view 1 of every image, then view 2 of every image."""
    return views.reshape(-1, *views.shape[2:])


def split_views(x: jax.Array, num_views: int = 2) -> jax.Array:
    """`[V * b, D]` to `[V, b, D]`."""
    return x.reshape(num_views, -1, *x.shape[1:])


class Probe(NamedTuple):
    """What the online probe makes of a batch; float32 scalars."""

    loss: jax.Array | float  # to be added to the method's
    metrics: dict[str, jax.Array]


def online_probe(
    network: Any, params: PyTree, representation: jax.Array, labels: jax.Array | None
) -> Probe:
    """A linear classifier that learns beside the encoder and does not shape it.

    Args:
        network: whose `classifier` it is; None for no probe.
        params: of the online network.
        representation: `[B, F]` float32; no gradient passes back to it.
        labels: `[B]` int32, or None for no probe.
    """
    if labels is None or network.classifier is None:
        return Probe(0.0, {})
    features = lax.stop_gradient(representation)
    logits: Any = network.classifier.apply({"params": params["classifier"]}, features)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    top1 = jnp.mean((logits.argmax(-1) == labels).astype(jnp.float32))
    return Probe(loss, {"probe_loss": loss, "probe_top1": top1})
