"""VICReg (Bardes et al. 2021, arXiv 2105.04906): algorithm 1, on any devices."""

from __future__ import annotations

import functools
from typing import Any

import jax

from selfsup_jax.build import parts_from_config, start_without_target
from selfsup_jax.devices import collectives
from selfsup_jax.errors import bad_field
from selfsup_jax.method import Context, Loss, Method
from selfsup_jax.models.network import Siamese, apply, split_views, stack_views
from selfsup_jax.state import Outputs, PyTree, TrainState
from vicreg_jax import losses


def loss(
    net: Siamese,
    online: PyTree,
    target: PyTree,
    views: jax.Array,
    state: TrainState,
    context: Context,
    *,
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
) -> Loss:
    """Equation 6, lambda s + mu v + nu c; see `Method.loss`."""
    outputs, stats = apply(net, online, stack_views(views), context.layout(num_views=2))
    representation, z = (split_views(x) for x in outputs)  # [2, b, D]
    mean = functools.partial(collectives.mean, axis_name=context.axis_name)
    global_batch = z.shape[1] * collectives.num_devices(context.axis_name)
    terms = losses.vicreg_terms(z[0], z[1], global_batch, mean)
    value = invariance_weight * terms.invariance + variance_weight * terms.variance
    value += covariance_weight * terms.covariance
    metrics = terms._asdict()
    rows = Outputs(representation, projection=z, prediction=z, target=z[::-1])
    return Loss(value, rows, stats, target["batch_stats"], metrics)


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Binds the values of a validated config (`configs/vicreg.py`).

    Raises:
        UserError: more than one microbatch.
    """
    if config.accumulate_steps != 1:
        raise bad_field(
            "accumulate_steps",
            config.accumulate_steps,
            "must be 1: the covariance is that of one global batch",
        )
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    return Method(
        network=Siamese(parts.encoder, parts.projector, parts.classifier),
        loss=functools.partial(
            loss,
            invariance_weight=config.invariance_weight,
            variance_weight=config.variance_weight,
            covariance_weight=config.covariance_weight,
        ),
        start=functools.partial(start_without_target, image_shape=parts.image_shape),
        **parts.shared,
    )
