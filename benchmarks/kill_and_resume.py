"""Stops a run many times at random moments and compares it with a run that was never stopped.

python -m benchmarks.kill_and_resume --kills=20 --signal=KILL --config=configs/byol.py:demo

Flags that this script does not have (and all flags after `--`) are passed to `run_experiment.py`.
The workdir contains `undisturbed/`, which a later call with the same flags reuses, and, new in each
call, `killed/` and `logs/` (the output of each process). Exit status: 0 if the two runs are equal,
1 if anything differs or a process ends in an unexpected way, 2 for invalid flags.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from absl import app, flags, logging

from benchmarks import compare_runs, report

_KILLS = flags.DEFINE_integer("kills", 20, "how often to stop the run", lower_bound=0)
_SIGNAL = flags.DEFINE_enum("signal", "KILL", ["KILL", "TERM"], "what to stop it with")
_WORKDIR = flags.DEFINE_string("workdir", "runs/kill_and_resume", "where both runs are written")
_SEED = flags.DEFINE_integer("seed", 0, "of the moments to stop at")
_JSON = flags.DEFINE_string("json", "", "where to write the result as flat JSON")

_FIRST_STEP = "first step done"
_SHOWN_STEP = re.compile(r"\bstep ([\d,]+)/")
_POLL = 0.002  # seconds between polls, short compared with a save
_PATIENCE = 300.0  # seconds in which a process must end after the signal


@dataclasses.dataclass
class Pace:
    """The speed of the run, measured in the last process that printed it."""

    start_seconds: float = 10.0  # until the first step is done
    steps_per_second: float = 20.0
    end_seconds: float = 0.0  # after the last step
    seconds: float = 0.0  # of the undisturbed run; 0 if unknown


class Aim(NamedTuple):
    """The moment at which to stop a process."""

    at: str  # "save": one begins; "commit": one has ended, the oldest is deleted; or "anywhere"
    position: float  # for "anywhere": see `Process.position`
    delay: float  # for the others: seconds after that event


# ------------------------------------------------------------------------------ processes


class Process:
    """One process of the run in `workdir`; it is killed at the end of the `with` block.

    Its output is written to `log`; the speed that the output shows is written to `pace`.
    """

    def __init__(self, arguments: list[str], workdir: Path, log: Path, pace: Pace):
        script = Path(__file__).resolve().parents[1] / "run_experiment.py"
        command = [sys.executable, str(script), *arguments, f"--workdir={workdir}"]
        self.log, self.checkpoints, self._pace = log, workdir / "checkpoints", pace
        self.resumed = self.shown = newest(self.checkpoints)
        self.shown_at: float | None = None
        self._first_at = 0.0
        self._began = time.monotonic()
        with log.open("wb") as out:
            # A new session: Ctrl-C reaches only this script, which then ends the process.
            self._popen = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._printed = log.open("rb")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self._popen.kill()  # no effect on a process that has ended
        self._popen.wait()
        self._printed.close()

    def seconds(self) -> float:
        """Seconds since the start of the process."""
        return time.monotonic() - self._began

    def poll(self) -> int | None:
        """Reads the output since the last call. Returns the exit status, or None while it runs."""
        status, now = self._popen.poll(), self.seconds()
        for line in self._printed.read().decode(errors="replace").splitlines():
            if line.startswith(_FIRST_STEP):
                self._pace.start_seconds = self._first_at = now
                self.shown, self.shown_at = self.resumed + 1, now
            elif match := _SHOWN_STEP.search(line):
                self.shown, self.shown_at = int(match[1].replace(",", "")), now
                steps, seconds = self.shown - self.resumed - 1, now - self._first_at
                if steps and seconds:
                    self._pace.steps_per_second = steps / seconds
        return status

    def position(self) -> float:
        """Steps since the resume, estimated by the clock; negative during start-up."""
        if self.shown_at is None:
            return min(0.0, self.seconds() - self._pace.start_seconds) * self._pace.steps_per_second
        since = (self.seconds() - self.shown_at) * self._pace.steps_per_second
        return self.shown - self.resumed + since

    def wait_for(self, aim: Aim | None) -> int | None:
        """Waits for that moment; returns None, or the exit status if the process ended first."""
        while (status := self.poll()) is None:
            if aim is None:
                time.sleep(0.1)
            elif aim.at == "anywhere" and self.position() >= aim.position:
                return None
            elif (aim.at == "save" and self.shown_at is not None and self._saving()) or (
                aim.at == "commit" and newest(self.checkpoints) > self.resumed
            ):
                time.sleep(aim.delay)
                return None
            else:
                time.sleep(_POLL)
        if self.shown_at is not None:
            self._pace.end_seconds = self.seconds() - self.shown_at
        return status

    def _saving(self) -> bool:
        # Orbax's name for an unfinished save. A resume removes earlier ones before its first step.
        return any(self.checkpoints.glob("*.orbax-checkpoint-tmp*"))

    def stop(self, number: signal.Signals) -> int:
        """Sends the signal and returns the exit status."""
        self._popen.send_signal(number)
        status = self._popen.wait(_PATIENCE)
        self.poll()
        return status

    def fail(self, why: str) -> NoReturn:
        """Ends the script; prints the reason and the last lines of the process's output."""
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        print("\n    ".join([f"{self.log}: {why}", *lines]))
        sys.exit(1)


