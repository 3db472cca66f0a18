"""Images in arrays: what is read of them, what is refused, and how splits are named."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import REPOSITORY, process_env

from selfsup_jax.data import source, sources
from selfsup_jax.errors import NoData, UserError

FIELD = "data.train_split"


def images(count: int, size: int = 6, first: int = 0) -> np.ndarray:
    """Of a single colour each, which is their number."""
    numbers = np.arange(first, first + count, dtype=np.uint8)[:, None, None, None]
    return np.tile(numbers, (1, size, size, 3))


GOOD = {
    "train_images": images(20),
    "train_labels": np.arange(20) % 4,
    "test_images": images(6, first=20),
    "test_labels": np.arange(6, dtype=np.uint8) % 2,
}
NAMES = {"class_names": np.asarray(["ant", "bee", "cat", "dog"])}


def write(path: pathlib.Path, stored: dict[str, np.ndarray]) -> str:
    """A `.npz` file, or a folder of `.npy` files."""
    if path.suffix == ".npz":
        np.savez(path, **stored)
    else:
        path.mkdir()
        for name, array in stored.items():
            np.save(path / f"{name}.npy", array)
    return str(path)


@pytest.fixture(params=["data.npz", "data"])
def where(request, tmp_path) -> pathlib.Path:
    """Either form of the same arrays."""
    return tmp_path / request.param


def load(path: str, split: str = "train") -> source.Source:
    return sources.load("arrays", path, split, FIELD)


# -------------------------------------------------------------------------------- reading


def test_arrays_are_a_data_set(where):
    path = write(where, GOOD | NAMES)
    train, test = load(path), load(path, "test")
    assert train.class_names == test.class_names == ("ant", "bee", "cat", "dog")
    for part, name in ((train, "train"), (test, "test")):
        assert part.kind == "array" and part.shape == (6, 6) and part.sizes is None
        assert part.images.dtype == np.uint8 and part.labels.dtype == np.int32
        np.testing.assert_array_equal(part.images, GOOD[f"{name}_images"])
        np.testing.assert_array_equal(part.labels, GOOD[f"{name}_labels"])
    assert sources.choose_splits("arrays", path) == ("train", "test")
    assert sorted(sources.split_names("arrays", path)) == ["test", "train"]
    assert train.describe(7) == "train_images[7]"


def test_slices_and_sums_are_those_rows(where):
    path = write(where, GOOD)
    for split, expected in (
        ("train[5:8]", [5, 6, 7]),
        ("train[90%:]", [18, 19]),
        ("train[-2:]+test[1:3]", [18, 19, 21, 22]),
        ("test+train[:1]", [20, 21, 22, 23, 24, 25, 0]),
        ("train[:0]+test[:1]", [20]),
    ):
        part = load(path, split)
        assert part.images[:, 0, 0, 0].tolist() == expected and part.num_examples == len(expected)
        labels = [i % 4 if i < 20 else (i - 20) % 2 for i in expected]
        assert part.labels.tolist() == labels
        for i, number in enumerate(expected):
            name = f"train_images[{number}]" if number < 20 else f"test_images[{number - 20}]"
            assert part.describe(i) == name


def test_a_file_of_arrays_is_not_read_until_it_is_needed(tmp_path):
    """Else a folder that is larger than the memory could not be used."""
    path = write(tmp_path / "data", GOOD)
    for split in ("train", "train[3:9]"):
        part = load(path, split)
        assert isinstance(part.images, np.memmap)
        assert not part.images.flags.owndata and not part.images.flags.writeable


def test_a_file_is_read_once_for_all_its_splits(tmp_path, monkeypatch):
    path = write(tmp_path / "data.npz", GOOD)
    read = []
    load_file = np.load
    monkeypatch.setattr(np, "load", lambda *args, **kw: read.append(args) or load_file(*args, **kw))
    assert sources.choose_splits("arrays", path) == ("train", "test")
    assert load(path).num_examples + load(path, "test").num_examples == 26
    assert len(read) == 1


def test_without_test_arrays_a_part_of_train_is_held_out(where):
    path = write(where, {"train_images": images(20)})
    assert sources.choose_splits("arrays", path) == ("train[:90%]", "train[90%:]")
    part = load(path, "train[90%:]")
    assert part.class_names is None and part.labels is None and part.num_examples == 2


def test_labels_that_tell_nothing_are_not_used(where):
    part = load(write(where, {"train_images": images(4), "train_labels": np.zeros(4, int)}))
    assert part.class_names is None and part.labels is None


def test_a_split_without_labels_takes_none_from_the_others(where):
    """As STL-10's unlabelled images."""
    stored = {"train_images": images(4), "train_labels": np.arange(4), "more_images": images(2)}
    path = write(where, stored)
    assert load(path).num_classes == 4
    for split in ("more", "train+more"):
        part = load(path, split)
        assert part.class_names is None and part.labels is None


