"""BYOL (Grill et al. 2020, arXiv 2006.07733): algorithm 1 of the paper's appendix A."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from byol_jax import losses
from selfsup_jax.build import parts_from_config
from selfsup_jax.devices import collectives
from selfsup_jax.errors import bad_field
from selfsup_jax.method import Context, Loss, Method
from selfsup_jax.models import network
from selfsup_jax.models.network import SiameseWithPredictor, apply, split_views, stack_views
from selfsup_jax.state import Outputs, PyTree, TrainState, fresh_state

# The parts of the online network that the target network is an average of.
TARGET_PARTS = ("encoder", "projector")


def loss(
    net: SiameseWithPredictor,
    online: PyTree,
    target: PyTree,
    views: jax.Array,
    state: TrainState,
    context: Context,
    *,
    negatives_weight: float = 0.0,
    temperature: float = 0.3,
) -> Loss:
    """The loss of both views; see `Method.loss`.

    Without target parameters the online projection is its own target, and gradients pass through
    both sides, as in SimCLR. `negatives_weight` and `temperature` are section 5's beta and alpha.
    """
    images, layout = stack_views(views), context.layout(num_views=2)
    (representation, projection, prediction), online_stats = apply(net, online, images, layout)
    q_1, q_2 = split_views(prediction)  # [b, D] each
    if target["params"]:
        projections, target_stats = apply(net, target, images, layout, method=net.project)
        z_1, z_2 = lax.stop_gradient(split_views(projections))
        value = losses.byol_loss(q_1, q_2, z_1, z_2)
    else:
        target_stats, (z_1, z_2) = target["batch_stats"], split_views(projection)
        value = losses.positive_loss(q_1, q_2, z_1, z_2)
    if negatives_weight:
        all_1, all_2 = collectives.gather((z_1, z_2), context.axis_name)  # [B, D] each
        first_row = collectives.first_row(len(q_1), context.axis_name)
        negatives = losses.negatives_loss(q_1, all_1, all_2, first_row, temperature)
        negatives += losses.negatives_loss(q_2, all_2, all_1, first_row, temperature)
        value += negatives_weight * negatives
    outputs = Outputs(
        representation=split_views(representation),
        projection=split_views(projection),
        prediction=jnp.stack([q_1, q_2]),
        target=jnp.stack([z_2, z_1]),
    )
    return Loss(value, outputs, online_stats, target_stats)


def start(
    rng: jax.Array,
    net: SiameseWithPredictor,
    *,
    image_shape: tuple[int, ...],
    target_parts: tuple[str, ...],
) -> TrainState:
    """A fresh state. The target starts from its own random draw, as in the authors' code."""
    online_rng, target_rng, step_rng = jax.random.split(rng, 3)
    online, target = (network.init(key, net, image_shape) for key in (online_rng, target_rng))
    return fresh_state(*online, step_rng, target_parts, target)


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Binds the values of a validated config (`configs/byol.py`).

    Raises:
        UserError: negatives and more than one microbatch.
    """
    if config.negatives_weight and config.accumulate_steps > 1:
        raise bad_field(
            "accumulate_steps",
            config.accumulate_steps,
            f"must be 1 with negatives_weight={config.negatives_weight}: the negatives are those "
            "of one global batch",
        )
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    predictor = parts.predictor if config.use_predictor else None
    target_parts = TARGET_PARTS if config.use_target_network else ()
    return Method(
        network=SiameseWithPredictor(parts.encoder, parts.projector, predictor, parts.classifier),
        loss=functools.partial(
            loss,
            negatives_weight=config.negatives_weight,
            temperature=config.temperature,
        ),
        start=functools.partial(start, image_shape=parts.image_shape, target_parts=target_parts),
        **parts.shared,
    )
