"""Several processes against one: what a step costs more, and what a bank of features takes.

    python -m benchmarks.processes step --rounds=9 --steps=5
    python -m benchmarks.processes bank --processes=4 --rows=40000

`step` runs the same training twice on this machine's CPU: as one process with two devices, and as
two processes with one device each, joined by gloo as hosts are. They take turns, so that whatever
else the machine does meets both; the ratio is the median over the rounds. CPU time stands beside
it, since on a busy machine waiting is not work. The step must be large (`--config`): below some
0.3 s it measures gloo. At the end both must have the same losses and parameters.

`bank` spreads `--rows` x `--width` features over so many processes, and searches them: what each
process then has in memory, beside its part of the bank.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import report
from selfsup_jax.build import find
from selfsup_jax.devices import hosts, parallel, process, table, wire
from selfsup_jax.evaluation import knn

_ROOT = Path(__file__).resolve().parents[1]
_CONFIG = "configs/byol.py:cifar10,batch_size=64,compute_dtype=float32"


class Job:
    """Processes of this machine that take the same commands, line by line."""

    def __init__(self, args: argparse.Namespace, processes: int, devices: int):
        self.processes, self.devices = processes, devices
        flags = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, "-m", "benchmarks.processes", args.what]
        command += [f"--config={args.config}", f"--rows={args.rows}", f"--width={args.width}"]
        command += [f"--processes={processes}", f"--port={wire.free_port()}"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.popens = [
            subprocess.Popen([*command, f"--worker={i}"], cwd=_ROOT, env=env, **pipes)
            for i in range(processes)
        ]

    def ask(self, line: str) -> list[dict[str, Any]]:
        """What each process answers."""
        for popen in self.popens:
            print(line, file=popen.stdin, flush=True)
        return [json.loads(popen.stdout.readline()) for popen in self.popens]

    def close(self) -> None:
        """Ends the processes."""
        for popen in self.popens:
            popen.kill()
            popen.wait()


# ------------------------------------------------------------------------------ the workers


def work(args: argparse.Namespace) -> None:
    """One process of a job: answers each line of stdin with a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where Gloo prints that it is connected
    if args.processes > 1:
        hosts.join(f"{wire.LOOPBACK}:{args.port}", args.processes, args.worker, 300.0, 60.0)
    answer = {"step": _steps, "bank": _bank}[args.what](args)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=answers, flush=True)


def _steps(args: argparse.Namespace) -> Any:
    """`N` does N steps; `save FILE` writes the parameters."""
    path, _, preset = args.config.partition(":")
    name = Path(path).stem
    config = importlib.import_module(f"configs.{name}").get_config(preset or None)
    process.keep_freed_memory(config.batch_size * config.data.image_size**2)
    method = find(config.method)(config, 10, 1000, 10)
    state = parallel.replicate(method.init_state, jax.random.PRNGKey(0))
    step = parallel.step_over_devices(method.train_step)
    mine = parallel.host_positions(config.batch_size)
    fake = report.fake_batch(config.batch_size, report.sides(config))
    batch = parallel.shard({name: rows[mine] for name, rows in fake.items()})

    def answer(line: str) -> dict[str, Any]:
        nonlocal state
        if line.startswith("save "):
            params = jax.tree.leaves(parallel.unreplicate(state.online_params))
            np.savez(line.removeprefix("save "), *params)
            return {}
        losses, cpu, began = [], time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            state, metrics = step(state, batch)
            losses.append(float(parallel.unreplicate(metrics["loss"])))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return {"seconds": seconds, "cpu": cpu, "losses": losses}

    return answer


