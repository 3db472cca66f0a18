"""XLA's own convolution, and one of stride 2 as one of stride 1 over blocks of pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Margins = tuple[tuple[int, int], tuple[int, int]]  # of rows and columns: (before, after) each


def plain(x: jax.Array, kernel: jax.Array, stride: int, margins: Margins) -> jax.Array:
    """Cross-correlates `x` `[B, H, W, C]` with `kernel` `[k, k, C, D]`: `[B, H', W', D]`."""
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), margins, dimension_numbers=layout)


def on_blocks(x: jax.Array, kernel: jax.Array, margins: Margins) -> jax.Array:
    """`plain` of stride 2, for an odd k and even H and W, over blocks of 2x2 pixels.

    These have four times the channels: tensor cores work on multiples of 8 channels.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, height // 2, width // 2, 4 * channels)
    # The window starts `before` pixels early: if that is odd, in the middle of its first block.
    grow = [(before % 2, 1 - before % 2) for before, _ in margins]
    size = (len(kernel) + 1) // 2
    kernel = jnp.pad(kernel, (*grow, (0, 0), (0, 0))).reshape(size, 2, size, 2, channels, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(size, size, 4 * channels, -1)
    top, left = ((before + 1) // 2 for before, _ in margins)
    return plain(x, kernel, 1, ((top, size - 1 - top), (left, size - 1 - left)))
