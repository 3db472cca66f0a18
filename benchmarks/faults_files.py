"""Faults of the files of a run, for `benchmarks.faults`: flipped bits, and full disks."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import io
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import compare_runs, report
from benchmarks.kill_and_resume import Pace, Process, newest
from selfsup_jax import verify
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.run import checkpoint, checkpoint_files

_PATIENCE = 120.0  # seconds in which a checkpoint must be read
_FREE = (8e3, 1e6)  # bytes that a full disk has left: from, to


def bits(arguments: list[str], top: Path, count: int, seed: int) -> bool:
    """Flips one bit of a file of the newest of two checkpoints, then resumes and evaluates.

    Each file is chosen as often as the others. Returns whether no flip changed an array or the
    description of the run without a word.
    """
    shutil.rmtree(top, ignore_errors=True)
    pristine, workdir = top / "pristine", top / "run"
    top.mkdir(parents=True)
    _finish([*arguments, "--config.steps=20"], pristine, top / "run.txt")
    shutil.copytree(pristine, workdir)
    step = newest(workdir / "checkpoints")
    files = [p for p in sorted((workdir / f"checkpoints/{step}").rglob("*")) if p.is_file()]
    rng, verdicts = random.Random(seed), collections.Counter[str]()
    pool = _new_pool()
    for number in range(count):
        path = files[number % len(files)]
        content = bytearray(path.read_bytes())
        if not content:
            path.write_bytes(b"\0")  # an empty file has no bit to flip
        else:
            bit = rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
        try:
            verdict = pool.submit(judge, str(pristine), str(workdir)).result(_PATIENCE)
        except concurrent.futures.TimeoutError:
            verdict, pool = "hangs", _new_pool()
        except concurrent.futures.process.BrokenProcessPool:
            verdict, pool = "the process died", _new_pool()
        verdicts[verdict] += 1
        if not verdict.startswith(("reported", "harmless")):
            print(f"{path.relative_to(workdir)}, flip {number}: {verdict}", flush=True)
        shutil.rmtree(workdir)
        shutil.copytree(pristine, workdir)
    rows: list[report.Row] = [("flips", count, ""), ("files", len(files), "")]
    rows += [(verdict, number, "") for verdict, number in sorted(verdicts.items())]
    report.show("One flipped bit in a checkpoint: " + " ".join(arguments), rows)
    return all(verdict.startswith(("reported", "harmless")) for verdict in verdicts)


def judge(pristine: str, workdir: str) -> str:
    """What a run that resumes and an evaluation job make of a workdir with a damaged checkpoint."""
    step = newest(Path(pristine) / "checkpoints")
    resumed, lines = _resumed(workdir)
    if not isinstance(resumed, int):
        return resumed
    if resumed != step and not any("going on from" in line for line in lines):
        return "SILENT: another checkpoint"
    if not _equal(pristine, workdir, resumed):
        return "SILENT: other arrays"
    try:
        variables = encoder.load(workdir).variables
    except UserError:
        evaluated = "reported"
    except Exception as e:
        return f"TRACEBACK of an evaluation: {e!r}"
    else:
        expected = _expected_variables(pristine)
        same = np.all([np.array_equal(a, b) for a, b in _pairs(variables, expected)])
        evaluated = "harmless" if same else "SILENT"
    reported = "reported, falls back to the older one" if resumed != step else "harmless"
    return reported if reported.startswith(evaluated) else f"{reported}; an evaluation: {evaluated}"


def _resumed(workdir: str) -> tuple[int | str, list[str]]:
    """The step from which a run would go on (or why it doesn't), and the lines it prints."""
    reported = io.StringIO()
    try:
        with contextlib.redirect_stderr(reported):
            checkpoints = checkpoint.Checkpoints(workdir)
            checkpoints.meta()
            checkpoints.close()
        return checkpoints.latest_step or 0, reported.getvalue().splitlines()
    except UserError:
        return "reported, refused", []
    except Exception as e:
        return f"TRACEBACK: {e!r}", []


def _equal(pristine: str, workdir: str, step: int) -> bool:
    meta, wanted = _expected(pristine, step)
    other, got = checkpoint_files.read(os.path.join(workdir, "checkpoints", str(step)))
    return meta == other and all(np.array_equal(a, b) for a, b in _pairs(wanted, got))


@functools.cache
def _expected(pristine: str, step: int) -> Any:
    return checkpoint_files.read(os.path.join(pristine, "checkpoints", str(step)))


@functools.cache
def _expected_variables(pristine: str) -> Any:
    return encoder.load(pristine).variables


def _pairs(a: Any, b: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    a, b = checkpoint_files.flat(a), checkpoint_files.flat(b)
    return [(a[name], b[name]) for name in sorted(a.keys() | b.keys())]


def _new_pool() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


# ----------------------------------------------------------------------------- full disks


def disk(arguments: list[str], top: Path, count: int, seed: int) -> bool:
    """Fills the disk of a run at random moments, and starts the run again with room on it.

    Returns whether each time one line reported it, all checkpoints could be read, and the run ended
    as one that was never disturbed.
    """
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    pace = _finish(arguments, top / "undisturbed", top / "undisturbed.txt")
    total = newest(top / "undisturbed" / "checkpoints")
    with _small_disk(top / "disk") as mounted:
        workdir = mounted / "run"
        verdicts = _fill(arguments, workdir, top, total, count, random.Random(seed), pace)
        _finish(arguments, workdir, top / "last.txt")
        compared, wrong = compare_runs.arrays([top / "undisturbed", workdir], total)
    rows: list[report.Row] = [("full disks", count, "")]
    rows += [(verdict, number, "") for verdict, number in sorted(verdicts.items())]
    rows += [("arrays of the last checkpoint", compared, ""), ("that differ", len(wrong), "")]
    report.show("A full disk (a tmpfs), at random moments: " + " ".join(arguments), rows)
    told = [verdict.startswith("one line,") for verdict in verdicts]
    return not wrong and any(told) and all(verdict.startswith("one line") for verdict in verdicts)


def _fill(
    arguments: list[str],
    workdir: Path,
    top: Path,
    total: int,
    count: int,
    rng: random.Random,
    pace: Pace,
) -> collections.Counter[str]:
    filler = workdir.parent / "filler"
    verdicts = collections.Counter[str]()
    for number in range(count):
        log = top / f"{number:02d}.txt"
        free = math.exp(rng.uniform(*map(math.log, _FREE)))
        begun = newest(workdir / "checkpoints")
        if begun >= total:  # it came to its end before the disk was full
            shutil.rmtree(workdir)
            begun = 0
        # The trials are spread over the run: this many steps from the one it resumes from.
        aim = rng.uniform(-20, 2 * (total - begun) / (count - number + 1))
        with Process(arguments, workdir, log, pace) as process:
            while process.poll() is None and process.position() < aim:
                pass
            _leave(workdir.parent, filler, free)
            status = process.wait_for(None)
        filler.unlink(missing_ok=True)
        verdict = _verdict(status, log.read_text(errors="replace").splitlines(), workdir)
        print(f"{free / 1e3:8,.1f} kB free, from step {begun:3}: {verdict}", flush=True)
        verdicts[verdict.partition(":")[0]] += 1
    return verdicts


def _leave(folder: Path, filler: Path, free: float) -> None:
    """Fills the disk up to so many bytes; the run may take some of them at the same time."""
    there = os.statvfs(folder)
    size = int(there.f_bavail * there.f_frsize - free)
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
        f.write(bytes(max(0, size)))


def _verdict(status: int | None, lines: list[str], workdir: Path) -> str:
    broken = []
    with contextlib.suppress(UserError):  # no checkpoint yet
        broken = [line for whole, line in verify.verify(str(workdir)) if not whole]
    if broken:
        return f"DAMAGED: {broken[0]}"
    if status == 0:
        return "one line less: the run had ended, or had room enough"
    errors = [line for line in lines if line.startswith("error: ")]
    noise = [line for line in lines if "Traceback" in line or "Exception" in line]
    if status != 2 or len(errors) != 1 or noise or lines[-1] != errors[0]:
        return f"NOISE, status {status}: {(noise or lines)[-1]}"
    return f"one line, all checkpoints readable: {errors[0]}"


@contextlib.contextmanager
def _small_disk(folder: Path, size: str = "32m") -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.call(mount):
        sys.exit("error: no permission to mount a tmpfs: be root, or call it after `unshare -rm`")
    try:
        yield folder
    finally:
        subprocess.call(["umount", str(folder)])


def _finish(arguments: list[str], workdir: Path, log: Path) -> Pace:
    """Runs to the end; returns its speed."""
    pace = Pace()
    with Process(arguments, workdir, log, pace) as process:
        if status := process.wait_for(None):
            process.fail(f"exit status {status}")
    return pace
