"""Gaussian blur of a batch with one sigma per image, as matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Planes = tuple[jax.Array, jax.Array, jax.Array]  # red, green, blue: [B, H, W] each, in [0, 1]


def gaussian_blur(planes: Planes, sigma: jax.Array, kernel: int, padding: str) -> Planes:
    """Separable Gaussian blur with one `sigma` per image, `[B]` in pixels, of `kernel` taps.

    Each axis is a product with a banded matrix per image: matmuls are fast on every backend. A
    convolution with one kernel per image would be a grouped convolution, which is slow.
    """
    _, height, width = planes[0].shape
    rows = _blur_matrix(height, sigma, kernel, padding)
    columns = rows if width == height else _blur_matrix(width, sigma, kernel, padding)
    stacked = jnp.stack(planes, axis=1)  # [B, 3, H, W]
    stacked = jnp.einsum("bih,bchw->bciw", rows, stacked)
    stacked = jnp.einsum("bjw,bciw->bcij", columns, stacked)
    return stacked[:, 0], stacked[:, 1], stacked[:, 2]


def _blur_matrix(size: int, sigma: jax.Array, kernel: int, padding: str) -> jax.Array:
    """`[B, size, size]`: row i holds the weights of the inputs that make output i."""
    radius = kernel // 2
    taps = jnp.arange(-radius, radius + 1, dtype=jnp.float32)
    variance = 2.0 * jnp.square(sigma)[:, None, None]
    total = jnp.exp(-jnp.square(taps) / variance).sum(-1, keepdims=True)
    out, source = jnp.arange(size)[:, None], jnp.arange(size)[None, :]

    def weight(distance: jax.Array) -> jax.Array:
        w = jnp.exp(-jnp.square(distance.astype(jnp.float32)) / variance) / total
        return jnp.where(jnp.abs(distance) <= radius, w, 0.0)

    matrix = weight(out - source)
    if padding == "reflect":  # mirrors the image at both ends without repeating the end pixels
        matrix += jnp.where(source > 0, weight(out + source), 0.0)
        matrix += jnp.where(source < size - 1, weight(2 * (size - 1) - out - source), 0.0)
    return matrix
