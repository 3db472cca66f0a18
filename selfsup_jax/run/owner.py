"""Which job a workdir belongs to: another one may not write there."""

from __future__ import annotations

import os
from typing import Any

from selfsup_jax import paths
from selfsup_jax.errors import UserError
from selfsup_jax.run import identity
from selfsup_jax.run.files import read_json

CONFIG, RESULTS, RECORD = "config.json", "results.json", "runs.json"
_SWEEP, _PRETRAIN = "sweep", "pretrain"


def check(directory: str, job: str) -> None:
    """Checks that a workdir is new or belongs to a job of this kind.

    Args:
        directory: the workdir; it need not exist.
        job: `config.job`.

    Raises:
        UserError: it belongs to another job, which is named, or holds a file of one of these names
            that no job wrote.
    """
    owner = _owner(directory)
    if owner is not None and owner[0] != job:
        raise UserError(
            f"--workdir={directory}: belongs to {owner[1]}, which a {job} job would overwrite; "
            "use another --workdir"
        )


def check_unfinished(run: identity.Flat, directory: str) -> None:
    """Checks that a workdir without checkpoints has no results of another pretraining run.

    Args:
        run: the flat config of the run that is about to start there.
        directory: its workdir.

    Raises:
        UserError: it has; the message names every field that differs.
    """
    files = [os.path.join(directory, name) for name in (CONFIG, RESULTS)]
    if not all(paths.exists(file) for file in files):
        return  # a run that had saved nothing may be corrected and started again
    before = identity.flat(read_json(files[0]))
    different = identity.differences(run, before, identity.steps_free(run, before))
    if different:
        text = identity.described(different, "the finished run there")
        raise UserError(f"--workdir={directory}: {text}; use another --workdir")


def _owner(directory: str) -> tuple[str, str] | None:
    """(kind, description) of the job that a workdir belongs to; None if it is new."""
    config, results, record = (os.path.join(directory, name) for name in (CONFIG, RESULTS, RECORD))
    for path in (config, results, record):
        if paths.isdir(path):
            raise UserError(f"{path}: is a folder, where a file is written; move it away")
    if paths.exists(record):
        return _SWEEP, "a sweep (it has a runs.json)"
    if paths.exists(config):
        return _described(read_json(config))
    if paths.exists(results):
        # A damaged config.json was moved away; the checkpoints have the config too.
        if paths.isdir(os.path.join(directory, "checkpoints")) and "method" in (
            values := read_json(results)
        ):
            return _described(values)
        return "", "an unknown job (it has a results.json without a config.json)"
    return None


def _described(config: dict[str, Any]) -> tuple[str, str]:
    if not {"job", "method"} & set(config):
        return "", "another program (its config.json names no job)"
    job = str(config.get("job", _PRETRAIN))
    if job == _PRETRAIN:
        return job, f"a pretraining run ({config.get('method')})"
    facts = config.get("data_info")
    origin = facts.get("checkpoint") if isinstance(facts, dict) else None
    return job, f"a {job} job" + (f" of {origin}" if origin else "")
