"""The networks of SimCLR, section 2.1: encoder f, projection head g, and an online probe."""

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
    classifier: LinearClassifier | None  # None where there are no labels


def apply(
    networks: Networks, params: dict, stats: dict, images: jax.Array, layout: BatchLayout
) -> tuple[jax.Array, jax.Array, dict]:
    """`[2 * B, H, W, C]` to h `[2 * B, F]`, z `[2 * B, D]` and the new batch statistics."""
    through = branch.Pass(networks, params, stats, layout)
    representation = through("encoder", images)
    return representation, through("projector", representation), through.stats
