"""Splits in one array: decoding, and batches that are the same wherever the images are."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import pathlib

import jax
import numpy as np
import pytest
import tensorflow as tf
from conftest import assert_same
from PIL import Image

from configs import byol
from selfsup_jax.data import decode, inputs, pipeline, pixels, resident, sources
from selfsup_jax.data.batches import Undecodable
from selfsup_jax.data.crops import CropSpec
from selfsup_jax.data.pixels import Reading
from selfsup_jax.devices import parallel, process
from selfsup_jax.errors import UserError
from selfsup_jax.training import pretrain

FIELD = "data.train_split"
SPECS = (CropSpec(12), CropSpec(12), CropSpec(7, (0.05, 0.3), method="bilinear"))


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours, which JPEG and a slightly different chroma keep."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(4 * x + phase[0]), np.sin(5 * y + phase[1]), np.sin(3 * x + 4 * y + phase[2])]
    return (120 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)


def jpeg(pixels: np.ndarray, **options) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "jpeg", **options)
    return encoded.getvalue()


# ------------------------------------------------------------------------------ decoding


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def encodings() -> dict[str, bytes]:
    """The same noise (or a part of it) in every format that a folder may hold."""
    found = {}

    def save(name: str, image: Image.Image, **options) -> None:
        file = io.BytesIO()
        image.save(file, name.partition(" ")[0], **options)
        found[name] = file.getvalue()

    rgb = Image.fromarray(noise(37, 53, 3))
    gray = Image.fromarray(noise(37, 53))
    save("jpeg 4:2:0", rgb, quality=75, subsampling="4:2:0")
    save("jpeg 4:2:2", rgb, quality=90, subsampling="4:2:2")
    save("jpeg 4:4:4", rgb, quality=95, subsampling="4:4:4")
    save("jpeg progressive", rgb, progressive=True)
    save("jpeg gray", gray)
    save("png", rgb)
    save("png gray", gray)
    save("png one bit", gray.point(lambda x: 255 * (x > 127), "1"))
    save("png gray and alpha", Image.merge("LA", (gray, gray)))
    save("png RGBA", Image.fromarray(noise(37, 53, 4)))
    save("png 16 bits", Image.fromarray(noise(37, 53).astype(np.uint16) * 251))
    save("png palette", rgb.quantize(64))
    save("png palette of 4", rgb.quantize(4))
    save("bmp", rgb)
    save("gif", rgb.quantize(128))
    frames = [Image.fromarray(noise(37, 53) // (i + 1)) for i in range(3)]
    save("gif of three", frames[0], save_all=True, append_images=frames[1:], duration=50)
    found["png 16 bits of colour"] = tf.io.encode_png(
        noise(37, 53, 3).astype(np.uint16) * 251
    ).numpy()
    return found


@pytest.mark.parametrize("name", sorted(encodings()))
def test_an_image_is_decoded_as_tensorflow_does(name):
    """Bit for bit: another library, but all results so far were made with it."""
    encoded = encodings()[name]
    expected = tf.io.decode_image(encoded, 3, expand_animations=False).numpy()
    if name.startswith("jpeg"):
        expected = tf.io.decode_jpeg(encoded, 3, dct_method="INTEGER_ACCURATE").numpy()
    assert expected.shape == (37, 53, 3) and expected.std() > 20
    np.testing.assert_array_equal(pixels.decoded(encoded, Reading()), expected)


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 0.5, -30])
@pytest.mark.parametrize("name", ["jpeg 4:2:0", "png", "gif"])
def test_an_image_that_is_cut_off_is_broken(name, kept):
    encoded = encodings()[name]
    cut = encoded[: int(kept * len(encoded)) if isinstance(kept, float) else kept]
    assert pixels.decoded(cut, Reading()) is None


def test_images_of_different_sizes_are_padded(tmp_path):
    shapes = [(5, 9), (8, 4), (6, 6)]
    images = [np.full((*shape, 3), 10 * i, np.uint8) for i, shape in enumerate(shapes, start=1)]
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    pathlib.Path(paths[3]).write_bytes(b"no image")
    source = sources.Source("four", 4, None, "path", images=np.asarray(paths))
    assert decode.array_bytes(source, np.inf) == 4 * 8 * 9 * 3
    assert decode.array_bytes(source, 500) > 500  # and no more headers are read than needed
    array = decode.into_array(source)
    assert array.kind == "array" and array.images.shape == (4, 8, 9, 3) and array.shape is None
    assert array.images.dtype == np.uint8 and array.broken == (3,)
    assert array.sizes[:3].tolist() == [list(shape) for shape in shapes]
    for image, row in zip(images, array.images, strict=False):
        np.testing.assert_array_equal(row[: image.shape[0], : image.shape[1]], image)
    assert decode.array_bytes(array, 0) == array.images.nbytes
    assert decode.into_array(array) is array
    part = sources.subset(
        dataclasses.replace(array, labels=np.zeros(4, np.int32)), lambda *_: np.asarray([3, 1])
    )
    assert part.broken == (0,) and part.sizes[1].tolist() == [8, 4]


def test_headers_are_read_only_until_the_images_are_too_many(tmp_path, monkeypatch):
    paths = []
    for i in range(9):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(noise(20, 20, 3)).save(paths[-1])
    source = sources.Source("nine", 9, None, "path", images=np.asarray(paths))
    read = []
    size = pixels.size
    monkeypatch.setattr(
        pixels, "size", lambda image, reading: read.append(image) or size(image, reading)
    )
    assert decode.array_bytes(source, 9 * 1200 - 1) == 9 * 1200 and len(read) == 1
    assert decode.array_bytes(source, 9 * 1200) == 9 * 1200 and len(read) == 10


def test_images_of_one_size_are_not_padded(tmp_path):
    for i in range(3):
        Image.fromarray(noise(7, 5, 3)).save(tmp_path / f"{i}.png")
    array = decode.into_array(sources.load("folder", str(tmp_path), "train", FIELD))
    assert array.sizes is None and array.shape == (7, 5) and array.broken == ()


def test_an_image_of_another_size_than_the_data_sets_is_broken():
    """As for the host, which would have to make a batch of it."""
    encoded = [tf.io.encode_png(noise(*shape, 3)).numpy() for shape in ((8, 8), (8, 9), (8, 8))]
    source = sources.Source(
        "three", 3, None, "encoded", images=np.asarray(encoded, object), shape=(8, 8)
    )
    array = decode.into_array(source)
    assert array.broken == (1,) and array.images.shape == (3, 8, 8, 3)


# ------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> dict[str, sources.Source]:
    """51 images of two classes, JPEG or PNG, each of its own size; one can't be decoded."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    for i in range(51):
        height, width = (int(n) for n in rng.integers(16, 64, 2))
        pixels = smooth(height, width, seed=i)
        parent = root / "ab"[i % 2]
        parent.mkdir(exist_ok=True)
        if i == 17:
            (parent / f"{i}.jpg").write_bytes(jpeg(pixels)[:400])
        elif i % 3:
            Image.fromarray(pixels).save(parent / f"{i}.png")
        else:
            (parent / f"{i}.jpg").write_bytes(jpeg(pixels, quality=95))
    encoded = sources.load("folder", str(root), "train", FIELD)
    return {"host": encoded, "device": decode.into_array(encoded)}


