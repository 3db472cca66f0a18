"""Crop boxes against their distributions and torchvision's rules; cropping against TensorFlow's.

Most tests hold for both ways of cropping: in the step (`crops.py`) and on the host
(`host_crops.py`).
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import byol
from selfsup_jax.data import batches, crops, host_crops, inputs, pipeline, resident, sources
from selfsup_jax.data.crops import CropSpec
from selfsup_jax.data.views import RESIZE_METHODS

# On a square image every box of these ranges fits, so that none is drawn again: the boxes have the
# very distribution that is asked for.
ALWAYS_FITS = CropSpec(size=8, area=(0.08, 0.5), aspect=(3 / 4, 4 / 3))


def draws_of_examples(count: int, seed: int = 0, num_views: int = 2, step: int = 0) -> np.ndarray:
    """`[count, views, attempts, 4]` of the first examples of a step's batch."""
    index = np.arange(count, dtype=np.int32)
    return np.asarray(crops.box_draws(seed, jnp.int32(step), index, num_views))


# ------------------------------------------------------------------------ the two ways

_device_boxes = jax.jit(crops.boxes_from_draws, static_argnames="spec")
_device_crops = jax.jit(crops.random_resized_crops, static_argnames="specs")
_matrix = jax.jit(crops.resize_matrix, static_argnums=(2, 3, 4))
_device_test_view = jax.jit(crops.test_view, static_argnames=("resize", "size", "method"))


def boxes_of(draws, height, width, spec):
    flat = draws.reshape(-1, *draws.shape[2:])
    sizes = np.tile(np.asarray([height, width], np.int32), (len(flat), 1))
    drawn = np.asarray(_device_boxes(flat, sizes, spec))
    assert np.array_equal(drawn, drawn.astype(np.int32))  # whole pixels
    return drawn.astype(np.int32).reshape(*draws.shape[:2], 4)


def _crop_on_device(image, draws, specs):
    boxes = _boxes_of_views(image, draws, specs)
    return [np.asarray(x[0]) for x in _device_crops(image[None], boxes[None], tuple(specs))]


def _crop_on_host(image, draws, specs):
    boxes = _boxes_of_views(image, draws, specs)
    return [_cut_on_host(image, box, spec) for box, spec in zip(boxes, specs, strict=True)]


def _boxes_of_views(image, draws, specs):
    each = [boxes_of(draws[None, i : i + 1], *image.shape[:2], x) for i, x in enumerate(specs)]
    return np.concatenate(each, axis=1)[0]


def _cut_on_device(image, box, spec):
    """The box cut out of the image and resized, by the two matrices."""
    box = np.asarray([box], np.float32)
    rows, columns = (
        _matrix(box[:, axis], box[:, 2 + axis], spec.size, image.shape[axis], spec.method)[0]
        for axis in (0, 1)
    )
    resized = np.einsum("ph,hwc,qw->pqc", rows, image.astype(float), columns)
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


_cut_on_host = host_crops.crop_and_resize


def _test_view_on_device(image, **options):
    sizes = np.asarray([image.shape[:2]], np.int32)
    return np.asarray(_device_test_view(image[None], sizes, **options)[0])


_test_view_on_host = host_crops.test_view


@pytest.fixture(params=["device", "host"])
def way(request):
    """Either way of cropping, as functions of NumPy arrays of one image."""
    names = ("crop", "cut", "test_view")
    return types.SimpleNamespace(
        name=request.param, **{name: globals()[f"_{name}_on_{request.param}"] for name in names}
    )


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


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def assert_one_level_off(a, b) -> None:
    """At most one grey level apart, and that seldom.

    TensorFlow has bicubic weights in a table of 1,024 entries, and halves are rounded either way.
    """
    difference = np.abs(np.asarray(a, int) - np.asarray(b, int))
    assert difference.max() <= 1 and difference.mean() < 0.1


# ------------------------------------------------------------------------------- boxes


def test_whole_numbers_in_a_config_are_ranges_too():
    config = byol.get_config("demo")
    config.views["global"].update(area=(1, 1), aspect=(1, 2))
    drawn = [boxes_of(draws_of_examples(5), 40, 60, spec) for spec in inputs.crop_specs(config)]
    config.views["global"].update(area=(1.0, 1.0), aspect=(1.0, 2.0))
    for got, spec in zip(drawn, inputs.crop_specs(config), strict=True):
        np.testing.assert_array_equal(got, boxes_of(draws_of_examples(5), 40, 60, spec))


