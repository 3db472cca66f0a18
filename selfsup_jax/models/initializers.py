"""Initialisations of kernels by name, as the authors' libraries have them."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# The deviation of a standard normal that is truncated at 2.
_TRUNCATED = 0.87962566103423978

KERNEL_INITS: dict[str, Callable] = {
    # TensorFlow's VarianceScaling (SimCLR's convolutions): a truncated normal of variance
    # 1 / fan in; the normal is made wider to have it after the truncation.
    "lecun": nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
    # Haiku's Conv2D and Linear (BYOL): the same without the correction, deviation 0.88 / sqrt(fan
    # in).
    "haiku": nn.initializers.variance_scaling(_TRUNCATED**2, "fan_in", "truncated_normal"),
    # torchvision's ResNet (MoCo).
    "kaiming_fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    # PyTorch's Conv2d and Linear: uniform within +-1 / sqrt(fan in); a linear layer's bias too.
    "torch": nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform"),
    # timm's and DINO's linear layers: they truncate it at +-2, which is a hundred deviations.
    "timm": nn.initializers.normal(0.02),
    # SimCLR's linear layers.
    "normal": nn.initializers.normal(0.01),
}


def torch_bias(fan_in: int) -> Callable:
    """PyTorch's initialisation of a bias: uniform within +-1 / sqrt(fan in), as its kernel."""
    limit = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -limit, limit
    )
