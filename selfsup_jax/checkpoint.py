"""Orbax checkpoints of the training state, whatever number of devices wrote or reads them."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from selfsup_jax import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir.

    A checkpoint holds one copy of the state as host arrays, written in the background, whole or
    not at all. Its number is the count of updates done.

    Args:
        workdir: the run's; checkpoints lie in `checkpoints/` below it.
        keep: how many of the newest are kept.
    """

    def __init__(self, workdir: str, keep: int = 1):
        self._manager = ocp.CheckpointManager(
            os.path.abspath(os.path.join(workdir, "checkpoints")),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves a replicated state; returns when the host has its copy.

        Raises:
            UserError: a parameter is not finite; what was saved before stays the newest.
        """
        single = jax.tree.map(np.asarray, parallel.unreplicate(state))
        step = int(single.step)
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(single.online_params)):
            raise UserError(
                f"the parameters of step {step} are not finite: lower "
                f"config.optimizer.learning_rate; the last checkpoint is of step "
                f"{self.latest_step or 0}"
            )
        if step != self.latest_step:
            self._manager.save(step, args=ocp.args.StandardSave(_as_dict(single)))

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (the newest by default) as host arrays.

        Args:
            like: a state of the same structure; arrays or `jax.ShapeDtypeStruct`.
            step: a step that has a checkpoint.
        """
        # Host arrays in, host arrays out: no device layout is asked for or assumed.
        wanted = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _as_dict(like))
        step = self.latest_step if step is None else step
        restored = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        fields = jax.tree.map(np.asarray, restored)
        numbered = jax.tree.leaves(fields.pop("opt_state"))
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), numbered)
        return like.replace(**fields, opt_state=opt_state)

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries: names that a reader knows, free of optax's types."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    numbered = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return fields | {"opt_state": numbered}
