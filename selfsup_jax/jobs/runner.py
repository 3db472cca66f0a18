"""What all evaluation jobs go through: find the encoder, take over its data, evaluate, write."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import config as config_lib
from selfsup_jax.data import inputs, sources
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import encoder
from selfsup_jax.evaluation.encoder import Frozen
from selfsup_jax.run import workdir
from selfsup_jax.run.files import disk_errors, write_json
from selfsup_jax.run.progress import say

RESULTS = "results.json"
# What a job that is stopped goes on from: while it is there, the directory is this job's.
_PARTIAL = ("checkpoints", "classifier.npz", "sets.json")
_REMOVED = -1  # the step of a job that is done and whose checkpoint is no more
# Fields that change nothing in the results.
_FREE_FIELDS = (
    *("checkpoint", "watch", "watch_poll_seconds", "watch_patience_hours", "feature_batch_size"),
    *("data.dir", "data.download", "data.max_undecodable"),
    "data.allow_unseen_classes",
    *("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps"),
    *("bank_rows", "query_rows"),
)

# `(encoder, folder) -> results`: flat, fractions in [0, 1]. It may leave files in the folder.
Task = Callable[[Frozen, str], dict[str, Any]]


class Prepared(NamedTuple):
    """A job that is ready: its data is there.

    Attributes:
        task: evaluates an encoder of the architecture that it was made for.
        found: what the data turned out to be: classes, images.
    """

    task: Task
    found: dict[str, Any]


# `(resolved config, encoder) -> Prepared`; nothing is compiled before its checks have passed.
Prepare = Callable[[ConfigDict, Frozen], Prepared]


def run(config: ConfigDict, directory: str, prepare: Prepare) -> dict[str, Any]:
    """Evaluates the encoder of `config.checkpoint` and writes `results.json`.

    A job that was killed begins anew, or goes on from its own checkpoint, with the same result; one
    that is done isn't repeated.

    Args:
        config: see `configs/evaluation.py`.
        directory: the job's workdir; takes `config.json`, `results.json` and what the job leaves.
        prepare: the job's.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: a mistake in the config, the checkpoint, the data or the workdir.
    """
    with workdir.locked(directory):
        step = _begun_step(config, directory)
        if step == _REMOVED:
            say(f"{directory} is done, of a checkpoint that is removed since")
            return read_json(os.path.join(directory, RESULTS))
        _, step = encoder.locate(config.checkpoint, step)
        # Of a run that goes on hosts may see different newest ones: the first host's counts.
        agreed = int(hosts.gather_hosts(np.asarray([-1 if step is None else step]))[0])
        frozen = encoder.load(config.checkpoint, None if agreed < 0 else agreed)
        config = adopt(config, frozen)
        config_lib.check_values(config)
        return evaluate(config, prepare(config, frozen), frozen, directory)


def adopt(config: ConfigDict, frozen: Frozen) -> ConfigDict:
    """The config with what it leaves empty taken from the run that made the encoder.

    Its architecture and normalisation go in too, so that what a job trains on can be read as an
    encoder itself.
    """
    config = config.copy_and_resolve_references()
    run = frozen.config
    with config.unlocked():
        data = config.data
        same_data = _is_the_runs_data(data, run["data"])
        taken = ["image_size", "test_resize", "resize_method", "crop_area", "crop_aspect"]
        if same_data:
            taken += ["name", "train_split", "test_split"]
            taken += ["dir"] * (not data.dir)
        for field in taken:
            if field in data and not data[field]:
                data[field] = run["data"][field]
        config.compute_dtype = config.compute_dtype or run.get("compute_dtype", "float32")
        config.encoder = ConfigDict(run["encoder"])
        augment = {k: tuple(run["augment"][k]) for k in ("mean", "std")}
        config.augment = ConfigDict(augment)
        config.method = run.get("method", "")
        # So that a job's kNN is the one that the run reported; imports know of none.
        knn = {"neighbours": ("knn_k", 200), "temperatures": ("knn_temperature", 0.1)}
        for field, (of_run, default) in knn.items():
            if field in config and not config[field]:
                config[field] = (run.get("eval", {}).get(of_run, default),)
        if "flip_prob" in config and config.flip_prob is None:
            view = run["augment"].get("view_1", {"flip_prob": run.get("flip_prob", 0.5)})
            config.flip_prob = view["flip_prob"]
    return config


def _is_the_runs_data(data: ConfigDict, run_data: dict[str, Any]) -> bool:
    """Whether a job looks at the run's own data set, which may lie elsewhere by now.

    A folder that is named as such, at another place, is another data set.
    """
    if data.name == "folder" and data.dir:
        places = (data.dir, run_data["dir"])
        here, there = (os.path.realpath(os.path.expanduser(place)) for place in places)
        return run_data["name"] == "folder" and here == there
    return not data.name or data.name == run_data["name"]


def _begun_step(config: ConfigDict, directory: str) -> int | None:
    """The checkpoint's step that an earlier process here began with, if the newest is asked for."""
    path = os.path.join(directory, "config.json")
    root, newest = encoder.locate(config.checkpoint)
    asked = os.path.abspath(os.path.expanduser(config.checkpoint))
    if newest is None or os.path.dirname(asked) == os.path.join(root, "checkpoints"):
        return None
    if not os.path.exists(path):
        return None
    found = read_json(path).get("found", {})
    if found.get("run") != root or found.get("step") == newest:
        return None
    if found["step"] not in encoder.checkpoint_steps(root):
        if os.path.exists(os.path.join(directory, RESULTS)):
            return _REMOVED
        raise UserError(
            f"--workdir={directory}: was begun with the checkpoint of step {found['step']}, which "
            f"is no more in {root}; take another --workdir for step {newest}"
        )
    return int(found["step"])


