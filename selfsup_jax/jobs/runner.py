"""The steps of every evaluation job: load the encoder, resolve the config, evaluate, write."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from selfsup_jax import paths
from selfsup_jax.config import check_values
from selfsup_jax.data import inputs, sources
from selfsup_jax.devices import hosts, process
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import encoder, representations
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.evaluation.features import Extractor
from selfsup_jax.run import identity, owner, workdir
from selfsup_jax.run.files import disk_errors, read_json, write_json
from selfsup_jax.run.progress import log
from selfsup_jax.viz.titles import measures

RESULTS = "results.json"
# A stopped job resumes from these; while one exists, the directory belongs to that job.
_PARTIAL = ("checkpoints", "classifier.npz", "sets.json")
_REMOVED = -1  # in place of the step of a finished job whose checkpoint was removed

# `(encoder, folder) -> results`: flat, measures in [0, 1]. It may write files to the folder.
Task = Callable[[FrozenEncoder, str], dict[str, Any]]


class EvalJob(NamedTuple):
    """A job that is ready to run.

    Attributes:
        task: evaluates an encoder of the architecture that it was prepared for.
        data_info: facts about the loaded data: numbers of classes and images.
    """

    task: Task
    data_info: dict[str, Any]


# `(resolved config, encoder) -> EvalJob`; checks the config and data before any compilation.
Prepare = Callable[[ConfigDict, FrozenEncoder], EvalJob]


def run(config: ConfigDict, directory: str, prepare: Prepare) -> dict[str, Any]:
    """Evaluates the encoder of `config.checkpoint` and writes `results.json`.

    A killed job restarts, or resumes from its own checkpoint, with the same result; a finished
    job is not repeated.

    Args:
        config: see `configs/evaluation.py`.
        directory: the job's workdir; receives `config.json`, `results.json` and the job's files.
        prepare: of the job.

    Returns:
        The content of `results.json`.

    Raises:
        UserError: a mistake in the config, the checkpoint, the data or the workdir.
    """
    workdir.check_path(directory)
    owner.check(directory, config.job)
    with workdir.locked(directory):
        step = _begun_step(config, directory)
        if step == _REMOVED:
            log(f"{directory} is done; its checkpoint was removed since")
            return read_json(os.path.join(directory, RESULTS))
        _, step = encoder.locate(config.checkpoint, step)
        # If the run is still training, hosts may see different newest steps: use the first host's.
        frozen = encoder.load(config.checkpoint, hosts.of_first("the checkpoint", step))
        config = resolve_config(config, frozen)
        check_values(config)
        return evaluate(config, prepare(config, frozen), frozen, directory)


def resolve_config(config: ConfigDict, frozen: FrozenEncoder) -> ConfigDict:
    """Fills empty fields of the config with the values of the run that made the encoder.

    Adds the encoder's architecture and normalisation too, so that the encoder in a job's own
    checkpoints can be loaded like any other.
    """
    config = config.copy_and_resolve_references()
    run = frozen.config
    with config.unlocked():
        data = config.data
        same_data = _is_the_runs_data(data, run["data"])
        taken = ["image_size", "test_resize", "resize_method"]
        if same_data:
            taken += ["name", "train_split", "test_split"]
            taken += ["dir"] * (not data.dir)
        for field in taken:
            if not data[field]:
                data[field] = run["data"][field]
        if not data.name and "sets" not in config:
            raise bad_field("data.name", "", "must be given: the encoder's own data are unknown")
        # The encoder is given pixels made as those that it learned from, of other data too.
        data.intensity = data.intensity or run["data"].get("intensity", "auto")
        if data.exif_orientation is None:
            data.exif_orientation = run["data"].get("exif_orientation", True)
        name = config.compute_dtype or run.get("compute_dtype", "float32")
        config.compute_dtype = process.compute_dtype(name)
        config.encoder = ConfigDict(run["encoder"])
        config.views = config.get("views", ConfigDict())
        config.views.mean, config.views.std = (tuple(run["views"][k]) for k in ("mean", "std"))
        if "global" in config.views:
            _fill_in_views(config.views["global"], run["views"].get("global", {}), data.image_size)
        config.method = run.get("method", "")
        # A job's kNN then equals the one of the run. Imported encoders have no such fields.
        knn = {"neighbours": ("knn_k", 200), "temperatures": ("knn_temperature", 0.1)}
        for field, (of_run, default) in knn.items():
            if field in config and not config[field]:
                config[field] = (run.get("eval", {}).get(of_run, default),)
    return config


def _fill_in_views(group: ConfigDict, of_run: dict[str, Any], size: int) -> None:
    """Fills empty crop and flip fields of the job with those of the run's first view."""
    group.size = group.size or size
    for field in ("area", "aspect"):
        group[field] = tuple(group[field] or of_run.get(field, ()))
    if group.view_1.flip_prob is None:
        group.view_1.flip_prob = of_run.get("view_1", {}).get("flip_prob", 0.5)


