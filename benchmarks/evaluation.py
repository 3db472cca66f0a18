"""Times evaluation: feature extraction (against the encoder's forward pass alone), probe, kNN.

    python -m benchmarks.evaluation RUN...

Features are extracted from the run's own data. The features of several runs on the same data are
concatenated (four narrow encoders of 128 features give 50,000 x 512 for CIFAR-10).
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.report import Row, show
from configs import common
from selfsup_jax.data import inputs
from selfsup_jax.data.augment import normalize
from selfsup_jax.devices import parallel
from selfsup_jax.devices.table import Part
from selfsup_jax.evaluation import encoder, knn, logistic, probes, scores
from selfsup_jax.evaluation.features import Extractor, Features


def main() -> None:
    """Parses the flags and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--data_dir", default="", help="in place of the runs' data.dir")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--penalty", type=float, default=0.03, help="of the comparison, sklearn's C"
    )
    parser.add_argument("--images", type=int, default=10000, help="for the rates")
    parser.add_argument("--rates_only", action="store_true", help="no probe, no kNN")
    parser.add_argument("--no_sklearn", action="store_true", help="it takes minutes")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    if args.rates_only:
        rows = _rates_of_run(args, args.runs[0])
    else:
        rows, train, test = _features(args)
        rows += _probe(args, train, test)
        rows += _knn(args, train, test)
    show("evaluation", rows, args.json)


def _open(
    args: argparse.Namespace, run: str
) -> tuple[encoder.FrozenEncoder, ConfigDict, Extractor]:
    frozen = encoder.load(run)
    data = ConfigDict(frozen.config["data"])
    data.dir = args.data_dir or data.dir
    represent = encoder.module(frozen.config).apply
    return frozen, data, Extractor(represent, *frozen.normalization)


def _features(args: argparse.Namespace) -> tuple[list[Row], Features, Features]:
    """Rates of the first run, and the concatenated features of all runs."""
    rows = _rates_of_run(args, args.runs[0])
    parts: dict[str, list[Features]] = {"train": [], "test": []}
    for run in args.runs:
        frozen, data, extract = _open(args, run)
        for name, per_run in parts.items():
            source = inputs.load_split(data, data[f"{name}_split"], f"data.{name}_split")
            batches = inputs.eval_batches(data, source, args.batch_size)
            per_run.append(extract(frozen.variables, batches()))
    joined = {
        name: Features(np.concatenate([f.x for f in per_run], axis=1), per_run[0].labels)
        for name, per_run in parts.items()
    }
    return rows, joined["train"], joined["test"]


def _rates_of_run(args: argparse.Namespace, run: str) -> list[Row]:
    """Rates of feature extraction and of the forward pass alone, measured alternately."""
    frozen, data, extract = _open(args, run)
    represent = encoder.module(frozen.config).apply
    source = inputs.load_split(data, data.test_split, "data.test_split")
    count = min(args.images, source.num_examples)
    batches = inputs.eval_batches(data, source, args.batch_size, count)
    first = next(iter(batches()))["image"]
    on_devices = parallel.shard(first)

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        mean, std = frozen.normalization
        return represent(variables, normalize(images.astype(jnp.float32) / 255.0, mean, std))

    bare = jax.pmap(apply, in_axes=(None, 0))
    jax.block_until_ready(bare(frozen.variables, on_devices))
    extract(frozen.variables, batches())
    times: dict[str, list[float]] = {"bare": [], "features": []}
    for _ in range(args.repeats):
        steps = count // len(first)
        began = time.perf_counter()
        for _ in range(steps):
            out = bare(frozen.variables, on_devices)
        jax.block_until_ready(out)
        times["bare"].append((time.perf_counter() - began) / (steps * len(first)))
        began = time.perf_counter()
        extract(frozen.variables, batches())
        times["features"].append((time.perf_counter() - began) / count)
    ratios = [a / b for a, b in zip(times["bare"], times["features"], strict=True)]
    return [
        ("encoder's bare forward", 1 / statistics.median(times["bare"]), "images/s"),
        ("features, from the data set", 1 / statistics.median(times["features"]), "images/s"),
        ("features over bare forward, median of ratios", statistics.median(ratios), ""),
    ]


