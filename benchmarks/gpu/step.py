"""Compares the time of a training step with PyTorch, on one device, in one run.

In the project's root:

    python -m benchmarks.gpu.step both --cases byol:64 byol:128 --minutes=9
    python -m benchmarks.gpu.step jax --cases moco:256 --ours plain
    python -m benchmarks.gpu.step both --px=32 --depth=18 --cases byol:8 --repeats=2 --passes=1

`both` runs one process per framework (`--jax-python`, `--torch-python`), one after the other, and
repeats both --passes times, so that a drift of the machine is visible. A row has `step_ms`, the
median synchronised step; `in_a_row_ms`, with one wait for all repeats; `images_per_s` (each image
has two views); `peak_gib`; `mfu`, the share of the bf16 matmul rate that the same process measured;
`floor_ms`, the larger of the arithmetic at that rate and the activation bytes at the measured copy
rate (`step_shared.Case.work`). `step_jax.py` and `step_torch.py` define the timed steps.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import Any

from benchmarks.gpu import step_shared

# Share of the total time after which each of the first processes starts no more rows. The first
# processes get more time, because they compile.
SHARES = (0.5, 0.78, 0.9, 1.0)


def both(args: argparse.Namespace, rest: list[str]) -> None:
    """Runs both frameworks alternately, each in its own process, and prints the table."""
    start, total = time.time(), 60 * args.minutes
    folder = os.environ.get("OUT") or tempfile.mkdtemp()
    path = pathlib.Path(folder, args.name)
    shares = SHARES if args.passes > 1 else (0.6, 1.0)
    for number in range(2 * args.passes):
        framework = ("jax", "torch")[number % 2]
        python = args.torch_python if number % 2 else args.jax_python
        until = start + total * shares[min(number, len(shares) - 1)]
        left = start + total - time.time()
        if left < 20:
            print(
                json.dumps({"framework": framework, "pass": number // 2, "skipped": "out of time"})
            )
            continue
        command = [
            python,
            "-m",
            "benchmarks.gpu.step",
            framework,
            *rest,
            f"--rows={path}",
            f"--until={until}",
        ]
        try:
            subprocess.run(command, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(
                json.dumps({"framework": framework, "pass": number // 2, "stopped": "out of time"}),
                flush=True,
            )
    if path.exists():
        print(table([json.loads(line) for line in path.read_text().splitlines()]))


def table(rows: list[dict[str, Any]]) -> str:
    """Median of each row over the passes, and the ratios of our rate to PyTorch's."""
    rates: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in rows:
        if "step_ms" in row:
            case = (row["method"], row["model"], row["px"], row["batch"], row["dtype"])
            rates.setdefault(case, {}).setdefault((row["framework"], row["variant"]), []).append(
                row
            )
    lines = []
    for case, variants in rates.items():
        lines.append(" ".join(map(str, case)))
        speed = {
            key: statistics.median(r["images_per_s"] for r in passes)
            for key, passes in variants.items()
        }
        for key, passes in sorted(variants.items()):
            times = ", ".join(f"{r['step_ms']:.2f}" for r in passes)
            peak, mfu = passes[-1].get("peak_gib"), statistics.median(r["mfu"] for r in passes)
            memory = f"{peak:6.2f} GiB" if peak else ""
            over = statistics.median(r["over_floor"] for r in passes)
            rate = f"{speed[key]:9.1f} images/s"
            cost = f"{times} ms  {memory}  MFU {mfu:.3f}  {over:.2f} x floor"
            lines.append(f"  {' '.join(key):14s} {rate}  {cost}")
        for ours in ("plain", "full"):
            for theirs in ("eager", "compile"):
                if ("jax", ours) in speed and ("torch", theirs) in speed:
                    ratio = speed["jax", ours] / speed["torch", theirs]
                    lines.append(f"  ratio jax {ours} / torch {theirs}: {ratio:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Runs one framework, or both."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = step_shared.parser()
    for name in ("jax", "torch"):
        commands.add_parser(name, parents=[shared], help=f"{name}'s rows alone")
    of_both = commands.add_parser("both", parents=[shared], help="both frameworks, and the ratio")
    of_both.add_argument("--passes", type=int, default=2)
    of_both.add_argument("--minutes", type=float, default=9.0, help="of all processes together")
    of_both.add_argument("--jax-python", default="python3")
    of_both.add_argument("--torch-python", default="python3")
    of_both.add_argument("--name", default="steps.jsonl", help="of the rows' file in $OUT")
    args = parser.parse_args()
    if args.command == "both":
        own = (
            "passes",
            "minutes",
            "jax_python",
            "torch_python",
            "name",
            "command",
            "rows",
            "until",
        )
        rest = []
        for key, value in vars(args).items():
            if key not in own:
                many = value if isinstance(value, list) else None
                rest += [f"--{key}", *map(str, many)] if many is not None else [f"--{key}={value}"]
        both(args, rest)
    elif args.command == "jax":
        from benchmarks.gpu import step_jax

        step_jax.main(args)
    else:
        from benchmarks.gpu import step_torch

        step_torch.main(args)


if __name__ == "__main__":
    main()