def _is_the_runs_data(data: ConfigDict, run_data: dict[str, Any]) -> bool:
    """Whether a job uses the run's own data set, which may have moved since.

    An image folder (`data.name="folder"`) with another path is another data set.
    """
    if data.name == "folder" and data.dir:
        folders = (data.dir, run_data["dir"])
        here, there = (paths.real(os.path.expanduser(folder)) for folder in folders)
        return run_data["name"] == "folder" and here == there
    return not data.name or data.name == run_data["name"]


def _begun_step(config: ConfigDict, directory: str) -> int | None:
    """The step that an earlier process here started with, if the newest checkpoint is asked for."""
    path = os.path.join(directory, "config.json")
    root, newest = encoder.locate(config.checkpoint)
    asked = paths.absolute(os.path.expanduser(config.checkpoint))
    if newest is None or os.path.dirname(asked) == os.path.join(root, "checkpoints"):
        return None
    if not paths.exists(path):
        return None
    begun_with = identity.flat(read_json(path))
    step = begun_with.get("data_info.step")
    if begun_with.get("data_info.run") != root or step == newest:
        return None
    if step not in encoder.checkpoint_steps(root):
        if paths.exists(os.path.join(directory, RESULTS)):
            return _REMOVED
        raise UserError(
            f"--workdir={directory}: was started with the checkpoint of step {step}, which "
            f"is no longer in {root}; use another --workdir for step {newest}"
        )
    return int(step)


def evaluate(
    config: ConfigDict, job: EvalJob, frozen: FrozenEncoder, directory: str, baseline: str = ""
) -> dict[str, Any]:
    """Evaluates an encoder in `directory`, and an untrained one if asked; skips what is done.

    Args:
        config: resolved.
        job: ready to run.
        frozen: the encoder.
        directory: receives `config.json`, `results.json` and the job's files.
        baseline: folder of the untrained encoder's results; if empty, `directory/random_init`.
    """
    description = describe_job(config, job, frozen)
    check_same(description, directory)
    path = os.path.join(directory, RESULTS)
    if (done := saved_results(directory)) is not None:
        log(f"{path} is there already; another --workdir evaluates again")
        return done
    with disk_errors(directory, lambda: None), begun(description, directory):
        log(f"{config.job}: {frozen.path}" + (f" ({frozen.origin})" if frozen.origin else ""))
        results = job.task(frozen, directory)
        if config.get("random_init"):
            folder = baseline or os.path.join(directory, "random_init")
            untrained = _untrained(config, job, frozen, folder)
            results |= {f"random_init_{k}": v for k, v in untrained.items()}
        results |= frozen.about | job.data_info
        results |= {"job": config.job, "seed": config.seed} | process.devices()
        if hosts.is_writer():
            write_json(path, results)
            if measures(results):
                log(summary(results))
            log(f"wrote {path}")
        hosts.wait_for_all("results")
    return results


