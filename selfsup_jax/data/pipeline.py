"""Batches of images that stay encoded: the host's cores decode them, a few batches ahead.

They crop them too, or leave that to the training step. The global batches are the same on any
number of hosts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from selfsup_jax.data import crops, host_crops, pixels, workers
from selfsup_jax.data.batches import HostBatch, Undecodable, epoch_order, neighbours, spread
from selfsup_jax.data.source import Source
from selfsup_jax.devices import process
from selfsup_jax.errors import UserError

_BATCHES_AHEAD = 3
_IMAGES_AT_ONCE = 8  # of one thread or process: their boxes are drawn in one call
_ROOM = 16 * 2**20  # bytes for these images: 2 MiB for each, four times what ImageNet's need


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
) -> Iterator[HostBatch]:
    """This host's part of each global batch, endlessly.

    An epoch has `num_examples // batch_size` batches, and its remaining examples are left out. An
    image that can't be decoded is replaced by a neighbour in the batch.

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

    Yields:
        `view_1`, `view_2`, ... `[b, size, size, 3]` uint8, `index` `[b]` int32, `name` `[b]` str
        (each image's file, or its id in the data set) and, with labels, `label` `[b]` int32. With a
        canvas, instead of views: `image` `[b, canvas, canvas, 3]` uint8, `size` `[b, 2]` int32 and
        `drawn` `[b]` int32 (the index whose crop is used).
    """
    count = len(positions)
    if canvas:
        put: Callable[..., None] = _put_image
        layout: workers.Layout = {"image": ((count, canvas, canvas, 3), "uint8")}
        layout["size"] = ((count, 2), "int32")
    else:
        put = functools.partial(_put_views, seed=seed, specs=tuple(specs))
        sides = enumerate((spec.size for spec in specs), start=1)
        layout = {f"view_{i}": ((count, side, side, 3), "uint8") for i, side in sides}
    labelled = bool(source.class_names)
    work = Decode(source.fetch, source.read, labelled, source.reading, put, canvas)
    raw = _batches_of_rows(source, seed, batch_size, positions, first_step)
    for encoded, made, good in _ahead(raw, layout, work, processes):
        batch = made | {"index": positions, "label": encoded.labels}
        batch["name"] = encoded.names.astype(str)
        if canvas:
            batch["drawn"] = positions
        if source.num_classes is None:
            del batch["label"]
        yield _without_gaps(batch, encoded, ~good, undecodable)


def _batches_of_rows(
    source: Source, seed: int, batch_size: int, positions: np.ndarray, step: int
) -> Iterator[Encoded]:
    steps_per_epoch = source.num_examples // batch_size
    while True:
        epoch, start = divmod(step, steps_per_epoch)
        order = epoch_order(source.num_examples, seed, epoch)
        for i in range(start, steps_per_epoch):
            yield _rows(source, order[i * batch_size + positions], positions, step)
            step += 1


def _rows(source: Source, rows: np.ndarray, index: np.ndarray, step: int = 0) -> Encoded:
    labels = -np.ones(len(rows), np.int32) if source.labels is None else source.labels[rows]
    names = np.empty(len(rows), object)
    if source.read is None:
        names[:] = [source.describe(int(row)) for row in rows]
    return Encoded(step, index, source.images[rows], labels.astype(np.int32), names)


@dataclasses.dataclass(frozen=True)
class Decode:
    """The work of a thread or process on a few images of a batch.

    Attributes:
        fetch, read: see `Source`; both None if it is given paths or bytes.
        labelled: whether its labels count.
        reading: how encoded images become pixels.
        put: `(images, step, index, arrays)`: puts decoded images, or None for one that is broken,
            into these rows of a batch.
        canvas: see `train_batches`.
        shape: (height, width) that an image must have, or None.
    """

    fetch: Callable[..., Any] | None
    read: Callable[..., Any] | None
    labelled: bool
    reading: pixels.Reading
    put: Callable[..., None]
    canvas: int = 0
    shape: tuple[int, int] | None = None

    def __call__(
        self, made: workers.Arrays, step: int, index: np.ndarray, encoded: Any
    ) -> tuple[list[bool], Any, Any]:
        """(which images could be decoded, labels, names); the last two are None without `read`."""
        labels = names = None
        if self.read is not None:
            encoded, labels, names = self.read(encoded)
        elif self.fetch is not None:
            encoded = self.fetch(encoded)
        room = _room()
        images = [pixels.decoded(image, self.reading, self.canvas, room) for image in encoded]
        if self.shape is not None:  # an image of another size than all others is broken, too
            images = [x if x is not None and x.shape[:2] == self.shape else None for x in images]
        self.put(images, step, index, made)
        return [image is not None for image in images], labels, names


_of_thread = threading.local()


def _room() -> pixels.Room:
    """This thread's memory for decoded images; those that were in it are forgotten."""
    if not hasattr(_of_thread, "room"):
        _of_thread.room = pixels.Room(_ROOM)
    _of_thread.room.clear()
    return _of_thread.room


def _ahead(
    raw: Iterable[Encoded], layout: workers.Layout, work: Decode, processes: int = 0
) -> Iterator[tuple[Encoded, workers.Arrays, np.ndarray]]:
    """Yields each batch, its arrays once they are filled, and which images could be decoded."""
    pending: collections.deque[Any] = collections.deque()

    def first() -> tuple[Encoded, workers.Arrays, np.ndarray]:
        encoded, made, parts = pending.popleft()
        good = np.zeros(len(encoded.images), bool)
        for rows, part in parts:
            good[rows], labels, names = part.result()
            if names is not None:
                encoded.names[rows] = names
                encoded.labels[rows] = labels if work.labelled else -1
        return encoded, made, good

    pool = workers.pool(work, processes)
    try:
        for encoded in raw:
            made, submit = pool.batch(layout)
            parts = []
            for i in range(0, len(encoded.images), _IMAGES_AT_ONCE):
                rows = slice(i, i + _IMAGES_AT_ONCE)
                task = encoded.step, encoded.positions[rows], encoded.images[rows]
                parts.append((rows, submit(rows, *task)))
            pending.append((encoded, made, parts))
            del made, parts  # so that their memory is free once the batch is
            if len(pending) > _BATCHES_AHEAD:
                yield first()
        while pending:
            yield first()
    finally:
        pool.close()


def _put_image(images, step, index, made) -> None:
    made["size"][:] = 1
    for image, size, whole in zip(images, made["size"], made["image"], strict=True):
        height, width = (0, 0) if image is None else image.shape[:2]
        if image is not None:
            size[:] = height, width
            whole[:height, :width] = image
        whole[:height, width:] = 0
        whole[height:] = 0


_boxes = jax.jit(crops.boxes, static_argnames="specs")


def _put_views(images, step, index, made, *, seed, specs) -> None:
    missing = _IMAGES_AT_ONCE - len(images)  # one compilation for all
    sizes = np.ones((_IMAGES_AT_ONCE, 2), np.int32)
    for i, image in enumerate(images):
        if image is not None:
            sizes[i] = image.shape[:2]
    with process.on_cpu():
        index = np.pad(index, (0, missing))
        boxes = np.asarray(_boxes(seed, np.int32(step), index, sizes, specs=specs))
    for i, image in enumerate(images):
        if image is not None:
            for view, box, spec in zip(made.values(), boxes[i], specs, strict=True):
                view[i] = host_crops.crop_and_resize(image, box, spec)


def _put_test_view(images, step, index, made, *, resize, size, method) -> None:
    for i, image in enumerate(images):
        if image is not None:
            made["image"][i] = host_crops.test_view(image, resize, size, method)


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
    put = functools.partial(_put_test_view, resize=resize, size=size, method=method)
    labelled, shape = bool(source.class_names), source.shape
    work = Decode(source.fetch, source.read, labelled, source.reading, put, shape=shape)
    layout: workers.Layout = {"image": ((batch_size, size, size, 3), "uint8")}
    for encoded, made, good in _ahead(raw, layout, work):
        for name in encoded.names[~good]:
            undecodable.add(str(name))
        if good.any():
            batch = {"image": made["image"][: len(good)], "label": encoded.labels}
            batch["name"] = encoded.names.astype(str)
            yield {k: x[good] for k, x in batch.items()}
