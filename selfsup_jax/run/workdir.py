"""A run's own directory: whose it is, what it holds, and that only one process writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from selfsup_jax.data.inputs import Data
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError
from selfsup_jax.run import checkpoint
from selfsup_jax.run.files import write_json
from selfsup_jax.run.progress import say

# Fields that may change when a run goes on: they don't touch the mathematics of its steps.
_FREE_FIELDS = (
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "eval.",
    "monitor.",
    "profile.",
    "data.dir",
    "data.download",
    "data.test_split",
    "data.max_undecodable",
)
_LENGTH_FIELDS = ("steps", "examples", "epochs")


def check_path(workdir: str) -> None:
    """Raises `UserError` for the address of a bucket: locally it would be a folder of that name."""
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: must be a path; mount the bucket to write to it")


@contextlib.contextmanager
def opened(config: ConfigDict, workdir: str) -> Iterator[checkpoint.Checkpoints]:
    """Makes the workdir and its checkpoints ready, for one run at a time.

    Raises:
        UserError: the workdir can't be written to, another process trains in it, or hosts see
            different checkpoints there.
    """
    with locked(workdir), checkpoints_of(config, workdir) as checkpoints:
        yield checkpoints


@contextlib.contextmanager
def checkpoints_of(config: ConfigDict, workdir: str) -> Iterator[checkpoint.Checkpoints]:
    """The checkpoints of a workdir that is locked; raises as `opened` does."""
    try:
        checkpoints = checkpoint.Checkpoints(
            workdir, config.keep_checkpoints, config.keep_every_steps
        )
    except OSError as e:
        raise UserError(f"--workdir={workdir}: cannot be written to: {e.strerror}") from e
    latest = hosts.gather_hosts(np.asarray([checkpoints.latest_step or 0]))
    if len(set(latest)) > 1:
        raise UserError(f"--workdir={workdir}: the hosts see different checkpoints there")
    try:
        yield checkpoints
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            checkpoints.close()
        raise
    checkpoints.close()


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Makes the workdir and takes it for this process; on all hosts.

    The system lets go of it however the process ends.

    Raises:
        UserError: it can't be written to, or another process is at work in it.
    """
    check_path(workdir)
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(workdir, exist_ok=True)
            if hosts.is_writer():
                _take(workdir, stack.enter_context(open(os.path.join(workdir, ".lock"), "a+")))
        except OSError as e:
            raise UserError(f"--workdir={workdir}: cannot be written to: {e.strerror}") from e
        hosts.wait_for_all("workdir")
        yield


def _take(workdir: str, lock: TextIO) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        raise UserError(
            f"--workdir={workdir}: process {lock.read().strip()} is at work there; wait for it, "
            "stop it, or take another"
        ) from e
    except OSError:  # a file system without locks: then nobody is kept out
        pass
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()


def describe_run(config: ConfigDict, data: Data) -> dict[str, Any]:
    """What makes a run this one and no other: its config, and what its data turned out to be."""
    found = {"train_images": data.train.num_examples, "classes": data.train.num_classes}
    return {"config": json.loads(config.to_json()), "found": found}


def flat_config(run: dict[str, Any]) -> dict[str, Any]:
    """`{"optimizer.name": ..., "found.classes": ...}` of what `describe_run` gave."""
    return flatten(run["config"] | {"found": run["found"]})


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """`{"a.b": ...}` of nested dictionaries."""
    return flatten_dict(tree, sep=".")


def meta(run: dict[str, Any], step: int, undecodable: Iterable[str] = ()) -> dict[str, Any]:
    """What a checkpoint of step `step` says of itself, beside its state.

    The next example is the one at `batch` of the order of `epoch`: it follows from the step, so
    that no reader's position can be lost.
    """
    steps_per_epoch = run["found"]["train_images"] // run["config"]["batch_size"]
    epoch, batch = divmod(step, steps_per_epoch)
    position = {"epoch": epoch, "batch": batch, "steps_per_epoch": steps_per_epoch}
    written_on = {"device_count": jax.device_count(), "host_count": jax.process_count()}
    broken = {"undecodable": sorted(undecodable)}
    return run | {"data_position": position} | broken | written_on


def take_over(data: Data, saved: dict[str, Any]) -> None:
    """Goes on from a checkpoint's `meta`: the broken images that were found before it count too."""
    data.undecodable.names.update(saved["undecodable"])
    if data.train.stream is not None and saved["host_count"] != jax.process_count():
        say(
            f"{data.train.name} is streamed, in an order that depends on the number of hosts: "
            f"{saved['host_count']} before, {jax.process_count()} now, so that this epoch repeats "
            "some images and leaves out others"
        )


def check_same_run(run: dict[str, Any], saved: dict[str, Any], workdir: str) -> None:
    """Checks that a run may go on from a checkpoint: nothing that its steps depend on differs.

    Args:
        run: see `describe_run`.
        saved: the checkpoint's `meta`.
        workdir: for messages.

    Raises:
        UserError: naming every field that differs, and both values.
    """
    before = flat_config(saved)
    now = flat_config(run)
    free: tuple[str, ...] = _FREE_FIELDS
    if not before.get("keep_every_steps"):  # else another multiple would delete what is kept
        free += ("keep_every_steps",)
    if not _length_matters(run["config"]) and not _length_matters(saved["config"]):
        free += _LENGTH_FIELDS
    different = [
        field
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field) and not _is_one_of(field, free)
    ]
    if different:
        told = "; ".join(
            f"{field if field.startswith('found.') else f'config.{field}'}={now.get(field)!r}: the "
            f"run in {workdir} has {before.get(field)!r}"
            for field in different
        )
        length = any(field in _LENGTH_FIELDS for field in different)
        why = " (its schedules depend on its length)" if length else ""
        raise UserError(f"{told}{why}; take what it has, or another --workdir")
    then, here = saved["versions"], checkpoint.versions()
    moved = [f"{k} {then[k]} -> {here.get(k)}" for k in then if then[k] != here.get(k)]
    if moved:
        say(f"other versions than the run began with, so its last bits may differ: {moved}")


def _length_matters(config: dict[str, Any]) -> bool:
    """Whether a step's mathematics depends on how many are to come."""
    schedules = {config["optimizer"]["schedule"], config.get("tau_schedule", "constant")}
    return schedules != {"constant"}


def write_config(run: dict[str, Any], workdir: str) -> None:
    """Writes `config.json`: the resolved config, and what the data turned out to be."""
    if hosts.is_writer():
        try:
            write_json(
                os.path.join(workdir, "config.json"), run["config"] | {"found": run["found"]}
            )
        except OSError as e:
            raise UserError(f"--workdir={workdir}: cannot be written to: {e.strerror}") from e


def _is_one_of(field: str, names: tuple[str, ...]) -> bool:
    """`names` are fields, or sections with their dot."""
    return any(field.startswith(n) if n.endswith(".") else field == n for n in names)
