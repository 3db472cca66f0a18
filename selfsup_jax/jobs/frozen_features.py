"""Jobs that need the features of two splits and no more: fast linear probe, kNN, few labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from sklearn.model_selection import train_test_split

from selfsup_jax.data import inputs
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import encoder, knn, linear_probe, logistic, scores
from selfsup_jax.evaluation.encoder import Frozen
from selfsup_jax.evaluation.features import Extractor, Features
from selfsup_jax.jobs import runner
from selfsup_jax.jobs.runner import Prepared
from selfsup_jax.run import progress
from selfsup_jax.run.progress import say


class Measured(NamedTuple):
    """What a measure found.

    Attributes:
        results: flat, fractions in [0, 1].
        logits: `[N, C]` of the test images, for the confusion matrix; None for none.
    """

    results: dict[str, Any]
    logits: np.ndarray | None = None


# `(train, test, classes, config) -> Measured`
Measure = Callable[[Features, Features, int, ConfigDict], Measured]


def prepare_for(
    measure: Measure, check: Callable[[ConfigDict, int], None]
) -> Callable[[ConfigDict, Frozen], Prepared]:
    """The `Prepare` of a job that looks at the features of a training and a test split."""

    def prepare(config: ConfigDict, frozen: Frozen) -> Prepared:
        inputs.fill_in_splits(config.data)
        train = runner.load_split(config, config.data.train_split, "data.train_split")
        test = runner.load_split(config, config.data.test_split, "data.test_split")
        num_classes = class_count(train, test)
        limit = min(config.data.max_train_images or train.num_examples, train.num_examples)
        check(config, limit)
        extract = Extractor(
            encoder.represent(frozen.config, config.compute_dtype), *frozen.normalization
        )

        def task(frozen: Frozen, folder: str) -> dict[str, Any]:
            bank = extract(frozen.variables, counted(config, train, limit))
            queries = extract(frozen.variables, counted(config, test, test.num_examples))
            check_labels(config, bank.labels, queries.labels, num_classes)
            if not hosts.is_writer():
                return {}
            found = measure(bank, queries, num_classes, config)
            if found.logits is not None:
                matrix = scores.confusion(found.logits, queries.labels)
                scores.write_confusion(folder, matrix, train.class_names or ())
            return found.results

        counts = {"train_images": limit, "test_images": test.num_examples}
        return Prepared(task, {"classes": num_classes} | counts)

    return prepare


def counted(config: ConfigDict, source: Source, limit: int) -> Iterable[dict[str, np.ndarray]]:
    """A split's test images once, with a line that tells how far the encoder is."""
    batches = inputs.eval_batches(config.data, source, config.feature_batch_size, limit)()
    return progress.counted(batches, min(limit, source.num_examples), f"features of {source.name}")


def class_count(train: Source, test: Source) -> int:
    """How many classes a pair of splits has.

    Raises:
        UserError: they don't have the same.
    """
    if train.class_names != test.class_names:
        raise bad_field(
            "data.test_split",
            test.name,
            f"its {test.num_classes} classes are not the {train.num_classes} of {train.name}",
        )
    return train.num_classes or 0


def check_labels(
    config: ConfigDict, train: np.ndarray, test: np.ndarray, num_classes: int, section: Any = None
) -> None:
    """Checks that the labels are such that a classifier of the training images can be tested.

    Raises:
        UserError: no image, no label, labels beyond the classes, or test images of classes that no
            training image has.
    """
    data = section or config.data
    for name, labels in (("train_split", train), ("test_split", test)):
        field, split = f"data.{name}", data[name]
        if not len(labels):
            raise bad_field(field, split, "holds no image that can be decoded")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise bad_field(
                field, split, f"has labels from {low} to {high}, but {num_classes} classes"
            )
    if train.ndim > 1:
        return
    classes = np.unique(train)
    if len(classes) < 2:
        raise bad_field("data.train_split", data.train_split, "has images of one class only")
    unseen = np.setdiff1d(test, classes)
    if len(unseen) and not config.data.allow_unseen_classes:
        raise UserError(
            f"config.data.test_split={data.test_split!r}: {len(unseen)} of its classes have "
            f"no image in data.train_split={data.train_split!r} ({len(classes)} classes); "
            "--config.data.allow_unseen_classes=True counts them as wrong"
        )


