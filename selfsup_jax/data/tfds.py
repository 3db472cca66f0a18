"""Image-classification sets of TensorFlow Datasets."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from selfsup_jax import paths
from selfsup_jax.data import sources
from selfsup_jax.data.host_tensorflow import tf
from selfsup_jax.data.source import Source
from selfsup_jax.errors import NoData, bad_field, nearest


def load(
    name: str,
    directory: str,
    split: str,
    field: str,
    *,
    cache_gib: float = 4.0,
    shuffle_buffer: int = 16384,
    several_labels: bool = False,
) -> Source:
    """A TFDS image-classification split with encoded images.

    A split of up to `cache_gib` GiB is held in memory and can be read in any order. So can a larger
    one that lies in ArrayRecord files. Any other is streamed: each host reads its own part, with
    shuffled files and a shuffle buffer of `shuffle_buffer` images. A data set with several labels
    per image counts as unlabelled, unless `several_labels` is True.
    """
    builder = _builder(name, directory)
    info = builder.info
    if "image" not in info.features:
        raise bad_field(
            "data.name", name, f"has no 'image' feature; it has {', '.join(info.features)}"
        )
    height, width = info.features["image"].shape[:2]
    shape = (height, width) if height and width else None
    lengths = {k: v.num_examples for k, v in info.splits.items()}
    parts = _part_lengths(split, lengths, field)
    total = sum(count for _, count in parts)
    label_of, names = _labels_of(info.features, several_labels)
    full_name = f"{info.full_name} {split}"
    class_names = tuple(names) if names and len(names) > 1 else None
    size = sum(info.splits[part].num_bytes * count / lengths[part] for part, count in parts)

    if info.file_format == tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        records = builder.as_data_source(
            split=split, decoders={"image": tfds.decode.SkipDecoding()}
        )
        made = Source(full_name, total, class_names, "encoded", shape=shape)
        return _of_records(
            made, records, several_labels, in_memory=several_labels or size <= cache_gib * 2**30
        )

    def read(seed: int | None, host: int, hosts: int) -> tf.data.Dataset:
        config = tfds.ReadConfig(shuffle_seed=seed, add_tfds_id=True)
        config.options.deterministic = True
        # At the end of an evaluation the tuner may sleep for seconds before it stops.
        config.options.autotune.enabled = seed is not None
        part = tfds.even_splits(split, n=hosts)[host] if hosts > 1 else split
        dataset = builder.as_dataset(
            split=part,
            shuffle_files=seed is not None,
            read_config=config,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        if seed is not None:
            dataset = dataset.shuffle(shuffle_buffer, seed=seed)
        return dataset.map(lambda x: (x["image"], label_of(x), _name_of(x)))

    if size > cache_gib * 2**30:
        if np.min(next(iter(read(None, 0, 1).take(1)))[1]) < 0:  # unpublished labels are -1
            class_names = None
        return Source(full_name, total, class_names, "encoded", shape=shape, stream=read)

    rows = list(read(None, 0, 1).batch(1024).as_numpy_iterator())
    images, labels, ids = (np.concatenate(column) for column in zip(*rows, strict=True))
    if class_names and labels.min() < 0:  # a test split with unpublished labels
        class_names = None
    return Source(
        name=full_name,
        num_examples=len(images),
        class_names=class_names,
        kind="encoded",
        images=images,
        labels=labels if class_names else None,
        describe=lambda i: ids[i].decode(),
        shape=shape,
    )


def _of_records(source: Source, records: Any, several_labels: bool, in_memory: bool) -> Source:
    """The split of ArrayRecord files: `records[i]` is a dictionary."""
    classes = source.num_classes

    def label_of(example: dict[str, Any]) -> Any:
        if "label" in example:
            return example["label"] if classes else -1
        if not (classes and several_labels):
            return -1
        return np.bincount(np.asarray(example["labels"], int), minlength=classes).clip(max=1)

    def read(rows: np.ndarray) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        examples = records.__getitems__([int(row) for row in rows])
        labels = np.asarray([label_of(example) for example in examples], np.int32)
        pairs = zip(rows, examples, strict=True)
        names = [_file_name(example) or f"{source.name}[{row}]" for row, example in pairs]
        return [example["image"] for example in examples], labels, np.asarray(names)

    if np.min(read(np.arange(1))[1]) < 0:  # unpublished labels are -1
        source = dataclasses.replace(source, class_names=None)
    if not in_memory:
        return dataclasses.replace(source, read=read)
    images, labels, names = read(np.arange(source.num_examples))
    return dataclasses.replace(
        source,
        images=np.asarray(images, object),
        labels=labels if source.class_names else None,
        describe=lambda i: str(names[i]),
    )


def _file_name(example: dict[str, Any]) -> str:
    name = example.get("file_name", example.get("image/filename", ""))
    return name.decode() if isinstance(name, bytes) else str(name)


def _part_lengths(split: str, lengths: dict[str, int], field: str) -> list[tuple[str, int]]:
    """(split, number of examples) of each part of a split in TFDS's syntax."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)
        for name, length in lengths.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, KeyError) as e:
        reason = str(e).splitlines()[-1]  # the last line has the reason
        raise bad_field(field, split, f"{reason}; splits: {', '.join(lengths)}") from e
    counts = [
        (part.splitname, len(range(lengths[part.splitname])[part.from_ : part.to]))
        for part in parts
    ]
    if not sum(count for _, count in counts):  # TFDS can't read an empty split
        raise bad_field(field, split, f"holds no images; splits: {', '.join(lengths)}")
    return counts


