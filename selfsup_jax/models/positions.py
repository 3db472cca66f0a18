"""Position embeddings of a grid of patches: fixed ones, and those of another grid."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


def sincos(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed 2-D sine and cosine positions of MoCo v3 (Chen et al. 2021, arXiv 2104.02057).

    A quarter of the width each has sin(row / t), cos(row / t), sin(column / t), cos(column / t),
    with t from 1 to 10,000: the order of its code. The class token's are 0.

    Args:
        rows, columns: of the grid.
        width: D, a multiple of 4.

    Returns:
        `[1 + rows * columns, D]` float32.
    """
    places = (a.reshape(-1, 1) for a in np.mgrid[:rows, :columns])
    omega = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    waves = [wave(place * omega) for place in places for wave in (np.sin, np.cos)]
    table = np.concatenate(waves, axis=1)
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def interpolated(table: jax.Array, rows: int, columns: int) -> jax.Array:
    """The positions of a square grid for another grid: bicubic, as in DINO's code.

    Args:
        table: `[1 + n * n, D]`; the class token's stay as they are.
        rows, columns: of the other grid.

    Returns:
        `[1 + rows * columns, D]`.
    """
    side = math.isqrt(len(table) - 1)
    if (rows, columns) == (side, side):
        return table
    grid = table[1:].reshape(side, side, -1)
    of_rows, of_columns = (jnp.asarray(_bicubic(side, n)) for n in (rows, columns))
    grid = jnp.einsum("ai,bj,ijd->abd", of_rows, of_columns, grid, precision="highest")
    return jnp.concatenate([table[:1], grid.reshape(rows * columns, -1)])


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """PyTorch's bicubic interpolation as a matrix `[new, old]`: no antialiasing, edges repeated.

    `a` is the kernel's parameter (Keys 1981); `jax.image.resize` has -0.5.
    """
    centers = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centers).astype(int)
    matrix = np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        t = np.abs(centers - first - tap)
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((t - 5) * t + 8) * t * a - 4 * a
        weight = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weight)
    return matrix
