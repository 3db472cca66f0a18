"""MoCo: algorithm 1 of v1 (arXiv 1911.05722), and v2 (arXiv 2003.04297), on any devices."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moco_jax import losses, queue
from moco_jax.keys import encode_keys
from selfsup_jax.build import parts_from_config
from selfsup_jax.devices import collectives
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.errors import bad_field
from selfsup_jax.method import Context, Loss, Method
from selfsup_jax.models import network
from selfsup_jax.models.heads import l2_normalize
from selfsup_jax.models.network import apply, split_views, stack_views
from selfsup_jax.state import Outputs, PyTree, TrainState, fresh_state

# The parts of the query encoder that the key encoder is an average of.
KEY_PARTS = ("encoder", "projector")


class MoCo(nn.Module):
    """An encoder with a head, for queries and (with other parameters) keys, and an online probe."""

    encoder: nn.Module
    projector: nn.Module  # v1: linear; v2: a hidden layer
    classifier: nn.Module | None

    def __call__(self, images: jax.Array, layout: BatchLayout) -> tuple[jax.Array, jax.Array]:
        """`[V * b, H, W, 3]` to representation `[V * b, F]` and unit vectors `[V * b, D]`."""
        representation = self.encoder(images, layout)
        return representation, l2_normalize(self.projector(representation, layout))


class MoCoState(TrainState):
    """A `TrainState` whose online network makes the queries and whose target makes the keys.

    Attributes:
        queue: `[K, D]` float32 unit vectors, the keys of earlier steps.
        queue_index: int32 scalar, where its oldest key is.
    """

    queue: jax.Array
    queue_index: jax.Array


def loss(
    net: MoCo,
    online: PyTree,
    target: PyTree,
    views: jax.Array,
    state: MoCoState,
    context: Context,
    *,
    temperature: float,
    symmetric: bool = False,
) -> Loss:
    """View 1's queries against view 2's keys and the queue's; see `Method.loss`.

    `symmetric`: each view is query and key in turn, and both views' keys go into the queue. The
    keys' encoder has been averaged before, as in the authors' code; algorithm 1 has it last. The
    keys are the same, and `target_params` are those that made the step's keys.
    """
    queries_of, keys_of = (views, views[::-1]) if symmetric else (views[:1], views[1:])
    layout = context.layout(len(queries_of))
    keys, key_stats = encode_keys(target, keys_of, context, net=net)  # [V, b, D]
    (representation, query), stats = apply(net, online, stack_views(queries_of), layout)
    query = split_views(query, len(keys))
    each = [
        losses.info_nce(q, k, state.queue, temperature) for q, k in zip(query, keys, strict=True)
    ]
    of_views, top1 = (jnp.stack(values) for values in zip(*each, strict=True))
    representation = split_views(representation, len(keys))
    return Loss(
        loss=of_views.sum(),  # the symmetric loss is the sum over both views
        outputs=Outputs(representation, projection=query, prediction=query, target=keys),
        online_stats=stats,
        target_stats=key_stats,
        metrics={"contrast_top1": top1.mean()},
        carried=collectives.gather(keys, context.axis_name, axis=1),  # [V, B, D], of all devices
    )


def enqueue(state: MoCoState, keys: jax.Array, after: jax.Array) -> MoCoState:
    """The step's keys `[V, B, D]`, one view's after the other's, in the place of the oldest."""
    keys = keys.reshape(-1, keys.shape[-1])
    new_queue, index = queue.enqueue(state.queue, state.queue_index, keys, after=after)
    return state.replace(queue=new_queue, queue_index=index)


def start(rng: jax.Array, net: MoCo, *, image_shape: tuple[int, ...], queue_size: int) -> MoCoState:
    """A fresh state: both encoders are equal, the queue is filled with random directions."""
    online_rng, queue_rng, step_rng = jax.random.split(rng, 3)
    state = fresh_state(*network.init(online_rng, net, image_shape), step_rng, KEY_PARTS)
    keys = queue.init(queue_rng, queue_size, net.projector.output_size)
    return MoCoState(**vars(state), queue=keys, queue_index=jnp.zeros((), jnp.int32))


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Binds the values of a validated config (`configs/moco.py`).

    Raises:
        UserError: a queue or a batch that cannot be cut up as the config says.
    """
    _check(config)
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    return Method(
        network=MoCo(parts.encoder, parts.projector, parts.classifier),
        loss=functools.partial(loss, temperature=config.temperature, symmetric=config.symmetric),
        start=functools.partial(start, image_shape=parts.image_shape, queue_size=config.queue_size),
        average_first=True,
        carry=enqueue,  # type: ignore[arg-type]
        notes=_notes(config),
        **parts.shared,
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
