"""Orbax checkpoints of the training state; they do not depend on the number of devices."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp

from selfsup_jax import paths
from selfsup_jax.devices import hosts, parallel
from selfsup_jax.errors import NotFinite, UserError
from selfsup_jax.run import checkpoint_files, library_errors
from selfsup_jax.run.progress import log
from selfsup_jax.state import TrainState

_DAMAGED = "damaged_checkpoints"  # a folder beside `checkpoints`
# What the rest of a run makes anew where its workdir was.
_REMADE = {"checkpoints", "plots", library_errors.FILE}


class _Taken(NamedTuple):
    step: int
    state: TrainState
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one workdir.

    A checkpoint holds one copy of the state as host arrays (`state`) and a description of its run
    (`meta`, JSON: config, versions, position in the data). It is written in the background and
    atomically. Its number is the count of finished updates.

    Args:
        workdir: the run's directory; the checkpoints are in its folder `checkpoints/`.
        keep: how many of the newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step are never deleted; 0 for none.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """

    def __init__(self, workdir: str, keep: int = 1, keep_every: int = 0):
        self._directory = paths.absolute(os.path.join(workdir, "checkpoints"))
        self._keep_every = keep_every
        self._workdir = workdir
        self._lock_then = self._lock()
        self._pending: _Taken | None = None
        self._writing: _Taken | None = None  # until it is known to be on disk
        self._read_back = False
        library_errors.catch(workdir)
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                create=True,
                cleanup_tmp_directories=True,  # left by a killed process
            ),
            item_names=(checkpoint_files.STATE, checkpoint_files.META),
            item_handlers={checkpoint_files.META: checkpoint_files.MetaHandler()},
        )
        self._damaged: set[int] = set()
        self._arrays: dict[int, checkpoint_files.Arrays] = {}  # of the newest, until `restore`
        try:
            self._find_whole()
        except UserError:
            self._manager.close()
            raise

    def _find_whole(self) -> None:
        """Reads the newest checkpoint that is whole, and names the newer ones."""
        errors = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self._arrays = {step: checkpoint_files.read(self._folder(step))[1]}
            except checkpoint_files.Damaged as e:
                self._damaged.add(step)
                errors.append(e)
                continue
            for error in errors:
                log(f"{error}; going on from step {step}")
            return
        if errors:
            raise UserError(
                f"{errors[0]}; no other one is whole: move {self._directory} away to start again"
            ) from errors[0]

    def _folder(self, step: int | None) -> str:
        return os.path.join(self._directory, str(step))

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, or None. Its write may still be in progress."""
        return max(set(self._manager.all_steps()) - self._damaged, default=None)

    def committed_step(self) -> int | None:
        """The newest step that is complete on disk, or None. Waits for the write in progress."""
        with contextlib.suppress(Exception):
            self.wait()
        steps = set(ocp.utils.checkpoint_steps(self._directory))
        return max(steps - self._damaged, default=None)

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
        if not all(np.isfinite(x).all() for x in jax.tree.leaves(single.online_params)):
            raise NotFinite(
                f"the parameters of step {step} are not finite: lower "
                f"config.optimizer.learning_rate, in another --workdir; the last checkpoint is of "
                f"step {self.committed_step() or 0}"
            )
        self._pending = _Taken(step, single, meta)
        if self._is_gone():
            self._rescue(self._pending)
        needed = sum(x.nbytes for x in jax.tree.leaves(single))
        free = sys.maxsize  # in a bucket
        if not paths.is_bucket(self._directory):
            free = shutil.disk_usage(self._directory).free
        if free < needed:  # fail before the write, not during it
            self._pending = None
            raise UserError(
                f"{self._directory}: no space for the checkpoint of step {step}: it needs "
                f"{needed / 1e6:,.3g} MB, and {free / 1e6:,.3g} MB are free; the last good "
                f"checkpoint is of step {self.committed_step() or 0}"
            )

    def write(self) -> None:
        """Starts to write the copy that `take` made, if there is one; does not wait for the end.

        Raises:
            Exception: the error of the previous write, as soon as it is known; after the first
                write `UserError` if what was written cannot be read.
        """
        saving = self._manager.is_saving_in_progress()
        if self._writing and (self._pending or not saving):  # a second save would wait too
            self.wait()
        if self._pending is None:
            return
        taken, self._pending = self._pending, None
        step, single, meta = taken
        self._set_aside()
        if step != self.latest_step:
            self._writing = taken
            state = _as_dict(single)
            meta = meta | {"step": step, "versions": checkpoint_files.versions()}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    meta=checkpoint_files.MetaArgs(meta, checkpoint_files.flat(state)),
                ),
            )

    def _set_aside(self) -> None:
        """Moves damaged checkpoints away: their steps will be saved again."""
        if not self._damaged:
            return
        aside = os.path.join(os.path.dirname(self._directory), _DAMAGED)
        if hosts.is_writer():
            paths.makedirs(aside)
            there = paths.listdir(aside) if paths.isdir(aside) else []
            for step in self._damaged:
                others = sum(name.partition(".")[0] == str(step) for name in there)
                name = f"{step}.{others}" if others else str(step)
                paths.move(self._folder(step), os.path.join(aside, name))
        hosts.wait_for_all("damaged checkpoints")
        log(f"damaged checkpoints are moved to {aside}")
        self._damaged = set()
        self._manager.reload()

    def meta(self) -> dict[str, Any]:
        """The `meta` of the newest checkpoint."""
        return checkpoint_files.upgraded_meta(
            checkpoint_files.read_meta(self._folder(self.latest_step))
        )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (the newest by default) as host arrays.

        Args:
            like: a state of the same structure; arrays or `jax.ShapeDtypeStruct`.
            step: a step that has a checkpoint.

        Raises:
            UserError: the checkpoint cannot be read, is damaged, or has another structure.
        """
        step = self.latest_step if step is None else step
        arrays = self._arrays.pop(step or 0, None)
        if arrays is None:
            arrays = checkpoint_files.read(self._folder(step))[1]
        like_fields = _as_dict(like)
        wanted = checkpoint_files.flat(like_fields)
        for name in sorted(wanted.keys() | arrays.keys()):
            shapes = [list(x[name].shape) if name in x else "nothing" for x in (arrays, wanted)]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"the checkpoint {self._folder(step)} does not fit this run: {name} has the "
                    f"shape {shapes[0]}, expected {shapes[1]}"
                )
        leaves = [arrays[name].astype(x.dtype, copy=False) for name, x in wanted.items()]
        fields = jax.tree.unflatten(jax.tree.structure(like_fields), leaves)
        opt_leaves = jax.tree.leaves(fields.pop("opt_state"))
        opt_state = jax.tree.unflatten(jax.tree.structure(like.opt_state), opt_leaves)
        return like.replace(**fields, opt_state=opt_state)

    def wait(self) -> None:
        """Returns when all writes are finished; raises as `write`."""
        writing, self._writing = self._writing, None
        try:
            self._manager.wait_until_finished()
        except Exception:
            if writing and jax.process_count() == 1 and self._is_gone():
                self._rescue(writing)
            raise
        if writing and not self._read_back:
            self._read_back = True
            if hosts.is_writer():
                self._check_first_save()

    def _check_first_save(self) -> None:
        """Reads the first checkpoint of this process: a disk may not hold what it was given."""
        step = self._manager.latest_step()
        try:
            checkpoint_files.read(self._folder(step))
        except checkpoint_files.Damaged as e:
            raise UserError(
                f"{e}, although it was written without an error: no checkpoint in "
                f"{self._directory} can be trusted; use another --workdir"
            ) from e

    def _is_gone(self) -> bool:
        """Whether the workdir is not the one of the start any more; alike on all hosts.

        Orbax would create it again. Inodes do not show it: some file systems change them.
        """
        same = paths.is_bucket(self._directory)  # where the lock shows it
        same = same or (self._lock() == self._lock_then and paths.isdir(self._directory))
        gone = hosts.is_writer() and not same
        return bool(hosts.gather_hosts(np.asarray([gone])).any())

    def _lock(self) -> str | None:
        """What `workdir.locked` has written there: another run's workdir has another one."""
        path = os.path.join(self._workdir, ".lock")
        with contextlib.suppress(OSError, ValueError), paths.open(path) as f:
            return f.read()
        return None

    def _rescue(self, taken: _Taken) -> NoReturn:
        """Saves a state although the workdir was moved or deleted, and tells where."""
        self._pending = self._writing = None  # `close` writes nothing to another run's workdir
        folder = self._workdir.rstrip(os.sep)
        taken_by_another = paths.exists(folder) and set(paths.listdir(folder)) - _REMADE
        if hosts.gather_hosts(np.asarray([bool(taken_by_another)])).any():
            folder += f".step_{taken.step}"
        rescue = Checkpoints(folder)
        rescue._pending = taken
        rescue.close()
        raise UserError(
            f"--workdir={self._workdir}: was moved or deleted while the run was going on; step "
            f"{taken.step} is saved in {folder}: the same command with --workdir={folder} goes on"
        )

    def close(self) -> None:
        """Finishes all writes, also that of the last `take`."""
        self.write()
        self._manager.wait_until_finished()
        self._manager.close()


def newest_step(workdir: str) -> int | None:
    """The newest step that is complete on disk, or None; waits for nothing."""
    return max(ocp.utils.checkpoint_steps(os.path.join(workdir, "checkpoints")), default=None)


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The state as nested dictionaries with plain names, without optax's types."""
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    numbered = {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    return fields | {"opt_state": numbered}
