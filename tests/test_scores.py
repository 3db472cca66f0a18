"""Scores against worked examples and slow restatements, and their files read again."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from selfsup_jax.evaluation import scores

# ------------------------------------------------------------------------ several classes


def test_top_k_is_that_of_a_sort():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 7)), rng.integers(0, 7, 60)
    ranked = np.argsort(-logits, axis=1)
    for k in (1, 2, 5, 7):
        expected = np.mean([label in row[:k] for row, label in zip(ranked, labels, strict=True)])
        assert scores.top_k(logits, labels, k) == pytest.approx(expected)
    assert scores.top_k(logits, labels, 7) == 1.0


def test_a_tie_is_no_prediction():
    """A classifier that says the same of all classes gets none right, however many are asked."""
    labels = np.asarray([0, 1, 2])
    assert scores.top_k(np.zeros((3, 3)), labels, 1) == 0.0
    assert scores.top_k(np.zeros((3, 3)), labels, 2) == 0.0
    logits = np.asarray([[2.0, 2.0, 1.0]] * 3)
    assert scores.top_k(logits, labels, 1) == 0.0
    assert scores.top_k(logits, labels, 2) == pytest.approx(2 / 3)


def test_nan_is_no_prediction():
    nan = np.nan
    logits = np.asarray([[nan, nan, nan], [5.0, nan, 1.0], [nan, 5.0, 1.0]])
    assert scores.top_k(logits, np.asarray([0, 0, 1]), 1) == 0.0
    assert scores.top_k(logits, np.asarray([0, 1, 0]), 2) == 0.0  # of its own class
    assert scores.top_k(logits[1:], np.asarray([0, 1]), 2) == 1.0  # another's is one place


def test_top5_is_told_of_more_than_five_classes():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 20)
    few = scores.classification(rng.normal(size=(20, 5)), labels)
    assert few.keys() == {"top1", "mean_per_class"}
    logits = rng.normal(size=(20, 6))
    many = scores.classification(logits, labels)
    assert many["top5"] == pytest.approx(np.mean(logits.argmin(axis=1) != labels))


def test_the_confusion_matrix_has_true_classes_as_rows():
    predicted, labels = [1, 1, 2, 0, 1], np.asarray([0, 0, 0, 2, 1])
    matrix = scores.confusion(np.eye(4)[predicted], labels)
    expected = [[0, 2, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(matrix, expected)
    assert matrix.dtype == np.int64


def test_mean_per_class_weighs_classes_not_images():
    """Eight of ten, one of two, and a class that has no images."""
    matrix = np.asarray([[8, 1, 1], [1, 1, 0], [0, 0, 0]])
    assert scores.mean_per_class(matrix) == pytest.approx((0.8 + 0.5) / 2)
    logits = np.eye(3)[[0] * 8 + [1, 2] + [0, 1]]
    found = scores.classification(logits, np.asarray([0] * 10 + [1] * 2))
    assert found == pytest.approx({"top1": 9 / 12, "mean_per_class": 0.65})


# ------------------------------------------------------------------------- several labels


def test_voc_map_of_a_worked_example():
    """Five images, two of them of the class, ranked second and fourth.

    Recall 1/2 is reached with precision 1/2 and recall 1 with 2/4, so that every one of the 11
    recalls has 1/2. Of the second class the first is right and the last: precision 1 up to recall
    1/2 (6 recalls: 0, 0.1, ... 0.5), then 2/5 (5 of them).
    """
    first = [0.9, 0.8, 0.7, 0.6, 0.5], [0, 1, 0, 1, 0]
    second = [0.1, 0.2, 0.3, 0.4, 0.5], [1, 0, 0, 0, 1]
    values = np.asarray([first[0], second[0]]).T, np.asarray([first[1], second[1]]).T
    expected = [0.5, (6 * 1.0 + 5 * 0.4) / 11]
    for i in range(2):
        alone = scores.voc_map(values[0][:, i : i + 1], values[1][:, i : i + 1])
        assert alone == pytest.approx(expected[i])
    assert scores.voc_map(*values) == pytest.approx(np.mean(expected))
    # A class that no image has takes no part.
    absent = np.append(values[0], values[0][:, :1], axis=1), np.pad(values[1], [(0, 0), (0, 1)])
    assert scores.voc_map(*absent) == pytest.approx(np.mean(expected))


def average_precision(score, label):
    """VOC2007's VOCap, one threshold at a time, as its development kit words it."""
    order = sorted(range(len(score)), key=lambda i: -score[i])
    points = []
    for n in range(1, len(order) + 1):
        right = sum(int(label[i]) for i in order[:n])
        points.append((right, right / n))
    total = 0.0
    for tenths in range(11):
        # recall >= tenths / 10, in whole numbers
        reached = [p for right, p in points if 10 * right >= tenths * int(sum(label))]
        total += max(reached, default=0.0) / 11
    return total


@pytest.mark.parametrize("seed", range(5))
def test_voc_map_is_the_development_kits(seed):
    """10 and 20 images of a class are among them: recalls that are tenths themselves."""
    rng = np.random.default_rng(seed)
    counts = (1, 3, 7, 10, 20, 50)
    labels = np.stack([rng.permutation(np.arange(50) < n) for n in counts], axis=1).astype(int)
    values = rng.normal(size=labels.shape) + labels
    expected = [average_precision(values[:, i], labels[:, i]) for i in range(len(counts))]
    assert scores.voc_map(values, labels) == pytest.approx(np.mean(expected))
    assert scores.voc_map(labels.astype(float), labels) == 1.0


# ---------------------------------------------------------------------------------- files


def test_the_files_of_a_confusion_matrix_can_be_read_again(tmp_path):
    names = ['plain, with a comma and a "quote"', "übel\nzwei Zeilen", "never seen", "all right"]
    matrix = np.asarray([[6, 1, 0, 3], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5]])
    folder = tmp_path / "job"
    scores.write_confusion(str(folder), matrix, names)
    with np.load(folder / "confusion.npz") as arrays:  # pickles nothing
        np.testing.assert_array_equal(arrays["matrix"], matrix)
        assert arrays["class_names"].tolist() == names
    with open(folder / "per_class.csv", newline="", encoding="utf-8") as f:
        rows = {row["class"]: row for row in csv.DictReader(f)}
    assert list(rows) == names
    told = [
        (int(r["images"]), r["accuracy"], r["most_taken_for"], int(r["how_often"]))
        for r in rows.values()
    ]
    assert told == [
        (10, "0.6000", names[3], 3),
        (4, "0.5000", names[0], 2),
        (0, "", "", 0),
        (5, "1.0000", "", 0),
    ]
    with Image.open(folder / "plots" / "confusion_matrix.png") as picture:
        assert min(picture.size) > 100
    assert not list(folder.rglob("*.partial"))


def test_a_matrix_is_written_over_the_one_before(tmp_path):
    for count in (1, 2):
        scores.write_confusion(str(tmp_path), count * np.eye(2, dtype=int), ["a", "b"])
    with np.load(tmp_path / "confusion.npz") as arrays:
        np.testing.assert_array_equal(arrays["matrix"], 2 * np.eye(2))