def options_of(source: sources.Source, batch_size: int = 8, **changes):
    return {
        "seed": 3,
        "batch_size": batch_size,
        "positions": np.arange(batch_size, dtype=np.int32),
        "first_step": 0,
        "undecodable": Undecodable(source.num_examples, 0.1),
    } | changes


def rows_of(source: sources.Source, count: int, with_images: bool = False, **changes):
    rows = resident.train_batches(source, with_images=with_images, **options_of(source, **changes))
    return list(itertools.islice(rows, count))


_crop = jax.jit(functools.partial(resident.crop_batch, specs=SPECS, seed=3))


def cropped(source: sources.Source, batch: dict, step: int, resides: bool = True) -> dict:
    given = {name: x for name, x in batch.items() if name != "name"}
    return _crop(resident.arrays_of(source) if resides else None, np.int32(step), given)


@pytest.mark.slow
def test_both_placements_give_the_same_batches(mixed):
    """Two epochs: the same order, names, labels and replacements, and crops of the same boxes."""
    undecodable = {name: Undecodable(51, 0.1) for name in mixed}
    rows = rows_of(mixed["device"], 12, undecodable=undecodable["device"])
    expected = pipeline.train_batches(
        mixed["host"], SPECS, **options_of(mixed["host"], undecodable=undecodable["host"])
    )
    replaced = 0
    for step, (batch, host) in enumerate(zip(rows, expected, strict=False)):
        device = cropped(mixed["device"], batch, step)
        assert device.keys() | {"name"} == host.keys()
        for name in ("index", "label"):
            np.testing.assert_array_equal(device[name], host[name])
        np.testing.assert_array_equal(batch["name"], host["name"])
        replaced += int((batch["index"] != batch["drawn"]).sum())
        for i, spec in enumerate(SPECS, start=1):
            views = [np.asarray(x[f"view_{i}"], int) for x in (device, host)]
            assert views[0].shape == (8, spec.size, spec.size, 3)
            for difference in np.abs(views[0] - views[1]):
                assert difference.max() <= 1 and difference.mean() < 0.2
    assert replaced == 2  # once in each epoch
    assert undecodable["device"].names == undecodable["host"].names != set()


