"""The hosts of a job: which one writes, waiting for each other, gathering arrays, agreeing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from selfsup_jax.devices import job
from selfsup_jax.devices.link import Link, members
from selfsup_jax.errors import HostsDiffer

_job: job.Job | None = None  # see `join`
_MOST_FIELDS = 20  # in one message


def is_writer() -> bool:
    """True on the one host that writes logs, plots and results."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Blocks until every host has reached this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def reached_preemption(step: int) -> bool:
    """True if a host of the job received SIGTERM: at the same step on every host.

    All hosts must call it at each step. `jax.distributed` handles the signal; with one host: False.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def gather_hosts(tree: Any) -> Any:
    """Concatenates each host's NumPy arrays along axis 0, host 0's first; the same on every host.

    Hosts may hold different numbers of rows.
    """
    if jax.process_count() == 1:
        return tree
    rows = len(jax.tree.leaves(tree)[0])
    all_rows = multihost_utils.process_allgather(np.asarray([rows])).reshape(-1)

    def gather(x: np.ndarray) -> np.ndarray:
        padded = np.zeros((int(all_rows.max()), *x.shape[1:]), x.dtype)
        padded[:rows] = x
        stacked = multihost_utils.process_allgather(padded)
        return np.concatenate([part[:n] for part, n in zip(stacked, all_rows, strict=True)])

    return jax.tree.map(gather, tree)


def of_all(what: str, value: Any) -> list[Any]:
    """What each process gives, in their order; all hosts must call it.

    It waits for as long as it takes: nothing is computed on devices, whose collectives time out.

    Args:
        what: names the call: the same on all hosts.
        value: must be JSON.
    """
    if _job is not None:
        groups = _job.link.exchange(what, value)
        given = {process: value for value, processes in groups for process in processes}
        return [given[process] for process in sorted(given)]
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)  # JAX found the hosts by itself
    ends = np.cumsum(gather_hosts(np.asarray([len(text)])))
    return [json.loads(part.tobytes()) for part in np.split(gather_hosts(text), ends[:-1])]


def of_first(what: str, value: Any) -> Any:
    """The first host's value; see `of_all`. The others may give anything."""
    return of_all(what, value if is_writer() else None)[0]


# ------------------------------------------------------------------------------ the same job


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Compares what must be equal on all hosts; all hosts must call it.

    Nothing is computed on devices, where hosts that differ would wait for each other for ever.

    Args:
        what: names the call: the same on all hosts.
        facts: name -> a value that JSON can hold.

    Raises:
        HostsDiffer: on every host, with each name, its values, and which processes have them.
    """
    if _job is None:
        return
    compare(_job.link.exchange(what, dict(facts)))


def compare(groups: Sequence[tuple[Any, list[int]]]) -> None:
    """Raises `HostsDiffer` if there is more than one of the facts that processes gave."""
    names = sorted({name for given, _ in groups for name in given})
    different = [described for name in names if (described := _difference(name, groups))]
    if not different:
        return
    more = len(different) - _MOST_FIELDS
    shown = different[:_MOST_FIELDS] + [f"and {more} more"] * (more > 0)
    raise HostsDiffer(f"the hosts differ: {'; '.join(shown)}")


def _difference(name: str, groups: Sequence[tuple[Any, list[int]]]) -> str:
    """`config.seed is 0 on process 0, 1 on process 1`; empty if all have the same value."""
    holders: dict[str, list[int]] = {}
    for given, processes in groups:
        value = json.dumps(given[name]) if name in given else "missing"
        holders.setdefault(value, []).extend(processes)
    if len(holders) == 1:
        return ""
    each = (f"{value} on {members(sorted(who))}" for value, who in holders.items())
    return f"{name} is {', '.join(each)}"


# ------------------------------------------------------------------ the start and the end


def join(
    address: str,
    processes: int,
    process: int,
    start_timeout: float,
    host_timeout: float,
    local_devices: Sequence[int] | None = None,
) -> None:
    """Joins the other processes of the job; from then on, the loss of one ends this one.

    Raises:
        UserError: some can't be found within `start_timeout` seconds, or the address is invalid.
    """
    global _job
    job.parse_address(address)  # before anything is started
    _job = job.Job(process, processes, host_timeout)
    _job.start(address, start_timeout, local_devices)


def end_others(address: str, processes: int, process: int, timeout: float, line: str) -> None:
    """Joins the other processes only to end them with this line and exit status 2.

    Raises:
        UserError: as `join`.
    """
    link = Link(process, processes, timeout, lambda loss: None)
    link.join(*job.parse_address(address), timeout)
    link.end(2, line)


def at_step(step: int) -> None:
    """Notes where this process is, for the line that tells of a lost host."""
    if _job is not None:
        _job.step = step
        _job.link.activity.pass_place()


def has_batch() -> None:
    """Notes that this process has the data of its next steps; all hosts must call it."""
    if _job is not None:
        _job.link.activity.pass_place()


@contextlib.contextmanager
def saves(saved: Callable[[], str]) -> Iterator[None]:
    """In this block, `saved` tells what is saved, in the line that tells of a lost host."""
    if _job is None:
        yield
        return
    before, _job.saved = _job.saved, saved
    yield
    _job.saved, _job.step = before, None


@contextlib.contextmanager
def sigterm_agreed() -> Iterator[None]:
    """In this block, SIGTERM ends no process at once: all hosts call `reached_preemption`."""
    if _job is None:
        yield
        return
    _job.agrees = True
    try:
        yield
    finally:
        _job.agrees = False
    if _job.sigterm:  # it came too late for a step
        _job.stop_now()


def finish() -> None:
    """Waits until no host needs another any more; call it before the process ends well."""
    if _job is not None:
        _job.link.finish()


def end(status: int, line: str, error: BaseException | None = None) -> None:
    """Tells the other hosts why this one ends before them; they end with this status and line.

    If the error is that of a collective, the process may end here: with a line about a lost host.
    """
    if _job is None:
        return
    if error is not None:
        _job.wait_if_lost(error)
    if isinstance(error, HostsDiffer):
        _job.link.finish()  # all have the same line of their own
    else:
        _job.link.end(status, line)


def several() -> bool:
    """True if this process has joined others with `join`."""
    return _job is not None
