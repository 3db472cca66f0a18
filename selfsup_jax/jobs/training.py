"""Shared by the jobs that train: labelled splits and the call of the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import STARTED, durations, optim, paths
from selfsup_jax.data import inputs, sources
from selfsup_jax.data.batches import Undecodable
from selfsup_jax.errors import bad_field
from selfsup_jax.evaluation import probes
from selfsup_jax.jobs import frozen_features, runner
from selfsup_jax.run import workdir
from selfsup_jax.run.progress import log
from selfsup_jax.state import TrainState
from selfsup_jax.training import loop


def splits(config: ConfigDict) -> tuple[sources.Source, sources.Source]:
    """Loads the training and the test split, both with labels."""
    inputs.fill_in_splits(config.data)
    train = runner.load_split(config, config.data.train_split, "data.train_split")
    test = runner.load_split(config, config.data.test_split, "data.test_split")
    limit = config.data.max_train_images
    if limit and limit < train.num_examples:
        indices = np.linspace(0, train.num_examples, limit, endpoint=False).astype(int)
        train = sources.subset(train, lambda labels, names: indices)
    return train, test


def hold_out(
    config: ConfigDict, train: sources.Source
) -> tuple[sources.Source, sources.Source | None]:
    """Splits off `config.held_out_images` images: (the other ones, the held-out ones or None).

    Raises:
        UserError: the split's labels are not known, and it is itself a part of a split.
    """
    count = min(config.held_out_images, train.num_examples // 5)
    if not count:
        return train, None
    if train.labels is None:
        name = config.data.train_split
        if not name.isidentifier():
            raise bad_field(
                "data.train_split",
                name,
                "a part of a split above data.cache_gib cannot be divided; give the whole split, "
                "or --config.held_out_images=0 and a single learning rate",
            )
        field = "data.train_split"
        rest = runner.load_split(config, f"{name}[{count}:]", field)
        return rest, runner.load_split(config, f"{name}[:{count}]", field)
    mask = probes.held_out_rows(train.labels, count, config.seed)
    rest = sources.subset(train, lambda labels, names: np.flatnonzero(~mask))
    held = sources.subset(train, lambda labels, names: np.flatnonzero(mask))
    return rest, dataclasses.replace(held, name=f"{train.name}, held out")


def check_labels(config: ConfigDict, train: sources.Source, test: sources.Source) -> None:
    """Calls `frozen_features.check_labels` before training; skipped where labels are not known."""
    if train.labels is not None and test.labels is not None:
        frozen_features.check_labels(config, train.labels, test.labels, train.num_classes or 0)


def train(
    config: ConfigDict,
    source: sources.Source,
    init_state: Callable[[jax.Array], TrainState],
    train_step: Callable[..., Any],
    folder: str,
) -> TrainState:
    """Trains in `folder`, or resumes there; see `loop.fit`.

    Args:
        config: of the job.
        source: the training images.
        init_state: `rng -> TrainState`.
        train_step: has the signature of a method's `train_step`.
        folder: receives checkpoints, `metrics.jsonl` and TensorBoard event files.

    Returns:
        The state after the last step, as host arrays.
    """
    total, warmup = durations.total_and_warmup(config, source.num_examples)
    undecodable = Undecodable(source.num_examples, config.data.max_undecodable)
    data = inputs.Data(source, None, undecodable)
    description = workdir.describe_run(config, source)

    def announce(state: TrainState) -> None:
        length = durations.described(config, source.num_examples, total)
        log(f"{length}; {source.num_examples:,} images")
        log(optim.describe(config.optimizer, config.batch_size, total, warmup))

    paths.makedirs(folder)
    with workdir.checkpoints_of(config, folder) as checkpoints:
        spec = loop.TrainSpec(
            config=config,
            init_state=init_state,
            train_step=train_step,
            batches=lambda step: inputs.train_batches(config, data, step),
            feed=inputs.feed(config, source),
            total_steps=total,
            workdir=folder,
            checkpoints=checkpoints,
            meta=lambda step: workdir.meta(description, step, undecodable.names),
            announce=announce,
            started=STARTED,
        )
        return loop.fit(spec).state
