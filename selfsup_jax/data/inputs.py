"""What a run reads: the splits that its config names, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from selfsup_jax.data import crops, pipeline, sources
from selfsup_jax.devices import hosts, parallel


class Data(NamedTuple):
    """The splits of a run."""

    train: sources.Source
    test: sources.Source | None  # None where there is nothing to probe
    undecodable: pipeline.Undecodable


def load_data(config: ConfigDict) -> Data:
    """The training split and, where there are labels, the held-out one; fills in empty splits."""
    data = config.data
    chosen = not data.train_split
    fill_in_splits(data)
    train = load_split(data, data.train_split, "data.train_split")
    if chosen and not train.num_classes and data.train_split == "train[:90%]":
        # Without labels there is nothing to hold images out for.
        data.train_split, data.test_split = "train", "train[:0]"
        train = load_split(data, "train", "data.train_split")
    test = None
    if train.num_classes and config.eval.enabled:
        test = load_split(data, data.test_split, "data.test_split")
        if not test.num_classes:
            logging.warning("%s has no labels: no probes", test.name)
            test = None
    undecodable = pipeline.Undecodable(train.num_examples, data.max_undecodable)
    return Data(train, test, undecodable)


def fill_in_splits(data: ConfigDict) -> None:
    """Names the splits that a `data` section leaves empty; prepares the data set if it may."""
    if data.download and not hosts.is_writer():
        hosts.wait_for_all("prepared")  # one host prepares, the others find it done
    try:
        if data.download or not (data.train_split and data.test_split):
            train_split, test_split = sources.choose_splits(data.name, data.dir, data.download)
            data.train_split = data.train_split or train_split
            data.test_split = data.test_split or test_split
    finally:
        if data.download and hosts.is_writer():
            hosts.wait_for_all("prepared")


def load_split(
    data: ConfigDict, split: str, field: str, *, several_labels: bool = False
) -> sources.Source:
    """One split of the data set that a `data` section names; see `sources.load`."""
    options: dict[str, Any] = {}
    if data.name not in sources.EMBEDDED:
        options = {
            "cache_gib": data.cache_gib,
            "shuffle_buffer": data.shuffle_buffer,
            "several_labels": several_labels,
        }
    return sources.load(data.name, data.dir, split, field, **options)


def train_batches(
    config: ConfigDict, data: Data, first_step: int, num_views: int = 2
) -> Iterator[pipeline.HostBatch]:
    """This host's part of each global batch from `first_step` on, without end."""
    spec = crops.CropSpec(
        config.data.image_size,
        tuple(config.data.crop_area),
        tuple(config.data.crop_aspect),
        config.data.resize_method,
    )
    return pipeline.train_batches(
        data.train,
        spec,
        seed=config.seed,
        batch_size=config.batch_size,
        positions=parallel.host_positions(config.batch_size, config.accumulate_steps),
        first_step=first_step,
        undecodable=data.undecodable,
        num_views=num_views,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def eval_batches(
    data: ConfigDict, source: sources.Source, batch_size: int, limit: int | None = None
) -> Callable[[], Iterable[pipeline.HostBatch]]:
    """Each call gives this host's part of a split's test images once, at most `limit` in all.

    Args:
        data: the config's `data` section.
        source: a split.
        batch_size: images at a time, of this host.
        limit: of more images an evenly spread part is read; None for all.
    """
    undecodable = pipeline.Undecodable(source.num_examples, data.max_undecodable)
    return lambda: pipeline.eval_batches(
        source,
        resize=data.test_resize,
        size=data.image_size,
        method=data.resize_method,
        batch_size=batch_size,
        limit=source.num_examples if limit is None else limit,
        undecodable=undecodable,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
