"""BYOL (Grill et al. 2020, arXiv 2006.07733): algorithm 1 of the paper's appendix A."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax

from byol_jax import losses
from byol_jax.negatives import negatives_loss
from selfsup_jax import checks
from selfsup_jax.build import parts_from_config
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models import network
from selfsup_jax.models.network import SiameseWithPredictor
from selfsup_jax.state import Outputs, PyTree, TrainState, fresh_state

# The parts of the target network: a moving average of these parts of the online network.
TARGET_PARTS = ("encoder", "projector")


def loss(
    net: SiameseWithPredictor,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: TrainState,
    context: Context,
    *,
    negatives_weight: float = 0.0,
    temperature: float = 0.3,
) -> Loss:
    """The loss of both views; see `Method.loss`.

    Without target parameters the online projection is also the target, and gradients flow through
    both sides, as in SimCLR. `negatives_weight` and `temperature` are section 5's beta and alpha.
    """
    images = stack_views(views["global"])
    outputs, online_stats = apply(net, online, images, context.layout(num_views=2, noise=True))
    representation, projection, q = (split_views(x) for x in outputs)  # [2, b, D]
    if target["params"]:
        layout = context.layout(num_views=2)
        projections, target_stats = apply(net, target, images, layout, method=net.project)
        z = lax.stop_gradient(split_views(projections))
        value = losses.byol_loss(q[0], q[1], z[0], z[1])
    else:
        target_stats, z = target["batch_stats"], projection
        value = losses.positive_loss(q[0], q[1], z[0], z[1])
    if negatives_weight:
        all_1, all_2 = context.gather((z[0], z[1]))  # [B, D] each
        offset = context.batch_offset(q.shape[1])
        negatives = negatives_loss(q[0], all_1, all_2, temperature, offset)
        negatives += negatives_loss(q[1], all_2, all_1, temperature, offset)
        value += negatives_weight * negatives
    rows = Outputs(representation, projection, prediction=q, target=z)
    return Loss(value, rows, online_stats, target_stats)


def start(
    rng: jax.Array,
    net: SiameseWithPredictor,
    *,
    image_shape: tuple[int, ...],
    target_parts: tuple[str, ...],
) -> TrainState:
    """The initial state. The target has its own random initialisation, as in the authors' code."""
    online_rng, target_rng, step_rng = jax.random.split(rng, 3)
    online, target = (network.init(key, net, image_shape) for key in (online_rng, target_rng))
    return fresh_state(*online, step_rng, target_parts, target)


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds BYOL from `configs/byol.py`; raises `UserError` for an invalid field."""
    rules: checks.Table = dict.fromkeys(("use_predictor", "use_target_network"), checks.flag)
    rules |= {"tau_base": checks.share, "temperature": checks.positive}
    checks.fields(config, rules | {"negatives_weight": checks.not_negative})
    if config.use_predictor:
        size, why = config.projector.output_size, "that of the projector, which it is compared with"
        checks.equals(config, "predictor.output_size", size, why)
    if config.negatives_weight:
        why = f"with negatives_weight={config.negatives_weight} all are of one global batch"
        checks.equals(config, "accumulate_steps", 1, why)
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    predictor = parts.predictor if config.use_predictor else None
    target_parts = TARGET_PARTS if config.use_target_network else ()
    first = functools.partial(start, image_shape=parts.image_shape, target_parts=target_parts)
    of_config = {
        "network": SiameseWithPredictor(
            parts.encoder, parts.projector, predictor, parts.classifier
        ),
        "loss": functools.partial(
            loss, negatives_weight=config.negatives_weight, temperature=config.temperature
        ),
        "start": first,
    }
    return Method(**(parts.shared | of_config))