def test_area_is_uniform_and_aspect_log_uniform():
    size = 4000  # so large that whole pixels don't matter
    drawn = boxes_of(draws_of_examples(5000), size, size, ALWAYS_FITS)
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


def test_neighbouring_steps_and_seeds_are_not_correlated():
    columns = [
        draws_of_examples(2000, seed, 1, step)[:, 0, :2].reshape(2000, -1)
        for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    correlation = np.corrcoef(np.concatenate(columns, 1), rowvar=False)
    correlation -= np.eye(len(correlation))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(2000)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 50), (10, 400), (37, 23), (300, 200)])
def test_boxes_lie_inside_the_image(height, width):
    drawn = boxes_of(draws_of_examples(500), height, width, CropSpec(size=8))
    top, left, box_h, box_w = np.moveaxis(drawn, -1, 0)
    assert min(box_h.min(), box_w.min()) >= 1
    assert min(top.min(), left.min()) >= 0
    assert (top + box_h).max() <= height and (left + box_w).max() <= width


def test_the_last_row_and_column_can_be_reached():
    drawn = boxes_of(draws_of_examples(500), 12, 12, ALWAYS_FITS)
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
    assert boxes_of(draws, 100, 100, spec)[0, 0].tolist() == expected


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
    drawn = boxes_of(draws_of_examples(20), height, width, spec)
    expected = torchvision_fallback(height, width, spec.aspect)
    assert np.unique(drawn.reshape(-1, 4), axis=0).tolist() == [expected]


def test_a_whole_image_within_the_aspect_is_its_own_fallback():
    # Area 1 at the aspect 1.25 needs the draw to hit it: all ten attempts are put beside it.
    draws = np.full((1, 1, 10, 4), 0.01, np.float32)
    drawn = boxes_of(draws, 100, 125, CropSpec(size=8, area=(1.0, 1.0)))
    assert drawn[0, 0].tolist() == [0, 0, 100, 125]


def test_draws_are_a_function_of_seed_step_index_and_view():
    def draw(seed: int, step: int, index: int) -> np.ndarray:
        given = np.asarray([index], np.int32)
        return np.asarray(crops.box_draws(seed, jnp.int32(step), given, 2))[0]

    first = draw(5, 7, 3)
    np.testing.assert_array_equal(draw(5, 7, 3), first)
    assert first.min() >= 0 and first.max() < 1
    assert first.shape == (2, 10, 4) and len(np.unique(first)) == first.size
    last = 2**31 - 1  # of the steps that an int32 can count
    others = [draw(6, 7, 3), draw(5, 8, 3), draw(5, 7, 4), draw(5, 3, 7), draw(7, 5, 3)]
    others += [draw(5, last, 3), draw(5, last - 1, 3), first[::-1]]
    for i, a in enumerate([first, *others[:-1]]):
        for b in others[i:]:
            assert not np.any(a == b)


def test_draws_do_not_depend_on_the_rest_of_the_batch():
    whole = draws_of_examples(16, step=9)
    part = crops.box_draws(0, jnp.int32(9), np.asarray([11, 3], np.int32), 2)
    np.testing.assert_array_equal(part, whole[[11, 3]])


# A key of the state and one of the crops with the same numbers would draw the same.
def test_draws_are_not_those_of_the_states_keys():
    draws = np.asarray(draws_of_examples(4, step=2))
    for key in (jax.random.PRNGKey(0), jax.random.fold_in(jax.random.PRNGKey(0), 2)):
        keys = [key, *(jax.random.fold_in(key, i) for i in range(4)), *jax.random.split(key, 4)]
        for other in keys:
            assert not np.any(draws == np.asarray(jax.random.uniform(other, (2, 10, 4))))


def test_a_crop_is_the_box_resized(way):
    image = smooth_image(60, 80)
    draws = draws_of_examples(4)
    spec = CropSpec(size=16, area=(0.2, 0.6))
    for example in draws:
        views = way.crop(image, example, [spec] * 2)
        drawn = boxes_of(example[None], 60, 80, spec)[0]
        for view, (top, left, h, w) in zip(views, drawn, strict=True):
            crop = image[top : top + h, left : left + w]
            # PIL antialiases, which on a smooth image and little shrinking changes little.
            expected = np.asarray(Image.fromarray(crop).resize((16, 16), Image.Resampling.BICUBIC))
            assert view.dtype == np.uint8 and view.shape == (16, 16, 3)
            assert np.abs(view.astype(int) - expected).max() <= 4
        assert np.any(views[0] != views[1])


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_a_crop_of_the_size_wanted_is_left_as_it_is(way, method):
    image = noise(20, 24)
    view = way.cut(image, [3, 5, 10, 10], CropSpec(10, method=method))
    np.testing.assert_array_equal(view, image[3:13, 5:15])