def test_a_class_may_be_missing_in_a_split(where):
    """Its names are those of all splits; without names, its numbers."""
    stored = GOOD | {"train_labels": np.arange(20) % 2, "test_labels": np.full(6, 2)}
    assert load(write(where, stored)).class_names == ("0", "1", "2")


def test_the_home_folder_has_its_short_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data.npz", GOOD)
    assert load("~/data.npz").num_examples == 20


# ------------------------------------------------------------------------------- refusing

BAD = {
    "no images": ({"images": images(4)}, "no train_images; it has images"),
    "nothing": ({}, "no train_images; it has nothing"),
    "floats": ({"train_images": images(4) / 255}, "train_images is float64 [4, 6, 6, 3], must be"),
    "gray": ({"train_images": images(4)[..., 0]}, "train_images is uint8 [4, 6, 6], must be"),
    "channels first": ({"train_images": images(4).transpose(0, 3, 1, 2)}, "[4, 3, 6, 6], must be"),
    "no rows": ({"train_images": images(0)}, "[0, 6, 6, 3], must be"),
    "too few labels": (
        {"train_images": images(4), "train_labels": np.arange(3)},
        "train_labels is int64 [3], must be integers [4]",
    ),
    "hot labels": (
        {"train_images": images(4), "train_labels": np.eye(4, dtype=int)},
        "train_labels is int64 [4, 4], must be integers [4]",
    ),
    "float labels": (
        {"train_images": images(4), "train_labels": np.arange(4.0)},
        "train_labels is float64 [4], must be integers [4]",
    ),
    "negative labels": (
        {"train_images": images(4), "train_labels": np.asarray([0, 1, -1, 2])},
        "must be from 0 on",
    ),
    "labels alone": (
        {"train_images": images(4), "test_labels": np.arange(4)},
        "test_labels is int64 [4], must be integers [0]",
    ),
    "few names": (GOOD | {"class_names": np.asarray(["a", "b"])}, "class_names has 2 names, not 4"),
    "a bad test split": (GOOD | {"test_images": images(6) / 1.0}, "test_images is float64"),
    "objects": ({"train_images": np.asarray([images(1), "a"], object)}, "cannot be read: "),
}


@pytest.mark.parametrize("name", BAD)
def test_other_arrays_are_refused(where, name):
    stored, hint = BAD[name]
    path = write(where, stored)
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert message.startswith("config.data.dir") and hint in message and "\n" not in message


@pytest.mark.parametrize("size", [0, 10, 0.5])
def test_a_damaged_file_is_named(where, size):
    path = write(where, GOOD)
    file = where / "train_images.npy" if where.is_dir() else where
    os.truncate(file, int(size * file.stat().st_size) if isinstance(size, float) else size)
    with pytest.raises(NoData) as error:
        load(path)
    message = str(error.value)
    assert message.startswith(f"config.data.dir={path!r}: cannot be read: ")
    assert "\n" not in message


def test_a_missing_file_is_named(tmp_path):
    for path in (str(tmp_path / "no.npz"), str(tmp_path / "no"), ""):
        with pytest.raises(NoData) as error:
            load(path)
        assert str(error.value).startswith(f"config.data.dir={path!r}: ")
        assert "\n" not in str(error.value)
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", images(3))
    for name in ("text.npz", "one.npy"):
        with pytest.raises(NoData, match=r"^config\.data\.dir=.*: cannot be read"):
            load(str(tmp_path / name))


