"""SimSiam (Chen and He 2020, arXiv 2011.10566): algorithm 1. BYOL without its target network."""

from __future__ import annotations

from typing import Any

from selfsup_jax import checks
from selfsup_jax.build import parts_from_config
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models.network import SiameseWithPredictor
from selfsup_jax.state import Outputs, PyTree, TrainState
from simsiam_jax import losses


def loss(
    net: SiameseWithPredictor,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: TrainState,
    context: Context,
) -> Loss:
    """Each view's prediction against the other's projection; see `Method.loss`."""
    images, layout = stack_views(views["global"]), context.layout(num_views=2, noise=True)
    outputs, stats = apply(net, online, images, layout)
    representation, z, p = (split_views(x) for x in outputs)  # [2, b, D]
    value = losses.simsiam_loss(p[0], p[1], z[0], z[1])
    rows = Outputs(representation, projection=z, prediction=p, target=z)
    return Loss(value, rows, stats, target["batch_stats"])


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds SimSiam from `configs/simsiam.py`; raises `UserError` for an invalid field."""
    size = config.projector.output_size
    checks.equals(config, "predictor.output_size", size, "that of the projector")
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    net = SiameseWithPredictor(parts.encoder, parts.projector, parts.predictor, parts.classifier)
    return Method(network=net, loss=loss, **parts.shared)