def split_names(name: str, directory: str, download: bool = False) -> list[str]:
    """The splits of a TFDS data set, which is downloaded and prepared first if `download`."""
    return list(_builder(name, directory, download).info.splits)


def _labels_of(features, several: bool) -> tuple[Callable, list[str] | None]:
    """(function: example -> its label or labels, names of the classes or None)."""
    if "label" in features:
        return lambda x: tf.cast(x["label"], tf.int32), features["label"].names
    labels = dict(features).get("labels")  # a FeaturesDict has no `get`
    names = getattr(getattr(labels, "feature", None), "names", None)
    if not several or names is None:
        return lambda x: tf.constant(-1), None

    def many(x):
        hot = tf.reduce_sum(tf.one_hot(x["labels"], len(names), dtype=tf.int32), axis=0)
        return tf.minimum(hot, 1)

    return many, names


def _name_of(example: dict[str, tf.Tensor]) -> tf.Tensor:
    """The image's file name if the data set has it, else its TFDS id."""
    for feature in ("file_name", "image/filename"):
        if feature in example:
            return example[feature]
    return example["tfds_id"]


def _builder(name: str, directory: str, download: bool = False) -> tfds.core.DatasetBuilder:
    data_dir = os.path.expanduser(directory) if directory else None
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as e:
        known = [*tfds.list_builders(with_community_datasets=False), *sources.OWN]
        hint = f"is not a known data set; did you mean: {nearest(name, known)}?"
        raise NoData(str(bad_field("data.name", name, hint))) from e
    if download:
        try:
            builder.download_and_prepare()
        except Exception as e:  # any error of the network, the disk or the data set's code
            first_line = (str(e).splitlines() or [type(e).__name__])[0]
            raise NoData(f"config.data.name={name!r}: could not be prepared: {first_line}") from e
    if not builder.info.splits:
        where = str(data_dir or builder._data_dir_root)
        there = sorted(paths.listdir(where)) if paths.isdir(where) else []
        there = there[:10] + ["..."] * (len(there) > 10)
        hint = (
            f"holds no prepared {name} (it holds: {', '.join(there) or 'nothing'}); point it to "
            "where it lies, or add --config.data.download=True"
        )
        raise NoData(str(bad_field("data.dir", where, hint)))
    return builder