def newest(checkpoints: Path) -> int:
    """The newest checkpoint's step, or 0. Orbax uses the step as name only for complete ones."""
    names = [path.name for path in checkpoints.glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


# ------------------------------------------------------------------------------- both runs


def run_undisturbed(arguments: list[str], top: Path, pace: Pace) -> None:
    """Runs without a stop, unless an earlier call has finished this run."""
    workdir, note = top / "undisturbed", top / "undisturbed.json"
    if (workdir / "results.json").exists():
        earlier = json.loads(note.read_text()) if note.exists() else {"arguments": arguments}
        if earlier.pop("arguments") != arguments:
            print(f"error: {workdir} is of other flags: remove it or take another --workdir")
            sys.exit(2)
        vars(pace).update(earlier)
        return
    shutil.rmtree(workdir, ignore_errors=True)
    with Process(arguments, workdir, top / "undisturbed.txt", pace) as process:
        if status := process.wait_for(None):
            process.fail(f"exit status {status}")
        pace.seconds = process.seconds()
    note.write_text(json.dumps({"arguments": arguments} | vars(pace)) + "\n")


def draw_aim(
    rng: random.Random, kind: str, resumed: int, due: float, interval: int, total: int, pace: Pace
) -> Aim:
    """Draws the moment of a stop. The stops cover the run, including start-up and evaluation.

    Args:
        rng: random generator.
        kind: "KILL", which loses the steps since the last checkpoint, or "TERM", which saves them.
        resumed: the step from which the process resumes.
        due: the step that the run should reach before this stop, so that stops are spread evenly.
        interval: steps between two checkpoints.
        total: steps of the run.
        pace: converts time to steps.
    """
    start = -pace.start_seconds * pace.steps_per_second
    if resumed >= total:  # the evaluation starts where other processes do the first step
        return Aim("anywhere", rng.uniform(start, 0.0), 0.0)
    at = rng.choices(["save", "commit", "anywhere"], [2, 1, 3] if kind == "KILL" else [1, 0, 5])[0]
    # Reaches `due` on average: KILL loses the steps since a checkpoint, TERM stops half-way.
    reach = max(due, resumed) + interval if kind == "KILL" else 2 * due - resumed
    end = total + 0.9 * pace.end_seconds * pace.steps_per_second
    reach = min(max(reach, resumed + interval / 2), end)
    return Aim(at, rng.uniform(start, reach - resumed), rng.uniform(0.0, 0.06))


def run_killed(arguments: list[str], top: Path, total: int, interval: int, pace: Pace) -> list[str]:
    """Runs and stops repeatedly, then runs to the end. Returns the `at` of each stop."""
    kind, rng, began = _SIGNAL.value, random.Random(_SEED.value), time.monotonic()
    for name in ("killed", "logs"):
        shutil.rmtree(top / name, ignore_errors=True)
    (top / "logs").mkdir()
    aims = list[str]()
    print("   #  aimed at  resumed    shown   newest  exit  seconds    total")
    while True:
        log = top / "logs" / f"{len(aims) + 1:02d}.txt"
        with Process(arguments, top / "killed", log, pace) as process:
            due = total * (len(aims) + 1) / (_KILLS.value + 1)
            aim = draw_aim(rng, kind, process.resumed, due, interval, total, pace)
            status = process.wait_for(aim if len(aims) < _KILLS.value else None)
            if status is None:
                status = process.stop(signal.Signals[f"SIG{kind}"])
            saved = newest(process.checkpoints)
            print(
                f"{len(aims) + 1:4}  {aim.at if status else 'the end':8}  {process.resumed:7}"
                f"  {process.shown:7}  {saved:7}  {status:4}  {process.seconds():7.1f}"
                f"  {time.monotonic() - began:7.1f}",
                flush=True,
            )
            if wrong := complaint(status, kind, process, saved, total):
                process.fail(wrong)
        if status == 0:
            return aims
        aims.append(aim.at)


def complaint(status: int, kind: str, process: Process, saved: int, total: int) -> str:
    """The error in how a process ended; empty if there is none."""
    if saved < process.resumed:
        return f"the checkpoint of step {process.resumed} is gone"
    in_loop = process.shown_at is not None and process.shown < total
    if kind == "TERM" and status == 128 + signal.SIGTERM:
        return f"step {process.shown} is not saved" if in_loop and saved < process.shown else ""
    fine = status in (0, -signal.Signals[f"SIG{kind}"]) and not (kind == "TERM" and in_loop)
    return "" if fine else f"exit status {status}"


def main(argv: list[str]) -> None:
    """Runs, stops, compares, prints the result."""
    arguments = [arg for arg in argv[1:] if arg != "--"]
    if not any(re.match("--?config(=|$)", arg) for arg in arguments):
        arguments.insert(0, "--config=configs/byol.py:demo")
    logging.set_verbosity(logging.WARNING)
    # Also ends the current process, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    top, pace = Path(_WORKDIR.value), Pace()
    runs = [top / "undisturbed", top / "killed"]
    top.mkdir(parents=True, exist_ok=True)
    run_undisturbed(arguments, top, pace)
    total = json.loads((runs[0] / "results.json").read_text())["steps"]
    interval = json.loads((runs[0] / "config.json").read_text())["checkpoint_every_steps"]
    began = time.monotonic()
    aims = run_killed(arguments, top, total, interval, pace)
    rows: list[report.Row] = [("seconds undisturbed", pace.seconds, "s")] if pace.seconds else []
    rows += [("seconds with kills", time.monotonic() - began, "s"), ("kills", len(aims), "")]
    rows += [(f"kills aimed at {at}", aims.count(at), "") for at in ("save", "commit", "anywhere")]
    if len(aims) < _KILLS.value:
        print(f"the run was over after {len(aims)} of {_KILLS.value} kills")

    differences = list[str]()
    for what, (count, wrong) in {
        "arrays": compare_runs.arrays(runs, total),
        "lines of metrics": compare_runs.lines(runs, "metrics.jsonl"),
        "lines of meta": compare_runs.lines(runs, f"checkpoints/{total}/meta/metadata"),
        "lines of config": compare_runs.lines(runs, "config.json"),
        "TensorBoard scalars": compare_runs.scalars(runs),
        "fields of results": compare_runs.results(runs),
    }.items():
        rows += [(what, count, ""), (f"{what} that differ", len(wrong), "")]
        differences += wrong[:20] + [f"and {len(wrong) - 20} more"] * (len(wrong) > 20)
    title = f"{total:,} steps, {len(aims)} times SIG{_SIGNAL.value}: " + " ".join(arguments)
    report.show(title, rows, _JSON.value)
    print("\n" + "\n".join(differences or ["equal, bit for bit"]))
    sys.exit(bool(differences))


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags with absl; unknown flags are left to `run_experiment.py`."""
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as e:
        print(f"error: {e}")
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
