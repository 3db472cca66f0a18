"""How this process uses its machine: CPU devices, memory, compiled programs. No mathematics."""

from __future__ import annotations

import ctypes
import os

import jax

from selfsup_jax.errors import UserError


def use_cpu_devices(count: int, batch_size: int, accumulate_steps: int, bn_groups: int) -> None:
    """Makes the CPU `count` devices; must be called before any device is used.

    XLA runs much of a step on one thread per device, so that two devices on two cores finish it
    a fifth sooner than one. With `count` 0: two where there are two cores and the global batch
    divides, else one. Accelerators, jobs of many hosts and an explicit `XLA_FLAGS` stay as they
    are.
    """
    explicit = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if explicit or jax.distributed.is_initialized():
        return
    if count < 0:
        raise UserError(f"--cpu_devices={count}: must not be negative")
    if not count:
        groups = max(1, bn_groups // max(1, accumulate_steps))
        divides = batch_size % max(1, 2 * accumulate_steps) == 0 and (groups == 1 or not groups % 2)
        count = 2 if (os.cpu_count() or 1) >= 2 and divides else 1
    jax.config.update("jax_num_cpu_devices", count)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory rather than hand it back to the system and ask again.

    Without it a step on the CPU takes tens of thousands of page faults for its temporaries: a fifth
    of the demo's time. Other C libraries, and an environment that sets `MALLOC_*`, are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(m_mmap_threshold, 32 * 2**20)  # the largest that glibc takes
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 64 * 2**20)


def keep_compiled(directory: str) -> None:
    """Keeps compiled programs in `directory` from run to run (nowhere if empty).

    `JAX_COMPILATION_CACHE_DIR`, where it is set, goes before.
    """
    if directory and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
