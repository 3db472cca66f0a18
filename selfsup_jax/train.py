"""The only training loop: pretraining by any method, from config to `results.json`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from selfsup_jax import STARTED, checkpoint, metrics, parallel
from selfsup_jax import config as config_lib
from selfsup_jax.data import crops, pipeline, sources
from selfsup_jax.durations import to_steps
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import final
from selfsup_jax.metrics import say
from selfsup_jax.state import Method, TrainState, encoder_variables

# `(config, num_classes or None, total_steps, warmup_steps) -> Method`
Build = Callable[[ConfigDict, int | None, int, int], Method]


class Data(NamedTuple):
    """The splits of a run."""

    train: sources.Source
    test: sources.Source | None  # None where there is nothing to probe
    undecodable: pipeline.Undecodable


def pretrain(config: ConfigDict, workdir: str, build: Build) -> dict[str, Any]:
    """Trains, goes on where an earlier run in `workdir` stopped, evaluates, writes the results.

    Args:
        config: see `configs/`.
        workdir: takes `config.json`, checkpoints, TensorBoard events and `results.json`.
        build: the method's `build`.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: a mistake in the config, the data or the workdir.
    """
    config = config.copy_and_resolve_references()
    config_lib.validate(config)
    data = load_data(config)
    config_lib.check_batch_fits(config, data.train.num_examples)
    total_steps = to_steps(config, data.train.num_examples, config.batch_size)
    warmup_steps = to_steps(
        config.optimizer,
        data.train.num_examples,
        config.batch_size,
        prefix="warmup_",
        path="optimizer.",
    )
    if total_steps < 1:
        raise UserError("config.epochs, .examples and .steps come to no step at all")
    if warmup_steps >= total_steps:
        say(f"the warm-up of {warmup_steps} steps is longer than the run of {total_steps}")
    checkpoints = prepare_workdir(config, data, workdir)
    method = build(config, data.train.num_classes, total_steps, warmup_steps)
    initial = jax.device_get(jax.jit(method.init_state)(jax.random.PRNGKey(config.seed)))
    latest = initial if checkpoints.latest_step is None else checkpoints.restore(initial)
    first_step = int(latest.step)
    _announce(config, data, latest, workdir, first_step, total_steps)
    state = parallel.replicate(lambda s: s, latest)
    try:
        state, speed = _train(
            config, data, method, state, checkpoints, workdir, first_step, total_steps
        )
    finally:
        checkpoints.close()

    results = _evaluate(config, data, method, state, initial) | speed | {"steps": total_steps}
    return _write_results(config, data, results, workdir)


# ------------------------------------------------------------------------------- set-up


def load_data(config: ConfigDict) -> Data:
    """The training split and, where there are labels, the held-out one; fills in empty splits."""
    data = config.data
    options: dict[str, Any] = {}
    if data.name not in sources.EMBEDDED:
        options = {
            "download": data.download,
            "cache_gib": data.cache_gib,
            "shuffle_buffer": data.shuffle_buffer,
        }
    if data.download and not parallel.is_writer():
        parallel.wait_for_all("prepared")  # one host prepares, the others find it done
    chosen = not data.train_split
    if not (data.train_split and data.test_split):
        train_split, test_split = sources.choose_splits(data.name, data.dir, data.download)
        data.train_split = data.train_split or train_split
        data.test_split = data.test_split or test_split
    train = sources.load(data.name, data.dir, data.train_split, "data.train_split", **options)
    if data.download and parallel.is_writer():
        parallel.wait_for_all("prepared")
    if chosen and not train.num_classes and data.train_split == "train[:90%]":
        # Without labels there is nothing to hold images out for.
        data.train_split, data.test_split = "train", "train[:0]"
        train = sources.load(data.name, data.dir, "train", "data.train_split", **options)
    test = None
    if train.num_classes and config.eval.enabled:
        test = sources.load(data.name, data.dir, data.test_split, "data.test_split", **options)
        if not test.num_classes:
            logging.warning("%s has no labels: no probes", test.name)
            test = None
    undecodable = pipeline.Undecodable(train.num_examples, data.max_undecodable)
    return Data(train, test, undecodable)


def train_batches(config: ConfigDict, data: Data, first_step: int) -> Iterator[pipeline.HostBatch]:
    """This host's part of each global batch from `first_step` on, without end."""
    spec = crops.CropSpec(
        config.data.image_size,
        tuple(config.data.crop_area),
        tuple(config.data.crop_aspect),
        config.data.resize_method,
    )
    return pipeline.train_batches(
        data.train,
        spec,
        seed=config.seed,
        batch_size=config.batch_size,
        positions=parallel.host_positions(config.batch_size, config.accumulate_steps),
        first_step=first_step,
        undecodable=data.undecodable,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def prepare_workdir(config: ConfigDict, data: Data, workdir: str) -> checkpoint.Checkpoints:
    """Makes the workdir and writes `config.json`, or checks that it is this run's."""
    if "://" in workdir:
        raise UserError(f"--workdir={workdir}: must be a path; mount the bucket to write to it")
    try:
        os.makedirs(workdir, exist_ok=True)
        parallel.wait_for_all("workdir")
        checkpoints = checkpoint.Checkpoints(workdir, config.keep_checkpoints)
        going_on = checkpoints.latest_step is not None
        if len(set(parallel.gather_hosts(np.asarray([checkpoints.latest_step or 0])))) > 1:
            raise UserError(f"--workdir={workdir}: the hosts see different checkpoints there")
        found = {"train_images": data.train.num_examples, "classes": data.train.num_classes}
        config_lib.write_or_check(config, workdir, going_on=going_on, found=found)
        return checkpoints
    except OSError as e:
        raise UserError(f"--workdir={workdir}: cannot be written to: {e.strerror}") from e


def _announce(
    config: ConfigDict, data: Data, state: TrainState, workdir: str, first: int, total: int
) -> None:
    params = state.online_params
    sizes = {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in params.items()}
    if parallel.is_writer():
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        with open(os.path.join(workdir, "parameters.txt"), "w") as f:
            f.write(table + "\n")
    labels = f"{data.train.num_classes} classes" if data.train.num_classes else "no labels"
    kinds = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        kinds += f" on {jax.process_count()} hosts"
    say(f"{config.method}: {data.train.name}: {data.train.num_examples:,} images, {labels}")
    say(
        f"{total:,} steps of {config.batch_size} images on {kinds}; parameters: "
        + ", ".join(f"{k} {v:,}" for k, v in sizes.items())
    )
    if first:
        say(f"going on from step {first:,} in {workdir}")


# ----------------------------------------------------------------------------- training


def _train(
    config: ConfigDict,
    data: Data,
    method: Method,
    state: TrainState,
    checkpoints: checkpoint.Checkpoints,
    workdir: str,
    first_step: int,
    total_steps: int,
) -> tuple[TrainState, dict[str, float]]:
    """Steps from `first_step` to `total_steps`. Returns the last state, and how fast it went."""
    if first_step >= total_steps:
        return state, {}
    step_fn = parallel.pmap_step(method.train_step)
    batches = train_batches(config, data, first_step)
    writer = metrics.create_writer(workdir)
    progress = metrics.Progress(total_steps, first_step, config.batch_size)
    try:
        for step in range(first_step + 1, total_steps + 1):
            state, step_metrics = step_fn(state, parallel.shard(next(batches)))
            last = step == total_steps
            if step == first_step + 1:
                jax.block_until_ready(state.step)
                say(f"first step done {time.perf_counter() - STARTED:.1f} s after the start")
                progress.restart(step)
            log = step % config.log_every_steps == 0 or last
            save = step % config.checkpoint_every_steps == 0 or last
            if log or save:
                values = {k: float(v) for k, v in parallel.unreplicate(step_metrics).items()}
                if not math.isfinite(values["loss"]):
                    raise _diverged(values["loss"], step, config, checkpoints.latest_step)
            if log:
                rate = progress.show(step, values)
                writer.write_scalars(step, values | ({"images_per_second": rate} if rate else {}))
            if save:
                began = time.perf_counter()
                checkpoints.save(state)
                progress.leave_out(time.perf_counter() - began)
    finally:
        progress.close()
        writer.flush()
        writer.close()
    return state, {"images_per_second": progress.images_per_second}


def _diverged(loss: float, step: int, config: ConfigDict, saved: int | None) -> UserError:
    rate = config.optimizer.learning_rate
    where = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
    return UserError(
        f"config.optimizer.learning_rate={rate!r}: the loss is {loss} at step {step}, try a lower "
        f"one; {where}"
    )


# --------------------------------------------------------------------------- evaluation


def _evaluate(
    config: ConfigDict, data: Data, method: Method, state: TrainState, initial: TrainState
) -> dict[str, Any]:
    """Probes of the last step's encoder; nothing where there are no labels to probe with."""
    if data.test is None:
        why = "no labels to probe with" if config.eval.enabled else "config.eval.enabled=False"
        say(f"{why}: no probes; the encoder is in the last checkpoint")
        return {}

    def batches(source: sources.Source, limit: int) -> final.Batches:
        undecodable = pipeline.Undecodable(source.num_examples, config.data.max_undecodable)
        return lambda: pipeline.eval_batches(
            source,
            resize=config.data.test_resize,
            size=config.data.image_size,
            method=config.data.resize_method,
            batch_size=config.eval.batch_size,
            limit=limit,
            undecodable=undecodable,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )

    trained = jax.device_get(encoder_variables(parallel.unreplicate(state)))
    # The encoder exactly as this run's training found it.
    untrained = encoder_variables(initial) if config.eval.random_init else None
    return final.evaluate(
        method.represent,
        trained,
        untrained,
        batches(data.train, config.eval.max_train_images),
        batches(data.test, config.eval.max_test_images),
        config.eval,
        tuple(config.augment.mean),
        tuple(config.augment.std),
        config.seed,
    )


def _write_results(
    config: ConfigDict, data: Data, results: dict[str, Any], workdir: str
) -> dict[str, Any]:
    path = os.path.join(workdir, "results.json")
    if "images_per_second" not in results and os.path.exists(path):
        with open(path) as f:  # nothing was trained this time: the speed is an earlier process's
            results["images_per_second"] = json.load(f).get("images_per_second")
    results |= {
        "method": config.method,
        "seed": config.seed,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "undecodable_images": len(data.undecodable.names),
    }
    if parallel.is_writer():
        with open(path + ".partial", "w") as f:
            json.dump(results, f, indent=2, sort_keys=True)
            f.write("\n")
        os.replace(path + ".partial", path)
        if "knn_top1" in results:
            say(f"top-1 on held-out images, encoder of step {results['steps']}:")
            say(final.summary(results))
        say(f"wrote {path}")
    parallel.wait_for_all("results")
    return results
