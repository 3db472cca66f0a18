"""Decodes a whole split into one array, for data sets that fit into memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os

import numpy as np

from selfsup_jax.data import pixels
from selfsup_jax.data.source import Source


def array_bytes(source: Source, limit: float) -> float:
    """The size of a split's images as one uint8 array; infinite if labels are not known.

    The images of a split without a common size are padded to the largest height and width. Their
    headers are read only until the size is above `limit`.
    """
    if not source.scanned:
        return np.inf
    if source.kind == "array":  # padded, perhaps
        return float(source.images.nbytes)
    if source.shape is not None:
        return 3.0 * source.num_examples * source.shape[0] * source.shape[1]
    height = width = 1
    for i in range(source.num_examples):
        (image,) = source.encoded(np.asarray([i]))
        rows, columns = pixels.size(image, source.reading)
        height, width = max(height, rows), max(width, columns)
        if 3.0 * source.num_examples * height * width > limit:
            break
    return 3.0 * source.num_examples * height * width


def into_array(source: Source) -> Source:
    """The same split with its images in one array; see `Source.sizes` and `Source.broken`."""
    if source.kind == "array":
        return source
    count = source.num_examples

    def encoded(i: int) -> pixels.Encoded:
        return source.encoded(np.asarray([i]))[0]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        if source.shape is not None:  # no header needs to be read
            sizes = np.tile(np.asarray(source.shape, np.int32), (count, 1))
        else:
            size = lambda i: pixels.size(encoded(i), source.reading)  # noqa: E731
            sizes = np.asarray(list(threads.map(size, range(count))), np.int32)
        height, width = sizes.max(axis=0)
        images = np.zeros((count, height, width, 3), np.uint8)

        def decode(i: int) -> bool:
            image = pixels.decoded(encoded(i), source.reading)
            if image is None or (source.shape and image.shape[:2] != source.shape):
                return False
            images[i, : image.shape[0], : image.shape[1]] = image
            return True

        good = np.asarray(list(threads.map(decode, range(count))))
    sizes[~good] = 1  # any size that a box can be drawn in
    full = bool((sizes == (height, width)).all())
    return dataclasses.replace(
        source,
        kind="array",
        images=images,
        read=None,
        shape=(int(height), int(width)) if full else None,
        sizes=None if full else sizes,
        broken=tuple(int(i) for i in np.flatnonzero(~good)),
    )
