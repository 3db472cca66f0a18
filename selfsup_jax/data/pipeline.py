"""Batches of images that stay encoded: threads of the host decode them, a few batches ahead.

They crop them too, or leave that to the training step. A split in memory gives the same global
batches on any number of hosts.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from selfsup_jax.data import crops, host_crops, pixels
from selfsup_jax.data.batches import HostBatch, Undecodable, epoch_order, neighbours, spread
from selfsup_jax.data.source import Source
from selfsup_jax.devices import process
from selfsup_jax.errors import UserError

_BATCHES_AHEAD = 3
_IMAGES_AT_ONCE = 8  # of one thread: their boxes are drawn in one call


class Encoded(NamedTuple):
    """A batch of this host, not decoded.

    Attributes:
        step: the steps before it.
        images: `[b]` paths or bytes; or indices for `Source.read`, which gives labels and names.
        labels: `[b]` int32 (`[b, classes]` if an image can have several), -1 without labels.
        names: `[b]` str.
    """

    step: int
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
    host: int = 0,
    hosts: int = 1,
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
        host, hosts: this host's index and the number of hosts, for streamed splits.

    Yields:
        `view_1`, `view_2`, ... `[b, size, size, 3]` uint8, `index` `[b]` int32, `name` `[b]` str
        (each image's file, or its id in the data set) and, with labels, `label` `[b]` int32. With a
        canvas, instead of views: `image` `[b, canvas, canvas, 3]` uint8, `size` `[b, 2]` int32 and
        `drawn` `[b]` int32 (the index whose crop is used).
    """
    if source.stream is None:
        raw = _batches_of_rows(source, seed, batch_size, positions, first_step)
    else:
        raw = _streamed_batches(source, seed, batch_size, len(positions), first_step, host, hosts)
    put = _put_image if canvas else functools.partial(_put_views, seed=seed, specs=tuple(specs))

    def arrays() -> dict[str, np.ndarray]:
        if canvas:
            shape = (len(positions), canvas, canvas, 3)
            return {"image": np.zeros(shape, np.uint8), "size": np.ones((shape[0], 2), np.int32)}
        shapes = [(len(positions), spec.size, spec.size, 3) for spec in specs]
        return {f"view_{i}": np.empty(s, np.uint8) for i, s in enumerate(shapes, start=1)}

    def work(encoded: Encoded, made: dict[str, np.ndarray], chunk: slice) -> list[bool]:
        given = _read(source, encoded, chunk)
        images = [pixels.decoded(image, source.reading, canvas) for image in given]
        put(images, encoded.step, positions[chunk], {k: x[chunk] for k, x in made.items()})
        return [image is not None for image in images]

    for encoded, made, good in _ahead(raw, arrays, work):
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
            yield _rows(source, order[i * batch_size + positions], step)
            step += 1


def _rows(source: Source, rows: np.ndarray, step: int = 0) -> Encoded:
    labels = -np.ones(len(rows), np.int32) if source.labels is None else source.labels[rows]
    if source.images is None:
        return Encoded(step, rows, labels, np.empty(len(rows), object))
    names = np.array([source.describe(int(row)) for row in rows])
    return Encoded(step, source.images[rows], labels.astype(np.int32), names)


def _read(source: Source, encoded: Encoded, chunk: slice) -> Sequence[pixels.Encoded]:
    if source.read is None:
        return encoded.images[chunk]
    images, encoded.labels[chunk], encoded.names[chunk] = source.read(encoded.images[chunk])
    return images


def _streamed_batches(
    source: Source, seed: int, batch_size: int, size: int, step: int, host: int, hosts: int
) -> Iterator[Encoded]:
    """Each host reads its own part of the split, in an order of the files and the epoch."""
    assert source.stream is not None
    steps_per_epoch = source.num_examples // batch_size
    while True:
        epoch, start = divmod(step, steps_per_epoch)
        epoch_seed = int(np.random.default_rng((seed, epoch)).integers(2**31))
        examples = source.stream(epoch_seed, host, hosts)
        # A host with a slightly larger part stops at the same step as the others.
        batches = examples.batch(size, drop_remainder=True).take(steps_per_epoch).skip(start)
        for images, labels, names in batches.prefetch(_BATCHES_AHEAD).as_numpy_iterator():
            yield Encoded(step, images, labels, np.array([name.decode() for name in names]))
            step += 1


