"""A run's directory: which run it belongs to, what it contains, and the lock for one process."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import paths
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import hosts
from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.run import checkpoint, checkpoint_files, identity, lock
from selfsup_jax.run.files import write_json, writing_to
from selfsup_jax.run.progress import log

_PATTERNS = ("*", "?", "[", "\\")  # in paths


def check_path(workdir: str) -> None:
    """Checks that checkpoints can be written to a path.

    Raises:
        UserError: it is the address of a bucket that cannot be used, or has a character that the
            libraries of checkpoints take for a part of a pattern.
    """
    path = paths.absolute(workdir)
    try:
        path.encode()
    except UnicodeEncodeError as e:
        raise UserError(f"--workdir={workdir!a}: must be UTF-8, also the folders above") from e
    # Orbax looks for the parts of a checkpoint with `glob`, and TensorStore takes \\ for /: they
    # would write checkpoints that cannot be read, or mix those of two runs.
    taken = [c for c in _PATTERNS if c in path]
    if taken:
        where = "" if any(c in workdir for c in taken) else f" (it is {path})"
        raise UserError(
            f"--workdir={workdir}{where}: must not contain {' or '.join(taken)}, also not in the "
            "folders above: checkpoints cannot be written there; use another name"
        )
    paths.check(workdir, "--workdir")


@contextlib.contextmanager
def opened(config: ConfigDict, workdir: str) -> Iterator[checkpoint.Checkpoints]:
    """Creates and locks the workdir for one run at a time, and opens its checkpoints.

    Raises:
        UserError: the workdir cannot be written to, another process uses it, or the hosts see
            different checkpoints in it.
    """
    with locked(workdir), checkpoints_of(config, workdir) as checkpoints:
        yield checkpoints


def saved(workdir: str) -> str:
    """What a run that ends now has saved, in words for the line that tells why it ends."""
    step = checkpoint.newest_step(workdir)
    if step is None:
        return "nothing is saved yet; the same command on every host starts again"
    return f"step {step:,} is saved in {workdir}; the same command on every host resumes from it"


@contextlib.contextmanager
def checkpoints_of(config: ConfigDict, workdir: str) -> Iterator[checkpoint.Checkpoints]:
    """The checkpoints of a workdir that is already locked; raises as `opened` does."""
    with writing_to(f"--workdir={workdir}"):
        checkpoints = checkpoint.Checkpoints(
            workdir, config.keep_checkpoints, config.keep_every_steps
        )
    latest = hosts.gather_hosts(np.asarray([checkpoints.latest_step or 0]))
    if len(set(latest)) > 1:
        raise UserError(f"--workdir={workdir}: the hosts see different checkpoints there")
    try:
        with hosts.saves(lambda: saved(workdir)):
            yield checkpoints
    except BaseException as e:
        # After an error of one host the others are still at their steps, and no save can be begun.
        if jax.process_count() == 1 or isinstance(e, Stopped):
            with contextlib.suppress(Exception):  # keep the first error
                checkpoints.close()
        raise
    checkpoints.close()


@contextlib.contextmanager
def locked(workdir: str) -> Iterator[None]:
    """Creates the workdir and locks it for this process; all hosts must call it.

    Raises:
        UserError: the workdir cannot be written to, or another process uses it.
    """
    check_path(workdir)
    with contextlib.ExitStack() as stack:
        with writing_to(f"--workdir={workdir}"):
            paths.makedirs(workdir)
            if hosts.is_writer():
                stack.enter_context(lock.held(workdir))
        hosts.wait_for_all("workdir")
        yield


def describe_run(config: ConfigDict, train: Source) -> dict[str, Any]:
    """What identifies a run: its config, and facts about its data."""
    data_info = {"train_images": train.num_examples, "classes": train.num_classes}
    return {"config": json.loads(config.to_json()), "data_info": data_info}


def config_json(run: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json`: the resolved config and `data_info`."""
    return run["config"] | {"data_info": run["data_info"]}


def meta(run: dict[str, Any], step: int, undecodable: Iterable[str] = ()) -> dict[str, Any]:
    """The `meta` of a checkpoint of step `step`: what it stores beside the state.

    The run continues with batch `batch` of epoch `epoch`. Both follow from the step, so that no
    reader has to save its position.
    """
    steps_per_epoch = run["data_info"]["train_images"] // run["config"]["batch_size"]
    epoch, batch = divmod(step, steps_per_epoch)
    position = {"epoch": epoch, "batch": batch, "steps_per_epoch": steps_per_epoch}
    written_on = {"device_count": jax.device_count(), "host_count": jax.process_count()}
    broken = {"undecodable": sorted(undecodable)}
    return run | {"data_position": position} | broken | written_on


def checked_meta(saved: dict[str, Any], workdir: str) -> dict[str, Any]:
    """The `meta` of a checkpoint of a run, whose fields are checked.

    Raises:
        UserError: a field is missing or of another type, in a checkpoint without checksums.
    """
    types = {"config": dict, "data_info": dict, "versions": dict, "undecodable": list}
    for name, kind in (types | {"host_count": int}).items():
        if not isinstance(saved.get(name), kind):
            raise UserError(
                f"--workdir={workdir}: the meta of its newest checkpoint is damaged: "
                f"{name}={saved.get(name)!r}; move that checkpoint away"
            )
    return saved


def check_same_run(run: dict[str, Any], saved: dict[str, Any], workdir: str) -> None:
    """Checks that a run may resume from a checkpoint: no field that affects its steps differs.

    Args:
        run: see `describe_run`.
        saved: the checkpoint's `meta`.
        workdir: for messages.

    Raises:
        UserError: a field differs; the message names every such field and both values.
    """
    now, before = identity.flat(config_json(run)), identity.flat(config_json(saved))
    different = identity.differences(now, before, identity.steps_free(now, before))
    if different:
        length = any(field in identity.LENGTHS for field in different)
        why = " (its schedules depend on its length)" if length else ""
        text = identity.described(different, f"the run in {workdir}")
        raise UserError(f"{text}{why}; use the same value, or another --workdir")
    old, new = saved["versions"], checkpoint_files.versions()
    changed = [f"{k} {old[k]} -> {new.get(k)}" for k in old if old[k] != new.get(k)]
    if changed:
        log(f"other package versions than at the start, so the last bits may differ: {changed}")


def write_config(run: dict[str, Any], workdir: str) -> None:
    """Writes `config.json`, see `config_json`; only one host writes."""
    if hosts.is_writer():
        with writing_to(f"--workdir={workdir}"):
            write_json(os.path.join(workdir, "config.json"), config_json(run))
