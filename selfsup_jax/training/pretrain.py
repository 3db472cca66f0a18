"""Pretraining with any method, from the config to `results.json`."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import jax
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from selfsup_jax import STARTED, durations, optim, paths
from selfsup_jax.build import Build, find
from selfsup_jax.config import check_patterns, validate
from selfsup_jax.data import inputs
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import hosts, process
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import closing, features
from selfsup_jax.method import Method
from selfsup_jax.plan.estimate import share_of_plan
from selfsup_jax.run import checkpoint, files, identity, owner, workdir
from selfsup_jax.run.progress import log
from selfsup_jax.state import TrainState, encoder_variables
from selfsup_jax.training import ending, init_from, loop
from selfsup_jax.training.compile_only import compile_all
from selfsup_jax.training.monitor import Monitor


class Run(NamedTuple):
    """The values that the parts of a run share."""

    config: ConfigDict
    data: inputs.Data
    feed: inputs.Feed
    method: Method
    total_steps: int
    warmup_steps: int
    workdir: str
    checkpoints: checkpoint.Checkpoints
    description: dict[str, Any]  # see `workdir.describe_run`
    extract: features.Extractor
    started: float
    source: init_from.Source | None  # of a new run's first state


def pretrain(
    config: ConfigDict,
    directory: str,
    build: Build | None = None,
    started: float = STARTED,
    *,
    compile_only: bool = False,
) -> dict[str, Any]:
    """Trains (or resumes the run in `directory`), evaluates, and writes the results.

    Args:
        config: see `configs/`.
        directory: the workdir, for `config.json`, `metrics.jsonl`, checkpoints, TensorBoard
            events, `plots/` and `results.json`.
        build: the method's `build`; None for that of the package that `config.method` names.
        started: start time of the process, from `time.perf_counter`.
        compile_only: train nothing, write nothing to the workdir; see `compile_only.py`.

    Returns:
        The content of `results.json`; {} if nothing is trained.

    Raises:
        UserError: an error in the config, the data or the workdir; a loss or gradient is not
            finite; the disk is full.
        Stopped: after SIGTERM or Ctrl-C, once the current step is saved.
    """
    workdir.check_path(directory)
    owner.check(directory, "pretrain")
    config = config.copy_and_resolve_references()
    config.compute_dtype = process.compute_dtype(config.compute_dtype)
    build = build or find(config.method)
    validate(config, build)
    check_patterns(config, build)
    data = inputs.load_data(config)
    total, warmup = durations.total_and_warmup(config, data.train.num_examples)
    durations.fill_in(config, data.train.num_examples)
    _check_lengths(config, data, total, directory)
    description = workdir.describe_run(config, data.train)
    earlier = None if compile_only else ending.results_of_finished(description, directory, total)
    if (finished := hosts.of_first("the results of a finished run", earlier)) is not None:
        with workdir.locked(directory):  # no other process begins anything there meanwhile
            ending.tell_finished(finished, directory, config)
        return finished
    feed = inputs.feed(config, data.train)
    method = build(config, data.train.num_classes, total, warmup)
    _check_evaluated(config, method)
    source = None
    if config.get("init_from") and checkpoint.newest_step(directory) is None:
        source = init_from.load(config.init_from, config)
        hosts.check_same("init_from", {"config.init_from": source.digest})
    extract = features.Extractor(method.represent, config.views.mean, config.views.std)
    if compile_only:
        compile_all(config, data, feed, method, extract)
        return {}
    with workdir.opened(config, directory) as checkpoints:
        run = Run(
            *(config, data, feed, method, total, warmup, directory, checkpoints),
            *(description, extract, started, source),
        )
        with files.disk_errors(directory, checkpoints.committed_step):
            return _pretrain(run)


def _check_evaluated(config: ConfigDict, method: Method) -> None:
    if config.eval.network != "online":
        state = jax.eval_shape(method.init_state, jax.random.PRNGKey(0))
        if "encoder" not in state.target_params:
            valid = "must be online: this method has no target network"
            raise bad_field("eval.network", config.eval.network, valid)


def _check_lengths(config: ConfigDict, data: inputs.Data, total_steps: int, directory: str) -> None:
    profile, images = config.profile, data.train.num_examples
    if profile.first_step and profile.first_step + profile.num_steps > total_steps:
        steps = f"profile.num_steps={profile.num_steps} of the run's {total_steps} steps"
        raise bad_field("profile.first_step", profile.first_step, f"must leave {steps}")
    if profile.first_step and paths.is_bucket(directory):
        raise bad_field("profile.first_step", profile.first_step, "needs a --workdir on a disk")
    if config.get("queue_size", 0) > images:
        logging.warning(
            "config.queue_size=%d: more keys than the %d images, so that an image has keys of its "
            "own among its negatives; a quarter of the images would do",
            config.queue_size,
            images,
        )


def _pretrain(run: Run) -> dict[str, Any]:
    if run.checkpoints.latest_step is not None:
        saved = workdir.checked_meta(run.checkpoints.meta(), run.workdir)
        if "init_from" in saved["data_info"]:  # the source may be gone
            run.description["data_info"]["init_from"] = saved["data_info"]["init_from"]
        workdir.check_same_run(run.description, saved, run.workdir)
        run.data.undecodable.names.update(saved["undecodable"])
    else:
        owner.check_unfinished(identity.flat(workdir.config_json(run.description)), run.workdir)
    workdir.write_config(run.description, run.workdir)

    def begin(state: TrainState) -> TrainState:
        if run.source is None:
            return state
        state, told = init_from.begin(state, run.source)
        origin = {"origin": run.source.about, "digest": run.source.digest}
        run.description["data_info"]["init_from"] = origin | told._asdict()
        workdir.write_config(run.description, run.workdir)
        return state

    trained = loop.fit(
        loop.TrainSpec(
            config=run.config,
            init_state=jax.jit(run.method.init_state),
            begin=begin,
            train_step=run.method.train_step,
            batches=lambda step: inputs.train_batches(run.config, run.data, step),
            feed=run.feed,
            total_steps=run.total_steps,
            workdir=run.workdir,
            checkpoints=run.checkpoints,
            meta=lambda step: workdir.meta(run.description, step, run.data.undecodable.names),
            announce=lambda state: _announce(run, state),
            started=run.started,
            monitor=lambda recorder, progress, initial: Monitor(
                run.config,
                run.description,
                run.data,
                run.feed,
                run.method,
                run.extract,
                recorder,
                progress,
                run.workdir,
                encoder_variables(initial, run.config.eval.network),
            ),
        )
    )
    results = _evaluate(run, trained.state, trained.initial) | trained.monitor.results()
    if trained.images_per_second:
        rate = results["images_per_second"] = trained.images_per_second
        if share := share_of_plan(run.workdir, run.config.batch_size, rate):
            results["share_of_planned_speed"] = share
            log(f"{rate:,.0f} images/s: {100 * share:.0f} % of what the plan has as the most")
    results["steps"] = int(trained.state.step)
    return _write_results(run, results | process.device_memory(), trained.history)


def _announce(run: Run, state: TrainState) -> None:
    config, data = run.config, run.data
    params = state.online_params
    sizes = {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in params.items()}
    if hosts.is_writer():
        table = parameter_overview.get_parameter_overview(params, include_stats=False)
        with files.whole_file(os.path.join(run.workdir, "parameters.txt")) as f:
            f.write(table + "\n")
    labels = f"{data.train.num_classes} classes" if data.train.num_classes else "no labels"
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        devices += f" on {jax.process_count()} hosts"
    log(f"{config.method}: {data.train.name}: {data.train.num_examples:,} images, {labels}")
    length = durations.described(config, data.train.num_examples, run.total_steps)
    parts = ", ".join(f"{k} {v:,}" for k, v in sizes.items())
    log(f"{length} on {devices}; {sum(sizes.values()):,} parameters: {parts}")
    log(optim.describe(config.optimizer, config.batch_size, run.total_steps, run.warmup_steps))
    for note in run.method.notes:
        log(note)
    if run.source is not None:
        started = run.description["data_info"]["init_from"]
        log(f"starting from {run.source.path} ({started['origin']}): {started['taken']}")
        log(f"new: {started['new'] or 'nothing'}; not used: {started['left_out'] or 'nothing'}")
        if note := init_from.normalization_note(run.source, config.views):
            log(note)


def _evaluate(run: Run, state: TrainState, initial: TrainState) -> dict[str, Any]:
    """Probes the encoder of the last step; {} without labels, or if `config.eval` is disabled."""
    config, data = run.config, run.data
    if data.test is None:
        why = "no labels" if config.eval.enabled else "config.eval.enabled=False"
        log(f"{why}: no probes; the encoder is in the last checkpoint")
        return {}

    def batches(source: Source, limit: int) -> closing.Batches:
        read = inputs.eval_batches(config.data, source, config.eval.batch_size, limit)
        return closing.Batches(read, min(limit, source.num_examples))

    network = config.eval.network
    return closing.evaluate(
        run.extract,
        encoder_variables(state, network),
        # The encoder exactly as it was before this run's first step.
        encoder_variables(initial, network) if config.eval.random_init else None,
        batches(data.train, config.eval.max_train_images),
        batches(data.test, config.eval.max_test_images),
        data.train.num_classes or 0,
        config.eval,
        config.seed,
    )


def _write_results(run: Run, results: dict[str, Any], history: Any) -> dict[str, Any]:
    path = os.path.join(run.workdir, "results.json")
    if "images_per_second" not in results and paths.exists(path):
        # No step was left to train: keep the speed that an earlier process measured.
        try:
            earlier = files.read_json(path)
        except UserError as e:
            log(f"{str(e).rpartition(';')[0]}; it is written anew, without the speed")
            earlier = {}
        results |= {k: v for k, v in earlier.items() if k == "images_per_second"}
    results |= {"method": run.config.method, "seed": run.config.seed} | process.devices()
    if started := run.description["data_info"].get("init_from"):
        results["init_from"] = started["origin"]
    results["undecodable_images"] = len(run.data.undecodable.names)
    if hosts.is_writer():
        files.write_json(path, results)
        ending.tell(results, history, run.workdir, run.config)
        log(f"wrote {path}")
    hosts.wait_for_all("results")
    return results
