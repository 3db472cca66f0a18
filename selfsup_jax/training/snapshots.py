"""Features of some images at one step, with the images, for kNN and for pictures of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.preprocessing import normalize

from selfsup_jax.devices import hosts
from selfsup_jax.evaluation.features import Features
from selfsup_jax.viz import plots


class Described(NamedTuple):
    """Images of a split: their features, small copies `[N, h, w, 3]` uint8, and their files."""

    features: Features
    images: np.ndarray
    files: list[str]

    def names(self, rows: np.ndarray, classes: Sequence[str] | None) -> list[str]:
        """The classes of these rows or, without any, the names of their files."""
        if classes:
            return [classes[i] for i in self.features.labels[rows]]
        return [os.path.basename(self.files[i]) for i in rows]


class Snapshot(NamedTuple):
    """Images among which neighbours are looked for (`bank`), and for which (`queries`)."""

    step: int
    bank: Described
    queries: Described

    def neighbours(
        self, rows: np.ndarray, count: int, classes: Sequence[str] | None
    ) -> plots.Neighbours:
        """The `count` images of the bank nearest to some queries; an image is not its own."""
        queries, bank = (normalize(part.features.x) for part in (self.queries, self.bank))
        similarity = queries[rows] @ bank.T
        if self.queries is self.bank:
            similarity[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argsort(-similarity, axis=1)[:, : min(count, len(bank) - 1)]
        names = [self.bank.names(row, classes) for row in nearest]
        similarities = np.take_along_axis(similarity, nearest, axis=1)
        return plots.Neighbours(self.bank.images[nearest], similarities, names)


def described(
    extract: Callable[..., Features], variables: Any, batches: Iterable[dict[str, np.ndarray]]
) -> Described:
    """The images of all hosts by an encoder with these variables; all hosts must call it.

    Args:
        extract: see `features.Extractor`.
        variables: of the encoder.
        batches: this host's part of the images.
    """
    images: list[np.ndarray] = []
    files: list[str] = []
    features = extract(variables, _noted(batches, images, files))
    all_files = [file for of_host in hosts.of_all("files", files) for file in of_host]
    return Described(features, hosts.gather_hosts(np.concatenate(images)), all_files)


def _noted(
    batches: Iterable[dict[str, np.ndarray]],
    images: list[np.ndarray],
    files: list[str],
    largest: int = 96,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the same batches; appends subsampled copies of their images, and their files."""
    for batch in batches:
        stride = -(-batch["image"].shape[1] // largest)
        images.append(batch["image"][:, ::stride, ::stride].copy())
        files += [str(name) for name in batch["name"]]
        yield batch
