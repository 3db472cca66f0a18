"""The data of a run: the splits named in its config, where they are kept, and batches of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from selfsup_jax.data import (
    announce,
    crops,
    decode,
    intensity,
    pipeline,
    pixels,
    resident,
    sources,
    views,
)
from selfsup_jax.data.batches import HostBatch, Undecodable
from selfsup_jax.devices import hosts, parallel, process
from selfsup_jax.errors import bad_field
from selfsup_jax.state import Batch

PLACEMENTS = ("auto", "device", "host")
LABELS = ("auto", "none")
CROP_ON = ("host", "device")


class Data(NamedTuple):
    """The splits of a run."""

    train: sources.Source
    test: sources.Source | None  # None if there are no probes
    undecodable: Undecodable


def load_data(config: ConfigDict) -> Data:
    """Loads the training split and, if it has labels, the test split; fills in empty names."""
    data = config.data
    chosen = not data.train_split
    fill_in_splits(data)
    train = _load(data, data.train_split, "data.train_split")
    if chosen and not train.num_classes and data.train_split == "train[:90%]":
        # Without labels there are no probes, so no images need to be held out.
        data.train_split, data.test_split = "train", "train[:0]"
        train = _load(data, "train", "data.train_split")
    announce.once(data.dir, announce.of_folder(data, train, chosen))
    train = _placed(data, train)
    test = None
    if train.num_classes and config.eval.enabled:
        test = load_split(data, data.test_split, "data.test_split")
        if not test.num_classes:
            logging.warning("%s has no labels: no probes", test.name)
            test = None
    undecodable = Undecodable(train.num_examples, data.max_undecodable)
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
    """One split of the data set that a `data` section names, in an array if it fits.

    The first split that is loaded decides what `data.intensity=auto` means for all.
    """
    source = _load(data, split, field, several_labels=several_labels)
    announce.once(data.dir, announce.of_folder(data, source, chosen=False))
    return _placed(data, source)


def _load(
    data: ConfigDict, split: str, field: str, *, several_labels: bool = False
) -> sources.Source:
    options: dict[str, Any] = {}
    if data.name not in sources.OWN:
        options = {"cache_gib": data.cache_gib, "several_labels": several_labels}
    source = sources.load(data.name, data.dir, split, field, **options)
    if hosts.several():
        hosts.check_same(field, {f"{field}: {k}": v for k, v in source.facts(data.dir).items()})
    if data.labels == "none":
        source = dataclasses.replace(source, class_names=None, labels=None)
    return source


def _placed(data: ConfigDict, source: sources.Source) -> sources.Source:
    if data.name == "folder":
        announce.once(f"pages of {data.dir}", announce.of_pages(source))
    if data.intensity == "auto" and (found := intensity.of_data(source)):
        data.intensity = found
        announce.once(source.name, announce.of_range(source.name, found))
    # TFDS's images stay as they lie there: so they are in all published results.
    turned = data.exif_orientation and data.name == "folder"
    reading = pixels.Reading(data.intensity, turned)
    source = dataclasses.replace(source, reading=reading)
    return decode.into_array(source) if _fits(data, source) else source


def _fits(data: ConfigDict, source: sources.Source) -> bool:
    """Whether the split should be, and can be, kept in one array on each device."""
    if data.placement == "host":
        return False
    limit = data.device_share * process.bytes_of_a_device()
    limit = hosts.gather_hosts(np.asarray([limit])).min()  # all hosts decide alike
    return decode.array_bytes(source, limit) <= limit


class Feed(NamedTuple):
    """How the training step gets its views.

    Attributes:
        views: `(arrays, step, batch) -> batch` with `view_1`, `view_2`, ..., as part of the step;
            None if the batches already have views, cropped by the host.
        arrays: the data set, which is copied to each device; None if the batches have the images.
    """

    views: Callable[[Any, jax.Array, Batch], Batch] | None = None
    arrays: resident.Arrays | None = None


def feed(config: ConfigDict, source: sources.Source) -> Feed:
    """How the training step gets the views of a split, see `config.data.placement`.

    Raises:
        UserError: the split must be on the devices, but is too large.
    """
    data = config.data
    if data.placement == "device" and not _fits(data, source):
        raise bad_field(
            "data.placement",
            data.placement,
            f"{source.name} is above data.cache_gib={data.cache_gib:g}, or larger than "
            f"data.device_share={data.device_share:g} "
            f"of a device's {process.bytes_of_a_device() / 2**30:.1f} GiB; use host",
        )
    if source.kind != "array" and data.crop_on == "host":
        return Feed()
    crop = functools.partial(resident.crop_batch, specs=crop_specs(config), seed=config.seed)
    resides = source.kind == "array" and _fits(data, source)
    return Feed(crop, resident.arrays_of(source) if resides else None)


def with_views(feed: Feed, step: int, batch: HostBatch) -> dict[str, Any]:
    """The views of a few rows of a batch, as in a step after `step` others; for plots."""
    if feed.views is None:
        return batch
    arrays = feed.arrays
    if arrays is not None:  # only the rows that are needed
        arrays = resident.Arrays(*(None if x is None else x[batch["row"]] for x in arrays))
        batch = batch | {"row": np.arange(len(batch["row"]), dtype=np.int32)}
    return jax.jit(feed.views)(arrays, np.int32(step), batch)  # one compilation, not 75 small ones


def train_batches(config: ConfigDict, data: Data, first_step: int) -> Iterator[HostBatch]:
    """This host's part of each global batch, from `first_step` on, endlessly.

    The batches of a split in an array have rows for `Feed.views`; others have images or views.
    """
    options: dict[str, Any] = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "positions": parallel.host_positions(config.batch_size, config.accumulate_steps),
        "first_step": first_step,
        "undecodable": data.undecodable,
    }
    if data.train.kind == "array":
        resides = _fits(config.data, data.train)
        return resident.train_batches(data.train, with_images=not resides, **options)
    options["canvas"] = config.data.canvas if config.data.crop_on == "device" else 0
    options |= {"processes": config.data.processes, "reader": config.data.reader}
    return pipeline.train_batches(data.train, crop_specs(config), **options)


def crop_specs(config: ConfigDict) -> list[crops.CropSpec]:
    """How the crops of each view are drawn."""
    specs: list[crops.CropSpec] = []
    for _, group in views.groups_of(config.views):
        # Whole numbers in a config, as (1, 1), would be of another type in a graph.
        area, aspect = ((float(low), float(high)) for low, high in (group.area, group.aspect))
        spec = crops.CropSpec(group.size, area, aspect, config.data.resize_method)
        specs += [spec] * group.count
    return specs


def eval_batches(
    data: ConfigDict, source: sources.Source, batch_size: int, limit: int | None = None
) -> Callable[[], Iterable[HostBatch]]:
    """Returns a function; each call iterates once over this host's part of a split's images.

    Args:
        data: the config's `data` section.
        source: a split.
        batch_size: of this host.
        limit: see `pipeline.eval_batches`; None for all images.
    """
    in_array = source.kind == "array"
    read: Callable[..., Iterable[HostBatch]]
    read = resident.eval_batches if in_array else pipeline.eval_batches
    undecodable = Undecodable(source.num_examples, data.max_undecodable)
    return lambda: read(
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
