"""Augmentation against TensorFlow, PIL and NumPy, and its draws against their distributions."""

import colorsys
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from selfsup_jax import checks
from selfsup_jax.data import augment, blur
from selfsup_jax.data import views as view_groups
from selfsup_jax.data.augment import ViewAugmentation
from selfsup_jax.errors import UserError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(list(itertools.permutations(range(4))))
STRENGTHS = {"brightness": 0.6, "contrast": 0.7, "saturation": 0.8, "hue": 0.5}
NOTHING = ViewAugmentation(
    flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, solarize_prob=0.0
)

augment_view = jax.jit(augment.augment_view, static_argnames="view")


def only(**changes) -> ViewAugmentation:
    """A view that does nothing but what is given."""
    return ViewAugmentation(**(vars(NOTHING) | changes))


def random_images(count: int, height: int = 9, width: int = 7, seed: int = 0) -> np.ndarray:
    """Noise, with gray, black and white pixels among it: where hues and saturations are 0 / 0."""
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    images[:, 0, 0], images[:, 0, 1], images[:, 0, 2] = 0, 255, 100
    return images


def planes(images: np.ndarray) -> augment.Planes:
    x = jnp.asarray(images, jnp.float32)
    return x[..., 0], x[..., 1], x[..., 2]


def run(images: np.ndarray, view: ViewAugmentation, seed: int = 0) -> np.ndarray:
    index = jnp.arange(len(images), dtype=jnp.int32)
    return np.asarray(augment_view(jax.random.PRNGKey(seed), images, index, view))


# ------------------------------------------------------------------------------ colour


@functools.cache
def jitter(style: str):
    view = ViewAugmentation(jitter_style=style, **STRENGTHS)

    @jax.jit
    def run(images, u, order):
        return jnp.stack(augment.color_jitter(planes(images), u, order, view), axis=-1)

    # The batch is fixed, so that a style is compiled once: 24 images, one for each order.
    return lambda images, u, order: np.asarray(run(images, jnp.asarray(u, jnp.float32), order))


def amount(op: int, u: float, style: str) -> float:
    """What a draw `u` means: a shift in [-s, s], or a factor in [1 - s, 1 + s]."""
    shift = list(STRENGTHS.values())[op] * (2 * u - 1)
    return shift if op == HUE or (op == BRIGHTNESS and style == "tensorflow") else 1 + shift


def tensorflow_op(x: np.ndarray, op: int, amount: float) -> np.ndarray:
    adjust = (
        tf.image.adjust_brightness,
        tf.image.adjust_contrast,
        tf.image.adjust_saturation,
        tf.image.adjust_hue,
    )[op]
    return np.clip(adjust(tf.constant(x), amount).numpy(), 0, 1)


def torchvision_op(x: np.ndarray, op: int, amount: float) -> np.ndarray:
    """`torchvision.transforms.functional.adjust_*` on a float image, from its documentation."""
    if op == HUE:
        hsv = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in x.reshape(-1, 3)])
        turned = [colorsys.hsv_to_rgb((h + amount) % 1.0, s, v) for h, s, v in hsv]
        return np.reshape(turned, x.shape)
    gray = (x @ [0.2989, 0.587, 0.114])[..., None]
    blend_with = {BRIGHTNESS: 0.0, CONTRAST: gray.mean(), SATURATION: gray}[op]
    return np.clip(amount * x + (1 - amount) * blend_with, 0, 1)


def pil_op(image: np.ndarray, op: int, amount: float) -> np.ndarray:
    """`ColorJitter` on a PIL image is this."""
    pil = Image.fromarray(image)
    if op == HUE:
        h, s, v = pil.convert("HSV").split()
        turned = (np.asarray(h, int) + round(amount * 255)) % 256
        h = Image.fromarray(turned.astype(np.uint8))
        return np.asarray(Image.merge("HSV", (h, s, v)).convert("RGB"))
    enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[op]
    return np.asarray(enhance(pil).enhance(amount))


