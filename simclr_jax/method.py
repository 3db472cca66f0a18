"""SimCLR (Chen et al. 2020, arXiv 2002.05709): algorithm 1, on any devices."""

from __future__ import annotations

import functools
from typing import Any

from selfsup_jax import checks
from selfsup_jax.build import parts_from_config
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models.heads import l2_normalize
from selfsup_jax.models.network import Siamese
from selfsup_jax.state import Outputs, PyTree, TrainState
from simclr_jax import losses


def loss(
    net: Siamese,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: TrainState,
    context: Context,
    *,
    temperature: float,
    views_share_norm: bool = True,
) -> Loss:
    """NT-Xent of this device's images among the global batch's; see `Method.loss`.

    `views_share_norm`: both views are one batch of 2 B with one set of batch statistics, as in the
    authors' code; otherwise each view has its own.
    """
    images = stack_views(views["global"])
    layout = context.layout(1 if views_share_norm else 2, noise=True)
    (representation, projection), stats = apply(net, online, images, layout)
    z = split_views(l2_normalize(projection))  # [2, b, D]
    offset = context.batch_offset(z.shape[1])
    value, top1 = losses.nt_xent(z[0], z[1], temperature, context.gather, offset)
    rows = Outputs(split_views(representation), projection=z, prediction=z, target=z)
    # The authors' code adds both views' losses; the paper's equation is their mean.
    return Loss(2.0 * value, rows, stats, target["batch_stats"], {"contrast_top1": top1})


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds SimCLR from `configs/simclr.py`; raises `UserError` for an invalid field."""
    rules: checks.Table = {"temperature": checks.positive, "views_share_norm": checks.flag}
    checks.fields(config, rules)
    checks.equals(config, "accumulate_steps", 1, "the negatives are those of one global batch")
    checks.equals(config, "bn_groups", 1, "SimCLR's batch norm is global")
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    return Method(
        network=Siamese(parts.encoder, parts.projector, parts.classifier),
        loss=functools.partial(
            loss, temperature=config.temperature, views_share_norm=config.views_share_norm
        ),
        notes=(f"negatives: the {2 * config.batch_size - 2:,} other views of each global batch",),
        **parts.shared,
    )
