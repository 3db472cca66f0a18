"""The evaluation at the end of a run: its last encoder, compared with baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from selfsup_jax.evaluation import probes
from selfsup_jax.evaluation.features import Extractor, Features, pixels
from selfsup_jax.run.progress import log
from selfsup_jax.viz import titles


class Batches(NamedTuple):
    """A split's labelled images: each call of `read` yields this host's part of them once."""

    read: Callable[[], Iterable[dict[str, np.ndarray]]]
    most: int  # at least the number of images, over all hosts


# Prefix of a result's name -> the features that were measured.
BASELINES = {"": "this encoder"} | titles.BASELINES


def evaluate(
    extract: Extractor,
    trained: Any,
    random_init: Any | None,
    train_batches: Batches,
    test_batches: Batches,
    num_classes: int,
    config: Any,
    seed: int,
) -> dict[str, float]:
    """Probes the trained encoder and its baselines on the same images.

    Args:
        extract: see `features.Extractor`.
        trained: the trained encoder's variables.
        random_init: an untrained encoder's variables, or None.
        train_batches, test_batches: of the two splits.
        num_classes: the number of classes.
        config: the `eval` section.
        seed: the seed of the probes.

    Returns:
        The results of `probe`, and those of the baselines with the prefixes `random_init_` and
        `pixels_`.
    """
    encoders = {"": trained} | ({} if random_init is None else {"random_init_": random_init})
    sources: dict[str, Callable[[Batches], Features]] = {
        prefix: lambda b, v=variables: extract.spread(v, b.read(), b.most)  # type: ignore[misc]
        for prefix, variables in encoders.items()
    }
    if config.pixels:
        sources["pixels_"] = lambda b: pixels(b.read(), b.most)
    results: dict[str, float] = {}
    for prefix, features in sources.items():
        train, test = features(train_batches), features(test_batches)
        images = f"{len(train.labels):,} + {len(test.labels):,} images"
        log(f"probes on {images}: {BASELINES[prefix]}")
        measured = probe(train, test, num_classes, config, seed)
        results |= {prefix + name: value for name, value in measured.items()}
    return results


def probe(
    train: Features, test: Features, num_classes: int, config: Any, seed: int
) -> dict[str, float]:
    """Linear probe, kNN and few labels on one set of features, as in the jobs of these names."""
    linear = probes.linear(train, test, num_classes, seed=seed, **config.linear)
    knn = probes.knn_of_run(train, test, num_classes, config, seed)
    few = probes.few_labels(
        train,
        test,
        labels_per_class=config.fewshot_labels,
        draws=config.fewshot_draws,
        seed=seed,
    )
    return linear.results | knn.results | {"fewshot_top1": few.top1, "fewshot_top1_std": few.std}


def summary(results: dict[str, Any]) -> str:
    """A plain-text table of the probes, in percent."""
    metrics = ("linear_probe_top1", "fewshot_top1", "knn_top1")
    rows: list[tuple[str, ...]] = [("", "linear probe", "few labels", f"kNN, k {results['knn_k']}")]
    for prefix, name in BASELINES.items():
        if f"{prefix}knn_top1" in results:
            rows.append((name, *(f"{100 * results[prefix + key]:.1f} %" for key in metrics)))
    return "\n".join(
        f"  {name:<14}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in rows
    )
