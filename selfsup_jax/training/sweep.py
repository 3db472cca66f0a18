"""Several recipes, each pretrained with several seeds, in one table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from selfsup_jax import config as config_lib
from selfsup_jax.build import Build, find
from selfsup_jax.devices import hosts
from selfsup_jax.errors import NotFinite, UserError, bad_field, nearest
from selfsup_jax.run import workdir
from selfsup_jax.run.files import write_json, writing_to
from selfsup_jax.run.progress import format_seconds, say
from selfsup_jax.training import reference, sweep_table
from selfsup_jax.training.pretrain import pretrain
from selfsup_jax.training.sweep_table import flat

RECORD = "runs.json"
TABLE = "table.md"
PICTURE = "table.png"
# Fields that may differ between a run that is done and the same run asked for again; where the
# data lies and how often is looked is nobody's business but this machine's.
_FREE_FIELDS = (
    "data.dir",
    "data.download",
    "log_every_steps",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "keep_every_steps",
    "monitor.knn_every_steps",
    "monitor.plots_every_steps",
)


class Cell(NamedTuple):
    """One run of a study."""

    variant: str
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        """Also its folder's."""
        return f"{self.variant}/seed_{self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """Its config, flat, without what may differ."""
        return {k: v for k, v in flat(self.config).items() if k not in _FREE_FIELDS}


def run(config: ConfigDict, directory: str, find: Callable[[str], Build] = find) -> dict[str, Any]:
    """Pretrains what is not done yet, seed by seed, and renews the table after each run.

    A run lies in `directory/VARIANT/seed_N`, where it goes on if it was stopped. `runs.json` holds
    the config and the results of each that is done; such a run is not repeated.

    Args:
        config: see `configs/common.py:study`.
        directory: takes the runs, `runs.json`, `table.md`, `table.png` and `results.json`.
        find: the `build` of a method by its name.

    Returns:
        What `results.json` holds: mean and standard deviation over the seeds, flat.

    Raises:
        UserError: a mistake in the config (every variant's values are checked before the first run,
            what depends on its data when its own run begins); or what `pretrain` raises, but for
            runs that end in numbers that are none: the table tells.
        Stopped: see `pretrain`.
    """
    workdir.check_path(directory)
    cells = list(_cells(config, find))
    record = _read_record(directory)
    for cell in cells:
        _check_same(cell, record, directory)
    hosts.wait_for_all("study")
    # Before hours of work: that it can be written.
    results, table = _write(config, directory, cells, record)
    for number, cell in enumerate(cells, start=1):
        if cell.name in record:
            continue
        left = sum(c.name not in record for c in cells)
        say(f"\n[{number}/{len(cells)}] {cell.name}{_expected(record, left)}")
        record[cell.name] = _one(cell, os.path.join(directory, cell.name), find)
        results, table = _write(config, directory, cells, record)
        jax.clear_caches()  # the next run compiles its own
    say(f"\n{table}\nwrote {os.path.join(directory, TABLE)} and {PICTURE}")
    return results


def _cells(config: ConfigDict, find: Callable[[str], Build]) -> Iterator[Cell]:
    seeds, order = tuple(config.seeds), tuple(config.order)
    whole = all(isinstance(seed, int) for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise bad_field("seeds", seeds, "must be one or more different whole numbers")
    if not order or set(order) - set(config.variants) or len(set(order)) < len(order):
        there = ", ".join(config.variants)
        raise bad_field("order", order, f"must be one or more different ones of {there}")
    fields = {field for name in order for field in flat(config.variants[name])}
    for field in config.show:
        if field not in fields:
            near = nearest(field, fields)
            raise bad_field("show", tuple(config.show), f"no field {field}; did you mean {near}?")
    for measure in config.measures:
        if measure not in sweep_table.HEADINGS:
            near = nearest(measure, sweep_table.HEADINGS)
            raise bad_field(
                "measures", tuple(config.measures), f"no {measure}; did you mean {near}?"
            )
    for seed in config.seeds:  # a whole table of one seed is there before the next seed begins
        for variant in config.order:
            cell = Cell(variant, seed, config.variants[variant].copy_and_resolve_references())
            cell.config.seed = seed
            try:
                build = find(cell.config.method)
                config_lib.validate(cell.config)
                reference.load(cell.config.monitor.reference)  # that there is one of that name
                build(cell.config, None, 1, 0)  # that its method can take it
            except UserError as e:
                message = str(e).removeprefix("config.")
                raise UserError(f"config.variants.{variant}.{message}") from e
            yield cell


def _one(cell: Cell, folder: str, find: Callable[[str], Build]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        results = pretrain(cell.config, folder, find(cell.config.method), started=began)
    except NotFinite as e:
        say(f"{cell.name}: {e}")
        results = {"diverged": str(e).partition(";")[0]}
    return {
        "variant": cell.variant,
        "seed": cell.seed,
        "config": cell.identity,
        "results": results,
        "seconds": time.perf_counter() - began,  # of the process that ended it
        "jax": jax.__version__,
    }


def _expected(record: Mapping[str, Any], left: int) -> str:
    """How long the rest may take, from what is done."""
    if not record:
        return f": {left} runs to go"
    seconds = float(np.median([entry["seconds"] for entry in record.values()]))
    return f": {left} runs to go, about {format_seconds(left * seconds)}"


# ----------------------------------------------------------------------------- the record


def _read_record(directory: str) -> dict[str, Any]:
    path = os.path.join(directory, RECORD)
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as f:
            record = json.load(f)
        if not isinstance(record, dict):
            raise ValueError("not a study's record")
        for name, entry in record.items():
            if not isinstance(entry, dict) or not {"config", "results", "seconds"} <= set(entry):
                raise ValueError(f"{name} is not a run's entry")
        return record
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read: {e}; move it away to begin anew") from e


def _check_same(cell: Cell, record: Mapping[str, Any], directory: str) -> None:
    if cell.name not in record:
        return
    before, now = record[cell.name]["config"], cell.identity
    fields = sorted((before | now).keys() - set(_FREE_FIELDS))
    different = [k for k in fields if before.get(k) != now.get(k)]
    if different:
        told = "; ".join(
            f"config.variants.{cell.variant}.{k}={now.get(k)!r}: it was done with {before.get(k)!r}"
            for k in different
        )
        raise UserError(
            f"{told}; take what it has, move {cell.name} and its entry in "
            f"{os.path.join(directory, RECORD)} away, or take another --workdir"
        )


def _write(
    config: ConfigDict, directory: str, cells: list[Cell], record: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Writes the record, the table, its picture and the results. Returns results and table."""
    done: sweep_table.Done = {variant: [] for variant in config.order}
    for cell in cells:
        if cell.name in record:
            done[cell.variant].append(record[cell.name])
    missing = [cell.name for cell in cells if cell.name not in record]
    results = {"runs": len(cells) - len(missing), "of_runs": len(cells)}
    results |= sweep_table.statistics(config.measures, done)
    table = sweep_table.table(config, done, missing)
    if not hosts.is_writer():
        return results, table
    for folder in filter(None, (directory, config.publish_dir)):
        with writing_to(folder):
            os.makedirs(folder, exist_ok=True)  # to be told of it before hours of work
            if folder == config.publish_dir and missing:
                continue  # what is published there may be whole
            write_json(os.path.join(folder, RECORD), record)
            with open(os.path.join(folder, TABLE), "w", encoding="utf-8") as f:
                f.write(table + "\n")
        if results["runs"]:
            _draw(os.path.join(folder, PICTURE), config, done)
    with writing_to(directory):
        write_json(os.path.join(directory, "results.json"), results)
    return results, table


def _draw(path: str, config: ConfigDict, done: sweep_table.Done) -> None:
    try:
        sweep_table.draw(path, config, done)
    except Exception as e:  # no picture is worth a run
        logging.warning("%s could not be drawn: %r", path, e)