def held_out_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A mask `[N]` of about `count` rows, at most a fifth; as many of each class as its share."""
    count = min(count, len(labels) // 5)
    mask = np.zeros(len(labels), bool)
    if not count:
        return mask
    rows = np.arange(len(labels))
    one_label = labels.ndim == 1
    try:
        stratify = labels if one_label else None
        _, held = train_test_split(rows, test_size=count, random_state=seed, stratify=stratify)
    except ValueError:  # a class with a single image can't be split class by class
        _, held = train_test_split(rows, test_size=count, random_state=seed)
    mask[held] = True
    return mask


# ------------------------------------------------------------------------ fast linear probe


def _check_fast(config: ConfigDict, train_images: int) -> None:
    del train_images
    check_numbers(config, "inverse_penalties", above_zero=True)
    if config.held_out_images < 1 and len(config.inverse_penalties) > 1:
        raise bad_field(
            "held_out_images",
            config.held_out_images,
            "must be at least 1 with several inverse_penalties: the best is picked on them",
        )


def fast_probe(train: Features, test: Features, num_classes: int, config: ConfigDict) -> Measured:
    """Logistic regression at each strength; the best on held-out rows is fitted to all rows."""
    fit = functools.partial(
        logistic.fit,
        train,
        num_classes,
        standardize=config.standardize,
        max_iterations=config.max_iterations,
        tolerance=config.tolerance,
    )
    penalties = tuple(config.inverse_penalties)
    held = held_out_rows(train.labels, config.held_out_images, config.seed)
    best, picked = penalties[0], {}
    if len(penalties) > 1 and held.any():
        say(f"logistic regression at {len(penalties)} strengths on {np.sum(~held):,} images")
        heads = fit(penalties, weights=(~held).astype(np.float32))
        logits = heads.logits(train.x[held])
        found = [scores.top_k(each, train.labels[held], 1) for each in logits]
        best = penalties[int(np.argmax(found))]
        say(told("C", penalties, found, best))
        picked = {"linear_probe_top1_held_out": max(found)}
    logits = fit((best,)).logits(test.x)[0]
    results = {
        f"linear_probe_{k}": v for k, v in scores.classification(logits, test.labels).items()
    }
    return Measured(results | picked | {"linear_probe_inverse_penalty": best}, logits)


def told(name: str, values: Any, found: list[float], best: Any) -> str:
    """What each value of a sweep came to on held-out images, the picked one marked."""
    each = (
        f"{name} {value:g}: {100 * top1:.1f} %" + " (picked)" * (value == best)
        for value, top1 in zip(values, found, strict=True)
    )
    return "held-out top-1: " + ", ".join(each)


fast = prepare_for(fast_probe, _check_fast)


# ------------------------------------------------------------------------------------- kNN


def _check_knn(config: ConfigDict, train_images: int) -> None:
    check_numbers(config, "neighbours", above_zero=True, whole=True)
    check_numbers(config, "temperatures", above_zero=True)
    if max(config.neighbours) > train_images:
        valid = f"must be at most the {train_images} training images"
        raise bad_field("neighbours", tuple(config.neighbours), valid)
    several = len(config.neighbours) * len(config.temperatures) > 1
    if config.held_out_images < 1 and several:
        raise bad_field(
            "held_out_images",
            config.held_out_images,
            "must be at least 1 with several neighbours or temperatures, to pick them on",
        )


def _knn(train: Features, test: Features, num_classes: int, config: ConfigDict) -> Measured:
    grid = [(k, t) for k in config.neighbours for t in config.temperatures]
    look = functools.partial(
        knn.nearest,
        k=min(max(config.neighbours), len(train.x)),
        bank_rows=config.bank_rows,
        query_rows=config.query_rows,
    )
    best, picked = grid[0], {}
    held = held_out_rows(train.labels, config.held_out_images, config.seed)
    if len(grid) > 1 and held.any():
        neighbours = look(train.x[~held], train.x[held])
        found = [
            _top1(neighbours, train.labels[~held], train.labels[held], num_classes, *pair)
            for pair in grid
        ]
        best = grid[int(np.argmax(found))]
        shown = ", ".join(
            f"k {k} T {t:g}: {100 * v:.1f} %" for (k, t), v in zip(grid, found, strict=True)
        )
        say(f"held-out top-1: {shown}")
        picked = {"knn_top1_held_out": max(found)}
    k, temperature = best
    neighbours = look(train.x, test.x)
    votes = knn.vote(neighbours, train.labels, num_classes, k=k, temperature=temperature)
    results = {f"knn_{name}": v for name, v in scores.classification(votes, test.labels).items()}
    return Measured(results | picked | {"knn_k": k, "knn_temperature": temperature}, votes)


def _top1(neighbours, labels, true, num_classes: int, k: int, temperature: float) -> float:
    votes = knn.vote(neighbours, labels, num_classes, k=k, temperature=temperature)
    return float(np.mean(votes.argmax(axis=1) == true))


nearest_neighbours = prepare_for(_knn, _check_knn)


# ------------------------------------------------------------------------------ few labels


def _check_fewshot(config: ConfigDict, train_images: int) -> None:
    del train_images
    check_numbers(config, "labels_per_class", above_zero=True, whole=True)
    if config.draws < 2:
        raise bad_field("draws", config.draws, "must be at least 2, for an interval")


def _fewshot(train: Features, test: Features, num_classes: int, config: ConfigDict) -> Measured:
    smallest = int(np.bincount(train.labels, minlength=num_classes).min())
    results: dict[str, Any] = {"fewshot_draws": config.draws}
    for count in config.labels_per_class:
        if count > smallest:
            say(f"{count} labels per class: a class with fewer images, {smallest}, gives all")
        found = linear_probe.few_shot(
            train,
            test,
            labels_per_class=count,
            draws=config.draws,
            seed=config.seed,
            inverse_penalty=config.inverse_penalty,
        )
        results[f"fewshot_{count}_top1"] = found.top1
        results[f"fewshot_{count}_ci95"] = found.ci95
        say(f"{count} labels per class: {100 * found.top1:.1f} ± {100 * found.ci95:.1f} %")
    return Measured(results)


fewshot = prepare_for(_fewshot, _check_fewshot)


def check_numbers(
    config: ConfigDict, field: str, *, above_zero: bool = False, whole: bool = False
) -> None:
    """Raises `UserError` where a field is not one or more different numbers."""
    values = config[field]
    kinds: Any = int if whole else (int, float)
    kind = "whole numbers" if whole else "numbers"
    good = isinstance(values, tuple | list) and len(values) > 0
    good = good and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)
    good = good and len(set(values)) == len(values)
    if not good or (above_zero and not all(v > 0 for v in values)):
        limit = " above 0" if above_zero else ""
        raise bad_field(field, values, f"must be one or more different {kind}{limit}, as '(1,2)'")
