"""Images that are damaged or of a rare kind, in every kind of data set, cropped by either side."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import logging

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from selfsup_jax.data import crops, decode, pipeline, pixels, resident, sources
from selfsup_jax.data.batches import Undecodable

SPECS = (crops.CropSpec(size=8), crops.CropSpec(size=4, area=(0.05, 0.3)))
BATCH, COUNT = 8, 24


def saved(mode: str, colour, size=(40, 30), kind="jpeg") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, kind, quality=95)
    return stream.getvalue()


def noise() -> bytes:
    stream = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(values).save(stream, "jpeg", quality=95)
    return stream.getvalue()


# Name -> (content, the one colour that all of it has; None if it cannot be decoded).
ODD = {
    "truncated.jpg": (noise()[:-400], None),
    "truncated.png": (saved("RGB", (9, 9, 9), kind="png")[:60], None),
    "no_bytes.jpg": (b"", None),
    "text.jpg": (b"<html>404 Not Found</html>", None),
    "cmyk.jpg": (saved("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "gray.jpg": (saved("L", 90), (90, 90, 90)),
    "bits_16.png": (saved("I;16", 90 * 256 + 7, kind="png"), (90, 90, 90)),
    "one_row.jpg": (saved("RGB", (80, 120, 40), size=(40, 1)), (80, 120, 40)),
    "one_column.png": (saved("RGB", (80, 20, 40), size=(1, 40), kind="png"), (80, 20, 40)),
    "one_pixel.png": (saved("RGB", (8, 20, 40), size=(1, 1), kind="png"), (8, 20, 40)),
    "a_png.JPEG": (saved("RGB", (10, 200, 60), kind="png"), (10, 200, 60)),
    "palette.png": (saved("P", 0, kind="png"), (0, 0, 0)),
    "transparent.png": (saved("RGBA", (10, 100, 60, 80), kind="png"), (10, 100, 60)),
}
PLAIN = {f"{i}.jpg": (saved("RGB", (200, 8 * i, 9)), (200, 8 * i, 9)) for i in range(11)}
CONTENT = ODD | PLAIN
BROKEN = {name for name, (_, colour) in CONTENT.items() if colour is None}


class TinyOdds(tfds.core.GeneratorBasedBuilder):
    """The images above, as they are."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3))}
        features["file_name"] = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), homepage="http://localhost"
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for name, (content, _) in CONTENT.items():
            yield name, {"image": io.BytesIO(content), "file_name": name}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory):
    """`source_of(kind)`: the split from every kind of files."""
    root = tmp_path_factory.mktemp("odd")
    (root / "folder").mkdir()
    for name, (content, _) in CONTENT.items():
        (root / "folder" / name).write_bytes(content)
    for kind in ("tfrecord", "array_record"):
        TinyOdds(data_dir=str(root / kind), file_format=kind).download_and_prepare()

    @functools.cache
    def source(kind: str) -> sources.Source:
        if kind == "array":
            return decode.into_array(source("folder"))
        load = functools.partial(sources.load, split="train", field="data.train_split")
        large, _, ending = kind.rpartition(" ")
        if ending == "folder":
            found = load("folder", str(root / "folder"))
        else:
            options = {"cache_gib": 0.0} if large else {}
            found = load("tiny_odds", str(root / ending), **options)
        return dataclasses.replace(found, reading=pixels.Reading("full"))

    return source


_crop = jax.jit(functools.partial(resident.crop_batch, specs=SPECS, seed=0))


