"""The one command for a visit to an accelerator, on the CPU with tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, process_env

from benchmarks import accelerator

NAMES = ["smoke_cpu", "smoke", "step_cifar10", "loop", "cifar10 byol seed 0"]


def visit(data, out) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["benchmarks/accelerator.sh", "9", f"--data={data}", f"--out={out}", "--tiny"],
        cwd=REPOSITORY,
        env=process_env() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_visit_measures_everything_and_repeats_nothing(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 24)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 10
    np.savez(tmp_path / "cifar10.npz", **arrays)
    first = visit(tmp_path / "cifar10.npz", tmp_path / "results")
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "results" / "cpu"
    ended = json.loads((folder / "stages.json").read_text())
    assert list(ended) == NAMES and all(how.startswith("done") for how in ended.values())
    # What the tables are made of: differences to the CPU (to itself: none), times, accuracies.
    table = (folder / "README.md").read_text()
    assert "byol: changes  relative difference 0.00e+00" in table and "smoke: all good" in table
    steps = [json.loads(row) for row in (folder / "step_cifar10.jsonl").read_text().splitlines()]
    (timed,) = [row for row in steps if row.get("variant") == "plain" and "step_ms" in row]
    assert f"| {1e3 * timed['batch'] / timed['in_a_row_ms']:,.0f} |" in table
    results = json.loads((folder / "cifar10" / "byol_seed_0" / "results.json").read_text())
    assert f"| byol | 0 | {100 * results['knn_top1']:.1f} |" in table
    assert "| moco | | not run |" in table and "% over the bare step" in table

    second = visit(tmp_path / "cifar10.npz", tmp_path / "results")
    assert second.returncode == 0 and second.stdout.startswith("# cpu")  # the table alone
    assert json.loads((folder / "stages.json").read_text()) == ended


def stage(tmp_path, code: str, least: float = 0.0) -> accelerator.Stage:
    return accelerator.Stage("one", [sys.executable, "-c", code], tmp_path / "result", least)


def test_a_stage_ends_with_the_time(tmp_path, monkeypatch):
    """With SIGTERM, which lets a run save its step; and is not begun without the time it needs."""
    now = accelerator.time.time()
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    code += "open('result', 'w').write('begun'); time.sleep(600)"
    monkeypatch.chdir(tmp_path)
    assert accelerator.carry_out(stage(tmp_path, code), tmp_path, now + 2).startswith("stopped")
    assert accelerator.carry_out(stage(tmp_path, code, 1.0), tmp_path, now + 59) == "no time left"


def test_a_stage_that_fails_is_said(tmp_path):
    until = accelerator.time.time() + 60
    assert accelerator.carry_out(
        stage(tmp_path, "raise SystemExit(3)"), tmp_path, until
    ).startswith("FAILED with status 3")


def test_missing_data_is_one_line(tmp_path, capsys):
    assert accelerator.main(["1", f"--data={tmp_path / 'none.npz'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
