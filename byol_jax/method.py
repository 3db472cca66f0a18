"""BYOL's state, loss and training step: algorithm 1 of the paper (appendix A)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from byol_jax import losses, networks
from byol_jax.networks import Networks
from selfsup_jax import diagnostics, optim, parallel
from selfsup_jax.augment import ViewAugmentation, augment_view, normalize
from selfsup_jax.models import heads, resnet
from selfsup_jax.parallel import BatchLayout
from selfsup_jax.state import Batch, Method, Metrics, Outputs, TrainState

# The parts of the online network that the target network is an average of.
TARGET_PARTS = ("encoder", "projector")


def init_state(
    rng: jax.Array,
    *,
    networks_: Networks,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
) -> TrainState:
    """A fresh state. The target starts from its own random draw, as in the authors' code."""
    online_rng, target_rng, step_rng = jax.random.split(rng, 3)
    online_params, online_stats = networks.init(online_rng, networks_, image_shape)
    target_params, target_stats = networks.init(target_rng, networks_, image_shape)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=step_rng,
        online_params=online_params,
        target_params={part: target_params[part] for part in TARGET_PARTS},
        online_stats=online_stats,
        target_stats={part: target_stats[part] for part in TARGET_PARTS},
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
) -> tuple[jax.Array, tuple[Metrics, Outputs, dict, dict]]:
    """The loss of both views, plus the online probe's where there are labels.

    Args:
        online_params, target_params, online_stats, target_stats: see `TrainState`.
        views: `[2 * B, H, W, C]` float32: view 1 of every image, then view 2 of every image.
        labels: `[B]` int32, or None.
        networks_: the modules.
        layout: how the rows are cut into views and batch-norm groups; two views.

    Returns:
        The scalar to minimise, and (metrics, outputs, new online statistics, new target
        statistics).
    """
    online, online_stats = networks.apply_online(
        networks_, online_params, online_stats, views, layout
    )
    projection, target_stats = networks.apply_target(
        networks_, target_params, target_stats, views, layout
    )
    prediction_1, prediction_2 = jnp.split(online.prediction, 2)  # [B, D] each
    projection_1, projection_2 = jnp.split(projection, 2)
    loss = losses.byol_loss(prediction_1, prediction_2, projection_1, projection_2)
    metrics = {"loss": loss}
    outputs = Outputs(
        representation=jnp.stack(jnp.split(online.representation, 2)),
        projection=jnp.stack(jnp.split(online.projection, 2)),
        prediction=jnp.stack([prediction_1, prediction_2]),
        target=jnp.stack([projection_2, projection_1]),
    )
    if labels is None or online.logits is None:
        return loss, (metrics, outputs, online_stats, target_stats)

    logits = jnp.split(online.logits, 2)[0]  # the probe reads view 1
    probe_loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    metrics["probe_loss"] = probe_loss
    metrics["probe_top1"] = jnp.mean((logits.argmax(-1) == labels).astype(jnp.float32))
    return loss + probe_loss, (metrics, outputs, online_stats, target_stats)


def augment_views(
    rng: jax.Array, batch: Batch, augment: tuple[ViewAugmentation, ViewAugmentation]
) -> jax.Array:
    """The crops of a batch to the two views `[2, B, H, W, 3]` in [0, 1] that the networks see."""
    views = [
        augment_view(jax.random.fold_in(rng, i), batch[f"view_{i}"], batch["index"], view)
        for i, view in enumerate(augment, start=1)
    ]
    return jnp.stack(views)


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
        bn_groups: batch-norm groups of the global batch.
        accumulate_steps: microbatches per update. The batch norms' running averages take a step
            for each, as if the microbatches had been batches.
        axis_name: the mapped axis, or None under plain `jax.jit`.

    Returns:
        The state after the update, and metrics: float32 scalars, equal on every device ("finite" is
        1 where all of them are), and under "outputs" this device's rows of `Outputs`.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    layout = parallel.batch_layout(max(1, bn_groups // accumulate_steps), 2, axis_name)
    grad_fn = jax.grad(functools.partial(loss_fn, networks_=networks_, layout=layout), has_aux=True)

    def microbatch_step(stats: Any, part: Batch) -> tuple[Any, Any, Outputs]:
        views = augment_views(step_rng, part, augment)
        images = normalize(views.reshape(-1, *views.shape[2:]), mean, std)  # [2 * B, H, W, 3]
        grads, (metrics, outputs, *stats) = grad_fn(
            state.online_params, state.target_params, *stats, images, part.get("label")
        )
        return tuple(stats), (grads, metrics), outputs

    stats = (state.online_stats, state.target_stats)
    stats, means, outputs = parallel.accumulate(microbatch_step, stats, batch, accumulate_steps)
    (grads, metrics), (online_stats, target_stats) = parallel.mean((means, stats), axis_name)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    online_params = optax.apply_updates(state.online_params, updates)
    step_tau = tau(state.step)
    target_params = optax.incremental_update(
        {part: online_params[part] for part in TARGET_PARTS},
        state.target_params,
        step_size=1.0 - step_tau,
    )
    metrics |= {"tau": step_tau, "learning_rate": schedule(state.step)}
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
    """Reads a validated config (`configs/byol.py`) and binds the functions above to its values."""
    dtype = jnp.dtype(config.compute_dtype)
    norm = {"bn_decay": config.encoder.bn_decay, "bn_epsilon": config.encoder.bn_epsilon}
    encoder = resnet.ResNet(**config.encoder, dtype=dtype)
    networks_ = Networks(
        encoder=encoder,
        projector=heads.MLPHead(**config.projector, **norm, dtype=dtype),
        predictor=heads.MLPHead(**config.predictor, **norm, dtype=dtype)
        if config.use_predictor
        else None,
        classifier=heads.LinearClassifier(num_classes) if num_classes else None,
    )
    schedule, optimizer = optim.from_config(
        config.optimizer, config.batch_size, total_steps, warmup_steps
    )
    tau = optim.tau_schedule(config.tau_schedule, config.tau_base, total_steps)
    augment = (
        ViewAugmentation(**config.augment.view_1),
        ViewAugmentation(**config.augment.view_2),
    )
    size = config.data.image_size
    return Method(
        init_state=functools.partial(
            init_state, networks_=networks_, optimizer=optimizer, image_shape=(size, size, 3)
        ),
        train_step=functools.partial(
            train_step,
            networks_=networks_,
            optimizer=optimizer,
            schedule=schedule,
            tau=tau,
            augment=augment,
            mean=tuple(config.augment.mean),
            std=tuple(config.augment.std),
            bn_groups=config.bn_groups,
            accumulate_steps=config.accumulate_steps,
        ),
        represent=functools.partial(networks.represent, encoder),
        augment_views=functools.partial(augment_views, augment=augment),
    )
