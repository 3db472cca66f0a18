"""Crop boxes against their distributions and torchvision's rules; cropping against plain NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from selfsup_jax.data import crops, pipeline, sources
from selfsup_jax.data.crops import CropSpec
from selfsup_jax.data.views import RESIZE_METHODS

# On a square image every box of these ranges fits, so that none is drawn again: the boxes have the
# very distribution that is asked for.
ALWAYS_FITS = CropSpec(size=8, area=(0.08, 0.5), aspect=(3 / 4, 4 / 3))


def draws_of_examples(count: int, seed: int = 0, num_views: int = 2) -> np.ndarray:
    """`[count, views, attempts, 4]`."""
    examples = tf.range(count, dtype=tf.int64)
    spec = tf.TensorSpec((num_views, 10, 4), tf.float32)
    return tf.map_fn(
        lambda i: crops.box_draws(seed, i, num_views), examples, fn_output_signature=spec
    ).numpy()


def boxes(draws: np.ndarray, height: int, width: int, spec: CropSpec) -> np.ndarray:
    """`[count, views, attempts, 4]` draws to `[count, views, 4]` boxes."""
    flat = tf.constant(draws.reshape(-1, *draws.shape[2:]), tf.float32)
    out = crops.boxes_from_draws(flat, tf.constant(height), tf.constant(width), spec)
    return out.numpy().reshape(*draws.shape[:2], 4)


def distance_from_uniform(x: np.ndarray, low: float, high: float) -> float:
    """Kolmogorov and Smirnov's: the largest distance of the distribution functions."""
    x = np.sort((x.ravel() - low) / (high - low))
    steps = np.arange(len(x) + 1) / len(x)
    return max(np.abs(x - steps[1:]).max(), np.abs(x - steps[:-1]).max())


