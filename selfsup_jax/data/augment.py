"""Augmentation on the device: batched, with a random key per example and no branches.

Under `vmap` both sides of a branch would be computed, so each choice is a factor, an offset or a
`where` instead. The colour channels are three arrays `[B, H, W]`, because a trailing axis of 3
wastes the vector units of every backend.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from selfsup_jax.data.blur import Planes, gaussian_blur
from selfsup_jax.data.views import groups_of, views_of

# ITU-R 601 luma: the channel weights of PIL, torchvision and BYOL's code.
_LUMA = (0.2989, 0.5870, 0.1140)


@dataclasses.dataclass(frozen=True)
class ViewAugmentation:
    """How one view is augmented after its crop; the fields of `config.views.global.view_1`.

    Attributes:
        flip_prob: probability of a horizontal flip.
        jitter_prob: of colour jitter: four operations, in an order drawn for each image.
        brightness, contrast, saturation, hue: strengths s. Factors are drawn from [1 - s, 1 + s]
            (not below 0), shifts from [-s, s].
        jitter_style: `tensorflow` (additive brightness, contrast about each channel's mean,
            saturation in HSV: BYOL's and SimCLR's code) or `torchvision` (brightness is a factor,
            contrast about the mean gray, saturation blends with gray: MoCo's).
        grayscale_prob, blur_prob, solarize_prob: probabilities.
        blur_kernel: number of taps, odd.
        blur_sigma_min, blur_sigma_max: range in pixels; sigma is drawn uniformly.
        blur_padding: `zero` (BYOL's and SimCLR's code) or `reflect` (torchvision).
        solarize_threshold: values at or above it are inverted.
    """

    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_style: str = "tensorflow"
    grayscale_prob: float = 0.2
    blur_prob: float = 1.0
    blur_kernel: int = 23
    blur_sigma_min: float = 0.1
    blur_sigma_max: float = 2.0
    blur_padding: str = "zero"
    solarize_prob: float = 0.0
    solarize_threshold: float = 0.5


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How the views of a config's section `views` are augmented.

    Attributes:
        groups: name of a group -> how each of its views is augmented.
        mean, std: per channel; the augmented images are normalised with them.
    """

    groups: dict[str, tuple[ViewAugmentation, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Any) -> Augmentation:
        """Reads the section `views` of a config."""
        groups = {
            name: tuple(ViewAugmentation(**view) for view in views_of(group))
            for name, group in groups_of(config)
        }
        return cls(groups, tuple(config.mean), tuple(config.std))

    def normalized(
        self, rng: jax.Array, batch: Mapping[str, jax.Array], dtype: Any = jnp.float32
    ) -> dict[str, jax.Array]:
        """The networks' input: `augment_views`, then normalisation, in the networks' `dtype`."""
        finish = lambda x: normalize(x, self.mean, self.std).astype(dtype)  # noqa: E731
        return augment_views(rng, batch, self.groups, finish)


def augment_view(
    rng: jax.Array, images: jax.Array, index: jax.Array, view: ViewAugmentation
) -> jax.Array:
    """Flip, colour jitter, grayscale, blur, solarise.

    Args:
        rng: the key of this view of this step.
        images: `[B, H, W, 3]` uint8.
        index: `[B]` int32, in the global batch. An image's draws depend on `rng` and this only.
        view: probabilities and strengths.

    Returns:
        `[B, H, W, 3]` float32 in [0, 1].
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, index)
    u = jax.vmap(lambda key: jax.random.uniform(key, (14,)))(keys)  # [B, 14]

    planes = _to_planes(images)
    if view.flip_prob > 0:
        flip = _per_image(u[:, 0] < view.flip_prob)
        planes = _map(lambda x: jnp.where(flip, x[:, :, ::-1], x), planes)
    if view.jitter_prob > 0:
        order = jnp.argsort(u[:, 2:6], axis=1)
        jittered = color_jitter(planes, u[:, 6:10], order, view)
        planes = _where(u[:, 1] < view.jitter_prob, jittered, planes)
    if view.grayscale_prob > 0:
        gray = _luma(planes)
        planes = _where(u[:, 10] < view.grayscale_prob, (gray, gray, gray), planes)
    if view.blur_prob > 0:
        spread = view.blur_sigma_max - view.blur_sigma_min
        sigma = view.blur_sigma_min + spread * u[:, 12]
        blurred = gaussian_blur(planes, sigma, view.blur_kernel, view.blur_padding)
        planes = _where(u[:, 11] < view.blur_prob, blurred, planes)
    if view.solarize_prob > 0:
        solarized = _map(lambda x: solarize(x, view.solarize_threshold), planes)
        planes = _where(u[:, 13] < view.solarize_prob, solarized, planes)
    return jnp.stack(planes, axis=-1)


def augment_views(
    rng: jax.Array,
    batch: Mapping[str, jax.Array],
    groups: Mapping[str, Sequence[ViewAugmentation]],
    finish: Callable[[jax.Array], jax.Array] = lambda view: view,
) -> dict[str, jax.Array]:
    """Augments the crops `view_1`, `view_2`, ... of a batch.

    Args:
        rng: the key of this step.
        batch: `view_1`, ... `[B, H, W, 3]` uint8, numbered through all groups, and `index` `[B]`,
            see `augment_view`.
        groups: name of a group -> the augmentation of each of its views.
        finish: applied to each view, before the views are stacked.

    Returns:
        Name of a group -> `[V, B, H, W, 3]` float32 in [0, 1], or what `finish` makes of it.
    """
    counter = itertools.count(1)
    views: dict[str, list[jax.Array]] = {name: [] for name in groups}
    for name, group in groups.items():
        for view in group:
            i = next(counter)
            crops, rng_i = batch[f"view_{i}"], jax.random.fold_in(rng, i)
            views[name].append(finish(augment_view(rng_i, crops, batch["index"], view)))
    return {name: jnp.stack(members) for name, members in views.items()}


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Subtracts `mean` and divides by `std`, per channel of `[..., 3]`; float32."""
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


# ------------------------------------------------------------------------------ colour


def color_jitter(planes: Planes, u: jax.Array, order: jax.Array, view: ViewAugmentation) -> Planes:
    """Brightness, contrast, saturation and hue, each once, clipped to [0, 1] after each.

    Operations that differ only in coefficients are computed together: brightness, contrast and (for
    torchvision) saturation are one affine map; hue and (for TensorFlow) saturation are one change
    in HSV. So each of the four positions in the order costs two operations and not four.

    Args:
        planes: the image, `[B, H, W]` each.
        u: `[B, 4]` uniform draws for brightness, contrast, saturation, hue.
        order: `[B, 4]` int, the operations (0 brightness ... 3 hue) in the order of execution.
        view: strengths and style.
    """
    draw = 2.0 * u - 1.0  # [-1, 1)
    factor = lambda i, strength: jnp.maximum(1.0 + strength * draw[:, i], 0.0)  # noqa: E731
    if view.jitter_style == "tensorflow":
        apply, brightness = _jitter_tensorflow, view.brightness * draw[:, 0]
    else:
        apply, brightness = _jitter_torchvision, factor(0, view.brightness)
    contrast, saturation = factor(1, view.contrast), factor(2, view.saturation)
    amounts = (brightness, contrast, saturation, view.hue * draw[:, 3])
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    active = [order == i for i, strength in enumerate(strengths) if strength > 0]
    if not active:
        return planes
    for position in range(4):
        is_op = [order[:, position] == i for i in range(4)]
        changed = _map(lambda x: jnp.clip(x, 0.0, 1.0), apply(planes, is_op, amounts, view))
        acts = jnp.any(jnp.stack([a[:, position] for a in active]), axis=0)
        planes = _where(acts, changed, planes)
    return planes


def _jitter_tensorflow(planes: Planes, is_op: list, amounts: tuple, view: ViewAugmentation):
    """`tf.image.adjust_*`: x + b; (x - mean) c + mean per channel; HSV for the other two."""
    brightness, contrast, saturation, hue = amounts
    gain = _per_image(jnp.where(is_op[1], contrast, 1.0))
    shift = _per_image(jnp.where(is_op[0], brightness, 0.0))
    out = _map(lambda x: (x - _mean(x)) * gain + _mean(x) + shift, planes)
    if view.saturation > 0 or view.hue > 0:
        saturation = jnp.where(is_op[2], saturation, 1.0)
        recoloured = adjust_hsv(planes, saturation, jnp.where(is_op[3], hue, 0.0))
        out = _where(is_op[2] | is_op[3], recoloured, out)
    return out


def _jitter_torchvision(planes: Planes, is_op: list, amounts: tuple, view: ViewAugmentation):
    """`ColorJitter`: blends with black, with the mean gray or with gray; shifts the hue in HSV."""
    brightness, contrast, saturation, hue = amounts
    gray = _luma(planes)
    gain = jnp.where(is_op[0], brightness, jnp.where(is_op[1], contrast, saturation))
    rest = _per_image(jnp.where(is_op[0], 0.0, 1.0 - gain))
    target = jnp.where(_per_image(is_op[1]), _mean(gray), gray)
    out = _map(lambda x: x * _per_image(gain) + rest * target, planes)
    if view.hue > 0:
        out = _where(is_op[3], adjust_hsv(planes, jnp.ones_like(hue), hue), out)
    return out


def adjust_hsv(planes: Planes, saturation: jax.Array, hue: jax.Array) -> Planes:
    """Scales the saturation by `saturation` `[B]`, shifts the hue by `hue` `[B]` (1: a turn)."""
    r, g, b = planes
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    safe = jnp.where(chroma > 0, chroma, 1.0)
    sextant = jnp.where(
        value == r,
        (g - b) / safe,
        jnp.where(value == g, 2.0 + (b - r) / safe, 4.0 + (r - g) / safe),
    )
    sextant = jnp.where(chroma > 0, sextant, 0.0) + 6.0 * _per_image(hue)
    s = jnp.where(value > 0, chroma / jnp.where(value > 0, value, 1.0), 0.0)
    chroma = value * jnp.clip(s * _per_image(saturation), 0.0, 1.0)

    def channel(n: float) -> jax.Array:  # n = 5, 3, 1 for red, green, blue
        k = (n + sextant) % 6.0
        return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

    return channel(5.0), channel(3.0), channel(1.0)


def solarize(x: jax.Array, threshold: float) -> jax.Array:
    """Inverts values at or above `threshold`."""
    return jnp.where(x < threshold, x, 1.0 - x)


# ---------------------------------------------------------------------- small helpers


def _to_planes(images: jax.Array) -> Planes:
    x = images.astype(jnp.float32) / 255.0
    return x[..., 0], x[..., 1], x[..., 2]


def _map(fn, planes: Planes) -> Planes:
    r, g, b = planes
    return fn(r), fn(g), fn(b)


def _where(condition: jax.Array, yes: Planes, no: Planes) -> Planes:
    condition = _per_image(condition)
    r, g, b = (jnp.where(condition, y, n) for y, n in zip(yes, no, strict=True))
    return r, g, b


def _per_image(x: jax.Array) -> jax.Array:
    return x[:, None, None]


def _mean(x: jax.Array) -> jax.Array:
    return x.mean((1, 2), keepdims=True)


def _luma(planes: Planes) -> jax.Array:
    return sum(w * x for w, x in zip(_LUMA, planes, strict=True))  # type: ignore[return-value]