@pytest.mark.parametrize("method", RESIZE_METHODS)
@pytest.mark.parametrize("size", [5, 16, 33])
def test_both_ways_cut_out_the_same(method, size):
    """As TensorFlow; noise, from boxes that grow and shrink, at the edges and in the middle."""
    image = noise(40, 52)
    boxes = [[0, 0, 40, 52], [0, 0, 1, 1], [39, 51, 1, 1], [3, 5, 10, 10], [7, 2, 31, 9]]
    boxes += [[0, 20, 40, 3], [12, 0, 16, 16], [1, 1, 39, 51]]
    spec = CropSpec(size, method=method)
    for box in boxes:
        top, left, height, width = box
        crop = image[top : top + height, left : left + width]
        resized = tf.image.resize(crop, (size, size), method)
        expected = np.clip(np.round(resized), 0, 255)
        assert_one_level_off(_cut_on_device(image, box, spec), expected)
        assert_one_level_off(_cut_on_host(image, box, spec), expected)


@pytest.mark.parametrize("method", RESIZE_METHODS)
def test_nothing_outside_the_box_is_seen(way, method):
    """A neighbouring pixel of a crop may lie in another image's padding."""
    image, painted = noise(30, 30), noise(30, 30, seed=1)
    box = [4, 6, 11, 9]
    painted[4:15, 6:15] = image[4:15, 6:15]
    for size in (5, 23):
        spec = CropSpec(size, method=method)
        np.testing.assert_array_equal(way.cut(image, box, spec), way.cut(painted, box, spec))


# Two large views, and three small ones of other ranges.
FIVE = [CropSpec(size=24, area=(0.4, 1.0))] * 2 + [
    CropSpec(size=10, area=(0.05, 0.3), aspect=(0.5, 2.0), method="bilinear")
] * 3


@pytest.mark.slow
def test_each_view_is_cropped_by_its_own_spec(way):
    """With the draws of its own place, as if all views were cropped by that spec."""
    image = smooth_image(60, 80)
    for example in draws_of_examples(3, num_views=5):
        views = way.crop(image, example, FIVE)
        assert [view.shape[0] for view in views] == [24, 24, 10, 10, 10]
        for i, spec in enumerate(FIVE):
            np.testing.assert_array_equal(views[i], way.crop(image, example, [spec] * 5)[i])
            box = boxes_of(example[None, i : i + 1], 60, 80, spec)[0, 0]
            assert_one_level_off(views[i], way.cut(image, box.tolist(), spec))
            share = box[2] * box[3] / (60 * 80)
            assert share > 0.38 if i < 2 else share < 0.32


@pytest.mark.slow
def test_specs_that_take_turns_keep_their_places(way):
    large, small = FIVE[0], FIVE[-1]
    image = smooth_image(50, 50)
    example = draws_of_examples(1, num_views=4)[0]
    views = way.crop(image, example, [large, small, small, large])
    for i, spec in enumerate([large, small, small, large]):
        np.testing.assert_array_equal(views[i], way.crop(image, example, [spec] * 4)[i])


