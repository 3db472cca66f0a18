"""The state that a training step carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

PyTree = Any
Batch = dict[str, jax.Array]
NETWORKS = ("online", "target")  # the encoder of one of them is evaluated: `config.eval.network`
Metrics = dict[str, Any]  # scalars; from a whole step also "outputs", see `Outputs`


class TrainState(flax.struct.PyTreeNode):
    """Everything that changes from step to step.

    Attributes:
        step: int32 scalar, updates done so far.
        rng: the run's base key (`uint32[2]`). It never changes: each step folds in its index.
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
    """A step's outputs for a device's b examples in V views, for the diagnostics.

    Attributes:
        representation: `[V, b, F]` float32, of the online encoder.
        projection: `[V, b, D]`, of the online projector.
        prediction: `[P, b, D]`, what the loss compares with the targets (the projections if there
            is no predictor).
        target: `[T, b, D]`; `Method.pairs` defines which prediction is compared with which target.
    """

    representation: jax.Array
    projection: jax.Array
    prediction: jax.Array
    target: jax.Array


class Sign(NamedTuple):
    """A sign of collapse that a method has of its own: a metric of its steps above a limit.

    Attributes:
        metric: its name.
        limit: the largest value of a healthy run.
        meaning: of a higher value: what has happened and what to do about it.
    """

    metric: str
    limit: float
    meaning: str


def fresh_state(
    params: PyTree,
    stats: PyTree,
    step_rng: jax.Array,
    target_parts: Sequence[str] = (),
    target: tuple[PyTree, PyTree] | None = None,
) -> TrainState:
    """The initial state without the optimizer's state, which `Method.init_state` adds.

    Args:
        params, stats: of the online network, from `models.network.init`.
        step_rng: the base key of all steps.
        target_parts: names of the parts that the target network has.
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


def encoder_variables(state: TrainState, network: str = "online") -> PyTree:
    """The variables of the `online` or the `target` encoder, which is evaluated and exported."""
    params, stats = getattr(state, f"{network}_params"), getattr(state, f"{network}_stats")
    return {"params": params["encoder"], "batch_stats": stats.get("encoder", {})}


def all_finite(metrics: Metrics) -> jax.Array:
    """1.0 if every metric of a step is finite, else 0.0: one scalar to check."""
    return jnp.all(jnp.isfinite(jnp.stack(list(metrics.values())))).astype(jnp.float32)
