"""What every method does with its networks: make them, pass views through one, watch it learn.

A method names its networks in a NamedTuple of modules; parameters and batch statistics are
dictionaries with the same names as keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from selfsup_jax.collectives import BatchLayout


def init(rng: jax.Array, networks: Any, image_shape: tuple[int, ...]) -> tuple[dict, dict]:
    """Parameters and batch statistics of every network, float32.

    Args:
        rng: each network has a key of its own, whatever the others are.
        networks: the method's NamedTuple of an encoder, a projector and, where it has them, a
            predictor and a classifier; None where one is left out.
        image_shape: `(H, W, C)`.
    """
    sizes = {
        "encoder": image_shape,
        "projector": (networks.encoder.num_features,),
        "predictor": (networks.projector.output_size,),
        "classifier": (networks.encoder.num_features,),
    }
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    keys = jax.random.split(rng, len(networks))
    for name, module, key in zip(networks._fields, networks, keys, strict=True):
        if module is None:
            continue
        variables = module.init(key, jnp.zeros((1, *sizes[name])))
        params[name] = variables["params"]
        if "batch_stats" in variables:
            stats[name] = variables["batch_stats"]
    return params, stats


class Pass:
    """One pass of a batch through some of the networks, in training mode.

    It keeps the new batch statistics of those that were passed, in `stats`.

    Args:
        networks: the method's NamedTuple of modules.
        params, stats: of a branch; the statistics before the pass.
        layout: how the rows are cut into views and batch-norm groups.
    """

    def __init__(self, networks: Any, params: Mapping, stats: Mapping, layout: BatchLayout):
        self._networks = networks
        self._params = params
        self._before = stats
        self._layout = layout
        self.stats: dict[str, Any] = {}

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        """`x` through the network of that name."""
        module: nn.Module = getattr(self._networks, name)
        variables = {"params": self._params[name]}
        if name not in self._before:  # it has no batch norm
            return module.apply(variables, x, self._layout)  # type: ignore[return-value]
        variables["batch_stats"] = self._before[name]
        y, updated = module.apply(variables, x, self._layout, mutable=["batch_stats"])
        self.stats[name] = updated["batch_stats"]
        return y


class Probe(NamedTuple):
    """What the online probe makes of a batch; float32 scalars."""

    loss: jax.Array | float  # to be added to the method's
    metrics: dict[str, jax.Array]


def online_probe(
    classifier: nn.Module | None,
    params: Mapping,
    representation: jax.Array,
    labels: jax.Array | None,
) -> Probe:
    """A linear classifier that learns beside the encoder and does not shape it.

    Args:
        classifier: None for no probe.
        params: of the branch that it is part of.
        representation: `[B, F]` float32; no gradient passes back to it.
        labels: `[B]` int32, or None for no probe.
    """
    if labels is None or classifier is None:
        return Probe(0.0, {})
    features = lax.stop_gradient(representation)
    logits: Any = classifier.apply({"params": params["classifier"]}, features)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    top1 = jnp.mean((logits.argmax(-1) == labels).astype(jnp.float32))
    return Probe(loss, {"probe_loss": loss, "probe_top1": top1})


def represent(encoder: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
    """Normalised images `[B, H, W, 3]` to the frozen encoder's representation `[B, D]`."""
    representation: Any = encoder.apply(variables, images)
    return representation
