"""Features of a split: the frozen encoder on unaugmented images, every image once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from selfsup_jax import parallel
from selfsup_jax.augment import normalize


class Features(NamedTuple):
    """Rows in the order of the split, over all hosts."""

    x: np.ndarray  # [N, D] float32
    labels: np.ndarray  # [N] int32, -1 without labels


def make_extractor(
    represent: Callable[[Any, jax.Array], jax.Array],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable[[Any, Iterable[dict[str, np.ndarray]]], Features]:
    """A function `(encoder variables, batches) -> Features`, compiled once for many encoders.

    Args:
        represent: `(variables, images [B, H, W, 3] float32) -> [B, D] float32`.
        mean, std: per channel, as in training.
    """

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        return represent(variables, normalize(images.astype(jnp.float32) / 255.0, mean, std))

    bind = parallel.pmap_over_local(apply)

    def extract(variables: Any, batches: Iterable[dict[str, np.ndarray]]) -> Features:
        encode = bind(variables)
        parts = [(encode(b["image"]), b["label"]) for b in batches]
        x = np.concatenate([x for x, _ in parts])
        labels = np.concatenate([labels for _, labels in parts]).astype(np.int32)
        return Features(*parallel.gather_hosts((x, labels)))

    return extract


def pixels(batches: Iterable[dict[str, np.ndarray]]) -> Features:
    """The images themselves as features, in [0, 1]: what an encoder has to beat."""
    parts = [(b["image"].reshape(len(b["image"]), -1), b["label"]) for b in batches]
    x = np.concatenate([x for x, _ in parts]).astype(np.float32) / 255.0
    labels = np.concatenate([labels for _, labels in parts]).astype(np.int32)
    return Features(*parallel.gather_hosts((x, labels)))
