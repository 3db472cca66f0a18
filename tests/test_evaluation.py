"""Probes and features against brute force."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MEAN, NUM_CLASSES, STD, assert_same
from ml_collections import ConfigDict
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from configs import common
from selfsup_jax.evaluation import closing, knn, probes
from selfsup_jax.evaluation.features import Extractor, Features, pixels
from selfsup_jax.state import encoder_variables


def blobs(rows, classes, seed, spread=0.1, dimensions=8):
    """Classes around points of their own, which are the same for every seed."""
    centres = 3 * np.random.default_rng(99).normal(size=(classes, dimensions))
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % classes
    x = centres[labels] + spread * rng.normal(size=(rows, dimensions))
    return Features(x.astype(np.float32), labels.astype(np.int32))


def noise(rows, classes, seed, dimensions=4):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, dimensions)).astype(np.float32)
    return Features(x, rng.integers(0, classes, rows).astype(np.int32))


# ----------------------------------------------------------------------------------- kNN


def knn_by_hand(train, test, k, temperature):
    """The predicted class of each query, one query at a time in float64."""
    predicted = []
    for query in test.x.astype(np.float64):
        cosines = [
            query @ row / (np.linalg.norm(query) * np.linalg.norm(row))
            for row in train.x.astype(np.float64)
        ]
        votes = np.zeros(NUM_CLASSES)
        for i in np.argsort(cosines)[::-1][:k]:
            votes[train.labels[i]] += np.exp(cosines[i] / temperature)
        predicted.append(votes.argmax())
    return np.asarray(predicted)


def knn_top1(train, test, k, temperature):
    options = {"held_out_images": 0, "seed": 0}
    found = probes.nearest_neighbours(
        train, test, NUM_CLASSES, k=(k,), temperatures=(temperature,), **options
    )
    assert found.logits.shape == (len(test.x), NUM_CLASSES)
    return found.results["knn_top1"]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.02), (20, 0.5), (200, 0.1)])
def test_knn_is_brute_force(k, temperature):
    """Overlapping classes; k above the bank's size takes all of it."""
    train, test = noise(50, NUM_CLASSES, 0), noise(30, NUM_CLASSES, 1)
    predicted = knn_by_hand(train, test, k, temperature)
    expected = np.mean(predicted == test.labels)
    assert knn_top1(train, test, k=k, temperature=temperature) == pytest.approx(expected)
    # Each prediction, not their count alone: with these labels all or none must be right.
    agreeing = test._replace(labels=predicted.astype(np.int32))
    assert knn_top1(train, agreeing, k=k, temperature=temperature) == 1.0


@pytest.mark.parametrize(("bank_rows", "query_rows"), [(3, 7), (64, 10), (1, 64)])
def test_knn_votes_do_not_depend_on_the_blocks(bank_rows, query_rows):
    """Blocks that don't divide the bank or the queries."""
    train, test = noise(50, NUM_CLASSES, 0), noise(30, NUM_CLASSES, 1)
    found = knn.nearest(train.x, test.x, 20, bank_rows=bank_rows, query_rows=query_rows)
    votes = knn.vote(found, train.labels, NUM_CLASSES, k=20, temperature=0.1)
    np.testing.assert_array_equal(votes.argmax(axis=1), knn_by_hand(train, test, 20, 0.1))


def test_knn_weighs_the_near_more():
    """One near neighbour against two far ones: a low temperature lets it win."""
    train = Features(
        np.asarray([[1, 0.05], [1, 1], [1, -1]], np.float32), np.asarray([0, 1, 1], np.int32)
    )
    test = Features(np.asarray([[1, 0]], np.float32), np.asarray([0], np.int32))
    assert knn_top1(train, test, k=3, temperature=0.1) == 1.0
    assert knn_top1(train, test, k=3, temperature=10.0) == 0.0


