"""MoCo v3 (arXiv 2104.02057): algorithm 1, on any devices. The batch takes the queue's place."""

from __future__ import annotations

import functools
from typing import Any

import jax

from moco_jax.v3_losses import contrastive_loss
from selfsup_jax import checks
from selfsup_jax.build import parts_from_config, start_with_copy
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models.heads import l2_normalize
from selfsup_jax.models.network import SiameseWithPredictor
from selfsup_jax.state import Outputs, PyTree, TrainState

# The parts of the momentum encoder, which starts as a copy; it has no predictor.
KEY_PARTS = ("encoder", "projector")


def loss(
    net: SiameseWithPredictor,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: TrainState,
    context: Context,
    *,
    temperature: float,
) -> Loss:
    """Each view's queries against the other view's keys of the global batch; see `Method.loss`.

    The momentum encoder is updated before the loss, as in the authors' code: `target_params` of a
    state are those that encoded its last keys.
    """
    images = stack_views(views["global"])
    outputs, online_stats = apply(net, online, images, context.layout(num_views=2, noise=True))
    representation, projection, prediction = (split_views(x) for x in outputs)  # [2, b, D]
    layout = context.layout(num_views=2)
    projected, target_stats = apply(net, target, images, layout, method=net.project)
    q, k = l2_normalize(prediction), l2_normalize(split_views(projected))
    all_keys = context.gather(jax.lax.stop_gradient(k), axis=1)  # [2, B, D], of all devices
    offset = context.batch_offset(q.shape[1])
    loss_1, top1_1 = contrastive_loss(q[0], all_keys[1], temperature, offset)
    loss_2, top1_2 = contrastive_loss(q[1], all_keys[0], temperature, offset)
    rows = Outputs(representation, projection, prediction=q, target=k)
    metrics = {"contrast_top1": (top1_1 + top1_2) / 2}
    return Loss(loss_1 + loss_2, rows, online_stats, target_stats, metrics)


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds MoCo v3 from `configs/moco.py`; raises `UserError` for an invalid field."""
    checks.fields(config, {"tau_base": checks.share, "temperature": checks.positive})
    checks.equals(config, "accumulate_steps", 1, "the negatives are those of one global batch")
    checks.equals(config, "bn_groups", 1, "MoCo v3's batch norm is global")
    size = config.projector.output_size
    checks.equals(config, "predictor.output_size", size, "that of the projector, which makes keys")
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    shape = parts.image_shape
    first = functools.partial(start_with_copy, image_shape=shape, target_parts=KEY_PARTS)
    of_config = {
        "network": SiameseWithPredictor(
            parts.encoder, parts.projector, parts.predictor, parts.classifier
        ),
        "loss": functools.partial(loss, temperature=config.temperature),
        "start": first,
        "notes": (f"negatives: the keys of the {config.batch_size - 1:,} other images of a batch",),
    }
    return Method(average_first=True, **(parts.shared | of_config))