def saved_results(folder: str) -> dict[str, Any] | None:
    """Earlier results, as the first host sees them: a shared file may reach the others later."""
    path = os.path.join(folder, RESULTS)
    there = hosts.is_writer() and paths.exists(path)
    return hosts.of_first(path, read_json(path) if there else None)


def _untrained(
    config: ConfigDict, job: EvalJob, frozen: FrozenEncoder, folder: str
) -> dict[str, Any]:
    """Results of an untrained encoder of the same architecture; computed once per folder."""
    if (done := saved_results(folder)) is not None:
        return done
    log(f"{config.job}: an encoder that was never trained")
    variables = jax.device_get(encoder.untrained(frozen.config, config.seed))
    results = job.task(frozen._replace(variables=variables), folder)
    if hosts.is_writer():
        paths.makedirs(folder)
        write_json(os.path.join(folder, RESULTS), results)
    return results


def describe_job(config: ConfigDict, job: EvalJob, frozen: FrozenEncoder) -> dict[str, Any]:
    """What identifies a job: its config, encoder and data. Written to `config.json`."""
    return json.loads(config.to_json()) | {"data_info": frozen.about | job.data_info}


@contextlib.contextmanager
def begun(description: dict[str, Any], directory: str) -> Iterator[None]:
    """Writes `config.json`; removes a new one after a `UserError`, if nothing else was saved.

    Some mistakes appear only in the features; the corrected command may then use this directory.
    """
    path = os.path.join(directory, "config.json")
    new = not paths.exists(path)
    if hosts.is_writer():
        paths.makedirs(directory)
        write_json(path, description)
    hosts.wait_for_all("job")
    try:
        yield
    except UserError:
        saved = any(paths.exists(os.path.join(directory, name)) for name in _PARTIAL)
        if new and not saved and hosts.is_writer():
            paths.remove(path)
        raise


def check_same(description: dict[str, Any], directory: str, free: tuple[str, ...] = ()) -> None:
    """Raises `UserError`, with every difference, if a directory belongs to another job.

    Args:
        description: see `describe_job`.
        directory: the workdir of a job.
        free: fields that may differ, in addition to those that do not change results.
    """
    path = os.path.join(directory, "config.json")
    if not paths.exists(path):
        return
    now, before = identity.flat(description), identity.flat(read_json(path))
    different = identity.differences(now, before, (*identity.SAME_JOB, *free))
    if different:
        changes = identity.described(different, "the job there")
        raise UserError(
            f"--workdir={directory}: {changes}; use the same value, or another --workdir"
        )


# -------------------------------------------------------------------- helpers of the jobs


def extractor(config: ConfigDict, frozen: FrozenEncoder) -> Extractor:
    """Computes the job's features of images, in its compute dtype."""
    of_job = representations.of(frozen.config, config.compute_dtype, config.features)
    return Extractor(of_job.apply, *frozen.normalization)


def load_split(
    config: ConfigDict, split: str, field: str, *, labelled: bool = True
) -> sources.Source:
    """Loads a split of the job's data.

    Raises:
        UserError: the split is missing or empty, or has no labels and `labelled` is true.
    """
    source = inputs.load_split(config.data, split, field)
    if labelled and not source.num_classes:
        raise bad_field(field, split, f"{source.name} has no labels, or a single class")
    return source


def summary(results: dict[str, Any]) -> str:
    """The measures as plain text in per cent, with those of the untrained encoder if present."""
    rows = []
    for name in measures(results):
        row = f"  {name:<34}{_percent(results, name)}"
        if f"random_init_{name}" in results:
            row += f"   (never trained: {_percent(results, f'random_init_{name}')})"
        rows.append(row)
    return "\n".join(rows)


def _percent(results: dict[str, Any], name: str) -> str:
    interval = results.get(f"{name.removesuffix('_top1')}_ci95")
    spread = f" ± {100 * interval:.2f}" if interval is not None else ""
    return f"{100 * results[name]:.2f}{spread} %"
