"""From what one chip needs for a step to hours and cost of a run."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax

from selfsup_jax import paths
from selfsup_jax.errors import UserError
from selfsup_jax.plan import chips, hlo
from selfsup_jax.plan.chips import Pod
from selfsup_jax.run import files

FILE = "plan.json"  # in a workdir


class Program(NamedTuple):
    """What one chip needs for a step; None is what cannot be known.

    Attributes:
        flops: floating-point operations.
        moved: bytes that its instructions read and write, as the compiler counts them: also what
            they find in the chip's fast memory, and what a fused one reads twice.
        arrays: bytes of the arrays in its main memory, once for each kernel that reads or writes
            them; for a GPU those of convolutions and matmuls.
        arguments: bytes of state and batch.
        temporaries: bytes of all else that is in memory at one time.
        collectives: what it says to the others.
        seconds: of compiling.
        text: the compiled program.
        shortage: the compiler's message if the step does not fit into memory.
    """

    flops: float
    moved: float | None
    arrays: float
    arguments: float
    temporaries: float | None
    collectives: hlo.Collectives
    seconds: float
    text: str = ""
    shortage: str = ""


class Run(NamedTuple):
    """What is planned.

    Attributes:
        batch_size: global.
        steps: of the whole run; None if the number of images is not known.
        price: of a chip for an hour, in any currency; None if not given.
        cpu_seconds: of the host for an image with its views; 0 if the images are on the chips.
    """

    batch_size: int
    steps: int | None
    price: float | None
    cpu_seconds: float


def estimate(run: Run, pod: Pod, program: Program) -> dict[str, Any]:
    """The plan as flat JSON. Per chip, per step and in bytes and seconds where no unit is named."""
    chip, temporaries = pod.chip, program.temporaries
    bounds = {
        "flops": program.flops / chip.flops,
        "memory": program.arrays / chip.bandwidth,
        "links": program.collectives.sent / chip.links if pod.chips > 1 else 0.0,
    }
    fits: bool | None = None
    if program.shortage or program.arguments > chip.memory:
        fits = False
    elif temporaries is not None:
        fits = program.arguments + temporaries <= chip.memory
    plan: dict[str, Any] = {
        "pod": pod.name,
        "chips": pod.chips,
        "hosts": pod.hosts,
        "batch_size": run.batch_size,
        "batch_per_chip": run.batch_size // pod.chips,
        "fits": fits,
        "memory_bytes": chip.memory,
        "argument_bytes": program.arguments,
        "temporary_bytes": temporaries,
        "compile_seconds": program.seconds,
    }
    if program.shortage:
        return plan | {"shortage": program.shortage}
    seconds = max(bounds.values())
    rate = run.batch_size / seconds
    plan |= {
        "flops_per_step": program.flops,
        "hbm_bytes_per_step": program.moved,
        "hbm_array_bytes_per_step": program.arrays,
        "sent_bytes_per_step": program.collectives.sent,
        **{f"{name.replace('-', '_')}s": n for name, n in program.collectives.counts.items()},
        **{f"step_seconds_by_{name}": value for name, value in bounds.items()},
        "step_seconds_lower_bound": seconds,
        "bound_by": max(bounds, key=lambda name: bounds[name]),
        "images_per_second_upper_bound": rate,
    }
    if program.moved is not None:
        plan["step_seconds_by_all_bytes"] = program.moved / chip.bandwidth
    if pod.is_tpu:
        plan.setdefault("all_reduces", 0)
    if run.cpu_seconds:
        plan["images_per_second_and_host"] = rate / pod.hosts
        plan["cpu_cores_per_host"] = rate / pod.hosts * run.cpu_seconds
    if run.steps is not None:
        hours = run.steps * seconds / 3600
        plan |= {"steps": run.steps, "hours": hours, "chip_hours": hours * pod.chips}
        if run.price is not None:
            plan["cost"] = hours * pod.chips * run.price
    return plan


def share_of_plan(workdir: str, batch_size: int, images_per_second: float) -> float | None:
    """Measured speed over the bound of the workdir's plan; None without one for these devices."""
    path = os.path.join(workdir, FILE)
    if not paths.exists(path):
        return None
    try:
        plan = files.read_json(path)
        pod, bound = chips.pod(plan["pod"]), plan["images_per_second_upper_bound"]
        same = (plan["chips"], plan["batch_size"]) == (jax.device_count(), batch_size)
    except (UserError, KeyError, TypeError):  # of several pods, or damaged: it is only a remark
        return None
    attached, kind = jax.devices()[0].device_kind, pod.chip.device_kind
    alike = attached == kind if pod.is_tpu else kind in attached
    return images_per_second / bound if same and alike else None
