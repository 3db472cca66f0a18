"""VICReg (Bardes et al. 2021, arXiv 2105.04906): algorithm 1, on any devices."""

from __future__ import annotations

import functools
from typing import Any

from selfsup_jax import checks
from selfsup_jax.build import parts_from_config
from selfsup_jax.devices import collectives
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models.network import Siamese
from selfsup_jax.state import Outputs, PyTree, TrainState
from vicreg_jax import losses


def loss(
    net: Siamese,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: TrainState,
    context: Context,
    *,
    weights: losses.Terms,
) -> Loss:
    """Equation 6, lambda s + mu v + nu c; see `Method.loss`."""
    images, layout = stack_views(views["global"]), context.layout(num_views=2, noise=True)
    outputs, stats = apply(net, online, images, layout)
    representation, z = (split_views(x) for x in outputs)  # [2, b, D]
    global_batch = z.shape[1] * collectives.num_devices(context.axis_name)
    terms = losses.vicreg_terms(z[0], z[1], global_batch, context.mean)
    value = weights.invariance * terms.invariance + weights.variance * terms.variance
    value += weights.covariance * terms.covariance
    rows = Outputs(representation, projection=z, prediction=z, target=z)
    return Loss(value, rows, stats, target["batch_stats"], terms._asdict())


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds VICReg from `configs/vicreg.py`; raises `UserError` for an invalid field."""
    fields = ["invariance_weight", "variance_weight", "covariance_weight"]
    checks.fields(config, dict.fromkeys(fields, checks.not_negative))
    checks.equals(config, "accumulate_steps", 1, "the covariance is that of one global batch")
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    return Method(
        network=Siamese(parts.encoder, parts.projector, parts.classifier),
        loss=functools.partial(loss, weights=losses.Terms(*(config[field] for field in fields))),
        **parts.shared,
    )
