"""One ResNet with parameters (He et al. 2016, arXiv 1512.03385), for every method."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from selfsup_jax.collectives import BatchLayout
from selfsup_jax.models.norm import BatchNorm

# depth -> (blocks of each of the four stages, whether they are bottlenecks)
STAGES: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}
STEMS = ("imagenet", "cifar")
PADDINGS = ("same", "torch", "fixed")
# The authors' initialisations: Haiku's (BYOL) and PyTorch's for ResNets (MoCo).
KERNEL_INITS: dict[str, Callable] = {
    "lecun": nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal"),
    "kaiming_fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
}


class Conv(nn.Module):
    """A convolution without bias, NHWC, padded as TensorFlow's `same` or else symmetrically."""

    features: int
    size: int
    stride: int = 1
    padding: str = "same"
    kernel_init: str = "lecun"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, features]`, in the type of `x`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", KERNEL_INITS[self.kernel_init], shape, jnp.float32)
        kernel = kernel.astype(x.dtype)
        if self.size == 1:
            # A 1x1 convolution is a matmul: on the CPU its backward pass is twice as fast as that
            # of XLA's convolution, and accelerators compile both to the same.
            return jnp.dot(x[:, :: self.stride, :: self.stride], kernel[0, 0])
        margin = (self.size - 1) // 2
        padding = [
            _same_padding(n, self.size, self.stride) if self.padding == "same" else (margin, margin)
            for n in x.shape[1:3]
        ]
        if x.shape[1] * x.shape[2] <= (4 * self.stride) ** 2 // 4:
            return _conv_of_small_map(x, kernel, self.stride, padding)
        return lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's `SAME`: the odd pixel goes to the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _conv_of_small_map(
    x: jax.Array, kernel: jax.Array, stride: int, padding: list[tuple[int, int]]
) -> jax.Array:
    """A convolution as one matmul of its patches, for outputs of up to 2x2.

    On such maps XLA's convolution is some 15 times slower on the CPU than this matmul.
    """
    height, width, _, outputs = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows = (x.shape[1] - height) // stride + 1
    columns = (x.shape[2] - width) // stride + 1
    patches = [
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
        for i in range(height)
        for j in range(width)
    ]
    patches = [patch[:, :rows, :columns] for patch in patches]
    return jnp.dot(jnp.concatenate(patches, -1), kernel.reshape(-1, outputs))


class ResNet(nn.Module):
    """The encoder f: images to representation.

    Attributes:
        depth: 18, 34, 50, 101, 152 or 200.
        width: multiplies the channels of every stage (64, 128, 256, 512).
        stem: `imagenet` (7x7 stride 2, max-pool) or `cifar` (3x3 stride 1).
        padding: `same` (BYOL: TensorFlow's), `torch` (MoCo: symmetric) or `fixed` (SimCLR:
            convolutions as `torch`, the max-pool as `same`).
        zero_init_gamma: the last norm of each residual branch starts at 0, so that a block starts
            as the identity.
        kernel_init: `lecun` (BYOL's and SimCLR's codes) or `kaiming_fan_out` (MoCo's).
        bn_decay, bn_epsilon, bn_unbiased_average: see `BatchNorm`.
        dtype: of convolutions and activations; parameters and statistics are float32.
    """

    depth: int = 50
    width: float = 1.0
    stem: str = "imagenet"
    padding: str = "same"
    zero_init_gamma: bool = True
    kernel_init: str = "lecun"
    bn_decay: float = 0.9
    bn_epsilon: float = 1e-5
    bn_unbiased_average: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def num_features(self) -> int:
        """D, the size of the representation."""
        return self._channels(3) * (4 if STAGES[self.depth][1] else 1)

    def _channels(self, stage: int) -> int:
        return max(1, math.floor(64 * 2**stage * self.width + 0.5))

    @nn.compact
    def __call__(self, x: jax.Array, layout: BatchLayout | None = None) -> jax.Array:
        """Images `[B, H, W, C]` to representation `[B, D]` float32; `layout=None` evaluates."""
        blocks, bottleneck = STAGES[self.depth]
        x = x.astype(self.dtype)
        if self.stem == "imagenet":
            x = self._conv_bn(x, layout, "stem", self._channels(0), 7, 2)
            margin = [(1, 1), (1, 1)] if self.padding == "torch" else "SAME"
            x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), margin)
        else:
            x = nn.relu(self._conv_bn(x, layout, "stem", self._channels(0), 3, 1))
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                x = self._block(x, layout, name, self._channels(stage), stride, bottleneck)
        return x.astype(jnp.float32).mean((1, 2))

    def _block(
        self,
        x: jax.Array,
        layout: BatchLayout | None,
        name: str,
        channels: int,
        stride: int,
        bottleneck: bool,
    ) -> jax.Array:
        """A residual block; a bottleneck carries its stride in the 3x3 (ResNet v1.5)."""
        if bottleneck:
            sizes = [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)]
        else:
            sizes = [(channels, 3, stride), (channels, 3, 1)]
        shortcut = x
        if x.shape[-1] != sizes[-1][0] or stride > 1:
            shortcut = self._conv_bn(x, layout, f"{name}_shortcut", sizes[-1][0], 1, stride)
        for i, (features, size, conv_stride) in enumerate(sizes):
            last = i == len(sizes) - 1
            conv_name = f"{name}_conv{i + 1}"
            x = self._conv_bn(x, layout, conv_name, features, size, conv_stride, last)
            if not last:
                x = nn.relu(x)
        return nn.relu(x + shortcut)

    def _conv_bn(
        self,
        x: jax.Array,
        layout: BatchLayout | None,
        name: str,
        features: int,
        size: int,
        stride: int,
        ends_branch: bool = False,
    ) -> jax.Array:
        x = Conv(features, size, stride, self.padding, self.kernel_init, name=name)(x)
        zero = ends_branch and self.zero_init_gamma
        norm = BatchNorm(
            self.bn_decay,
            self.bn_epsilon,
            zero_init_scale=zero,
            unbiased_average=self.bn_unbiased_average,
            name=f"{name}_bn",
        )
        return norm(x, layout)
