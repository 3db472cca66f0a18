"""Vision Transformers (Dosovitskiy et al. 2021, arXiv 2010.11929), as in DINO and MoCo v3."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models import positions
from selfsup_jax.models.attention import attend, weights
from selfsup_jax.models.initializers import KERNEL_INITS, torch_bias

# Name -> width, depth, heads (DINO's; MoCo v3's ViT-S has 12) and pixels of a patch's side.
SIZES = {
    f"vit_{size}{patch}": {"width": width, "depth": 12, "heads": heads, "patch": patch}
    for size, width, heads, patches in (
        ("ti", 192, 3, (16, 8, 4)),
        ("s", 384, 6, (16, 8, 4)),
        ("b", 768, 12, (16, 8)),
    )
    for patch in patches
}
POSITIONS = ("learnt", "sincos")
FEATURES = ("class", "mean")
REMATS = ("none", "blocks")

_XAVIER = nn.initializers.xavier_uniform()


def _xavier_of_three(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Of queries, keys and values, as three matrices `[D, D]` beside each other."""
    limit = (6.0 / (shape[0] + shape[1] / 3)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -limit, limit)


# Name -> initialisations of the layers' kernels, of `qkv`, of the patches' projection and its bias,
# and the deviation of the class token.
INITS: dict[str, dict[str, Any]] = {
    # DINO's code: PyTorch's of a convolution for the patches. Its normal is truncated at 2, which
    # is 100 deviations.
    "normal": {
        "layers": nn.initializers.normal(0.02),
        "qkv": nn.initializers.normal(0.02),
        "patches": KERNEL_INITS["torch"],
        "patches_bias": torch_bias,
        "class_token": 0.02,
    },
    # MoCo v3's code.
    "xavier": {
        "layers": _XAVIER,
        "qkv": _xavier_of_three,
        "patches": _XAVIER,
        "patches_bias": lambda fan_in: nn.initializers.zeros,
        "class_token": 1e-6,
    },
}


class Block(nn.Module):
    """A pre-norm block: attention, then an MLP with exact GELU; fields as in `ViT`."""

    heads: int
    mlp_ratio: int
    epsilon: float
    weight_init: str
    attention: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, factors: jax.Array | None = None, maps: bool = False
    ) -> jax.Array:
        """`[R, T, D]` to `[R, T, D]`.

        Args:
            x: tokens; the class token comes first.
            factors: of drop path `[R, 2]`, by which attention and MLP are multiplied.
            maps: the result is the class token's attention to all tokens, `[R, heads, T]` float32.
        """
        width = x.shape[-1]
        qkv = self._dense("qkv", 3 * width, "qkv")(self._norm("norm1")(x))
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        if maps:
            return weights(q[:, :1], k)[:, :, 0]
        y = attend(q, k, v, self.attention).reshape(x.shape)
        x += _scaled(self._dense("attention_output", width)(y), factors, 0)
        y = self._dense("hidden", self.mlp_ratio * width)(self._norm("norm2")(x))
        y = self._dense("output", width)(nn.gelu(y, approximate=False))
        return x + _scaled(y, factors, 1)

    def _norm(self, name: str) -> nn.Module:
        return nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name)  # its moments are float32

    def _dense(self, name: str, size: int, kind: str = "layers") -> nn.Module:
        return nn.Dense(
            size, dtype=self.dtype, kernel_init=INITS[self.weight_init][kind], name=name
        )


def _scaled(y: jax.Array, factors: jax.Array | None, part: int) -> jax.Array:
    return y if factors is None else y * factors[:, part, None, None].astype(y.dtype)


