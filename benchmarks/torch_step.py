"""Compares our training step with PyTorch's on this machine, the two in turn.

    python -m benchmarks.torch_step --torch-python=/path/to/its/python --json=torch.json
    python -m benchmarks.torch_step --cases byol:64 --px=16 --rounds=20 --steps=5

PyTorch and torchvision may be installed for another interpreter. Each case and variant is a process
that waits; in every round each of them takes `--steps` steps, one after the other, so that other
work on the machine slows all of them. The ratio is the median over the rounds of theirs to ours.
With the defaults: ResNet-18 a quarter as wide, 32 px, float32.

Both sides compute the same: no augmentation, SGD, no probe, as `gpu/step_jax.py` and
`gpu/step_torch.py` say; ours as a run has it, with two devices on two cores. `--full` times ours
with everything that a run has.

    python -m selfsup_jax.data.pack --name=cifar10 --out=cifar10.npz
    python -m benchmarks.torch_step --torch-python=PYTHON --data=cifar10.npz --steps=20 --rounds=5

With `--data`, whole training loops: ours with the images on the device, all augmentation, the
online probe and all metrics; theirs with lightly's transforms and loader, whose processes run on
the same cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu import step_shared
from benchmarks.gpu.step_shared import Case

THEIRS = ("eager", "compile")


def our_step(args: argparse.Namespace, case: Case) -> Callable[[], Any]:
    """A function that takes one step and waits for it."""
    import importlib

    import jax

    from benchmarks import report
    from benchmarks.gpu import step_jax
    from selfsup_jax.devices import parallel, process

    config = step_jax.config_of(case, "full" if args.full else "plain", args.dtype)
    process.use_cpu_devices(args.cpu_devices, case.batch, 1, config.bn_groups)
    process.keep_freed_memory()
    build = importlib.import_module(f"{case.method}_jax.method").build
    method = build(config, step_shared.CLASSES if args.full else None, 10_000, 0)
    batch = report.fake_batch(case.batch, (case.px, case.px))
    if not args.full:
        del batch["label"]
    batch = parallel.shard(batch)
    step = parallel.step_over_devices(method.train_step)
    holder = [parallel.replicate(method.init_state, jax.random.PRNGKey(0))]

    def call() -> None:
        holder[0], metrics = step(holder[0], batch)
        jax.block_until_ready((holder[0], metrics))

    return call


def their_step(args: argparse.Namespace, case: Case) -> Callable[[], Any]:
    """The same in PyTorch."""
    import torch

    from benchmarks.gpu import step_torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    step = step_torch.Step(args, case, args.worker == "compile", device)

    def call() -> None:
        step(0)
        float(step.loss)  # waits

    return call


def our_loop(args: argparse.Namespace, case: Case) -> Callable[[], Any]:
    """As `our_step` on CIFAR-10, with all that a run has: crops, augmentation, optimizer, probe."""
    import importlib

    import jax

    from benchmarks.gpu import step_jax
    from selfsup_jax.data import inputs
    from selfsup_jax.devices import parallel, process
    from selfsup_jax.training import calls

    config = step_jax.config_of(case, "full", args.dtype)
    config.data.update(name="arrays", dir=args.data)
    if case.method == "moco":
        config.symmetric = False  # as `step_torch.py`
    process.use_cpu_devices(args.cpu_devices, case.batch, 1, config.bn_groups)
    process.keep_freed_memory()
    data = inputs.load_data(config)
    build = importlib.import_module(f"{case.method}_jax.method").build
    method = build(config, data.train.num_classes, 10_000, 0)
    feed, batches = inputs.feed(config, data.train), inputs.train_batches(config, data, 0)
    call = calls.Call(method.train_step, feed, calls.steps_per_call(config, feed))
    holder = [parallel.replicate(method.init_state, jax.random.PRNGKey(0))]

    def step() -> None:
        batch = next(batches)
        batch.pop("name", None)
        holder[0], *rest = call(holder[0], [batch])
        jax.block_until_ready(rest)

    return step


def their_loop(args: argparse.Namespace, case: Case) -> Iterator[Callable[[], Any]]:
    """As `their_step` on lightly's views, from its loader; a new one, with new workers, a round."""
    import numpy as np
    import torch
    from lightly import transforms
    from PIL import Image

    from benchmarks.gpu import step_torch

    # The views of lightly's benchmark of CIFAR-10.
    sharp = {"input_size": case.px, "gaussian_blur": 0.0}
    views = {
        "byol": lambda: transforms.BYOLTransform(
            transforms.BYOLView1Transform(**sharp), transforms.BYOLView2Transform(**sharp)
        ),
        "moco": lambda: transforms.MoCoV2Transform(**sharp),
        "simclr": lambda: transforms.SimCLRTransform(cj_strength=0.5, **sharp),
    }[case.method]()
    images = np.load(args.data)["train_images"]

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> list[torch.Tensor]:
            return views(Image.fromarray(images[i]))

    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": args.workers}
    loader = torch.utils.data.DataLoader(Images(), case.batch, **options)
    train = step_torch.Step(args, case, args.worker == "compile", torch.device("cpu"))
    while True:
        batches = iter(loader)

        def step(batches: Any = batches) -> None:
            train.update(*(x.contiguous(memory_format=torch.channels_last) for x in next(batches)))
            float(train.loss)

        yield step
        del batches, step  # the workers end with the last reference


