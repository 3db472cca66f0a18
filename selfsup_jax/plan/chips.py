"""Accelerators that a run can be planned for, and their names on the command line."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from selfsup_jax.errors import UserError


class Chip(NamedTuple):
    """Published figures of one chip; on a GPU, `links` is NVLink.

    Attributes:
        device_kind: what JAX calls it, or a part of that for GPUs.
        flops: bfloat16 operations per second.
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        links: bytes per second that it can send to other chips.
        per_host: chips of a host in a slice of several hosts.
        cores: virtual CPU cores of such a host; 0 if that depends on who rents it out.
        cores_per_chip: tensor cores that JAX sees as one device.
    """

    device_kind: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    per_host: int
    cores: int
    cores_per_chip: int = 1


# Google Cloud's pages "TPU v4", "v5e", "v5p", "v6e" and NVIDIA's data sheets of A100 80 GB and
# H100 SXM (dense).
TPUS = {
    "v4": Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 300e9, 4, 240, 2),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * 2**30, 819e9, 200e9, 4, 112),
    "v5p": Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, 600e9, 4, 208, 2),
    "v6e": Chip("TPU v6 lite", 918e12, 32 * 2**30, 1640e9, 400e9, 4, 180),
}
GPUS = {
    "a100": Chip("A100", 312e12, 80e9, 2039e9, 300e9, 8, 0),
    "h100": Chip("H100", 989e12, 80e9, 3350e9, 450e9, 8, 0),
}


class Pod(NamedTuple):
    """Several chips of one kind.

    Attributes:
        name: as the user wrote it, such as `v5e:4x4` or `gpu:h100x8`.
        kind: the chip's name.
        chip: its figures.
        chips: how many.
        is_tpu: whether its compiler can be asked (`libtpu`).
    """

    name: str
    kind: str
    chip: Chip
    chips: int
    is_tpu: bool

    @property
    def hosts(self) -> int:
        """Hosts that the chips are attached to."""
        return -(-self.chips // self.chip.per_host)


def pod(name: str) -> Pod:
    """The pod that `v5e:4x4`, `v4:2x2x4` or `gpu:h100x8` names.

    Raises:
        UserError: no such name.
    """
    if match := re.fullmatch(r"gpu:(\w+?)x(\d+)", name):
        kind, count, known = match[1], int(match[2]), GPUS
    elif match := re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name):
        kind, known = match[1], TPUS
        count = math.prod(int(n) for n in match[2].split("x"))
    else:
        raise UserError(f"--plan={name}: must be such as v5e:4x4, v4:2x2x4 or gpu:h100x8")
    if kind not in known or count < 1:
        raise UserError(f"--plan={name}: {kind} must be one of {', '.join(known)}")
    return Pod(name, kind, known[kind], count, known is TPUS)
