"""The networks of BYOL, section 3.3: encoder f, projector g, predictor q, and an online probe."""

from __future__ import annotations

from typing import NamedTuple

import jax

from selfsup_jax.collectives import BatchLayout
from selfsup_jax.models import branch
from selfsup_jax.models.heads import LinearClassifier, MLPHead
from selfsup_jax.models.resnet import ResNet


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


def apply_target(
    networks: Networks, params: dict, stats: dict, views: jax.Array, layout: BatchLayout
) -> tuple[jax.Array, dict]:
    """Views `[V * B, H, W, C]` to projections z' `[V * B, D]`, and the new batch statistics."""
    through = branch.Pass(networks, params, stats, layout)
    projection = through("projector", through("encoder", views))
    return projection, through.stats


def apply_online(
    networks: Networks, params: dict, stats: dict, views: jax.Array, layout: BatchLayout
) -> tuple[OnlineOutputs, dict]:
    """Views `[V * B, H, W, C]` to predictions q(z), and the new batch statistics."""
    through = branch.Pass(networks, params, stats, layout)
    representation = through("encoder", views)
    projection = prediction = through("projector", representation)
    if networks.predictor is not None:
        prediction = through("predictor", projection)
    return OnlineOutputs(representation, projection, prediction), through.stats
