"""Batches that the host decodes and crops with tf.data, for images that stay encoded.

A split in memory gives the same global batches on any number of hosts.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from selfsup_jax.data import crops, host_crops
from selfsup_jax.data.batches import HostBatch, Undecodable, epoch_order, neighbours, spread
from selfsup_jax.data.host_tensorflow import tf
from selfsup_jax.data.source import Source
from selfsup_jax.devices import process
from selfsup_jax.errors import UserError

# AutoGraph has nothing to convert here, and warns if it can't parse a newer Python's source.
_without_autograph = tf.autograph.experimental.do_not_convert
_BATCHES_IN_FLIGHT = 3  # per host: decoded in parallel, and prefetched


def train_batches(
    source: Source,
    specs: Sequence[crops.CropSpec],
    *,
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
        seed: of the order and the crops.
        batch_size: global batch size.
        positions: `[b]`, this host's indices in the global batch.
        first_step: the step of the first batch.
        undecodable: counts the broken images.
        host, hosts: this host's index and the number of hosts, for streamed splits.

    Yields:
        `view_1`, `view_2`, ... `[b, size, size, 3]` uint8, `index` `[b]` int32, `name` `[b]` str
        (each image's file, or its id in the data set) and, with labels, `label` `[b]` int32.
    """
    raw = _raw_batches if source.images is not None else _raw_stream
    for dataset in raw(source, seed, batch_size, positions, first_step, host, hosts):
        decoded = dataset.interleave(
            lambda batch: _crop_batch(batch, source, specs, seed),
            cycle_length=_BATCHES_IN_FLIGHT,
            block_length=1,
            num_parallel_calls=_BATCHES_IN_FLIGHT,
            deterministic=True,
        )
        for batch in decoded.prefetch(_BATCHES_IN_FLIGHT).as_numpy_iterator():
            yield _fill_gaps(batch, positions, source, undecodable)


def _raw_batches(source, seed, batch_size, positions, first_step, host, hosts):
    """Yields one endless data set of undecoded batches; NumPy draws the order of each epoch."""
    del host, hosts
    steps_per_epoch = source.num_examples // batch_size

    def batches():
        step = first_step
        while True:
            epoch, start = divmod(step, steps_per_epoch)
            order = epoch_order(source.num_examples, seed, epoch)
            for i in range(start, steps_per_epoch):
                yield step, positions, order[i * batch_size + positions]
                step += 1

    images, size = _tensor(source), len(positions)
    signature = (
        tf.TensorSpec((), tf.int64),
        tf.TensorSpec((size,), tf.int32),
        tf.TensorSpec((size,), tf.int64),
    )

    def add_examples(step, index, example):
        label = -tf.ones_like(index)
        if source.labels is not None:
            label = tf.gather(tf.constant(source.labels), example)
        return {
            "step": step,
            "index": index,
            "image": tf.gather(images, example),
            "label": label,
            "id": tf.strings.as_string(example),
        }

    yield tf.data.Dataset.from_generator(batches, output_signature=signature).map(add_examples)


def _raw_stream(source, seed, batch_size, positions, first_step, host, hosts):
    """Yields one data set per epoch; each host reads its own part of the split."""
    assert source.stream is not None
    steps_per_epoch = source.num_examples // batch_size
    epoch, start = divmod(first_step, steps_per_epoch)
    while True:
        epoch_seed = int(np.random.default_rng((seed, epoch)).integers(2**31))
        first = tf.constant(epoch * steps_per_epoch, tf.int64)

        def add_step(i, examples, first=first):
            image, label, name = examples
            return {
                "step": first + i,
                "index": tf.constant(positions),
                "image": image,
                "label": label,
                "id": name,
            }

        examples = source.stream(epoch_seed, host, hosts)
        # A host with a slightly larger part stops at the same step as the others.
        batches = examples.batch(len(positions), drop_remainder=True).take(steps_per_epoch)
        yield batches.enumerate().skip(start).map(add_step)
        epoch, start = epoch + 1, 0