def rounds(args: argparse.Namespace, case: Case) -> Iterator[Callable[[], Any]]:
    """The steps of each round."""
    if args.data and args.worker != "ours":
        return their_loop(args, case)
    make = (our_loop if args.data else our_step) if args.worker == "ours" else their_step
    return itertools.repeat(make(args, case))


def work(args: argparse.Namespace) -> None:
    """A worker: for each line with a number, times so many steps, after the warm-up."""
    (case,) = step_shared.cases(args)
    start = time.perf_counter()
    steps_of_rounds = rounds(args, case)
    next(steps_of_rounds)()
    print(json.dumps({"first_s": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        step = next(steps_of_rounds)
        for _ in range(args.warmup):
            step()
        steps, start, used = int(line), time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        row = {"s": time.perf_counter() - start, "cpu_s": time.process_time() - used}
        del step
        print(json.dumps({k: v / steps for k, v in row.items()}), flush=True)


class Worker:
    """The process of one variant of a case, and its times."""

    def __init__(self, python: str, variant: str, case: str, rest: list[str]):
        command = [python, "-m", "benchmarks.torch_step", "--cases", case, "--worker", variant]
        root = pathlib.Path(__file__).resolve().parent.parent
        env = os.environ | {"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*command, *rest], cwd=root, env=env, **pipes)
        self.variant = variant
        self.first = self.read()["first_s"]
        self.rows: list[dict[str, float]] = []

    def read(self) -> dict[str, float]:
        """The worker's next answer."""
        while True:
            line = self.process.stdout.readline()  # type: ignore[union-attr]
            if not line:
                raise SystemExit(f"the process of `{self.variant}` ended early")
            if line.startswith("{"):
                return json.loads(line)

    def run(self, steps: int) -> None:
        """Lets it take some steps."""
        self.process.stdin.write(f"{steps}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        self.rows.append(self.read())

    def median(self, field: str) -> float:
        """Of the rounds."""
        return statistics.median(row[field] for row in self.rows)


def compare(args: argparse.Namespace, case: str, theirs: list[str]) -> list[tuple[str, float, str]]:
    """The rows of one case."""
    rest = [f"--{k}={getattr(args, k)}" for k in ("px", "depth", "width", "dtype")]
    rest += [f"--{k}={getattr(args, k)}" for k in ("data", "workers", "warmup")]
    rest += [f"--cpu-devices={args.cpu_devices}", *(["--full"] if args.full else [])]
    pythons = {"ours": sys.executable} | dict.fromkeys(theirs, args.torch_python)
    workers = [Worker(python, variant, case, rest) for variant, python in pythons.items()]
    for _ in range(args.rounds):
        for worker in workers:
            worker.run(args.steps)
    rows, ours, batch = [], workers[0], int(case.split(":")[1])
    for worker in workers:
        worker.process.communicate()
        name = f"{case} {worker.variant}"
        rows += [
            (f"{name} step", 1e3 * worker.median("s"), "ms"),
            (f"{name} fastest round", 1e3 * min(row["s"] for row in worker.rows), "ms"),
            (f"{name} images per second", batch / worker.median("s"), "1/s"),
            (f"{name} first step", worker.first, "s"),
        ]
        if not args.data:  # it would lack the loader's
            rows.append((f"{name} CPU time", 1e3 * worker.median("cpu_s"), "ms"))
        if worker is not ours:
            pairs = list(zip(worker.rows, ours.rows, strict=True))
            for field, of in (("s", "time"), ("cpu_s", "CPU time"))[: 1 if args.data else 2]:
                ratio = statistics.median(a[field] / b[field] for a, b in pairs)
                rows.append((f"{case} {of}, {worker.variant} over ours", ratio, "x"))
    return rows


def main() -> None:
    """Prints the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parents = [step_shared.parser()]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, parents=parents)
    p.set_defaults(cases=["byol:128", "moco:128", "simclr:128"], depth=18, px=32, width=0.25)
    p.set_defaults(dtype="float32")
    p.add_argument("--torch-python", default=sys.executable, help="an interpreter with PyTorch")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--steps", type=int, default=3, help="of each variant in a round")
    p.add_argument("--cpu-devices", type=int, default=0, help="ours; 0: as in a run")
    p.add_argument("--full", action="store_true", help="ours with all that a run has")
    p.add_argument("--warmup", type=int, default=2, help="steps before each round's")
    p.add_argument("--data", default="", help="CIFAR-10 as .npz: whole loops, with the input")
    p.add_argument("--workers", type=int, default=2, help="processes of lightly's loader")
    p.add_argument("--json", default="", help="where to write the same as flat JSON")
    p.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        return work(args)
    theirs = args.torch
    packages = ["torch", "torchvision", *(["lightly"] if args.data else [])]
    probe = [args.torch_python, "-c", f"import {', '.join(packages)}"]
    try:
        subprocess.run(probe, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        print(f"{args.torch_python} lacks {', '.join(packages)} (--torch-python): ours alone")
        theirs = []
    from benchmarks import report

    rows = [row for case in args.cases for row in compare(args, case, theirs)]
    what = "loops" if args.data else "steps"
    title = f"{what}: ResNet-{args.depth} x{args.width:g}, {args.px} px, {args.dtype}"
    return report.show(title, rows, args.json)


if __name__ == "__main__":
    main()