ORACLES = {"tensorflow": tensorflow_op, "torchvision": torchvision_op}


@pytest.mark.slow
@pytest.mark.parametrize("style", ORACLES)
@pytest.mark.parametrize("op", range(4))
def test_each_colour_operation_is_the_librarys(style, op):
    images = random_images(24).astype(np.float32) / 255
    u = np.full((24, 4), 0.5)  # the neutral draw: factor 1, shift 0
    u[:, op] = np.linspace(0, 0.999, 24)
    got = jitter(style)(images, u, ORDERS)
    expected = [
        ORACLES[style](x, op, amount(op, v, style)) for x, v in zip(images, u[:, op], strict=True)
    ]
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("op", range(4))
def test_torchvision_style_is_pils(op):
    # Smooth colours of middle saturation: PIL keeps hue and saturation in 8 bits each.
    images = np.random.default_rng(1).integers(60, 200, (24, 9, 7, 3), np.uint8)
    u = np.full((24, 4), 0.5)
    u[:, op] = np.linspace(0, 0.999, 24)
    got = 255 * jitter("torchvision")(images.astype(np.float32) / 255, u, ORDERS)
    expected = [
        pil_op(x, op, amount(op, v, "torchvision")) for x, v in zip(images, u[:, op], strict=True)
    ]
    error = np.abs(got - np.asarray(expected, np.float32))
    # 1 for PIL's truncation; a hue of 8 bits is off by up to 1/2 x 6/256 of the chroma, twice.
    assert error.max() < (8 if op == HUE else 1.6)
    assert error.mean() < (2 if op == HUE else 0.8)


@pytest.mark.parametrize("style", ORACLES)
def test_colour_operations_run_in_the_given_order(style):
    images = np.repeat(random_images(1), 24, axis=0).astype(np.float32) / 255
    u = np.tile([0.85, 0.1, 0.9, 0.7], (24, 1))
    got = jitter(style)(images, u, ORDERS)
    expected = []
    for order in ORDERS:
        x = images[0]
        for op in order:
            x = ORACLES[style](x, op, amount(op, u[0, op], style)).astype(np.float32)
        expected.append(x)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    # The check above means something: the orders do give different images, but for TensorFlow's
    # saturation and hue, which commute where they are neighbours.
    distinct = len({x.round(3).tobytes() for x in expected})
    assert distinct == {"tensorflow": 18, "torchvision": 24}[style]


@pytest.mark.slow
@pytest.mark.parametrize("style", ORACLES)
def test_operations_of_strength_zero_are_left_out(style):
    view = ViewAugmentation(
        jitter_style=style, brightness=0.5, contrast=0.0, saturation=0.0, hue=0.0
    )
    images = random_images(4).astype(np.float32) / 255
    u = jnp.asarray(np.random.default_rng(0).random((4, 4)), jnp.float32)
    got = augment.color_jitter(planes(images), u, jnp.asarray(ORDERS[[0, 7, 13, 23]]), view)
    shifts = 0.5 * (2 * np.asarray(u[:, 0]) - 1) + (style == "torchvision")
    expected = [ORACLES[style](x, BRIGHTNESS, s) for x, s in zip(images, shifts, strict=True)]
    np.testing.assert_allclose(np.stack(got, -1), expected, atol=1e-6)


def test_hue_and_saturation_in_one_trip():
    images = random_images(5).astype(np.float32) / 255
    saturation, hue = np.array([0.0, 0.5, 1.0, 1.7, 3.0]), np.array([0.3, -0.5, 0.0, 0.5, -0.2])
    got = augment.adjust_hsv(planes(images), jnp.asarray(saturation), jnp.asarray(hue))
    expected = [
        tensorflow_op(tensorflow_op(x, SATURATION, s), HUE, h)
        for x, s, h in zip(images, saturation, hue, strict=True)
    ]
    np.testing.assert_allclose(np.stack(got, -1), expected, atol=2e-5)


