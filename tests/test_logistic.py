"""Logistic regression at many strengths against scikit-learn's, strength by strength."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from selfsup_jax.evaluation import logistic
from selfsup_jax.evaluation.features import Features

CLASSES = 3
PENALTIES = (0.003, 0.1, 3.0, 100.0)
EXACT = {"tolerance": 1e-6, "max_iterations": 300}


def problem(rows=117, dimensions=5, seed=0):
    """Correlated features away from zero whose scales differ; classes that overlap.

    117 rows divide over no number of devices from 2 to 8.
    """
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(dimensions, dimensions))
    x = rng.normal(size=(rows, dimensions)) @ mix * np.geomspace(0.3, 3, dimensions) + 1.0
    slopes = np.random.default_rng(98).normal(size=(dimensions, CLASSES))
    y = (x @ slopes + 2 * rng.gumbel(size=(rows, CLASSES))).argmax(axis=1)
    return Features(x.astype(np.float32), y.astype(np.int32))


def of_scikit_learn(x, y, penalty, standardize, sample_weight=None):
    """(kernel `[D, C]`, bias `[C]`) of raw features, solved far beyond float32."""
    x = x.astype(np.float64)
    mean, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if standardize:
        mean, scale = x.mean(axis=0), x.std(axis=0)
        scale[scale < 1e-6] = 1.0
    model = LogisticRegression(C=penalty, tol=1e-10, max_iter=10000)
    model.fit((x - mean) / scale, y, sample_weight=sample_weight)
    kernel = model.coef_.T / scale[:, None]
    return kernel, model.intercept_ - mean @ kernel


def assert_heads(heads, expected, x, centred=True, rtol=2e-4):
    """Coefficients, up to what a softmax can't tell apart, and what they predict."""
    assert len(heads.kernel) == len(expected)
    logits = heads.logits(x)
    for i, (kernel, bias) in enumerate(expected):
        free = (lambda v: v - v.mean(axis=-1, keepdims=True)) if centred else (lambda v: v)
        for found, wanted in ((heads.kernel[i], kernel), (heads.bias[i], bias)):
            atol = rtol * np.abs(wanted).max()
            np.testing.assert_allclose(free(found), free(wanted), rtol=0, atol=atol)
        wanted = x.astype(np.float64) @ kernel + bias
        np.testing.assert_array_equal(logits[i].argmax(axis=1), wanted.argmax(axis=1))


@pytest.fixture(scope="module")
def features():
    return problem()


@pytest.fixture(scope="module")
def heads(features):
    return logistic.fit(features, CLASSES, PENALTIES, **EXACT)


# --------------------------------------------------------------------------- one label


@pytest.mark.slow
@pytest.mark.parametrize("standardize", [True, False])
def test_heads_are_scikit_learns(features, heads, standardize):
    if not standardize:
        heads = logistic.fit(features, CLASSES, PENALTIES, standardize=False, **EXACT)
    expected = [of_scikit_learn(*features, penalty, standardize) for penalty in PENALTIES]
    unseen = problem(50, seed=7).x
    assert_heads(heads, expected, unseen)
    assert heads.C == PENALTIES
    assert heads.kernel.dtype == heads.bias.dtype == np.float32
    assert (heads.iterations < EXACT["max_iterations"]).all()  # it has converged
    # The strengths matter: weaker penalties have longer kernels, by far.
    lengths = np.linalg.norm(heads.kernel, axis=(1, 2))
    assert (np.diff(lengths) > 0.05 * lengths[:-1]).all() and lengths[-1] > 5 * lengths[0]


@pytest.mark.slow
def test_what_comes_of_the_default_tolerance(features):
    """Tens of passes, and the predictions of the exact solution but for rows on the border."""
    found = logistic.fit(features, CLASSES, PENALTIES)
    assert found.iterations.max() <= 40
    for logits, penalty in zip(found.logits(features.x), PENALTIES, strict=True):
        kernel, bias = of_scikit_learn(*features, penalty, standardize=True)
        wanted = features.x @ kernel + bias
        centred = [v - v.mean(axis=1, keepdims=True) for v in (logits, wanted)]
        np.testing.assert_allclose(*centred, atol=0.01 * np.abs(centred[1]).max())


@pytest.mark.slow
def test_two_classes_have_two_columns(features):
    """scikit-learn has one for both, and yet the same strength means the same."""
    two = features._replace(labels=(features.labels == 0).astype(np.int32))
    found = logistic.fit(two, 2, [0.05, 5.0], **EXACT)
    for i, penalty in enumerate((0.05, 5.0)):
        kernel, bias = of_scikit_learn(*two, penalty, standardize=True)
        difference = found.kernel[i, :, 1] - found.kernel[i, :, 0]
        np.testing.assert_allclose(difference, kernel[:, 0], atol=2e-4 * np.abs(kernel).max())
        assert found.bias[i, 1] - found.bias[i, 0] == pytest.approx(bias[0], rel=1e-3, abs=1e-3)


