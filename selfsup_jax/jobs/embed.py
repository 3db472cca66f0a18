"""Writes the features of a split, with labels and file names, to files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax import paths
from selfsup_jax.data import sources
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import hosts
from selfsup_jax.errors import bad_field
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.jobs import frozen_features, runner
from selfsup_jax.jobs.runner import EvalJob
from selfsup_jax.run.files import whole_file
from selfsup_jax.run.progress import log

Rows = dict[str, np.ndarray]  # features [n, D] float32, labels [n] int32, names [n] str


def prepare(config: ConfigDict, frozen: FrozenEncoder) -> EvalJob:
    """Prepares the job of `configs/embed.py`."""
    if config.format == "npz" and jax.process_count() > 1:
        raise bad_field("format", "npz", "must be npy with several hosts: each writes its own part")
    data = config.data
    # By default the run's test split, or all splits of another data set.
    split = config.split or data.test_split
    if not config.split and split.endswith("[:0]"):  # empty: the run had no labels
        split = ""
    split = split or "+".join(sources.split_names(data.name, data.dir, data.download))
    source = runner.load_split(config, split, "split", labelled=False)
    extract = runner.extractor(config, frozen)

    def task(frozen: FrozenEncoder, folder: str) -> dict[str, Any]:
        paths.makedirs(folder)
        batches = frozen_features.counted(config, source, source.num_examples)
        rows = (_rows(x, batch) for x, batch in extract.stream(frozen.variables, batches))
        write = _write_one if config.format == "npz" else _write_parts
        files, shape = write(rows, source, folder, config.get("rows_per_file"))
        count = int(hosts.gather_hosts(np.asarray([shape[0]])).sum())
        log(f"{count:,} x {shape[1]} features in {folder}: {files[0]}" + " ..." * (len(files) > 1))
        return {"embedded_images": count, "embedded_dimensions": shape[1], "split": split}

    data_info = {"classes": source.num_classes or 0, "test_images": source.num_examples}
    return EvalJob(task, data_info)


def _rows(x: np.ndarray, batch: dict[str, np.ndarray]) -> Rows:
    return {"features": x, "labels": batch["label"].astype(np.int32), "names": batch["name"]}


def _joined(parts: list[Rows]) -> Rows:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _write_one(
    rows: Iterator[Rows], source: Source, folder: str, _: int
) -> tuple[list[str], tuple[int, int]]:
    parts = list(rows)
    if not parts:
        raise bad_field("split", source.name, "holds no image that can be decoded")
    table = _joined(parts)
    path = os.path.join(folder, "features.npz")
    with whole_file(path, "wb") as f:
        names = np.asarray(source.class_names or (), dtype=str)
        np.savez(f, **table, class_names=names)  # type: ignore[arg-type]
    return [os.path.basename(path)], table["features"].shape


def _write_parts(
    rows: Iterator[Rows], source: Source, folder: str, rows_per_file: int
) -> tuple[list[str], tuple[int, int]]:
    """Writes each part when it has `rows_per_file` rows: only one part is kept in memory."""
    host = f"host{jax.process_index()}-" if jax.process_count() > 1 else ""
    if hosts.is_writer():
        for name in ("features", "labels", "names"):  # from an interrupted attempt
            for stale in paths.glob(folder, f"{name}-*.npy"):
                paths.remove(stale)
    hosts.wait_for_all("cleared")
    files: list[str] = []
    written = width = 0
    for number, table in enumerate(_tables(rows, rows_per_file)):
        for name, column in table.items():
            file = f"{name}-{host}{number:05d}.npy"
            with whole_file(os.path.join(folder, file), "wb") as f:
                np.save(f, column)
            files.append(file)
        written, width = written + len(table["names"]), table["features"].shape[1]
    if not files:
        raise bad_field("split", source.name, "holds no image that can be decoded")
    if source.class_names and hosts.is_writer():
        with whole_file(os.path.join(folder, "class_names.txt"), encoding="utf-8") as f:
            f.writelines(f"{name}\n" for name in source.class_names)
    return files, (written, width)


def _tables(rows: Iterator[Rows], size: int) -> Iterator[Rows]:
    """Yields the same rows, `size` at a time; fewer at the end."""
    pending: list[Rows] = []
    for part in rows:
        pending.append(part)
        while sum(len(p["names"]) for p in pending) >= size:
            table = _joined(pending)
            yield {name: column[:size] for name, column in table.items()}
            pending = [{name: column[size:] for name, column in table.items()}]
    if any(len(p["names"]) for p in pending):
        yield _joined(pending)