def test_grayscale_is_pils_luma_in_all_channels():
    images = random_images(4)
    got = run(images, only(grayscale_prob=1.0))
    expected = np.stack([np.asarray(Image.fromarray(x).convert("L")) for x in images])
    np.testing.assert_allclose(255 * got, np.repeat(expected[..., None], 3, -1), atol=0.6)


def test_solarize_inverts_from_the_threshold_on():
    x = jnp.asarray([0.0, 0.3, 0.5999, 0.6, 1.0])
    np.testing.assert_allclose(augment.solarize(x, 0.6), [0.0, 0.3, 0.5999, 0.4, 0.0], atol=1e-7)
    images = random_images(2)
    got = run(images, only(solarize_prob=1.0, solarize_threshold=128 / 255))
    np.testing.assert_allclose(255 * got, np.where(images < 128, images, 255 - images), atol=1e-3)


def test_flip_mirrors_left_and_right():
    images = random_images(3)
    np.testing.assert_allclose(255 * run(images, only(flip_prob=1.0)), images[:, :, ::-1])


# -------------------------------------------------------------------------------- blur


def blur_oracle(image: np.ndarray, sigma: float, kernel: int, padding: str) -> np.ndarray:
    """Rows, then columns, from the formula."""
    radius = kernel // 2
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    for axis in (0, 1):
        pad = [(radius, radius) if i == axis else (0, 0) for i in range(3)]
        padded = np.pad(image, pad, mode={"zero": "constant"}.get(padding, padding))
        size = image.shape[axis]
        image = sum(w * padded.take(range(i, i + size), axis) for i, w in enumerate(taps))
    return image


@pytest.mark.slow
@pytest.mark.parametrize("padding", ("zero", "reflect"))
@pytest.mark.parametrize("kernel", [1, 5, 23])
def test_blur_is_a_separable_convolution(padding, kernel):
    images = random_images(4, 14, 12).astype(np.float32) / 255  # not square
    sigmas = [0.1, 0.6, 1.3, 2.0]  # a different one for each image
    got = blur.gaussian_blur(planes(images), jnp.asarray(sigmas), kernel, padding)
    expected = [blur_oracle(x, s, kernel, padding) for x, s in zip(images, sigmas, strict=True)]
    np.testing.assert_allclose(np.stack(got, -1), expected, atol=1e-5)


def test_blur_sigma_is_uniform_between_its_bounds():
    impulse = np.zeros((2000, 9, 9, 3), np.uint8)
    impulse[:, 4, 4] = 255
    view = only(blur_prob=1.0, blur_kernel=9, blur_sigma_min=0.5, blur_sigma_max=1.5)
    centre = np.sort(run(impulse, view)[:, 4, 4, 0])
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        # The wider the blur, the lower the centre: quantiles of one are those of the other.
        expected = blur_oracle(impulse[0] / 255.0, 0.5 + share, 9, "zero")[4, 4, 0]
        beyond = np.mean(centre < expected)  # share of the images with a larger sigma
        assert beyond == pytest.approx(1 - share, abs=0.045), share


# --------------------------------------------------------------------------- the draws


@pytest.mark.slow
@pytest.mark.parametrize(
    "field", ["flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob"]
)
def test_each_operation_happens_as_often_as_its_probability_says(field):
    count, prob = 4000, 0.3
    image = np.array([[[250, 10, 60], [10, 200, 90]], [[90, 10, 220], [30, 40, 10]]], np.uint8)
    images = np.repeat(image[None], count, axis=0)
    changed = np.abs(run(images, only(**{field: prob})) - image / 255.0).max((1, 2, 3)) > 1e-4
    assert changed.mean() == pytest.approx(prob, abs=4 * np.sqrt(prob * (1 - prob) / count))
    none = run(images[:50], only(**{field: 0.0}))
    np.testing.assert_allclose(none, images[:50] / 255.0, atol=1e-6)


