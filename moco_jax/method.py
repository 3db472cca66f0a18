"""MoCo's state, loss and training step: algorithm 1 of v1 (arXiv 1911.05722), on any devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moco_jax import losses, networks, queue
from moco_jax.keys import encode_keys
from moco_jax.networks import Networks
from selfsup_jax import augment as augment_lib
from selfsup_jax import collectives, diagnostics, optim
from selfsup_jax.augment import ViewAugmentation, augment_views, normalize
from selfsup_jax.collectives import BatchLayout
from selfsup_jax.errors import bad_field
from selfsup_jax.models import branch, heads, resnet
from selfsup_jax.state import Batch, Method, Metrics, Outputs, TrainState

# The parts of the query encoder that the key encoder is an average of.
KEY_PARTS = ("encoder", "projector")


class MoCoState(TrainState):
    """A `TrainState` whose online network makes the queries and whose target makes the keys.

    Attributes:
        queue: `[K, D]` float32 unit vectors, the keys of earlier steps.
        queue_index: int32 scalar, where its oldest key is.
    """

    queue: jax.Array
    queue_index: jax.Array


def init_state(
    rng: jax.Array,
    *,
    networks_: Networks,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    queue_size: int,
) -> MoCoState:
    """A fresh state: both encoders are equal, the queue is filled with random directions."""
    online_rng, queue_rng, step_rng = jax.random.split(rng, 3)
    online_params, online_stats = branch.init(online_rng, networks_, image_shape)
    return MoCoState(
        step=jnp.zeros((), jnp.int32),
        rng=step_rng,
        online_params=online_params,
        target_params=jax.tree.map(jnp.copy, {part: online_params[part] for part in KEY_PARTS}),
        online_stats=online_stats,
        target_stats=jax.tree.map(
            jnp.copy, {part: online_stats[part] for part in KEY_PARTS if part in online_stats}
        ),
        opt_state=optimizer.init(online_params),
        queue=queue.init(queue_rng, queue_size, networks_.projector.output_size),
        queue_index=jnp.zeros((), jnp.int32),
    )


def loss_fn(
    online_params: dict,
    online_stats: dict,
    views: jax.Array,
    keys: jax.Array,
    queue_: jax.Array,
    labels: jax.Array | None,
    *,
    networks_: Networks,
    layout: BatchLayout,
    temperature: float,
) -> tuple[jax.Array, tuple[Metrics, Outputs, dict]]:
    """The loss of the queries, plus the online probe's where there are labels.

    Args:
        online_params, online_stats: of the query encoder.
        views: `[V, B, H, W, C]` float32, those that queries are made of.
        keys: `[V, B, D]` unit vectors; `keys[v, i]` belongs to the query of `views[v, i]`.
        queue_: `[K, D]` unit vectors.
        labels: `[B]` int32, or None.
        networks_: the modules.
        layout: how the rows are cut into views and batch-norm groups.
        temperature: of the similarities.

    Returns:
        The scalar to minimise, and (metrics, outputs, new statistics).
    """
    images = views.reshape(-1, *views.shape[2:])  # [V * B, H, W, C]
    representation, query, stats = networks.apply(
        networks_, online_params, online_stats, images, layout
    )
    representation = representation.reshape(*keys.shape[:2], -1)  # [V, B, F]
    query = query.reshape(keys.shape)
    found = [losses.info_nce(q, k, queue_, temperature) for q, k in zip(query, keys, strict=True)]
    of_views, top1 = (jnp.stack(values) for values in zip(*found, strict=True))
    loss = of_views.sum()  # the symmetric loss is the sum over both views

    outputs = Outputs(representation, projection=query, prediction=query, target=keys)
    probe = branch.online_probe(networks_.classifier, online_params, representation[0], labels)
    metrics = {"loss": loss, "contrast_top1": top1.mean()} | probe.metrics
    return loss + probe.loss, (metrics, outputs, stats)


def train_step(
    state: MoCoState,
    batch: Batch,
    *,
    networks_: Networks,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    tau: Callable[[jax.Array], jax.Array],
    augment: tuple[ViewAugmentation, ViewAugmentation],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    temperature: float,
    symmetric: bool = False,
    bn_groups: int = 8,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[MoCoState, Metrics]:
    """One step of algorithm 1: average the key encoder, encode, update the queries', enqueue.

    The key encoder is averaged first, as in the authors' code; algorithm 1 has it last. The keys
    are the same, and `target_params` are those that made the step's keys.

    Args:
        state: the state before the step.
        batch: this device's part of the global batch: `view_1` (queries), `view_2` (keys)
            `[B, H, W, 3]` uint8, `index` `[B]` int32 (place in the global batch) and, with labels,
            `label` `[B]` int32.
        networks_, optimizer, augment, mean, std: the modules, and what they are trained with.
        schedule: step -> learning rate, reported; the optimizer holds its own.
        tau: step -> EMA decay of the key encoder, the paper's m.
        temperature: of the similarities.
        symmetric: each view is query and key in turn; both views' keys go into the queue.
        bn_groups: batch-norm groups of the global batch, over which the keys' images are shuffled.
        accumulate_steps: microbatches per update; all see the queue as it was before the step.
        axis_name: the mapped axis, or None under plain `jax.jit`.

    Returns:
        The state after the step, and metrics: float32 scalars, equal on every device ("finite" is 1
        where all of them are), and under "outputs" this device's rows of `Outputs`.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    groups = collectives.groups_of_microbatch(bn_groups, accumulate_steps)
    layout = collectives.batch_layout(groups, 2 if symmetric else 1, axis_name)
    step_tau = tau(state.step)
    target_params = optax.incremental_update(
        {part: state.online_params[part] for part in KEY_PARTS},
        state.target_params,
        step_size=1.0 - step_tau,
    )
    loss = functools.partial(loss_fn, networks_=networks_, layout=layout, temperature=temperature)
    grad_fn = jax.grad(loss, has_aux=True)

    def microbatch_step(stats: Any, part: Batch) -> tuple[Any, Any, Any]:
        views = normalize(augment_views(step_rng, part, augment), mean, std)
        queries_of, keys_of = (views, views[::-1]) if symmetric else (views[:1], views[1:])
        keys, key_stats = encode_keys(
            jax.random.fold_in(step_rng, 0),  # 1 and 2 are the views'
            target_params,
            stats[1],
            keys_of,
            part["index"],
            networks_=networks_,
            layout=layout,
            bn_groups=groups,
        )
        grads, (metrics, outputs, query_stats) = grad_fn(
            state.online_params, stats[0], queries_of, keys, state.queue, part.get("label")
        )
        new_keys = collectives.gather(keys, axis_name, axis=1)  # [V, B, D], of all devices
        return (query_stats, key_stats), (grads, metrics), (outputs, new_keys)

    stats = (state.online_stats, state.target_stats)
    stats, means, (outputs, new_keys) = collectives.accumulate(
        microbatch_step, stats, batch, accumulate_steps
    )
    (grads, metrics), (online_stats, target_stats) = collectives.mean((means, stats), axis_name)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    online_params = optax.apply_updates(state.online_params, updates)
    metrics |= {"tau": step_tau, "learning_rate": schedule(state.step)}
    metrics |= diagnostics.norms(grads, updates)
    new_keys = new_keys.reshape(-1, new_keys.shape[-1])  # both views', one after the other
    new_queue, queue_index = queue.enqueue(
        state.queue, state.queue_index, new_keys, after=metrics["update_norm"]
    )
    new_state = state.replace(
        step=state.step + 1,
        online_params=online_params,
        target_params=target_params,
        online_stats=online_stats,
        target_stats=target_stats,
        opt_state=opt_state,
        queue=new_queue,
        queue_index=queue_index,
    )
    return new_state, metrics | {"finite": diagnostics.finite(metrics), "outputs": outputs}


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Reads a validated config (`configs/moco.py`) and binds the functions above to its values.

    Raises:
        UserError: a queue or a batch that cannot be cut up as the config says.
    """
    _check(config)
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
            init_state,
            networks_=networks_,
            optimizer=optimizer,
            image_shape=(size, size, 3),
            queue_size=config.queue_size,
        ),
        train_step=functools.partial(
            train_step,
            networks_=networks_,
            optimizer=optimizer,
            schedule=schedule,
            tau=optim.tau_schedule(config.tau_schedule, config.tau_base, total_steps),
            **augment,
            temperature=config.temperature,
            symmetric=config.symmetric,
            bn_groups=config.bn_groups,
            accumulate_steps=config.accumulate_steps,
        ),
        represent=functools.partial(branch.represent, encoder),
        augment_views=functools.partial(augment_views, augment=augment["augment"]),
        notes=_notes(config),
    )


def _check(config: Any) -> None:
    groups = collectives.groups_of_microbatch(config.bn_groups, config.accumulate_steps)
    devices = jax.device_count()
    cell = groups * devices * config.accumulate_steps
    if groups > 1 and config.batch_size % cell:
        raise bad_field(
            "batch_size",
            config.batch_size,
            f"must be a multiple of {cell} (groups {groups} x devices {devices} x accumulate_steps "
            f"{config.accumulate_steps}), so that each device can deal its part out to all groups "
            f"(bn_groups={config.bn_groups}); nearest: "
            f"{max(1, round(config.batch_size / cell)) * cell}",
        )
    keys = config.batch_size * (2 if config.symmetric else 1)
    if config.queue_size < 1 or config.queue_size % keys:
        both = " x 2 views (symmetric)" if config.symmetric else ""
        raise bad_field(
            "queue_size",
            config.queue_size,
            f"must be a multiple of the {keys} keys of a step (batch_size={config.batch_size}"
            f"{both}); nearest: {max(1, round(config.queue_size / keys)) * keys}",
        )


def _notes(config: Any) -> tuple[str, ...]:
    keys = config.batch_size * (2 if config.symmetric else 1)
    depth = config.queue_size // keys
    queue_note = f"queue of {config.queue_size:,} keys, those of the last {depth:,} steps"
    groups = collectives.groups_of_microbatch(config.bn_groups, config.accumulate_steps)
    if groups > 1:
        size = config.batch_size // config.accumulate_steps // groups
        return (f"{queue_note}; batch norm in {groups} groups of {size}, keys shuffled over them",)
    return (
        queue_note,
        f"WARNING: config.bn_groups={config.bn_groups} leaves MoCo one batch-norm group: query and "
        "key share their statistics, which can give the positive away without anything being "
        "learned (section 3.3); the paper has 8",
    )
