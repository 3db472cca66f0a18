"""Jobs on the frozen features of two splits: fast linear probe, kNN, few labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from selfsup_jax.data import inputs
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import probes, scores
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.evaluation.features import Extractor, Features
from selfsup_jax.evaluation.probes import Measured
from selfsup_jax.jobs import runner
from selfsup_jax.jobs.runner import EvalJob
from selfsup_jax.run import progress
from selfsup_jax.run.progress import log

# `(train, test, classes, config) -> Measured`
Measure = Callable[[Features, Features, int, ConfigDict], Measured]


def prepare_for(
    measure: Measure, check: Callable[[ConfigDict, int], None] = lambda config, train_images: None
) -> Callable[[ConfigDict, FrozenEncoder], EvalJob]:
    """Returns the `Prepare` of a job that uses the features of a training and a test split."""

    def prepare(config: ConfigDict, frozen: FrozenEncoder) -> EvalJob:
        inputs.fill_in_splits(config.data)
        train = runner.load_split(config, config.data.train_split, "data.train_split")
        test = runner.load_split(config, config.data.test_split, "data.test_split")
        num_classes = class_count(train, test)
        limit = min(config.data.max_train_images or train.num_examples, train.num_examples)
        check(config, limit)
        extract = runner.extractor(config, frozen)

        def task(frozen: FrozenEncoder, folder: str) -> dict[str, Any]:
            bank = features(config, extract, frozen, train, limit)
            queries = features(config, extract, frozen, test)
            check_labels(config, bank.labels, queries.labels, num_classes)
            measured = measure(bank, queries, num_classes, config)
            if measured.logits is not None and hosts.is_writer():
                matrix = scores.confusion(measured.logits, queries.labels)
                scores.write_confusion(folder, matrix, train.class_names or ())
            return measured.results

        counts = {"train_images": limit, "test_images": test.num_examples}
        return EvalJob(task, {"classes": num_classes} | counts)

    return prepare


def counted(config: ConfigDict, source: Source, limit: int) -> Iterable[dict[str, np.ndarray]]:
    """Evaluation batches of a split, each image once; logs the progress."""
    batches = inputs.eval_batches(config.data, source, config.feature_batch_size, limit)()
    return progress.counted(batches, min(limit, source.num_examples), f"features of {source.name}")


def features(
    config: ConfigDict, extract: Extractor, frozen: FrozenEncoder, source: Source, limit: int = 0
) -> Features:
    """An encoder's features of a split, or of `limit` of its images, spread over all devices."""
    count = min(limit or source.num_examples, source.num_examples)
    return extract.spread(frozen.variables, counted(config, source, count), count)


def class_count(train: Source, test: Source) -> int:
    """The number of classes of a pair of splits.

    Raises:
        UserError: the splits have different classes.
    """
    if train.class_names != test.class_names:
        why = f"its {test.num_classes} classes are not the {train.num_classes} of {train.name}"
        raise bad_field("data.test_split", test.name, why)
    return train.num_classes or 0


def check_labels(
    config: ConfigDict, train: np.ndarray, test: np.ndarray, num_classes: int, section: Any = None
) -> None:
    """Checks that the test labels can evaluate a classifier of the training images.

    Raises:
        UserError: no image, labels out of range, a single training class, or test classes without
            a training image (unless `config.data.allow_unseen_classes`).
    """
    data = section or config.data
    for name, labels in (("train_split", train), ("test_split", test)):
        field, split = f"data.{name}", data[name]
        if not len(labels):
            raise bad_field(field, split, "holds no image that can be decoded")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            why = f"has labels from {low} to {high}, but {num_classes} classes"
            raise bad_field(field, split, why)
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


# ------------------------------------------------------------------------ the measures


def _linear(train: Features, test: Features, num_classes: int, config: ConfigDict) -> Measured:
    return probes.linear(
        train,
        test,
        num_classes,
        C=tuple(config.C),
        held_out_images=config.held_out_images,
        seed=config.seed,
        standardize=config.standardize,
        max_iterations=config.max_iterations,
        tolerance=config.tolerance,
    )


def _check_knn(config: ConfigDict, train_images: int) -> None:
    if max(config.neighbours) > train_images:
        valid = f"must be at most the {train_images} training images"
        raise bad_field("neighbours", tuple(config.neighbours), valid)
    check_held_out(config, len(config.neighbours) * len(config.temperatures), "neighbours")


def _knn(train: Features, test: Features, num_classes: int, config: ConfigDict) -> Measured:
    return probes.nearest_neighbours(
        train,
        test,
        num_classes,
        k=tuple(config.neighbours),
        temperatures=tuple(config.temperatures),
        held_out_images=config.held_out_images,
        seed=config.seed,
        bank_rows=config.bank_rows,
        query_rows=config.query_rows,
    )


def _fewshot(train: Features, test: Features, num_classes: int, config: ConfigDict) -> Measured:
    smallest = int(np.bincount(train.labels, minlength=num_classes).min())
    results: dict[str, Any] = {"fewshot_draws": config.draws}
    for count in config.labels_per_class:
        if count > smallest:
            log(f"{count} labels per class: the smallest class gives all of its {smallest} images")
        result = probes.few_labels(
            train, test, labels_per_class=count, draws=config.draws, seed=config.seed, C=config.C
        )
        results |= {f"fewshot_{count}_top1": result.top1, f"fewshot_{count}_ci95": result.ci95}
        log(f"{count} labels per class: {100 * result.top1:.1f} ± {100 * result.ci95:.1f} %")
    return Measured(results)


def check_held_out(config: ConfigDict, choices: int, field: str) -> None:
    """Checks that there are held-out images if there are several values to choose from."""
    if choices > 1 and config.held_out_images < 1:
        valid = f"must be at least 1 with several {field}: the best is chosen on these images"
        raise bad_field("held_out_images", config.held_out_images, valid)


linear = prepare_for(_linear, lambda config, _: check_held_out(config, len(config.C), "C"))
nearest_neighbours = prepare_for(_knn, _check_knn)
fewshot = prepare_for(_fewshot)