def test_knn_takes_a_row_of_zeros():
    """A representation that ReLUs have emptied is like none of the others, and breaks nothing."""
    train, test = noise(50, NUM_CLASSES, 0), noise(30, NUM_CLASSES, 1)
    zeros = np.zeros_like(train.x[:3])
    bank = Features(np.concatenate([zeros, train.x]), np.append([0, 0, 0], train.labels))
    expected = knn_top1(train, test, k=3, temperature=0.1)
    assert knn_top1(bank, test, k=3, temperature=0.1) == expected
    queries = Features(np.concatenate([test.x, zeros]), np.append(test.labels, [0, 0, 0]))
    accuracy = knn_top1(train, queries, k=3, temperature=0.1)
    assert 30 * expected <= 33 * accuracy <= 30 * expected + 3


def test_knn_at_a_tiny_temperature_does_not_overflow():
    train, test = blobs(30, 3, 0), blobs(15, 3, 1)
    assert knn_top1(train, test, k=5, temperature=1e-3) == 1.0


def test_a_tie_of_neighbours_counts_against_the_label():
    """Two rows as near, of two classes: neither is predicted; one more of a class decides."""
    x = np.asarray([[1, 0], [2, 0], [3, 0]], np.float32)
    bank = Features(x, np.asarray([0, 1, 1], np.int32))
    test = Features(x[:2], np.asarray([0, 1], np.int32))
    assert knn_top1(bank, test, k=2, temperature=0.1) == 0.0
    assert knn_top1(bank, test, k=3, temperature=0.1) == 0.5


# -------------------------------------------------------------------------- linear probe

STRENGTHS = (0.01, 0.1, 1.0)


def linear_probe(train, test, classes, **changes):
    options = {"C": STRENGTHS, "held_out_images": 10009, "seed": 0} | changes
    return probes.linear(train, test, classes, **options).results


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 7])
def test_linear_probe_on_separable_classes(classes):
    results = linear_probe(blobs(140, classes, 0), blobs(70, classes, 1), classes)
    assert results.pop("linear_probe_C") in STRENGTHS
    names = {"top1", "mean_per_class", "top1_held_out"} | ({"top5"} if classes > 5 else set())
    assert results == {f"linear_probe_{name}": 1.0 for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 10])
def test_linear_probe_on_random_labels_is_chance(classes):
    train, test = noise(400, classes, 0), noise(1000, classes, 1)
    results = linear_probe(train, test, classes)
    assert results["linear_probe_top1"] == pytest.approx(1 / classes, abs=0.06)
    if classes > 5:
        assert results["linear_probe_top5"] == pytest.approx(5 / classes, abs=0.08)


@pytest.mark.slow
def test_top5_counts_the_first_five():
    """Ten classes, five to a place: one of the five is right, and the five hold it."""
    train, test = blobs(300, 2, 0), blobs(300, 2, 1)
    rng = np.random.default_rng(0)
    relabel = lambda f: f._replace(labels=(5 * f.labels + rng.integers(0, 5, 300)).astype(np.int32))  # noqa: E731
    results = linear_probe(relabel(train), relabel(test), 10)
    assert results["linear_probe_top5"] == 1.0
    assert results["linear_probe_top1"] == pytest.approx(0.2, abs=0.08)


@pytest.mark.slow
def test_linear_probe_with_a_class_of_one_image():
    train = blobs(61, 3, 0)
    labels = np.where(np.arange(61) == 60, 3, train.labels).astype(np.int32)
    results = linear_probe(train._replace(labels=labels), blobs(30, 3, 1), 4)
    assert results["linear_probe_top1"] > 0.9


@pytest.mark.slow
def test_linear_probe_never_fits_on_the_test_set():
    """With its labels permuted the same predictions are only scored anew."""
    train, test = blobs(60, 3, 0), blobs(30, 3, 1)
    wrong = test._replace(labels=(test.labels + 1) % 3)
    assert linear_probe(train, wrong, 3)["linear_probe_top1"] == 0.0