def _probe(args: argparse.Namespace, train: Features, test: Features) -> list[Row]:
    classes = int(train.labels.max()) + 1
    config = common.linear_probe()
    times = []
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        results = probes.linear(train, test, classes, seed=0, **common.linear_probe()).results
        times.append(time.perf_counter() - began)
    rows: list[Row] = [
        ("features", float(len(train.x)), f"x {train.x.shape[1]}"),
        (f"fast probe, sweep of {len(config.C)} and test", times[0], "s"),
        ("the same, compiled before", times[1], "s"),
        ("top-1", 100 * results["linear_probe_top1"], "%"),
        ("C chosen", results["linear_probe_C"], ""),
    ]
    heads = logistic.fit(train, classes, (args.penalty,), tolerance=config.tolerance)
    ours = float(np.mean(heads.logits(test.x)[0].argmax(1) == test.labels))
    rows.append((f"ours at C {args.penalty:g}", 100 * ours, "%"))
    if not args.no_sklearn:
        rows += _sklearn(args, train, test)
    return rows


def _sklearn(args: argparse.Namespace, train: Features, test: Features) -> list[Row]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = LogisticRegression(C=args.penalty, max_iter=1000)
    pipeline = make_pipeline(StandardScaler(), model)
    began = time.perf_counter()
    pipeline.fit(train.x, train.labels)
    seconds = time.perf_counter() - began
    top1 = pipeline.score(test.x, test.labels)
    return [
        (f"scikit-learn at C {args.penalty:g}", 100 * top1, "%"),
        (f"scikit-learn, that one fit of {int(model.n_iter_[0])} iterations", seconds, "s"),
    ]


def _knn(args: argparse.Namespace, train: Features, test: Features) -> list[Row]:
    classes, times = int(train.labels.max()) + 1, []
    for _ in range(1 + args.repeats):  # the first compiles
        began = time.perf_counter()
        neighbours = knn.nearest(train.x, test.x, k=200)
        votes = knn.vote(neighbours, train.labels, classes, k=200, temperature=0.1)
        top1 = scores.top_k(votes, test.labels, 1)
        times.append(time.perf_counter() - began)
    table: list[Row] = [
        (f"kNN, {len(test.x):,} queries, first time", times[0], "s"),
        ("kNN, median of the rest", statistics.median(times[1:]), "s"),
        ("kNN top-1", 100 * top1, "%"),
        ("kNN top-1 by NumPy, all similarities", 100 * _brute_force(train, test), "%"),
    ]
    for factor in (1, 4, 16):
        blocks = -(-len(train.x) * factor // 8192)
        width, of_device = train.x.shape[1], jax.ShapeDtypeStruct((), jnp.int32)
        rows = jax.ShapeDtypeStruct((blocks * 8192, width), jnp.float32)
        used = jax.ShapeDtypeStruct((blocks * 8192,), bool)
        queries = jax.ShapeDtypeStruct((1024, width), jnp.float32)
        search = jax.jit(functools.partial(knn._nearest_of_part, k=200, bank_rows=8192))
        part = Part(rows, of_device, of_device)
        memory = search.lower(part, used, queries).compile().memory_analysis()
        size = memory.temp_size_in_bytes / 2**20
        table.append((f"kNN temporaries, a bank of {blocks * 8192:,}", size, "MiB"))
    return table


def _brute_force(train: Features, test: Features, k: int = 200, temperature: float = 0.1) -> float:
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.x, test.x))
    classes = int(train.labels.max()) + 1
    hits = 0
    for start in range(0, len(queries), 500):
        cosine = queries[start : start + 500] @ bank.T
        nearest = np.argpartition(-cosine, k, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosine, nearest, axis=1) / temperature)
        votes = np.zeros((len(cosine), classes))
        for row, (near, weight) in enumerate(zip(nearest, weights, strict=True)):
            np.add.at(votes[row], train.labels[near], weight)
        hits += int(np.sum(votes.argmax(axis=1) == test.labels[start : start + 500]))
    return hits / len(queries)


if __name__ == "__main__":
    main()
