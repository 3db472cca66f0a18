"""The state that a training step carries, and what a method hands to the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


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


class Method(NamedTuple):
    """A method, ready to run: what `build` of each method's package gives to the loop.

    Attributes:
        init_state: `rng -> TrainState`.
        train_step: `(state, batch, *, axis_name) -> (state, metrics)`, pure.
        represent: `({"params", "batch_stats"} of the encoder, images [B, H, W, C] float32) ->
            representation [B, D] float32`, in evaluation mode.
    """

    init_state: Callable[[jax.Array], TrainState]
    train_step: Callable[..., tuple[TrainState, Metrics]]
    represent: Callable[[PyTree, jax.Array], jax.Array]


def encoder_variables(state: TrainState) -> PyTree:
    """The online encoder's variables, the part that people carry into their own work."""
    return {
        "params": state.online_params["encoder"],
        "batch_stats": state.online_stats["encoder"],
    }
