"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): algorithm 1, on any devices."""

from __future__ import annotations

import functools
from typing import Any

from barlow_twins_jax import losses
from selfsup_jax import checks
from selfsup_jax.build import parts_from_config
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models.network import Siamese
from selfsup_jax.state import Outputs, PyTree, TrainState


def loss(
    net: Siamese,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: TrainState,
    context: Context,
    *,
    off_diagonal_weight: float,
) -> Loss:
    """The cross-correlation of both views' projections against the identity; see `Method.loss`."""
    images, layout = stack_views(views["global"]), context.layout(num_views=2, noise=True)
    outputs, stats = apply(net, online, images, layout)
    representation, z = (split_views(x) for x in outputs)  # [2, b, D]
    value, diagonal = losses.barlow_twins_loss(z[0], z[1], off_diagonal_weight, context.mean)
    rows = Outputs(representation, projection=z, prediction=z, target=z)
    return Loss(value, rows, stats, target["batch_stats"], {"correlation": diagonal})


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds Barlow Twins from `configs/barlow_twins.py`; raises `UserError` if invalid."""
    checks.fields(config, {"off_diagonal_weight": checks.not_negative})
    checks.equals(config, "accumulate_steps", 1, "the correlation is that of one global batch")
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    return Method(
        network=Siamese(parts.encoder, parts.projector, parts.classifier),
        loss=functools.partial(loss, off_diagonal_weight=config.off_diagonal_weight),
        **parts.shared,
    )
