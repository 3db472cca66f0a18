"""Measures how fast the host makes batches of JPEGs, beside a plain tf.data pipeline, in turn.

python -m benchmarks.input_pipeline --config=configs/byol.py --config.data.dir=TFDS_DIR \
    --config.batch_size=64 --json=input.json

The baseline is what is often written: two `decode_and_crop_jpeg` an image, bicubic to float32. The
other measure is decoding alone, whole images into no batch. The ratios are those of images/s; CPU
time depends less on what else the machine does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import psutil
from absl import app, flags
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax.data import crops, host_crops, inputs, pixels, workers
from selfsup_jax.data import views as views_lib
from selfsup_jax.data.host_tensorflow import tf

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_SECONDS = flags.DEFINE_float("seconds", 6.0, "how long to measure each, in a round")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "each is measured once in a round")
_LOCAL = flags.DEFINE_integer("local", 0, "further views of 96 pixels, as DINO's")
_PROCESSES = flags.DEFINE_integer("processes", 0, "also measure so many processes")
_MEMORY = flags.DEFINE_integer("memory", 0, "measure the memory over so many batches instead")

BASELINE, DECODE_ONLY = "plain tf.data", "decode only, tf.data"


def plain_batches(config: Any, encoded: np.ndarray) -> Iterator[Any]:
    """The baseline: crops `[B, size, size, 3]` float32 of each image."""
    groups = [group for _, group in views_lib.groups_of(config.views)]

    def crop(image: tf.Tensor, group: Any) -> tf.Tensor:
        side = group.size
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
        return tf.image.resize(cut, (side, side), method="bicubic")

    images = tf.data.Dataset.from_tensor_slices(tf.constant(list(encoded), tf.string))
    images = images.shuffle(len(encoded)).repeat()
    each = [group for group in groups for _ in range(group.count)]
    views = images.map(
        lambda x: tuple(crop(x, group) for group in each), num_parallel_calls=tf.data.AUTOTUNE
    )
    return iter(views.batch(config.batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())


def decoded_batches(config: Any, encoded: np.ndarray) -> Iterator[Any]:
    """Each image decoded as a whole, and dropped."""
    images = tf.data.Dataset.from_tensor_slices(tf.constant(list(encoded), tf.string)).repeat()
    sizes = images.map(
        lambda x: tf.size(tf.image.decode_jpeg(x, channels=3)), num_parallel_calls=tf.data.AUTOTUNE
    )
    return iter(sizes.batch(config.batch_size).prefetch(tf.data.AUTOTUNE).as_numpy_iterator())


def parts(config: Any, data: inputs.Data, rows: np.ndarray) -> list[report.Row]:
    """Where the CPU time of an image goes, one after another in one thread."""
    specs, source = tuple(inputs.crop_specs(config)), data.train
    encoded = source.encoded(rows)
    decoded = [pixels.decoded(image, source.reading) for image in encoded]
    good = [image for image in decoded if image is not None][: len(rows) // 8 * 8]
    sizes = np.asarray([image.shape[:2] for image in good], np.int32)
    index = np.arange(len(good), dtype=np.int32)
    draw = jax.jit(crops.boxes, static_argnames="specs")
    boxes = np.asarray(draw(0, np.int32(0), index, sizes, specs=specs))
    side, count = config.data.canvas, config.batch_size
    canvas = np.zeros((side, side, 3), np.uint8)
    views = [np.empty((count, spec.size, spec.size, 3), np.uint8) for spec in specs]
    floats = [np.random.default_rng(0).uniform(-9, 270, x.shape[1:]) for x in views]
    batch = {f"view_{i}": x for i, x in enumerate(views)}
    whole = {"image": np.zeros((count, side, side, 3), np.uint8)}

    def put(image: np.ndarray) -> None:
        canvas[: image.shape[0], : image.shape[1]] = image[:side, :side]

    def crop(image: np.ndarray, of_image: np.ndarray) -> None:
        for box, spec in zip(of_image, specs, strict=True):
            host_crops.crop_and_resize(image, box, spec)

    def round_() -> None:
        for x in floats:
            np.clip(np.rint(x.astype(np.float32)), 0, 255).astype(np.uint8)

    def microseconds(work: Callable[[], Any], images: int) -> float:
        taken = []
        for _ in range(5):
            start = time.process_time()
            work()
            taken.append(1e6 * (time.process_time() - start) / images)
        return min(taken)

    def hand_over() -> None:
        """What a part of a batch costs to be given to a thread and taken from it."""
        pool = workers.Threads(lambda made: None)
        _, submit = pool.batch({"x": ((count, 1), "uint8")})
        for future in [submit(slice(i, i + 8)) for i in range(0, count, 8)]:
            future.result()
        pool.close()

    def each(work: Callable[..., Any], *columns: Any) -> float:
        return microseconds(lambda: [work(*row) for row in zip(*columns, strict=True)], len(good))

    def to_device(arrays: Any) -> Callable[[], Any]:
        # Without the copy, a device on the CPU would take the host's memory as its own.
        copied = jax.jit(lambda x: jax.tree.map(lambda y: y + np.uint8(1), x))
        return lambda: jax.block_until_ready(copied(arrays))

    blocks = [slice(i, i + 8) for i in range(0, len(good), 8)]
    resize_and_round, rounding = each(crop, good, boxes), microseconds(round_, 1)
    numbers = {
        "read": microseconds(
            lambda: [source.encoded(rows[i : i + 8]) for i in index[::8]], len(good)
        ),
        "decode": microseconds(
            lambda: [pixels.decoded(x, source.reading) for x in encoded], len(encoded)
        ),
        "draw boxes": microseconds(
            lambda: [
                np.asarray(draw(0, np.int32(0), index[x], sizes[x], specs=specs)) for x in blocks
            ],
            len(good),
        ),
        "host: crop and resize all views": resize_and_round - rounding,
        "host: round to uint8": rounding,
        "host: into a batch": microseconds(lambda: [x.copy() for x in views], count),
        "device: into a batch": each(put, good),
        "hand over": microseconds(hand_over, count),
        "host: to the device and once over it": microseconds(to_device(batch), count),
        "device: to the device and once over it": microseconds(to_device(whole), count),
    }
    return [(f"one thread: {name}", value, "us") for name, value in numbers.items()]


def memory_over(batches: Iterator[Any], count: int) -> list[report.Row]:
    """The process's memory at a tenth of so many batches, and how much it has grown at the end."""
    resident = psutil.Process().memory_info
    for number in range(1, count + 1):
        next(batches)
        if number == count // 10:
            before = resident().rss
    return [
        ("memory at a tenth", before / 2**20, "MiB"),
        (f"memory gained until batch {count}", (resident().rss - before) / 2**20, "MiB"),
    ]


