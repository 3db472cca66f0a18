"""A sweep: pretrains several recipes with several seeds each, and writes one table."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from selfsup_jax import paths
from selfsup_jax.build import Build, find
from selfsup_jax.config import check_fields, check_patterns, of_variant, validate
from selfsup_jax.devices import hosts, process
from selfsup_jax.errors import NotFinite, UserError, bad_field, nearest
from selfsup_jax.run import files, identity, owner, workdir
from selfsup_jax.run.files import whole_file, write_json, writing_to
from selfsup_jax.run.progress import format_seconds, log
from selfsup_jax.training import sweep_table
from selfsup_jax.training.pretrain import pretrain
from selfsup_jax.viz import titles

RECORD = "runs.json"
TABLE = "table.md"
PICTURE = "table.png"


class Run(NamedTuple):
    """One run of a sweep."""

    variant: str
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        """The name of the run and of its folder."""
        return f"{self.variant}/seed_{self.seed}"

    @property
    def fields(self) -> identity.Flat:
        """Its flat config, without the fields that do not affect its results."""
        return identity.bound(identity.flat(self.config), identity.SAME_RESULTS)


def run(config: ConfigDict, directory: str, find: Callable[[str], Build] = find) -> dict[str, Any]:
    """Pretrains the runs that are not finished, seed by seed, and updates the table after each.

    The folder of a run is `directory/VARIANT/seed_N`; a stopped run resumes there. `runs.json`
    holds the config and the results of all finished runs, which are not repeated.

    Args:
        config: see `configs/common.py:sweep`.
        directory: for the runs, `runs.json`, `table.md`, `table.png` and `results.json`.
        find: returns the `build` of a method, given its name.

    Returns:
        The content of `results.json`: mean and standard deviation over the seeds, flat.

    Raises:
        UserError: an error in the config (the values of all variants are checked before the first
            run, but what depends on the data only when its run starts); or an error of `pretrain`,
            except that diverged runs are marked in the table.
        Stopped: see `pretrain`.
    """
    workdir.check_path(directory)
    owner.check(directory, "sweep")
    runs = list(_runs(config, find))
    record = _read_record(directory)
    for current in runs:
        _check_same(current, record, directory)
    _check_published(config.publish_dir, runs)
    hosts.wait_for_all("sweep")
    # Written before hours of work, so that an error of the disk shows early.
    results, table = _write(config, directory, runs, record)
    for number, current in enumerate(runs, start=1):
        if current.name in record:
            continue
        left = sum(r.name not in record for r in runs)
        log(f"\n[{number}/{len(runs)}] {current.name}{_expected(record, left)}")
        record[current.name] = _run_one(current, os.path.join(directory, current.name), find)
        results, table = _write(config, directory, runs, record)
        jax.clear_caches()  # the next run compiles its own functions
    log(f"\n{table}\nwrote {os.path.join(directory, TABLE)} and {PICTURE}")
    return results


def _runs(config: ConfigDict, find: Callable[[str], Build]) -> Iterator[Run]:
    check_fields(config)
    only = tuple(config.only)
    if not only or set(only) - set(config.variants) or len(set(only)) < len(only):
        names = ", ".join(config.variants)
        raise bad_field("only", only, f"must be one or more different ones of {names}")
    fields = {field for variant in config.variants.values() for field in identity.flat(variant)}
    for what, known in (("columns", fields), ("metrics", titles.METRICS)):
        for name in (name for name in config[what] if name not in known):
            hint = f"there is no {name}; did you mean {nearest(name, known)}?"
            raise bad_field(what, tuple(config[what]), hint)
    for seed in config.seeds:  # the table of one seed is complete before the next seed
        for variant in config.only:
            run = Run(variant, seed, config.variants[variant].copy_and_resolve_references())
            run.config.seed = seed
            run.config.compute_dtype = process.compute_dtype(run.config.compute_dtype)
            with of_variant(variant):
                validate(run.config, find(run.config.method))
                if seed == config.seeds[0]:
                    check_patterns(run.config, find(run.config.method))
            yield run


def _run_one(run: Run, folder: str, find: Callable[[str], Build]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        results = pretrain(run.config, folder, find(run.config.method), started=start)
    except NotFinite as e:
        log(f"{run.name}: {e}")
        results = {"diverged": str(e).partition(";")[0]}
    return {
        "variant": run.variant,
        "seed": run.seed,
        "config": run.fields,
        "results": results,
        "seconds": time.perf_counter() - start,  # only of the process that finished the run
        "jax": jax.__version__,
    }


def _expected(record: Mapping[str, Any], left: int) -> str:
    """How many runs are left, and an estimate of their time from the finished runs."""
    if not record:
        return f": {left} runs to go"
    seconds = float(np.median([entry["seconds"] for entry in record.values()]))
    return f": {left} runs to go, about {format_seconds(left * seconds)}"


# ----------------------------------------------------------------------------- the record


def _read_record(directory: str) -> dict[str, Any]:
    path = os.path.join(directory, RECORD)
    record = files.read_json(path) if paths.exists(path) else {}
    types: dict[str, Any] = {"config": dict, "results": dict, "seconds": int | float}
    for name, entry in record.items():
        fields = entry if isinstance(entry, dict) else {}
        if not all(isinstance(fields.get(field), kind) for field, kind in types.items()):
            raise UserError(f"{path}: {name} is not a run's entry; move it away to start again")
    return record


def _check_published(folder: str, runs: list[Run]) -> None:
    """Checks that only an earlier table of the same runs would be replaced."""
    if not folder:
        return
    paths.check(folder, "config.publish_dir")
    if not paths.exists(os.path.join(folder, RECORD)):
        for name in (TABLE, PICTURE):
            if paths.exists(os.path.join(folder, name)):
                raise bad_field("publish_dir", folder, f"has a {name} that is not of a sweep")
    record = _read_record(folder)
    for run in runs:
        _check_same(run, record, folder)


def _check_same(run: Run, record: Mapping[str, Any], directory: str) -> None:
    if run.name not in record:
        return
    before = identity.upgraded(record[run.name]["config"])
    different = identity.differences(run.fields, before, identity.SAME_RESULTS)
    if different:
        prefix = f"config.variants.{run.variant}."
        raise UserError(
            f"{identity.described(different, 'the run that is done', prefix)}; use the same value, "
            f"move {run.name} and its entry in {os.path.join(directory, RECORD)} away, or take "
            "another --workdir"
        )


def _write(
    config: ConfigDict, directory: str, runs: list[Run], record: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Writes the record, the table, its plot and the results. Returns results and table."""
    done: sweep_table.Done = {variant: [] for variant in config.only}
    for run in runs:
        if run.name in record:
            done[run.variant].append(record[run.name])
    missing = [run.name for run in runs if run.name not in record]
    results = {"runs": len(runs) - len(missing), "of_runs": len(runs)}
    results |= sweep_table.statistics(config.metrics, done)
    table = sweep_table.table(config, done, missing)
    if not hosts.is_writer():
        return results, table
    for folder in filter(None, (directory, config.publish_dir)):
        with writing_to(folder):
            paths.makedirs(folder)  # an error shows before hours of work
            if folder == config.publish_dir and missing:
                continue  # the table published there may be complete
            write_json(os.path.join(folder, RECORD), record)
            with whole_file(os.path.join(folder, TABLE), encoding="utf-8") as f:
                f.write(table + "\n")
        if results["runs"]:
            _draw(os.path.join(folder, PICTURE), config, done)
    with writing_to(directory):
        write_json(os.path.join(directory, "results.json"), results)
    return results, table


def _draw(path: str, config: ConfigDict, done: sweep_table.Done) -> None:
    try:
        sweep_table.draw(path, config, done)
    except Exception as e:  # a failed plot must not stop the sweep
        logging.warning("%s could not be drawn: %r", path, e)
