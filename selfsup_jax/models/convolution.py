"""Convolution and max-pooling, computed on each backend in a way that is fast there.

The results are the same. The measurements are in `benchmarks/README.md`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.models import convolution_cpu
from selfsup_jax.models.convolution_plain import Margins, on_blocks, plain


def convolve(x: jax.Array, kernel: jax.Array, stride: int, margins: Margins) -> jax.Array:
    """Cross-correlates `x` `[B, H, W, C]` with `kernel` `[k, k, C, D]`: `[B, H', W', D]`."""
    size = len(kernel)
    if size == 7 and stride == 2 and not (x.shape[1] % 2 or x.shape[2] % 2):
        return on_blocks(x, kernel, margins)  # images have 3 channels, the blocks 12
    as_convolution = functools.partial(plain, stride=stride, margins=margins)
    on_cpu: Callable[..., jax.Array]
    if size == 1 or x.shape[1] * x.shape[2] <= (2 * stride) ** 2:
        # On the CPU, XLA's convolution is slow for 1x1 kernels (backward: 2 times as slow) and for
        # outputs of up to 2x2 pixels (about 15 times). On a GPU, matmuls instead change the layout
        # of the arrays between them: the step of ResNet-50 took 1.3 times as long.
        on_cpu = functools.partial(_patches_matmul, stride=stride, margins=margins)
    elif convolution_cpu.suits(x, size, stride, margins):
        three_by_three = convolution_cpu.three_by_three
        on_cpu = functools.partial(three_by_three, stride=stride, margins=margins)
    else:
        return as_convolution(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=as_convolution)


def _patches_matmul(x: jax.Array, kernel: jax.Array, stride: int, margins: Margins) -> jax.Array:
    """The convolution as one matmul of the patches."""
    size = len(kernel)
    if size == 1:
        x = x[:, ::stride, ::stride]
        y = jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0])
        return y.reshape(*x.shape[:-1], -1)
    patches = jnp.concatenate([part for _, _, part in _taps(x, size, stride, margins, 0)], -1)
    return jnp.dot(patches, kernel.reshape(-1, kernel.shape[-1]))


def _taps(x, size, stride, margins, fill):
    """Yields (i, j, `[B, H', W', C]`): each output's input at position (i, j) of its window."""
    x = jnp.pad(x, ((0, 0), *margins, (0, 0)), constant_values=fill)
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    for i in range(size):
        for j in range(size):
            part = x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
            yield i, j, part[:, :rows, :columns]


def max_pool(x: jax.Array, margins: Margins) -> jax.Array:
    """The maximum of 3x3 windows, stride 2: `[B, H, W, C]` to `[B, H', W', C]`.

    The gradient goes to the first maximum of a window, as in the authors' frameworks.
    """
    # XLA's gradient is a scatter: slow on CPUs and GPUs, but TPUs have an instruction for it.
    return lax.platform_dependent(
        x,
        tpu=lambda x: nn.max_pool(x, (3, 3), (2, 2), margins),
        default=lambda x: _max_pool(x, margins),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, margins: Margins) -> jax.Array:
    return _max_pool_forward(x, margins)[0]


def _max_pool_forward(x, margins):
    best, where = None, jnp.zeros((), jnp.uint8)
    for i, j, part in _taps(x, 3, 2, margins, -jnp.inf):
        if best is None:
            best = part
            continue
        better = part > best
        best = jnp.where(better, part, best)
        where = jnp.where(better, jnp.uint8(3 * i + j), where)
    return best, (where, x.shape)


def _max_pool_backward(margins, saved, g):
    where, shape = saved
    halves = [-(-n // 2) for n in shape[1:3]]

    def from_windows(i: int, j: int, shift: tuple[int, int]) -> jax.Array:
        """The gradient of pixels at (i, j) of windows that are `shift` (rows, columns) away."""
        part = jnp.where(where == 3 * i + j, g, 0).astype(jnp.float32)
        ends = [(-s, n - m + s, 0) for s, n, m in zip(shift, halves, part.shape[1:3], strict=True)]
        return lax.pad(part, jnp.float32(0), [(0, 0, 0), *ends, (0, 0, 0)])

    def windows(parity: int, before: int) -> list[tuple[int, int]]:
        """(position in the window, shift of the window) for the windows of even or odd pixels."""
        return [(i, (parity + before - i) // 2) for i in range(3) if (parity + before - i) % 2 == 0]

    def pixels(odd_row: int, odd_column: int) -> jax.Array:
        """The gradient of every second pixel of every second row, `[B, H / 2, W / 2, C]`."""
        (top, _), (left, _) = margins
        pairs = itertools.product(windows(odd_row, top), windows(odd_column, left))
        return sum(from_windows(i, j, (di, dj)) for (i, di), (j, dj) in pairs).astype(g.dtype)  # type: ignore[union-attr]

    rows = [jnp.stack([pixels(odd, 0), pixels(odd, 1)], axis=3) for odd in (0, 1)]
    d_x = jnp.stack(rows, axis=2)  # [B, H / 2, 2, W / 2, 2, C]
    d_x = d_x.reshape(shape[0], 2 * halves[0], 2 * halves[1], shape[3])
    return (d_x[:, : shape[1], : shape[2]],)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
