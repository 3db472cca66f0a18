"""Decodes a whole split into one array, for data sets that fit into memory."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import os
from typing import Any

import numpy as np
from PIL import Image

from selfsup_jax.data.source import Source


def array_bytes(source: Source, limit: float) -> float:
    """The size of a split's images as one uint8 array; infinite if they are streamed.

    The images of a split without a common size are padded to the largest height and width. Their
    headers are read only until the size is above `limit`.
    """
    if source.images is None:
        return np.inf
    if source.kind == "array":  # padded, perhaps
        return float(source.images.nbytes)
    if source.shape is not None:
        return 3.0 * source.num_examples * source.shape[0] * source.shape[1]
    height = width = 1
    for image in _encoded(source):
        rows, columns = _size(image)
        height, width = max(height, rows), max(width, columns)
        if 3.0 * source.num_examples * height * width > limit:
            break
    return 3.0 * source.num_examples * height * width


def into_array(source: Source) -> Source:
    """The same split with its images in one array; see `Source.sizes` and `Source.broken`."""
    if source.kind == "array":
        return source
    encoded = _encoded(source)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        if source.shape is not None:  # no header needs to be read
            sizes = np.tile(np.asarray(source.shape, np.int32), (len(encoded), 1))
        else:
            sizes = np.asarray(list(threads.map(_size, encoded)), np.int32)
        height, width = sizes.max(axis=0)
        images = np.zeros((len(encoded), height, width, 3), np.uint8)

        def decode(i: int) -> bool:
            pixels = _decoded(encoded[i])
            if pixels is None or (source.shape and pixels.shape[:2] != source.shape):
                return False
            images[i, : pixels.shape[0], : pixels.shape[1]] = pixels
            return True

        good = np.asarray(list(threads.map(decode, range(len(encoded)))))
    sizes[~good] = 1  # any size that a box can be drawn in
    full = bool((sizes == (height, width)).all())
    return dataclasses.replace(
        source,
        kind="array",
        images=images,
        shape=(int(height), int(width)) if full else None,
        sizes=None if full else sizes,
        broken=tuple(int(i) for i in np.flatnonzero(~good)),
    )


def _encoded(source: Source) -> Any:
    """Paths, or byte strings."""
    return source.images if source.kind == "path" else source.images.numpy()


def _open(image: Any) -> Image.Image:
    return Image.open(image if isinstance(image, str) else io.BytesIO(image))


def _size(image: Any) -> tuple[int, int]:
    """(height, width) from the header; (1, 1) if it cannot be read."""
    try:
        with _open(image) as file:
            return file.height, file.width
    except Exception:  # Pillow raises many types for damaged files
        return 1, 1


def _decoded(image: Any) -> np.ndarray | None:
    """`[H, W, 3]` uint8 of the first frame, or None if the image cannot be decoded."""
    try:
        with _open(image) as file:
            if file.mode.startswith("I;16"):  # Pillow would clip 16 bits
                gray = (np.asarray(file) >> 8).astype(np.uint8)
                return np.repeat(gray[..., None], 3, axis=-1)
            return np.asarray(file.convert("RGB"))
    except Exception:
        return None
