"""Heads on top of an encoder: projector, predictor, linear classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.collectives import BatchLayout
from selfsup_jax.models.norm import BatchNorm

# Haiku's Linear: truncated normal with variance 1 / fan in; biases start at zero.
_HAIKU = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
# PyTorch's Linear: uniform within 1 / sqrt(fan in), and so is the bias.
_TORCH = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class HeadStyle(NamedTuple):
    """What an author's code makes a head of."""

    kernel_init: Callable
    hidden_bias: bool
    hidden_norm: bool
    output_bias: bool
    output_norm: bool  # without an offset
    torch_bias_init: bool = False


HEAD_STYLES = {
    # Linear -> batch norm -> ReLU -> Linear without bias: BYOL, section 3.3 and its code.
    "byol": HeadStyle(_HAIKU, True, True, False, False),
    # Linear -> ReLU -> Linear: MoCo v2, and v1's where there is no hidden layer.
    "moco": HeadStyle(_TORCH, True, False, True, False, torch_bias_init=True),
    # Each linear layer is followed by a batch norm: SimCLR's code.
    "simclr": HeadStyle(nn.initializers.normal(0.01), False, True, False, True),
}


class MLPHead(nn.Module):
    """A projector g or predictor q of one hidden layer, or a linear one.

    Attributes:
        hidden_size: of the hidden layer; 0 for a linear head.
        output_size: D.
        style: `byol`, `moco` or `simclr`: see `HEAD_STYLES`.
        bn_decay, bn_epsilon, bn_unbiased_average: see `BatchNorm`.
        dtype: of the matmuls.
    """

    hidden_size: int = 4096
    output_size: int = 256
    style: str = "byol"
    bn_decay: float = 0.9
    bn_epsilon: float = 1e-5
    bn_unbiased_average: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, layout: BatchLayout | None = None) -> jax.Array:
        """`[B, F]` to `[B, output_size]` float32; `layout=None` evaluates."""
        style = HEAD_STYLES[self.style]
        norm = functools.partial(
            BatchNorm, self.bn_decay, self.bn_epsilon, unbiased_average=self.bn_unbiased_average
        )
        if self.hidden_size:
            x = self._linear(x, "hidden", self.hidden_size, style.hidden_bias)
            x = norm(relu=True, name="bn")(x, layout) if style.hidden_norm else nn.relu(x)
        x = self._linear(x, "output", self.output_size, style.output_bias)
        x = norm(use_bias=False, name="output_bn")(x, layout) if style.output_norm else x
        return x.astype(jnp.float32)

    def _linear(self, x: jax.Array, name: str, size: int, use_bias: bool) -> jax.Array:
        style = HEAD_STYLES[self.style]
        bias_init: Any = nn.initializers.zeros
        if style.torch_bias_init:
            bias_init = _uniform(x.shape[-1] ** -0.5)
        dense = nn.Dense(
            size,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=style.kernel_init,
            bias_init=bias_init,
            name=name,
        )
        return dense(x)


def _uniform(limit: float) -> Callable:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )


def from_config(head: Any, encoder: Any, dtype: jnp.dtype) -> MLPHead:
    """The head of a config section, its batch norms as those of the `encoder` section."""
    norm = {field: value for field, value in encoder.items() if field.startswith("bn_")}
    return MLPHead(**head, **norm, dtype=dtype)


class LinearClassifier(nn.Module):
    """The online probe: a linear layer on features that pass no gradient back."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, D]` float32 to logits `[B, num_classes]` float32."""
        return nn.Dense(self.num_classes, kernel_init=_HAIKU, name="output")(x)


def l2_normalize(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Rows of `[..., D]` to unit length; a row of zeros stays one, its gradient finite."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), epsilon**2))