@pytest.mark.slow
def test_images_from_the_host_give_the_same_views(mixed):
    """A split in an array that is too large for a device."""
    array = mixed["device"]
    assert array.sizes is not None
    for step, (a, b) in enumerate(
        zip(rows_of(array, 3), rows_of(array, 3, with_images=True), strict=True)
    ):
        assert b.keys() == a.keys() | {"image", "size", "label"}
        assert_same(cropped(array, a, step), cropped(array, b, step, resides=False))


def test_a_batch_depends_on_its_seed_step_and_places_alone(mixed):
    array = mixed["device"]
    whole = rows_of(array, 14)
    for step in (1, 6, 9):
        (alone,) = rows_of(array, 1, first_step=step)
        assert_same(alone, whole[step])
    views = cropped(array, whole[9], 9)
    for mine in ([0, 1, 2, 3], [4, 5, 6, 7], [7, 0, 5], [2]):
        (part,) = rows_of(array, 1, first_step=9, positions=np.asarray(mine, np.int32))
        if not np.any(whole[9]["drawn"] != whole[9]["index"]):  # a replacement is the host's
            assert_same(part, {name: x[mine] for name, x in whole[9].items()})
            assert_same(cropped(array, part, 9), {name: x[mine] for name, x in views.items()})
    other = rows_of(array, 14, seed=4)
    assert not any(np.array_equal(a["row"], b["row"]) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_any_number_of_devices_has_the_same_rows(mixed, monkeypatch, devices, microbatches):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda *_: jax.devices()[:devices])
    positions = parallel.host_positions(16, microbatches)
    assert sorted(positions) == list(range(16))
    (batch,) = rows_of(mixed["device"], 1, batch_size=16)
    (given,) = rows_of(mixed["device"], 1, batch_size=16, positions=positions)
    assert_same(given, {name: x[positions] for name, x in batch.items()})


def test_each_rows_image_is_the_one_that_is_named(mixed):
    """With labels and sizes, in the array and in batches that have their images."""
    array = mixed["device"]
    for batch in rows_of(array, 6, with_images=True):
        for i, name in enumerate(batch["name"]):
            expected = np.asarray(Image.open(name).convert("RGB"))
            height, width = batch["size"][i]
            assert expected.shape == (height, width, 3)
            np.testing.assert_array_equal(batch["image"][i, :height, :width], expected)
            assert array.class_names[batch["label"][i]] == pathlib.Path(name).parent.name
            np.testing.assert_array_equal(array.images[batch["row"][i]], batch["image"][i])


