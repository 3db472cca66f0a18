"""The state that a training step carries, and what a method hands to the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax

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


class Method(NamedTuple):
    """A method, ready to run: what `build` of each method's package gives to the loop.

    Attributes:
        init_state: `rng -> TrainState`.
        train_step: `(state, batch, *, axis_name) -> (state, metrics)`, pure. The metrics are
            scalars, equal on every device, and "outputs", this device's `Outputs`.
        represent: `({"params", "batch_stats"} of the encoder, images [B, H, W, C] float32) ->
            representation [B, D] float32`, in evaluation mode.
        augment_views: `(rng, batch) -> [V, B, H, W, 3]` float32 in [0, 1], what a step with that
            key makes of a batch before it is normalised.
        notes: lines that the run begins with: what is particular to the method, and warnings.
    """

    init_state: Callable[[jax.Array], TrainState]
    train_step: Callable[..., tuple[TrainState, Metrics]]
    represent: Callable[[PyTree, jax.Array], jax.Array]
    augment_views: Callable[[jax.Array, Batch], jax.Array]
    notes: tuple[str, ...] = ()


def encoder_variables(state: TrainState) -> PyTree:
    """The online encoder's variables, the part that people carry into their own work."""
    return {
        "params": state.online_params["encoder"],
        "batch_stats": state.online_stats["encoder"],
    }
