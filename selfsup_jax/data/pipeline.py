"""Batches of images that stay encoded: the host's cores decode them, a few batches ahead.

They crop them too, or leave that to the training step. The global batches are the same on any
number of hosts.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from selfsup_jax.data import crops, grain_reader, parts, workers
from selfsup_jax.data.batches import HostBatch, Order, Undecodable, neighbours, spread
from selfsup_jax.data.source import Source
from selfsup_jax.errors import UserError


class Encoded(NamedTuple):
    """A batch of this host, not decoded.

    Attributes:
        step: the steps before it.
        positions: `[b]`, in the global batch.
        images: `[b]` paths or bytes, or places for `Source.fetch`, or for `Source.read`, which
            gives labels and names.
        labels: `[b]` int32 (`[b, classes]` if an image can have several), -1 without labels.
        names: `[b]` str.
    """

    step: int
    positions: np.ndarray
    images: Any
    labels: np.ndarray
    names: np.ndarray


def train_batches(
    source: Source,
    specs: Sequence[crops.CropSpec],
    *,
    canvas: int = 0,
    seed: int,
    batch_size: int,
    positions: np.ndarray,
    first_step: int,
    undecodable: Undecodable,
    processes: int = 0,
    reader: str = "builtin",
) -> Iterator[HostBatch]:
    """This host's part of each global batch, endlessly, in the order of `batches.Order`.

    An image that can't be decoded is replaced by a neighbour in the batch.

    Args:
        source: the split.
        specs: how the crops of each view are drawn.
        canvas: 0, or the side in pixels of the square in which an image is left to
            `resident.crop_batch`; larger images are made smaller.
        seed: of the order and the crops.
        batch_size: global batch size.
        positions: `[b]`, this host's indices in the global batch.
        first_step: the step of the first batch.
        undecodable: counts the broken images.
        processes: that decode; 0: threads.
        reader: whose threads or processes: ours, or those of `grain`.

    Yields:
        `view_1`, `view_2`, ... `[b, size, size, 3]` uint8, `index` `[b]` int32, `name` `[b]` str
        (each image's file, or its id in the data set) and, with labels, `label` `[b]` int32. With a
        canvas, instead of views: `image` `[b, canvas, canvas, 3]` uint8, `size` `[b, 2]` int32 and
        `drawn` `[b]` int32 (the index whose crop is used).
    """
    work, layout = parts.for_training(source, specs, canvas, seed, len(positions))
    order = Order(source.num_examples, seed, batch_size, positions)
    steps = itertools.count(first_step)
    raw = (_rows(source, order.rows(step), positions, step) for step in steps)
    if reader == "grain":
        all_parts = grain_reader.Parts(work, layout, order, source.images, first_step)
        filled = grain_reader.filled(raw, all_parts, processes)
    else:
        filled = _filled(raw, layout, work, processes)
    for encoded, made, answers in filled:
        good = _told(encoded, answers, work.labelled)
        batch = made | {"index": positions, "label": encoded.labels}
        batch["name"] = encoded.names.astype(str)
        if canvas:
            batch["drawn"] = positions
        if source.num_classes is None:
            del batch["label"]
        yield _without_gaps(batch, encoded, ~good, undecodable)


def _rows(source: Source, rows: np.ndarray, index: np.ndarray, step: int = 0) -> Encoded:
    labels = -np.ones(len(rows), np.int32) if source.labels is None else source.labels[rows]
    names = np.empty(len(rows), object)
    if source.read is None:
        names[:] = [source.describe(int(row)) for row in rows]
    return Encoded(step, index, source.images[rows], labels.astype(np.int32), names)


Answers = list[tuple[slice, parts.Answer]]


def _told(encoded: Encoded, answers: Answers, labelled: bool) -> np.ndarray:
    """`[b]`, which images could be decoded; labels and names from the files go to `encoded`."""
    good = np.zeros(len(encoded.images), bool)
    for rows, answer in answers:
        good[rows] = answer.good
        if answer.names is not None:
            encoded.names[rows] = answer.names
            encoded.labels[rows] = answer.labels if labelled else -1
    return good


def _filled(
    raw: Iterable[Encoded], layout: workers.Layout, work: parts.Decode, processes: int = 0
) -> Iterator[tuple[Encoded, workers.Arrays, Answers]]:
    """Yields each batch, and its arrays once all their parts are filled."""
    pending: collections.deque[Any] = collections.deque()

    def first() -> tuple[Encoded, workers.Arrays, Answers]:
        encoded, made, tasks = pending.popleft()
        return encoded, made, [(rows, task.result()) for rows, task in tasks]

    pool = workers.pool(work, processes)
    try:
        for encoded in raw:
            made, submit = pool.batch(layout)
            tasks = []
            for rows in parts.slices(len(encoded.images)):
                task = encoded.step, encoded.positions[rows], encoded.images[rows]
                tasks.append((rows, submit(rows, *task)))
            pending.append((encoded, made, tasks))
            del made, tasks  # so that their memory is free once the batch is
            if len(pending) > workers.BATCHES_AHEAD:
                yield first()
        while pending:
            yield first()
    finally:
        pool.close()


def _without_gaps(
    batch: HostBatch, encoded: Encoded, missing: np.ndarray, undecodable: Undecodable
) -> HostBatch:
    """Replaces each missing image by the next one that was decoded."""
    if not missing.any():
        return batch
    for name in encoded.names[missing]:
        undecodable.add(str(name))
    if missing.all():
        raise UserError(
            f"config.data.dir: no image of the batch of step {encoded.step} can be decoded"
        )
    rows = np.flatnonzero(~missing)[neighbours(missing)]
    return {k: v[rows] for k, v in batch.items()} | {"index": batch["index"]}


def eval_batches(
    source: Source,
    *,
    resize: int,
    size: int,
    method: str,
    batch_size: int,
    limit: int,
    undecodable: Undecodable,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[HostBatch]:
    """This host's part of a split: each image once, not augmented; the last batch may be small.

    Args:
        source: the split.
        resize, size, method: see `crops.test_view`.
        batch_size: of this host.
        limit: maximum number of images over all hosts, evenly spread.
        undecodable: counts the broken images, which are left out.
        host, hosts: this host's index and the number of hosts.

    Yields:
        `image` `[b, size, size, 3]` uint8, `label` `[b]` int32 (-1 without labels; `[b, classes]`
        if an image can have several) and `name` `[b]` str.
    """
    indices = np.array_split(spread(source.num_examples, limit), hosts)[host]
    blocks = (indices[i : i + batch_size] for i in range(0, len(indices), batch_size))
    raw = (_rows(source, rows, np.arange(len(rows))) for rows in blocks)
    work, layout = parts.for_evaluation(source, resize, size, method, batch_size)
    for encoded, made, answers in _filled(raw, layout, work):
        good = _told(encoded, answers, work.labelled)
        for name in encoded.names[~good]:
            undecodable.add(str(name))
        if good.any():
            batch = {"image": made["image"][: len(good)], "label": encoded.labels}
            batch["name"] = encoded.names.astype(str)
            yield {k: x[good] for k, x in batch.items()}
