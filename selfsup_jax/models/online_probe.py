"""The online probe: a linear classifier that is trained with the encoder but does not affect it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from selfsup_jax.state import PyTree


class Probe(NamedTuple):
    """Loss and metrics of the online probe on a batch; float32 scalars."""

    loss: jax.Array | float  # is added to the method's loss
    metrics: dict[str, jax.Array]


def evaluate(
    network: Any, params: PyTree, representation: jax.Array, labels: jax.Array | None
) -> Probe:
    """The probe's loss and accuracy on a batch.

    Args:
        network: has the probe as its `classifier` (None: no probe).
        params: of the online network.
        representation: `[V, B, F]` float32; gets no gradient.
        labels: `[B]` int32, or None for no probe.
    """
    if labels is None or network.classifier is None:
        return Probe(0.0, {})
    features = lax.stop_gradient(representation[: None if network.classifier.every_view else 1])
    labels = jnp.tile(labels, len(features))  # those of view 1, then those of view 2
    features = features.reshape(len(labels), -1)
    logits: Any = network.classifier.apply({"params": params["classifier"]}, features)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    top1 = jnp.mean((logits.argmax(-1) == labels).astype(jnp.float32))
    return Probe(loss, {"probe_loss": loss, "probe_top1": top1})
