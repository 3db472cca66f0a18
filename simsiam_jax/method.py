"""SimSiam (Chen and He 2020, arXiv 2011.10566): algorithm 1. BYOL without its target network."""

from __future__ import annotations

import functools
from typing import Any

import jax

from selfsup_jax.build import parts_from_config, start_without_target
from selfsup_jax.method import Context, Loss, Method
from selfsup_jax.models.network import SiameseWithPredictor, apply, split_views, stack_views
from selfsup_jax.state import Outputs, PyTree, TrainState
from simsiam_jax import losses


def loss(
    net: SiameseWithPredictor,
    online: PyTree,
    target: PyTree,
    views: jax.Array,
    state: TrainState,
    context: Context,
) -> Loss:
    """Each view's prediction against the other's projection; see `Method.loss`."""
    outputs, stats = apply(net, online, stack_views(views), context.layout(num_views=2))
    representation, z, p = (split_views(x) for x in outputs)  # [2, b, D]
    value = losses.simsiam_loss(p[0], p[1], z[0], z[1])
    rows = Outputs(representation, projection=z, prediction=p, target=z[::-1])
    return Loss(value, rows, stats, target["batch_stats"])


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Binds the values of a validated config (`configs/simsiam.py`)."""
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    net = SiameseWithPredictor(parts.encoder, parts.projector, parts.predictor, parts.classifier)
    return Method(
        network=net,
        loss=loss,
        start=functools.partial(start_without_target, image_shape=parts.image_shape),
        **parts.shared,
    )
