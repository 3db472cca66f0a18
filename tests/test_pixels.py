"""What encoded images become: the same pixels on both ways, upright, neither black nor cut off."""

from __future__ import annotations

import dataclasses
import io
import logging
import pathlib
import struct
import types
import zlib

import jax
import numpy as np
import pytest
import tensorflow as tf
import tiny_runs
from PIL import ExifTags, Image, ImageOps

from configs import byol, embed
from selfsup_jax.config import check_values
from selfsup_jax.data import decode, inputs, intensity, pack, pixels, sources
from selfsup_jax.data.pixels import Reading
from selfsup_jax.data.source import Source
from selfsup_jax.errors import UserError
from selfsup_jax.jobs import runner

FIELD = "data.train_split"
SHAPE = (37, 29)


def noise(*shape: int, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray, order: str = "<", packed: bool = False, planes: bool = False) -> bytes:
    """A TIFF of `[H, W, C]` 16-bit values: Pillow writes none in colour."""
    height, width, channels = values.shape
    data = (values.transpose(2, 0, 1) if planes else values).astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if packed else data
    count = 10
    bits_at = 8 + 2 + 12 * count + 4
    at = bits_at + 2 * channels

    def entry(tag: int, kind: int, number: int, value: int) -> bytes:
        if kind == 3 and number == 1:
            return struct.pack(f"{order}HHIHH", tag, kind, number, value, 0)
        return struct.pack(f"{order}HHII", tag, kind, number, value)

    entries = [
        *(entry(256, 3, 1, width), entry(257, 3, 1, height), entry(258, 3, channels, bits_at)),
        *(entry(259, 3, 1, 8 if packed else 1), entry(262, 3, 1, 2), entry(273, 4, 1, at)),
        *(entry(277, 3, 1, channels), entry(278, 3, 1, height), entry(279, 4, 1, len(data))),
        entry(284, 3, 1, 2 if planes else 1),
    ]
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, count)
    end = struct.pack(f"{order}I{channels}H", 0, *[16] * channels)
    return start + b"".join(entries) + end + data


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


# ------------------------------------------------------------------------------ all kinds


RGB = Image.fromarray(noise(*SHAPE, 3))
GRAY16 = noise(*SHAPE, high=4096, dtype=np.uint16)
RGB16 = noise(*SHAPE, 3, high=4096, dtype=np.uint16)
ENCODINGS = {
    "webp": encoded(RGB, "webp", quality=80),
    "webp lossless": encoded(RGB, "webp", lossless=True),
    "webp with alpha": encoded(Image.fromarray(noise(*SHAPE, 4)), "webp", lossless=True),
    "tiff": encoded(RGB, "tiff"),
    "tiff lzw": encoded(RGB, "tiff", compression="tiff_lzw"),
    "tiff jpeg": encoded(RGB, "tiff", compression="jpeg"),
    "tiff gray": encoded(RGB.convert("L"), "tiff"),
    "tiff palette": encoded(RGB.quantize(64), "tiff"),
    "tiff of two": encoded(RGB, "tiff", save_all=True, append_images=[RGB.convert("L")]),
    "tiff 16 bits": encoded(Image.fromarray(GRAY16), "tiff"),
    "tiff 16 bits lzw": encoded(Image.fromarray(GRAY16), "tiff", compression="tiff_lzw"),
    "tiff 16 bits of colour": tiff(RGB16),
    "tiff float": encoded(Image.fromarray(noise(*SHAPE, high=4096, dtype=np.float32)), "tiff"),
    "png 16 bits": encoded(Image.fromarray(GRAY16), "png"),
    "png 16 bits of colour": tf.io.encode_png(RGB16).numpy(),
    "png with a text first": None,
    "jpeg with a profile": encoded(RGB, "jpeg", icc_profile=bytes(9000), exif=exif(1)),
    **{f"jpeg {i}": encoded(RGB, "jpeg", exif=exif(i)) for i in range(1, 10)},
    **{f"png {i}": encoded(RGB, "png", exif=exif(i)) for i in (1, 6)},
    **{f"webp {i}": encoded(RGB, "webp", exif=exif(i)) for i in (1, 6)},
    **{f"tiff {i}": encoded(RGB, "tiff", exif=exif(i)) for i in (1, 6)},
    "tiff 16 bits 6": encoded(Image.fromarray(GRAY16), "tiff", exif=exif(6)),
}
ENCODINGS["png with a text first"] = encoded(RGB, "png", dpi=(72, 72))


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("name", ENCODINGS)
def test_pixels_are_those_that_pillow_has_upright(name, turned, tmp_path):
    content, reading = ENCODINGS[name], Reading("0,4095", turned)
    expected = pixels.decoded(content, reading)
    path = tmp_path / "image"
    path.write_bytes(content)
    np.testing.assert_array_equal(pixels.decoded(str(path), reading), expected)
    assert pixels.size(str(path), reading) == pixels.size(content, reading) == expected.shape[:2]
    if turned:
        with Image.open(io.BytesIO(content)) as file:
            upright = ImageOps.exif_transpose(file)
            assert (upright.height, upright.width) == expected.shape[:2]
            if "16" not in name and "float" not in name:
                np.testing.assert_array_equal(np.asarray(upright.convert("RGB")), expected)
    elif "tiff" not in name:  # Pillow itself turns these
        assert expected.shape[:2] == SHAPE
    assert expected.std() > 20