def smooth_image(height: int, width: int) -> np.ndarray:
    """Smooth colours: JPEG keeps them, and resizing does not ring."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    image = np.stack([y, x, 0.5 + 0.5 * np.sin(6 * x + 4 * y)], axis=-1)
    return (20 + 200 * image).astype(np.uint8)


# ------------------------------------------------------------------------------- boxes


@pytest.mark.slow
def test_area_is_uniform_and_aspect_log_uniform():
    size = 4000  # so large that whole pixels don't matter
    drawn = boxes(draws_of_examples(5000), size, size, ALWAYS_FITS)
    top, left, height, width = np.moveaxis(drawn.astype(float), -1, 0)
    area, log_aspect = height * width / size**2, np.log(width / height)
    critical = 1.95 / np.sqrt(area.size)  # exceeded by chance once in 1,000 times
    assert distance_from_uniform(area, 0.08, 0.5) < critical
    assert distance_from_uniform(log_aspect, np.log(3 / 4), np.log(4 / 3)) < critical
    assert distance_from_uniform(top / (size - height), 0, 1) < critical
    assert distance_from_uniform(left / (size - width), 0, 1) < critical
    # Nor do the four, the two views, or neighbouring examples know of one another.
    columns = [area, log_aspect, top / (size - height), left / (size - width)]
    table = np.concatenate(
        [np.stack([c[:-1], c[1:]], 1).reshape(len(c) - 1, -1) for c in columns], 1
    )
    correlation = np.corrcoef(table, rowvar=False) - np.eye(table.shape[1])
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(table))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 50), (10, 400), (37, 23), (300, 200)])
def test_boxes_lie_inside_the_image(height, width):
    drawn = boxes(draws_of_examples(500), height, width, CropSpec(size=8))
    top, left, box_h, box_w = np.moveaxis(drawn, -1, 0)
    assert min(box_h.min(), box_w.min()) >= 1
    assert min(top.min(), left.min()) >= 0
    assert (top + box_h).max() <= height and (left + box_w).max() <= width


def test_the_last_row_and_column_can_be_reached():
    drawn = boxes(draws_of_examples(500), 12, 12, ALWAYS_FITS)
    assert np.any(drawn[..., 0] + drawn[..., 2] == 12)
    assert np.any(drawn[..., 1] + drawn[..., 3] == 12)


def test_the_first_attempt_that_fits_counts():
    spec = CropSpec(size=8, area=(0.2, 1.0), aspect=(0.5, 2.0))
    draws = np.full((1, 1, 10, 4), 0.5, np.float32)
    draws[0, 0, :2, :2] = 0.99  # the whole area, twice as wide as high: fits no square
    draws[0, 0, 2] = (0.0, 0.5, 0.25, 0.75)  # a fifth of the area, square
    draws[0, 0, 3] = (0.1, 0.5, 0.0, 0.0)  # fits, too, but comes later
    side = round(np.sqrt(0.2) * 100)
    expected = [int(0.25 * (101 - side)), int(0.75 * (101 - side)), side, side]
    assert boxes(draws, 100, 100, spec)[0, 0].tolist() == expected


def torchvision_fallback(height: int, width: int, aspect: tuple[float, float]) -> list[int]:
    """The end of `RandomResizedCrop.get_params`."""
    h, w = height, width
    if width / height < min(aspect):
        h = round(width / min(aspect))
    elif width / height > max(aspect):
        w = round(height * max(aspect))
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (7, 400), (3, 31)])
def test_an_extreme_image_falls_back_to_torchvisions_centre_crop(height, width):
    spec = CropSpec(size=8, area=(0.9, 1.0))
    drawn = boxes(draws_of_examples(20), height, width, spec)
    expected = torchvision_fallback(height, width, spec.aspect)
    assert np.unique(drawn.reshape(-1, 4), axis=0).tolist() == [expected]


def test_a_whole_image_within_the_aspect_is_its_own_fallback():
    # Area 1 at the aspect 1.25 needs the draw to hit it: all ten attempts are put beside it.
    draws = np.full((1, 1, 10, 4), 0.01, np.float32)
    drawn = boxes(draws, 100, 125, CropSpec(size=8, area=(1.0, 1.0)))
    assert drawn[0, 0].tolist() == [0, 0, 100, 125]


def test_draws_are_a_function_of_seed_example_and_view():
    draw = lambda seed, example: crops.box_draws(seed, tf.constant(example, tf.int64), 2).numpy()  # noqa: E731
    first = draw(5, 7)
    np.testing.assert_array_equal(draw(5, 7), first)
    assert first.min() >= 0 and first.max() < 1
    far = 10**10  # a long run's examples don't fit in 32 bits
    for other in (draw(6, 7), draw(5, 8), draw(7, 5), draw(5, far), first[::-1]):
        assert not np.any(other == first)
    assert not np.any(draw(5, far) == draw(5, far + 1))
    assert not np.any(draw(5, far) == draw(5, far % 2**32))


# ------------------------------------------------------------------------ carrying out


def test_a_crop_is_the_box_resized():
    image = smooth_image(60, 80)
    draws = draws_of_examples(4)
    spec = CropSpec(size=16, area=(0.2, 0.6))
    for example in draws:
        views = crops.crop_array(tf.constant(image), tf.constant(example), [spec] * 2)
        drawn = boxes(example[None], 60, 80, spec)[0]
        for view, (top, left, h, w) in zip(views, drawn, strict=True):
            crop = image[top : top + h, left : left + w]
            # PIL antialiases, which on a smooth image and little shrinking changes little.
            expected = np.asarray(Image.fromarray(crop).resize((16, 16), Image.Resampling.BICUBIC))
            assert view.dtype == tf.uint8 and view.shape == (16, 16, 3)
            assert np.abs(view.numpy().astype(int) - expected).max() <= 4
        assert np.any(views[0].numpy() != views[1].numpy())


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_a_crop_of_the_size_wanted_is_left_as_it_is(method):
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    box = tf.constant([[3, 5, 10, 10]])
    (view,) = crops.crop_and_resize(tf.constant(image), box, [CropSpec(10, method=method)])
    np.testing.assert_array_equal(view, image[3:13, 5:15])


# Two large views, and three small ones of other ranges.
FIVE = [CropSpec(size=24, area=(0.4, 1.0))] * 2 + [
    CropSpec(size=10, area=(0.05, 0.3), aspect=(0.5, 2.0), method="bilinear")
] * 3


def test_each_view_is_cropped_by_its_own_spec():
    """With the draws of its own place, as if all views were cropped by that spec."""
    image = tf.constant(smooth_image(60, 80))
    for example in tf.constant(draws_of_examples(5, num_views=5)):
        drawn = crops.boxes_of_views(example, tf.constant(60), tf.constant(80), FIVE).numpy()
        views = crops.crop_array(image, example, FIVE)
        assert [view.shape[0] for view in views] == [24, 24, 10, 10, 10]
        for i, spec in enumerate(FIVE):
            alone = crops.boxes_from_draws(example, tf.constant(60), tf.constant(80), spec)
            np.testing.assert_array_equal(drawn[i], alone[i])
            np.testing.assert_array_equal(views[i], crops.crop_array(image, example, [spec] * 5)[i])
        shares = drawn[:, 2] * drawn[:, 3] / (60 * 80)
        assert shares[:2].min() > 0.38 and shares[2:].max() < 0.32


def test_specs_that_take_turns_keep_their_places():
    large, small = FIVE[0], FIVE[-1]
    image = tf.constant(smooth_image(50, 50))
    example = tf.constant(draws_of_examples(1, num_views=4)[0])
    views = crops.crop_array(image, example, [large, small, small, large])
    for i, spec in enumerate([large, small, small, large]):
        np.testing.assert_array_equal(views[i], crops.crop_array(image, example, [spec] * 4)[i])


@pytest.mark.parametrize("specs", [[CropSpec(size=8)], FIVE])
def test_the_plain_form_gives_the_pipelines_views(specs):
    """Of each image of two epochs, by its step and its place in the global batch."""
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), np.uint8)
    source = sources.Source("noise", 6, None, "array", images=tf.constant(images))
    stream = pipeline.train_batches(
        source,
        specs,
        seed=7,
        batch_size=3,
        positions=np.arange(3, dtype=np.int32),
        first_step=0,
        undecodable=pipeline.Undecodable(6, 0.01),
    )
    for step, batch in zip(range(4), stream, strict=False):
        order = pipeline.epoch_order(6, seed=7, epoch=step // 2)
        for place in range(3):
            image = images[order[step % 2 * 3 + place]]
            views = crops.random_resized_crops(image, specs, seed=7, example=3 * step + place)
            assert len(views) == len(specs)
            for i, view in enumerate(views, start=1):
                assert type(view) is np.ndarray and view.dtype == np.uint8
                np.testing.assert_array_equal(batch[f"view_{i}"][place], view)
    other = crops.random_resized_crops(image, specs, seed=8, example=3 * step + place)
    assert np.any(other[0] != views[0])


def test_bicubic_overshoot_is_clipped_not_wrapped():
    image = np.zeros((12, 12, 3), np.uint8)
    image[:, 6:] = 255
    views = crops.crop_and_resize(tf.constant(image), tf.constant([[0, 0, 12, 12]]), [CropSpec(31)])
    row = views[0].numpy()[15, :, 0]
    assert np.all(row[:10] < 20) and np.all(row[-10:] > 235)


def test_a_jpeg_decoded_in_part_gives_the_crops_of_the_whole():
    encoded = tf.io.encode_jpeg(smooth_image(97, 131), quality=95)
    png = tf.io.encode_png(tf.io.decode_jpeg(encoded, channels=3))
    spec = CropSpec(size=24, area=(0.1, 0.3))
    for example in tf.constant(draws_of_examples(30)):
        from_jpeg = crops.crop_encoded(encoded, example, [spec] * 2)
        from_png = crops.crop_encoded(png, example, [spec] * 2)
        difference = np.asarray(from_jpeg, int) - np.asarray(from_png, int)
        # The chroma at the window's edge has no neighbours to be interpolated from.
        assert np.abs(difference).max() <= 4 and np.abs(difference).mean() < 0.1


def test_gray_and_palette_images_come_out_in_three_channels():
    gray = smooth_image(30, 40)[..., :1]
    example = tf.constant(draws_of_examples(1)[0])
    spec = CropSpec(size=8)
    expected = crops.crop_array(tf.constant(np.repeat(gray, 3, -1)), example, [spec] * 2)
    for encoded in (tf.io.encode_png(gray), tf.io.encode_jpeg(gray, quality=100)):
        got = crops.crop_encoded(encoded, example, [spec] * 2)
        assert np.abs(np.asarray(got, int) - np.asarray(expected, int)).max() <= 2


# ---------------------------------------------------------------------- the test's view


@pytest.mark.parametrize(("height", "width"), [(40, 60), (75, 40), (40, 40)])
def test_test_image_resizes_the_shorter_side_and_crops_the_centre(height, width):
    image = smooth_image(height, width)
    got = crops.test_image(tf.constant(image), resize=30, size=24, method="bicubic").numpy()
    scale = 30 / min(height, width)
    new_h, new_w = round(height * scale), round(width * scale)
    resized = np.asarray(Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BICUBIC))
    top, left = (new_h - 24) // 2, (new_w - 24) // 2
    expected = resized[top : top + 24, left : left + 24]
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_test_image_smooths_when_it_shrinks():
    # A fine chequerboard is gray from afar; a third of it, taken pixel by pixel, is one again.
    board = np.indices((48, 48)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, -1).astype(np.uint8)
    got = crops.test_image(tf.constant(image), resize=16, size=16, method="bicubic").numpy()
    assert np.abs(got[2:-2, 2:-2].astype(int) - 127.5).max() < 20


def test_test_image_leaves_an_image_of_the_size_alone():
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    got = crops.test_image(tf.constant(image), resize=28, size=28, method="bicubic")
    np.testing.assert_array_equal(got, image)
    cropped = crops.test_image(tf.constant(image), resize=28, size=20, method="bicubic")
    np.testing.assert_array_equal(cropped, image[4:24, 4:24])