def test_operations_are_drawn_independently():
    count = 4000
    images = np.zeros((count, 1, 2, 3), np.uint8)
    images[:, 0, 0, 0] = 255  # left red, right black
    view = only(flip_prob=0.5, grayscale_prob=0.5, solarize_prob=0.5, solarize_threshold=0.0)
    got = run(images, view)[:, 0]
    solarized = got.sum((1, 2)) > 2
    got = np.where(solarized[:, None, None], 1 - got, got)
    flipped, gray = got[:, 1].sum(1) > 0.1, np.ptp(got, axis=-1).max(1) < 1e-3
    combinations = np.bincount(4 * flipped + 2 * gray + solarized, minlength=8)
    np.testing.assert_allclose(combinations / count, 1 / 8, atol=4 * np.sqrt(7 / 64 / count))


def test_brightness_is_uniform_between_its_bounds():
    images = np.full((4000, 1, 1, 3), 128, np.uint8)
    view = only(jitter_prob=1.0, brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0)
    shifts = np.sort(run(images, view)[:, 0, 0, 0] - 128 / 255)
    uniform = np.linspace(-0.4, 0.4, 4000)
    # Kolmogorov-Smirnov: the largest distance of the quantiles, in shares of the range.
    assert np.abs(shifts - uniform).max() / 0.8 < 1.95 / np.sqrt(4000)


def test_jitter_draws_each_image_its_own_order():
    # Black, gray, white stay evenly spaced if contrast comes first and nothing is clipped, but not
    # if brightness, which clips one of the ends, does.
    images = np.tile(np.array([0, 127.5, 255], np.float32).reshape(1, 1, 3, 1), (4000, 1, 1, 3))
    view = only(jitter_prob=1.0, brightness=0.3, contrast=0.5, saturation=0.0, hue=0.0)
    got = run(images, view)[:, 0, :, 0]

    draws = np.random.default_rng(0)
    brightness, contrast = draws.uniform(-0.3, 0.3, 20000), draws.uniform(0.5, 1.5, 20000)

    def share_even(rows):
        return np.mean(np.abs(rows[:, 0] - 2 * rows[:, 1] + rows[:, 2]) < 1e-3)

    def simulate(order):
        x = np.tile([0.0, 0.5, 1.0], (20000, 1))
        for op in order:
            mean = x.mean(1, keepdims=True)
            scaled = (x - mean) * contrast[:, None] + mean
            x = np.clip(x + brightness[:, None] if op == BRIGHTNESS else scaled, 0, 1)
        return share_even(x)

    first, last = simulate((CONTRAST, BRIGHTNESS)), simulate((BRIGHTNESS, CONTRAST))
    assert first - last > 0.2  # the two orders can be told apart
    assert share_even(got) == pytest.approx((first + last) / 2, abs=0.03)


FULL = ViewAugmentation(
    blur_prob=0.5, blur_kernel=5, solarize_prob=0.3, grayscale_prob=0.3, jitter_prob=0.8
)


@pytest.mark.slow
def test_an_images_draws_depend_on_the_key_and_its_index_only():
    images, index = random_images(16), np.arange(100, 116, dtype=np.int32)
    rng = jax.random.PRNGKey(3)
    whole = np.asarray(augment_view(rng, images, index, FULL))

    permuted = np.random.default_rng(0).permutation(16)
    again = augment_view(rng, images[permuted], index[permuted], FULL)
    np.testing.assert_allclose(again, whole[permuted], atol=1e-6)

    halves = []
    for device, i in zip(jax.devices()[:2], (slice(8), slice(8, 16)), strict=True):
        half = jax.device_put((rng, images[i], index[i]), device)
        halves.append(augment_view(*half, FULL))
    assert len({half.device for half in halves}) == 2
    np.testing.assert_allclose(np.concatenate(halves), whole, atol=1e-6)

    for other in (
        augment_view(jax.random.PRNGKey(4), images, index, FULL),
        augment_view(rng, images, index + 16, FULL),
    ):
        changed = np.abs(np.asarray(other) - whole).max((1, 2, 3)) > 1e-3
        assert changed.mean() > 0.9  # a flip or nothing at all may be drawn twice


