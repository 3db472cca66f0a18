"""Evaluation jobs that take a second: a run with an encoder of one block, and small images.

As a program it is `run_experiment.py` with that encoder; `TINY_PAUSE` as in `tiny_process.py`. With
`TINY_REMOVES=STEP`, process 1 removes that step's checkpoint when it is about to read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

told = dict(os.environ)
import tiny_runs  # imports conftest, which makes eight devices  # noqa: E402

if __name__ == "__main__":
    os.environ.update(told)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import REPOSITORY, StandIn, process_env  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from PIL import Image  # noqa: E402

import byol_jax.method  # noqa: E402
from configs import embed, fewshot, finetune, knn, linear_probe, transfer  # noqa: E402
from selfsup_jax import jobs  # noqa: E402
from selfsup_jax.data import inputs  # noqa: E402
from selfsup_jax.devices import wire  # noqa: E402
from selfsup_jax.evaluation import encoder  # noqa: E402
from selfsup_jax.models import resnet  # noqa: E402
from selfsup_jax.training import pretrain  # noqa: E402

CLASSES, TRAIN, TEST = 3, 96, 24  # images of the two splits
STEPS = 4  # of the run; each has a checkpoint


class Killed(BaseException):
    """In place of SIGKILL."""


_MAKE = {
    "embed": embed.get_config,
    "fewshot": fewshot.get_config,
    "finetune": finetune.get_config,
    "knn": knn.get_config,
    "linear_probe": linear_probe.get_config,
    "transfer": transfer.get_config,
}
# The same numbers of strengths in all tests: each is compiled anew.
QUICK: dict[str, dict[str, Any]] = {
    "embed": {},
    "fewshot": {"labels_per_class": (1, 4), "draws": 3},
    "finetune": {"batch_size": 8, "epochs": 2.0, "checkpoint_every_steps": 2},
    "knn": {"random_init": False},  # k is the run's
    "linear_probe": {"C": (0.01, 1.0), "random_init": False},
    "linear_probe:byol": {"batch_size": 16, "epochs": 2.0, "checkpoint_every_steps": 2},
    "linear_probe:moco": {"batch_size": 16, "epochs": 2.0},
    "linear_probe:dino": {"batch_size": 16, "epochs": 2.0},
    "transfer": {"penalties": (0.01, 1.0)},
}


@contextlib.contextmanager
def small_encoder() -> Iterator[None]:
    """An encoder of depth 2, which compiles in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGES, 2, tiny_runs.ONE_BLOCK)
        yield


