"""Pretraining by any method, from config to `results.json`."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NamedTuple

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from selfsup_jax import STARTED, optim
from selfsup_jax import config as config_lib
from selfsup_jax.build import Build, find
from selfsup_jax.data import inputs
from selfsup_jax.devices import hosts, parallel, process
from selfsup_jax.durations import to_steps
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import closing, features
from selfsup_jax.method import Method
from selfsup_jax.run import checkpoint, files, progress, workdir
from selfsup_jax.run.metrics import Recorder
from selfsup_jax.run.progress import say
from selfsup_jax.state import TrainState, encoder_variables
from selfsup_jax.training import loop, reference
from selfsup_jax.training.monitor import Monitor


class Run(NamedTuple):
    """All that the parts of a run share."""

    config: ConfigDict
    data: inputs.Data
    method: Method
    total_steps: int
    warmup_steps: int
    workdir: str
    checkpoints: checkpoint.Checkpoints
    identity: dict[str, Any]  # see `workdir.describe_run`
    started: float


def pretrain(
    config: ConfigDict, directory: str, build: Build | None = None, started: float = STARTED
) -> dict[str, Any]:
    """Trains, goes on where an earlier run in `directory` stopped, evaluates, writes the results.

    Args:
        config: see `configs/`.
        directory: the workdir; takes `config.json`, `metrics.jsonl`, checkpoints, TensorBoard
            events, `plots/` and `results.json`.
        build: the method's `build`; None for that of the package that `config.method` names.
        started: what "the start" is where it says how long the first step took to come.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: a mistake in the config, the data or the workdir; a loss or gradient that is not
            finite; a disk that takes no more.
        Stopped: after SIGTERM or Ctrl-C, once the step just done is saved.
    """
    config = config.copy_and_resolve_references()
    build = build or find(config.method)
    config_lib.validate(config)
    reference.load(config.monitor.reference)  # that there is one of that name
    data = inputs.load_data(config)
    config_lib.check_batch_fits(config, data.train.num_examples)
    lengths = _lengths(config, data.train.num_examples)
    method = build(config, data.train.num_classes, *lengths)
    identity = workdir.describe_run(config, data)
    with workdir.opened(config, directory) as checkpoints:
        run = Run(config, data, method, *lengths, directory, checkpoints, identity, started)
        with files.disk_errors(directory, checkpoints.committed_step):
            return _pretrain(run)


def _pretrain(run: Run) -> dict[str, Any]:
    if run.checkpoints.latest_step is not None:
        saved = run.checkpoints.meta()
        workdir.check_same_run(run.identity, saved, run.workdir)
        workdir.take_over(run.data, saved)
    workdir.write_config(run.identity, run.workdir)
    initial = jax.device_get(jax.jit(run.method.init_state)(jax.random.PRNGKey(run.config.seed)))
    fresh = run.checkpoints.latest_step is None
    latest = initial if fresh else run.checkpoints.restore(initial)
    first_step = int(latest.step)
    _announce(run, latest, first_step)

    recorder = Recorder(run.workdir, first_step)
    line = progress.Progress(run.total_steps, first_step, run.config.batch_size)
    extract = features.Extractor(
        run.method.represent, tuple(run.config.augment.mean), tuple(run.config.augment.std)
    )
    flat = workdir.flat_config(run.identity)
    try:
        monitor = Monitor(
            run.config, flat, run.data, run.method, extract, recorder, line, run.workdir
        )
        state = parallel.replicate(lambda s: s, latest)
        if first_step < run.total_steps:
            state = _train(run, state, first_step, recorder, line, monitor)
        elif run.config.monitor.plots_every_steps:  # stopped between its last save and pictures
            monitor.draw(first_step, state, batch=None)
    finally:
        line.close()
        recorder.close()
    speed = {"images_per_second": line.images_per_second} if line.images_per_second else {}
    results = _evaluate(run, state, initial, extract) | monitor.results() | speed
    steps = max(first_step, run.total_steps)
    return _write_results(run, results | {"steps": steps} | process.device_memory())


# ------------------------------------------------------------------------------- set-up


def _lengths(config: ConfigDict, num_examples: int) -> tuple[int, int]:
    """Steps of the run, and of its warm-up."""
    batch = config.batch_size
    total = to_steps(config, num_examples, batch)
    warmup = to_steps(config.optimizer, num_examples, batch, prefix="warmup_", path="optimizer.")
    if total < 1:
        raise UserError("config.epochs, .examples and .steps come to no step at all")
    if warmup >= total:
        say(f"the warm-up of {warmup} steps is longer than the run of {total}")
    profile = config.profile
    if profile.first_step + profile.num_steps > total and profile.first_step:
        raise bad_field(
            "profile.first_step",
            profile.first_step,
            f"must leave profile.num_steps={profile.num_steps} of the run's {total} steps",
        )
    return total, warmup


def _announce(run: Run, state: TrainState, first: int) -> None:
    config, data = run.config, run.data
    params = state.online_params
    sizes = {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in params.items()}
    if hosts.is_writer():
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        with open(os.path.join(run.workdir, "parameters.txt"), "w") as f:
            f.write(table + "\n")
    labels = f"{data.train.num_classes} classes" if data.train.num_classes else "no labels"
    kinds = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        kinds += f" on {jax.process_count()} hosts"
    epochs = run.total_steps / (data.train.num_examples // config.batch_size)
    say(f"{config.method}: {data.train.name}: {data.train.num_examples:,} images, {labels}")
    say(
        f"{run.total_steps:,} steps of {config.batch_size} images ({epochs:,.4g} epochs) on "
        f"{kinds}; {sum(sizes.values()):,} parameters: "
        + ", ".join(f"{k} {v:,}" for k, v in sizes.items())
    )
    say(optim.describe(config.optimizer, config.batch_size, run.total_steps, run.warmup_steps))
    for note in run.method.notes:
        say(note)
    if first:
        say(f"going on from step {first:,} in {run.workdir}")


# ----------------------------------------------------------------------------- training


def _train(
    run: Run,
    state: TrainState,
    first_step: int,
    recorder: Recorder,
    line: progress.Progress,
    monitor: Monitor,
) -> TrainState:
    """Steps from `first_step` to the last. Returns the state after it, which is saved."""
    work = loop.Work(
        config=run.config,
        train_step=run.method.train_step,
        batches=inputs.train_batches(run.config, run.data, first_step),
        total_steps=run.total_steps,
        workdir=run.workdir,
        checkpoints=run.checkpoints,
        meta=lambda step: workdir.meta(run.identity, step, run.data.undecodable.names),
        started=run.started,
    )
    return loop.train(work, state, first_step, recorder, line, monitor)


# --------------------------------------------------------------------------- evaluation


def _evaluate(run: Run, state: TrainState, initial: TrainState, extract: Any) -> dict[str, Any]:
    """Probes of the last step's encoder; nothing where there are no labels to probe with."""
    config = run.config
    if run.data.test is None:
        why = "no labels to probe with" if config.eval.enabled else "config.eval.enabled=False"
        say(f"{why}: no probes; the encoder is in the last checkpoint")
        return {}
    return closing.evaluate(
        extract,
        parallel.unreplicate(encoder_variables(state)),
        # The encoder exactly as this run's training found it.
        encoder_variables(initial) if config.eval.random_init else None,
        inputs.eval_batches(
            config.data, run.data.train, config.eval.batch_size, config.eval.max_train_images
        ),
        inputs.eval_batches(
            config.data, run.data.test, config.eval.batch_size, config.eval.max_test_images
        ),
        config.eval,
        config.seed,
    )


def _write_results(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    path = os.path.join(run.workdir, "results.json")
    if "images_per_second" not in results and os.path.exists(path):
        with open(path) as f:  # nothing was trained this time: the speed is an earlier process's
            earlier = json.load(f)
        results |= {k: v for k, v in earlier.items() if k == "images_per_second"}
    results |= {
        "method": run.config.method,
        "seed": run.config.seed,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "undecodable_images": len(run.data.undecodable.names),
    }
    if hosts.is_writer():
        files.write_json(path, results)
        if "knn_top1" in results:
            say(f"top-1 on held-out images, encoder of step {results['steps']}:")
            say(closing.summary(results))
        say(f"wrote {path}")
    hosts.wait_for_all("results")
    return results