@pytest.mark.slow
@pytest.mark.parametrize("specs", [[CropSpec(size=8)], FIVE], ids=["one", "five"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_batchs_views_are_those_of_its_step_and_places(placement, specs):
    """Of each image of two epochs, by its step and its place in the global batch."""
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), np.uint8)
    options = {
        "seed": 7,
        "batch_size": 3,
        "positions": np.arange(3, dtype=np.int32),
        "first_step": 0,
        "undecodable": batches.Undecodable(6, 0.01),
    }
    if placement == "device":
        source = sources.Source("noise", 6, None, "array", images=images, shape=(20, 30))
        crop = jax.jit(functools.partial(resident.crop_batch, specs=specs, seed=7))
        arrays = resident.arrays_of(source)
        rows = resident.train_batches(source, with_images=False, **options)
        rows = ({k: v for k, v in batch.items() if k != "name"} for batch in rows)
        stream = (crop(arrays, np.int32(step), batch) for step, batch in enumerate(rows))
    else:
        encoded = np.asarray([tf.io.encode_png(image).numpy() for image in images], object)
        source = sources.Source("noise", 6, None, "encoded", images=encoded)
        stream = pipeline.train_batches(source, specs, **options)
    for step, batch in zip(range(4), stream, strict=False):
        order = batches.epoch_order(6, seed=7, epoch=step // 2)
        draws = draws_of_examples(3, 7, len(specs), step)
        for place in range(3):
            image = images[order[step % 2 * 3 + place]]
            expected = _crop_on_host(image, draws[place], specs)
            for i, view in enumerate(expected, start=1):
                assert batch[f"view_{i}"].dtype == np.uint8
                assert_one_level_off(batch[f"view_{i}"][place], view)
    other = _crop_on_host(image, draws_of_examples(3, 8, len(specs), step)[place], specs)
    assert np.any(other[0] != expected[0])


def test_bicubic_overshoot_is_clipped_not_wrapped(way):
    image = np.zeros((12, 12, 3), np.uint8)
    image[:, 6:] = 255
    whole = CropSpec(31, area=(1.0, 1.0), aspect=(1.0, 1.0))
    (view,) = way.crop(image, draws_of_examples(1, num_views=1)[0], [whole])
    row = view[15, :, 0]
    assert np.all(row[:10] < 20) and np.all(row[-10:] > 235)


# ---------------------------------------------------------------------- the test's view


@pytest.mark.parametrize(("height", "width"), [(40, 60), (75, 40), (40, 40)])
def test_test_view_resizes_the_shorter_side_and_crops_the_centre(way, height, width):
    image = smooth_image(height, width)
    got = way.test_view(image, resize=30, size=24, method="bicubic")
    scale = 30 / min(height, width)
    new_h, new_w = round(height * scale), round(width * scale)
    resized = np.asarray(Image.fromarray(image).resize((new_w, new_h), Image.Resampling.BICUBIC))
    top, left = (new_h - 24) // 2, (new_w - 24) // 2
    expected = resized[top : top + 24, left : left + 24]
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_test_view_smooths_when_it_shrinks(way):
    # A fine chequerboard is gray from afar; a third of it, taken pixel by pixel, is one again.
    board = np.indices((48, 48)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, -1).astype(np.uint8)
    got = way.test_view(image, resize=16, size=16, method="bicubic")
    assert np.abs(got[2:-2, 2:-2].astype(int) - 127.5).max() < 20


def test_test_view_leaves_an_image_of_the_size_alone(way):
    image = noise(28, 28)
    got = way.test_view(image, resize=28, size=28, method="bicubic")
    np.testing.assert_array_equal(got, image)
    cropped = way.test_view(image, resize=28, size=20, method="bicubic")
    np.testing.assert_array_equal(cropped, image[4:24, 4:24])


def _test_view_by_tensorflow(image, resize, size, method):
    scaled = np.round(np.asarray(image.shape[:2]) * resize / min(image.shape[:2])).astype(int)
    resized = tf.image.resize(image, scaled, method, antialias=True)
    top, left = (scaled - size) // 2
    return np.clip(np.round(resized[top : top + size, left : left + size]), 0, 255)


@pytest.mark.slow
@pytest.mark.parametrize("method", RESIZE_METHODS)
@pytest.mark.parametrize(("resize", "size"), [(30, 24), (12, 12), (70, 55)])
def test_both_ways_have_the_same_test_view(method, resize, size):
    """Of noise, square or not, even or odd, alone or in an array that is larger."""
    sizes = np.asarray([[40, 60], [75, 41], [33, 33], [30, 91], [resize, resize + 9]], np.int32)
    images = [noise(*shape) for shape in sizes]
    options = {"resize": resize, "size": size, "method": method}
    expected = [_test_view_by_tensorflow(image, **options) for image in images]
    for image, view in zip(images, expected, strict=True):
        assert_one_level_off(_test_view_on_host(image, **options), view)
    assert_one_level_off(_test_view_on_device(images[0], **options), expected[0])
    padded = np.random.default_rng(1).integers(0, 256, (5, 80, 96, 3), np.uint8)
    for image, place in zip(images, padded, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    assert_one_level_off(_device_test_view(padded, sizes, **options), expected)