def batches(source: sources.Source, canvas: int, undecodable: Undecodable) -> list[dict]:
    options = {
        "seed": 0,
        "batch_size": BATCH,
        "positions": np.arange(BATCH, dtype=np.int32),
        "first_step": 0,
        "undecodable": undecodable,
    }
    if source.kind == "array":
        rows = resident.train_batches(source, with_images=True, **options)
    else:
        rows = pipeline.train_batches(source, SPECS, canvas=canvas, **options)
    made = []
    for step, batch in enumerate(itertools.islice(rows, 2 * COUNT // BATCH)):
        if "image" in batch:
            names = {name: batch.pop(name) for name in ("name", "row") if name in batch}
            batch = {k: np.asarray(v) for k, v in _crop(None, np.int32(step), batch).items()}
            batch |= names
        made.append(batch)
    return made


KINDS = ("folder", "array", "tfrecord", "large tfrecord", "array_record", "large array_record")


@pytest.mark.slow
@pytest.mark.parametrize("crop_on", ["host", "device"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_read_as_it_should_be_or_told(source_of, kind, crop_on, caplog):
    """Over two epochs; the place of a broken image is filled, and the line is one for each."""
    if (kind, crop_on) == ("array", "host"):
        pytest.skip("an array is cropped by the step")
    source, undecodable = source_of(kind), Undecodable(COUNT, 0.2)
    assert source.num_examples == COUNT
    with caplog.at_level(logging.WARNING, logger="absl"):
        made = batches(source, 64 * (crop_on == "device"), undecodable)
    assert {name.rpartition("/")[2] for name in undecodable.names} == BROKEN
    lines = [line for line in caplog.text.splitlines() if "cannot decode" in line]
    for name in BROKEN:
        assert sum(name in line for line in lines) == 1
    seen = set()
    for batch in made:
        for i, path in enumerate(batch["name"]):
            name = path.rpartition("/")[2]
            seen.add(name)
            for number, spec in enumerate(SPECS, start=1):
                view = batch[f"view_{number}"]
                assert view.shape == (BATCH, spec.size, spec.size, 3)
                difference = np.abs(view[i].astype(int) - CONTENT[name][1]).max()
                assert difference <= 3, (name, view[i, 0, 0])
    assert seen == set(CONTENT) - BROKEN


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "array"])
def test_an_evaluation_leaves_the_broken_ones_out(source_of, kind):
    source, undecodable = source_of(kind), Undecodable(COUNT, 0.2)
    options = {"resize": 8, "size": 8, "method": "bicubic", "undecodable": undecodable}
    made = list(pipeline.eval_batches(source, batch_size=7, limit=COUNT, **options))
    names = [path.rpartition("/")[2] for batch in made for path in batch["name"]]
    assert sorted(names) == sorted(set(CONTENT) - BROKEN)
    for name, image in zip(names, np.concatenate([b["image"] for b in made]), strict=True):
        assert np.abs(image.astype(int) - CONTENT[name][1]).max() <= 3, name
    assert {name.rpartition("/")[2] for name in undecodable.names} == BROKEN


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_damaged_record_is_a_broken_image(source_of, kind):
    """Its bytes have changed since they were written."""
    source = source_of(f"large {kind}")

    def damaged(places):
        records = source.read.fetch(places)
        return [b"\xff" * 50 if b"one_row.jpg" in record else record for record in records]

    read = dataclasses.replace(source.read, fetch=damaged)
    undecodable = Undecodable(COUNT, 0.3)
    for batch in batches(dataclasses.replace(source, read=read), 0, undecodable):
        assert "one_row.jpg" not in batch["name"]
    assert len(undecodable.names) == len(BROKEN) + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_records_whose_file_is_gone_are_broken_images(source_of, kind):
    source = source_of(f"large {kind}")
    if kind == "tfrecord":
        fetch = dataclasses.replace(source.read.fetch, paths=("/no/such/file",))
    else:
        fetch = type(source.read.fetch)([])  # which raises for any row
    images, labels, names = dataclasses.replace(source.read, fetch=fetch)(source.images[:2])
    assert images == [b"", b""] and len(labels) == 2 and len(set(names)) == 2


def test_a_file_that_is_gone_is_a_broken_image(source_of, tmp_path):
    source = source_of("folder")
    images = source.images.astype(object)
    images[3] = str(tmp_path / "gone.jpg")
    undecodable = Undecodable(COUNT, 0.3)
    gone = dataclasses.replace(source, images=images, describe=lambda i: str(images[i]))
    batches(gone, 0, undecodable)
    assert str(tmp_path / "gone.jpg") in undecodable.names
