"""One configurable ResNet (He et al. 2016, arXiv 1512.03385) for all methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models.convolution import Margins, convolve, max_pool
from selfsup_jax.models.initializers import KERNEL_INITS
from selfsup_jax.models.norm import BatchNorm, relu

# depth -> (blocks of each of the four stages, whether they are bottlenecks)
STAGES: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    200: ((3, 24, 36, 3), True),
}
STEMS = ("imagenet", "cifar")
PADDINGS = ("same", "torch", "fixed")


class Conv(nn.Module):
    """A convolution without bias, NHWC, padded like TensorFlow's `same` or symmetrically."""

    features: int
    size: int
    stride: int = 1
    padding: str = "same"
    kernel_init: str = "lecun"

    kernel_only: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, features]`, in the dtype of `x`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", KERNEL_INITS[self.kernel_init], shape, jnp.float32)
        if self.kernel_only:
            return kernel.astype(x.dtype)
        margins = _margins(x.shape[1:3], self.size, self.stride, self.padding)
        return convolve(x, kernel.astype(x.dtype), self.stride, margins)


def _margins(sizes: Sequence[int], kernel: int, stride: int, padding: str) -> Margins:
    """Padding of rows and columns, (before, after) each, for a kernel of odd size."""
    if padding != "same":
        return (((kernel - 1) // 2,) * 2,) * 2
    # TensorFlow's `same`: an odd pixel is added at the end.
    totals = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in sizes]
    return tuple((total // 2, total - total // 2) for total in totals)  # type: ignore[return-value]


class ResNet(nn.Module):
    """The encoder f: images to representation.

    Attributes:
        depth: 10 (one block a stage), 18, 34, 50, 101, 152 or 200.
        width: multiplies the channels of every stage (64, 128, 256, 512).
        stem: `imagenet` (7x7 stride 2, max-pool) or `cifar` (3x3 stride 1).
        padding: `same` (BYOL: TensorFlow's), `torch` (MoCo: symmetric) or `fixed` (SimCLR:
            convolutions like `torch`, max-pooling like `same`).
        stage1_projection: the first block of stage 1 has a projection shortcut in ResNet-18 and 34
            too, where the shapes do not need it (BYOL's, SimCLR's code; torchvision: not).
        zero_init_gamma: the last norm of each residual branch starts at 0, so that a block starts
            as the identity.
        zero_init_basic: `zero_init_gamma` holds for ResNet-18 and 34 too (SimCLR's code,
            torchvision; in Haiku for bottlenecks only).
        kernel_init: a key of `KERNEL_INITS`.
        bn_decay, bn_epsilon, bn_unbiased_average: see `BatchNorm`.
        dtype: of convolutions and activations; parameters and statistics are float32.
    """

    depth: int = 50
    width: float = 1.0
    stem: str = "imagenet"
    padding: str = "same"
    stage1_projection: bool = False
    zero_init_gamma: bool = True
    zero_init_basic: bool = True
    kernel_init: str = "lecun"
    bn_decay: float = 0.9
    bn_epsilon: float = 1e-5
    bn_unbiased_average: bool = False
    pool_first: bool = True
    product_stages: int = 0
    dtype: jnp.dtype = jnp.float32

    @property
    def num_features(self) -> int:
        """D, the size of the representation."""
        return self._channels(3) * (4 if STAGES[self.depth][1] else 1)

    def _channels(self, stage: int) -> int:
        return max(1, math.floor(64 * 2**stage * self.width + 0.5))

    @nn.compact
    def __call__(self, x: jax.Array, layout: BatchLayout | None = None) -> jax.Array:
        """Images `[B, H, W, C]` to features `[B, D]` float32; `layout=None` for evaluation."""
        blocks, bottleneck = STAGES[self.depth]
        x = x.astype(self.dtype)
        if self.stem == "imagenet":
            x = self._conv_bn(x, layout, "stem", self._channels(0), 7, 2, True, pool=self._pool)
        else:
            x = self._conv_bn(x, layout, "stem", self._channels(0), 3, 1, relu=True)
        for stage, count in enumerate(blocks):
            for index in range(count):
                first = index == 0
                stride = 2 if stage > 0 and first else 1
                project = first and (bottleneck or stage > 0 or self.stage1_projection)
                name = f"stage{stage + 1}_block{index + 1}"
                x = self._block(x, layout, name, self._channels(stage), stride, bottleneck, project)
        return x.astype(jnp.float32).mean((1, 2))

    def _pool(self, x: jax.Array) -> jax.Array:
        padding = "torch" if self.padding == "torch" else "same"
        return max_pool(x, _margins(x.shape[1:3], 3, 2, padding))

    def _block(
        self,
        x: jax.Array,
        layout: BatchLayout | None,
        name: str,
        channels: int,
        stride: int,
        bottleneck: bool,
        project: bool,
    ) -> jax.Array:
        """A residual block; a bottleneck has its stride in the 3x3 convolution (ResNet v1.5)."""
        if bottleneck:
            sizes = [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)]
        else:
            sizes = [(channels, 3, stride), (channels, 3, 1)]
        shortcut = x
        lean = bottleneck and channels < self._channels(self.product_stages)
        if project:
            product = lean and stride == 1
            shortcut = self._conv_bn(
                *(x, layout, f"{name}_shortcut", sizes[-1][0], 1, stride), product=product
            )
        for i, (features, size, conv_stride) in enumerate(sizes):
            inner = i < len(sizes) - 1
            conv_name = f"{name}_conv{i + 1}"
            zero = self.zero_init_gamma and (bottleneck or self.zero_init_basic) and not inner
            product = lean and not inner
            x = self._conv_bn(
                *(x, layout, conv_name, features, size, conv_stride, inner, zero), product=product
            )
        return relu(x + shortcut)

    def _conv_bn(
        self,
        x: jax.Array,
        layout: BatchLayout | None,
        name: str,
        features: int,
        size: int,
        stride: int,
        relu: bool = False,
        zero_init_gamma: bool = False,
        pool: Callable[[jax.Array], jax.Array] | None = None,
        product: bool = False,
    ) -> jax.Array:
        conv = Conv(
            *(features, size, stride, self.padding, self.kernel_init), kernel_only=product, name=name
        )
        kernel = conv(x)[0, 0] if product else None
        x = x if product else conv(x)
        norm = BatchNorm(
            self.bn_decay,
            self.bn_epsilon,
            zero_init_scale=zero_init_gamma,
            unbiased_average=self.bn_unbiased_average,
            relu=relu,
            pool=pool if self.pool_first else None,
            name=f"{name}_bn",
        )
        x = norm(x, layout, kernel)
        return pool(x) if pool and not self.pool_first else x
