"""Measures all that matters on an accelerator, most valuable first; `accelerator.sh` runs it.

    benchmarks/accelerator.sh 25 --data=cifar10.npz          # minutes
    benchmarks/accelerator.sh 2 --data=DIR --tiny            # a trial on the CPU

Neither TensorFlow nor a network is needed. The stages, each in a process of its own:

- smoke: one float32 step of each method, compared with the CPU's, then bfloat16 steps;
- steps: our step and PyTorch's side by side (`benchmarks.gpu.step`), for CIFAR-10 and ImageNet;
- loop: the training loop beside the bare step, data on the device (`benchmarks.loop`);
- cifar10: `run_experiment.py` with each method's `cifar10` preset, first seed 0 of all methods. The
  data are the arrays of `python -m selfsup_jax.data.pack --name=cifar10`.

The same command goes on where the last one ended: stages that are done are left out, and a run that
was stopped by the clock resumes from its checkpoint. The results are written to
`benchmarks/results/DEVICE/`, and the tables from them to `benchmarks/results/DEVICE/README.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

METHODS = ("byol", "moco", "simclr")
# lightly's benchmark: kNN of the best epoch on the test images, and minutes on an A6000.
PUBLISHED = {"byol": (86.9, 122), "moco": (83.8, 129), "simclr": (84.7, 98)}
TINY = {
    "batch_size": 16,
    "steps": 6,
    "encoder.depth": 10,
    "encoder.width": 0.0625,
    "log_every_steps": 3,
    "monitor.diagnostics_every_steps": 3,
    "monitor.knn_every_steps": 0,
    "monitor.plots_every_steps": 0,
    "eval.max_train_images": 40,
    "eval.max_test_images": 20,
    "eval.knn_k": 5,
    "eval.random_init": False,
}


class Stage(NamedTuple):
    """A command, and the file that shows that it is done."""

    name: str
    command: list[str]
    result: pathlib.Path
    least_minutes: float  # it is not begun with less time left
    environment: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


def stages(args: argparse.Namespace, out: pathlib.Path) -> list[Stage]:
    """All stages, most valuable first."""
    python, module = sys.executable, [sys.executable, "-m"]
    reference = out / "smoke_cpu.npz"
    methods = METHODS[: 1 if args.tiny else None]
    width = ["--width=0.0625"] if args.tiny else []
    least = 0.0 if args.tiny else 1.0
    smoke = [*module, "benchmarks.gpu.smoke"]
    options = ["--methods", *methods, *width]
    made = [
        Stage(
            "smoke_cpu",
            [*smoke, "save", str(reference), *options],
            reference,
            least,
            {"JAX_PLATFORMS": "cpu"},
        ),
        Stage(
            "smoke",
            [*smoke, "check", str(reference), *options, f"--steps={0 if args.tiny else 20}"],
            out / "smoke.log",
            least,
        ),
    ]

    def step(name: str, minutes: float, *options: str) -> Stage:
        pythons = [f"--torch-python={args.torch_python}", f"--jax-python={python}"]
        command = [*module, "benchmarks.gpu.step", "both", f"--minutes={minutes}", *pythons]
        command += [f"--name={name}.jsonl", *options]
        return Stage(name, command, out / f"{name}.jsonl", minutes, {"OUT": str(out)})

    def run(method: str, seed: int) -> Stage:
        config = f"--config=configs/{method}.py:cifar10"
        given = {"data.name": "arrays", "data.dir": args.data, "seed": seed}
        given |= TINY | {"bn_groups": 1} if args.tiny else {}
        folder = out / "cifar10" / f"{method}_seed_{seed}"
        fields = [f"--config.{name}={value}" for name, value in given.items()]
        command = [python, "run_experiment.py", config, f"--workdir={folder}", *fields]
        return Stage(f"cifar10 {method} seed {seed}", command, folder / "results.json", least)

    tiny = ["--px=32", "--depth=18", "--dtype=float32", "--repeats=1", "--passes=1", "--cache="]
    if args.tiny:
        made.append(step("step_cifar10", 1, "--cases", "byol:2", "--ours", "plain", *tiny, *width))
    else:
        small = ["--px=32", "--depth=18", "--cases", "byol:128", "byol:512", "moco:128"]
        made.append(step("step_cifar10", 5, *small, "simclr:128"))
    loop = [*module, "benchmarks.loop", "--config=configs/byol.py:cifar10", "--placements=device"]
    loop += ["--config.data.name=arrays", f"--config.data.dir={args.data}"]
    loop += [f"--json={out / 'loop.json'}"]
    if args.tiny:
        loop += ["--steps=4", "--rounds=1", "--config.encoder.width=0.0625"]
        loop += ["--config.batch_size=8", "--config.encoder.depth=10"]
    made.append(Stage("loop", loop, out / "loop.json", least))
    made += [run(method, 0) for method in methods]
    if not args.tiny:
        for cases in (["byol:256"], ["moco:256", "simclr:256"]):
            name = "step_resnet50_" + "_".join(case.partition(":")[0] for case in cases)
            made.append(step(name, 8, "--cases", *cases))
        made += [run(method, seed) for seed in (1, 2) for method in METHODS]
    return made


def carry_out(stage: Stage, out: pathlib.Path, until: float) -> str:
    """Runs a stage until the given time (of `time.time`); returns how it ended."""
    left = until - time.time()
    if left < 60 * stage.least_minutes:
        return "no time left"
    log = out / f"{stage.name.replace(' ', '_')}.log"
    start = time.time()
    stage.result.unlink(missing_ok=True)
    with open(log, "a") as f:
        process = subprocess.Popen(
            stage.command, stdout=f, stderr=subprocess.STDOUT, env=os.environ | stage.environment
        )
        try:
            status = process.wait(timeout=max(1.0, left))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # a run saves its step
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return f"stopped by the clock after {time.time() - start:.0f} s"
    how = "done" if status == 0 else f"FAILED with status {status}"
    return f"{how} in {time.time() - start:.0f} s"


def tables(out: pathlib.Path, device: str) -> str:
    """Markdown tables of all results in a folder; what was not run is marked."""
    lines = [f"# {device}", "", f"Written {datetime.date.today()} by `benchmarks/accelerator.sh`."]
    smoke = out / "smoke.log"
    if smoke.exists():
        differences = [
            x for x in smoke.read_text().splitlines() if "difference" in x or "smoke:" in x
        ]
        lines += ["", "One float32 step beside the CPU's:", "", "```", *differences, "```"]
    rows = [
        json.loads(line)
        for path in sorted(out.glob("step_*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    rows = [row for row in rows if "step_ms" in row]
    if rows:
        columns = ("method", "model", "px", "batch", "framework", "variant")
        head = (*columns, "ms in a row", "images/s", "MFU", "peak GiB")
        lines += ["", "Training steps, two views an image:", "", "| " + " | ".join(head) + " |"]
        lines.append("|" + "---|" * len(head))
        for row in rows:
            rate = 1e3 * row["batch"] / row["in_a_row_ms"]
            values = [f"{row['in_a_row_ms']:.2f}", f"{rate:,.0f}", f"{row['mfu']:.3f}"]
            values.append(f"{row['peak_gib']:.2f}" if row.get("peak_gib") else "")
            lines.append("| " + " | ".join([*(str(row[c]) for c in columns), *values]) + " |")
    if (out / "loop.json").exists():
        loop = json.loads((out / "loop.json").read_text())
        over = loop["loop,_data_on_the_device,_over_the_bare_step"]
        ms = loop["loop,_data_on_the_device"]
        lines += [
            "",
            f"The loop, BYOL on CIFAR-10: {ms:.2f} ms a step, {over:.1f} % over the bare step.",
        ]
    lines += [
        "",
        "CIFAR-10, ResNet-18, 200 epochs, top-1 in per cent (kNN: k 200, last epoch):",
        "",
    ]
    lines.append("| method | seed | kNN | linear probe | images/s | lightly's kNN, best epoch |")
    lines.append("|---|---|---|---|---|---|")
    for method in METHODS:
        done = sorted((out / "cifar10").glob(f"{method}_seed_*/results.json"))
        published = f"{PUBLISHED[method][0]} ({PUBLISHED[method][1]} min on an A6000)"
        if not done:
            lines.append(f"| {method} | | not run | | | {published} |")
        for path in done:
            result = json.loads(path.read_text())
            numbers = [f"{100 * result[k]:.1f}" for k in ("knn_top1", "linear_probe_top1")]
            rate = f"{result.get('images_per_second', 0):,.0f}"
            seed = str(result["seed"])
            lines.append("| " + " | ".join([method, seed, *numbers, rate, published]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Carries out the stages that are left; returns 1 if one failed."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("minutes", type=float, nargs="?", default=25.0)
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz, or a folder of .npy")
    parser.add_argument("--out", default="benchmarks/results", help="a folder, for a folder DEVICE")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a trial on the CPU")
    args = parser.parse_args(argv)
    until = time.time() + 60 * args.minutes
    if not os.path.exists(args.data):
        print(f"error: --data={args.data}: there is no such file or folder", file=sys.stderr)
        return 2
    kind = "import jax; print(jax.devices()[0].device_kind)"
    device = subprocess.run(
        [sys.executable, "-c", kind], check=True, capture_output=True, text=True
    ).stdout.strip()  # in a process of its own, which gives the device back
    out = pathlib.Path(args.out, re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"))
    (out / "cifar10").mkdir(parents=True, exist_ok=True)
    record = out / "stages.json"
    ended: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    failed = False
    for stage in stages(args, out):
        if ended.get(stage.name, "").startswith("done") and stage.result.exists():
            continue
        ended[stage.name] = carry_out(stage, out, until)
        failed |= ended[stage.name].startswith("FAILED")
        print(f"{stage.name}: {ended[stage.name]}", flush=True)
        record.write_text(json.dumps(ended, indent=2) + "\n")
        (out / "README.md").write_text(tables(out, device))
    print((out / "README.md").read_text())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
