"""What a method is, and the one training step of all of them.

A method is a record (`Method`) of a network, a pure loss and plain values; its package's `build`
binds a config's values to it (`build.py` helps). `train_step` does the rest, the same for each:
views, gradients, means over devices, optimizer, average of the target, metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from selfsup_jax.data.augment import Augmentation, augment_views, normalize
from selfsup_jax.devices import collectives
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models import network
from selfsup_jax.state import Batch, Metrics, Outputs, PyTree, TrainState
from selfsup_jax.training import diagnostics


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss may want to know of the step and the devices it is computed in.

    Attributes:
        rng: the step's key. 1 and 2 folded into it are the views'; 0 is free for the method.
        index: `[b]` int32, the places of this device's images in the global batch.
        groups: batch-norm groups of the (micro)batch.
        axis_name: the mapped axis, or None under plain `jax.jit`.
    """

    rng: jax.Array
    index: jax.Array
    groups: int
    axis_name: str | None

    def layout(self, num_views: int) -> BatchLayout:
        """How the rows of `num_views` views, one after the other, are cut into groups."""
        return collectives.batch_layout(self.groups, num_views, self.axis_name)


class Loss(NamedTuple):
    """What a method's loss function returns.

    Attributes:
        loss: float32 scalar, the mean over this device's images.
        outputs: this device's rows, for the diagnostics; the online probe looks at view 1's
            representation.
        online_stats, target_stats: the networks' new batch statistics.
        metrics: further float32 scalars, means over this device's images.
        carried: `[V, b, ...]` arrays for the method's `carry`; of one microbatch each.
    """

    loss: jax.Array
    outputs: Outputs
    online_stats: PyTree
    target_stats: PyTree
    metrics: dict[str, jax.Array] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    carried: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method, ready to run.

    Attributes:
        network: the module of its networks; see `models/network.py`.
        loss: `(network, online, target, views, state, context) -> Loss`, pure. `online` and
            `target` are variables of `network`, `views` `[2, b, H, W, 3]` float32, normalised; the
            gradient is taken by the online parameters. `state` is there for what is carried.
        start: `(rng, network) -> TrainState`, a fresh state.
        optimizer, schedule: the optimizer, and its learning rate by step (it holds its own).
        augment: of the views.
        tau: step -> EMA decay of the target; near 1 is slow.
        average_first: the target, of such parts of the network as the state has of it, is averaged
            before the loss (MoCo) and not after the update.
        carry: `(state, carried, after) -> state`, what else changes from step to step. `after` is
            a scalar that depends on all that read the state as it was.
        bn_groups: batch-norm groups of the global batch.
        accumulate_steps: microbatches per update.
        notes: lines that the run begins with: what is particular to the method, and warnings.
    """

    network: nn.Module
    loss: Callable[..., Loss]
    start: Callable[[jax.Array, Any], TrainState]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    augment: Augmentation
    tau: Callable[[jax.Array], jax.Array] = lambda step: jnp.float32(0.0)
    average_first: bool = False
    carry: Callable[[TrainState, Any, jax.Array], TrainState] | None = None
    bn_groups: int = 1
    accumulate_steps: int = 1
    notes: tuple[str, ...] = ()

    def init_state(self, rng: jax.Array) -> TrainState:
        """The state before the first step."""
        state = self.start(rng, self.network)
        return state.replace(opt_state=self.optimizer.init(state.online_params))

    def train_step(
        self, state: TrainState, batch: Batch, *, axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        """See `train_step`."""
        return train_step(self, state, batch, axis_name=axis_name)

    def augment_views(self, rng: jax.Array, batch: Batch) -> jax.Array:
        """`[V, B, H, W, 3]` in [0, 1]: what a step with that key makes of a batch."""
        return augment_views(rng, batch, self.augment.views)

    def represent(self, variables: PyTree, images: jax.Array) -> jax.Array:
        """Normalised images `[B, H, W, 3]` to the frozen encoder's representation `[B, D]`."""
        return self.network.encoder.apply(variables, images)


