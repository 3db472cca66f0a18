"""`run_experiment.py --plan=PODS`: one plan or a table of several, on the screen and in a file."""

from __future__ import annotations

import os
from typing import Any

from ml_collections import ConfigDict

from selfsup_jax import config as configs
from selfsup_jax import durations, paths
from selfsup_jax.build import Build, find
from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.plan import chips, compiled
from selfsup_jax.plan.chips import Pod
from selfsup_jax.plan.estimate import FILE, Program, Run, estimate
from selfsup_jax.run import files
from selfsup_jax.viz.plots import pods as drawing

# Training images and classes of well-known data sets, so that none need be opened.
_KNOWN = {
    "imagenet2012": (1_281_167, 1000),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "imagenette": (9_469, 10),
    "stl10": (100_000, None),
    "digits": (4_000, 10),
}
# The host's CPU time for an ImageNet image, as measured on our machine (`docs/input.md`).
_INPUT_MS = {"host": 1.8, "device": 1.1}


def run(
    config: ConfigDict,
    pods: str,
    workdir: str,
    images: int | None = None,
    price: float | None = None,
    build: Build | None = None,
) -> list[dict[str, Any]]:
    """Plans a pretraining run; prints it, writes `plan.json` and for several pods `plan.png`.

    Args:
        config: of the run.
        pods: such as `v5e:4x4`, `v5e:4x4,v5e:8x8` or, for the largest batch, `v5e:4x4:batch`.
        workdir: where the files are written.
        images: training images; None for what is known of the data set's name.
        price: of a chip for an hour.
        build: the method's `build`; None for that of the package that `config.method` names.

    Raises:
        UserError: an invalid config or pod; the batch does not divide; no compiler.
    """
    if config.job != "pretrain":
        raise UserError(f"--plan: for pretraining, not for config.job={config.job!r}")
    if images is not None and images < 1:
        raise UserError(f"--plan_images={images}: must be at least 1")
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"--plan_price={price}: must be a finite number, not negative")
    paths.check(workdir, "--workdir")
    names = [name.removesuffix(":batch") for name in pods.split(",")]
    planned = [chips.pod(name) for name in names]
    config = config.copy_and_resolve_references()
    if config.compute_dtype == "auto":
        config.compute_dtype = "bfloat16"  # what all these chips compute in
    configs.check_values(config)
    build = build or find(config.method)
    known, classes = _KNOWN.get(config.data.name.split("/")[0], (None, None))
    images = images or known
    for pod, name in zip(planned, pods.split(","), strict=True):
        if not name.endswith(":batch"):
            _check_batch(config, pod)
    plans = []
    for pod, name in zip(planned, pods.split(","), strict=True):
        own = config.copy_and_resolve_references()
        if name.endswith(":batch"):
            own.batch_size, program = largest_batch(config, build, classes, pod)
        else:
            program = compiled.program(config, build, classes, pod)
        plan = estimate(_run(own, pod, images, price), pod, program)
        plans.append(plan)
        print("\n".join(described(plan, pod)) + "\n", flush=True)
        if program.text:
            with files.writing_to(workdir):
                paths.makedirs(workdir)
                with files.whole_file(os.path.join(workdir, "plan.hlo")) as f:
                    f.write(program.text)
    with files.writing_to(workdir):
        paths.makedirs(workdir)
        only = plans[0] if len(plans) == 1 else {"plans": plans}
        files.write_json(os.path.join(workdir, FILE), only)
        if len(plans) > 1:
            print(table(plans))
            drawing.draw(os.path.join(workdir, "plan.png"), plans)
    return plans


def _check_batch(config: Any, pod: Pod) -> None:
    groups, parts = config.bn_groups, config.accumulate_steps
    parallel.check_batch(config.batch_size, parts, groups, devices=pod.chips)


def _run(config: Any, pod: Pod, images: int | None, price: float | None) -> Run:
    steps, cpu_ms = None, _INPUT_MS[config.data.crop_on]
    if images:
        steps = durations.total_and_warmup(config, images)[0]
        stored = images * config.data.image_size**2 * 3
        if config.data.placement != "host" and stored < config.data.device_share * pod.chip.memory:
            cpu_ms = 0.0  # the images are on the chips
    elif config.steps is not None:
        steps = config.steps
    return Run(config.batch_size, steps, price, cpu_ms / 1e3)


