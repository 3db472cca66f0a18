"""Linear transfer: logistic regression on frozen features of many data sets, in one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import paths
from selfsup_jax.data import inputs, sources
from selfsup_jax.devices import hosts
from selfsup_jax.errors import NoData, UserError, bad_field
from selfsup_jax.evaluation import logistic, probes, scores
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.evaluation.features import Extractor, Features
from selfsup_jax.jobs import frozen_features, runner
from selfsup_jax.jobs.runner import EvalJob
from selfsup_jax.run import files
from selfsup_jax.run.progress import log

Metric = Callable[[np.ndarray, np.ndarray], float]  # `(logits [N, C], labels) -> fraction`
METRICS: dict[str, Metric] = {
    "top1": lambda logits, labels: scores.top_k(logits, labels, 1),
    "mean_per_class": lambda logits, labels: scores.mean_per_class(
        scores.confusion(logits, labels)
    ),
    "voc_map": scores.voc_map,
}
_HEADINGS = {"top1": "top-1", "mean_per_class": "mean per class", "voc_map": "VOC mAP"}


_DONE = "sets.json"  # results of the finished data sets, which a resume skips


class Splits(NamedTuple):
    """The splits of a data set; if `validation` is None, it is drawn from the training images."""

    train: sources.Source
    validation: sources.Source | None
    test: sources.Source


def prepare(config: ConfigDict, frozen: FrozenEncoder) -> EvalJob:
    """Prepares the job of `configs/transfer.py`."""
    unknown = [name for name in config.only if name not in config.sets]
    if unknown or not config.only:
        there = ", ".join(config.sets)
        raise bad_field("only", tuple(config.only), f"must be one or more of {there}")
    for name in config.only:
        metric = config.sets[name].metric
        if metric not in METRICS:
            raise bad_field(f"sets.{name}.metric", metric, f"must be one of {', '.join(METRICS)}")
    present: list[str] = []
    missing: dict[str, str] = {}
    for name in config.only:
        try:
            _load(config, name)  # only a check; `task` loads them again, one at a time
            present.append(name)
        except NoData as e:
            missing[name] = str(e)
            log(f"{name} is left out: {e}")
    if not present:
        first = next(iter(missing.values()))
        raise UserError(f"config.only: none of {', '.join(missing)} is there: {first}")
    extract = runner.extractor(config, frozen)

    def task(frozen: FrozenEncoder, folder: str) -> dict[str, Any]:
        path = os.path.join(folder, _DONE)
        results = files.read_json(path) if paths.exists(path) else {}
        _check_done(results, path)
        for name in present:
            if f"transfer_{name}" not in results:
                results |= _evaluate(config, name, _load(config, name), extract, frozen)
                if hosts.is_writer():
                    _write_table(config, folder, results, missing)
        return results

    data_info = {"sets": ", ".join(present), "left_out": ", ".join(missing)}
    return EvalJob(task, data_info)


def _check_done(results: dict[str, Any], path: str) -> None:
    for name, value in results.items():
        if name.endswith("_metric"):
            score = results.get(name.removesuffix("_metric"))
            if value not in list(METRICS) or not isinstance(score, int | float):
                raise UserError(f"{path}: {name}={value!r}, {score!r}: move it away to start again")


def _load(config: ConfigDict, name: str) -> Splits:
    entry = config.sets[name]
    data = config.data.copy_and_resolve_references()
    data.name, data.dir = entry.name, entry.dir or data.dir
    data.train_split, data.test_split = entry.train_split, entry.test_split
    inputs.fill_in_splits(data)
    several = entry.metric == "voc_map"

    def load(which: str) -> sources.Source:
        split, field = entry[which], f"sets.{name}.{which}"
        source = inputs.load_split(data, split, field, several_labels=several)
        if not source.num_classes:
            raise bad_field(field, split, f"{source.name} has no labels")
        return source

    validation = load("validation_split") if entry.validation_split else None
    return Splits(load("train_split"), validation, load("test_split"))


def _evaluate(
    config: ConfigDict, name: str, splits: Splits, extract: Extractor, frozen: FrozenEncoder
) -> dict[str, Any]:
    """Evaluates one data set: the fields `transfer_NAME` and `transfer_NAME_*` of the results."""
    classes = frozen_features.class_count(splits.train, splits.test)

    train, held = _training_features(config, splits, extract, frozen)
    test = frozen_features.features(config, extract, frozen, splits.test)
    if train.labels.ndim == 1:
        try:
            frozen_features.check_labels(
                config, train.labels, test.labels, classes, config.sets[name]
            )
        except UserError as e:
            raise UserError(f"{name}: {e}") from e
    if not held.any():
        entry = config.sets[name].train_split
        raise bad_field(f"sets.{name}.train_split", entry, "too few images to pick a penalty on")
    metric = METRICS[config.sets[name].metric]

    def fit(penalties: tuple[float, ...], rows: np.ndarray) -> logistic.Heads:
        # The penalty is relative to the mean loss of the images, scikit-learn's C to the sum.
        C = [1.0 / (penalty * np.sum(rows)) for penalty in penalties]
        return logistic.fit(
            train,
            classes,
            C,
            weights=rows.astype(np.float32),
            standardize=config.standardize,
            max_iterations=config.max_iterations,
            tolerance=config.tolerance,
        )

    penalties = tuple(config.penalties)
    logits = fit(penalties, ~held).logits(train.x[held])
    validation_scores = [metric(of_head, train.labels[held]) for of_head in logits]
    best = penalties[hosts.of_first("the penalty", int(np.argmax(validation_scores)))]
    heads = fit((best,), np.ones(len(train.x), bool))
    score = metric(heads.logits(test.x)[0], test.labels)
    log(f"{name}: {100 * score:.1f} % {_HEADINGS[config.sets[name].metric]}, penalty {best:g}")
    return {
        f"transfer_{name}": score,
        f"transfer_{name}_metric": config.sets[name].metric,
        f"transfer_{name}_penalty": best,
        f"transfer_{name}_validation": max(validation_scores),
    }


def _training_features(
    config: ConfigDict, splits: Splits, extract: Extractor, frozen: FrozenEncoder
) -> tuple[Features, np.ndarray]:
    """Features of training and validation images, and `[N]` bool: on which to pick a penalty."""
    limit = config.data.max_train_images
    validation = splits.validation
    if validation is None:
        train = frozen_features.features(config, extract, frozen, splits.train, limit)
        return train, probes.held_out_rows(train.labels, len(train.labels) // 5, config.seed)
    held: list[np.ndarray] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for source, count in ((splits.train, limit), (validation, 0)):
            for batch in frozen_features.counted(config, source, count or source.num_examples):
                held.append(np.full(len(batch["label"]), source is validation))
                yield batch

    most = splits.train.num_examples + validation.num_examples
    both = extract.spread(frozen.variables, batches(), most)
    return both, hosts.gather_hosts(np.concatenate(held))


def _write_table(
    config: ConfigDict, folder: str, results: dict[str, Any], missing: dict[str, str]
) -> None:
    rows = [("data set", "metric", "test"), ("---", "---", "---")]
    for name in config.only:
        if f"transfer_{name}" in results:
            metric = _HEADINGS[results[f"transfer_{name}_metric"]]
            rows.append((name, metric, f"{100 * results[f'transfer_{name}']:.1f} %"))
    lines = [f"| {name:<12} | {metric:<14} | {value:>7} |" for name, metric, value in rows]
    lines += ["", *(f"Left out: {name}: {why}" for name, why in missing.items())]
    with files.writing_to(folder):
        paths.makedirs(folder)
        files.write_json(os.path.join(folder, _DONE), results)
        with files.whole_file(os.path.join(folder, "table.md"), encoding="utf-8") as f:
            f.write("\n".join(lines).rstrip() + "\n")
