"""The state that a training step carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, Any]  # scalars; from a whole step also "outputs", see `Outputs`


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes from step to step.

    Attributes:
        step: int32 scalar, updates done so far.
        rng: the run's base key (`uint32[2]`). It never changes: a step folds its number in.
        online_params, target_params: float32, separate pytrees.
        online_stats, target_stats: batch norm's running mean and variance, float32.
        opt_state: the optimizer's state.
    """

    step: jax.Array
    rng: jax.Array
    online_params: PyTree
    target_params: PyTree
    online_stats: PyTree
    target_stats: PyTree
    opt_state: PyTree


class Outputs(NamedTuple):
    """What a step computed of a device's b examples in V views, for the diagnostics.

    Attributes:
        representation: `[V, b, F]` float32, the online encoder's.
        projection: `[V, b, D]`, the online projector's.
        prediction: `[V, b, D]`, what the loss compares with the target (the projection, where
            there is no predictor).
        target: `[V, b, D]`; row `[v, i]` is what the loss compares `prediction[v, i]` with.
    """

    representation: jax.Array
    projection: jax.Array
    prediction: jax.Array
    target: jax.Array


def fresh_state(
    params: PyTree,
    stats: PyTree,
    step_rng: jax.Array,
    target_parts: Sequence[str] = (),
    target: tuple[PyTree, PyTree] | None = None,
) -> TrainState:
    """The state before the first step, but for the optimizer's, which `Method.init_state` adds.

    Args:
        params, stats: the online network's, from `models.network.init`.
        step_rng: the base key of all steps.
        target_parts: the parts that the target has.
        target: the target's own parameters and statistics; None for a copy of the online ones.
    """
    target_params, target_stats = target or jax.tree.map(jnp.copy, (params, stats))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=step_rng,
        online_params=params,
        target_params={part: target_params[part] for part in target_parts},
        online_stats=stats,
        target_stats={part: target_stats[part] for part in target_parts if part in target_stats},
        opt_state=(),
    )


def encoder_variables(state: TrainState) -> PyTree:
    """The online encoder's variables, the part that people carry into their own work."""
    return {
        "params": state.online_params["encoder"],
        "batch_stats": state.online_stats["encoder"],
    }