def write_split(folder: pathlib.Path, count: int, seed: int, classes: int = CLASSES) -> None:
    """Images of 8 px in class folders; noisy, so that nothing tells all classes apart."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        label = i % classes
        parent = folder / f"class_{label}"
        parent.mkdir(parents=True, exist_ok=True)
        tint = rng.integers(0, 100, 3) + 35 * np.eye(3, dtype=int)[label % 3]
        pixels = rng.integers(0, 80, (8, 8, 3)) + tint
        Image.fromarray(pixels.astype(np.uint8)).save(parent / f"{i:02d}.png")


def write_data(folder: pathlib.Path) -> pathlib.Path:
    write_split(folder / "train", TRAIN, seed=1)
    write_split(folder / "test", TEST, seed=2)
    return folder


def _wander(config, *args):
    """BYOL with a step in place of its own that compiles in a blink and moves the encoder."""
    method = byol_jax.method.build(config, *args)

    def step(state, batch, *, axis_name):
        rng = jax.random.fold_in(state.rng, state.step)
        moved = jax.tree.map(
            lambda w: w + 0.05 * jax.random.normal(rng, w.shape), state.online_params["encoder"]
        )
        params = state.online_params | {"encoder": moved}
        metrics = {"loss": jnp.ones(()), "finite": jnp.ones(())}
        return state.replace(step=state.step + 1, online_params=params), metrics

    return StandIn(method.init_state, step, method.represent, method.augment)


def make_run(data: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> pathlib.Path:
    """A run of `STEPS` steps that keeps the checkpoint of each."""
    config = tiny_runs.tiny_config(
        data,
        steps=STEPS,
        keep_every_steps=1,
        monitor__diagnostics_every_steps=0,
        encoder__width=0.03,
        encoder__stem="cifar",
        encoder__zero_init_gamma=False,
        projector__hidden_sizes=(8,),
        predictor__hidden_sizes=(8,),
        **changes,
    )
    config.encoder.depth = 2
    pretrain.pretrain(config, str(workdir), _wander)
    assert tiny_runs.saved_steps(workdir) == list(range(1, STEPS + 1))
    return workdir


def make_config(name: str, checkpoint: pathlib.Path | str, **changes: Any) -> ConfigDict:
    """The config of a job, `name` such as `linear_probe:byol`; `changes` have `__` for the dot."""
    job, _, preset = name.partition(":")
    config = _MAKE[job](preset or None)
    quick = QUICK.get(name, QUICK[job])
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in (quick | changes).items()}
    )
    config.checkpoint = str(checkpoint)
    return config.lock()  # as one from the command line is


def run_job(
    name: str, checkpoint: pathlib.Path | str, workdir: pathlib.Path, **changes: Any
) -> dict[str, Any]:
    return jobs.run(make_config(name, checkpoint, **changes), str(workdir))


def copy_run(run: pathlib.Path, to: pathlib.Path, steps: int) -> pathlib.Path:
    """The run as it was after so many of its steps."""
    (to / "checkpoints").mkdir(parents=True)
    for step in range(1, steps + 1):
        add_checkpoint(run, to, step)
    return to


def add_checkpoint(run: pathlib.Path, to: pathlib.Path, step: int) -> None:
    shutil.copytree(run / "checkpoints" / str(step), to / "checkpoints" / str(step))


def read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def confusion(workdir: pathlib.Path) -> np.ndarray:
    with np.load(workdir / "confusion.npz") as arrays:
        return arrays["matrix"]


def start_two(
    folder: pathlib.Path, job: str, fields: dict[str, Any], env: dict[str, str]
) -> list[subprocess.Popen]:
    """Starts a job in `folder/job` as two processes, whose output is in `0.txt` and `1.txt`."""
    command = [sys.executable, "tests/tiny_jobs.py", f"--config=configs/{job}.py"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    command += [f"--workdir={folder / 'job'}", "--compilation_cache=", "--num_processes=2"]
    command += [f"--coordinator_address={wire.LOOPBACK}:{wire.free_port()}"]
    processes = []
    for i in range(2):
        with (folder / f"{i}.txt").open("w") as log:
            options = {"cwd": REPOSITORY, "env": process_env() | env, "stdout": log, "stderr": log}
            processes.append(subprocess.Popen([*command, f"--process_id={i}"], **options))
    return processes


def wait_for(processes: list[subprocess.Popen], folder: pathlib.Path, text: str) -> None:
    """Waits until process 0 has said this."""
    deadline = time.monotonic() + 300
    while text not in (folder / "0.txt").read_text() and time.monotonic() < deadline:
        ended = [process.poll() for process in processes]
        assert ended == [None] * len(ended), (folder / "0.txt").read_text()
        time.sleep(0.02)


if __name__ == "__main__":
    from absl import app

    import run_experiment

    resnet.STAGES[2] = tiny_runs.ONE_BLOCK
    train_batches = inputs.train_batches

    def paused(*args, **kwargs):
        for batch in train_batches(*args, **kwargs):
            time.sleep(float(os.environ.get("TINY_PAUSE", "0")))
            yield batch

    load = encoder.load

    def removed(path: str, step: int | None = None) -> encoder.FrozenEncoder:
        if f"--process_id=1 {step}" == f"{sys.argv[-1]} {os.environ.get('TINY_REMOVES')}":
            shutil.rmtree(pathlib.Path(path) / "checkpoints" / str(step))
        return load(path, step)

    encoder.load = removed
    inputs.train_batches = paused
    app.run(run_experiment.main, flags_parser=run_experiment.parse_flags)
