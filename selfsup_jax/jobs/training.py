"""What the jobs that train have in common: labelled splits, and a run of the loop."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import STARTED, optim
from selfsup_jax import config as config_lib
from selfsup_jax.data import inputs, pipeline, sources
from selfsup_jax.devices import parallel
from selfsup_jax.durations import to_steps
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.jobs import frozen_features, runner
from selfsup_jax.run import progress, workdir
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import say
from selfsup_jax.state import TrainState
from selfsup_jax.training import loop


def splits(config: ConfigDict) -> tuple[sources.Source, sources.Source]:
    """Training and test split, both with labels."""
    inputs.fill_in_splits(config.data)
    train = runner.load_split(config, config.data.train_split, "data.train_split")
    test = runner.load_split(config, config.data.test_split, "data.test_split")
    limit = config.data.max_train_images
    if limit and limit < train.num_examples:
        spread = np.linspace(0, train.num_examples, limit, endpoint=False).astype(int)
        train = sources.subset(train, lambda labels, names: spread)
    return train, test


def hold_out(
    config: ConfigDict, train: sources.Source
) -> tuple[sources.Source, sources.Source | None]:
    """(the training images without `config.held_out_images` of them, these).

    Raises:
        UserError: a streamed split that is itself a part of one.
    """
    count = min(config.held_out_images, train.num_examples // 5)
    if not count:
        return train, None
    if train.stream is not None:
        name = config.data.train_split
        if not name.isidentifier():
            raise bad_field(
                "data.train_split",
                name,
                "of a split that is streamed only the whole can be divided; give its name alone, "
                "or --config.held_out_images=0 and a single learning rate",
            )
        field = "data.train_split"
        rest = runner.load_split(config, f"{name}[{count}:]", field)
        return rest, runner.load_split(config, f"{name}[:{count}]", field)
    assert train.labels is not None
    mask = frozen_features.held_out_rows(train.labels, count, config.seed)
    rest = sources.subset(train, lambda labels, names: np.flatnonzero(~mask))
    held = sources.subset(train, lambda labels, names: np.flatnonzero(mask))
    return rest, dataclasses.replace(held, name=f"{train.name}, held out")


def check_labels(config: ConfigDict, train: sources.Source, test: sources.Source) -> None:
    """As `frozen_features.check_labels`, before anything is trained; a stream isn't looked at."""
    if train.labels is not None and test.labels is not None:
        frozen_features.check_labels(config, train.labels, test.labels, train.num_classes or 0)


def total_steps(config: ConfigDict, num_examples: int) -> tuple[int, int]:
    """Steps of the job, and of its warm-up."""
    config_lib.check_batch_fits(config, num_examples)
    total = to_steps(config, num_examples, config.batch_size)
    if total < 1:
        raise UserError("config.epochs, .examples and .steps come to no step at all")
    optimizer = config.optimizer
    warmup = to_steps(optimizer, num_examples, config.batch_size, "warmup_", "optimizer.")
    return total, warmup


def train(
    config: ConfigDict,
    source: sources.Source,
    init_state: Callable[[jax.Array], TrainState],
    train_step: Callable[..., Any],
    folder: str,
) -> TrainState:
    """Trains in `folder`, or goes on there; see `loop.train`.

    Args:
        config: of the job.
        source: the images to train on.
        init_state: `rng -> TrainState`.
        train_step: as a method's.
        folder: takes checkpoints, `metrics.jsonl` and TensorBoard's events.

    Returns:
        The last step's state, host arrays.
    """
    total, warmup = total_steps(config, source.num_examples)
    undecodable = pipeline.Undecodable(source.num_examples, config.data.max_undecodable)
    data = inputs.Data(source, None, undecodable)
    found = {"train_images": source.num_examples, "classes": source.num_classes}
    identity = {"config": json.loads(config.to_json()), "found": found}
    os.makedirs(folder, exist_ok=True)
    with workdir.checkpoints_of(config, folder) as checkpoints:
        initial = jax.device_get(init_state(jax.random.PRNGKey(config.seed)))
        fresh = checkpoints.latest_step is None
        latest = initial if fresh else checkpoints.restore(initial)
        first = int(latest.step)
        epochs = total / (source.num_examples // config.batch_size)
        say(
            f"{total:,} steps of {config.batch_size} images ({epochs:,.4g} epochs of "
            f"{source.num_examples:,})"
        )
        say(optim.describe(config.optimizer, config.batch_size, total, warmup))
        if first:
            say(f"going on from step {first:,} in {folder}")
        if first >= total:
            return latest
        recorder = Recorder(folder, first)
        line = progress.Progress(total, first, config.batch_size)
        work = loop.Work(
            config=config,
            train_step=train_step,
            batches=inputs.train_batches(config, data, first, num_views=1),
            total_steps=total,
            workdir=folder,
            checkpoints=checkpoints,
            meta=lambda step: workdir.meta(identity, step, undecodable.names),
            started=STARTED if not first else time.perf_counter(),
        )
        try:
            state = parallel.replicate(lambda s: s, latest)
            return parallel.unreplicate(loop.train(work, state, first, recorder, line))
        finally:
            line.close()
            recorder.close()
