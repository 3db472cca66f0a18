"""Packing data sets into arrays: they hold, and train, what the data set does."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_runs
from conftest import REPOSITORY, assert_same, process_env
from PIL import Image

from selfsup_jax.data import decode, inputs, pack, sources

FIELD = "data.train_split"


class TinyCifar(tfds.core.GeneratorBasedBuilder):
    """As CIFAR-10, but of 60 and 12 images of 8 px in 3 classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["cat", "dog", "frog"])
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": label}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), homepage="http://localhost"
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(60), "test": self._generate_examples(12)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(count)
        for i in range(count):
            pixels = rng.integers(0, 100, (8, 8, 3)) + 70 * (i % 3)
            yield i, {"image": pixels.astype(np.uint8), "label": i % 3}


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("tfds"))
    TinyCifar(data_dir=directory).download_and_prepare()
    return directory


def run_pack(**options) -> int:
    return pack.main([f"--{name}={value}" for name, value in options.items()])


def refused(capsys, **options) -> str:
    """The one line with which it ends."""
    capsys.readouterr()
    assert run_pack(**options) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    return told.removeprefix("error: ").rstrip("\n")


def write_folder(root: pathlib.Path, sizes: list[tuple[int, int]], classes: int = 2) -> str:
    for i, (height, width) in enumerate(sizes):
        parent = root / f"class_{i % classes}"
        parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        pixels = rng.integers(0, 60, (height, width, 3)) + 10 * i
        Image.fromarray(pixels.astype(np.uint8)).save(parent / f"{i:02}.png")
    return str(root)


@pytest.mark.slow
def test_packed_tfds_holds_the_same_examples(tiny_cifar, tmp_path):
    for out in ("packed.npz", "packed/"):  # a folder's name may end with a slash
        assert run_pack(name="tiny_cifar", dir=tiny_cifar, out=f"{tmp_path}/{out}") == 0
        path = f"{tmp_path}/{out}"
        assert sources.choose_splits("arrays", path) == ("train", "test")
        for split in ("train", "test", "train[25%:]"):
            packed = sources.load("arrays", path, split, FIELD)
            original = sources.load("tiny_cifar", tiny_cifar, split, FIELD)
            assert packed.class_names == original.class_names == ("cat", "dog", "frog")
            assert packed.shape == original.shape == (8, 8)
            np.testing.assert_array_equal(packed.images, decode.into_array(original).images)
            np.testing.assert_array_equal(packed.labels, original.labels)
    files = sorted(path.name for path in (tmp_path / "packed").iterdir())
    expected = ["class_names", "test_images", "test_labels", "train_images", "train_labels"]
    assert files == [f"{name}.npy" for name in expected]


@pytest.mark.slow
def test_packed_arrays_train_as_the_data_set_does(tiny_cifar, tmp_path):
    """Views, labels and places bit by bit, for two epochs; and what the probes are given."""
    out = str(tmp_path / "packed.npz")
    assert run_pack(name="tiny_cifar", dir=tiny_cifar, out=out) == 0
    trained, evaluated = [], []
    for name, directory in (("tiny_cifar", tiny_cifar), ("arrays", out)):
        config = tiny_runs.tiny_config(directory, data__name=name, eval__enabled=True)
        config.data.train_split = config.data.test_split = ""
        data = inputs.load_data(config)
        feed = inputs.feed(config, data.train)
        crop = jax.jit(feed.views)
        rows = itertools.islice(inputs.train_batches(config, data, 0), 6)
        rows = [{k: v for k, v in batch.items() if k != "name"} for batch in rows]
        trained.append([crop(feed.arrays, np.int32(step), row) for step, row in enumerate(rows)])
        batches = inputs.eval_batches(config.data, data.test, 5)()
        evaluated.append([{k: batch[k] for k in ("image", "label")} for batch in batches])
    assert "label" in trained[0][0] and sum(len(b["label"]) for b in evaluated[0]) == 12
    assert_same(*trained)
    assert_same(*evaluated)


def test_a_folder_is_resized_and_cropped(tmp_path, capsys):
    """With a broken image left out, as in training."""
    folder = write_folder(tmp_path / "images", [(20, 30), (16, 16), (31, 17), (12, 18), (8, 8)])
    names = [f"class_1/broken_{i}.jpg" for i in range(20)]
    first = min(names, key=lambda name: hashlib.md5(name.encode()).digest())  # as folders' order
    broken = tmp_path / "images" / first
    broken.write_bytes(b"no image")
    assert run_pack(name="folder", dir=folder, out=f"{tmp_path}/a.npz", size=12) == 0
    told = capsys.readouterr()
    assert str(broken) in told.err + told.out
    with np.load(tmp_path / "a.npz") as packed:
        stored = dict(packed)
    assert stored["train_images"].shape == (5, 12, 12, 3)
    assert stored["train_images"].dtype == np.uint8
    source = sources.load("folder", folder, "train", FIELD)
    kept = [i for i in range(6) if source.describe(i) != str(broken)]
    assert source.labels[kept].tolist() != source.labels[:5].tolist()
    np.testing.assert_array_equal(stored["train_labels"], source.labels[kept])
    assert stored["class_names"].tolist() == list(source.class_names)
    for image, i in zip(stored["train_images"], kept, strict=True):
        with Image.open(source.describe(i)) as file:
            height, width = file.height, file.width
            scale = 12 / min(height, width)
            size = (round(width * scale), round(height * scale))
            resized = np.asarray(file.resize(size, Image.Resampling.BICUBIC), int)
        top, left = (size[1] - 12) // 2, (size[0] - 12) // 2
        expected = resized[top : top + 12, left : left + 12]
        assert np.abs(image - expected).max() <= 1


