"""Linear probes on frozen features: with all labels, and with a few per class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from selfsup_jax.evaluation.features import Features

# Inverse strengths of the L2 penalty; the best is picked on a held-out part of the training set.
INVERSE_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0)


class Accuracy(NamedTuple):
    """Fractions in [0, 1]."""

    top1: float
    top5: float


class FewShot(NamedTuple):
    """Fractions in [0, 1], over the draws."""

    top1: float
    std: float
    ci95: float  # half the 95 % confidence interval of the mean, Student's t


def linear_probe(
    train: Features,
    test: Features,
    *,
    seed: int = 0,
    inverse_penalties: Sequence[float] = INVERSE_PENALTIES,
    max_iterations: int = 200,
) -> Accuracy:
    """Logistic regression on standardised features.

    The penalty is chosen on a fifth of the training set, and the test set is looked at once.
    """
    if len(train.labels) < 20 * len(np.unique(train.labels)):
        inverse_penalties = (1.0,)  # too few images to choose on
    try:
        fit_x, held_x, fit_y, held_y = train_test_split(
            train.x, train.labels, test_size=0.2, random_state=seed, stratify=train.labels
        )
    except ValueError:  # a class with a single image can't be split class by class
        fit_x, held_x, fit_y, held_y = train_test_split(
            train.x, train.labels, test_size=0.2, random_state=seed
        )
    # From the strongest penalty to the weakest, each fit begins where the one before ended.
    model = _probe(max_iterations, warm_start=True)
    scores = []
    for inverse_penalty in sorted(inverse_penalties):
        model.set_params(logisticregression__C=inverse_penalty)
        _fit_quietly(model, fit_x, fit_y)
        scores.append(model.score(held_x, held_y))
    best = sorted(inverse_penalties)[int(np.argmax(scores))]
    model = _probe(max_iterations).set_params(logisticregression__C=best)
    _fit_quietly(model, train.x, train.labels)
    scores_of_classes = model.decision_function(test.x)
    if scores_of_classes.ndim == 1:  # two classes
        scores_of_classes = np.stack([-scores_of_classes, scores_of_classes], axis=1)
    ranked = model.classes_[np.argsort(-scores_of_classes, axis=1)]
    hits = ranked == test.labels[:, None]
    return Accuracy(float(hits[:, 0].mean()), float(hits[:, :5].any(axis=1).mean()))


def few_shot(
    train: Features,
    test: Features,
    *,
    labels_per_class: int,
    draws: int,
    seed: int = 0,
    inverse_penalty: float = 1.0,
) -> FewShot:
    """The probe with `labels_per_class` labelled images of each class, over several draws.

    The features are standardised by the whole training set, which takes no labels; the penalty is
    fixed, since so few labels leave nothing to choose it on. A class with fewer images gives what
    it has.
    """
    scaler = StandardScaler().fit(train.x)
    train_x, test_x = scaler.transform(train.x), scaler.transform(test.x)
    scores = []
    for draw in range(draws):
        rng = np.random.default_rng((seed, draw))
        rows = np.concatenate(
            [
                rng.permutation(np.flatnonzero(train.labels == label))[:labels_per_class]
                for label in np.unique(train.labels)
            ]
        )
        model = LogisticRegression(C=inverse_penalty, max_iter=200)
        _fit_quietly(model, train_x[rows], train.labels[rows])
        scores.append(model.score(test_x, test.labels))
    interval = 0.0
    if draws > 1:
        interval = float(stats.sem(scores) * stats.t.ppf(0.975, draws - 1))
    return FewShot(float(np.mean(scores)), float(np.std(scores)), interval)


def _probe(max_iterations: int, warm_start: bool = False) -> Pipeline:
    model = LogisticRegression(max_iter=max_iterations, warm_start=warm_start)
    return make_pipeline(StandardScaler(), model)


def _fit_quietly(model: Pipeline | LogisticRegression, x: np.ndarray, y: np.ndarray) -> None:
    with warnings.catch_warnings():
        # Stopping L-BFGS early costs a few hundredths of a point and is what the limit is for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # A few labels of many classes are no regression problem.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than")
        model.fit(x, y)
