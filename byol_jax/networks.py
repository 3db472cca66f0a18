"""The networks of BYOL, section 3.3: encoder f, projector g, predictor q, and an online probe."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.models.heads import LinearClassifier, MLPHead
from selfsup_jax.models.resnet import ResNet
from selfsup_jax.parallel import BatchLayout


class Networks(NamedTuple):
    """The modules; parameters and statistics are dictionaries with the same names as keys."""

    encoder: ResNet
    projector: MLPHead
    predictor: MLPHead | None  # None: the projection itself is compared (the ablation)
    classifier: LinearClassifier | None  # None where there are no labels


class OnlineOutputs(NamedTuple):
    """What the online network makes of a batch of views."""

    representation: jax.Array  # [V * B, F]
    projection: jax.Array  # [V * B, D]
    prediction: jax.Array  # [V * B, D]; the projection where there is no predictor
    logits: jax.Array | None  # [V * B, classes]


def init(rng: jax.Array, networks: Networks, image_shape: tuple[int, ...]) -> tuple[dict, dict]:
    """Parameters and batch statistics of every network, float32."""
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    keys = dict(zip(networks._fields, jax.random.split(rng, len(networks)), strict=True))

    def add(name: str, module: Any, x: jax.Array) -> None:
        variables = module.init(keys[name], x)
        params[name] = variables["params"]
        if "batch_stats" in variables:
            stats[name] = variables["batch_stats"]

    representation = jnp.zeros((1, networks.encoder.num_features))
    projection = jnp.zeros((1, networks.projector.output_size))
    add("encoder", networks.encoder, jnp.zeros((1, *image_shape)))
    add("projector", networks.projector, representation)
    if networks.predictor is not None:
        add("predictor", networks.predictor, projection)
    if networks.classifier is not None:
        add("classifier", networks.classifier, representation)
    return params, stats


def apply_target(
    networks: Networks, params: dict, stats: dict, views: jax.Array, layout: BatchLayout
) -> tuple[jax.Array, dict]:
    """Views `[V * B, H, W, C]` to projections z' `[V * B, D]`, and the new batch statistics."""
    representation, encoder_stats = _apply(networks, "encoder", params, stats, views, layout)
    projection, projector_stats = _apply(
        networks, "projector", params, stats, representation, layout
    )
    return projection, {"encoder": encoder_stats, "projector": projector_stats}


def apply_online(
    networks: Networks, params: dict, stats: dict, views: jax.Array, layout: BatchLayout
) -> tuple[OnlineOutputs, dict]:
    """Views `[V * B, H, W, C]` to predictions q(z), probe logits, and the new batch statistics."""
    new_stats = {}
    representation, new_stats["encoder"] = _apply(networks, "encoder", params, stats, views, layout)
    projection, new_stats["projector"] = _apply(
        networks, "projector", params, stats, representation, layout
    )
    prediction = projection
    if networks.predictor is not None:
        prediction, new_stats["predictor"] = _apply(
            networks, "predictor", params, stats, projection, layout
        )
    logits: Any = None
    if networks.classifier is not None:
        # The probe watches the representation and must not shape it.
        features = lax.stop_gradient(representation)
        logits = networks.classifier.apply({"params": params["classifier"]}, features)
    return OnlineOutputs(representation, projection, prediction, logits), new_stats


def represent(encoder: ResNet, variables: Any, images: jax.Array) -> jax.Array:
    """Normalised images `[B, H, W, 3]` to the frozen encoder's representation `[B, D]`."""
    representation: Any = encoder.apply(variables, images)
    return representation


def _apply(
    networks: Networks, name: str, params: dict, stats: dict, x: jax.Array, layout: BatchLayout
) -> tuple[jax.Array, dict]:
    variables = {"params": params[name], "batch_stats": stats[name]}
    y, updated = getattr(networks, name).apply(variables, x, layout, mutable=["batch_stats"])
    return y, updated["batch_stats"]
