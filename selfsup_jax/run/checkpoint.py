"""Orbax checkpoints of the training state, whatever number of devices wrote or reads them."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
from importlib import metadata
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from selfsup_jax import __version__
from selfsup_jax.devices import parallel
from selfsup_jax.errors import NotFinite, UserError
from selfsup_jax.state import TrainState


class Checkpoints:
    """The checkpoints of one workdir.

    A checkpoint holds one copy of the state as host arrays (`state`) and what they belong to
    (`meta`, JSON: config, versions, place in the data). It is written in the background, whole or
    not at all. Its number is the count of updates done.

    Args:
        workdir: the run's; checkpoints lie in `checkpoints/` below it.
        keep: how many of the newest are kept.
        keep_every: steps that are a multiple of it are kept for good; 0 for none.
    """

    def __init__(self, workdir: str, keep: int = 1, keep_every: int = 0):
        self._directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
        self._keep_every = keep_every
        self._taken: tuple[int, TrainState, dict[str, Any]] | None = None
        self._begun = False
        absl_logging.get_absl_logger().addFilter(_not_told_twice)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                create=True,
                cleanup_tmp_directories=True,  # what a killed process was writing
            ),
            item_names=("state", "meta"),
        )

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None; it may still be being written."""
        return self._manager.latest_step()

    def committed_step(self) -> int | None:
        """The newest step that is whole on the disk, or None. Waits for what is being written."""
        with contextlib.suppress(Exception):
            self.wait()
        return max(ocp.utils.checkpoint_steps(self._directory), default=None)

    @property
    def busy(self) -> bool:
        """True while the last one is still being written: another would have to wait for it.

        Always false where there are other hosts: they could see it otherwise.
        """
        return jax.process_count() == 1 and self._manager.is_saving_in_progress()

    def keeps(self, step: int) -> bool:
        """True for a step whose checkpoint is kept for good."""
        return bool(self._keep_every) and step % self._keep_every == 0

    def take(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Copies a replicated state to the host; `write` is to follow.

        Two calls, so that the device can begin the next step before the writing begins.

        Raises:
            UserError: a parameter is not finite, or the disk has no room for it; what was saved
                before stays the newest.
        """
        single = parallel.unreplicate(state)
        step = int(single.step)
        needed = sum(x.nbytes for x in jax.tree.leaves(single))
        free = shutil.disk_usage(self._directory).free
        if free < needed:  # rather than to find out half-way
            raise UserError(
                f"{self._directory}: no room for the checkpoint of step {step}: it takes "
                f"{needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free; the last good "
                f"checkpoint is of step {self.committed_step() or 0}"
            )
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(single.online_params)):
            raise NotFinite(
                f"the parameters of step {step} are not finite: lower "
                f"config.optimizer.learning_rate, in another --workdir; the last checkpoint is of "
                f"step {self.committed_step() or 0}"
            )
        self._taken = (step, single, meta)

    def write(self) -> None:
        """Begins to write what was taken, if something was; returns when the writing has begun.

        Raises:
            Exception: what the writing of the one before raised, as soon as that is known.
        """
        if self._begun and not self._manager.is_saving_in_progress():
            self.wait()
        if self._taken is None:
            return
        step, single, meta = self._taken
        self._taken = None
        if step != self.latest_step:
            self._begun = True
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_as_dict(single)),
                    meta=ocp.args.JsonSave(meta | {"step": step, "versions": versions()}),
                ),
            )

    def meta(self) -> dict[str, Any]:
        """What the newest checkpoint belongs to."""
        return self._restore(self.latest_step, meta=ocp.args.JsonRestore()).meta

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (the newest by default) as host arrays.

        Args:
            like: a state of the same structure; arrays or `jax.ShapeDtypeStruct`.
            step: a step that has a checkpoint.

        Raises:
            UserError: it cannot be read.
        """
        # Host arrays in, host arrays out: no device layout is asked for or assumed.
        wanted = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _as_dict(like))
        step = self.latest_step if step is None else step
        restored = self._restore(step, state=ocp.args.StandardRestore(wanted)).state
        fields = jax.tree.map(np.asarray, restored)
        numbered = jax.tree.leaves(fields.pop("opt_state"))
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), numbered)
        return like.replace(**fields, opt_state=opt_state)

    def _restore(self, step: int | None, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # whatever Orbax, TensorStore or the disk says of a broken file
            others = [s for s in self._manager.all_steps() if s != step]
            hint = f"; move it away to go on from step {max(others)}" if others else ""
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise UserError(
                f"the checkpoint {os.path.join(self._directory, str(step))} cannot be read: "
                f"{reason[:200]}{hint}"
            ) from e

    def wait(self) -> None:
        """Returns when everything is written; raises what the writing raised."""
        self._begun = False
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, what was taken last too."""
        self.write()
        self._manager.wait_until_finished()
        self._manager.close()


def versions() -> dict[str, str]:
    """Of what decides a run's bits."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "numpy")
    found = {"selfsup-jax": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # such as tensorflow in place of tensorflow-cpu
            continue
    return found


def _not_told_twice(record: logging.LogRecord) -> bool:
    """Drops Orbax's error logs, tracebacks of its threads: what they tell is raised to us too."""
    return not ("orbax" in record.pathname and record.levelno >= logging.ERROR)


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries: names that a reader knows, free of optax's types."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    numbered = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return fields | {"opt_state": numbered}