@pytest.mark.slow
def test_the_strength_is_the_best_on_held_out_rows_by_scikit_learn():
    """Features of which most tell nothing: neither the strongest penalty nor the weakest."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 60)).astype(np.float32)
    labels = (2 * x[:, :3] + 0.5 * rng.gumbel(size=(500, 3))).argmax(axis=1).astype(np.int32)
    train, test = Features(x[:200], labels[:200]), Features(x[200:], labels[200:])
    held = probes.held_out_rows(train.labels, 10009, seed=3)
    assert held.sum() == 40

    def top1(strength, fitted, scored):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000))
        return model.fit(*fitted).score(*scored)

    parts = [Features(train.x[rows], train.labels[rows]) for rows in (~held, held)]
    strengths = (1e-4, 0.1, 100.0)
    found = {strength: top1(strength, *parts) for strength in strengths}
    assert found[1e-4] < found[0.1] > found[100.0]
    results = linear_probe(train, test, 3, C=strengths, seed=3, tolerance=1e-5)
    assert results["linear_probe_C"] == 0.1
    assert results["linear_probe_top1_held_out"] == pytest.approx(found[0.1])
    assert results["linear_probe_top1"] == pytest.approx(top1(0.1, train, test), abs=1.01 / 300)


# ------------------------------------------------------------------------------ few shot


def test_few_shot_takes_k_labels_of_each_class(monkeypatch):
    """Other draws for each, the same for the same seed; a small class gives what it has."""
    train = blobs(62, 3, 0)
    labels = train.labels.copy()
    labels[60:] = 3  # a fourth class of two images
    train = train._replace(labels=labels)
    fits = []
    fit = probes.LogisticRegression.fit

    def spy(self, x, y):
        fits.append((x.copy(), y.copy()))
        return fit(self, x, y)

    monkeypatch.setattr(probes.LogisticRegression, "fit", spy)
    test = blobs(30, 3, 1)
    first = probes.few_labels(train, test, labels_per_class=5, draws=3, seed=1)
    assert len(fits) == 3
    for x, y in fits:
        np.testing.assert_array_equal(np.bincount(y), [5, 5, 5, 2])
        assert len(np.unique(x, axis=0)) == 17  # no image twice
    assert not np.array_equal(fits[0][0], fits[1][0])
    again = probes.few_labels(train, test, labels_per_class=5, draws=3, seed=1)
    assert again == first
    np.testing.assert_array_equal(fits[0][0], fits[3][0])


def test_few_shot_is_mean_and_deviation_of_its_draws():
    train, test = noise(200, 2, 0), noise(100, 2, 1)
    alone = [probes.few_labels(train, test, labels_per_class=3, draws=n, seed=4) for n in (1, 2)]
    first = alone[0].top1
    second = 2 * alone[1].top1 - first
    assert alone[0].std == 0.0
    assert alone[1].std == pytest.approx(abs(first - second) / 2)
    assert first != second
    separable = probes.few_labels(blobs(60, 3, 0), blobs(30, 3, 1), labels_per_class=2, draws=2)
    assert separable == (1.0, 0.0, 0.0)


def test_few_shot_tells_the_interval_of_its_mean():
    """Student's t of the draws, whose results are had one by one from means over fewer draws."""
    train, test = noise(200, 2, 0), noise(100, 2, 1)
    runs = [
        probes.few_labels(train, test, labels_per_class=3, draws=n, seed=4) for n in (1, 2, 3, 4)
    ]
    totals = [n * run.top1 for n, run in enumerate(runs, start=1)]
    draws = np.diff([0.0, *totals])
    assert draws[0] != draws[1]
    # The 97.5 % points of Student's t with 1, 2 and 3 degrees of freedom, from a printed table.
    points = {2: 12.706, 3: 4.303, 4: 3.182}
    for n, point in points.items():
        deviation = np.sqrt(np.sum((draws[:n] - draws[:n].mean()) ** 2) / (n - 1))
        by_hand = point * deviation / np.sqrt(n)
        assert runs[n - 1].ci95 == pytest.approx(by_hand, rel=1e-3, abs=1e-9)
        low, high = stats.t.interval(0.95, n - 1, draws[:n].mean(), stats.sem(draws[:n]))
        assert runs[n - 1].ci95 == pytest.approx((high - low) / 2, abs=1e-9)
    assert runs[0].ci95 == 0.0  # one draw tells nothing of others


# ------------------------------------------------------------------------------ features

ROWS = 21


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8)


