"""Measures Grain beside our own threads and processes, with the same images and the same work.

pip install grain
python -m benchmarks.input_grain --config=configs/byol.py --config.data.dir=TFDS_DIR \
    --config.batch_size=64 --processes=2 --json=grain.json

Grain reads the same bytes and calls the same functions: decoding, and cutting the views out or
putting the image into its square. The flags are those of `benchmarks/input_pipeline.py`.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import app, flags

try:
    import grain
except ImportError:
    print("error: Grain is not installed: pip install grain", file=sys.stderr)
    sys.exit(2)

from benchmarks import input_pipeline, report
from selfsup_jax.data import crops, host_crops, inputs, pixels, sources


@dataclasses.dataclass(frozen=True)
class Images:
    """A split as Grain takes it; can be sent to another process."""

    source: sources.Source

    def __len__(self) -> int:
        return self.source.num_examples

    def __getitem__(self, row: int) -> pixels.Encoded:
        return self.source.encoded(np.asarray([row]))[0]


def draw_box(rng: np.random.Generator, height: int, width: int, spec: crops.CropSpec) -> np.ndarray:
    """As `crops.boxes`, from other random numbers: Grain gives each image a generator."""
    for _ in range(10):
        area = height * width * rng.uniform(*spec.area)
        aspect = np.exp(rng.uniform(*np.log(spec.aspect)))
        tall, wide = round(np.sqrt(area / aspect)), round(np.sqrt(area * aspect))
        if 1 <= tall <= height and 1 <= wide <= width:
            top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            return np.asarray([top, left, tall, wide])
    side = min(height, width)
    return np.asarray([(height - side) // 2, (width - side) // 2, side, side])


@dataclasses.dataclass(frozen=True)
class Cut(grain.transforms.RandomMap):
    """An encoded image to all its views, or with a canvas to the square that holds it."""

    reading: pixels.Reading
    specs: tuple[crops.CropSpec, ...]
    canvas: int

    def random_map(self, element: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See Grain."""
        image = pixels.decoded(element, self.reading, self.canvas)
        assert image is not None
        height, width = image.shape[:2]
        if self.canvas:
            whole = np.zeros((self.canvas, self.canvas, 3), np.uint8)
            whole[:height, :width] = image
            return {"image": whole, "size": np.asarray([height, width], np.int32)}
        return {
            f"view_{i}": host_crops.crop_and_resize(image, draw_box(rng, height, width, spec), spec)
            for i, spec in enumerate(self.specs, start=1)
        }


def by_grain(config: Any, source: sources.Source, threads: int, processes: int) -> Iterator[Any]:
    """Endless batches of Grain's, made by so many threads, or by processes."""
    bare = dataclasses.replace(source, describe=str, labels=None)  # which processes need not have
    canvas = config.data.canvas if config.data.crop_on == "device" else 0
    made = grain.MapDataset.source(Images(bare)).seed(config.seed).shuffle().repeat()
    made = made.random_map(Cut(source.reading, tuple(inputs.crop_specs(config)), canvas))
    ahead = 3 * config.batch_size if threads else 0
    stream = made.to_iter_dataset(grain.ReadOptions(threads, ahead)).batch(config.batch_size)
    if processes:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(processes, 2))
    return iter(stream)


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    given = flags.FLAGS
    config = given.config
    config.data.placement = "host"
    data = inputs.load_data(config)
    rows: list[report.Row] = []
    for crop_on in inputs.CROP_ON:
        config.data.crop_on = crop_on

        def ours(processes: int) -> Iterator[Any]:
            config.data.processes = processes
            return inputs.train_batches(config.copy_and_resolve_references(), data, first_step=0)

        ways = {"ours, threads": ours(0), "Grain, 2 threads": by_grain(config, data.train, 2, 0)}
        if count := given.processes:
            ways[f"ours, {count} processes"] = ours(count)
            ways[f"Grain, {count} processes"] = by_grain(config, data.train, 0, count)
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, batches in ways.items():
                measured = input_pipeline.measure(batches, config.batch_size, given.seconds)
                rounds[name].append(measured)
        for name, pairs in rounds.items():
            rate, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            rows.append((f"crop_on={crop_on}: {name}: images per second", rate, "1/s"))
            rows.append((f"crop_on={crop_on}: {name}: CPU us per image", cpu, "us"))
    title = f"input: {data.train.name}, batch {config.batch_size}, medians of {given.rounds} rounds"
    report.show(title, rows, given.json)


if __name__ == "__main__":
    app.run(main)
