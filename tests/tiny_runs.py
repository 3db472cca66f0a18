"""Whole runs that take a second: a method that compiles at once, small images, a small config."""

from __future__ import annotations

import functools
import json
import pathlib
import re

import jax
import numpy as np
from conftest import tiny_method, tiny_networks
from ml_collections import ConfigDict
from PIL import Image

from byol_jax import method
from configs import byol
from selfsup_jax import optim
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.method import Method
from selfsup_jax.run import checkpoint
from selfsup_jax.state import TrainState

ONE_BLOCK = ((0, 0, 0, 1), False)  # the stages of an encoder that compiles in a second


def build(config, num_classes, total_steps, warmup_steps) -> Method:
    """`byol_jax.method.build` with networks of a few hundred parameters."""
    networks = tiny_networks(num_classes)
    if not config.use_predictor:
        networks = networks.clone(predictor=None)
    schedule, optimizer = optim.from_config(
        config.optimizer, config.batch_size, total_steps, warmup_steps
    )
    size = config.data.image_size
    return tiny_method(
        networks,
        optimizer=optimizer,
        schedule=schedule,
        tau=optim.tau_schedule(config.tau_schedule, config.tau_base, total_steps),
        augment=Augmentation.from_config(config.views),
        start=functools.partial(
            method.start, image_shape=(size, size, 3), target_parts=method.TARGET_PARTS
        ),
    )


def write_images(folder: pathlib.Path, classes: int, count: int, size: int = 10) -> pathlib.Path:
    """Small images of a colour of their own, whose brightness tells the class."""
    rng = np.random.default_rng(0)
    for i in range(count):
        label = i % max(1, classes)
        parent = folder / f"class_{label}" if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (size, size, 3)) + rng.integers(0, 30, 3) + 80 * label
        Image.fromarray(pixels.astype(np.uint8)).save(parent / f"{i}.png")
    return folder


def fields(folder: pathlib.Path, **changes) -> dict:
    """What a tiny run changes of the preset `folder`, flat: `{"optimizer.name": ...}`.

    The probes, the pictures and kNN are off. Names of `changes` have `__` for the dot.
    """
    each = [f"views.global.view_{i}.{name}_prob" for i in (1, 2) for name in ("jitter", "blur")]
    quiet = dict.fromkeys(each, 0.0)
    return quiet | {
        "data.dir": str(folder),
        "data.image_size": 8,
        "data.test_resize": 8,
        "batch_size": 16,
        "optimizer.warmup_steps": 2,
        "eval.enabled": False,
        "eval.knn_k": 5,
        "eval.fewshot_labels": 2,
        "eval.fewshot_draws": 2,
        "log_every_steps": 50,
        "monitor.diagnostics_every_steps": 500,
        "monitor.knn_every_steps": 0,
        "monitor.plots_every_steps": 0,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }


def tiny_config(folder: pathlib.Path, **changes) -> ConfigDict:
    config = byol.get_config("folder")
    config.update_from_flattened_dict(fields(folder, **changes))
    return config


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps that have a whole checkpoint, in order."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def restore(
    config: ConfigDict,
    workdir: pathlib.Path,
    step: int | None = None,
    num_classes: int | None = 3,
) -> TrainState:
    """The state in a checkpoint, the newest by default."""
    method_ = build(config, num_classes, 10**6, 2)
    like = jax.eval_shape(method_.init_state, jax.random.PRNGKey(0))
    checkpoints = checkpoint.Checkpoints(str(workdir), keep=99)
    state = checkpoints.restore(like, step)
    checkpoints.close()
    return state


def recorded(workdir: pathlib.Path) -> list[dict]:
    """The lines of `metrics.jsonl`, without the time at which each was written."""
    return [json.loads(line) for line in metrics_text(workdir).splitlines()]


def metrics_text(workdir: pathlib.Path) -> str:
    """`metrics.jsonl` as it is, except for the time at which each line was written."""
    return without_time((workdir / "metrics.jsonl").read_bytes())


def without_time(content: bytes) -> str:
    """The content of a `metrics.jsonl` without the time at which each line was written."""
    return re.sub(r', "wall_time": [0-9.]+}', "}", content.decode())
