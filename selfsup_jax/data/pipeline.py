"""Batches of crops: the same examples, in the same order, with the same crops, on any hosts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from selfsup_jax.data import crops
from selfsup_jax.data.sources import Source
from selfsup_jax.errors import UserError

HostBatch = dict[str, np.ndarray]
# AutoGraph has nothing to convert here, and warns where it can't parse a newer Python's source.
_as_written = tf.autograph.experimental.do_not_convert
_BATCHES_IN_FLIGHT = 3  # per host: decoded in parallel, and ready before the step asks


@dataclasses.dataclass
class Undecodable:
    """Counts and names the images that can't be decoded; too many of them stop the run.

    Attributes:
        num_examples: of the split.
        limit: the share that may be broken.
        names: the ones found so far.
    """

    num_examples: int
    limit: float
    names: set[str] = dataclasses.field(default_factory=set)

    def add(self, name: str) -> None:
        """Notes one; raises `UserError` when they are more than the limit."""
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


def train_batches(
    source: Source,
    spec: crops.CropSpec,
    *,
    seed: int,
    batch_size: int,
    positions: np.ndarray,
    first_step: int,
    undecodable: Undecodable,
    num_views: int = 2,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[HostBatch]:
    """This host's part of each global batch, without end.

    An epoch gives `num_examples // batch_size` batches; what is left over waits for the next
    epoch's order. An image that can't be decoded leaves its place to a neighbour in the batch.

    Args:
        source: the split.
        spec: how crops are drawn.
        seed: of the order and the crops.
        batch_size: global.
        positions: `[b]`, this host's indices in the global batch.
        first_step: the step to begin with.
        undecodable: where broken images are counted.
        num_views: crops of each image.
        host, hosts: which host this is, for streamed splits.

    Yields:
        `view_1`, `view_2`, ... `[b, size, size, 3]` uint8, `index` `[b]` int32, `name` `[b]` str
        (each image's file, or its id in the data set) and, with labels, `label` `[b]` int32.
    """
    raw = _raw_batches if source.images is not None else _raw_stream
    for dataset in raw(source, seed, batch_size, positions, first_step, host, hosts):
        decoded = dataset.interleave(
            lambda batch: _crop_batch(batch, source, spec, seed, batch_size, num_views),
            cycle_length=_BATCHES_IN_FLIGHT,
            block_length=1,
            num_parallel_calls=_BATCHES_IN_FLIGHT,
            deterministic=True,
        )
        for batch in decoded.prefetch(_BATCHES_IN_FLIGHT).as_numpy_iterator():
            yield _fill_gaps(batch, positions, source, undecodable)


def _raw_batches(source, seed, batch_size, positions, first_step, host, hosts):
    """One endless data set of (step, positions, example numbers), orders drawn in NumPy."""
    del host, hosts
    steps_per_epoch = source.num_examples // batch_size

    def batches():
        step = first_step
        while True:
            epoch, place = divmod(step, steps_per_epoch)
            order = epoch_order(source.num_examples, seed, epoch)
            for i in range(place, steps_per_epoch):
                yield step, positions, order[i * batch_size + positions]
                step += 1

    size = len(positions)
    signature = (
        tf.TensorSpec((), tf.int64),
        tf.TensorSpec((size,), tf.int32),
        tf.TensorSpec((size,), tf.int64),
    )

    def add_examples(step, index, number):
        label = -tf.ones_like(index)
        if source.labels is not None:
            label = tf.gather(tf.constant(source.labels), number)
        return {
            "step": step,
            "index": index,
            "image": tf.gather(source.images, number),
            "label": label,
            "id": tf.strings.as_string(number),
        }

    yield tf.data.Dataset.from_generator(batches, output_signature=signature).map(add_examples)


def _raw_stream(source, seed, batch_size, positions, first_step, host, hosts):
    """A data set per epoch, each host reading its own part of the split."""
    assert source.stream is not None
    steps_per_epoch = source.num_examples // batch_size
    epoch, place = divmod(first_step, steps_per_epoch)
    while True:
        epoch_seed = int(np.random.default_rng((seed, epoch)).integers(2**31))
        first = tf.constant(epoch * steps_per_epoch, tf.int64)

        def add_place(i, examples, first=first):
            image, label, name = examples
            return {
                "step": first + i,
                "index": tf.constant(positions),
                "image": image,
                "label": label,
                "id": name,
            }

        examples = source.stream(epoch_seed, host, hosts)
        # Hosts whose part is a little larger stop with the others.
        batches = examples.batch(len(positions), drop_remainder=True).take(steps_per_epoch)
        yield batches.enumerate().skip(place).map(add_place)
        epoch, place = epoch + 1, 0


def _crop_batch(
    batch: dict[str, tf.Tensor],
    source: Source,
    spec: crops.CropSpec,
    seed: int,
    batch_size: int,
    num_views: int,
) -> tf.data.Dataset:
    """A data set of one element: the batch's views, those that can't be decoded left out."""

    @_as_written
    def crop(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        number = batch["step"] * batch_size + tf.cast(example["index"], tf.int64)
        draws = crops.box_draws(seed, number, num_views)
        if source.kind == "array":
            views = crops.crop_array(example["image"], draws, spec)
        else:
            views = crops.crop_encoded(_read(example["image"], source.kind), draws, spec)
        numbered = {f"view_{i}": view for i, view in enumerate(views, start=1)}
        return numbered | {"index": example["index"], "label": example["label"]}

    rows = {k: batch[k] for k in ("index", "image", "label")}
    examples = tf.data.Dataset.from_tensor_slices(rows)
    decoded = examples.map(crop, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
    # Where nothing decodes a batch of no rows takes the place: a data set that gave nothing at all
    # would let the reader look for the next batch for ever.
    no_rows = {k: tf.zeros((0, *v.shape), v.dtype) for k, v in decoded.element_spec.items()}
    nothing = tf.data.Dataset.from_tensors(no_rows)
    one = decoded.batch(batch["index"].shape[0]).concatenate(nothing).take(1)
    return one.map(lambda views: views | {"step": batch["step"], "ids": batch["id"]})


def _fill_gaps(
    batch: HostBatch, positions: np.ndarray, source: Source, undecodable: Undecodable
) -> HostBatch:
    """Names what is missing and puts the next image that is there in its place."""
    ids, step = batch.pop("ids"), batch.pop("step")
    streamed = source.stream is not None
    names = np.array([i.decode() if streamed else source.describe(int(i)) for i in ids])
    if len(batch["index"]) < len(positions):
        missing = ~np.isin(positions, batch["index"])
        for name in names[missing]:
            undecodable.add(str(name))
        if not len(batch["index"]):
            raise UserError(f"config.data.dir: no image of the batch of step {step} decodes")
        place: np.ndarray = np.cumsum(~missing) - (~missing)  # rows present before each position
        rows = place % len(batch["index"])
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
    """This host's part of a split, each image once and unaugmented; the last batch is shorter.

    Args:
        source: the split.
        resize, size, method: see `crops.test_image`.
        batch_size: of this host.
        limit: of more images than this, over all hosts, an evenly spread part is read.
        undecodable: where broken images are counted; they are left out.
        host, hosts: which host this is.

    Yields:
        `image` `[b, size, size, 3]` uint8, `label` `[b]` int32 (-1 without labels; `[b, classes]`
        where an image may be of several) and `name` `[b]` str.
    """
    count = min(limit, source.num_examples)
    if source.images is not None:
        spread = np.linspace(0, source.num_examples, count, endpoint=False).astype(np.int64)
        numbers = np.array_split(spread, hosts)[host]
        labels = source.labels if source.labels is not None else -np.ones(source.num_examples)
        examples = tf.data.Dataset.from_tensor_slices(numbers).map(
            lambda i: (
                tf.gather(source.images, i),
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
        part = int(examples.cardinality())  # negative where it isn't known

    @_as_written
    def decode(image, label, name):
        if source.kind != "array":
            encoded = _read(image, source.kind)
            image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        if source.shape is not None:  # a broken image is to be found while it can be left out
            image = tf.ensure_shape(image, (*source.shape, 3))
        return {"image": image, "label": label, "id": name}

    def view(example):
        return example | {"image": crops.test_image(example["image"], resize, size, method)}

    held = source.images is not None
    # Resized together: of small images a call for each would cost more than what it does.
    by_batch = source.shape is not None and max(source.shape) <= 128
    ids: list[bytes] = []
    # Not tuned as it goes: at a data set's end the tuner may sleep for seconds before it lets go.
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
        found = batch.pop("id")
        ids.extend(found)
        names = [source.describe(int(i)) if held else i.decode() for i in found]
        yield batch | {"name": np.asarray(names)}
    if held and len(ids) < len(numbers):
        for i in sorted(set(numbers) - {int(i) for i in ids}):
            undecodable.add(source.describe(int(i)))
    elif source.stream is not None:
        for i in range(part - len(ids)):  # a stream doesn't tell which
            undecodable.add(f"{source.name}: broken image {i + 1} of host {host}")


def _read(image: tf.Tensor, kind: str) -> tf.Tensor:
    return tf.io.read_file(image) if kind == "path" else image