def test_images_of_one_size_stay_as_they_are(tmp_path):
    folder = write_folder(tmp_path / "images", [(9, 7)] * 6)
    assert run_pack(name="folder", dir=folder, out=f"{tmp_path}/a.npz") == 0
    packed = sources.load("arrays", f"{tmp_path}/a.npz", "train", FIELD)
    original = sources.load("folder", folder, "train", FIELD)
    np.testing.assert_array_equal(packed.images, decode.into_array(original).images)
    # Beside a larger one that can't be decoded: its size, which its header tells, is no one's.
    whole = pathlib.Path(write_folder(tmp_path / "large", [(50, 60)])) / "class_0" / "00.png"
    (pathlib.Path(folder) / "class_0" / "x.png").write_bytes(whole.read_bytes()[:60])
    assert run_pack(name="folder", dir=folder, out=f"{tmp_path}/b.npz") == 0
    part = sources.load("arrays", f"{tmp_path}/b.npz", "train", FIELD)
    assert part.images.shape == (6, 9, 7, 3)
    assert {image.tobytes() for image in part.images} == {x.tobytes() for x in packed.images}


def test_only_the_splits_that_are_asked_for(tiny_cifar, tmp_path):
    out = str(tmp_path / "part.npz")
    assert run_pack(name="tiny_cifar", dir=tiny_cifar, out=out, splits="test") == 0
    assert sources.split_names("arrays", out) == ["test"]


def test_what_a_killed_process_left_is_no_part_of_it(tmp_path):
    folder = write_folder(tmp_path / "images", [(8, 8)] * 4)
    (tmp_path / "out.partial").mkdir()
    np.save(tmp_path / "out.partial" / "old_images.npy", np.zeros((1, 2, 2, 3), np.uint8))
    assert run_pack(name="folder", dir=folder, out=f"{tmp_path}/out") == 0
    assert sources.split_names("arrays", f"{tmp_path}/out") == ["train"]
    assert not (tmp_path / "out.partial").exists()


def test_mistakes_are_told_in_one_line(tiny_cifar, tmp_path, capsys):
    folder = write_folder(tmp_path / "images", [(8, 8), (9, 8)])
    good = {"name": "folder", "dir": folder, "out": f"{tmp_path}/a.npz"}
    told = refused(capsys, **good)
    assert folder in told and "--size" in told
    for changes, hint in (
        ({"size": -1}, "--size=-1: must not be negative"),
        ({"splits": "train,tset", "size": 8}, "--splits=train,tset: must be some of train"),
        ({"splits": "train[:1]", "size": 8}, "--splits=train[:1]: must be some of train"),
        ({"dir": f"{tmp_path}/nowhere"}, f"config.data.dir='{tmp_path}/nowhere'"),
        ({"name": "fodler"}, "config.data.name='fodler'"),
        ({"out": f"{tmp_path}/nowhere/a.npz", "size": 8}, f"{tmp_path}/nowhere/a.npz: cannot be"),
    ):
        assert refused(capsys, **(good | changes)).startswith(hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize("out", ["a.npz", "a"])
def test_nothing_is_overwritten(tmp_path, capsys, out):
    folder = write_folder(tmp_path / "images", [(8, 8)] * 4)
    options = {"name": "folder", "dir": folder, "out": str(tmp_path / out)}
    assert run_pack(**options) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert refused(capsys, **options) == f"--out={tmp_path / out}: exists already"
    if out == "a":
        refused(capsys, **options | {"out": f"{tmp_path / out}/"})
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_folder_of_broken_images_is_told(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"no image")
    assert run_pack(name="folder", dir=f"{tmp_path}/images", out=f"{tmp_path}/a.npz") == 2
    *broken, told = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ") and "no image can be decoded" in told
    assert len(broken) == 1 and "0.png" in broken[0]


@pytest.mark.slow
def test_the_command_line(tmp_path):
    """As the module's description has it: exit status, and the line that says how to go on."""
    folder = write_folder(tmp_path / "images", [(8, 8)] * 4)
    command = [sys.executable, "-m", "selfsup_jax.data.pack", "--name=folder", f"--dir={folder}"]
    for status, said in ((0, f"--config.data.dir={tmp_path}/a.npz"), (2, "exists already")):
        done = subprocess.run(
            [*command, f"--out={tmp_path}/a.npz"],
            **{"cwd": REPOSITORY, "env": process_env(), "timeout": 300},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status and said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
