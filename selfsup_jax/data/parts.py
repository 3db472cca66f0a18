"""A part of a batch: what a thread or process does with a few of its images.

It reads, decodes and, unless the training step does, crops them, into rows of the batch's arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from selfsup_jax.data import crops, host_crops, pixels, workers
from selfsup_jax.data.source import Source
from selfsup_jax.devices import process

IMAGES_AT_ONCE = 8  # of one thread or process: their boxes are drawn in one call
_ROOM = 16 * 2**20  # bytes for these images: 2 MiB for each, four times what ImageNet's need


def slices(count: int) -> list[slice]:
    """The rows of each part of a batch of `count` images; the last part may be smaller."""
    starts = range(0, count, IMAGES_AT_ONCE)
    return [slice(start, min(start + IMAGES_AT_ONCE, count)) for start in starts]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is known of a part's images once they are read.

    Attributes:
        good: which could be decoded.
        labels, names: see `Source.read`; None without it.
    """

    good: list[bool]
    labels: Any = None
    names: Any = None


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

    def __call__(self, made: workers.Arrays, step: int, index: np.ndarray, encoded: Any) -> Answer:
        """Fills these rows of a batch's arrays."""
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
        return Answer([image is not None for image in images], labels, names)


_of_thread = threading.local()


def _room() -> pixels.Room:
    """This thread's memory for decoded images; those that were in it are forgotten."""
    if not hasattr(_of_thread, "room"):
        _of_thread.room = pixels.Room(_ROOM)
    _of_thread.room.clear()
    return _of_thread.room


def for_training(
    source: Source, specs: Sequence[crops.CropSpec], canvas: int, seed: int, count: int
) -> tuple[Decode, workers.Layout]:
    """The work on batches of `count` images and their arrays: see `pipeline.train_batches`."""
    if canvas:
        put: Callable[..., None] = _put_image
        layout: workers.Layout = {"image": ((count, canvas, canvas, 3), "uint8")}
        layout["size"] = ((count, 2), "int32")
    else:
        put = functools.partial(_put_views, seed=seed, specs=tuple(specs))
        sides = enumerate((spec.size for spec in specs), start=1)
        layout = {f"view_{i}": ((count, side, side, 3), "uint8") for i, side in sides}
    labelled = bool(source.class_names)
    return Decode(source.fetch, source.read, labelled, source.reading, put, canvas), layout


def for_evaluation(
    source: Source, resize: int, size: int, method: str, count: int
) -> tuple[Decode, workers.Layout]:
    """The work on batches of `count` images and their arrays: see `pipeline.eval_batches`."""
    put = functools.partial(_put_test_view, resize=resize, size=size, method=method)
    labelled, shape = bool(source.class_names), source.shape
    work = Decode(source.fetch, source.read, labelled, source.reading, put, shape=shape)
    return work, {"image": ((count, size, size, 3), "uint8")}


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
    missing = IMAGES_AT_ONCE - len(images)  # one compilation for all
    sizes = np.ones((IMAGES_AT_ONCE, 2), np.int32)
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