def evaluate(
    config: ConfigDict, prepared: Prepared, frozen: Frozen, directory: str, baseline: str = ""
) -> dict[str, Any]:
    """Evaluates one encoder in `directory`, unless that is done, and beside it an untrained one.

    Args:
        config: resolved.
        prepared: the job.
        frozen: the encoder.
        directory: takes `config.json`, `results.json` and what the job leaves.
        baseline: where the untrained one's results are kept; a folder of `directory` if empty.
    """
    identity = identity_of(config, prepared, frozen)
    check_same(identity, directory)
    path = os.path.join(directory, RESULTS)
    if os.path.exists(path):
        say(f"{path} is there already; another --workdir evaluates again")
        return read_json(path)
    with disk_errors(directory, lambda: None), begun(identity, directory):
        say(f"{config.job}: {frozen.path}")
        results = prepared.task(frozen, directory)
        if config.get("random_init"):
            folder = baseline or os.path.join(directory, "random_init")
            untrained = _untrained(config, prepared, frozen, folder)
            results |= {f"random_init_{k}": v for k, v in untrained.items()}
        results |= frozen.about | prepared.found
        results |= {
            "job": config.job,
            "seed": config.seed,
            "device_kind": jax.devices()[0].device_kind,
            "device_count": jax.device_count(),
        }
        if hosts.is_writer():
            write_json(path, results)
            if measures(results):
                say(summary(results))
            say(f"wrote {path}")
        hosts.wait_for_all("results")
    return results


def _untrained(
    config: ConfigDict, prepared: Prepared, frozen: Frozen, folder: str
) -> dict[str, Any]:
    """The same of an encoder of that architecture that was never trained; once for each folder."""
    path = os.path.join(folder, RESULTS)
    if os.path.exists(path):
        return read_json(path)
    say(f"{config.job}: an encoder that was never trained")
    variables = jax.device_get(encoder.untrained(frozen.config, config.seed))
    results = prepared.task(frozen._replace(variables=variables), folder)
    if hosts.is_writer():
        os.makedirs(folder, exist_ok=True)
        write_json(path, results)
    return results


def identity_of(config: ConfigDict, prepared: Prepared, frozen: Frozen) -> dict[str, Any]:
    """What makes a job this one and no other."""
    return json.loads(config.to_json()) | {"found": frozen.about | prepared.found}


@contextlib.contextmanager
def begun(identity: dict[str, Any], directory: str) -> Iterator[None]:
    """Writes `config.json`; takes it back where a mistake shows before anything is saved.

    Some mistakes only the features tell: the mended command may then come here, too.
    """
    path = os.path.join(directory, "config.json")
    new = not os.path.exists(path)
    if hosts.is_writer():
        os.makedirs(directory, exist_ok=True)
        write_json(path, identity)
    hosts.wait_for_all("job")
    try:
        yield
    except UserError:
        saved = any(os.path.exists(os.path.join(directory, name)) for name in _PARTIAL)
        if new and not saved and hosts.is_writer():
            os.remove(path)
        raise


def check_same(identity: dict[str, Any], directory: str, free: tuple[str, ...] = ()) -> None:
    """Checks that a directory is of no other job; raises `UserError` naming every difference.

    Args:
        identity: see `identity_of`.
        directory: a job's.
        free: fields that may differ, beside those that change no result.
    """
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        return
    before, now = (workdir.flatten(tree) for tree in (read_json(path), identity))
    fields = sorted((before.keys() | now.keys()) - {*_FREE_FIELDS, *free})
    different = [k for k in fields if before.get(k) != now.get(k)]
    if different:
        told = "; ".join(
            f"{k if k.startswith('found.') else f'config.{k}'}={now.get(k)!r}: the job there has "
            f"{before.get(k)!r}"
            for k in different
        )
        raise UserError(f"--workdir={directory}: {told}; take what it has, or another --workdir")


def read_json(path: str) -> dict[str, Any]:
    """A JSON object; raises `UserError` where there is none to be read."""
    try:
        with open(path) as f:
            found = json.load(f)
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read: {e}; move it away to begin anew") from e


# ----------------------------------------------------------------------------- for the jobs


def load_split(
    config: ConfigDict, split: str, field: str, *, labelled: bool = True
) -> sources.Source:
    """A split of the job's data.

    Raises:
        UserError: there is none, it is empty, or it has no labels where they are needed.
    """
    source = inputs.load_split(config.data, split, field)
    if labelled and not source.num_classes:
        raise bad_field(field, split, f"{source.name} has no labels, or a single class")
    return source


_MEASURES = ("_top1", "_top5", "_mean_per_class", "_ci95")


def measures(results: dict[str, Any]) -> dict[str, float]:
    """What of a job's results are measures: fractions in [0, 1]."""
    return {k: v for k, v in results.items() if k.endswith(_MEASURES) or f"{k}_metric" in results}


def summary(results: dict[str, Any]) -> str:
    """The measures as plain text, percentages, an untrained encoder's beside them."""
    rows = []
    for name in measures(results):
        if name.startswith("random_init_") or name.endswith("_ci95"):
            continue
        row = f"  {name:<34}{_percent(results, name)}"
        if f"random_init_{name}" in results:
            row += f"   (never trained: {_percent(results, f'random_init_{name}')})"
        rows.append(row)
    return "\n".join(rows)


def _percent(results: dict[str, Any], name: str) -> str:
    interval = results.get(f"{name.removesuffix('_top1')}_ci95")
    spread = f" ± {100 * interval:.2f}" if interval is not None else ""
    return f"{100 * results[name]:.2f}{spread} %"
