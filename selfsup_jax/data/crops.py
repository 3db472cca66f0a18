"""Random resized crops in JAX: the boxes, and cropping and resizing inside a compiled step.

The box of a view is drawn from (seed, step, index in the global batch), so it does not depend on
the devices or hosts, nor on where the image is cropped: `host_crops.py` cuts the same boxes out.

To crop and resize is one small matrix per axis: `rows @ image @ columns^T`. The matrix is zero
outside the box, so that one compiled program, without gathers or branches, works for all boxes.
(`jax.image.scale_and_translate` would look at pixels beyond the box, and has no `area`.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ATTEMPTS = 10  # as torchvision and the authors' code; after them a centre crop


@dataclasses.dataclass(frozen=True)
class CropSpec:
    """How a training crop is drawn and resized.

    Attributes:
        size: side of the square crop after resizing, in pixels.
        area: range of the crop's share of the image's area, uniform.
        aspect: range of width / height, log-uniform (BYOL, appendix B).
        method: of resizing; without antialiasing, as in BYOL's code.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    method: str = "bicubic"


# ------------------------------------------------------------------------------------ boxes


def box_draws(seed: int, step: jax.Array, index: jax.Array, num_views: int) -> jax.Array:
    """The uniform random numbers for the boxes of a batch.

    Args:
        seed: of the run.
        step: int32 scalar, the steps done before this one.
        index: `[b]` int32, positions in the global batch.
        num_views: boxes per image.

    Returns:
        `[b, num_views, attempts, 4]` float32 in [0, 1): area, aspect, row, column.
    """
    # The tag separates these keys from those of the initial state, which has the same seed.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(seed), 0x63726F70), step)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    return jax.vmap(lambda key: jax.random.uniform(key, (num_views, _ATTEMPTS, 4)))(keys)