def largest_batch(config: Any, build: Build, classes: int | None, pod: Pod) -> tuple[int, Program]:
    """The largest global batch that fits, to 8 images a chip, and its program.

    Memory is nearly a linear function of the batch: two programs give the line, further ones make
    sure. Takes three to six compilations.

    Raises:
        UserError: not even 8 images a chip fit, or the batch does not divide.
    """
    if not pod.is_tpu:
        raise UserError(f"--plan={pod.name}:batch: a GPU's temporaries are not known beforehand")
    config = config.copy_and_resolve_references()

    def program_of(per_chip: int) -> Program | None:
        config.batch_size = per_chip * pod.chips
        _check_batch(config, pod)
        program = compiled.program(config, build, classes, pod)
        fits = not program.shortage and needed(program) <= pod.chip.memory
        print(f"{config.batch_size} images, {per_chip} a chip: {'fits' if fits else 'too many'}")
        return program if fits else None

    def needed(program: Program) -> float:
        return program.arguments + (program.temporaries or 0.0)

    low, high = 8, 32
    least = program_of(low)
    if least is None:
        raise UserError(f"--plan={pod.name}: not even {low} images a chip fit into its memory")
    best = program_of(high)
    while best is None:
        high -= 8
        best = least if high == low else program_of(high)
    if high == low:
        return low * pod.chips, best
    per_image = max(1.0, (needed(best) - needed(least)) / (high - low))
    most = int(high + (pod.chip.memory - needed(best)) / per_image) // 8 * 8
    while most > high:
        if (larger := program_of(most)) is not None:
            return most * pod.chips, larger
        most -= max(8, most // 32 // 8 * 8)
    return high * pod.chips, best


def described(plan: dict[str, Any], pod: Pod) -> list[str]:
    """A plan in a few lines of text."""
    gib, kind = 2.0**30, "chip" if pod.is_tpu else "GPU"
    lines = [
        f"plan for {pod.name}: {pod.chips} x {pod.kind}, {plan['batch_size']} images a step "
        f"({plan['batch_per_chip']} a {kind}); {'compiled' if pod.is_tpu else 'traced'} in "
        f"{plan['compile_seconds']:.0f} s"
    ]
    memory, arguments = plan["memory_bytes"] / gib, plan["argument_bytes"] / gib
    if plan["temporary_bytes"] is not None:
        used = plan["temporary_bytes"] / gib
        does = "fits" if plan["fits"] else "DOES NOT FIT"
        lines.append(
            f"  memory    {does}: state and batch {arguments:.2f} + temporaries {used:.2f} "
            f"of {memory:.1f} GiB a {kind}"
        )
    elif plan["fits"] is None:
        lines.append(
            f"  memory    state and batch {arguments:.2f} of {memory:.1f} GiB a {kind}; "
            "temporaries are not known beforehand"
        )
    if "shortage" in plan:
        return [*lines, f"  memory    DOES NOT FIT: {plan['shortage']}"]
    by = {name: 1e3 * plan[f"step_seconds_by_{name}"] for name in ("flops", "memory", "links")}
    lines += [
        f"  a step    {plan['flops_per_step'] / 1e12:.3g} TFLOP ({by['flops']:.3g} ms at the "
        f"peak), arrays of {plan['hbm_array_bytes_per_step'] / gib:.3g} GiB ({by['memory']:.3g} "
        f"ms), sends {plan['sent_bytes_per_step'] / 2**20:.3g} MiB ({by['links']:.3g} ms)",
        f"  speed     at most {plan['images_per_second_upper_bound']:,.0f} images/s: "
        f"{1e3 * plan['step_seconds_lower_bound']:.3g} ms a step, bound by {plan['bound_by']}",
    ]
    if "step_seconds_by_all_bytes" in plan:
        every = plan["step_seconds_by_all_bytes"]
        lines.append(
            f"            {plan['batch_size'] / every:,.0f} ({1e3 * every:.3g} ms) if all "
            f"{plan['hbm_bytes_per_step'] / gib:.3g} GiB that the compiler counts went through "
            "the memory"
        )
    if "cpu_cores_per_host" in plan:
        there = f" of its {pod.chip.cores}" * bool(pod.chip.cores)
        lines.append(
            f"  input     {plan['images_per_second_and_host']:,.0f} images/s from each of "
            f"{pod.hosts} hosts: {plan['cpu_cores_per_host']:.1f} cores{there}"
        )
    if "hours" in plan:
        cost = f", {plan['cost']:,.0f} at this price" if "cost" in plan else ""
        lines.append(
            f"  the run   {plan['steps']:,} steps: at least {plan['hours']:,.3g} hours, "
            f"{plan['chip_hours']:,.4g} {kind}-hours{cost}"
        )
    else:
        lines.append("  the run   its length is not known: give --plan_images or --config.steps")
    return lines


def table(plans: list[dict[str, Any]]) -> str:
    """Several plans, a line each."""
    rows = [("pod", "chips", "images a chip", "fits", "ms a step", "images/s", "hours", "chip-h")]
    for plan in plans:
        fits = {True: "yes", False: "no", None: "?"}[plan["fits"]]
        row = [plan["pod"], f"{plan['chips']}", f"{plan['batch_per_chip']}", fits]
        if "step_seconds_lower_bound" in plan:
            row.append(f"{1e3 * plan['step_seconds_lower_bound']:.3g}")
            row.append(f"{plan['images_per_second_upper_bound']:,.0f}")
        if "hours" in plan:
            row += [f"{plan['hours']:.3g}", f"{plan['chip_hours']:.4g}"]
        rows.append((*row, *[""] * (8 - len(row))))
    widths = [max(len(row[i]) for row in rows) for i in range(8)]
    return "\n".join(
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