def _ahead(
    raw: Iterable[Encoded],
    arrays: Callable[[], dict[str, np.ndarray]],
    work: Callable[[Encoded, dict[str, np.ndarray], slice], list[bool]],
) -> Iterator[tuple[Encoded, dict[str, np.ndarray], np.ndarray]]:
    """Yields each batch, its arrays once they are filled, and which images could be decoded."""
    pending: collections.deque[Any] = collections.deque()

    def first() -> tuple[Encoded, dict[str, np.ndarray], np.ndarray]:
        encoded, made, parts = pending.popleft()
        return encoded, made, np.concatenate([part.result() for part in parts])

    threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")
    try:
        for encoded in raw:
            made, count = arrays(), len(encoded.images)
            chunks = [slice(i, i + _IMAGES_AT_ONCE) for i in range(0, count, _IMAGES_AT_ONCE)]
            parts = [threads.submit(work, encoded, made, chunk) for chunk in chunks]
            pending.append((encoded, made, parts))
            if len(pending) > _BATCHES_AHEAD:
                yield first()
        while pending:
            yield first()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _put_image(images, step, index, made) -> None:
    for i, image in enumerate(images):
        if image is not None:
            made["size"][i] = image.shape[:2]
            made["image"][i, : image.shape[0], : image.shape[1]] = image


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
        limit: maximum number of images over all hosts: evenly spread, or shuffled if streamed.
        undecodable: counts the broken images, which are left out.
        host, hosts: this host's index and the number of hosts.

    Yields:
        `image` `[b, size, size, 3]` uint8, `label` `[b]` int32 (-1 without labels; `[b, classes]`
        if an image can have several) and `name` `[b]` str.
    """
    if source.stream is None:
        indices = np.array_split(spread(source.num_examples, limit), hosts)[host]
        starts = range(0, len(indices), batch_size)
        raw: Iterable[Encoded] = (_rows(source, indices[i : i + batch_size]) for i in starts)
    else:
        raw = _streamed_part(source, batch_size, limit, host, hosts)

    def work(encoded: Encoded, made: dict[str, np.ndarray], chunk: slice) -> list[bool]:
        good = []
        for i, image in enumerate(_read(source, encoded, chunk), start=chunk.start):
            rgb = pixels.decoded(image, source.reading)
            if rgb is not None and source.shape not in (None, rgb.shape[:2]):
                rgb = None  # an image of another size than all others is broken, too
            if rgb is not None:
                made["image"][i] = host_crops.test_view(rgb, resize, size, method)
            good.append(rgb is not None)
        return good

    def arrays() -> dict[str, np.ndarray]:
        return {"image": np.empty((batch_size, size, size, 3), np.uint8)}

    for encoded, made, good in _ahead(raw, arrays, work):
        for name in encoded.names[~good]:
            undecodable.add(str(name))
        if good.any():
            batch = {"image": made["image"][: len(good)], "label": encoded.labels}
            batch["name"] = encoded.names.astype(str)
            yield {k: x[good] for k, x in batch.items()}


def _streamed_part(
    source: Source, batch_size: int, limit: int, host: int, hosts: int
) -> Iterator[Encoded]:
    assert source.stream is not None
    count = min(limit, source.num_examples)
    whole = count == source.num_examples
    examples = source.stream(None if whole else 0, host, hosts)
    if not whole:
        examples = examples.take(count // hosts + (host < count % hosts))
    for images, labels, names in examples.batch(batch_size).prefetch(2).as_numpy_iterator():
        yield Encoded(0, images, labels, np.array([name.decode() for name in names]))
