"""What a method is, and the training step that all methods share.

A method is a record (`Method`) of a network, a pure loss and plain values; its package's `build`
makes it from a config, with the help of `build.py`. `train_step` is the same for all methods:
views, gradients, means over devices, optimizer, moving average of the target, metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from selfsup_jax import optim
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.devices import collectives
from selfsup_jax.devices.collectives import BatchLayout, RowNoise
from selfsup_jax.models import online_probe
from selfsup_jax.state import Batch, Metrics, Outputs, PyTree, TrainState, all_finite

Views = dict[str, jax.Array]  # group of views -> `[V, b, H, W, 3]` in the encoder's dtype


@dataclasses.dataclass(frozen=True)
class Context:
    """What a loss function may need to know about the step and the devices.

    Attributes:
        rng: the step's key. The views use `fold_in` of 1, 2, ...; 0 is free for the method.
        index: `[b]` int32, the positions of this device's images in the global batch.
        groups: batch-norm groups of the (micro)batch.
        axis_name: the mapped axis, or None under plain `jax.jit`.
    """

    rng: jax.Array
    index: jax.Array
    groups: int
    axis_name: str | None

    def layout(self, num_views: int, *, noise: bool = False, first_view: int = 0) -> BatchLayout:
        """The rows of `num_views` stacked views in groups; `noise`: with drop path's draws."""
        draws = RowNoise(self.rng, self.index, first_view) if noise else None
        return collectives.batch_layout(self.groups, num_views, self.axis_name, draws)

    def mean(self, tree: Any) -> Any:
        """The mean over all devices."""
        return collectives.mean(tree, self.axis_name)

    def gather(self, tree: Any, axis: int = 0) -> Any:
        """The rows of all devices, `[b, ...]` to `[B, ...]`, in the order of the global batch."""
        return collectives.gather(tree, self.axis_name, axis)

    def batch_offset(self, rows: int) -> jax.Array | int:
        """The index of the first of this device's `rows` rows in the result of `gather`."""
        return collectives.batch_offset(rows, self.axis_name)


class Loss(NamedTuple):
    """What a method's loss function returns.

    Attributes:
        loss: float32 scalar, the mean over this device's images.
        outputs: this device's rows; the online probe reads the representations.
        online_stats, target_stats: the networks' new batch statistics.
        metrics: further float32 scalars, means over this device's images.
        carried: `[V, b, ...]` arrays of one microbatch, for the method's `carry`.
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
            `target` are variables of `network`; `views` are normalised `Views`; `state` also has
            what `carry` updates. The gradient is taken with respect to the online parameters.
        start: `(rng, network) -> TrainState`, a fresh state.
        optimizer, schedule: the optimizer, and its learning rate by step.
        augment: the augmentation of the views.
        tau: step -> EMA decay of the target; near 1 is slow.
        average_first: the target's moving average (of the parts in the state) is updated before
            the loss (MoCo) and not after the optimizer's update.
        carry: `(state, carried, after) -> state`, updates further state, such as MoCo's queue.
            `after` is a scalar that depends on everything that read the old state.
        pairs: (i, j): the loss compares prediction i with target j of the outputs.
        bn_groups: batch-norm groups of the global batch.
        accumulate_steps: microbatches per update.
        notes: lines that are logged at the start of a run, such as warnings.
    """

    network: nn.Module
    loss: Callable[..., Loss]
    start: Callable[[jax.Array, Any], TrainState]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    augment: Augmentation
    tau: Callable[[jax.Array], jax.Array] = lambda step: jnp.float32(0.0)
    average_first: bool = False
    carry: Callable[[Any, Any, jax.Array], TrainState] | None = None
    pairs: tuple[tuple[int, int], ...] = ((0, 1), (1, 0))
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

    def represent(self, variables: PyTree, images: jax.Array) -> jax.Array:
        """Normalised images `[B, H, W, 3]` to the frozen encoder's representation `[B, D]`."""
        return self.network.encoder.apply(variables, images)


def train_step(
    method: Method, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """Updates the online network, the target network and the other state.

    Args:
        method, state: the method, and the state before the update.
        batch: this device's part of the global batch: `view_1`, `view_2`, ... `[b, H, W, 3]` uint8,
            `index` `[b]` int32 (position in the global batch) and, with labels, `label` `[b]`.
        axis_name: the mapped axis, or None under plain `jax.jit`.

    Returns:
        The state after the update, and metrics: float32 scalars, equal on every device ("finite"
        is 1 if all of them are), and under "outputs" this device's rows of `Outputs`.
    """
    step_rng = jax.random.fold_in(state.rng, state.step)
    groups = collectives.groups_of_microbatch(method.bn_groups, method.accumulate_steps)
    tau = method.tau(state.step)

    def averaged(online_params: PyTree) -> PyTree:
        new = {part: online_params[part] for part in state.target_params}
        return optax.incremental_update(new, state.target_params, step_size=1.0 - tau)

    target_params = state.target_params
    if method.average_first:
        target_params = averaged(state.online_params)

    def microbatch_step(stats: Any, part: Batch) -> tuple[Any, Any, Any]:
        dtype = getattr(getattr(method.network, "encoder", None), "dtype", jnp.float32)
        views = method.augment.normalized(step_rng, part, dtype)
        context = Context(step_rng, part["index"], groups, axis_name)

        def loss_fn(online_params: PyTree) -> tuple[jax.Array, Loss]:
            online = {"params": online_params, "batch_stats": stats[0]}
            target = {"params": target_params, "batch_stats": stats[1]}
            return total_loss(method, online, target, views, part.get("label"), state, context)

        grads, out = jax.grad(loss_fn, has_aux=True)(state.online_params)
        stats = (out.online_stats, out.target_stats)
        return stats, (grads, out.metrics), (out.outputs, out.carried)

    # Batch norm's running averages are updated once per microbatch.
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
    metrics |= {"learning_rate": method.schedule(state.step)} | optim.norms(grads, updates)
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
    return new_state, metrics | {"finite": all_finite(metrics), "outputs": outputs}


def total_loss(
    method: Method,
    online: PyTree,
    target: PyTree,
    views: Views,
    labels: jax.Array | None,
    state: TrainState,
    context: Context,
) -> tuple[jax.Array, Loss]:
    """The scalar to minimise, with the online probe's loss if there are `labels` `[b]` int32; and
    the method's `Loss`, with the probe's metrics.
    """
    out = method.loss(method.network, online, target, views, state, context)
    features = out.outputs.representation
    probe = online_probe.evaluate(method.network, online["params"], features, labels)
    metrics = {"loss": out.loss} | out.metrics | probe.metrics
    return out.loss + probe.loss, out._replace(metrics=metrics)


# ------------------------------------------------------------------- for the methods' losses


def apply(network: nn.Module, variables: PyTree, *args: Any, method: Any = None) -> tuple[Any, Any]:
    """Runs a network in training mode; returns its result and the new batch statistics."""
    result, new = network.apply(variables, *args, method=method, mutable=["batch_stats"])
    return result, new.get("batch_stats", {})


def stack_views(views: jax.Array) -> jax.Array:
    """`[V, b, ...]` to `[V * b, ...]`: view 1 of every image, then view 2 of every image."""
    return views.reshape(-1, *views.shape[2:])


def split_views(x: jax.Array, num_views: int = 2) -> jax.Array:
    """`[V * b, D]` to `[V, b, D]`."""
    return x.reshape(num_views, -1, *x.shape[1:])
