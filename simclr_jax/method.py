"""SimCLR's state, loss and training step: algorithm 1 (arXiv 2002.05709), on any devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from selfsup_jax import augment as augment_lib
from selfsup_jax import collectives, diagnostics, optim
from selfsup_jax.augment import ViewAugmentation, augment_views, normalize
from selfsup_jax.collectives import BatchLayout
from selfsup_jax.errors import bad_field
from selfsup_jax.models import branch, heads, resnet
from selfsup_jax.state import Batch, Method, Metrics, Outputs, TrainState
from simclr_jax import losses, networks
from simclr_jax.networks import Networks


def init_state(
    rng: jax.Array,
    *,
    networks_: Networks,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
) -> TrainState:
    """A fresh state. There is one network: nothing is kept as a target."""
    online_rng, step_rng = jax.random.split(rng)
    online_params, online_stats = branch.init(online_rng, networks_, image_shape)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=step_rng,
        online_params=online_params,
        target_params={},
        online_stats=online_stats,
        target_stats={},
        opt_state=optimizer.init(online_params),
    )


def loss_fn(
    online_params: dict,
    online_stats: dict,
    views: jax.Array,
    labels: jax.Array | None,
    *,
    networks_: Networks,
    layout: BatchLayout,
    temperature: float,
) -> tuple[jax.Array, tuple[Metrics, Outputs, dict]]:
    """The loss of this device's images, plus the online probe's where there are labels.

    Args:
        online_params, online_stats: see `TrainState`.
        views: `[2, B, H, W, C]` float32.
        labels: `[B]` int32, or None.
        networks_: the modules.
        layout: how the 2 B rows are cut into batch-norm groups; both views are one.
        temperature: of the similarities.

    Returns:
        The scalar to minimise, and (metrics, outputs, new statistics).
    """
    rows = views.shape[1]
    representation, projection, stats = networks.apply(
        networks_, online_params, online_stats, views.reshape(-1, *views.shape[2:]), layout
    )
    representation = representation.reshape(2, rows, -1)
    z = heads.l2_normalize(projection).reshape(2, rows, -1)  # [2, b, D]
    all_1, all_2 = collectives.gather((z[0], z[1]), layout.axis_name)  # [B, D] each
    first_row = collectives.first_row(rows, layout.axis_name)
    loss_1, top1_1 = losses.nt_xent(z[0], all_1, all_2, first_row, temperature)
    loss_2, top1_2 = losses.nt_xent(z[1], all_2, all_1, first_row, temperature)
    loss = loss_1 + loss_2  # the authors' code adds; the paper's equation is half of it

    outputs = Outputs(representation, projection=z, prediction=z, target=z[::-1])
    probe = branch.online_probe(networks_.classifier, online_params, representation[0], labels)
    metrics = {"loss": loss, "contrast_top1": (top1_1 + top1_2) / 2} | probe.metrics
    return loss + probe.loss, (metrics, outputs, stats)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    networks_: Networks,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    augment: tuple[ViewAugmentation, ViewAugmentation],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    temperature: float,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update.

    Args:
        state: the state before the update.
        batch: this device's part of the global batch: `view_1`, `view_2` `[B, H, W, 3]` uint8,
            `index` `[B]` int32 (place in the global batch) and, with labels, `label` `[B]` int32.
        networks_, optimizer, augment, mean, std: the modules, and what they are trained with.
        schedule: step -> learning rate, reported; the optimizer holds its own.
        temperature: of the similarities.
        axis_name: the mapped axis, or None under plain `jax.jit`.

    Returns:
        The state after the update, and metrics: float32 scalars, equal on every device ("finite" is
        1 where all of them are), and under "outputs" this device's rows of `Outputs`.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    # Both views pass as one batch of 2 B and share their statistics, as in the authors' code.
    layout = collectives.batch_layout(1, 1, axis_name)
    loss = functools.partial(loss_fn, networks_=networks_, layout=layout, temperature=temperature)
    views = normalize(augment_views(step_rng, batch, augment), mean, std)
    grads, (metrics, outputs, online_stats) = jax.grad(loss, has_aux=True)(
        state.online_params, state.online_stats, views, batch.get("label")
    )
    grads, metrics, online_stats = collectives.mean((grads, metrics, online_stats), axis_name)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    online_params = optax.apply_updates(state.online_params, updates)
    metrics |= {"learning_rate": schedule(state.step)} | diagnostics.norms(grads, updates)
    new_state = state.replace(
        step=state.step + 1,
        online_params=online_params,
        online_stats=online_stats,
        opt_state=opt_state,
    )
    return new_state, metrics | {"finite": diagnostics.finite(metrics), "outputs": outputs}


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Reads a validated config (`configs/simclr.py`) and binds the functions above to its values.

    Raises:
        UserError: more than one microbatch, or batch-norm groups that would part the views.
    """
    for field, why in (
        ("accumulate_steps", "the negatives are those of one global batch"),
        ("bn_groups", "SimCLR's batch norm is global, over both views"),
    ):
        if config[field] != 1:
            raise bad_field(field, config[field], f"must be 1: {why}")
    dtype = jnp.dtype(config.compute_dtype)
    encoder = resnet.ResNet(**config.encoder, dtype=dtype)
    networks_ = Networks(
        encoder=encoder,
        projector=heads.from_config(config.projector, config.encoder, dtype),
        classifier=heads.LinearClassifier(num_classes) if num_classes else None,
    )
    schedule, optimizer = optim.from_config(
        config.optimizer, config.batch_size, total_steps, warmup_steps
    )
    augment = augment_lib.from_config(config.augment)
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
            **augment,
            temperature=config.temperature,
        ),
        represent=functools.partial(branch.represent, encoder),
        augment_views=functools.partial(augment_views, augment=augment["augment"]),
        notes=(f"negatives: the {2 * config.batch_size - 2:,} other views of each global batch",),
    )
