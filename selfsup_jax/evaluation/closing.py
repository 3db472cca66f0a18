"""What a run has learned: probes of its last encoder, beside one that was never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from selfsup_jax.devices import hosts
from selfsup_jax.evaluation.features import Features, pixels
from selfsup_jax.evaluation.knn import knn_accuracy
from selfsup_jax.evaluation.linear_probe import few_shot, linear_probe
from selfsup_jax.run.progress import say

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]


def probe(train: Features, test: Features, config: Any, seed: int) -> dict[str, float]:
    """kNN, linear probe and few-shot probe of one set of features, fractions in [0, 1].

    Args:
        train: features and labels that the probes learn from.
        test: held-out features and labels.
        config: the `eval` section.
        seed: of the held-out fifth and the few-shot draws.
    """
    linear = linear_probe(train, test, seed=seed)
    few = few_shot(
        train,
        test,
        labels_per_class=config.fewshot_labels,
        draws=config.fewshot_draws,
        seed=seed,
    )
    knn = knn_accuracy(train, test, k=config.knn_k, temperature=config.knn_temperature)
    return {
        "knn_top1": knn,
        "linear_probe_top1": linear.top1,
        "linear_probe_top5": linear.top5,
        "fewshot_top1": few.top1,
        "fewshot_top1_std": few.std,
    }


def evaluate(
    extract: Callable[..., Features],
    trained: Any,
    random_init: Any | None,
    train_batches: Batches,
    test_batches: Batches,
    config: Any,
    seed: int,
) -> dict[str, float]:
    """Probes the trained encoder and what it is compared with, on the same images.

    Args:
        extract: see `features.Extractor`.
        trained: the trained encoder's variables.
        random_init: an untrained encoder's, or None.
        train_batches, test_batches: each call gives the split's labelled images once.
        config: the `eval` section.
        seed: of the probes.

    Returns:
        `probe`'s numbers, and the same behind `random_init_` and `pixels_`. On hosts other than
        the one that writes: nothing, since probes are not shared work.
    """

    def measure(name: str, features: Callable[[Batches], Features]) -> dict[str, float]:
        train, test = features(train_batches), features(test_batches)
        if not hosts.is_writer():
            return {}
        say(f"probing {name} on {len(train.labels)} + {len(test.labels)} images")
        return probe(train, test, config, seed)

    results = measure("the trained encoder", lambda batches: extract(trained, batches()))
    if random_init is not None:
        untrained = measure("an untrained encoder", lambda b: extract(random_init, b()))
        results |= {f"random_init_{k}": v for k, v in untrained.items()}
    if config.pixels:
        raw = measure("raw pixels", lambda batches: pixels(batches()))
        results |= {f"pixels_{k}": v for k, v in raw.items()}
    return results


def summary(results: dict[str, Any]) -> str:
    """A plain-text table of the probes, percentages."""
    rows: list[tuple[str, ...]] = [("", "linear probe", "few labels", "kNN")]
    for name, prefix in (
        ("this encoder", ""),
        ("never trained", "random_init_"),
        ("raw pixels", "pixels_"),
    ):
        if f"{prefix}knn_top1" in results:
            values = (
                results[f"{prefix}{key}"]
                for key in ("linear_probe_top1", "fewshot_top1", "knn_top1")
            )
            rows.append((name, *(f"{100 * value:.1f} %" for value in values)))
    return "\n".join(
        f"  {name:<14}" + "".join(f"{cell:>14}" for cell in cells) for name, *cells in rows
    )