def test_logits_are_of_each_strength(features, heads):
    by_hand = features.x @ heads.kernel[2] + heads.bias[2]
    np.testing.assert_allclose(heads.logits(features.x)[2], by_hand, rtol=1e-6)
    assert heads.logits(features.x).shape == (4, 117, CLASSES)


# -------------------------------------------------------------------------- rows, weights


@pytest.mark.slow
@pytest.mark.parametrize("standardize", [True, False])
def test_rows_of_weight_zero_take_no_part(features, standardize):
    """Not in the loss, nor in the mean and deviation, wherever they lie and whatever they hold."""
    kept = np.random.default_rng(3).random(117) < 0.6
    x = np.where(kept[:, None], features.x, 1e3).astype(np.float32)
    labels = np.where(kept, features.labels, 0)
    weights = kept.astype(np.float32)
    options = EXACT | {"standardize": standardize}
    found = logistic.fit(Features(x, labels), CLASSES, [0.1, 3.0], weights=weights, **options)
    rows = features.x[kept], features.labels[kept]
    assert_heads(found, [of_scikit_learn(*rows, c, standardize) for c in (0.1, 3.0)], rows[0])


def test_weights_are_those_of_the_losses(features):
    weights = np.random.default_rng(4).uniform(0.1, 3.0, 117).astype(np.float32)
    found = logistic.fit(features, CLASSES, [0.1, 3.0], weights=weights, standardize=False, **EXACT)
    expected = [of_scikit_learn(*features, c, False, weights) for c in (0.1, 3.0)]
    assert_heads(found, expected, features.x)


@pytest.mark.slow
def test_rows_in_many_blocks(features, heads, monkeypatch):
    """15 rows to a device in blocks of 4, the last of the table only filled up."""
    monkeypatch.setattr(logistic, "_BLOCK", 4)
    found = logistic.fit(features, CLASSES, PENALTIES, **EXACT)
    assert_heads(found, list(zip(heads.kernel, heads.bias, strict=True)), features.x)


@pytest.mark.slow
def test_fewer_rows_than_devices():
    few = problem(5, dimensions=2)
    few = few._replace(labels=(np.arange(5) % CLASSES).astype(np.int32))
    found = logistic.fit(few, CLASSES, [0.5], **EXACT)
    assert_heads(found, [of_scikit_learn(*few, 0.5, True)], few.x)


@pytest.mark.slow
def test_strengths_in_turn_are_those_at_once(features, heads):
    """Where memory is short one after the other, in their order."""
    found = logistic.fit(features, CLASSES, PENALTIES, memory_gib=1e-9, **EXACT)
    assert found.C == PENALTIES and found.iterations.shape == (4,)
    assert_heads(found, list(zip(heads.kernel, heads.bias, strict=True)), features.x)
    # Three of them fit: two groups, of three and one.
    each = 5 * CLASSES * 4 * (2 * logistic._HISTORY + 8) / 2**30
    found = logistic.fit(features, CLASSES, PENALTIES, memory_gib=3.5 * each, **EXACT)
    assert_heads(found, list(zip(heads.kernel, heads.bias, strict=True)), features.x)


# ------------------------------------------------------------------- features, labels


@pytest.mark.slow
def test_more_features_than_rows_and_some_that_tell_nothing_new():
    """31 of 20 rows, one that never changes and one that is the sum of two others.

    A fit is perfect then, and the penalty alone makes it the only one.
    """
    x, labels = problem(20, dimensions=31)
    wide = np.concatenate([x, np.full((20, 1), 7.0), x[:, :1] + x[:, 1:2]], axis=1)
    wide = Features(wide.astype(np.float32), labels)
    found = logistic.fit(wide, CLASSES, [0.01, 1.0], **EXACT)
    np.testing.assert_allclose(found.kernel[:, 31], 0, atol=1e-5)
    assert_heads(found, [of_scikit_learn(*wide, c, True) for c in (0.01, 1.0)], wide.x)


@pytest.mark.slow
@pytest.mark.parametrize("standardize", [True, False])
def test_several_labels_are_a_problem_for_each_class(features, standardize):
    """Some images have none, some have several; one against the rest, each by scikit-learn."""
    rng = np.random.default_rng(5)
    slopes = rng.normal(size=(5, 4))
    hot = (features.x @ slopes + rng.logistic(size=(117, 4)) > 0.5).astype(np.int32)
    assert {0, 2} <= set(hot.sum(axis=1))
    several = features._replace(labels=hot)
    found = logistic.fit(several, 4, [0.01, 1.0, 30.0], standardize=standardize, **EXACT)
    for i, penalty in enumerate((0.01, 1.0, 30.0)):
        for c in range(4):
            kernel, bias = of_scikit_learn(features.x, hot[:, c], penalty, standardize)
            atol = 3e-4 * np.abs(kernel).max()
            np.testing.assert_allclose(found.kernel[i, :, c], kernel[:, 0], rtol=0, atol=atol)
            assert found.bias[i, c] == pytest.approx(bias[0], rel=1e-3, abs=1e-3)
