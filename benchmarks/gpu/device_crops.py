"""Random resized crops on the device, with the boxes of `selfsup_jax.data.crops`.

Crop and resize are one small matrix per axis: out = rows @ image @ columns^T. Weights outside the
box are zero and each row sums to 1, as in TensorFlow's half-pixel bilinear and bicubic kernels
(Keys, a = -0.5) at a crop's border. There is no gather and no branch: one compiled program works
for all boxes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def boxes(
    u: jax.Array,
    height: int,
    width: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """The first try that fits into the image, else the largest centred box of an allowed aspect.

    Args:
        u: `[B, tries, 4]` uniform draws: area, aspect, top, left.
        height, width: of the images, in pixels.
        area: bounds of the box's share of the image.
        aspect: bounds of width / height, log-uniform.

    Returns:
        `[B, 4]` float32 whole numbers: top, left, height, width.
    """
    rows, columns = jnp.float32(height), jnp.float32(width)
    size = rows * columns * (area[0] + (area[1] - area[0]) * u[..., 0])
    low, high = jnp.log(jnp.float32(aspect[0])), jnp.log(jnp.float32(aspect[1]))
    ratio = jnp.exp(low + (high - low) * u[..., 1])
    w, h = jnp.round(jnp.sqrt(size * ratio)), jnp.round(jnp.sqrt(size / ratio))
    top, left = jnp.floor(u[..., 2] * (rows - h + 1)), jnp.floor(u[..., 3] * (columns - w + 1))
    tries = jnp.stack([top, left, h, w], axis=-1)
    fits = (w >= 1) & (h >= 1) & (w <= columns) & (h <= rows)
    first = jnp.take_along_axis(tries, jnp.argmax(fits, axis=1)[:, None, None], axis=1)[:, 0]

    whole = jnp.clip(columns / rows, *aspect)
    w, h = (
        jnp.round(jnp.minimum(columns, rows * whole)),
        jnp.round(jnp.minimum(rows, columns / whole)),
    )
    centre = jnp.stack([(rows - h) // 2, (columns - w) // 2, h, w])
    return jnp.where(fits.any(axis=1)[:, None], first, centre)


def crop(images: jax.Array, box: jax.Array, size: int, method: str = "bicubic") -> jax.Array:
    """Crops `[B, H, W, 3]` uint8 to `box` `[B, 4]`; resizes to `[B, size, size, 3]` uint8."""
    rows = _weights(box[:, 0], box[:, 2], size, images.shape[1], method)
    columns = _weights(box[:, 1], box[:, 3], size, images.shape[2], method)
    x = images.astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("bsh,bhwc->bswc", rows, x, precision=exact)
    x = jnp.einsum("btw,bswc->bstc", columns, x, precision=exact)
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def _weights(start: jax.Array, length: jax.Array, size: int, pixels: int, method: str) -> jax.Array:
    """`[B, size, pixels]`: weight of each input pixel in each output pixel along one axis."""
    source = (jnp.arange(size) + 0.5) * (length[:, None] / size) - 0.5 + start[:, None]  # [B, size]
    i = jnp.arange(pixels, dtype=jnp.float32)
    weights = _kernel(source[..., None] - i, method)
    inside = (i >= start[:, None]) & (i < (start + length)[:, None])
    weights = jnp.where(inside[:, None, :], weights, 0.0)
    return weights / weights.sum(-1, keepdims=True)


def _kernel(x: jax.Array, method: str) -> jax.Array:
    x = jnp.abs(x)
    if method == "bilinear":
        return jnp.maximum(0.0, 1.0 - x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