def _crop_batch(
    batch: dict[str, tf.Tensor],
    source: Source,
    specs: Sequence[crops.CropSpec],
    seed: int,
) -> tf.data.Dataset:
    """A data set with one element: the batch's views, without images that can't be decoded."""

    @_without_autograph
    def crop(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        encoded = _read(example["image"], source.kind)
        views = host_crops.crop_encoded(encoded, example["draws"], specs, source.reading)
        numbered = {f"view_{i}": view for i, view in enumerate(views, start=1)}
        return numbered | {"index": example["index"], "label": example["label"]}

    draws = tf.numpy_function(
        functools.partial(_draws, seed, num_views=len(specs)),
        (batch["step"], batch["index"]),
        tf.float32,
        stateful=False,
    )
    draws = tf.ensure_shape(draws, (*batch["index"].shape, len(specs), None, 4))
    rows = {k: batch[k] for k in ("index", "image", "label")} | {"draws": draws}
    examples = tf.data.Dataset.from_tensor_slices(rows)
    decoded = examples.map(crop, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
    # If no image can be decoded, the element is an empty batch: without any element, `interleave`
    # would search for the next batch forever.
    no_rows = {k: tf.zeros((0, *v.shape), v.dtype) for k, v in decoded.element_spec.items()}
    empty = tf.data.Dataset.from_tensors(no_rows)
    element = decoded.batch(batch["index"].shape[0]).concatenate(empty).take(1)
    return element.map(lambda views: views | {"step": batch["step"], "ids": batch["id"]})


_compiled_draws = jax.jit(crops.box_draws, static_argnames="num_views")


def _draws(seed: int, step: np.int64, index: np.ndarray, *, num_views: int) -> np.ndarray:
    with process.on_cpu():
        return np.asarray(_compiled_draws(seed, np.int32(step), index, num_views=num_views))


def _fill_gaps(
    batch: HostBatch, positions: np.ndarray, source: Source, undecodable: Undecodable
) -> HostBatch:
    """Adds the names; replaces each missing image by the next one that was decoded."""
    ids, step = batch.pop("ids"), batch.pop("step")
    streamed = source.stream is not None
    names = np.array([i.decode() if streamed else source.describe(int(i)) for i in ids])
    if len(batch["index"]) < len(positions):
        missing = ~np.isin(positions, batch["index"])
        for name in names[missing]:
            undecodable.add(str(name))
        if not len(batch["index"]):
            raise UserError(f"config.data.dir: no image of the batch of step {step} can be decoded")
        rows = neighbours(missing)
        batch = {k: v[rows] for k, v in batch.items()} | {"index": positions}
        names = names[~missing][rows]
    if source.num_classes is None:
        del batch["label"]
    return batch | {"name": names}


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
        resize, size, method: see `host_crops.test_image`.
        batch_size: of this host.
        limit: maximum number of images over all hosts: evenly spread, or shuffled if streamed.
        undecodable: counts the broken images, which are left out.
        host, hosts: this host's index and the number of hosts.

    Yields:
        `image` `[b, size, size, 3]` uint8, `label` `[b]` int32 (-1 without labels; `[b, classes]`
        if an image can have several) and `name` `[b]` str.
    """
    count = min(limit, source.num_examples)
    if source.images is not None:
        indices = np.array_split(spread(source.num_examples, limit), hosts)[host]
        images = _tensor(source)
        labels = source.labels if source.labels is not None else -np.ones(source.num_examples)
        examples = tf.data.Dataset.from_tensor_slices(indices).map(
            lambda i: (
                tf.gather(images, i),
                tf.gather(tf.constant(labels, tf.int32), i),
                tf.strings.as_string(i),
            )
        )
    else:
        assert source.stream is not None
        whole = count == source.num_examples
        examples = source.stream(None if whole else 0, host, hosts)
        if not whole:
            examples = examples.take(count // hosts + (host < count % hosts))
        part = int(examples.cardinality())  # negative if unknown

    @_without_autograph
    def decode(image, label, name):
        image = host_crops.decode(_read(image, source.kind), source.reading)
        if source.shape is not None:  # fails here, where a broken image can still be left out
            image = tf.ensure_shape(image, (*source.shape, 3))
        return {"image": image, "label": label, "id": name}

    def view(example):
        return example | {"image": host_crops.test_image(example["image"], resize, size, method)}

    in_memory = source.images is not None
    # Small images are resized in batches: one call per image would cost more than the resizing.
    by_batch = source.shape is not None and max(source.shape) <= 128
    ids: list[bytes] = []
    # No autotuning: at the end of a data set the tuner may sleep for seconds before it stops.
    options = tf.data.Options()
    options.autotune.enabled = False
    parallel = os.cpu_count() or 1
    if by_batch:
        decoded = examples.map(decode, num_parallel_calls=parallel).ignore_errors()
        viewed = decoded.batch(batch_size).map(view)
    else:
        both = examples.map(lambda *x: view(decode(*x)), num_parallel_calls=parallel)
        viewed = both.ignore_errors().batch(batch_size)
    for batch in viewed.prefetch(2).with_options(options).as_numpy_iterator():
        batch_ids = batch.pop("id")
        ids.extend(batch_ids)
        names = [source.describe(int(i)) if in_memory else i.decode() for i in batch_ids]
        yield batch | {"name": np.asarray(names)}
    if in_memory and len(ids) < len(indices):
        for i in sorted(set(indices) - {int(i) for i in ids}):
            undecodable.add(source.describe(int(i)))
    elif source.stream is not None:
        for i in range(part - len(ids)):  # their names are unknown
            undecodable.add(f"{source.name}: broken image {i + 1} of host {host}")


def _tensor(source: Source) -> tf.Tensor:
    """The images as a tensor: a data set refers to it, but would copy an array into its graph."""
    if source.kind == "path":
        return tf.constant([os.fsencode(path) for path in source.images], tf.string)
    return tf.convert_to_tensor(source.images)


def _read(image: tf.Tensor, kind: str) -> tf.Tensor:
    return tf.io.read_file(image) if kind == "path" else image
