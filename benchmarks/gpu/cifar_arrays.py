"""Packs TFDS's CIFAR-10 into arrays without TensorFlow and TFDS, for a machine that lacks them.

    python -m benchmarks.gpu.cifar_arrays TFDS_DIR cifar10.npz

Elsewhere, `python -m selfsup_jax.data.pack` does it for any data set.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image


def main() -> None:
    """Writes the arrays."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", help="TFDS's data_dir")
    parser.add_argument("out", help="FILE.npz")
    args = parser.parse_args()
    packed = {}
    for split in ("train", "test"):
        packed[f"{split}_images"], packed[f"{split}_labels"] = load(args.data_dir, split)
    np.savez(args.out, **packed)


def load(data_dir: str, split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 32, 32, 3]` uint8 and labels `[N]` int32 of cifar10/3.0.2, in file order."""
    path = pathlib.Path(data_dir) / "cifar10" / "3.0.2" / f"cifar10-{split}.tfrecord-00000-of-00001"
    images, labels = [], []
    for record in records(path):
        features = example(record)
        images.append(np.asarray(Image.open(io.BytesIO(bytes(features["image"]))).convert("RGB")))
        labels.append(features["label"])
        if len(images) == limit:
            break
    return np.stack(images), np.asarray(labels, np.int32)


def records(path: pathlib.Path) -> Iterator[memoryview]:
    """Yields TFRecords, stored as length (8 bytes), its checksum (4), data, its checksum (4)."""
    data = memoryview(path.read_bytes())
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield data[at + 12 : at + 12 + length]
        at += length + 16


def example(record: memoryview) -> dict[str, Any]:
    """Name -> first value (bytes or an integer) of the features of a serialised tf.train.Example.

    Example { Features features = 1; }, Features { map<string, Feature> feature = 1; }, and a
    Feature is a
    BytesList = 1, a FloatList = 2 or an Int64List = 3, each with a repeated value = 1.
    """
    out = {}
    for _, features in _fields(record):
        for _, entry in _fields(features):
            pair = dict(_fields(entry))
            ((kind, values),) = _fields(pair[2])
            value = next(iter(_fields(values)))[1]
            if kind == 3 and not isinstance(value, int):  # packed
                value = _varint(value, 0)[0]
            out[bytes(pair[1]).decode()] = value
    return out


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of a message's varint and length-delimited fields."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire_type = key & 7
        if wire_type not in (0, 2):
            raise ValueError(f"wire type {wire_type} is not expected in these records")
        value, at = _varint(message, at)
        if wire_type == 2:
            value, at = message[at : at + value], at + value
        yield key >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """(the integer at `at`, with seven bits per byte; the position after it)."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


if __name__ == "__main__":
    main()
