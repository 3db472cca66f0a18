"""Fine-tunes the encoder with all labels or a part of them."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import checks, durations, optim, paths
from selfsup_jax.data import sources
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.devices import hosts, parallel
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import encoder, scores, supervised
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.evaluation.features import Extractor
from selfsup_jax.jobs import frozen_features, training
from selfsup_jax.jobs.runner import EvalJob
from selfsup_jax.run.progress import log


def prepare(config: ConfigDict, frozen: FrozenEncoder) -> EvalJob:
    """Prepares the job of `configs/finetune.py`."""
    checks.equals(config, "views.global.count", 1, "the job trains on one view of each image")
    if config.features:
        raise bad_field("features", config.features, "must be '': the encoder is trained as it is")
    parallel.check_batch(config.batch_size, config.accumulate_steps, config.bn_groups)
    wanted = _read_list(config.label_list) if config.label_list else None
    everything, test = training.splits(config)
    classes = frozen_features.class_count(everything, test)
    train = everything
    if wanted is not None:
        train = sources.subset(everything, functools.partial(_named, wanted, config.label_list))
    elif config.label_share < 1:
        train = sources.subset(
            everything, lambda labels, _: balanced(labels, config.label_share, config.seed)
        )
    training.check_labels(config, train, test)
    durations.total_and_warmup(config, train.num_examples)  # raises if they are invalid
    log(f"{train.num_examples:,} of {everything.num_examples:,} images with labels")
    module = encoder.module(frozen.config, config.compute_dtype)

    def logits(variables: Any, images: Any) -> Any:
        params, stats = variables
        return supervised.classify(params, stats, images, encoder=module, num_classes=classes)[0]

    extract = Extractor(logits, *frozen.normalization)

    def task(frozen: FrozenEncoder, folder: str) -> dict[str, Any]:
        state = _train(config, frozen, train, classes, folder)
        outputs = extract(
            (state.online_params, state.online_stats),
            frozen_features.counted(config, test, test.num_examples),
        )
        if not hosts.is_writer():
            return {}
        of_test = np.asarray(outputs.x)
        matrix = scores.confusion(of_test, outputs.labels)
        scores.write_confusion(folder, matrix, test.class_names or ())
        return scores.named("finetune", of_test, outputs.labels)

    counts = {"train_images": train.num_examples, "test_images": test.num_examples}
    return EvalJob(task, {"classes": classes} | counts)


def balanced(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draws the same number of images of each class, at least one, about `share` of them all.

    Args:
        labels: `[N]`.
        share: above 0.
        seed: of the draw. With the same seed, a larger share includes a smaller share's images.

    Returns:
        Sorted indices of the examples. A class with fewer images contributes all of them.
    """
    classes = np.unique(labels)
    per_class = max(1, round(share * len(labels) / len(classes)))
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:per_class] for label in classes]
    return np.sort(np.concatenate(drawn))


def _read_list(path: str) -> set[str]:
    try:
        with paths.open(os.path.expanduser(path), encoding="utf-8") as f:
            names = {line.strip() for line in f} - {""}
    except (OSError, UnicodeDecodeError) as e:
        raise bad_field("label_list", path, f"cannot be read: {e}") from e
    if not names:
        raise bad_field("label_list", path, "names no file")
    return names


def _named(wanted: set[str], path: str, labels: np.ndarray, names: list[str]) -> np.ndarray:
    """Indices of the examples whose path ends with an entry of the list `wanted`."""
    del labels
    lengths = {len(name.split("/")) for name in wanted}
    matches: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        parts = name.split(os.sep)
        for length in lengths:
            end = "/".join(parts[-length:])
            if end in wanted and length <= len(parts):
                matches.setdefault(end, []).append(i)
    missing = sorted(wanted - matches.keys())
    if missing:
        raise UserError(
            f"config.label_list={path!r}: {len(missing)} of its {len(wanted)} files are not in the "
            f"training split, such as {missing[0]}; the split has {os.path.basename(names[0])}"
        )
    unclear = [name for name, indices in matches.items() if len(indices) > 1]
    if unclear:
        first, *_, last = (names[i] for i in matches[unclear[0]])
        raise UserError(
            f"config.label_list={path!r}: {unclear[0]} may be {first} or {last}; give more of its "
            "path"
        )
    return np.sort(np.concatenate(list(matches.values())))


def _train(
    config: ConfigDict, frozen: FrozenEncoder, train: sources.Source, classes: int, folder: str
) -> Any:
    total, warmup = durations.total_and_warmup(config, train.num_examples)
    schedule, body = optim.from_config(config.optimizer, config.batch_size, total, warmup)
    head_config = ConfigDict(config.optimizer.to_dict())
    head_config.learning_rate = config.head_learning_rate
    head_config.exclude = ("bias$",) if config.optimizer.exclude else ()
    _, head = optim.from_config(head_config, config.batch_size, total, warmup)
    optimizer = supervised.finetune_optimizer(body, head, config.layer_decay)
    module = encoder.module(frozen.config, config.compute_dtype)
    init_state = functools.partial(
        supervised.init_finetune,
        variables=frozen.variables,
        num_features=module.num_features,
        num_classes=classes,
        optimizer=optimizer,
    )
    step = functools.partial(
        supervised.finetune_step,
        encoder=module,
        num_classes=classes,
        optimizer=optimizer,
        schedule=schedule,
        augment=Augmentation.from_config(config.views),
        train_batch_norm=config.train_batch_norm,
        bn_groups=config.bn_groups,
        accumulate_steps=config.accumulate_steps,
    )
    log(
        f"taken: encoder; new: classifier ({module.num_features} features, {classes} classes), "
        "optimizer; nothing else of the source is used"
    )
    log(f"the classifier's learning rate: {config.head_learning_rate:g} in place of the encoder's")
    return training.train(config, train, init_state, step, folder)
