"""Several recipes, each pretrained with several seeds, in one table."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from selfsup_jax import config as config_lib
from selfsup_jax import parallel, reference
from selfsup_jax.endings import write_json, writing_to
from selfsup_jax.errors import NotFinite, UserError, bad_field, nearest
from selfsup_jax.progress import format_seconds, say
from selfsup_jax.train import Build, pretrain

RECORD = "runs.json"
TABLE = "table.md"
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
_HEADINGS = {
    "linear_probe_top1": "linear probe",
    "linear_probe_top5": "linear probe, top 5",
    "fewshot_top1": "few labels",
    "knn_top1": "kNN",
    "random_init_linear_probe_top1": "untrained: linear probe",
    "random_init_fewshot_top1": "untrained: few labels",
    "random_init_knn_top1": "untrained: kNN",
    "pixels_linear_probe_top1": "pixels: linear probe",
    "pixels_fewshot_top1": "pixels: few labels",
    "pixels_knn_top1": "pixels: kNN",
    "effective_rank": "effective rank",
    "projection_std": "projection std",
    "use_predictor": "predictor",
    "use_target_network": "target network",
    "negatives_weight": "negatives",
}


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
        return {k: v for k, v in _flat(self.config).items() if k not in _FREE_FIELDS}


def run(config: ConfigDict, directory: str, builds: Mapping[str, Build]) -> dict[str, Any]:
    """Pretrains what is not done yet, seed by seed, and renews the table after each run.

    A run lies in `directory/VARIANT/seed_N`, where it goes on if it was stopped. `runs.json` holds
    the config and the results of each that is done; such a run is not repeated.

    Args:
        config: see `configs/common.py:study`.
        directory: takes the runs, `runs.json`, `table.md` and `results.json`.
        builds: `build` of each method.

    Returns:
        What `results.json` holds: mean and standard deviation over the seeds, flat.

    Raises:
        UserError: a mistake in the config (every variant's values are checked before the first run,
            what depends on its data when its own run begins); or what `pretrain` raises, but for
            runs that end in numbers that are none: the table tells.
        Stopped: see `pretrain`.
    """
    cells = list(_cells(config, builds))
    record = _read_record(directory)
    for cell in cells:
        _check_same(cell, record, directory)
    parallel.wait_for_all("study")
    _write(config, directory, cells, record)  # that it can be written, before hours of work
    for number, cell in enumerate(cells, start=1):
        if cell.name in record:
            continue
        left = sum(c.name not in record for c in cells)
        say(f"\n[{number}/{len(cells)}] {cell.name}{_expected(record, left)}")
        record[cell.name] = _one(cell, os.path.join(directory, cell.name), builds)
        _write(config, directory, cells, record)
        jax.clear_caches()  # the next run compiles its own
    results = _write(config, directory, cells, record)
    say(f"\n{_table(config, cells, record)}\nwrote {os.path.join(directory, TABLE)}")
    return results


def _flat(config: ConfigDict) -> dict[str, Any]:
    return flatten_dict(json.loads(config.to_json()), sep=".")


def _cells(config: ConfigDict, builds: Mapping[str, Build]) -> Iterator[Cell]:
    seeds, order = tuple(config.seeds), tuple(config.order)
    whole = all(isinstance(seed, int) for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise bad_field("seeds", seeds, "must be one or more different whole numbers")
    if not order or set(order) - set(config.variants) or len(set(order)) < len(order):
        there = ", ".join(config.variants)
        raise bad_field("order", order, f"must be one or more different ones of {there}")
    fields = {field for name in order for field in _flat(config.variants[name])}
    for field in config.show:
        if field not in fields:
            near = nearest(field, fields)
            raise bad_field("show", tuple(config.show), f"no field {field}; did you mean {near}?")
    for seed in config.seeds:  # a whole table of one seed is there before the next seed begins
        for variant in config.order:
            cell = Cell(variant, seed, config.variants[variant].copy_and_resolve_references())
            cell.config.seed = seed
            try:
                if cell.config.method not in builds:
                    raise bad_field("method", cell.config.method, f"must be one of {list(builds)}")
                config_lib.validate(cell.config)
                reference.load(cell.config.monitor.reference)  # that there is one of that name
            except UserError as e:
                message = str(e).removeprefix("config.")
                raise UserError(f"config.variants.{variant}.{message}") from e
            yield cell


def _one(cell: Cell, folder: str, builds: Mapping[str, Build]) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        results = pretrain(cell.config, folder, builds[cell.config.method], started=began)
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
    different = [k for k in sorted(before | now) if before.get(k) != now.get(k)]
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
) -> dict[str, Any]:
    """Writes the record, the table and the results. Returns the results."""
    results = _results(config, cells, record)
    if not parallel.is_writer():
        return results
    table = _table(config, cells, record)
    for folder in filter(None, (directory, config.publish_dir)):
        with writing_to(folder):
            os.makedirs(folder, exist_ok=True)
            write_json(os.path.join(folder, RECORD), record)
            with open(os.path.join(folder, TABLE), "w", encoding="utf-8") as f:
                f.write(table + "\n")
    with writing_to(directory):
        write_json(os.path.join(directory, "results.json"), results)
    return results


# ------------------------------------------------------------------------------ the table


def _values(measure: str, done: list[dict[str, Any]]) -> list[float]:
    return [e["results"][measure] for e in done if measure in e["results"]]


def _done(cells: list[Cell], record: Mapping[str, Any], variant: str) -> list[dict[str, Any]]:
    return [record[c.name] for c in cells if c.variant == variant and c.name in record]


def _results(config: ConfigDict, cells: list[Cell], record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"runs": sum(c.name in record for c in cells), "of_runs": len(cells)}
    for variant in config.order:
        done = _done(cells, record, variant)
        for measure in config.measures:
            values = _values(measure, done)
            if values:
                found[f"{variant}_{measure}_mean"] = float(np.mean(values))
                if len(values) > 1:
                    found[f"{variant}_{measure}_std"] = float(np.std(values, ddof=1))
        if done:
            found[f"{variant}_collapsed"] = sum(bool(_ending(entry)) for entry in done)
    return found


def _ending(entry: dict[str, Any]) -> str:
    """What became of a run that came to nothing; empty for a good one."""
    if "diverged" in entry["results"]:
        return "diverged"
    if entry["results"].get("collapsed"):
        return f"step {entry['results']['collapsed_at_step']:,}"
    return ""


def _table(config: ConfigDict, cells: list[Cell], record: dict[str, Any]) -> str:
    """The table as Markdown, which reads well as it is, too."""
    head = ["", *(_HEADINGS.get(f, f) for f in config.show)]
    head += [_HEADINGS.get(m, m) for m in config.measures] + ["collapsed", "images/s"]
    if config.published:
        head.append(config.published_title)
    rows = [head]
    for variant in config.order:
        done = _done(cells, record, variant)
        base = _flat(config.variants[variant])
        endings = [_ending(entry) for entry in done if _ending(entry)]
        collapsed = ", ".join(endings) if endings else ("no" if done else "")
        speeds = _values("images_per_second", done)
        row = [variant.replace("_", " "), *(_shown(base.get(f)) for f in config.show)]
        row += [_spread(m, _values(m, done)) for m in config.measures]
        row += [collapsed, f"{np.median(speeds):,.0f}" if speeds else ""]
        if config.published:
            row.append(f"{config.published[variant]:g}" if variant in config.published else "")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    missing = [c.name for c in cells if c.name not in record]
    note = f"\n\nStill to come: {', '.join(missing)}." if missing else ""
    return f"{config.title}\n\n" + "\n".join(lines) + note


def _shown(value: Any) -> str:
    if value is None:  # a field that other variants have
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _spread(measure: str, values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation; fractions as percentages."""
    if not values:
        return ""
    scale, digits, unit = (100, 1, " %") if measure.endswith(("_top1", "_top5")) else (1, 2, "")
    text = f"{scale * np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * np.std(values, ddof=1):.{digits}f}"
    return text + unit
