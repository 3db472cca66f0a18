"""Orbax checkpoints of the training state; they do not depend on the number of devices."""

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

    A checkpoint holds one copy of the state as host arrays (`state`) and a description of its run
    (`meta`, JSON: config, versions, position in the data). It is written in the background and
    atomically. Its number is the count of finished updates.

    Args:
        workdir: the run's directory; the checkpoints are in its folder `checkpoints/`.
        keep: how many of the newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are never deleted; 0 for none.
    """

    def __init__(self, workdir: str, keep: int = 1, keep_every: int = 0):
        self._directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
        self._keep_every = keep_every
        self._pending: tuple[int, TrainState, dict[str, Any]] | None = None
        self._write_started = False
        absl_logging.get_absl_logger().addFilter(_drop_orbax_errors)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                create=True,
                cleanup_tmp_directories=True,  # left by a killed process
            ),
            item_names=("state", "meta"),
        )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or None. Its write may still be in progress."""
        return self._manager.latest_step()

    def committed_step(self) -> int | None:
        """The newest step that is complete on disk, or None. Waits for the write in progress."""
        with contextlib.suppress(Exception):
            self.wait()
        return max(ocp.utils.checkpoint_steps(self._directory), default=None)

    @property
    def busy(self) -> bool:
        """True while the last checkpoint is still being written: a new one would have to wait.

        Always False in a job of several hosts, because they could see different values.
        """
        return jax.process_count() == 1 and self._manager.is_saving_in_progress()

    def keeps(self, step: int) -> bool:
        """True if the checkpoint of this step is never deleted."""
        return bool(self._keep_every) and step % self._keep_every == 0

    def take(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Copies a replicated state to the host; call `write` afterwards.

        These are two calls, so that the device can start the next step before the write starts.

        Raises:
            UserError: a parameter is not finite, or the disk is too full. The checkpoint saved
                before remains the newest.
        """
        single = parallel.unreplicate(state)
        step = int(single.step)
        needed = sum(x.nbytes for x in jax.tree.leaves(single))
        free = shutil.disk_usage(self._directory).free
        if free < needed:  # fail before the write, not during it
            raise UserError(
                f"{self._directory}: no space for the checkpoint of step {step}: it needs "
                f"{needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free; the last good "
                f"checkpoint is of step {self.committed_step() or 0}"
            )
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(single.online_params)):
            raise NotFinite(
                f"the parameters of step {step} are not finite: lower "
                f"config.optimizer.learning_rate, in another --workdir; the last checkpoint is of "
                f"step {self.committed_step() or 0}"
            )
        self._pending = (step, single, meta)

    def write(self) -> None:
        """Starts to write the copy that `take` made, if there is one; does not wait for the end.

        Raises:
            Exception: the error of the previous write, as soon as it is known.
        """
        if self._write_started and not self._manager.is_saving_in_progress():
            self.wait()
        if self._pending is None:
            return
        step, single, meta = self._pending
        self._pending = None
        if step != self.latest_step:
            self._write_started = True
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_as_dict(single)),
                    meta=ocp.args.JsonSave(meta | {"step": step, "versions": versions()}),
                ),
            )

    def meta(self) -> dict[str, Any]:
        """The `meta` of the newest checkpoint."""
        return upgraded_meta(self._restore(self.latest_step, meta=ocp.args.JsonRestore()).meta)

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (the newest by default) as host arrays.

        Args:
            like: a state of the same structure; arrays or `jax.ShapeDtypeStruct`.
            step: a step that has a checkpoint.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        # Reads host arrays, so that the result does not depend on any device layout.
        wanted = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), _as_dict(like))
        step = self.latest_step if step is None else step
        restored = self._restore(step, state=ocp.args.StandardRestore(wanted)).state
        fields = jax.tree.map(np.asarray, restored)
        leaves = jax.tree.leaves(fields.pop("opt_state"))
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), leaves)
        return like.replace(**fields, opt_state=opt_state)

    def _restore(self, step: int | None, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as e:  # Orbax, TensorStore and the disk raise many types
            others = [s for s in self._manager.all_steps() if s != step]
            hint = f"; move it away to resume from step {max(others)}" if others else ""
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise UserError(
                f"the checkpoint {os.path.join(self._directory, str(step))} cannot be read: "
                f"{reason[:200]}{hint}"
            ) from e

    def wait(self) -> None:
        """Returns when all writes are finished; raises the error of a failed write."""
        self._write_started = False
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes all writes, also that of the last `take`."""
        self.write()
        self._manager.wait_until_finished()
        self._manager.close()


def newest_step(workdir: str) -> int | None:
    """The newest step that is complete on disk, or None; waits for nothing."""
    return max(ocp.utils.checkpoint_steps(os.path.join(workdir, "checkpoints")), default=None)


def upgraded_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's `meta`, with the names of an earlier version replaced by the current ones."""
    return {("data_info" if name == "found" else name): value for name, value in meta.items()}


def versions() -> dict[str, str]:
    """The versions of the packages that affect the exact numbers of a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "numpy")
    installed = {"selfsup-jax": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # such as tensorflow in place of tensorflow-cpu
            continue
    return installed


def _drop_orbax_errors(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax's threads log: the same errors are also raised to us."""
    return not ("orbax" in record.pathname and record.levelno >= logging.ERROR)


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries with plain names, without optax's types."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    numbered = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return fields | {"opt_state": numbered}
