"""How fast the host makes batches of crops, with nothing to train.

    python -m benchmarks.input_pipeline --config=configs/byol.py:demo --json=input.json
"""

from __future__ import annotations

import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax import train
from selfsup_jax.data import crops, pipeline

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py:demo")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "how long to measure")


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    config = _CONFIG.value
    data = train.load_data(config)
    spec = crops.CropSpec(
        config.data.image_size,
        tuple(config.data.crop_area),
        tuple(config.data.crop_aspect),
        config.data.resize_method,
    )
    batches = pipeline.train_batches(
        data.train,
        spec,
        seed=0,
        batch_size=config.batch_size,
        positions=np.arange(config.batch_size, dtype=np.int32),
        first_step=0,
        undecodable=data.undecodable,
    )
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
        f"input: {data.train.name}, two {spec.size} px crops ({spec.method}), "
        f"batch {config.batch_size}"
    )
    report.show(title, rows, _JSON.value)
    jax.clear_caches()


if __name__ == "__main__":
    app.run(main)
