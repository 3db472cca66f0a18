"""Image-classification sets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from selfsup_jax import paths
from selfsup_jax.data import records, sources
from selfsup_jax.data.source import Source
from selfsup_jax.errors import NoData, bad_field, first_line, nearest

_FORMATS = tfds.core.file_adapters.FileFormat
_ENCODED = {"image": tfds.decode.SkipDecoding()}


def load(
    name: str,
    directory: str,
    split: str,
    field: str,
    *,
    cache_gib: float = 4.0,
    several_labels: bool = False,
) -> Source:
    """A TFDS image-classification split with encoded images, in TFRecord or ArrayRecord files.

    Images are read where they lie, in any order. A split of up to `cache_gib` GiB is read once at
    the start, so that its labels are known, and if it lies in a bucket is held in memory. A data
    set with several labels per image counts as unlabelled, unless `several_labels` is True.
    """
    builder = _builder(name, directory)
    info = builder.info
    if "image" not in info.features:
        raise bad_field(
            "data.name", name, f"has no 'image' feature; it has {', '.join(info.features)}"
        )
    height, width = info.features["image"].shape[:2]
    lengths = {k: v.num_examples for k, v in info.splits.items()}
    parts = _part_lengths(split, lengths, field)
    size = sum(info.splits[part].num_bytes * count / lengths[part] for part, count in parts)
    small = several_labels or size <= cache_gib * 2**30
    names, several = _class_names(info.features, several_labels)
    images, fetch, id_of = _records(builder, split, keep_index=not small)
    examples = Examples(fetch, info.features, id_of, len(names), several)
    if np.min(examples(images[:1])[1]) < 0:  # unpublished labels are -1
        names = ()
    source = Source(
        name=f"{info.full_name} {split}",
        num_examples=len(images),
        class_names=names or None,
        kind="encoded",
        images=images,
        describe=lambda i: id_of(images[i]),
        shape=(height, width) if height and width else None,
        read=examples,
    )
    if not small:
        return source
    in_bucket = paths.is_bucket(str(builder.data_dir))
    encoded, labels, ids = source.columns(functools.partial(examples.scan, held=in_bucket))
    if in_bucket:
        source = dataclasses.replace(source, images=encoded, read=None)
    elif isinstance(fetch, records.Files):
        source = dataclasses.replace(source, images=encoded, read=None, fetch=fetch)
    known = labels if names else None
    return dataclasses.replace(source, labels=known, describe=lambda i: str(ids[i]))


@dataclasses.dataclass(frozen=True)
class Examples:
    """`Source.read` of a TFDS split; it can be sent to another process.

    Attributes:
        fetch: places -> records.
        features: TFDS's, which decode a record.
        id_of: the place of a record -> its name, if it has no file name.
        classes: their number; 0 if labels are not used.
        several: whether an image can have several labels.
    """

    fetch: Callable[[np.ndarray], list[bytes]]
    features: Any
    id_of: Callable[[Any], str]
    classes: int
    several: bool

    def __call__(self, places: np.ndarray) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        """(images, labels, names); the image of a damaged record is empty, which is no image."""
        return self._taken_apart(self.fetch(places), places)

    def scan(self, places: np.ndarray, held: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, with the images' own places, for TFRecord files, unless they are held."""
        fetched = self.fetch(places)
        images, labels, names = self._taken_apart(fetched, places)
        if held:
            return np.asarray(images, object), labels, names
        if isinstance(self.fetch, records.Files):
            places = records.inside(places, fetched, images)
        return places, labels, names

    def _taken_apart(
        self, fetched: list[bytes], places: np.ndarray
    ) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        examples = [self._decoded(record) for record in fetched]
        labels = np.asarray([self._label_of(example) for example in examples], np.int32)
        names = [_file_name(x) or self.id_of(p) for x, p in zip(examples, places, strict=True)]
        return [example["image"] for example in examples], labels, np.asarray(names)

    def _decoded(self, record: bytes) -> dict[str, Any]:
        with contextlib.suppress(Exception):  # of several types
            example = self.features.deserialize_example_np(record, decoders=_ENCODED)
            if example["image"] is not None:  # as of an empty record
                return example
        return {"image": b"", "label": 0, "labels": []}

    def _label_of(self, example: dict[str, Any]) -> Any:
        if not self.classes:
            return -1
        if not self.several:
            return example["label"]
        given = np.asarray(example["labels"], int)
        return np.bincount(given, minlength=self.classes).clip(max=1)


def _records(builder: Any, split: str, keep_index: bool) -> tuple[np.ndarray, Callable, Callable]:
    """(places of the split's records, places -> records, place -> name)."""
    info, parts = builder.info, builder.info.splits[split].file_instructions
    counts = {os.fspath(part.filename): part.examples_in_shard for part in parts}
    files = tuple(counts)
    records.check_files(files)
    if info.file_format == _FORMATS.ARRAY_RECORD:
        rows = builder.as_data_source(split=split).data_source
        return np.arange(len(rows)), Rows(rows), functools.partial(_row_name, info.full_name, split)
    if info.file_format != _FORMATS.TFRECORD:
        hint = f"has {info.file_format.value} files, must have tfrecord or array_record"
        raise bad_field("data.dir", str(builder.data_dir), hint)
    places = records.places(files, list(counts.values()), keep_index)
    starts = dict(zip(files, np.cumsum([0, *counts.values()]), strict=False))
    order = records.interleaved(
        [starts[os.fspath(part.filename)] + part.skip for part in parts],
        [part.take for part in parts],
        1 if info.disable_shuffling else 16,
    )
    names = tuple(os.path.basename(file) for file in files)
    return places[order], records.Files(files), functools.partial(_record_name, names)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Records of ArrayRecord files, by their rows."""

    source: Any

    def __call__(self, rows: np.ndarray) -> list[bytes]:
        """The bytes of each record; none of one that cannot be read any more."""
        return [self._record(int(row)) for row in rows]

    def _record(self, row: int) -> bytes:
        try:
            return self.source[row]
        except Exception:  # of several types
            return b""


def _row_name(full_name: str, split: str, row: int) -> str:
    return f"{full_name} {split}[{row}]"


def _record_name(files: tuple[str, ...], place: Any) -> str:
    return f"{files[place['file']]}__{place['number']}"  # TFDS's id


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


def _class_names(features: Any, several: bool) -> tuple[tuple[str, ...], bool]:
    """(names of the classes, whether an image can have several); no names if labels are not used.

    A data set of one class has no labels either.
    """
    many = "label" not in features
    feature = dict(features).get("labels" if many else "label")  # a FeaturesDict has no `get`
    feature = getattr(feature, "feature", None) if many else feature
    names = tuple(getattr(feature, "names", None) or ())
    return (names if len(names) > 1 and (several or not many) else ()), many


def _builder(name: str, directory: str, download: bool = False) -> tfds.core.DatasetBuilder:
    data_dir = os.path.expanduser(directory) if directory else None
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as e:
        known = [*tfds.list_builders(with_community_datasets=False), *sources.OWN]
        hint = f"is not a known data set; did you mean: {nearest(name, known)}?"
        raise NoData(str(bad_field("data.name", name, hint))) from e
    if download:
        from selfsup_jax.data import host_tensorflow  # noqa: F401  TFDS prepares data with it

        try:
            builder.download_and_prepare()
        except Exception as e:  # any error of the network, the disk or the data set's code
            hint = f"could not be prepared: {first_line(e)}"
            raise NoData(str(bad_field("data.name", name, hint))) from e
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
