"""Linear evaluation: SGD on augmented images, as in the papers, or the fast protocol."""

from __future__ import annotations

import functools
import os
import zipfile
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import checks, durations, optim, paths
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import hosts, parallel
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import logistic, probes, representations, scores, supervised
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.evaluation.features import Extractor
from selfsup_jax.jobs import frozen_features, runner, training
from selfsup_jax.jobs.runner import EvalJob
from selfsup_jax.run.files import whole_file
from selfsup_jax.run.progress import log

_CLASSIFIER = "classifier.npz"


def prepare(config: ConfigDict, frozen: FrozenEncoder) -> EvalJob:
    """Prepares the job of `config.protocol`."""
    protocols = {"fast": frozen_features.linear, "sgd": _prepare_sgd}
    if ("C" in config) != (config.protocol == "fast"):
        raise bad_field("protocol", config.protocol, "has other fields: take a preset of its own")
    return protocols[config.protocol](config, frozen)


def _prepare_sgd(config: ConfigDict, frozen: FrozenEncoder) -> EvalJob:
    checks.equals(config, "views.global.count", 1, "the job trains on one view of each image")
    frozen_features.check_held_out(config, len(config.learning_rates), "learning_rates")
    parallel.check_batch(config.batch_size, config.accumulate_steps, bn_groups=1)
    if config.optimizer.name != "sgd":
        raise bad_field("optimizer.name", config.optimizer.name, "must be sgd")
    everything, test = training.splits(config)
    classes = frozen_features.class_count(everything, test)
    train, held = training.hold_out(config, everything)
    training.check_labels(config, train, test)
    durations.total_and_warmup(config, train.num_examples)  # raises if they are invalid
    extract = runner.extractor(config, frozen)

    def task(frozen: FrozenEncoder, folder: str) -> dict[str, Any]:
        path = os.path.join(folder, _CLASSIFIER)
        if not paths.exists(path):
            heads = _train_heads(config, frozen, train, classes, folder)
            if hosts.is_writer():
                with whole_file(path, "wb") as f:
                    np.savez(f, **heads)  # type: ignore[arg-type]
                # The checkpoints, which include the encoder, are no longer needed.
                paths.rmtree(os.path.join(folder, "checkpoints"))
            hosts.wait_for_all("heads")
        heads = _read_heads(path, len(config.learning_rates), classes)
        return _evaluate(config, extract, frozen, heads, held, test, folder)

    counts = {"train_images": train.num_examples, "test_images": test.num_examples}
    return EvalJob(task, {"classes": classes} | counts)


def _read_heads(path: str, num_heads: int, classes: int) -> dict[str, np.ndarray]:
    """The trained classifiers; raises `UserError` if the file is damaged."""
    try:
        with paths.local_copy(path) as file, np.load(file, allow_pickle=False) as saved:
            heads = {name: saved[name] for name in ("kernel", "bias")}
        if heads["bias"].shape != (num_heads, classes) or heads["kernel"].ndim != 3:
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in heads.items())
            raise ValueError(f"{shapes} for {num_heads} classifiers of {classes} classes")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: cannot be read: {e}; move it away to train it again") from e
    return heads


def _train_heads(
    config: ConfigDict, frozen: FrozenEncoder, train: Source, classes: int, folder: str
) -> dict[str, np.ndarray]:
    total, warmup = durations.total_and_warmup(config, train.num_examples)
    schedule, optimizer = optim.from_config(config.optimizer, config.batch_size, total, warmup)
    of_job = representations.of(frozen.config, config.compute_dtype, config.features)
    rates = tuple(config.learning_rates)
    init_state = functools.partial(
        supervised.init_probes,
        variables=frozen.variables,
        num_features=of_job.num_features,
        num_classes=classes,
        num_heads=len(rates),
        optimizer=optimizer,
    )
    step = functools.partial(
        supervised.probe_step,
        represent=of_job.apply,
        optimizer=optimizer,
        schedule=schedule,
        learning_rates=rates,
        augment=Augmentation.from_config(config.views),
        accumulate_steps=config.accumulate_steps,
    )
    log(f"learning rates {', '.join(f'{rate:g}' for rate in rates)} times what follows")
    return training.train(config, train, init_state, step, folder).online_params["classifier"]


def _evaluate(
    config: ConfigDict,
    extract: Extractor,
    frozen: FrozenEncoder,
    heads: dict[str, np.ndarray],
    held: Source | None,
    test: Source,
    folder: str,
) -> dict[str, Any]:
    rates = tuple(config.learning_rates)

    def logits(source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Of all heads `[S, N, C]`, and the labels."""
        features = frozen_features.features(config, extract, frozen, source)
        return logistic.logits(heads["kernel"], heads["bias"], features.x), features.labels

    def top1() -> list[float]:
        if held is None:
            return []
        of_heads, labels = logits(held)
        return [scores.top_k(of_head, labels, 1) for of_head in of_heads]

    best, chosen = probes.best_of(
        rates if held else rates[:1], top1, lambda rate: f"learning rate {rate:g}"
    )
    of_heads, labels = logits(test)
    of_test = of_heads[rates.index(best)]
    if not hosts.is_writer():
        return {}
    scores.write_confusion(folder, scores.confusion(of_test, labels), test.class_names or ())
    results: dict[str, Any] = scores.named("linear_probe", of_test, labels)
    if chosen is not None:
        results["linear_probe_top1_held_out"] = chosen
    return results | {"linear_probe_learning_rate": best}
