"""The data of a run: the splits named in its config, and batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging
from ml_collections import ConfigDict

from selfsup_jax.data import crops, pipeline, sources, views
from selfsup_jax.devices import hosts, parallel


class Data(NamedTuple):
    """The splits of a run."""

    train: sources.Source
    test: sources.Source | None  # None if there are no probes
    undecodable: pipeline.Undecodable


def load_data(config: ConfigDict) -> Data:
    """Loads the training split and, if it has labels, the test split; fills in empty names."""
    data = config.data
    chosen = not data.train_split
    fill_in_splits(data)
    train = load_split(data, data.train_split, "data.train_split")
    if chosen and not train.num_classes and data.train_split == "train[:90%]":
        # Without labels there are no probes, so no images need to be held out.
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
    """Fills in the empty split names of a `data` section; prepares the data set if `download`."""
    if data.download and not hosts.is_writer():
        hosts.wait_for_all("prepared")  # one host prepares the data, the others wait
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


def train_batches(config: ConfigDict, data: Data, first_step: int) -> Iterator[pipeline.HostBatch]:
    """This host's part of each global batch, from `first_step` on, endlessly."""
    specs: list[crops.CropSpec] = []
    for _, group in views.groups_of(config.views):
        crop = (group.size, tuple(group.area), tuple(group.aspect), config.data.resize_method)
        specs += [crops.CropSpec(*crop)] * group.count
    return pipeline.train_batches(
        data.train,
        specs,
        seed=config.seed,
        batch_size=config.batch_size,
        positions=parallel.host_positions(config.batch_size, config.accumulate_steps),
        first_step=first_step,
        undecodable=data.undecodable,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def eval_batches(
    data: ConfigDict, source: sources.Source, batch_size: int, limit: int | None = None
) -> Callable[[], Iterable[pipeline.HostBatch]]:
    """Returns a function; each call iterates once over this host's part of a split's images.

    Args:
        data: the config's `data` section.
        source: a split.
        batch_size: of this host.
        limit: see `pipeline.eval_batches`; None for all images.
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