@pytest.mark.slow
def test_evaluation_sees_the_same_images_in_both_placements(mixed):
    found = {}
    for placement, read in (("device", resident.eval_batches), ("host", pipeline.eval_batches)):
        undecodable = Undecodable(51, 0.1)
        options = {"resize": 20, "size": 16, "method": "bicubic", "limit": 40, "batch_size": 9}
        found[placement] = list(read(mixed[placement], undecodable=undecodable, **options))
        assert len(undecodable.names) <= 1
    assert [len(batch["image"]) for batch in found["device"]] == [
        len(batch["image"]) for batch in found["host"]
    ]
    for device, host in zip(found["device"], found["host"], strict=True):
        for name in ("label", "name"):
            np.testing.assert_array_equal(device[name], host[name])
        difference = np.abs(device["image"].astype(int) - host["image"])
        assert difference.max() <= 1 and difference.mean() < 0.2


# ----------------------------------------------------------------------------- placement


def config_of(folder: pathlib.Path, **changes):
    config = byol.get_config("folder")
    config.update_from_flattened_dict(
        {"data.dir": str(folder), "batch_size": 8, "steps": 2, "data.train_split": "train"}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    for i in range(10):
        Image.fromarray(smooth(16, 16, i)).save(root / f"{i}.png")
    return root


BYTES = 10 * 16 * 16 * 3


@pytest.mark.parametrize(
    ("placement", "room", "kind", "resides"),
    [
        ("auto", BYTES, "array", True),
        ("auto", BYTES - 1, "path", False),
        ("device", BYTES, "array", True),
        ("host", 10 * BYTES, "path", False),
    ],
)
def test_a_split_is_in_an_array_if_it_fits(small, monkeypatch, placement, room, kind, resides):
    """The share that a split may take is that of the smallest device's memory."""
    monkeypatch.setattr(process, "bytes_of_a_device", lambda: 2 * room)
    config = config_of(small, data__placement=placement, data__device_share=0.5)
    data = inputs.load_data(config)
    assert data.train.kind == kind
    feed = inputs.feed(config, data.train)
    assert (feed.arrays is not None) == (feed.views is not None) == resides
    batch = next(inputs.train_batches(config, data, 0))
    assert ("row" in batch) == resides and ("view_1" in batch) != resides
    assert not np.any(batch["name"] == "") and "image" not in batch


def test_an_array_that_is_too_large_stays_on_the_host(small, monkeypatch):
    array = decode.into_array(sources.load("folder", str(small), "train", FIELD))
    for placement, share in (("host", 1.0), ("auto", 0.0)):
        config = config_of(small, data__placement=placement, data__device_share=share)
        feed = inputs.feed(config, array)
        assert feed.views is not None and feed.arrays is None
        data = inputs.Data(array, None, Undecodable(10, 0.1))
        assert next(inputs.train_batches(config, data, 0))["image"].shape == (8, 16, 16, 3)


def test_too_much_for_the_device_is_told_before_anything_is_compiled(small, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "bytes_of_a_device", lambda: 2**20)
    built = []
    config = config_of(small, data__placement="device", data__device_share=0.001)
    config.optimizer.exclude = ()  # whose patterns are checked with what is built
    with pytest.raises(UserError) as error:
        pretrain.pretrain(config, str(tmp_path / "run"), lambda *args: built.append(args))
    assert len(built) == 1  # by the check of the config, not to be run
    message = str(error.value)
    assert message.startswith("config.data.placement='device': ") and "\n" not in message
    assert str(small) in message and "device_share=0.001" in message and "host" in message
    assert not (tmp_path / "run").exists()


def test_a_split_without_known_labels_cannot_be_on_the_device():
    options = {"shape": (8, 8), "images": np.arange(10), "read": lambda rows: None}
    source = sources.Source("large", 10, ("a", "b"), "encoded", **options)
    config = byol.get_config("demo,data.placement=device,data.device_share=1.0")
    with pytest.raises(UserError, match=r"^config\.data\.placement='device': large is above data"):
        inputs.feed(config, source)
    config.data.placement = "auto"
    assert inputs.feed(config, source) == inputs.Feed()
