"""Set-up of the process: joining other hosts, devices, memory, compiled code, profiling."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax

from selfsup_jax.devices import cluster, hosts, tpu_flags
from selfsup_jax.devices.collectives import groups_of_microbatch
from selfsup_jax.errors import UserError


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    start_timeout: float = 300.0,
    host_timeout: float = 60.0,
) -> None:
    """Joins the other hosts of the job, given by the arguments or the environment, if any.

    On TPU pods, under Slurm or Open MPI, and if `JAX_COORDINATOR_ADDRESS` is set,
    `jax.distributed` finds the other hosts by itself. Must be called before any device is used.

    Args:
        coordinator_address: `HOST:PORT` of process 0.
        num_processes, process_id: which of how many this is.
        start_timeout: seconds within which all must have started.
        host_timeout: seconds without a sign of life after which a host is lost.

    Raises:
        UserError: only some of the first three arguments are given, or one is invalid; process 0
            can't be reached; processes are missing.
    """
    if cluster.on_a_tpu_vm():
        tpu_flags.set_flags()
    for flag, seconds in (("start_timeout", start_timeout), ("host_timeout", host_timeout)):
        if not 1 <= seconds <= 1e6:
            raise UserError(f"--{flag}={seconds:g}: must be from 1 to 1,000,000 seconds")
    place = cluster.given(coordinator_address, num_processes, process_id)
    if place is None and cluster.is_around():
        place = cluster.found(start_timeout)
        if place is None:
            cluster.initialize_alone(start_timeout)
    if place is not None:
        address, processes, process, local_devices = place
        hosts.join(address, processes, process, start_timeout, host_timeout, local_devices)


def end_the_others(line: str, start_timeout: float, *given: Any) -> None:
    """Joins the other hosts of the job, if there are any, only to end them with this line.

    Args:
        line: why this process can't take part.
        start_timeout: seconds within which the others must have started.
        *given: the first three arguments of `start`.
    """
    with contextlib.suppress(UserError):  # the line of this process has been printed
        place = cluster.given(*given)
        if place is None and cluster.is_around():
            place = cluster.found(start_timeout)
        if place is not None:
            hosts.end_others(place.address, place.processes, place.process, start_timeout, line)


def use_cpu_devices(count: int, batch_size: int, accumulate_steps: int, bn_groups: int) -> None:
    """Divides the CPU into `count` devices; must be called before any device is used.

    XLA runs much of a step on one thread per device, so two devices on two cores need a fifth less
    time than one. `count` 0 means two if there are two cores and the global batch divides, else
    one. Nothing changes for accelerators, jobs of many hosts and an explicit `XLA_FLAGS`.
    """
    explicit = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if explicit or jax.distributed.is_initialized():
        return
    most = min(256, batch_size or 256)  # each needs an image, and takes a second to make
    if not 0 <= count <= most:
        raise UserError(f"--cpu_devices={count}: must be from 0 to {most}")
    if not count:
        groups = groups_of_microbatch(bn_groups, accumulate_steps)
        unit = 2 * max(1, accumulate_steps) * groups  # MoCo divides a device's part by groups
        divides = batch_size % unit == 0 and (groups == 1 or not groups % 2)
        count = 2 if (os.cpu_count() or 1) >= 2 and divides else 1
    jax.config.update("jax_num_cpu_devices", count)


def keep_freed_memory(step_pixels: float = math.inf) -> None:
    """Makes glibc keep freed memory; must be called before any device is used.

    Otherwise the temporary arrays of a step on the CPU are returned to the system after each step
    and come back as page faults: a fifth of the demo's time, a third of CIFAR-10's. Does nothing
    for other C libraries, or if `MALLOC_*` is set.

    Args:
        step_pixels: of all images of a step, which decide how large its temporary arrays are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(m_mmap_threshold, 32 * 2**20)  # the largest valid value
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)
    if step_pixels >= 2**15:  # of smaller ones glibc keeps even a single block
        _divide_temporaries()


def _divide_temporaries() -> None:
    """Has XLA ask for a program's temporary memory in blocks that glibc keeps.

    XLA takes all of it as one block, and what is above the threshold glibc always returns. Only
    where there is nothing but the CPU: accelerators have allocators of their own. A flag that XLA
    does not know would end the process, hence the versions. It also warns of each array that is
    larger than a block, thousands of times: not where its warnings are asked for.

    Such a program cannot be kept for the next start, of which JAX warns: a second start of a run
    on CIFAR-10 takes some ten seconds longer, and each step a quarter less.
    """
    flag, given = "xla_multiheap_size_constraint_per_heap", os.environ.get("XLA_FLAGS", "")
    known = jax.__version_info__ < (0, 13)
    silent = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") >= "2"  # `selfsup_jax/__init__.py`
    if known and silent and flag not in given and _only_cpus():
        os.environ["XLA_FLAGS"] = f"{given} --{flag}={25 * 10**6}".strip()
        warnings.filterwarnings("ignore", ".*Multiple temp buffer allocations found")


def _only_cpus() -> bool:
    """True if JAX cannot use anything but the CPU here; asks without starting a backend."""
    chosen = getattr(jax.config, "jax_platforms", None)
    if chosen:
        return chosen == "cpu"
    installed = [importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")]
    return not any(installed) and not importlib.metadata.entry_points(group="jax_plugins")


def device_memory() -> dict[str, float]:
    """The first local device's memory in GiB: in use, and the peak so far.

    Empty for devices without these statistics, such as the CPU.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_memory_gib", "peak_bytes_in_use": "device_memory_peak_gib"}
    return {name: stats[key] / 2**30 for key, name in names.items() if key in stats}


def devices() -> dict[str, Any]:
    """The kind and the number of the job's devices, for `results.json`."""
    return {"device_kind": jax.devices()[0].device_kind, "device_count": jax.device_count()}


def local_devices() -> dict[str, Any]:
    """The kind and the number of this host's devices, for comparing hosts."""
    local = jax.local_devices()
    return {"kind of the devices": local[0].device_kind, "devices per host": len(local)}


def profiler(workdir: str, first_step: int, num_steps: int) -> Callable[[int], Any]:
    """A function of the step that traces `num_steps` steps from `first_step` on (0: none)."""
    if not first_step:
        return lambda step: None
    from clu import periodic_actions  # imports TensorFlow

    return periodic_actions.Profile(
        logdir=workdir,
        num_profile_steps=num_steps,
        profile_duration_ms=None,
        first_profile=first_step,
        every_secs=None,
    )


def compute_dtype(name: str) -> str:
    """`float32` or `bfloat16`: `name`, or for `auto` the faster one on this kind of device."""
    if name != "auto":
        return name
    device = jax.local_devices()[0]
    # NVIDIA's GPUs compute in bfloat16 since Ampere, capability 8.0; AMD's have names, not numbers.
    capability = str(getattr(device, "compute_capability", ""))
    older = capability.replace(".", "", 1).isdigit() and float(capability) < 8
    return "float32" if device.platform == "cpu" or older else "bfloat16"


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """JAX computes on the CPU in this block, unless it was started without its CPU backend."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def bytes_of_a_device() -> int:
    """The memory of a device; on the CPU, the machine's, divided among this host's devices."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit or machine // jax.local_device_count()