def test_splits_of_different_sizes_are_not_joined(where):
    path = write(where, GOOD | {"test_images": images(6, size=8)})
    assert load(path, "test").shape == (8, 8)
    with pytest.raises(UserError) as error:
        load(path, "train+test")
    assert str(error.value).startswith("config.data.train_split='train+test': ")


@pytest.mark.parametrize("split", ["tran", "train[:0]", "train[:21]", "validation"])
def test_a_wrong_split_of_arrays_is_named(where, split):
    path = write(where, GOOD)
    with pytest.raises(UserError) as error:
        load(path, split)
    assert str(error.value).startswith(f"config.data.train_split={split!r}: ")
    assert "test" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_on_other_arrays_ends_with_one_line(tmp_path):
    """As every mistake of a user's: with status 2, and without a traceback."""
    path = write(tmp_path / "data.npz", BAD["floats"][0])
    command = [
        *(sys.executable, "run_experiment.py", "--config=configs/byol.py:demo"),
        *(f"--workdir={tmp_path / 'run'}", "--config.data.name=arrays", "--compilation_cache="),
        f"--config.data.dir={path}",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=process_env(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: config.data.dir=") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------- the splits' syntax

LENGTHS = {"train": 37, "test": 10, "large": 10_001}


def of_tfds(split: str) -> list[int] | None:
    """The rows that TFDS reads, each with its split's first letter; None if it refuses."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[length], num_bytes=0)
        for name, length in LENGTHS.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
    except (ValueError, AssertionError, KeyError):
        return None
    rows = [
        (part.splitname, i)
        for part in parts
        for i in range(LENGTHS[part.splitname])[part.from_ : part.to]
    ]
    return rows or None


def ours(split: str) -> list[int] | None:
    try:
        parts = source.split_indices(split, LENGTHS, FIELD)
    except UserError as e:
        assert str(e).startswith(f"config.{FIELD}={split!r}: ") and "\n" not in str(e)
        assert "splits: train, test, large" in str(e)
        return None
    return [(name, i) for name, indices in parts for i in indices.tolist()]


def test_splits_are_read_as_tfds_reads_them():
    """Of names, slices and sums drawn at random, with bounds inside and outside."""
    rng = np.random.default_rng(0)

    def bound() -> str:
        kind = rng.integers(5)
        if kind == 0:
            return ""
        if kind == 1:
            return str(rng.integers(-40, 41))
        if kind == 2:
            return f"{rng.integers(-12, 13)}"
        return f"{rng.integers(-105, 106)}%" if kind == 3 else f"{rng.uniform(-100, 100):.1f}%"

    def part() -> str:
        name = str(rng.choice([*LENGTHS, "train", "other"], p=[0.3, 0.3, 0.3, 0.05, 0.05]))
        if rng.random() < 0.2:
            return name
        start, stop = bound(), bound()
        return f"{name}[{start}:{stop}]" if start or stop else name

    accepted = 0
    for _ in range(1500):
        split = str(rng.choice(["+", " + "])).join(part() for _ in range(rng.integers(1, 4)))
        expected = of_tfds(split)
        assert ours(split) == expected, split
        accepted += expected is not None
    assert 400 < accepted < 1350


@pytest.mark.parametrize(
    "split",
    [
        *("", "+", "train+", "+train", "train[", "train[]", "train[1]", "train[1:2", "train[a:b]"),
        *("train[1:2:3]", "train[:1e1]", "train[:5.5]", "train[:--5]", "train[:5%%]", "train [:5]"),
        *("tráin", "train/test", "train,test", "train[: 5]", "train[:5%]test", "train[:38]"),
        *("train[-38:]", "train[:101%]", "train[:-101%]", "train[5:5]", "train[9:3]", "test[:4%]"),
    ],
)
def test_what_tfds_refuses_is_refused(split):
    assert of_tfds(split) is None and ours(split) is None
