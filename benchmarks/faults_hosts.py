"""Kills and stops hosts of a run at random steps, and lets hosts differ in every field.

python -m benchmarks.faults_hosts --faults=5

Every host is a process of this machine with networks that compile in seconds. A run of 2 processes
and one of 4 is hit `--faults` times with SIGKILL and as often with SIGSTOP, in one random process
each time, and started again. The other processes must end in time, with one line and status 75; in
the end the run must be equal, bit for bit, to one that nothing happened to. Exit status: 0 if all
that holds, 1 if not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import compare_runs, report
from selfsup_jax.devices import hosts
from selfsup_jax.devices.wire import LOOPBACK, free_port
from selfsup_jax.errors import LOST, HostsDiffer
from selfsup_jax.run import identity, same_job

_ROOT = Path(__file__).resolve().parents[1]
_POLL = 0.01
_PATIENCE = 300.0  # seconds for a start on a busy machine
_STEPS = 240
_FLAGS = (
    "--config=configs/byol.py:demo",
    f"--config.steps={_STEPS}",
    "--config.checkpoint_every_steps=5",
    "--config.log_every_steps=1",
    "--config.batch_size=16",
    "--config.data.image_size=8",
    "--config.data.test_resize=8",
    "--config.optimizer.warmup_steps=1",
    "--config.eval.enabled=False",
    "--config.monitor.diagnostics_every_steps=0",
    "--config.monitor.plots_every_steps=0",
)


class Ended(NamedTuple):
    """How the processes of a job ended, in the order of their numbers."""

    statuses: list[int]
    outputs: list[str]


class Hosts:
    """The processes of one job; they are killed at the end of the `with` block."""

    def __init__(self, count: int, top: Path, workdir: Path, timeout: float):
        port = free_port()
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "TINY_PAUSE": "0.02",
        }
        self.logs = [top / f"process_{i}.txt" for i in range(count)]
        self.popens = []
        for i, log in enumerate(self.logs):
            command = [sys.executable, "tests/tiny_process.py", *_FLAGS]
            command += [f"--workdir={workdir}", f"--compilation_cache={top / 'compiled'}"]
            command += [f"--coordinator_address={LOOPBACK}:{port}", f"--num_processes={count}"]
            command += [f"--process_id={i}", f"--host_timeout={timeout:g}"]
            with log.open("wb") as out:
                self.popens.append(
                    subprocess.Popen(
                        command,
                        **{"cwd": _ROOT, "env": environment, "stdout": out},
                        stderr=subprocess.STDOUT,
                    )
                )

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        for popen in self.popens:
            popen.kill()
            popen.wait()

    def step(self) -> int:
        """The last step that process 0 has shown."""
        shown = re.findall(r"\bstep (\d+)/", self.logs[0].read_text(errors="replace"))
        return int(shown[-1]) if shown else 0

    def wait_for_step(self, step: int) -> None:
        """Waits until process 0 has shown this step, or one process has ended."""
        deadline = time.monotonic() + _PATIENCE
        while self.step() < step and time.monotonic() < deadline:
            if any(popen.poll() is not None for popen in self.popens):
                return
            time.sleep(_POLL)

    def ended(self) -> Ended:
        """Waits for the end of all."""
        statuses = [popen.wait(_PATIENCE) for popen in self.popens]
        return Ended(statuses, [log.read_text(errors="replace") for log in self.logs])


def saved(workdir: Path) -> int:
    """The step of the newest checkpoint, or 0."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def strike(
    processes: Hosts, victim: int, number: signal.Signals, workdir: Path, timeout: float
) -> tuple[float, list[str]]:
    """Sends the signal; (seconds until all others have ended, what is wrong with their end)."""
    before, began = saved(workdir), time.monotonic()
    processes.popens[victim].send_signal(number)
    others = [i for i in range(len(processes.popens)) if i != victim]
    for i in others:
        processes.popens[i].wait(_PATIENCE)
    seconds = time.monotonic() - began
    if number == signal.SIGSTOP:
        processes.popens[victim].send_signal(signal.SIGCONT)
    statuses, outputs = processes.ended()
    wrong = [f"{seconds:.1f} s"] if seconds > timeout + 10 else []
    told = others if number == signal.SIGKILL else range(len(statuses))
    for i in told:
        lines = outputs[i].splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        if statuses[i] != LOST or len(errors) != 1 or lines[-1:] != errors:
            wrong.append(f"process {i}: status {statuses[i]}, {lines[-3:]}")
        elif f"process {victim} of " not in errors[0]:
            wrong.append(f"process {i}: {errors[0]}")
    if saved(workdir) < before:
        wrong.append(f"the checkpoint of step {before} is gone")
    return seconds, wrong


