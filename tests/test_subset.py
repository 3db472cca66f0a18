"""Parts of a split, and images of several classes, from every kind of source."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from selfsup_jax.data import crops, decode, pipeline, resident, sources
from selfsup_jax.data.batches import Undecodable

FIELD = "data.train_split"
COUNT = 23
NAMES = ["red", "green", "blue"]
LARGE = {"cache_gib": 0.0}


def info(builder, **labels):
    features = {"image": tfds.features.Image(shape=(None, None, 3)), **labels}
    return tfds.core.DatasetInfo(
        builder=builder, features=tfds.features.FeaturesDict(features), homepage="http://localhost"
    )


def image(number: int) -> np.ndarray:
    return np.full((8, 8, 3), 10 * number, np.uint8)


def hot(number: int) -> list[int]:
    """The classes of an image: none, one or several, each by a rule of its own."""
    return [c for c in range(3) if number % (c + 2) == 0]


class TinyMarks(tfds.core.GeneratorBasedBuilder):
    """23 images of a single colour each; label = number mod 3."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return info(self, label=tfds.features.ClassLabel(names=NAMES))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            yield i, {"image": image(i), "label": i % 3}


class TinyScenes(TinyMarks):
    """The same images, each of any number of classes, one of them named twice."""

    def _info(self):
        return info(self, labels=tfds.features.Sequence(tfds.features.ClassLabel(names=NAMES)))

    def _generate_examples(self):
        for i in range(COUNT):
            yield i, {"image": image(i), "labels": hot(i) + hot(i)[:1]}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("tfds"))
    for builder in (TinyMarks, TinyScenes):
        shards = tfds.download.DownloadConfig(num_shards=3)
        builder(data_dir=directory).download_and_prepare(download_config=shards)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("folder")
    for i in range(COUNT):
        path = root / f"class_{i % 3}" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image(i)).save(path)
    return str(root)


@pytest.fixture(scope="module")
def source_of(tfds_dir, folder):
    """`kind -> source` of the same images, in whatever order the kind has."""

    def load(kind: str) -> sources.Source:
        if kind == "array":
            return sources.Source(
                name="array",
                num_examples=COUNT,
                class_names=tuple(NAMES),
                kind="array",
                images=np.stack([image(i) for i in range(COUNT)]),
                labels=np.arange(COUNT, dtype=np.int32) % 3,
                describe=lambda i: f"image {i}",
            )
        if kind in ("path", "decoded"):
            source = sources.load("folder", folder, "train", FIELD)
            return decode.into_array(source) if kind == "decoded" else source
        options = LARGE if kind == "large" else {}
        return sources.load("tiny_marks", tfds_dir, "train", FIELD, **options)

    return load


