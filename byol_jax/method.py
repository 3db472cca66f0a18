"""BYOL's state, loss and training step: algorithm 1 of the paper (appendix A)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from byol_jax import losses, networks
from byol_jax.networks import Networks
from selfsup_jax import augment as augment_lib
from selfsup_jax import collectives, diagnostics, optim
from selfsup_jax.augment import ViewAugmentation, augment_views, normalize
from selfsup_jax.collectives import BatchLayout
from selfsup_jax.errors import bad_field
from selfsup_jax.models import branch, heads, resnet
from selfsup_jax.state import Batch, Method, Metrics, Outputs, TrainState

# The parts of the online network that the target network is an average of.
TARGET_PARTS = ("encoder", "projector")


def init_state(
    rng: jax.Array,
    *,
    networks_: Networks,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    use_target_network: bool = True,
) -> TrainState:
    """A fresh state. The target starts from its own random draw, as in the authors' code."""
    online_rng, target_rng, step_rng = jax.random.split(rng, 3)
    online_params, online_stats = branch.init(online_rng, networks_, image_shape)
    target_params, target_stats = branch.init(target_rng, networks_, image_shape)
    target_parts = TARGET_PARTS if use_target_network else ()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=step_rng,
        online_params=online_params,
        target_params={part: target_params[part] for part in target_parts},
        online_stats=online_stats,
        target_stats={part: target_stats[part] for part in target_parts if part in target_stats},
        opt_state=optimizer.init(online_params),
    )