def kill_and_stop(count: int, faults: int, top: Path, rng: random.Random, timeout: float) -> Any:
    """Hits a run of so many processes; returns rows for the table, and what went wrong."""
    runs = [top / f"undisturbed_{count}", top / f"hit_{count}"]
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    with Hosts(count, top, runs[0], timeout) as processes:
        assert processes.ended().statuses == [0] * count, processes.ended()
    wrong = list[str]()
    slowest = {signal.SIGKILL: 0.0, signal.SIGSTOP: 0.0}
    kinds = [signal.SIGKILL, signal.SIGSTOP] * faults
    for i, kind in enumerate(kinds):
        with Hosts(count, top, runs[1], timeout) as processes:
            victim = rng.randrange(count)
            aim = saved(runs[1]) + rng.randint(2, max(3, _STEPS // len(kinds)))
            processes.wait_for_step(min(aim, _STEPS - 1))
            time.sleep(rng.uniform(0.0, 0.1))
            at = processes.step()
            seconds, mistakes = strike(processes, victim, kind, runs[1], timeout)
        slowest[kind] = max(slowest[kind], seconds)
        wrong += [f"{count} processes, fault {i + 1}: {mistake}" for mistake in mistakes]
        print(
            f"{kind.name} of process {victim} of {count} at step {at}: the others ended after "
            f"{seconds:.1f} s; step {saved(runs[1])} is saved; {mistakes or 'fine'}",
            flush=True,
        )
    with Hosts(count, top, runs[1], timeout) as processes:
        statuses, outputs = processes.ended()
        assert statuses == [0] * count, outputs
    differing = 0
    for what, differences in (
        compare_runs.arrays(runs, _STEPS),
        compare_runs.lines(runs, "metrics.jsonl"),
        compare_runs.results(runs),
    ):
        wrong += differences
        differing += len(differences)
        assert what
    rows: list[report.Row] = [
        (f"{count} processes: faults", len(kinds), ""),
        (f"{count} processes: slowest end after SIGKILL", slowest[signal.SIGKILL], "s"),
        (f"{count} processes: slowest end after SIGSTOP", slowest[signal.SIGSTOP], "s"),
        (f"{count} processes: arrays, metrics and results that differ", differing, ""),
    ]
    return rows, wrong


def disagreements() -> tuple[list[report.Row], list[str]]:
    """Changes each field of every config on one of three hosts; each must be named."""
    fields, wrong, free = 0, list[str](), set[str]()
    for path in sorted((_ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if not hasattr(module, "get_config"):
            continue
        config = module.get_config()
        mine = same_job.facts(config, parallel="pmap")
        for name in mine:
            fields += 1
            theirs = mine | {name: "another"}
            try:
                hosts.compare([(mine, [0, 2]), (theirs, [1])])
                wrong.append(f"{path.stem}: {name}: not noticed")
            except HostsDiffer as e:
                if f"{name} is " not in str(e) or '"another" on process 1' not in str(e):
                    wrong.append(f"{path.stem}: {name}: {e}")
        free |= {k for k in identity.flat(config) if f"config.{k}" not in mine}
    print("not compared, because they are paths:", ", ".join(sorted(free)))
    rows: list[report.Row] = [
        ("fields of all configs, code, versions and flags in which hosts differed", fields, ""),
        ("of these not told", len(wrong), ""),
    ]
    return rows, wrong


def main(argv: list[str] | None = None) -> None:
    """Runs all faults, prints the table; exits with 1 if something was not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults_hosts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--faults", type=int, default=5, help="per signal and number of processes")
    parser.add_argument("--workdir", default="runs/faults_hosts", help="is written anew")
    parser.add_argument("--host_timeout", type=float, default=10.0, help="see run_experiment.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the processes")
    parser.add_argument("--json", default="", help="where to write the table as flat JSON")
    args = parser.parse_args(argv)
    top, rng = Path(args.workdir).absolute(), random.Random(args.seed)
    top.mkdir(parents=True, exist_ok=True)
    rows, wrong = disagreements()
    for count in (2, 4):
        more, mistakes = kill_and_stop(count, args.faults, top, rng, args.host_timeout)
        rows, wrong = rows + more, wrong + mistakes
    report.show("hosts that differ, die and stop", rows, args.json)
    print("\n" + "\n".join(wrong or ["all told; equal, bit for bit"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
