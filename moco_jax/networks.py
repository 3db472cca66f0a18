"""The networks of MoCo: an encoder with a head, for queries and for keys, and an online probe."""

from __future__ import annotations

from typing import NamedTuple

import jax

from selfsup_jax.collectives import BatchLayout
from selfsup_jax.models import branch
from selfsup_jax.models.heads import LinearClassifier, MLPHead, l2_normalize
from selfsup_jax.models.resnet import ResNet


class Networks(NamedTuple):
    """The modules; parameters and statistics are dictionaries with the same names as keys."""

    encoder: ResNet
    projector: MLPHead  # v1: linear; v2: a hidden layer
    classifier: LinearClassifier | None  # None where there are no labels


def apply(
    networks: Networks, params: dict, stats: dict, images: jax.Array, layout: BatchLayout
) -> tuple[jax.Array, jax.Array, dict]:
    """Queries or keys, by whose parameters they are.

    Args:
        networks: the modules.
        params, stats: of the query encoder or of the key encoder.
        images: `[V * B, H, W, C]` float32.
        layout: how the rows are cut into views and batch-norm groups.

    Returns:
        Representation `[V * B, F]`, unit vectors `[V * B, D]`, and the new batch statistics.
    """
    through = branch.Pass(networks, params, stats, layout)
    representation = through("encoder", images)
    return representation, l2_normalize(through("projector", representation)), through.stats