def train_step(
    method: Method, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One update of the online network and one step of all that follows it.

    Args:
        method: what to train, and how.
        state: the state before the update.
        batch: this device's part of the global batch: `view_1`, `view_2` `[b, H, W, 3]` uint8,
            `index` `[b]` int32 (place in the global batch) and, with labels, `label` `[b]` int32.
        axis_name: the mapped axis, or None under plain `jax.jit`.

    Returns:
        The state after the update, and metrics: float32 scalars, equal on every device ("finite"
        is 1 where all of them are), and under "outputs" this device's rows of `Outputs`.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    groups = collectives.groups_of_microbatch(method.bn_groups, method.accumulate_steps)
    tau = method.tau(state.step)

    def averaged(online_params: PyTree) -> PyTree:
        followed = {part: online_params[part] for part in state.target_params}
        return optax.incremental_update(followed, state.target_params, step_size=1.0 - tau)

    target_params = state.target_params
    if method.average_first:
        target_params = averaged(state.online_params)

    def microbatch_step(stats: Any, part: Batch) -> tuple[Any, Any, Any]:
        views = method.augment_views(step_rng, part)
        views = normalize(views, method.augment.mean, method.augment.std)
        context = Context(step_rng, part["index"], groups, axis_name)
        grads, out = jax.grad(total_loss, has_aux=True)(
            state.online_params,
            target_params,
            *stats,
            views,
            part.get("label"),
            method=method,
            state=state,
            context=context,
        )
        stats = (out.online_stats, out.target_stats)
        return stats, (grads, out.metrics), (out.outputs, out.carried)

    # The running averages of batch norm take a step for each microbatch.
    stats = (state.online_stats, state.target_stats)
    stats, means, (outputs, carried) = collectives.accumulate(
        microbatch_step, stats, batch, method.accumulate_steps
    )
    (grads, metrics), (online_stats, target_stats) = collectives.mean((means, stats), axis_name)

    updates, opt_state = method.optimizer.update(grads, state.opt_state, state.online_params)
    online_params = optax.apply_updates(state.online_params, updates)
    if not method.average_first:
        target_params = averaged(online_params)
    if state.target_params:
        metrics |= {"tau": tau}
    metrics |= {"learning_rate": method.schedule(state.step)} | diagnostics.norms(grads, updates)
    new_state = state.replace(
        step=state.step + 1,
        online_params=online_params,
        target_params=target_params,
        online_stats=online_stats,
        target_stats=target_stats,
        opt_state=opt_state,
    )
    if method.carry is not None:
        new_state = method.carry(new_state, carried, metrics["update_norm"])
    return new_state, metrics | {"finite": diagnostics.finite(metrics), "outputs": outputs}


def total_loss(
    online_params: PyTree,
    target_params: PyTree,
    online_stats: PyTree,
    target_stats: PyTree,
    views: jax.Array,
    labels: jax.Array | None,
    *,
    method: Method,
    state: TrainState,
    context: Context,
) -> tuple[jax.Array, Loss]:
    """The method's loss plus, where there are labels, the online probe's.

    Args:
        online_params, target_params, online_stats, target_stats: see `TrainState`.
        views: `[V, b, H, W, 3]` float32, normalised.
        labels: `[b]` int32, or None.
        method, state, context: see `Method.loss`.

    Returns:
        The scalar to minimise, and what the method's loss returned, its metrics with "loss" and
        the probe's.
    """
    online = {"params": online_params, "batch_stats": online_stats}
    target = {"params": target_params, "batch_stats": target_stats}
    out = method.loss(method.network, online, target, views, state, context)
    view_1 = out.outputs.representation[0]
    probe = network.online_probe(method.network, online_params, view_1, labels)
    metrics = {"loss": out.loss} | out.metrics | probe.metrics
    return out.loss + probe.loss, out._replace(metrics=metrics)
