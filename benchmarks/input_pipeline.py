"""Measures how fast the host makes batches of JPEGs, beside a plain tf.data pipeline, in turn.

python -m benchmarks.input_pipeline --config=configs/byol.py --config.data.dir=TFDS_DIR \
    --config.batch_size=64 --json=input.json

The baseline is what is often written: two `decode_and_crop_jpeg` an image, bicubic to float32. The
other measure is decoding alone, whole images into no batch. The ratios are those of images/s; CPU
time depends less on what else the machine does.
"""

from __future__ import annotations

import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax.data import crops, host_crops, inputs, pixels
from selfsup_jax.data.host_tensorflow import tf

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_SECONDS = flags.DEFINE_float("seconds", 6.0, "how long to measure each, in a round")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "each is measured once in a round")

BASELINE, DECODE_ONLY = "plain tf.data", "decode only, tf.data"


def plain_batches(config: Any, encoded: np.ndarray) -> Iterator[Any]:
    """The baseline: two crops `[B, size, size, 3]` float32 of each image."""
    size, (group,) = config.data.image_size, [config.views["global"]]

    def crop(image: tf.Tensor) -> tf.Tensor:
        begin, length, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(image),
            tf.zeros((0, 0, 4)),
            area_range=group.area,
            aspect_ratio_range=group.aspect,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], length[:2]], axis=0)
        cut = tf.image.decode_and_crop_jpeg(image, window, channels=3)
        return tf.image.resize(cut, (size, size), method="bicubic")

    images = tf.data.Dataset.from_tensor_slices(tf.constant(list(encoded), tf.string))
    images = images.shuffle(len(encoded)).repeat()
    views = images.map(lambda x: (crop(x), crop(x)), num_parallel_calls=tf.data.AUTOTUNE)
    return iter(views.batch(config.batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())


def decoded_batches(config: Any, encoded: np.ndarray) -> Iterator[Any]:
    """Each image decoded as a whole, and dropped."""
    images = tf.data.Dataset.from_tensor_slices(tf.constant(list(encoded), tf.string)).repeat()
    sizes = images.map(
        lambda x: tf.size(tf.image.decode_jpeg(x, channels=3)), num_parallel_calls=tf.data.AUTOTUNE
    )
    return iter(sizes.batch(config.batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())


def parts(config: Any, data: inputs.Data, encoded: np.ndarray) -> list[report.Row]:
    """Where the CPU time of an image goes, one after another in one thread."""
    specs = inputs.crop_specs(config)
    decoded = [pixels.decoded(image, data.train.reading) for image in encoded]
    good = [image for image in decoded if image is not None]
    sizes = np.asarray([image.shape[:2] for image in good], np.int32)
    index = np.arange(len(good), dtype=np.int32)
    boxes = np.asarray(crops.boxes(0, np.int32(0), index, sizes, specs))
    canvas = np.zeros((config.data.canvas, config.data.canvas, 3), np.uint8)

    def copy(image: np.ndarray) -> None:
        canvas[: image.shape[0], : image.shape[1]] = image[: len(canvas), : len(canvas)]

    def crop(image: np.ndarray, of_image: np.ndarray) -> None:
        for box, spec in zip(of_image, specs, strict=True):
            host_crops.crop_and_resize(image, box, spec)

    def microseconds(work: Callable[..., Any], *columns: Any) -> float:
        taken = []
        for _ in range(3):
            start = time.process_time()
            for row in zip(*columns, strict=True):
                work(*row)
            taken.append(1e6 * (time.process_time() - start) / len(columns[0]))
        return min(taken)

    decode = microseconds(lambda x: pixels.decoded(x, data.train.reading), encoded)
    return [
        ("one thread: decode", decode, "us"),
        ("one thread: crop and resize all views", microseconds(crop, good, boxes), "us"),
        ("one thread: copy to a canvas", microseconds(copy, good), "us"),
    ]


def measure(batches: Iterator[Any], batch_size: int, seconds: float) -> tuple[float, float]:
    """(images per second, microseconds of CPU time per image)."""
    for _ in range(5):  # what was made ahead
        next(batches)
    count, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return count / wall, 1e6 * cpu / count


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    config = _CONFIG.value
    config.data.placement = "host"
    data = inputs.load_data(config)
    encoded = np.asarray(data.train.images)[:1000]
    if data.train.kind == "path":
        encoded = np.asarray([pathlib.Path(x).read_bytes() for x in encoded], object)

    def ours(crop_on: str) -> Iterator[Any]:
        config.data.crop_on = crop_on
        return inputs.train_batches(config.copy_and_resolve_references(), data, first_step=0)

    ways = {
        BASELINE: plain_batches(config, encoded),
        DECODE_ONLY: decoded_batches(config, encoded),
        "ours, crop_on=host": ours("host"),
        "ours, crop_on=device": ours("device"),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(_ROUNDS.value):
        for name, batches in ways.items():
            rounds[name].append(measure(batches, config.batch_size, _SECONDS.value))
    rate, cpu = (
        {name: statistics.median(pair[i] for pair in pairs) for name, pairs in rounds.items()}
        for i in (0, 1)
    )
    rows: list[report.Row] = []
    for name in list(ways)[2:]:
        rows += [
            (f"{name}: ratio to baseline", rate[name] / rate[BASELINE], "x"),
            (f"{name}: ratio to decode only", rate[name] / rate[DECODE_ONLY], "x"),
            (f"{name}: CPU ratio to baseline", cpu[BASELINE] / cpu[name], "x"),
        ]
    for name in ways:
        rows.append((f"{name}: images per second", rate[name], "1/s"))
        rows.append((f"{name}: CPU us per image", cpu[name], "us"))
    title = (
        f"input: {data.train.name}, {len(inputs.crop_specs(config))} crops of "
        f"{config.data.image_size} px ({config.data.resize_method}), batch {config.batch_size}, "
        f"medians of {_ROUNDS.value} rounds"
    )
    report.show(title, rows + parts(config, data, encoded), _JSON.value)


if __name__ == "__main__":
    app.run(main)
