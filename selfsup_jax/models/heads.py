"""Heads on top of an encoder: projector, predictor, linear classifier."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax import checks
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models.initializers import KERNEL_INITS, torch_bias
from selfsup_jax.models.norm import BatchNorm

# Batch norm after the last layer: none; with scale and offset, with scale only, with neither.
OUTPUT_NORMS = ("none", "affine", "scale", "plain")
ACTIVATIONS = ("relu", "gelu")
_SIZE = checks.whole(1, largest=2**20)
_RULES: checks.Table = {
    "hidden_sizes": checks.each(_SIZE, "whole numbers, each at least 1, as '(512,)'"),
    "output_size": _SIZE,
    "linear_init": checks.one_of(KERNEL_INITS),
    "hidden_bias": checks.flag,
    "hidden_norm": checks.flag,
    "activation": checks.one_of(ACTIVATIONS),
    "output_bias": checks.flag,
    "output_norm": checks.one_of(OUTPUT_NORMS),
}
FIELDS = {f"{head}.{k}": rule for head in ("projector", "predictor") for k, rule in _RULES.items()}
FIELDS |= {
    "predictor.hidden_sizes": checks.each(
        _SIZE, "at least one hidden layer: whole numbers, each at least 1, as '(512,)'", bool
    ),
    "online_probe.kernel_init": checks.one_of(KERNEL_INITS),
    "online_probe.every_view": checks.flag,
    "online_probe.lars_ratio": checks.flag,
}


class MLPHead(nn.Module):
    """A projector g or predictor q: linear layers, with (batch norm and) an activation between.

    The defaults are BYOL's: section 3.3 and the authors' code.

    Attributes:
        hidden_sizes: sizes of the hidden layers; `()` for a linear head.
        output_size: D.
        linear_init: initialisation of the linear layers, a key of `KERNEL_INITS`;
            biases start at 0, with `torch` like the kernel.
        hidden_bias, hidden_norm: whether hidden layers have a bias, and a batch norm.
        activation: of hidden layers: `relu` or `gelu` (exact, with the error function).
        output_bias: whether the last layer has a bias.
        output_norm: batch norm after the last layer, one of `OUTPUT_NORMS`.
        bn_decay, bn_epsilon, bn_unbiased_average: see `BatchNorm`.
        dtype: of the matmuls.
    """

    hidden_sizes: tuple[int, ...] = (4096,)
    output_size: int = 256
    linear_init: str = "haiku"
    hidden_bias: bool = True
    hidden_norm: bool = True
    activation: str = "relu"
    output_bias: bool = False
    output_norm: str = "none"
    bn_decay: float = 0.9
    bn_epsilon: float = 1e-5
    bn_unbiased_average: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, layout: BatchLayout | None = None) -> jax.Array:
        """`[B, F]` to `[B, output_size]` float32; `layout=None` for evaluation."""
        norm = functools.partial(
            BatchNorm, self.bn_decay, self.bn_epsilon, unbiased_average=self.bn_unbiased_average
        )
        for i, size in enumerate(self.hidden_sizes):
            suffix = f"_{i + 1}" if i else ""
            x = self._linear(x, f"hidden{suffix}", size, self.hidden_bias)
            gelu = self.activation == "gelu"
            if self.hidden_norm:
                x = norm(relu=not gelu, name=f"bn{suffix}")(x, layout)
            elif not gelu:
                x = nn.relu(x)
            x = nn.gelu(x, approximate=False) if gelu else x
        x = self._linear(x, "output", self.output_size, self.output_bias)
        if self.output_norm != "none":
            affine = {"affine": (True, True), "scale": (True, False), "plain": (False, False)}
            use_scale, use_bias = affine[self.output_norm]
            x = norm(use_scale=use_scale, use_bias=use_bias, name="output_bn")(x, layout)
        return x.astype(jnp.float32)

    def _linear(self, x: jax.Array, name: str, size: int, use_bias: bool) -> jax.Array:
        torch = self.linear_init == "torch"
        dense = nn.Dense(
            size,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=KERNEL_INITS[self.linear_init],
            bias_init=torch_bias(x.shape[-1]) if torch else nn.initializers.zeros,
            name=name,
        )
        return dense(x)


def from_config(head: Any, encoder: Any, dtype: jnp.dtype) -> MLPHead:
    """The head of a config section, with the batch-norm settings of the `encoder` section."""
    norm = {field: value for field, value in encoder.items() if field.startswith("bn_")}
    return MLPHead(**head, **norm, dtype=dtype)


class Prototypes(nn.Module):
    """A linear layer without bias, weight-normalised (arXiv 1602.07868): DINO's last layer.

    A column of the kernel counts by its direction only. Its length is 1, or a parameter `gain` that
    starts at 1.

    Attributes:
        count: K.
        unit: the length is always 1.
        dtype: of the matmul's factors; its sums are float32.
    """

    count: int
    unit: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, D]` to `[B, K]` float32."""
        shape = (x.shape[-1], self.count)
        kernel = self.param("kernel", KERNEL_INITS["torch"], shape, jnp.float32)
        kernel = l2_normalize(kernel, axis=0)
        if not self.unit:
            kernel *= self.param("gain", nn.initializers.ones, (self.count,), jnp.float32)
        # Changes no value. Without it jaxlib 0.10 makes one loop of the norms and a matmul of up to
        # 63 rows on a CPU, which takes 40 times as long (4.4 s for 65,536 prototypes).
        kernel = jax.lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=23)
        factors = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.matmul(*factors, preferred_element_type=jnp.float32)


class LinearClassifier(nn.Module):
    """The linear layer of the online probe.

    Attributes:
        num_classes: the number of classes.
        kernel_init: a key of `KERNEL_INITS`.
        every_view: the online probe learns from the features of all views (SimCLR's code), not of
            view 1 only (BYOL's).
    """

    num_classes: int
    kernel_init: str = "lecun"
    every_view: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, D]` float32 to logits `[B, num_classes]` float32."""
        init = KERNEL_INITS[self.kernel_init]
        return nn.Dense(self.num_classes, kernel_init=init, name="output")(x)


def l2_normalize(x: jax.Array, epsilon: float = 1e-12, axis: int = -1) -> jax.Array:
    """Scales rows of `[..., D]` to unit length; a zero row stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis, keepdims=True), epsilon**2))