def test_images_of_a_batch_are_augmented_differently():
    images = np.repeat(random_images(1), 16, axis=0)
    got = np.asarray(augment_view(jax.random.PRNGKey(0), images, np.arange(16), FULL))
    assert len({x.round(4).tobytes() for x in got}) >= 14


# Two groups: two views of 8 px, alike but for their keys, and three of 6 px.
GROUPS = {
    "global": (FULL, dataclasses.replace(FULL, solarize_prob=0.6)),
    "local": (FULL, dataclasses.replace(FULL, blur_prob=0.0), FULL),
}


@pytest.fixture(scope="module")
def five_crops() -> dict[str, np.ndarray]:
    """A batch of five views of seven images."""
    sizes = (8, 8, 6, 6, 6)
    batch = {f"view_{i}": random_images(7, s, s, seed=i) for i, s in enumerate(sizes, start=1)}
    return batch | {"index": np.arange(20, 27, dtype=np.int32)}


def views_of(batch, groups):
    rng = jax.random.PRNGKey(5)
    return jax.jit(functools.partial(augment.augment_views, groups=groups))(rng, batch)


@pytest.fixture(scope="module")
def five_views(five_crops) -> dict[str, jax.Array]:
    return views_of(five_crops, GROUPS)


@pytest.mark.slow
def test_groups_have_views_of_their_own_sizes(five_crops, five_views):
    """View i over all groups, in their order, is crop i augmented by the key with i folded in."""
    assert list(five_views) == ["global", "local"]
    assert five_views["global"].shape == (2, 7, 8, 8, 3)
    assert five_views["local"].shape == (3, 7, 6, 6, 3)
    each = [*five_views["global"], *five_views["local"]]
    for i, (got, view) in enumerate(zip(each, sum(GROUPS.values(), ()), strict=True), start=1):
        key = jax.random.fold_in(jax.random.PRNGKey(5), i)
        expected = augment_view(key, five_crops[f"view_{i}"], five_crops["index"], view)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert np.abs(got - five_crops[f"view_{i}"] / np.float32(255)).max() > 0.1


@pytest.mark.slow
def test_further_groups_leave_the_first_as_it_was(five_crops, five_views):
    """The global views are those of a batch that has no others."""
    pair = {name: five_crops[name] for name in ("view_1", "view_2", "index")}
    alone = views_of(pair, {"global": GROUPS["global"]})
    assert list(alone) == ["global"]
    np.testing.assert_array_equal(five_views["global"], alone["global"])


@pytest.mark.slow
def test_views_of_the_same_crop_are_drawn_apart(five_crops):
    """Within a group and between groups."""
    same = {f"view_{i}": five_crops["view_1"] for i in range(1, 6)}
    groups = {"global": (FULL, FULL), "local": (FULL, FULL, FULL)}
    views = views_of(same | {"index": five_crops["index"]}, groups)
    each = np.asarray([*views["global"], *views["local"]])
    for a, b in itertools.combinations(each, 2):
        assert (np.abs(a - b).max((1, 2, 3)) > 1e-3).mean() > 0.5


@pytest.mark.slow
def test_normalized_is_every_group_normalised(five_crops, five_views):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    made = augment.Augmentation(GROUPS, mean, std)
    got = jax.jit(made.normalized)(jax.random.PRNGKey(5), five_crops)
    for name, views in five_views.items():
        expected = (np.asarray(views) - np.array(mean)) / np.array(std)
        np.testing.assert_allclose(got[name], expected, atol=1e-5)