class ViT(nn.Module):
    """The encoder f: images to representation.

    Attributes:
        width: D, of the tokens.
        depth: blocks.
        heads: of the attention; divides D.
        patch: pixels of a patch's side.
        mlp_ratio: hidden units of the MLPs, times D.
        positions: `learnt`, or `sincos`: fixed (MoCo v3). For images of another size than at the
            initialisation they are interpolated.
        frozen: of `patches` (their projection) and `positions`: these get no gradient.
        drop_path: the probability that the last block is left out for an image, in training; it
            grows linearly from 0 at the first block (Huang et al. 2016, arXiv 1603.09382).
        features: `class`: the class token is the representation; `mean`: that of the patches.
        layer_norm_epsilon: of all norms.
        weight_init: a key of `INITS`.
        attention_kernel: see `attend`.
        remat: what the backward pass computes again: nothing (`none`), or all but the inputs of
            `blocks`. Training only.
        dtype: of matmuls and activations; parameters, moments of the norms and softmax are float32.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    mlp_ratio: int = 4
    positions: str = "learnt"
    frozen: tuple[str, ...] = ()
    drop_path: float = 0.0
    features: str = "class"
    layer_norm_epsilon: float = 1e-6
    weight_init: str = "normal"
    attention_kernel: str = "auto"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @property
    def num_features(self) -> int:
        """D, the size of the representation."""
        return self.width

    def __call__(
        self, images: jax.Array, layout: BatchLayout | None = None, *, pooled: bool = True
    ) -> jax.Array:
        """Images `[R, H, W, 3]` to features `[R, D]` float32; `layout=None` for evaluation.

        H and W are multiples of the patch. Drop path needs a layout with `noise`. Not `pooled`: the
        patches, `[R, H / patch, W / patch, D]`.
        """
        tokens = self._tokens(images, layout)[0]
        if not pooled:
            return tokens[:, 1:].reshape(len(images), *self._grid(images), self.width)
        return tokens[:, 0] if self.features == "class" else tokens[:, 1:].mean(1)

    def intermediate(self, images: jax.Array, n: int) -> list[jax.Array]:
        """The last n blocks' tokens after the final norm, `[R, 1 + P, D]` float32 each.

        The class token is the first. DINO's linear evaluation concatenates those of 4 blocks.
        """
        return self._tokens(images, last=n)

    def attention(self, images: jax.Array) -> jax.Array:
        """The last block's attention of the class token to the patches.

        Returns:
            `[R, heads, H / patch, W / patch]` float32; with the class token's own they sum to 1.
        """
        maps = self._tokens(images, maps=True)[0]
        return maps[:, :, 1:].reshape(*maps.shape[:2], *self._grid(images))

    def _grid(self, images: jax.Array) -> tuple[int, int]:
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height} x {width} px: no multiples of {self.patch}")
        return height // self.patch, width // self.patch

    @nn.compact
    def _tokens(
        self,
        images: jax.Array,
        layout: BatchLayout | None = None,
        last: int = 1,
        maps: bool = False,
    ) -> list[jax.Array]:
        """The `last` blocks' tokens after the final norm, or the last block's attention `maps`."""
        if not 1 <= last <= self.depth:
            raise ValueError(f"the last {last} blocks: there are {self.depth}")
        x = self._embedded(images)
        factors = self._drop_path(layout, len(images))
        block = Block if layout is None or self.remat == "none" else nn.remat(Block)
        outputs = []
        for i in range(self.depth):
            fields = (self.heads, self.mlp_ratio, self.layer_norm_epsilon, self.weight_init)
            run = block(*fields, self.attention_kernel, self.dtype, name=f"block{i + 1}")
            if maps and i == self.depth - 1:
                return [run(x, None, True)]
            x = run(x, None if factors is None else factors[:, i])
            outputs.append(x)
        norm = nn.LayerNorm(self.layer_norm_epsilon, dtype=jnp.float32, name="norm")
        return [norm(x) for x in outputs[-last:]]

    def _embedded(self, images: jax.Array) -> jax.Array:
        """The first block's input `[R, 1 + P, D]`."""
        (rows, columns), init = self._grid(images), INITS[self.weight_init]
        fan_in = self.patch**2 * images.shape[-1]
        x = images.astype(self.dtype).reshape(-1, rows, self.patch, columns, self.patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, fan_in)
        project = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=init["patches"],
            bias_init=init["patches_bias"](fan_in),
            name="patches",
        )
        x = project(x)
        if "patches" in self.frozen:
            x = jax.lax.stop_gradient(x)
        token = self.param(
            "class_token", nn.initializers.normal(init["class_token"]), (self.width,), jnp.float32
        )
        token = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, self.width))
        table = positions.interpolated(self._positions(rows, columns), rows, columns)
        return jnp.concatenate([token, x], axis=1) + table.astype(x.dtype)

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """The parameter `[1 + n * n, D]`, of the size of the images at the initialisation."""
        if self.has_variable("params", "positions"):
            table: jax.Array = self.get_variable("params", "positions")
        else:
            if rows != columns:
                raise ValueError("positions start on square images")
            normal = nn.initializers.normal(0.02)
            fixed = lambda key, shape, dtype: jnp.asarray(  # noqa: E731
                positions.sincos(rows, columns, shape[-1]), dtype
            )
            init = fixed if self.positions == "sincos" else normal
            shape = (1 + rows * columns, self.width)
            table = self.param("positions", init, shape, jnp.float32)
        return jax.lax.stop_gradient(table) if "positions" in self.frozen else table

    def _drop_path(self, layout: BatchLayout | None, rows: int) -> jax.Array | None:
        """The factors `[R, depth, 2]` of the blocks' two branches: 0, or 1 / (1 - rate)."""
        if layout is None or layout.noise is None or not self.drop_path:
            return None
        rates = jnp.linspace(0.0, self.drop_path, self.depth)[:, None]
        draws = layout.noise.uniform(rows, 2 * self.depth).reshape(rows, self.depth, 2)
        return jnp.where(draws < rates, 0.0, 1.0 / (1.0 - rates))


def side_of(params: Any, patch: int) -> int:
    """Pixels of the images that a ViT's parameters (or their shapes) were made for."""
    return math.isqrt(params["positions"].shape[0] - 1) * patch