def boxes_from_draws(draws: jax.Array, sizes: jax.Array, spec: CropSpec) -> jax.Array:
    """The boxes of one view.

    The first attempt that fits into the image is used; if none fits, the largest centre crop with
    an allowed aspect.

    Args:
        draws: `[b, attempts, 4]`, see `box_draws`.
        sizes: `[b, 2]` height and width of the images, in pixels.
        spec: ranges of area and aspect.

    Returns:
        `[b, 4]` float32, whole numbers: top, left, height, width.
    """
    rows, columns = (sizes[:, None, axis].astype(jnp.float32) for axis in (0, 1))
    low, high = spec.area
    area = rows * columns * (low + (high - low) * draws[..., 0])
    log_low, log_high = np.log(np.asarray(spec.aspect, np.float32))
    aspect = jnp.exp(log_low + (log_high - log_low) * draws[..., 1])
    width, height = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (width >= 1) & (height >= 1) & (width <= columns) & (height <= rows)
    top = jnp.floor(draws[..., 2] * (rows - height + 1))
    left = jnp.floor(draws[..., 3] * (columns - width + 1))
    attempts = jnp.stack([top, left, height, width], axis=-1)
    # One-hot instead of a gather, which is slow on TPUs.
    first = jax.nn.one_hot(jnp.argmax(fits, axis=1), fits.shape[1])
    chosen = jnp.sum(jnp.where(first[..., None] > 0, attempts, 0), axis=1)

    rows, columns = rows[:, 0], columns[:, 0]
    ratio = jnp.clip(columns / rows, *spec.aspect)
    width = jnp.round(jnp.minimum(columns, rows * ratio))
    height = jnp.round(jnp.minimum(rows, columns / ratio))
    centre = jnp.stack([(rows - height) // 2, (columns - width) // 2, height, width], axis=-1)
    return jnp.where(fits.any(axis=1)[:, None], chosen, centre)


def boxes(
    seed: int, step: jax.Array, index: jax.Array, sizes: jax.Array, specs: Sequence[CropSpec]
) -> jax.Array:
    """The boxes of all views of a batch, `[b, views, 4]`; see `box_draws`, `boxes_from_draws`."""
    draws = box_draws(seed, step, index, len(specs))
    each = [boxes_from_draws(draws[:, i], sizes, spec) for i, spec in enumerate(specs)]
    return jnp.stack(each, axis=1)


# --------------------------------------------------------------------------------- resizing


def random_resized_crops(
    images: jax.Array, boxes: jax.Array, specs: Sequence[CropSpec]
) -> list[jax.Array]:
    """The views of a batch.

    Args:
        images: `[b, H, W, 3]` uint8, of any size up to H x W, at the top left.
        boxes: `[b, views, 4]`, see `boxes`.
        specs: one per view.

    Returns:
        For each view `[b, size, size, 3]` uint8.
    """
    views = []
    for i, spec in enumerate(specs):
        top, left, height, width = boxes[:, i].T
        rows = resize_matrix(top, height, spec.size, images.shape[1], spec.method)
        columns = resize_matrix(left, width, spec.size, images.shape[2], spec.method)
        views.append(_apply(rows, columns, images))
    return views


def test_view(
    images: jax.Array, sizes: jax.Array, *, resize: int, size: int, method: str
) -> jax.Array:
    """The evaluation view: the shorter side resized to `resize`, then a centre crop.

    Args:
        images: see `random_resized_crops`.
        sizes: `[b, 2]` height and width of each image, in pixels.
        resize, size: pixels; `resize` is at least `size`.
        method: of resizing; with antialiasing, because nothing else smooths a large image.

    Returns:
        `[b, size, size, 3]` uint8.
    """
    shorter = sizes.min(axis=1, keepdims=True)
    scaled = jnp.round(sizes * resize / shorter)  # [b, 2]
    first = jnp.floor((scaled - size) / 2)  # pixels that the centre crop leaves out

    def matrix(axis: int) -> jax.Array:
        whole = jnp.zeros(len(sizes)), sizes[:, axis].astype(jnp.float32)
        places = {"scale": sizes[:, axis] / scaled[:, axis], "first": first[:, axis]}
        total = images.shape[1 + axis]
        return resize_matrix(*whole, size, total, method, **places, antialias=True)

    return _apply(matrix(0), matrix(1), images)


def resize_matrix(
    start: jax.Array,
    length: jax.Array,
    out: int,
    total: int,
    method: str,
    *,
    scale: jax.Array | None = None,
    first: jax.Array | None = None,
    antialias: bool = False,
) -> jax.Array:
    """Matrices that cut a part out of an axis and resize it.

    Args:
        start, length: `[b]` float32, the part, in pixels.
        out: number of pixels of the result.
        total: number of pixels of the axis.
        method: `bilinear`, `bicubic`, `lanczos3` or `area`.
        scale: `[b]`, pixels of the part per pixel of the result; None for `length / out`.
        first: `[b]`, pixels of the result that are left out before its first.
        antialias: whether the kernel gets wider when the image gets smaller.

    Returns:
        `[b, out, total]` float32; each row sums to 1.
    """
    scale = length / out if scale is None else scale
    first = jnp.zeros_like(length) if first is None else first
    start, length, scale, first = (x[:, None, None] for x in (start, length, scale, first))
    source = jnp.arange(total, dtype=jnp.float32) - start
    target = jnp.arange(out, dtype=jnp.float32)[:, None] + first
    return resize_weights(source, target, length, scale, method, antialias)


def resize_weights(
    source: Any, target: Any, length: Any, scale: Any, method: str, antialias: bool, np: Any = jnp
) -> Any:
    """How much each pixel counts in each pixel of the result, as in TensorFlow.

    Args:
        source: pixels of the part, whole numbers; not all are in it.
        target: pixels of the result, that broadcast with `source`.
        length: of the part.
        scale, method, antialias: see `resize_matrix`.
        np: `jax.numpy` or `numpy`, which computes them.

    Returns:
        float32, 0 outside the part; they sum to 1 over the last axis.
    """
    if method == "area":  # the mean over the pixels, and parts of pixels, under a target pixel
        end = np.minimum((target + 1) * scale, source + 1)
        weights = np.maximum(end - np.maximum(target * scale, source), 0)
    else:
        width = np.maximum(scale, 1) if antialias else 1.0
        weights = _KERNELS[method](np.abs(source + 0.5 - (target + 0.5) * scale) / width, np)
    weights = np.where((source >= 0) & (source < length), weights, 0)
    return weights / weights.sum(-1, keepdims=True)


def _bicubic(x: Any, np: Any) -> Any:  # Keys 1981, a = -0.5
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _sinc(x: Any, np: Any) -> Any:
    # Near 0 a series: a compiler may round x otherwise in the sine than in what that is divided by.
    square = (np.pi * x) ** 2
    return np.where(x < 0.1, 1 - square / 6 + square**2 / 120, np.sinc(x))


# Weight of a pixel by its distance from the sampled point; no pixel beyond the radius counts.
RADIUS = {"bilinear": 1.0, "bicubic": 2.0, "lanczos3": 3.0, "area": 1.0}
_KERNELS = {
    "bilinear": lambda x, np: np.maximum(1 - x, 0),
    "bicubic": _bicubic,
    "lanczos3": lambda x, np: np.where(x < 3, _sinc(x, np) * _sinc(x / 3, np), 0),
}


def _apply(rows: jax.Array, columns: jax.Array, images: jax.Array) -> jax.Array:
    b, height, width, channels = images.shape
    x = images.astype(jnp.float32).reshape(b, height, width * channels)
    # Full float32: accelerators default to fewer digits than uint8 needs.
    x = jnp.matmul(rows, x, precision="highest").reshape(b, -1, width, channels)
    x = jnp.einsum("bpw,bowc->bopc", columns, x, precision="highest")
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)
