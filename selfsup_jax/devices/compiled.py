"""Compiled programs, kept for the next start: where, how many, and whether they are found again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from selfsup_jax.devices import cluster, hosts

AUTO = "auto"
_HOME = os.path.join("~", ".cache", "selfsup_jax", "compiled")
_FOLDER = "compiled"  # in a workdir
_PROGRAM, _USED = "-cache", "-atime"  # how JAX ends the names of a program and of its last use


def directory(flag: str, workdir: str) -> str:
    """Where compiled programs are kept; empty for nowhere.

    The machines of a pod or a cluster are new after a preemption, and what lies in their homes is
    lost: there, programs are kept in the workdir, which all hosts see. One machine keeps them in
    its home, for all runs.

    Args:
        flag: a directory, or `auto`.
        workdir: of the run.
    """
    if flag != AUTO:
        return flag
    shared = hosts.several() or cluster.on_a_tpu_vm() or "://" in workdir
    return str(epath.Path(workdir) / _FOLDER) if shared else _HOME


def keep(folder: str, most_bytes: float = 4e9) -> None:
    """Keeps compiled programs in `folder` for later starts (not at all if empty).

    JAX's own variables take precedence where they are set. What is in `JAX_COMPILATION_CACHE_DIR`
    is never cleared.

    Args:
        folder: on a disk, or in a bucket; all hosts should see the same.
        most_bytes: if there is more, the first host removes the programs that are the oldest.
    """
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = folder if "://" in folder else os.path.abspath(os.path.expanduser(folder))
        jax.config.update("jax_compilation_cache_dir", folder)
        if hosts.is_writer():
            _remove_oldest(epath.Path(folder), most_bytes)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _remove_oldest(folder: epath.Path, most_bytes: float) -> None:
    """JAX's own limit needs a lock that buckets do not have."""
    try:
        files = [file for file in folder.iterdir() if file.name.endswith(_PROGRAM)]
        sizes = {file: (file.stat().mtime, file.stat().length) for file in files}
    except OSError:  # not there yet, or another job removes them
        return
    total = sum(size for _, size in sizes.values())
    for file in sorted(files, key=lambda file: sizes[file]):
        if total <= most_bytes:
            return
        total -= sizes[file][1]
        for path in (file, folder / (file.name.removesuffix(_PROGRAM) + _USED)):
            path.unlink(missing_ok=True)


class Timed(NamedTuple):
    """How long it took to make something, and what was found of its programs.

    Attributes:
        seconds: until it was made.
        found: programs that had been kept.
        kept: programs that are kept from now on; only the first host writes. Those that take less
            than half a second to compile are not.
    """

    seconds: float
    found: int
    kept: int


def timed(make: Callable[[], Any]) -> tuple[Any, Timed]:
    """Calls `make`, and counts the programs that it compiles."""
    counts = {"cache_hits": 0, "cache_misses": 0}  # JAX calls it a miss when a program is written

    def count(event: str, **_: Any) -> None:
        name = event.removeprefix("/jax/compilation_cache/")
        if name in counts:
            counts[name] += 1

    jax.monitoring.register_event_listener(count)
    began = time.perf_counter()
    try:
        made = make()
    finally:
        jax.monitoring.unregister_event_listener(count)
    return made, Timed(time.perf_counter() - began, *counts.values())