def _bank(args: argparse.Namespace) -> Any:
    """Any line spreads the bank and searches it."""
    part = -(-args.rows // args.processes)
    rng = np.random.default_rng(args.worker)

    def parts() -> Any:
        for start in range(0, part, 256):
            yield rng.normal(size=(min(256, part - start), args.width)).astype(np.float32)

    def answer(_: str) -> dict[str, Any]:
        small = table.spread([np.ones((args.processes, args.width), np.float32)], 4096)
        knn.nearest(small, small[:4], 1)  # what JAX itself needs
        before = _peak()
        bank = table.spread(parts(), args.processes * part)
        placed = _peak()
        neighbours = knn.nearest(bank, bank[:1024], 20)
        right = bool((neighbours.rows[:, 0] == np.arange(1024)).all())
        own = sum(shard.data.nbytes for shard in bank.part.rows.addressable_shards)
        grown = {"placed": placed - before, "searched": _peak() - before}
        return {"own": own / 2**20, "right": right} | grown

    return answer


def _peak() -> float:
    """The most memory that this process has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


# ------------------------------------------------------------------------------ the tables


def compare_steps(args: argparse.Namespace) -> list[report.Row]:
    """Rows of one process against two."""
    jobs = [Job(args, 1, 2), Job(args, 2, 1)]
    try:
        losses: list[list[float]] = [[], []]
        times: list[list[float]] = [[], []]
        cpu: list[list[float]] = [[], []]
        for turn in range(-1, args.rounds):  # the first compiles
            for i in (0, 1) if turn % 2 else (1, 0):
                answers = jobs[i].ask(str(args.steps))
                losses[i] += answers[0]["losses"]
                if turn >= 0:
                    times[i].append(max(each["seconds"] for each in answers) / args.steps)
                    cpu[i].append(sum(each["cpu"] for each in answers) / args.steps)
        with tempfile.TemporaryDirectory() as folder:
            files = [f"{folder}/{i}.npz" for i in (0, 1)]
            for job, file in zip(jobs, files, strict=True):
                job.ask(f"save {file}")
            arrays = [list(np.load(file).values()) for file in files]
    finally:
        for job in jobs:
            job.close()
    # Biases before a norm have no gradient but rounding, hence the floor.
    apart = [np.abs(a - b).max() / max(np.abs(a).max(), 0.1) for a, b in zip(*arrays, strict=True)]
    medians = [statistics.median(x) for x in (*times, *cpu)]
    ratios = [two / one for one, two in zip(*times, strict=True)]
    return [
        ("one process of two devices", medians[0], "s a step"),
        ("two processes of one device", medians[1], "s a step"),
        ("two over one, median of the rounds", statistics.median(ratios), ""),
        ("CPU time, one process", medians[2], "s a step"),
        ("CPU time, two processes together", medians[3], "s a step"),
        ("CPU time, two over one", medians[3] / medians[2], ""),
        ("steps compared", len(losses[0]), ""),
        ("largest difference of a loss", float(np.abs(np.subtract(*losses)).max()), ""),
        ("largest difference of a parameter, of its array's largest or 0.1", float(max(apart)), ""),
    ]


def measure_bank(args: argparse.Namespace) -> list[report.Row]:
    """Rows of the memory of each process."""
    job = Job(args, args.processes, 1)
    try:
        answers = job.ask("go")
    finally:
        job.close()
    whole = args.rows * args.width * 4 / 2**20
    rows: list[report.Row] = [("whole bank", whole, "MiB")]
    rows.append(("the part of a process", max(each["own"] for each in answers), "MiB"))
    for name in ("placed", "searched"):
        most = max(each[name] for each in answers)
        rows.append((f"a process has grown by, once {name}", most, "MiB"))
    return [*rows, ("right", float(all(each["right"] for each in answers)), "")]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["step", "bank"])
    parser.add_argument("--config", default=_CONFIG, help="of the step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--processes", type=int, default=4, help="of the bank")
    parser.add_argument("--rows", type=int, default=40000, help="of the bank")
    parser.add_argument("--width", type=int, default=2048, help="of the bank")
    parser.add_argument("--json", default="", help="where to write the table as flat JSON")
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return work(args)
    title, rows = {
        "step": lambda: (f"a step of {args.config}", compare_steps(args)),
        "bank": lambda: (f"{args.rows:,} x {args.width} features", measure_bank(args)),
    }[args.what]()
    report.show(title, rows, args.json)


if __name__ == "__main__":
    main()
