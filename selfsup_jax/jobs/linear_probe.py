"""Linear evaluation: the papers' protocols, which train on augmented images, or the fast one."""

from __future__ import annotations

import functools
import os
import shutil
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import optim
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import hosts, parallel
from selfsup_jax.errors import bad_field
from selfsup_jax.evaluation import encoder, scores, supervised
from selfsup_jax.evaluation.encoder import Frozen
from selfsup_jax.evaluation.features import Extractor
from selfsup_jax.jobs import frozen_features, training
from selfsup_jax.jobs.runner import Prepared
from selfsup_jax.run.files import whole_file
from selfsup_jax.run.progress import say

_CLASSIFIER = "classifier.npz"


def prepare(config: ConfigDict, frozen: Frozen) -> Prepared:
    """The job of `config.protocol`."""
    protocols = {"fast": frozen_features.fast, "sgd": _prepare_sgd}
    if config.protocol not in protocols:
        raise bad_field("protocol", config.protocol, f"must be one of {', '.join(protocols)}")
    return protocols[config.protocol](config, frozen)


def _prepare_sgd(config: ConfigDict, frozen: Frozen) -> Prepared:
    frozen_features.check_numbers(config, "learning_rates", above_zero=True)
    parallel.check_batch(config.batch_size, config.accumulate_steps, bn_groups=1)
    if config.optimizer.name != "sgd":
        raise bad_field("optimizer.name", config.optimizer.name, "must be sgd")
    if len(config.learning_rates) > 1 and config.held_out_images < 1:
        raise bad_field(
            "held_out_images",
            config.held_out_images,
            "must be at least 1 with several learning_rates: the best is picked on them",
        )
    everything, test = training.splits(config)
    classes = frozen_features.class_count(everything, test)
    train, held = training.hold_out(config, everything)
    training.check_labels(config, train, test)
    training.total_steps(config, train.num_examples)
    extract = Extractor(
        encoder.represent(frozen.config, config.compute_dtype), *frozen.normalization
    )

    def task(frozen: Frozen, folder: str) -> dict[str, Any]:
        path = os.path.join(folder, _CLASSIFIER)
        if not os.path.exists(path):
            heads = _train_heads(config, frozen, train, classes, folder)
            if hosts.is_writer():
                with whole_file(path, "wb") as f:
                    np.savez(f, **heads)  # type: ignore[arg-type]
                # What they grew from, with a copy of the encoder, is of no more use.
                shutil.rmtree(os.path.join(folder, "checkpoints"))
            hosts.wait_for_all("heads")
        with np.load(path) as saved:
            heads = {name: saved[name] for name in ("kernel", "bias")}
        return _evaluate(config, extract, frozen, heads, held, test, classes, folder)

    counts = {"train_images": train.num_examples, "test_images": test.num_examples}
    return Prepared(task, {"classes": classes} | counts)


def _train_heads(
    config: ConfigDict, frozen: Frozen, train: Source, classes: int, folder: str
) -> dict[str, np.ndarray]:
    total, warmup = training.total_steps(config, train.num_examples)
    schedule, optimizer = optim.from_config(config.optimizer, config.batch_size, total, warmup)
    module = encoder.module(frozen.config, config.compute_dtype)
    mean, std = frozen.normalization
    rates = tuple(config.learning_rates)
    init_state = functools.partial(
        supervised.init_probes,
        variables=frozen.variables,
        num_features=module.num_features,
        num_classes=classes,
        num_heads=len(rates),
        optimizer=optimizer,
    )
    step = functools.partial(
        supervised.probe_step,
        encoder=module,
        optimizer=optimizer,
        schedule=schedule,
        learning_rates=rates,
        view=supervised.flips(config.flip_prob),
        mean=mean,
        std=std,
        accumulate_steps=config.accumulate_steps,
    )
    say(f"learning rates {', '.join(f'{rate:g}' for rate in rates)} times what follows")
    return training.train(config, train, init_state, step, folder).online_params["classifier"]


def _evaluate(
    config: ConfigDict,
    extract: Extractor,
    frozen: Frozen,
    heads: dict[str, np.ndarray],
    held: Source | None,
    test: Source,
    classes: int,
    folder: str,
) -> dict[str, Any]:
    rates = tuple(config.learning_rates)
    best, picked = 0, {}
    if held is not None:
        features = extract(
            frozen.variables, frozen_features.counted(config, held, held.num_examples)
        )
        found = [
            scores.top_k(features.x @ kernel + bias, features.labels, 1)
            for kernel, bias in zip(heads["kernel"], heads["bias"], strict=True)
        ]
        best = int(np.argmax(found))
        say(frozen_features.told("learning rate", rates, found, rates[best]))
        picked = {"linear_probe_top1_held_out": found[best]}
    features = extract(frozen.variables, frozen_features.counted(config, test, test.num_examples))
    if not hosts.is_writer():
        return {}
    logits = features.x @ heads["kernel"][best] + heads["bias"][best]
    matrix = scores.confusion(logits, features.labels)
    scores.write_confusion(folder, matrix, test.class_names or ())
    found_scores = scores.classification(logits, features.labels)
    return {
        **{f"linear_probe_{k}": v for k, v in found_scores.items()},
        **picked,
        "linear_probe_learning_rate": rates[best],
    }
