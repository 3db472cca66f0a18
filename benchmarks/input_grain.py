"""Measures `data.reader=grain` beside our own threads and processes; the batches are the same.

pip install grain
python -m benchmarks.input_grain --config=configs/byol.py --config.data.dir=TFDS_DIR \
    --config.batch_size=64 --processes=2 --json=grain.json

The flags are those of `benchmarks/input_pipeline.py`.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from benchmarks import input_pipeline, report
from selfsup_jax.data import grain_reader, inputs


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    given = flags.FLAGS
    config = given.config
    if missing := grain_reader.rule("grain"):
        print(f"error: it {missing}", file=sys.stderr)
        sys.exit(2)
    config.data.placement = "host"
    data = inputs.load_data(config)
    rows: list[report.Row] = []
    for crop_on in inputs.CROP_ON:

        def batches(reader: str, processes: int, crop_on: str = crop_on) -> Iterator[Any]:
            config.data.update(reader=reader, processes=processes, crop_on=crop_on)
            return inputs.train_batches(config.copy_and_resolve_references(), data, first_step=0)

        counts = sorted({0, given.processes})
        ways = {
            f"{reader}, {f'{count} processes' if count else 'threads'}": batches(reader, count)
            for count, reader in itertools.product(counts, grain_reader.READERS)
        }
        rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.rounds):
            for name, stream in ways.items():
                measured = input_pipeline.measure(stream, config.batch_size, given.seconds)
                rounds[name].append(measured)
        for name, pairs in rounds.items():
            rate, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
            rows.append((f"crop_on={crop_on}: {name}: images per second", rate, "1/s"))
            rows.append((f"crop_on={crop_on}: {name}: CPU us per image", cpu, "us"))
    title = f"input: {data.train.name}, batch {config.batch_size}, medians of {given.rounds} rounds"
    report.show(title, rows, given.json)


if __name__ == "__main__":
    app.run(main)
