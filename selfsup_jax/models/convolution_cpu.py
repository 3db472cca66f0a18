"""3x3 convolutions in float32 as XLA's CPU compiler makes them fast, each gradient in its own form.

With enough channels, XLA's convolutions run at nearly the peak rate of matmuls on the CPU. Three
things are slow, and have another form here (milliseconds on one core for 256 images, layers of the
ResNet-18 a quarter as wide; measured 23 November 2026, jax 0.10.2; more in `benchmarks/README.md`):

- the kernel gradient, for which XLA first moves the batch to the last axis: 27 ms for 16 channels
  of 32 px, and more for that move, 10 as matmuls of shifted copies, a few images at a time;
- up to 16 channels: two neighbouring columns as one pixel of twice the channels, 12.6 ms to 8.3;
- from 64 channels on, Winograd's algorithm has a quarter of the multiplications: 5.4 ms to 2.9 for
  64 channels of 8 px, 9.5 to 4.8 for the kernel gradient.

What is larger than the cache is done a few images at a time, in a loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from selfsup_jax.models.convolution_plain import Margins, on_blocks, plain

_PIXELS_AT_ONCE = 8192


def suits(x: jax.Array, size: int, stride: int, margins: Margins) -> bool:
    """Whether `three_by_three` can compute this convolution."""
    same = stride == 1 and margins == ((1, 1), (1, 1))
    return x.dtype == jnp.float32 and size == 3 and (same or stride == 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def three_by_three(x: jax.Array, kernel: jax.Array, stride: int, margins: Margins) -> jax.Array:
    """Cross-correlates `x` `[B, H, W, C]` with `kernel` `[3, 3, C, D]`."""
    return _same(x, kernel) if stride == 1 else plain(x, kernel, stride, margins)


def _forward(x, kernel, stride, margins):
    return three_by_three(x, kernel, stride, margins), (x, kernel)


def _backward(stride, margins, saved, g):
    x, kernel = saved
    if stride == 1:
        return _same(g, kernel[::-1, ::-1].swapaxes(2, 3)), _kernel_gradient(x, g)
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0
    few = even and x.shape[-1] <= 16  # where XLA's own takes five times as long
    form = on_blocks if few else functools.partial(plain, stride=stride)
    d_x = jax.vjp(lambda x: form(x, kernel, margins=margins), x)[1](g)[0]
    return d_x, _strided_kernel_gradient(x, g, margins)


three_by_three.defvjp(_forward, _backward)


@jax.jit  # traced once for all layers of the same shape
def _same(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """With stride 1, and one pixel of padding all around."""
    channels, features = kernel.shape[2:]
    if _winograd_pays(channels, features):
        return _winograd(x, kernel)
    if max(channels, features) <= 16 < 2 * features and x.shape[2] % 2 == 0:
        on_pairs = functools.partial(_on_column_pairs, kernel=kernel)
        return _over_images(on_pairs, x, stack=True)
    return plain(x, kernel, 1, ((1, 1), (1, 1)))


@jax.jit
def _kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """The gradient of `_same` by its kernel: `[3, 3, C, D]`."""
    if _winograd_pays(x.shape[-1], g.shape[-1]):
        return _winograd_kernel_gradient(x, g)
    return _over_images(_rows_by_columns, g, x)


# ------------------------------------------------------------------------ few channels


def _on_column_pairs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_same`, with columns 2 w and 2 w + 1 of the result as one pixel.

    XLA's fast library takes no convolution whose input and output both have 16 channels or fewer.
    """
    batch, height, width, channels = x.shape
    x = _pad(x, 2, 1, 1).reshape(batch, height, width // 2 + 1, 2 * channels)
    shifted = [jnp.pad(kernel, ((0, 0), (s, 1 - s), (0, 0), (0, 0))) for s in (0, 1)]
    pairs = jnp.stack(shifted, axis=-2).reshape(3, 2, 2 * channels, -1)
    return plain(x, pairs, 1, ((1, 1), (0, 0))).reshape(batch, height, width, -1)


def _rows_by_columns(g: jax.Array, x: jax.Array) -> jax.Array:
    """The kernel gradient as one matmul of three shifts of `x` with three shifts of `g`."""
    batch, height, width, features = g.shape
    channels = x.shape[-1]
    columns = _pad(g, 2, 1, 1)
    columns = jnp.concatenate([columns[:, :, 2 - j : 2 - j + width] for j in range(3)], axis=-1)
    if channels < 32:
        rows = _pad(x, 1, 1, 1)
        rows = jnp.concatenate([rows[:, i : i + height] for i in range(3)], axis=-1)
        product = _over_pixels(rows, columns)
    else:  # XLA's fast library takes no transposed matrix on the left: 9.9 ms to 7.5
        x = _separately(x.reshape(-1, channels).T).reshape(channels, batch, height, width)
        rows = _pad(x, 2, 1, 1)
        rows = jnp.concatenate([rows[:, :, i : i + height] for i in range(3)])
        product = jnp.dot(rows.reshape(3 * channels, -1), columns.reshape(-1, 3 * features))
    return product.reshape(3, channels, 3, features).swapaxes(1, 2)


def _strided_kernel_gradient(x: jax.Array, g: jax.Array, margins: Margins) -> jax.Array:
    """The kernel gradient at stride 2, as one matmul with the nine shifts of `x`."""
    channels, features = x.shape[-1], g.shape[-1]

    def of_images(g: jax.Array, x: jax.Array) -> jax.Array:
        height, width = g.shape[1:3]
        x = jnp.pad(x, ((0, 0), *margins, (0, 0)))
        rows = [x[:, i : i + 2 * height - 1 : 2] for i in range(3)]
        patches = [row[:, :, j : j + 2 * width - 1 : 2] for row in rows for j in range(3)]
        product = _over_pixels(g, jnp.concatenate(patches, axis=-1))
        return product.reshape(features, 3, 3, channels).transpose(1, 2, 3, 0)

    return _over_images(of_images, g, x)


# ------------------------------------------------------------------------ Winograd


def _winograd_matrices() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of F(4, 3) with the points 0, +-1 / sqrt(2), +-sqrt(2), infinity: `[4, 6], [6, 3], [6, 6]`.

    Four results of a filter of three taps from six inputs d: A ((G k) * (B d)). With these points
    rounding errors are a quarter of those with the usual 0, +-1, +-2, about three times a direct
    convolution's.
    """
    points = np.array([0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)])
    a, g, b = np.zeros((4, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    a[:, :5], a[3, 5] = points ** np.arange(4)[:, None], 1
    g[:5], g[5, 2] = points[:, None] ** np.arange(3), 1
    for i, point in enumerate(points):
        others = np.delete(points, i)
        b[i, :5] = np.poly(others)[::-1] / np.prod(point - others)
    b[5] = np.poly(points)[::-1]
    return a, g, np.where(abs(b) < 1e-12, 0, b)


_A, _G, _B = _winograd_matrices()
_BOTH_AXES = np.kron(_G, _G).astype(np.float32)  # [36, 9]


def _winograd_pays(channels: int, features: int) -> bool:
    return min(channels, features) >= 64


def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_same` by Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308)."""
    batch, height, width, channels = x.shape
    features = kernel.shape[-1]
    transformed = jnp.dot(_BOTH_AXES, kernel.reshape(9, -1)).reshape(36, channels, features)
    tiles = _input_tiles(x)
    y = lax.dot_general(tiles.reshape(36, -1, channels), transformed, (((2,), (1,)), ((0,), (0,))))
    y = _separately(y.reshape(*tiles.shape[:-1], features))  # [6, 6, B, rows, columns, D]
    y = _separately(jnp.stack([_sum(_A[i], y) for i in range(4)], axis=3))
    y = jnp.stack([_sum(_A[j], y) for j in range(4)], axis=4)
    rows, columns = y.shape[1], y.shape[3]
    return y.reshape(batch, 4 * rows, 4 * columns, features)[:, :height, :width]


def _winograd_kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    channels, features = x.shape[-1], g.shape[-1]
    x, g = _input_tiles(x).reshape(36, -1, channels), _output_tiles(g).reshape(36, -1, features)
    product = lax.dot_general(g, x, (((1,), (1,)), ((0,), (0,)))).swapaxes(1, 2)
    return jnp.dot(_BOTH_AXES.T, product.reshape(36, -1)).reshape(3, 3, channels, features)


def _input_tiles(x: jax.Array) -> jax.Array:
    """Transforms the 6x6 pixels around each tile of 4x4: `[6, 6, B, rows, columns, C]`."""
    rows, columns = (-(-n // 4) for n in x.shape[1:3])
    ends = [(1, 4 * tiles + 1 - n) for tiles, n in zip((rows, columns), x.shape[1:3], strict=True)]
    x = _separately(jnp.pad(x, ((0, 0), *ends, (0, 0))))
    parts = [x[:, i : i + 4 * rows - 3 : 4] for i in range(6)]
    x = _separately(jnp.stack([_sum(b, parts) for b in _B]))
    parts = [x[:, :, :, j : j + 4 * columns - 3 : 4] for j in range(6)]
    return _separately(jnp.stack([_sum(b, parts) for b in _B], axis=1))


def _output_tiles(g: jax.Array) -> jax.Array:
    """The gradient of the products, from the result's: `[6, 6, B, rows, columns, D]`."""
    rows, columns = (-(-n // 4) for n in g.shape[1:3])
    ends = [(0, 4 * tiles - n) for tiles, n in zip((rows, columns), g.shape[1:3], strict=True)]
    g = jnp.pad(g, ((0, 0), *ends, (0, 0)))
    g = g.reshape(len(g), rows, 4, columns, 4, -1)
    g = _separately(jnp.stack([_sum(a, [g[:, :, i] for i in range(4)]) for a in _A.T]))
    return _separately(jnp.stack([_sum(a, [g[..., j, :] for j in range(4)]) for a in _A.T], axis=1))


def _sum(factors: np.ndarray, parts: Sequence[jax.Array] | jax.Array) -> jax.Array:
    terms = [float(f) * p if f != 1 else p for f, p in zip(factors, parts, strict=True) if f]
    return functools.reduce(jnp.add, terms)


# ------------------------------------------------------------------------ helpers


def _separately(x: jax.Array) -> jax.Array:
    """Keeps XLA from computing `x` anew for each use."""
    return lax.optimization_barrier(x)


def _pad(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """Zeros around an axis; XLA's own padding takes twice as long, as it looks at each element."""
    zeros = [
        jnp.zeros((*x.shape[:axis], n, *x.shape[axis + 1 :]), x.dtype) for n in (before, after)
    ]
    return _separately(jnp.concatenate([zeros[0], x, zeros[1]], axis))


def _over_pixels(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a` transposed times `b`, of pixels' vectors: `[..., C], [..., D]` to `[C, D]`."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _over_images(
    form: Callable[..., jax.Array], *arrays: jax.Array, stack: bool = False
) -> jax.Array:
    """The sum (or stack) of `form` of a few images at a time, so that copies stay in the cache."""
    batch, height, width = arrays[0].shape[:3]
    most = max(1, _PIXELS_AT_ONCE // (height * width))
    few = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    if few == batch:
        return form(*arrays)
    parts = [x.reshape(batch // few, few, *x.shape[1:]) for x in arrays]
    if stack:
        result = lax.map(lambda part: form(*part), parts)
        return result.reshape(batch, *result.shape[2:])
    shape = jax.eval_shape(form, *(x[0] for x in parts))
    total = jnp.zeros(shape.shape, shape.dtype)
    return lax.scan(lambda total, part: (total + form(*part), None), total, parts)[0]