def test_images_lie_in_a_room_until_it_is_cleared():
    """As many as it has place for; others, and those that Pillow decodes, have their own memory."""
    names = ["jpeg 1", "jpeg 6", "png 1", "jpeg 1", "jpeg 1"]
    expected = [pixels.decoded(ENCODINGS[name], Reading()) for name in names]
    room = pixels.Room(2 * expected[0].nbytes + 5)
    for _ in range(2):
        found = [pixels.decoded(ENCODINGS[name], Reading(), room=room) for name in names]
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)
        where = [np.shares_memory(image, room._all) for image in found]
        assert where == [True, False, False, True, False]
        assert not np.shares_memory(found[0], found[3])
        room.clear()
    half = pixels.decoded(ENCODINGS["jpeg 1"], Reading(), largest=max(SHAPE) // 2, room=room)
    expected_half = pixels.decoded(ENCODINGS["jpeg 1"], Reading(), largest=max(SHAPE) // 2)
    np.testing.assert_array_equal(half, expected_half)


@pytest.mark.parametrize("broken", [b"", b"II*\0", b"RIFF....WEBP", ENCODINGS["webp"][:200]])
def test_a_broken_image_is_broken_without_a_traceback(broken, capfd):
    assert pixels.decoded(broken, Reading()) is None
    assert pixels.size(broken, Reading()) is not None
    assert "Traceback" not in capfd.readouterr().err


# ----------------------------------------------------------------- more than 8 bits


@pytest.mark.parametrize(
    "content",
    [
        *(tiff(RGB16, order, packed) for order in "<>" for packed in (True, False)),
        tf.io.encode_png(RGB16).numpy(),
        tf.io.encode_png(np.concatenate([RGB16, RGB16[..., :1]], -1)).numpy(),
    ],
)
def test_colours_of_16_bits_are_read_in_full(content):
    np.testing.assert_array_equal(pixels.deep_values(content), RGB16)


def test_gray_of_16_bits_is_read_in_full():
    for content in (
        ENCODINGS["tiff 16 bits"],
        ENCODINGS["tiff 16 bits lzw"],
        ENCODINGS["png 16 bits"],
        tf.io.encode_png(np.stack([GRAY16, GRAY16[::-1]], -1)).numpy(),  # with alpha
    ):
        np.testing.assert_array_equal(pixels.deep_values(content)[..., 0], GRAY16)


def test_what_pillow_reads_wrongly_is_not_read():
    """Channels after each other in 16 bits."""
    for packed in (True, False):
        assert pixels.decoded(tiff(RGB16, packed=packed, planes=True), Reading()) is None


def test_the_rules():
    values = np.asarray([[0, 100, 4000, 4095]], np.uint16)[..., None]

    def gray(rule, values=values):
        image = pixels.to_uint8(values, rule)
        assert image.shape == (1, 4, 3) and (image == image[..., :1]).all()
        return image[0, :, 0].tolist()

    assert gray("full") == [0, 0, 15, 15]  # nearly black, as it was
    assert gray("0,4095") == [0, 6, 249, 255]
    assert gray("(100, 4000)") == [0, 0, 255, 255]
    brighter = values + np.uint16(500)
    assert gray("per_image", brighter) == gray("per_image") != gray("0,4095", brighter)
    hounsfield = values.astype(np.int32) - 1024
    assert gray("-1024,3071", hounsfield) == gray("0,4095")
    assert gray("0,1", values / np.float32(4095)) == gray("0,4095")
    assert gray("0,1", np.asarray([[[np.nan], [np.inf], [-np.inf], [1]]])) == [0, 255, 0, 255]
    with pytest.raises(ValueError, match="no full range"):
        pixels.to_uint8(hounsfield, "full")


@pytest.mark.parametrize("value", ["automatic", "5", "9,1", "1,1", "nan,1", "0,inf", "a,b", ""])
def test_another_rule_is_refused(value):
    config = byol.get_config("folder")
    check_values(config)
    config.data.intensity = value
    with pytest.raises(UserError, match=r"^config\.data\.intensity='.*': must be auto, .* 0,4095$"):
        check_values(config)


def microscope(root: pathlib.Path, count: int = 12, kind: str = "tif") -> np.ndarray:
    """Gray images of 12 bits, of which the later ones are brighter; 0, 1, ... are their names."""
    root.mkdir(parents=True, exist_ok=True)
    values = noise(count, 20, 24, high=300, dtype=np.uint16)
    values += (300 * np.arange(count, dtype=np.uint16))[:, None, None]
    for i, image in enumerate(values):
        Image.fromarray(image).save(root / f"{i}.{kind}")
    return values


@pytest.mark.parametrize("kind", ["tif", "png"])
def test_a_data_set_has_one_range_wherever_it_is_decoded(tmp_path, capsys, kind):
    values = microscope(tmp_path, kind=kind)
    seen = []
    for placement in ("device", "host"):
        inputs.announce._said.clear()
        config = tiny_runs.tiny_config(tmp_path, data__placement=placement, batch_size=12)
        config.data.image_size = config.data.test_resize = 20
        config.views["global"].area = config.views["global"].aspect = (1.0, 1.0)
        data = inputs.load_data(config)
        low, high = map(float, config.data.intensity.split(","))
        assert (low, high) == tuple(np.percentile(values, (0.1, 99.9), method="nearest"))
        said = capsys.readouterr().err
        assert f"{low:g} is black and {high:g} white" in said and said.count("\n") == 2
        images = {}
        for batch in inputs.eval_batches(config.data, data.train, 12)():
            images |= {
                pathlib.Path(n).stem: x for n, x in zip(batch["name"], batch["image"], strict=True)
            }
        seen.append(images)
    brightness = [seen[0][str(i)].mean() for i in range(12)]
    assert np.all(np.diff(brightness) > 10)  # images keep their order in brightness
    assert brightness[0] < 15 and brightness[-1] > 235
    for name, image in seen[0].items():
        np.testing.assert_array_equal(image, seen[1][name])


@pytest.mark.parametrize("deep", [True, False])
def test_a_large_data_set_has_one_range_too(tmp_path, deep):
    values = microscope(tmp_path, kind="png")
    files = sorted(tmp_path.glob("*.png"))
    if not deep:
        for path in files:
            Image.open(path).convert("L").save(path)

    def read(places):
        return [files[i].read_bytes() for i in places], np.zeros(len(places)), None

    source = Source("x", len(files), ("a", "b"), "encoded", np.arange(len(files)), read=read)
    low, high = np.percentile(values, (0.1, 99.9), method="nearest")
    assert intensity.of_data(source) == (f"{low:.6g},{high:.6g}" if deep else None)


def test_the_range_does_not_depend_on_the_order_or_on_images_of_8_bits(tmp_path):
    microscope(tmp_path)
    source = sources.load("folder", str(tmp_path), "train", FIELD)
    found = intensity.of_data(source)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "colour.png")
    mixed = sources.load("folder", str(tmp_path), "train", FIELD)
    assert intensity.of_data(mixed) == found
    array = decode.into_array(dataclasses.replace(mixed, reading=Reading(found)))
    colour = next(i for i in range(13) if mixed.describe(i).endswith("colour.png"))
    assert array.images[colour, 0, 0].tolist() == [255, 0, 0]


def test_pages_that_are_not_taken_are_told(tmp_path, capsys):
    tiny_runs.write_images(tmp_path, 0, 20)  # without classes none is held out
    inputs.load_data(tiny_runs.tiny_config(tmp_path))
    assert "pages or frames" not in capsys.readouterr().err
    page = Image.new("L", (8, 8))
    page.save(tmp_path / "stack.tif", save_all=True, append_images=[page, page])
    page.save(tmp_path / "one.tif")
    inputs.announce._said.clear()
    inputs.load_data(tiny_runs.tiny_config(tmp_path))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "pages or" in line]
    assert "1 of the 2 TIFF, GIF and WebP files looked at have several pages" in line


