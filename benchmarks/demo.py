"""Times a demo from start to result, here and in another checkout, one after the other.

    git worktree add --detach OTHER COMMIT
    python -m benchmarks.demo --method=byol --other=OTHER --seeds=3

Each has a compilation cache of its own, empty at first. The *second start* is the same command in
a new workdir, up to its first step. With several seeds, only the first is run in the other one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import report

HERE = pathlib.Path(__file__).resolve().parent.parent
FIRST_STEP = re.compile(r"first step done ([\d.]+) s")
MEASURES = ("linear_probe_top1", "fewshot_top1", "knn_top1")


def start(checkout: pathlib.Path, method: str, scratch: str, name: str, seed: int):
    """The running demo of a checkout."""
    command = [sys.executable, "run_experiment.py", f"--config=configs/{method}.py:demo"]
    command += [f"--workdir={scratch}/{name}", f"--compilation_cache={scratch}/cache"]
    command += [f"--config.seed={seed}"]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, cwd=checkout, env=env, **pipes)  # type: ignore[call-overload]


def first_step(process) -> float:
    """Seconds from the start to the end of the first step, as the demo says."""
    for line in process.stderr:
        if match := FIRST_STEP.search(line):
            return float(match[1])
    raise SystemExit("the demo ended before its first step")


def measure(checkout: pathlib.Path, method: str, seeds: int) -> dict[str, float]:
    """Runs the demo with each seed, and starts it once more."""
    each: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            begun, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            process = start(checkout, method, scratch, f"seed_{seed}", seed)
            row = {"first step": first_step(process)}
            process.stderr.read()
            if process.wait():
                raise SystemExit(f"the demo in {checkout} failed")
            row["whole"] = time.perf_counter() - begun
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            row["CPU time"] = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
            results = json.loads(pathlib.Path(scratch, f"seed_{seed}", "results.json").read_text())
            each.append(row | {name: results[name] for name in MEASURES if name in results})
        process = start(checkout, method, scratch, "second", 0)
        second = first_step(process)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        process.wait()
    values = {name: statistics.mean(row[name] for row in each) for name in each[0]}
    return values | {"first step": each[0]["first step"], "first step, second start": second}


def main() -> None:
    """Prints the table."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--method", default="byol")
    p.add_argument("--other", type=pathlib.Path, help="another checkout")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--json", default="", help="where to write the same as flat JSON")
    args = p.parse_args()
    ours = measure(HERE, args.method, args.seeds)
    unit = {name: "" if name in MEASURES else "s" for name in ours}
    rows = [(name, value, unit[name]) for name, value in ours.items()]
    if args.other:
        theirs = measure(args.other.resolve(), args.method, 1)
        rows += [(f"other: {name}", value, unit.get(name, "")) for name, value in theirs.items()]
        for name in ("whole", "CPU time"):
            rows.append((f"{name}, ours over the other's", ours[name] / theirs[name], "x"))
    report.show(f"demo of {args.method}, {args.seeds} seeds", rows, args.json)


if __name__ == "__main__":
    main()