def loss_fn(
    online_params: dict,
    target_params: dict,
    online_stats: dict,
    target_stats: dict,
    views: jax.Array,
    labels: jax.Array | None,
    *,
    networks_: Networks,
    layout: BatchLayout,
    negatives_weight: float = 0.0,
    temperature: float = 0.3,
) -> tuple[jax.Array, tuple[Metrics, Outputs, dict, dict]]:
    """The loss of both views, plus the online probe's where there are labels.

    Args:
        online_params, target_params, online_stats, target_stats: see `TrainState`. Without target
            parameters the online projection is its own target, and gradients pass through both
            sides, as in SimCLR.
        views: `[2 * B, H, W, C]` float32: view 1 of every image, then view 2 of every image.
        labels: `[B]` int32, or None.
        networks_: the modules.
        layout: how the rows are cut into views and batch-norm groups; two views.
        negatives_weight: section 5's beta; BYOL has 0, SimCLR 1.
        temperature: section 5's alpha, of the negatives.

    Returns:
        The scalar to minimise, and (metrics, outputs, new online statistics, new target
        statistics).
    """
    online, online_stats = networks.apply_online(
        networks_, online_params, online_stats, views, layout
    )
    prediction_1, prediction_2 = jnp.split(online.prediction, 2)  # [B, D] each
    if target_params:
        projection, target_stats = networks.apply_target(
            networks_, target_params, target_stats, views, layout
        )
        target_1, target_2 = jnp.split(lax.stop_gradient(projection), 2)
        loss = losses.byol_loss(prediction_1, prediction_2, target_1, target_2)
    else:
        target_1, target_2 = jnp.split(online.projection, 2)
        loss = losses.positive_loss(prediction_1, prediction_2, target_1, target_2)
    if negatives_weight:
        all_1, all_2 = collectives.gather((target_1, target_2), layout.axis_name)
        first_row = collectives.first_row(len(prediction_1), layout.axis_name)
        negatives = losses.negatives_loss(prediction_1, all_1, all_2, first_row, temperature)
        negatives += losses.negatives_loss(prediction_2, all_2, all_1, first_row, temperature)
        loss += negatives_weight * negatives

    representation = jnp.stack(jnp.split(online.representation, 2))  # [2, B, F]
    outputs = Outputs(
        representation=representation,
        projection=jnp.stack(jnp.split(online.projection, 2)),
        prediction=jnp.stack([prediction_1, prediction_2]),
        target=jnp.stack([target_2, target_1]),
    )
    probe = branch.online_probe(networks_.classifier, online_params, representation[0], labels)
    metrics = {"loss": loss} | probe.metrics
    return loss + probe.loss, (metrics, outputs, online_stats, target_stats)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    networks_: Networks,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    tau: Callable[[jax.Array], jax.Array],
    augment: tuple[ViewAugmentation, ViewAugmentation],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    negatives_weight: float = 0.0,
    temperature: float = 0.3,
    bn_groups: int = 1,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the online network and one EMA step of the target.

    Args:
        state: the state before the update.
        batch: this device's part of the global batch: `view_1`, `view_2` `[B, H, W, 3]` uint8,
            `index` `[B]` int32 (place in the global batch) and, with labels, `label` `[B]` int32.
        networks_, optimizer, augment, mean, std: the modules, and what they are trained with.
        schedule: step -> learning rate, reported; the optimizer holds its own.
        tau: step -> EMA decay of the target.
        negatives_weight, temperature: see `loss_fn`.
        bn_groups: batch-norm groups of the global batch.
        accumulate_steps: microbatches per update. The batch norms' running averages take a step
            for each, as if the microbatches had been batches.
        axis_name: the mapped axis, or None under plain `jax.jit`.

    Returns:
        The state after the update, and metrics: float32 scalars, equal on every device ("finite" is
        1 where all of them are), and under "outputs" this device's rows of `Outputs`.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    groups = collectives.groups_of_microbatch(bn_groups, accumulate_steps)
    layout = collectives.batch_layout(groups, 2, axis_name)
    loss = functools.partial(
        loss_fn,
        networks_=networks_,
        layout=layout,
        negatives_weight=negatives_weight,
        temperature=temperature,
    )
    grad_fn = jax.grad(loss, has_aux=True)

    def microbatch_step(stats: Any, part: Batch) -> tuple[Any, Any, Outputs]:
        views = augment_views(step_rng, part, augment)
        images = normalize(views.reshape(-1, *views.shape[2:]), mean, std)  # [2 * B, H, W, 3]
        grads, (metrics, outputs, *stats) = grad_fn(
            state.online_params, state.target_params, *stats, images, part.get("label")
        )
        return tuple(stats), (grads, metrics), outputs

    stats = (state.online_stats, state.target_stats)
    stats, means, outputs = collectives.accumulate(microbatch_step, stats, batch, accumulate_steps)
    (grads, metrics), (online_stats, target_stats) = collectives.mean((means, stats), axis_name)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    online_params = optax.apply_updates(state.online_params, updates)
    step_tau = tau(state.step)
    target_params = optax.incremental_update(
        {part: online_params[part] for part in state.target_params},
        state.target_params,
        step_size=1.0 - step_tau,
    )
    metrics |= {"tau": step_tau} if state.target_params else {}
    metrics |= {"learning_rate": schedule(state.step)}
    metrics |= diagnostics.norms(grads, updates)
    new_state = state.replace(
        step=state.step + 1,
        online_params=online_params,
        target_params=target_params,
        online_stats=online_stats,
        target_stats=target_stats,
        opt_state=opt_state,
    )
    return new_state, metrics | {"finite": diagnostics.finite(metrics), "outputs": outputs}


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Reads a validated config (`configs/byol.py`) and binds the functions above to its values.

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
    dtype = jnp.dtype(config.compute_dtype)
    encoder = resnet.ResNet(**config.encoder, dtype=dtype)
    networks_ = Networks(
        encoder=encoder,
        projector=heads.from_config(config.projector, config.encoder, dtype),
        predictor=heads.from_config(config.predictor, config.encoder, dtype)
        if config.use_predictor
        else None,
        classifier=heads.LinearClassifier(num_classes) if num_classes else None,
    )
    schedule, optimizer = optim.from_config(
        config.optimizer, config.batch_size, total_steps, warmup_steps
    )
    tau = optim.tau_schedule(config.tau_schedule, config.tau_base, total_steps)
    augment = augment_lib.from_config(config.augment)
    size = config.data.image_size
    return Method(
        init_state=functools.partial(
            init_state,
            networks_=networks_,
            optimizer=optimizer,
            image_shape=(size, size, 3),
            use_target_network=config.use_target_network,
        ),
        train_step=functools.partial(
            train_step,
            networks_=networks_,
            optimizer=optimizer,
            schedule=schedule,
            tau=tau,
            **augment,
            negatives_weight=config.negatives_weight,
            temperature=config.temperature,
            bn_groups=config.bn_groups,
            accumulate_steps=config.accumulate_steps,
        ),
        represent=functools.partial(branch.represent, encoder),
        augment_views=functools.partial(augment_views, augment=augment["augment"]),
    )