def test_without_deep_images_nothing_is_decided(tmp_path, capsys):
    tiny_runs.write_images(tmp_path, 2, 20)
    config = tiny_runs.tiny_config(tmp_path)
    inputs.load_data(config)
    assert config.data.intensity == "auto" and "black" not in capsys.readouterr().err
    # One that comes later is told once.
    pixels._warn_of_a_deep_image.cache_clear()
    logger = logging.getLogger("absl")
    records: list[logging.LogRecord] = []
    handler = types.SimpleNamespace(level=0, handle=records.append)
    logger.addHandler(handler)
    try:
        for _ in range(3):
            assert pixels.decoded(ENCODINGS["png 16 bits"], Reading()).max() == 15
    finally:
        logger.removeHandler(handler)
    assert len(records) == 1 and "config.data.intensity" in records[0].getMessage()


def test_a_job_reads_images_as_the_run_did():
    run = {
        "data": {
            **{"name": "folder", "dir": "a", "train_split": "train", "test_split": "test"},
            **{"image_size": 8, "test_resize": 8, "resize_method": "area"},
            **{"intensity": "112,1873", "exif_orientation": False},
        },
        "encoder": {},
        "views": {"mean": [0.5] * 3, "std": [0.1] * 3},
        "compute_dtype": "float32",
    }
    frozen = types.SimpleNamespace(config=run)
    for changes in ({}, {"dir": "another"}):
        config = embed.get_config()
        config.data.update(changes)
        data = runner.resolve_config(config, frozen).data
        assert (data.intensity, data.exif_orientation) == ("112,1873", False)
    config.data.intensity, config.data.exif_orientation = "per_image", True
    data = runner.resolve_config(config, frozen).data
    assert (data.intensity, data.exif_orientation) == ("per_image", True)


def test_packed_arrays_have_the_range_too(tmp_path, capsys):
    values = microscope(tmp_path / "images")
    options = ["--name=folder", f"--dir={tmp_path}/images"]
    assert pack.main([*options, f"--out={tmp_path}/a.npz"]) == 0
    assert "is black and" in capsys.readouterr().err
    images = np.load(tmp_path / "a.npz")["train_images"]
    assert images.max() == 255 and images.shape == (*values.shape, 3)
    assert pack.main([*options, f"--out={tmp_path}/b.npz", "--intensity=1"]) == 2
    assert capsys.readouterr().err.startswith("error: --intensity='1': must be auto, ")


def test_photographs_are_turned_in_folders_only(tmp_path):
    for i in range(4):
        RGB.save(tmp_path / f"{i}.jpg", exif=exif(6))
    for turned, shape in ((True, SHAPE[::-1]), (False, SHAPE)):
        config = tiny_runs.tiny_config(tmp_path, data__exif_orientation=turned, batch_size=4)
        assert inputs.load_data(config).train.shape == shape
    source = sources.load("folder", str(tmp_path), "train", FIELD)
    assert jax.tree.leaves(decode.into_array(source).images.shape[1:3]) == list(SHAPE[::-1])
