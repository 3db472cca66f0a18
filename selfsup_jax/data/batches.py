"""What batches have in common, wherever the images are: their order, and what is left out."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from absl import logging

from selfsup_jax.errors import UserError

HostBatch = dict[str, np.ndarray]


@dataclasses.dataclass
class Undecodable:
    """Counts and logs the images that can't be decoded; too many of them stop the run.

    Attributes:
        num_examples: of the split.
        limit: the share of images that may be broken.
        names: of the broken images so far.
    """

    num_examples: int
    limit: float
    names: set[str] = dataclasses.field(default_factory=set)

    def add(self, name: str) -> None:
        """Adds one image; raises `UserError` if there are more than the limit."""
        if name in self.names:
            return
        self.names.add(name)
        logging.warning("cannot decode %s: skipped (%d so far)", name, len(self.names))
        if len(self.names) > self.limit * self.num_examples:
            raise UserError(
                f"config.data.max_undecodable={self.limit!r}: {len(self.names)} of "
                f"{self.num_examples} images cannot be decoded, the last {name}"
            )


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch, a permutation drawn from (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


_recent_order = functools.lru_cache(maxsize=2)(epoch_order)


@dataclasses.dataclass(frozen=True)
class Order:
    """Which examples this host's part of each batch has.

    An epoch has `num_examples // batch_size` batches, and its remaining examples are left out.

    Attributes:
        num_examples: of the split.
        seed: of the run.
        batch_size: global batch size.
        positions: `[b]`, this host's indices in the global batch.
    """

    num_examples: int
    seed: int
    batch_size: int
    positions: np.ndarray

    def rows(self, step: int) -> np.ndarray:
        """`[b]` indices of examples, for the batch that comes after `step` others."""
        epoch, batch = divmod(step, self.num_examples // self.batch_size)
        order = _recent_order(self.num_examples, self.seed, epoch)
        return order[batch * self.batch_size + self.positions]


def spread(num_examples: int, limit: int) -> np.ndarray:
    """At most `limit` indices of examples, evenly spread."""
    count = min(limit, num_examples)
    return np.linspace(0, num_examples, count, endpoint=False).astype(np.int64)


def neighbours(missing: np.ndarray) -> np.ndarray:
    """For each position of a batch, the index of its image among those that are not missing.

    A missing image is replaced by the next one in the batch, the last by the first.
    """
    present: np.ndarray = ~missing
    return (np.cumsum(present) - present) % np.sum(present)
