"""SimCLR (Chen et al. 2020, arXiv 2002.05709): algorithm 1, on any devices."""

from __future__ import annotations

import functools
from typing import Any

import jax

from selfsup_jax.build import parts_from_config, start_without_target
from selfsup_jax.devices import collectives
from selfsup_jax.errors import bad_field
from selfsup_jax.method import Context, Loss, Method
from selfsup_jax.models.heads import l2_normalize
from selfsup_jax.models.network import Siamese, apply, split_views, stack_views
from selfsup_jax.state import Outputs, PyTree, TrainState
from simclr_jax import losses


def loss(
    net: Siamese,
    online: PyTree,
    target: PyTree,
    views: jax.Array,
    state: TrainState,
    context: Context,
    *,
    temperature: float,
) -> Loss:
    """NT-Xent of this device's images among the global batch's; see `Method.loss`."""
    # Both views pass as one batch of 2 B and share their statistics, as in the authors' code.
    (representation, projection), stats = apply(net, online, stack_views(views), context.layout(1))
    z = split_views(l2_normalize(projection))  # [2, b, D]
    all_1, all_2 = collectives.gather((z[0], z[1]), context.axis_name)  # [B, D] each
    first_row = collectives.first_row(z.shape[1], context.axis_name)
    loss_1, top1_1 = losses.nt_xent(z[0], all_1, all_2, first_row, temperature)
    loss_2, top1_2 = losses.nt_xent(z[1], all_2, all_1, first_row, temperature)
    value = loss_1 + loss_2  # the authors' code adds; the paper's equation is half of it
    outputs = Outputs(split_views(representation), projection=z, prediction=z, target=z[::-1])
    metrics = {"contrast_top1": (top1_1 + top1_2) / 2}
    return Loss(value, outputs, stats, target["batch_stats"], metrics)


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Binds the values of a validated config (`configs/simclr.py`).

    Raises:
        UserError: more than one microbatch, or batch-norm groups that would part the views.
    """
    for field, why in (
        ("accumulate_steps", "the negatives are those of one global batch"),
        ("bn_groups", "SimCLR's batch norm is global, over both views"),
    ):
        if config[field] != 1:
            raise bad_field(field, config[field], f"must be 1: {why}")
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    return Method(
        network=Siamese(parts.encoder, parts.projector, parts.classifier),
        loss=functools.partial(loss, temperature=config.temperature),
        start=functools.partial(start_without_target, image_shape=parts.image_shape),
        notes=(f"negatives: the {2 * config.batch_size - 2:,} other views of each global batch",),
        **parts.shared,
    )
