"""The forms that are fast somewhere give what XLA's own operations give, gradients too."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from selfsup_jax.models import convolution_cpu
from selfsup_jax.models.convolution import convolve, max_pool

# Before and after: TensorFlow's SAME at an even size, PyTorch's, and one row unlike the columns.
STEM_MARGINS = [((2, 3), (2, 3)), ((3, 3), (3, 3)), ((3, 3), (2, 3))]
POOL_MARGINS = [((0, 1), (0, 1)), ((1, 1), (1, 1)), ((1, 1), (0, 1))]


def same_with_gradients(ours, reference, *args, atol=2e-5):
    """Both give the same, and so do their gradients under one random cotangent."""
    got, pull = jax.vjp(ours, *args)
    expected, pull_expected = jax.vjp(reference, *args)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=atol)
    cotangent = jnp.asarray(np.random.default_rng(9).normal(size=got.shape), got.dtype)
    for a, b in zip(pull(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=10 * atol)


@pytest.mark.parametrize("margins", STEM_MARGINS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 12), (15, 16)])
def test_stem(margins, height, width):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(7, 7, 3, 5)), jnp.float32)

    def reference(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (2, 2), margins, dimension_numbers=numbers)

    same_with_gradients(lambda x, k: convolve(x, k, 2, margins), reference, x, kernel, atol=5e-5)


SAME, TENSORFLOW = ((1, 1), (1, 1)), ((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("shape", "features", "stride", "margins"),
    [
        ((4, 4, 6, 3), 16, 1, SAME),  # pairs of columns
        ((4, 5, 4, 12), 12, 1, SAME),
        ((4, 4, 5, 16), 16, 1, SAME),  # an odd width has no pairs
        ((4, 3, 5, 20), 17, 1, SAME),
        ((4, 3, 5, 33), 9, 1, SAME),
        ((2, 5, 8, 64), 65, 1, SAME),  # Winograd, with parts of tiles
        ((4, 8, 6, 5), 7, 2, TENSORFLOW),
        ((4, 6, 8, 5), 7, 2, SAME),
        ((4, 5, 7, 5), 7, 2, SAME),  # TensorFlow's at an odd size
        ((4, 6, 8, 18), 7, 2, TENSORFLOW),
    ],
)
def test_three_by_three(monkeypatch, shape, features, stride, margins):
    """Whole batches, and a few images at a time."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, shape[-1], features)), jnp.float32)
    kernel /= np.sqrt(9 * shape[-1])

    def reference(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride,) * 2, margins, dimension_numbers=numbers
        )

    def ours(x, kernel):
        return convolve(x, kernel, stride, margins)

    same_with_gradients(ours, reference, x, kernel)
    if shape[-1] < 64:
        monkeypatch.setattr(
            convolution_cpu, "_PIXELS_AT_ONCE", 2 * shape[1] * shape[2] // stride**2
        )
        same_with_gradients(ours, reference, x, kernel)


def test_bfloat16_stays_a_convolution():
    """Winograd's algorithm would need more digits."""
    x, kernel = jnp.zeros((1, 8, 8, 64), jnp.bfloat16), jnp.zeros((3, 3, 64, 64), jnp.bfloat16)
    text = jax.jit(lambda x, k: convolve(x, k, 1, SAME)).lower(x, kernel).as_text()
    assert "convolution" in text and "dot_general" not in text


@pytest.mark.slow
@pytest.mark.parametrize("margins", POOL_MARGINS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 6), (7, 9)])
def test_max_pool(margins, height, width):
    """On whole numbers after a ReLU: most windows have several maxima, the first takes all."""
    x = np.random.default_rng(1).integers(-3, 3, size=(2, height, width, 4))
    x = jnp.asarray(np.maximum(x, 0), jnp.float32)
    same_with_gradients(
        lambda x: max_pool(x, margins), lambda x: nn.max_pool(x, (3, 3), (2, 2), margins), x
    )


def test_every_backend_gets_its_form():
    """The CPU's program has matmuls for 1x1 kernels, a GPU's convolutions."""
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((1, 1, 4, 4))
    traced = jax.jit(lambda x, k: convolve(x, k, 1, ((0, 0), (0, 0)))).trace(x, kernel)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert "dot_general" in texts["cpu"] and "convolution" not in texts["cpu"]
    assert "convolution" in texts["cuda"] and "dot_general" not in texts["cuda"]


def test_accelerators_get_plain_convolutions():
    """Nothing of the CPU's 3x3 forms is in their programs, nor in the gradients'."""
    x, kernel = jnp.zeros((1, 8, 8, 64)), jnp.zeros((3, 3, 64, 64))

    def gradients(x, k):
        return jax.grad(lambda x, k: jnp.sin(convolve(x, k, 1, SAME)).sum(), (0, 1))(x, k)

    traced = jax.jit(gradients).trace(x, kernel)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    for platform in ("cuda", "tpu"):
        assert texts[platform].count("stablehlo.convolution") == 3
        assert "dot_general" not in texts[platform]
    assert "convolution" not in texts["cpu"]
