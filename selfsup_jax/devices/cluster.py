"""Which processes a job has, as the command line or the environment says; imports JAX late."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from selfsup_jax import command_line
from selfsup_jax.errors import UserError


class Place(NamedTuple):
    """The address of process 0, how many processes there are, and which one this is."""

    address: str
    processes: int
    process: int
    local_devices: Sequence[int] | None = None


def given(address: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place that three arguments tell; None if none of them is given.

    Raises:
        UserError: only some of them are given, or one is invalid.
    """
    if address is None and processes is None and process is None:
        return None
    if address is None or processes is None or process is None:
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together: "
            "give all three, or none to start from the environment"
        )
    if processes < 1:
        raise UserError(f"--num_processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise UserError(
            f"--process_id={process}: must be from 0 to num_processes - 1 = {processes - 1}"
        )
    return Place(address, processes, process)


def still_to_join(argv: Sequence[str]) -> tuple[Any, ...]:
    """The arguments of `process.end_the_others` after its line; () if there are no other hosts.

    Args:
        argv: the command line, whose flags may not be parsed yet, or cannot be.
    """
    kinds = {"coordinator_address": str, "num_processes": int, "process_id": int}
    place = [command_line.value_of(argv, name, kind) for name, kind in kinds.items()]
    try:
        if given(*place) is None and not in_environment():
            return ()
    except UserError:
        return ()  # it is not known which process this is
    seconds = command_line.value_of(argv, "start_timeout", float)
    return seconds if seconds and 1 <= seconds <= 1e6 else 300.0, *place


def is_around() -> bool:
    """True if this process is one of several, or may be, as on a TPU machine."""
    return in_environment() or on_a_tpu_vm()


def in_environment() -> bool:
    """True if `jax.distributed.initialize()` without arguments would find more than one host."""
    env = os.environ
    many_tpu_hosts = "," in env.get("TPU_WORKER_HOSTNAMES", "")
    many_slices = "MEGASCALE_COORDINATOR_ADDRESS" in env
    coordinator = "JAX_COORDINATOR_ADDRESS" in env or "COORDINATOR_ADDRESS" in env
    ranks = {"SLURM_NTASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}
    launched = any(int(env.get(n, "1") or 1) > 1 and rank in env for n, rank in ranks.items())
    return many_tpu_hosts or many_slices or coordinator or launched


def on_a_tpu_vm() -> bool:
    """True on a TPU VM: it has the chips and libtpu, and its metadata names the other hosts."""
    has_chips = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    if not has_chips or os.environ.get("JAX_PLATFORMS", "tpu").find("tpu") < 0:
        return False
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    return True


def found(start_timeout: float) -> Place | None:
    """The place that JAX finds in the environment; None if there is none, or JAX is another one."""
    variable = (os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None)
    # JAX has no public name for this; without it, `jax.distributed` finds and starts all itself.
    try:
        from jax._src.clusters import ClusterEnv

        address, processes, process, local_devices = (
            ClusterEnv.auto_detect_unset_distributed_params(*variable, int(start_timeout))
        )
    except (ImportError, AttributeError, TypeError, ValueError):  # another version of JAX
        return None
    if address is None or process is None or processes is None or processes < 2:
        return None
    return Place(address, processes, process, local_devices)


def initialize_alone(start_timeout: float) -> None:
    """Has JAX find the other hosts; without `hosts.join`, their loss is JAX's to tell."""
    import jax

    try:
        jax.distributed.initialize(initialization_timeout=int(start_timeout))
    except ValueError as e:
        if in_environment():  # Open MPI 5, for one, does not tell where process 0 is
            raise UserError(
                f"the environment names several processes, but not how they find each other ({e}): "
                "give --coordinator_address=HOST:PORT of process 0, --num_processes, --process_id"
            ) from e
        # Else a TPU machine outside a pod, which has no other hosts.
