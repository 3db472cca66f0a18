"""Measures how fast the host makes batches of crops, without any training.

python -m benchmarks.input_pipeline --config=configs/byol.py:demo --json=input.json
"""

from __future__ import annotations

import time

from absl import app, flags
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax.data import inputs

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py:demo")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "how long to measure")


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    config = _CONFIG.value
    data = inputs.load_data(config)
    batches = inputs.train_batches(config, data, first_step=0)
    for _ in range(5):  # fills the buffers
        next(batches)
    count, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < _SECONDS.value:
        next(batches)
        count += config.batch_size
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    rows: list[report.Row] = [
        ("images per second", count / seconds, "1/s"),
        ("CPU time per image", 1e6 * cpu / count, "us"),
        ("CPU cores used", cpu / seconds, ""),
    ]
    title = (
        f"input: {data.train.name}, two {config.data.image_size} px crops "
        f"({config.data.resize_method}), batch {config.batch_size}"
    )
    report.show(title, rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