def section(**groups) -> ConfigDict:
    """A section `views` of such groups: `(count, sections of views)`."""
    made = {}
    for name, (count, *each) in groups.items():
        views = {f"view_{i}": dict(vars(view)) for i, view in enumerate(each, start=1)}
        made[name] = views | {"count": count, "size": 8, "area": (0.1, 1.0), "aspect": (1.0, 2.0)}
    return ConfigDict(made | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)})


def test_the_last_section_is_that_of_all_further_views():
    first, second = only(flip_prob=0.25), only(blur_prob=0.75)
    made = augment.Augmentation.from_config(
        section(local=(4, second), **{"global": (3, first, second)})
    )
    assert list(made.groups) == ["global", "local"]  # whichever way they are written
    assert made.groups["global"] == (first, second, second)
    assert made.groups["local"] == (second,) * 4
    assert (made.mean, made.std) == ((0.1, 0.2, 0.3), (0.5, 0.25, 0.2))
    one = augment.Augmentation.from_config(section(**{"global": (1, first, second)}))
    assert one.groups == {"global": (first,)}
    none = augment.Augmentation.from_config(section(local=(0, second), **{"global": (2, first)}))
    assert none.groups == {"global": (first, first)}


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("global.count", 0, "must be at least 1"),
        ("global.count", -1, "must be at least 1"),
        ("local.count", -1, "must not be negative"),
        ("local.size", 0, "must be at least 1"),
        ("local.area", (0.5, 1.5), "must be (low, high) with 0 < low <= high <= 1.0"),
        ("local.aspect", (0.0, 1.0), "must be (low, high)"),
        ("local.view_1.hue", 0.6, "must be from 0 to 0.5"),
        ("local.view_1.blur_kernel", 4, "must be odd and at least 1"),
        ("global.view_2.flip_prob", 1.5, "must be from 0 to 1"),
        ("std", (1.0, 0.0, 1.0), "must be three numbers, each above 0"),
    ],
)
def test_a_bad_value_of_any_group_is_named(field, value, valid):
    config = ConfigDict({"views": section(local=(3, FULL), **{"global": (2, FULL, FULL)})})
    view_groups.check(config)
    checks.fields(config, view_groups.FIELDS)
    config.update_from_flattened_dict({f"views.{field}": value})
    with pytest.raises(UserError) as error:
        checks.fields(config, view_groups.FIELDS)
    message = str(error.value)
    assert message.startswith(f"config.views.{field}={value!r}: {valid}") and "\n" not in message


def test_uint8_in_float32_between_0_and_1_out():
    images = random_images(16)
    strong = ViewAugmentation(
        jitter_prob=1.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, blur_kernel=5
    )
    got = run(images, strong)
    assert got.dtype == np.float32 and got.shape == images.shape
    assert got.min() >= 0 and got.max() <= 1 + 1e-6
    np.testing.assert_allclose(run(images, NOTHING), images / np.float32(255), atol=1e-7)


def test_normalize_is_per_channel():
    x = np.random.default_rng(0).random((2, 3, 3, 3), np.float32)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    got = augment.normalize(jnp.asarray(x), mean, std)
    np.testing.assert_allclose(got, (x - np.array(mean)) / np.array(std), atol=1e-5)
    assert got.dtype == jnp.float32


def test_groups_without_views_or_of_other_names_are_refused():
    config = ConfigDict({"views": section(**{"global": (2, FULL, FULL)})})
    del config.views["global"].view_1
    with pytest.raises(UserError, match=r"^config\.views\.global: needs a section view_1"):
        view_groups.check(config)
    config = ConfigDict({"views": section(**{"global": (2, FULL, FULL)})})
    config.views.medium = config.views["global"]
    with pytest.raises(UserError, match=r"^config\.views\.medium: the groups .* global and local$"):
        view_groups.check(config)