def _content(image: str | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    with open(image, "rb") as file:
        return file.read()


def _cpu_seconds() -> float:
    """Of this process and of those that it has started."""
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(x.user + x.system for x in times)


def _wait_until_idle(most: float = 10.0) -> None:
    """Until what was measured before has filled its buffers again, at most so many seconds."""
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        cpu = _cpu_seconds()
        time.sleep(0.3)
        if _cpu_seconds() - cpu < 0.02:
            return


def measure(batches: Iterator[Any], batch_size: int, seconds: float) -> tuple[float, float]:
    """(images per second, microseconds of CPU time per image)."""
    _wait_until_idle()
    start = time.perf_counter()
    while time.perf_counter() - start < 1:  # what was made ahead, meanwhile too
        next(batches)
    count, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    cpu, wall = _cpu_seconds() - cpu, time.perf_counter() - start
    return count / wall, 1e6 * cpu / count


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    config = _CONFIG.value
    config.data.placement = "host"
    if _LOCAL.value:
        local = config.views["global"].copy_and_resolve_references()
        local.update(count=_LOCAL.value, size=96, area=(0.05, 0.25))
        config.views.local = local
        config.views["global"].area = (0.25, 1.0)
    data = inputs.load_data(config)
    some = np.arange(min(1000, data.train.num_examples))

    def ours(crop_on: str, processes: int = 0) -> Iterator[Any]:
        config.data.crop_on, config.data.processes = crop_on, processes
        return inputs.train_batches(config.copy_and_resolve_references(), data, first_step=0)

    if _MEMORY.value:
        rows = memory_over(ours(config.data.crop_on, _PROCESSES.value), _MEMORY.value)
        report.show(f"input, crop_on={config.data.crop_on}", rows, _JSON.value)
        return
    encoded = np.asarray([_content(image) for image in data.train.encoded(some)], object)
    ways = {
        BASELINE: plain_batches(config, encoded),
        DECODE_ONLY: decoded_batches(config, encoded),
        "ours, crop_on=host": ours("host"),
        "ours, crop_on=device": ours("device"),
    }
    if count := _PROCESSES.value:
        ways[f"ours, crop_on=host, {count} processes"] = ours("host", count)
        ways[f"ours, crop_on=device, {count} processes"] = ours("device", count)
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
    report.show(title, rows + parts(config, data, some), _JSON.value)


if __name__ == "__main__":
    app.run(main)
