"""Images that the host decodes into squares, and the training step crops."""

from __future__ import annotations

import functools
import io
import itertools
import time

import jax
import numpy as np
import pytest
from PIL import Image

from configs import byol
from selfsup_jax.data import inputs, pipeline, pixels, resident, sources
from selfsup_jax.data.batches import Undecodable
from selfsup_jax.data.crops import CropSpec
from selfsup_jax.data.pixels import Reading
from selfsup_jax.training import calls

SPECS = (CropSpec(size=16), CropSpec(size=24, method="bilinear"))
CANVAS, BATCH = 64, 6


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A photograph's kind of image: large shapes, little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "jpeg", quality=90, **options)
    return stream.getvalue()


def split(encoded: list[bytes]) -> sources.Source:
    labels = np.arange(len(encoded), dtype=np.int32) % 3
    images = np.asarray(encoded, object)
    return sources.Source("photographs", len(encoded), tuple("abc"), "encoded", images, labels)


@pytest.fixture(scope="module")
def photographs() -> list[bytes]:
    """Of different sizes, that fit into the canvas; the sixth is no image."""
    shapes = [(40 + 2 * i, 64 - 2 * i) for i in range(13)]
    encoded = [jpeg(smooth(*shape, seed=i)) for i, shape in enumerate(shapes)]
    encoded[5] = encoded[5][:200]
    return encoded


def batches(source: sources.Source, count: int, canvas: int, **changes) -> list[dict]:
    given = {
        "seed": 3,
        "batch_size": BATCH,
        "positions": np.arange(BATCH, dtype=np.int32),
        "first_step": 0,
        "undecodable": Undecodable(source.num_examples, 0.1),
    }
    stream = pipeline.train_batches(source, SPECS, canvas=canvas, **(given | changes))
    return list(itertools.islice(stream, count))


_crop = jax.jit(functools.partial(resident.crop_batch, specs=SPECS, seed=3))


@pytest.mark.slow
def test_the_step_crops_what_the_host_would(photographs):
    """Over two epochs: the same images, labels and replacements; pixels but for rounding."""
    source = split(photographs)
    replaced = 0
    for step, (whole, host) in enumerate(
        zip(batches(source, 5, CANVAS), batches(source, 5, 0), strict=True)
    ):
        assert whole["image"].shape == (BATCH, CANVAS, CANVAS, 3)
        np.testing.assert_array_equal(whole["name"], host["name"])
        given = {k: v for k, v in whole.items() if k != "name"}
        device = _crop(None, np.int32(step), given)
        for name in ("index", "label"):
            np.testing.assert_array_equal(device[name], host[name])
        replaced += int((whole["drawn"] != whole["index"]).sum())
        for i, spec in enumerate(SPECS, start=1):
            views = [np.asarray(x[f"view_{i}"], int) for x in (device, host)]
            assert views[0].shape == (BATCH, spec.size, spec.size, 3)
            assert np.abs(views[0] - views[1]).max() <= 1
    assert replaced >= 1


@pytest.mark.parametrize("crop_on", ["host", "device"])
def test_a_run_goes_on_at_any_step(photographs, crop_on):
    canvas = CANVAS if crop_on == "device" else 0
    source = split(photographs)
    later = batches(source, 2, canvas, first_step=3)
    for a, b in zip(batches(source, 5, canvas)[3:], later, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("shape", [(65, 40), (100, 130), (640, 200), (2000, 30)])
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_what_is_larger_than_the_canvas_is_made_smaller(shape, kind):
    image = smooth(*shape, seed=1)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **({"quality": 95} if kind == "jpeg" else {}))
    made = pixels.decoded(stream.getvalue(), Reading(), CANVAS)
    longer = max(made.shape)
    assert CANVAS * 0.5 < longer <= CANVAS  # JPEGs: to eighths of their size
    np.testing.assert_allclose(
        made.shape[0] / made.shape[1], shape[0] / shape[1], rtol=1.5 / min(made.shape[:2])
    )
    expected = Image.fromarray(image).resize(made.shape[1::-1], Image.Resampling.BOX)
    assert np.abs(made.astype(int) - np.asarray(expected)).mean() < 4
    whole = pixels.decoded(stream.getvalue(), Reading())
    assert whole.shape[:2] == shape


def test_a_config_says_who_crops(tmp_path):
    for i in range(16):
        Image.fromarray(smooth(20, 30, i)).save(tmp_path / f"{i}.png")
    config = byol.get_config("folder")
    fields = {"data.dir": str(tmp_path), "batch_size": 8, "data.placement": "host"}
    config.update_from_flattened_dict(fields | {"data.crop_on": "device", "data.canvas": 32})
    data = inputs.load_data(config)
    feed = inputs.feed(config, data.train)
    assert feed.views is not None and feed.arrays is None
    batch = next(inputs.train_batches(config, data, 0))
    assert batch["image"].shape == (8, 32, 32, 3) and "view_1" not in batch
    assert batch["size"].tolist() == [[20, 30]] * 8
    views = inputs.with_views(feed, 0, {k: v for k, v in batch.items() if k != "name"})
    config.data.crop_on = "host"
    assert inputs.feed(config, data.train) == inputs.Feed()
    host = next(inputs.train_batches(config, data, 0))
    for name in ("view_1", "view_2"):
        assert np.abs(np.asarray(views[name], int) - host[name]).max() <= 1


# ----------------------------------------------------------------------------- run ahead


class Call:
    """What a call returns: ready once `end` was called."""

    def __init__(self):
        self.done = False

    def block_until_ready(self):
        while not self.done:
            time.sleep(0.001)
        return self


def test_no_more_than_two_calls_are_ahead_of_the_devices():
    fetched = []

    def rows():
        for i in itertools.count():
            fetched.append(i)
            yield {"row": np.asarray([i])}

    ahead = calls.Ahead(rows(), from_host=True)
    running = [Call() for _ in range(3)]
    for call in running[:2]:
        assert len(ahead.fetch(1)) == 1
        ahead.add(call)
    running[0].done = True
    ahead.fetch(2)  # waits for the first call only
    assert fetched == [0, 1, 2, 3] and ahead.waited() == 0.0  # the second one was not done
    running[1].done = True
    ahead.add(running[2])
    running[2].done = True
    while not ahead._running[-1].done():
        time.sleep(0.001)

    def slow():
        time.sleep(0.05)
        yield {}

    ahead._batches = slow()
    ahead.fetch(1)
    assert 0.04 < ahead.waited() < 5.0 and ahead.waited() == 0.0
    ahead.close()


def test_rows_of_a_split_on_the_devices_wait_for_nothing():
    ahead = calls.Ahead(iter([{}] * 9), from_host=False)
    for _ in range(9):
        ahead.fetch(1)
        ahead.add(Call())  # never done
    assert ahead.waited() is None