def evaluated(source: sources.Source) -> dict[str, np.ndarray]:
    """Every image in the source's order: its number, label and name."""
    undecodable = Undecodable(source.num_examples, 0.0)
    found = (resident if source.kind == "array" else pipeline).eval_batches(
        source,
        resize=8,
        size=8,
        method="bicubic",
        batch_size=5,
        limit=10**6,
        undecodable=undecodable,
    )
    joined = [np.concatenate(column) for column in zip(*map(dict.values, found), strict=True)]
    batch = dict(zip(("image", "label", "name"), joined, strict=True))
    return batch | {"image": batch["image"][:, 0, 0, 0].astype(int) // 10}


def trained(source: sources.Source, batch_size: int, count: int, num_views: int = 2) -> list[dict]:
    stream = pipeline.train_batches(
        source,
        [crops.CropSpec(size=4)] * num_views,
        seed=0,
        batch_size=batch_size,
        positions=np.arange(batch_size, dtype=np.int32),
        first_step=0,
        undecodable=Undecodable(source.num_examples, 0.0),
    )
    return list(itertools.islice(stream, count))


# -------------------------------------------------------------------------------- subset


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array", "decoded", "path", "encoded", "large"])
@pytest.mark.parametrize("numbers", [[2, 3, 11, 20, 22], [20, 3, 22, 2]], ids=str)
def test_a_subset_is_the_examples_that_were_chosen(source_of, kind, numbers):
    """Image, label and name of each, in the order of the choice."""
    whole = source_of(kind)
    assert whole.scanned == (kind != "large")
    everything = evaluated(whole)
    assert sorted(everything["image"]) == list(range(COUNT))
    np.testing.assert_array_equal(everything["label"], everything["image"] % 3)
    asked = []

    def choose(labels, names):
        asked.append((list(labels), list(names)))
        return np.asarray(numbers)

    part = sources.subset(whole, choose)
    assert asked == [(list(everything["label"]), list(everything["name"]))]
    assert part.num_examples == len(numbers)
    assert part.class_names == whole.class_names and part.images.shape[0] == len(numbers)
    assert part.labels.dtype == np.int32
    found = evaluated(part)
    for key in found:
        np.testing.assert_array_equal(found[key], everything[key][numbers], err_msg=key)
    np.testing.assert_array_equal(part.labels, everything["label"][numbers])
    # The whole is as it was.
    np.testing.assert_array_equal(evaluated(whole)["name"], everything["name"])


@pytest.mark.slow
def test_a_large_split_gives_what_a_small_one_does(source_of):
    """The same batches of the same crops: what is read at the start is no matter of results."""
    by_label = lambda labels, names: np.flatnonzero(labels != 1)  # noqa: E731
    parts = [sources.subset(source_of(kind), by_label) for kind in ("encoded", "large")]
    assert parts[0].num_examples == sum(i % 3 != 1 for i in range(COUNT))
    for a, b in zip(*(trained(part, 4, 5) for part in parts), strict=True):
        assert a.keys() == b.keys() == {"view_1", "view_2", "index", "label", "name"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        np.testing.assert_array_equal(a["label"], a["view_1"][:, 0, 0, 0] // 10 % 3)
        assert 1 not in a["label"]


def test_a_subset_of_a_subset(source_of):
    part = sources.subset(source_of("large"), lambda labels, names: np.arange(5, 20))
    part = sources.subset(part, lambda labels, names: np.asarray([0, 14]))
    everything, found = evaluated(source_of("encoded")), evaluated(part)
    for key in found:
        np.testing.assert_array_equal(found[key], everything[key][[5, 19]], err_msg=key)


def test_one_view_is_the_first_of_two(source_of):
    for one, two in zip(
        trained(source_of("path"), 8, 3, num_views=1), trained(source_of("path"), 8, 3), strict=True
    ):
        assert one.keys() == two.keys() - {"view_2"}
        for key in one:
            np.testing.assert_array_equal(one[key], two[key], err_msg=key)


# ------------------------------------------------------------------------ several labels


def scenes(tfds_dir, **options):
    return sources.load("tiny_scenes", tfds_dir, "train", FIELD, **options)


@pytest.mark.parametrize("options", [{}, LARGE], ids=["small", "large"])
def test_several_labels_are_rows_of_zeros_and_ones(tfds_dir, options):
    """A class that is named twice counts once; an image of none is a row of zeros."""
    source = scenes(tfds_dir, several_labels=True, **options)
    assert source.class_names == tuple(NAMES) and source.num_classes == 3
    everything = evaluated(source)
    expected = np.asarray([[c in hot(i) for c in range(3)] for i in everything["image"]])
    assert everything["label"].shape == (COUNT, 3) and everything["label"].dtype == np.int32
    np.testing.assert_array_equal(everything["label"], expected)
    assert {0, 1, 3} <= set(expected.sum(axis=1))
    part = evaluated(sources.subset(source, lambda labels, _: np.flatnonzero(labels[:, 2])))
    kept = expected[:, 2].astype(bool)
    for key in part:
        np.testing.assert_array_equal(part[key], everything[key][kept], err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LARGE], ids=["small", "large"])
def test_where_they_are_not_asked_for_the_images_count_as_unlabelled(tfds_dir, options):
    """As pretraining reads them: no class, no label in a batch."""
    source = scenes(tfds_dir, **options)
    assert source.class_names is None and source.num_classes is None and source.labels is None
    for batch in trained(source, 8, 2):
        assert "label" not in batch and batch["view_2"].shape == (8, 4, 4, 3)
    np.testing.assert_array_equal(evaluated(source)["label"], -1)


def test_a_set_of_one_label_is_not_changed_by_asking_for_several(tfds_dir):
    asked = sources.load("tiny_marks", tfds_dir, "train", FIELD, several_labels=True)
    assert asked.labels.shape == (COUNT,) and asked.class_names == tuple(NAMES)
