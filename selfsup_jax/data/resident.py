"""Splits in one array: the training step gathers, crops and resizes their images.

The array is kept on each device. If it is too large, it stays on the host, and the batches have
their images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from selfsup_jax.data import crops
from selfsup_jax.data.batches import HostBatch, Order, Undecodable, neighbours, spread
from selfsup_jax.data.source import Source
from selfsup_jax.devices import process
from selfsup_jax.errors import UserError
from selfsup_jax.state import Batch


class Arrays(NamedTuple):
    """A split, on a device or still on the host.

    Attributes:
        images: `[N, H, W, 3]` uint8.
        sizes: `[N, 2]` int32, height and width; None if all images fill H x W.
        labels: `[N]` int32, or None.
    """

    images: Any
    sizes: Any
    labels: Any


def arrays_of(source: Source) -> Arrays:
    """The arrays of a split, still on the host."""
    labels = source.labels if source.num_classes else None
    return Arrays(source.images, source.sizes, labels)


def train_batches(
    source: Source,
    *,
    with_images: bool,
    seed: int,
    batch_size: int,
    positions: np.ndarray,
    first_step: int,
    undecodable: Undecodable,
) -> Iterator[HostBatch]:
    """This host's part of each global batch, endlessly, for `crop_batch`.

    The order and the replacement of broken images are those of `pipeline.train_batches`.

    Args:
        source: the split.
        with_images: whether the batches have their images and labels.
        seed, batch_size, positions, first_step: see `pipeline.train_batches`.
        undecodable: counts the broken images.

    Yields:
        `row` `[b]` int32 (index of the example in the split), `index` `[b]` int32 (in the global
        batch), `drawn` `[b]` int32 (the index whose crop is used: `index`, unless the image is a
        replacement) and `name` `[b]` str; with images also `image` `[b, H, W, 3]` uint8, `size`
        `[b, 2]` int32 if they differ in size, and `label` `[b]` int32 if there are labels.
    """
    order = Order(source.num_examples, seed, batch_size, positions)
    broken = np.zeros(source.num_examples, bool)
    broken[list(source.broken)] = True
    for step in itertools.count(first_step):
        rows, drawn = order.rows(step).astype(np.int32), positions
        if (missing := broken[rows]).any():
            for row in rows[missing]:
                undecodable.add(source.describe(int(row)))
            if missing.all():
                raise UserError(
                    f"config.data.dir: no image of the batch of step {step} can be decoded"
                )
            kept = neighbours(missing)
            rows, drawn = rows[~missing][kept], positions[~missing][kept]
        names = np.array([source.describe(int(row)) for row in rows])
        batch = {"row": rows, "index": positions, "drawn": drawn, "name": names}
        if with_images:
            present = zip(("image", "size", "label"), arrays_of(source), strict=True)
            batch |= {name: x[rows] for name, x in present if x is not None}
        yield batch


def crop_batch(
    arrays: Arrays | None,
    step: jax.Array,
    batch: Batch,
    *,
    specs: Sequence[crops.CropSpec],
    seed: int,
) -> Batch:
    """The views of a batch, cropped in the step; the result is as `pipeline.train_batches`'.

    Args:
        arrays: the split, or None if the batch has its images.
        step: int32 scalar, the steps done before this one.
        batch: see `train_batches`.
        specs: how the crops of each view are drawn.
        seed: of the run.
    """
    if arrays is not None:
        present = zip(("image", "size", "label"), arrays, strict=True)
        batch = batch | {name: x[batch["row"]] for name, x in present if x is not None}
    images = batch["image"]
    whole = jnp.tile(jnp.asarray(images.shape[1:3], jnp.int32), (len(images), 1))
    sizes = batch.get("size", whole)
    boxes = crops.boxes(seed, step, batch["drawn"], sizes, specs)
    views = crops.random_resized_crops(images, boxes, specs)
    named = {f"view_{i}": view for i, view in enumerate(views, start=1)}
    return named | {name: batch[name] for name in ("index", "label") if name in batch}


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
    """As `pipeline.eval_batches`, for a split in arrays."""
    indices = np.array_split(spread(source.num_examples, limit), hosts)[host]
    for i in sorted(set(source.broken) & set(indices.tolist())):
        undecodable.add(source.describe(i))
    indices = indices[~np.isin(indices, source.broken)]
    labels = source.labels if source.labels is not None else np.full(source.num_examples, -1)
    whole = np.tile(np.asarray(source.images.shape[1:3], np.int32), (batch_size, 1))
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        padded = np.pad(rows, (0, batch_size - len(rows)), mode="edge")  # one compilation
        if source.sizes is None and min(source.images.shape[1:3]) == resize:
            images = _centre(source.images[rows], size)
        else:
            sizes = whole if source.sizes is None else source.sizes[padded]
            views = test_views(
                source.images[padded], sizes, resize=resize, size=size, method=method
            )
            images = views[: len(rows)]
        names = np.asarray([source.describe(int(i)) for i in rows])
        yield {"image": images, "label": labels[rows].astype(np.int32), "name": names}


def _centre(images: np.ndarray, size: int) -> np.ndarray:
    top, left = ((length - size) // 2 for length in images.shape[1:3])
    return np.ascontiguousarray(images[:, top : top + size, left : left + size])


_compiled_test_view = jax.jit(crops.test_view, static_argnames=("resize", "size", "method"))


def test_views(images: np.ndarray, sizes: np.ndarray, **options: int | str) -> np.ndarray:
    """`crops.test_view` on the CPU, compiled once for arrays of a shape."""
    with process.on_cpu():
        return np.asarray(_compiled_test_view(images, sizes, **options))
