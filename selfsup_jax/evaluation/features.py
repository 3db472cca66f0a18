"""Features of a split: the frozen encoder applied once to each image, without augmentation."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from selfsup_jax.data.augment import normalize
from selfsup_jax.devices import hosts, parallel
from selfsup_jax.devices.table import Table, spread
from selfsup_jax.errors import UserError

HostBatch = dict[str, np.ndarray]


class Features(NamedTuple):
    """Rows in the order of the split, over all hosts.

    `x` is an array that every host has, or a table that is spread over all devices of all hosts;
    rows of it, `x[rows]`, are an array.
    """

    x: np.ndarray | Table  # [N, D] float32
    labels: np.ndarray  # [N] int32, -1 without labels; [N, classes] if there can be several


class Extractor:
    """Computes features on all of this host's devices; compiled once for many encoders.

    Args:
        represent: `(variables, images [B, H, W, 3] float32) -> [B, D] float32`.
        mean, std: per channel, those of the training.
    """

    def __init__(
        self,
        represent: Callable[[Any, jax.Array], jax.Array],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        def apply(variables: Any, images: jax.Array) -> jax.Array:
            if images.dtype != jnp.uint8:  # others would be divided by 255 all the same
                raise TypeError(f"images are {images.dtype}; must be uint8, from 0 to 255")
            return represent(variables, normalize(images.astype(jnp.float32) / 255.0, mean, std))

        self._bind = parallel.pmap_over_local(apply)

    def stream(
        self, variables: Any, batches: Iterable[HostBatch]
    ) -> Iterator[tuple[np.ndarray, HostBatch]]:
        """Yields (features `[b, D]`, batch without its images) of `inputs.eval_batches`."""
        waiting: collections.deque[HostBatch] = collections.deque()

        def images() -> Iterator[np.ndarray]:
            for batch in batches:
                waiting.append({k: v for k, v in batch.items() if k != "image"})
                yield batch["image"]

        for x in self._bind(variables)(images()):
            yield x, waiting.popleft()

    def __call__(self, variables: Any, batches: Iterable[HostBatch]) -> Features:
        """All hosts' features as an array on every host: of a few thousand images.

        Args:
            variables: of an encoder, `{"params", "batch_stats"}`.
            batches: this host's part of the images.

        Raises:
            UserError: there are no images.
        """
        parts = [(x, batch["label"]) for x, batch in self.stream(variables, batches)]
        if not parts:
            raise UserError(_NO_IMAGE)
        x, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Features(*hosts.gather_hosts((x, labels.astype(np.int32))))

    def spread(self, variables: Any, batches: Iterable[HostBatch], most: int) -> Features:
        """The features as a table; arguments and errors as above.

        Args:
            variables, batches: as above.
            most: at least the number of images, over all hosts.
        """
        return _spread(((x, b["label"]) for x, b in self.stream(variables, batches)), most)


def pixels(batches: Iterable[HostBatch], most: int) -> Features:
    """The pixels as features, in [0, 1]: a baseline that an encoder must exceed."""
    rows = ((b["image"].reshape(len(b["image"]), -1), b["label"]) for b in batches)
    return _spread(((x.astype(np.float32) / 255.0, labels) for x, labels in rows), most)


_NO_IMAGE = "config.data: a split holds no image that can be decoded"


def _spread(rows: Iterable[tuple[np.ndarray, np.ndarray]], most: int) -> Features:
    labels: list[np.ndarray] = []

    def features() -> Iterator[np.ndarray]:
        for x, of_rows in rows:
            labels.append(of_rows.astype(np.int32))
            yield x

    table = spread(features(), most)
    if not len(table):
        raise UserError(_NO_IMAGE)
    own = np.concatenate(labels) if labels else np.zeros(0, np.int32)  # more hosts than images
    return Features(table, hosts.gather_hosts(own))
