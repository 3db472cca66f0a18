"""The hosts of a job: which host writes, waiting for each other, gathering arrays."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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
