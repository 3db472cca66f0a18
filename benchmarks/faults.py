"""Breaks runs on purpose and counts what is told, what is harmless and what is neither.

    python -m benchmarks.faults bits --count=200     # one bit of a checkpoint's files is flipped
    python -m benchmarks.faults disk --count=20      # the disk is full at a random moment
    python -m benchmarks.faults kills --count=20     # SIGKILL, see `benchmarks.kill_and_resume`
    python -m benchmarks.faults hosts                # processes of one run, see `faults_hosts`

All but `hosts` use the digits demo with a narrow network, which needs no data set; `disk` mounts a
small tmpfs, which root may do, or anyone after `unshare -rm`. Further flags are passed on to
`run_experiment.py` (`hosts`: to its own script). Exit status: 0 if every fault was told or
harmless, else 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# A run of seconds, with a state of 2 MB and everything else that a real run writes.
SMALL = [
    "--config=configs/byol.py:demo",
    *("--config.encoder.width=0.125", "--config.batch_size=32", "--config.steps=400"),
    *("--config.projector.hidden_sizes=(64,)", "--config.predictor.hidden_sizes=(64,)"),
    *("--config.optimizer.warmup_epochs=0", "--config.checkpoint_every_steps=10"),
    *("--config.log_every_steps=10", "--config.monitor.diagnostics_every_steps=10"),
    *("--config.monitor.knn_every_steps=0", "--config.monitor.plots_every_steps=0"),
    *("--config.eval.enabled=False", "--config.monitor.reference="),
]


def main() -> int:
    """Runs a command of this file's docstring; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults")
    parser.add_argument("fault", choices=("bits", "disk", "kills", "hosts"))
    parser.add_argument("--count", type=int, default=20, help="how many faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--workdir", default="runs/faults", help="for all files of the trials")
    args, rest = parser.parse_known_args()
    if args.fault == "hosts":
        from benchmarks import faults_hosts

        own = [f"--workdir={args.workdir}/hosts", f"--seed={args.seed}"]
        own += [f"--faults={max(1, args.count // 4)}"]  # of two signals and two sizes
        faults_hosts.main([*own, *rest])  # ends the process
    arguments, top = SMALL + rest, Path(args.workdir).resolve()
    top.mkdir(parents=True, exist_ok=True)
    if args.fault == "kills":
        script = [sys.executable, "-m", "benchmarks.kill_and_resume", "--signal=KILL"]
        flags = [f"--kills={args.count}", f"--seed={args.seed}", f"--workdir={top / 'kills'}"]
        return subprocess.call([*script, *flags, *arguments])
    from benchmarks import faults_files

    trial = {"bits": faults_files.bits, "disk": faults_files.disk}[args.fault]
    return int(not trial(arguments, top / args.fault, args.count, args.seed))


if __name__ == "__main__":
    sys.exit(main())
