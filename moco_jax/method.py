"""MoCo: algorithm 1 of v1 (arXiv 1911.05722), and v2 (2003.04297), on any devices; v3: `v3.py`."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moco_jax import losses, settings, v3
from moco_jax.keys import encode_keys, enqueue, init_queue
from selfsup_jax.build import parts_from_config
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models import network
from selfsup_jax.models.heads import l2_normalize
from selfsup_jax.state import Outputs, PyTree, TrainState, fresh_state


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
        queue_index: int32 scalar, the index of its oldest key.
    """

    queue: jax.Array
    queue_index: jax.Array


def loss(
    net: MoCo,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: MoCoState,
    context: Context,
    *,
    temperature: float,
    symmetric: bool = False,
) -> Loss:
    """View 1's queries against view 2's keys and the queue's; see `Method.loss`.

    `symmetric`: each view is query and key in turn, and both views' keys go into the queue. The key
    encoder is updated before the loss, as in the authors' code; in algorithm 1 it is updated last.
    The keys are the same, and `target_params` of a state are those that encoded its last keys.
    """
    pair = views["global"]
    queries, keys_of = (pair, pair[::-1]) if symmetric else (pair[:1], pair[1:])
    num_views = len(queries)
    keys, key_stats = encode_keys(net, target, keys_of, context)  # [V, b, D]
    outputs, stats = apply(net, online, stack_views(queries), context.layout(num_views, noise=True))
    representation, query = (split_views(x, num_views) for x in outputs)
    results = [
        losses.info_nce(q, k, state.queue, temperature) for q, k in zip(query, keys, strict=True)
    ]
    of_views, top1 = (jnp.stack(values) for values in zip(*results, strict=True))
    return Loss(
        loss=of_views.sum(),  # the symmetric loss is the sum over both views
        outputs=Outputs(representation, projection=query, prediction=query, target=keys),
        online_stats=stats,
        target_stats=key_stats,
        metrics={"contrast_top1": top1.mean()},
        carried=context.gather(keys, axis=1),  # [V, B, D], of all devices
    )


def carry(state: MoCoState, keys: jax.Array, after: jax.Array) -> MoCoState:
    """Overwrites the queue's oldest keys with the step's keys `[V, B, D]`, view after view."""
    keys = keys.reshape(-1, keys.shape[-1])
    queue, index = enqueue(state.queue, state.queue_index, keys, after=after)
    return state.replace(queue=queue, queue_index=index)


def start(rng: jax.Array, net: MoCo, *, image_shape: tuple[int, ...], queue_size: int) -> MoCoState:
    """The initial state: both encoders are equal, the queue has random directions."""
    online_rng, queue_rng, step_rng = jax.random.split(rng, 3)
    key_parts = ("encoder", "projector")  # a moving average of these parts of the query encoder
    state = fresh_state(*network.init(online_rng, net, image_shape), step_rng, key_parts)
    queue = init_queue(queue_rng, queue_size, net.projector.output_size)
    return MoCoState(**vars(state), queue=queue, queue_index=jnp.zeros((), jnp.int32))


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds MoCo from `configs/moco.py`; raises `UserError` for an invalid field."""
    if "queue_size" not in config:
        return v3.build(config, num_classes, total_steps, warmup_steps)
    settings.check(config)
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps)
    first = functools.partial(start, image_shape=parts.image_shape, queue_size=config.queue_size)
    of_config = {
        "network": MoCo(parts.encoder, parts.projector, parts.classifier),
        "loss": functools.partial(loss, temperature=config.temperature, symmetric=config.symmetric),
        "start": first,
        "pairs": ((0, 0), (1, 1)) if config.symmetric else ((0, 0),),
        "notes": settings.notes(config),
    }
    return Method(average_first=True, carry=carry, **(parts.shared | of_config))
