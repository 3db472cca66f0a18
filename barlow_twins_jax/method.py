"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): algorithm 1, on any devices."""

from __future__ import annotations

import functools
from typing import Any

import jax

from barlow_twins_jax import losses
from selfsup_jax.build import parts_from_config, start_without_target
from selfsup_jax.devices import collectives
from selfsup_jax.errors import bad_field
from selfsup_jax.method import Context, Loss, Method
from selfsup_jax.models.network import Siamese, apply, split_views, stack_views
from selfsup_jax.state import Outputs, PyTree, TrainState


def loss(
    net: Siamese,
    online: PyTree,
    target: PyTree,
    views: jax.Array,
    state: TrainState,
    context: Context,
    *,
    off_diagonal_weight: float,
) -> Loss:
    """The cross-correlation of both views' projections against the identity; see `Method.loss`."""
    outputs, stats = apply(net, online, stack_views(views), context.layout(num_views=2))
    representation, z = (split_views(x) for x in outputs)  # [2, b, D]
    mean = functools.partial(collectives.mean, axis_name=context.axis_name)
    value, diagonal = losses.barlow_twins_loss(z[0], z[1], off_diagonal_weight, mean)
    metrics = {"correlation": diagonal}
    rows = Outputs(representation, projection=z, prediction=z, target=z[::-1])
    return Loss(value, rows, stats, target["batch_stats"], metrics)


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Binds the values of a validated config (`configs/barlow_twins.py`).

    Raises:
        UserError: more than one microbatch.
    """
    if config.accumulate_steps != 1:
        raise bad_field(
            "accumulate_steps",
            config.accumulate_steps,
            "must be 1: the cross-correlation is that of one global batch",
        )
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    return Method(
        network=Siamese(parts.encoder, parts.projector, parts.classifier),
        loss=functools.partial(
            loss,
            off_diagonal_weight=config.off_diagonal_weight,
        ),
        start=functools.partial(start_without_target, image_shape=parts.image_shape),
        **parts.shared,
    )
