"""One configurable ResNet (He et al. 2016, arXiv 1512.03385) for all methods."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models import norm_fused
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
REMATS = ("none", "blocks", "stages")
STEMS = ("imagenet", "cifar")
PADDINGS = ("same", "torch", "fixed")


class Conv(nn.Module):
    """A convolution without bias, NHWC, padded like TensorFlow's `same` or symmetrically."""

    features: int
    size: int
    stride: int = 1
    padding: str = "same"
    kernel_init: str = "lecun"

    multiply: bool = True  # False: the result is the kernel, for a `norm_of_product`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` to `[B, H / stride, W / stride, features]`, in the dtype of `x`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", KERNEL_INITS[self.kernel_init], shape, jnp.float32)
        if not self.multiply:
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
        remat: what the backward pass computes again, in place of storing it: nothing (`none`), or
            all but the inputs of `blocks` or of `stages`. Training only.
        pool_first: the ImageNet stem's max-pooling comes before its norm; see `norm_of_maxima`.
        product_norm_stages: the first stages whose bottlenecks end in a `norm_of_product`.
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
    remat: str = "none"
    pool_first: bool = False
    product_norm_stages: int = 0
    dtype: jnp.dtype = jnp.float32

    @property
    def num_features(self) -> int:
        """D, the size of the representation."""
        return self._channels(3) * (4 if STAGES[self.depth][1] else 1)

    def _channels(self, stage: int) -> int:
        return max(1, math.floor(64 * 2**stage * self.width + 0.5))

    @nn.compact
    def __call__(
        self, x: jax.Array, layout: BatchLayout | None = None, *, pooled: bool = True
    ) -> jax.Array:
        """Images `[B, H, W, C]` to features `[B, D]` float32; `layout=None` for evaluation.

        Not `pooled`: the maps before the mean over the pixels, `[B, H / 32, W / 32, D]` (a `cifar`
        stem: `[B, H / 8, W / 8, D]`).
        """
        x = x.astype(self.dtype)
        if self.stem == "imagenet":
            x = self._conv_bn(x, layout, "stem", self._channels(0), 7, 2, True, pool=self._pool)
        else:
            x = self._conv_bn(x, layout, "stem", self._channels(0), 3, 1, relu=True)
        for stage, count in enumerate(STAGES[self.depth][0]):
            whole = self.remat == "stages"
            for indices in [range(count)] if whole else [[i] for i in range(count)]:
                run = functools.partial(ResNet._blocks, layout=layout, stage=stage, indices=indices)
                if self.remat != "none" and layout is not None:
                    run = nn.remat(run)
                x = run(self, x)
        x = x.astype(jnp.float32)
        return x.mean((1, 2)) if pooled else x

    def _pool(self, x: jax.Array) -> jax.Array:
        padding = "torch" if self.padding == "torch" else "same"
        return max_pool(x, _margins(x.shape[1:3], 3, 2, padding))

    def _blocks(
        self, x: jax.Array, *, layout: BatchLayout | None, stage: int, indices: Iterable[int]
    ) -> jax.Array:
        """The blocks of a stage that have these indices."""
        for index in indices:
            x = self._block(x, layout, stage, index)
        return x

    def _block(self, x: jax.Array, layout: BatchLayout | None, stage: int, index: int) -> jax.Array:
        """A residual block; a bottleneck has its stride in the 3x3 convolution (ResNet v1.5)."""
        bottleneck, channels = STAGES[self.depth][1], self._channels(stage)
        stride = 2 if stage > 0 and index == 0 else 1
        if bottleneck:
            sizes = [(channels, 1, 1), (channels, 3, stride), (4 * channels, 1, 1)]
        else:
            sizes = [(channels, 3, stride), (channels, 3, 1)]
        product = bottleneck and stage < self.product_norm_stages and norm_fused.suits(layout)
        name = f"stage{stage + 1}_block{index + 1}"
        shortcut = x
        if index == 0 and (bottleneck or stage > 0 or self.stage1_projection):
            shortcut = self._conv_bn(
                *(x, layout, f"{name}_shortcut", sizes[-1][0], 1, stride),
                product=product and stride == 1,
            )
        for i, (features, size, conv_stride) in enumerate(sizes):
            inner = i < len(sizes) - 1
            zero = self.zero_init_gamma and (bottleneck or self.zero_init_basic) and not inner
            x = self._conv_bn(
                *(x, layout, f"{name}_conv{i + 1}", features, size, conv_stride, inner, zero),
                product=product and not inner,
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
        conv = Conv(features, size, stride, self.padding, self.kernel_init, not product, name=name)
        y = conv(x)
        norm = BatchNorm(
            self.bn_decay,
            self.bn_epsilon,
            zero_init_scale=zero_init_gamma,
            unbiased_average=self.bn_unbiased_average,
            relu=relu,
            by_row=self.product_norm_stages > 0,
            pool=pool if self.pool_first else None,
            name=f"{name}_bn",
        )
        y = norm(x, layout, y[0, 0]) if product else norm(y, layout)
        return pool(y) if pool and not self.pool_first else y
