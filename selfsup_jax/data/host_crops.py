"""Crops on the host, in NumPy, for images that are decoded during training.

The boxes and the weights are those of `crops.py`. Few weights of a row of a resize matrix are not
zero, so here the matrices are sparse. The pixels are the same, up to one grey level by rounding.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.sparse

from selfsup_jax.data import crops


def crop_and_resize(image: np.ndarray, box: np.ndarray, spec: crops.CropSpec) -> np.ndarray:
    """Cuts a box out of an image and resizes it.

    Args:
        image: `[H, W, 3]` uint8.
        box: `[4]`, whole numbers: top, left, height, width.
        spec: the result's size, and how it is resized.

    Returns:
        `[size, size, 3]` uint8.
    """
    top, left, height, width = (int(x) for x in box)
    crop = image[top : top + height, left : left + width]
    rows = _matrix(height, spec.size, spec.method)
    columns = _matrix(width, spec.size, spec.method, channels=3)
    return _resized(crop, rows, columns)


def test_view(image: np.ndarray, resize: int, size: int, method: str) -> np.ndarray:
    """The evaluation view, see `crops.test_view`: `[H, W, 3]` uint8 to `[size, size, 3]`."""
    shorter = min(image.shape[:2])

    def matrix(length: int, channels: int) -> scipy.sparse.csr_matrix:
        scaled = float(np.round(np.float32(length * resize) / np.float32(shorter)))
        first, scale = (scaled - size) // 2, length / scaled
        return _matrix(length, size, method, scale, first, antialias=True, channels=channels)

    return _resized(image, matrix(image.shape[0], 1), matrix(image.shape[1], 3))


@functools.lru_cache(maxsize=4096)  # of some 30 kilobytes each
def _matrix(
    length: int,
    out: int,
    method: str,
    scale: float = 0.0,
    first: float = 0.0,
    *,
    antialias: bool = False,
    channels: int = 1,
) -> scipy.sparse.csr_matrix:
    """`crops.resize_matrix` of a whole axis, which has `channels` numbers a pixel."""
    pace = np.float32(scale or length / out)
    target = np.arange(out, dtype=np.float32)[:, None] + np.float32(first)
    radius = crops.RADIUS[method] * (
        max(float(pace), 1.0) if antialias or method == "area" else 1.0
    )
    near = np.arange(2 * int(np.ceil(radius)) + 1, dtype=np.float32)
    source = np.floor((target + 0.5) * pace - radius) + near
    weights = crops.resize_weights(source, target, length, pace, method, antialias, np)
    pixels = np.clip(source, 0, length - 1).astype(np.int32)
    rows = [np.broadcast_to(weights, (channels, *weights.shape)).swapaxes(0, 1)]
    rows.append(channels * pixels[:, None] + np.arange(channels, dtype=np.int32)[:, None])
    data, columns = (np.ascontiguousarray(x).reshape(-1) for x in rows)
    ends = np.arange(0, data.size + 1, near.size, dtype=np.int32)
    shape = (channels * out, channels * length)
    return scipy.sparse.csr_matrix((data.astype(np.float32), columns, ends), shape)


def _resized(
    image: np.ndarray, rows: scipy.sparse.csr_matrix, columns: scipy.sparse.csr_matrix
) -> np.ndarray:
    x = rows @ image.astype(np.float32).reshape(len(image), -1)  # [H', W C]
    x = columns @ np.ascontiguousarray(x.T)  # [W' C, H']
    np.rint(x, out=x)
    np.clip(x, 0, 255, out=x)
    return x.astype(np.uint8).T.reshape(rows.shape[0], -1, 3)