def batches(images, size):
    labels = np.arange(len(images), dtype=np.int32)  # each row's number
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        yield {"image": images[rows], "label": labels[rows]}


@pytest.fixture(scope="module")
def variables(initial_state):
    """An encoder whose running averages are not those of any batch."""
    moved = jax.tree.map(lambda x: x + 0.3, initial_state.online_stats)
    return encoder_variables(dataclasses.replace(initial_state, online_stats=moved))


@pytest.mark.slow
def test_features_do_not_depend_on_batches_or_devices(networks, variables, images):
    """Every row once and in order, on eight devices, whatever the batches; nothing is trained."""
    traces = []

    def represent(variables, images):
        traces.append(images.shape)
        return networks.encoder.apply(variables, images)

    before = jax.tree.map(np.copy, variables)
    normal = (images / 255 - np.asarray(MEAN)) / np.asarray(STD)
    expected = np.asarray(networks.encoder.apply(variables, jnp.asarray(normal, jnp.float32)))
    assert np.ptp(expected, axis=0).min() > 0
    for size in (5, 8, 16, ROWS, 100):
        extract = Extractor(represent, MEAN, STD)
        features = extract(variables, batches(images, size))
        np.testing.assert_array_equal(features.labels, np.arange(ROWS))
        np.testing.assert_allclose(features.x, expected, rtol=1e-5, atol=1e-6)
        spread = extract.spread(variables, batches(images, size), ROWS)
        np.testing.assert_array_equal(spread.x[:], features.x)
        np.testing.assert_array_equal(spread.labels, features.labels)
    # One trace for a whole split, its shorter last batch included, and for a second split.
    assert len(traces) == 5
    extract(variables, batches(images[:13], 100))
    assert len(traces) == 5
    assert_same(variables, before)


def test_pixels_are_the_images(images):
    features = pixels(batches(images, 8), ROWS)
    np.testing.assert_allclose(features.x[:], images.reshape(ROWS, -1) / 255, rtol=1e-6)
    np.testing.assert_array_equal(features.labels, np.arange(ROWS))


# ------------------------------------------------------------------------- all the probes


@pytest.mark.slow
def test_evaluate_measures_each_encoder_by_itself():
    """An encoder that shows the class against one that shows nothing, and the pixels."""
    rng = np.random.default_rng(0)

    def split(rows):
        labels = (np.arange(rows) % 3).astype(np.int32)
        images = rng.integers(0, 256, (rows, 4, 4, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = 120 * labels
        return [{"image": images, "label": labels}]

    def represent(selected, images):  # "variables": which pixel is shown
        return images.reshape(len(images), -1) @ selected

    config = ConfigDict(
        {
            "knn_k": 1,
            "knn_temperature": 0.1,
            "fewshot_labels": 3,
            "fewshot_draws": 2,
            "pixels": True,
            "linear": common.linear_probe(),
        }
    )
    config.linear.C = (0.01, 0.03, 0.1, 0.3, 1.0)
    shows_class, shows_noise = np.zeros((2, 48, 1), np.float32)
    shows_class[0], shows_noise[20] = 1, 1
    train, test = split(90), split(60)
    results = closing.evaluate(
        Extractor(represent, (0.0,) * 3, (1.0,) * 3),
        shows_class,
        shows_noise,
        closing.Batches(lambda: train, 90),
        closing.Batches(lambda: test, 60),
        3,
        config,
        seed=0,
    )
    names = ["fewshot_top1", "fewshot_top1_std"]
    names += [f"linear_probe_{name}" for name in ("top1", "mean_per_class", "top1_held_out", "C")]
    names += [f"knn_{name}" for name in ("top1", "mean_per_class", "k", "temperature")]
    prefixes = ("", "random_init_", "pixels_")
    assert set(results) == {prefix + name for prefix in prefixes for name in names}
    assert results["linear_probe_top1"] == 1.0
    assert results["random_init_linear_probe_top1"] < 0.6
    assert (results["knn_k"], results["knn_temperature"]) == (1, 0.1)
    table = closing.summary(results)
    for prefix in prefixes:
        assert f"{100 * results[prefix + 'linear_probe_top1']:.1f} %" in table
