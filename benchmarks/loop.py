"""Times the training loop beside the bare compiled step, with the data on the device and the host.

    python -m benchmarks.loop --config=configs/byol.py:demo
    python -m benchmarks.loop --config=configs/byol.py:cifar10,data.dir=DIR,encoder.width=0.25

- *bare step*: the compiled training step, again and again on the same views, which are already on
  the devices; the host waits once at the end.
- *loop*: `training/loop.py` as in a run, with log lines but without monitor and probes: it reads
  the images of each step, crops them (on the device, as part of the step, or on the host), and
  checks every step for values that are not finite.

All are timed in turn, several rounds; the medians count.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax.build import find
from selfsup_jax.data import inputs
from selfsup_jax.devices import compiled, parallel, process
from selfsup_jax.run.checkpoint import Checkpoints
from selfsup_jax.training import loop

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py:demo")
_STEPS = flags.DEFINE_integer("steps", 100, "steps of each timing")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "timings of each; the median counts")
_PLACEMENTS = flags.DEFINE_list("placements", ["device", "host"], "where the data are")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")


class Bare:
    """The compiled step on one batch that is already on the devices."""

    def __init__(self, method: Any, batch: dict[str, np.ndarray]):
        self._step = parallel.step_over_devices(method.train_step)
        self._state = parallel.replicate(method.init_state, jax.random.PRNGKey(0))
        self._batch = jax.pmap(lambda x: x)(parallel.shard(batch))
        self.seconds(2)  # compiles

    def seconds(self, steps: int) -> float:
        """Seconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / steps


def loop_seconds(config: Any, method: Any, data: inputs.Data, steps: int) -> float:
    """Seconds per step of the training loop, after its first steps."""
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory, keep=1)
        spec = loop.TrainSpec(
            config=config,
            init_state=jax.jit(method.init_state),
            train_step=method.train_step,
            batches=lambda step: inputs.train_batches(config, data, step),
            feed=inputs.feed(config, data.train),
            total_steps=steps,
            workdir=directory,
            checkpoints=checkpoints,
            meta=lambda step: {},
            announce=lambda state: None,
            started=time.perf_counter(),
        )
        rate = loop.fit(spec).images_per_second
        checkpoints.close()
    return config.batch_size / rate


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    config = _CONFIG.value.copy_and_resolve_references()
    process.use_cpu_devices(0, config.batch_size, config.accumulate_steps, config.bn_groups)
    process.keep_freed_memory()
    compiled.keep(tempfile.mkdtemp())  # the loop is compiled once for all rounds
    config.unlock()
    config.checkpoint_every_steps = 10**9
    config.log_every_steps = max(1, _STEPS.value // 2)
    del config.monitor
    configs, data = {}, {}
    for placement in _PLACEMENTS.value:
        configs[placement] = config.copy_and_resolve_references()
        configs[placement].data.placement = placement
        data[placement] = inputs.load_data(configs[placement])
    classes = data[_PLACEMENTS.value[0]].train.num_classes
    method = find(config.method)(config, classes, _STEPS.value, 1)
    batch = report.fake_batch(config.batch_size, report.sides(config))
    bare = Bare(method, batch if classes else {k: v for k, v in batch.items() if k != "label"})
    times: dict[str, list[float]] = {"bare step": []}
    for _ in range(_ROUNDS.value):
        times["bare step"].append(bare.seconds(_STEPS.value))
        for placement in _PLACEMENTS.value:
            seconds = loop_seconds(configs[placement], method, data[placement], _STEPS.value)
            times.setdefault(f"loop, data on the {placement}", []).append(seconds)
    rows: list[report.Row] = []
    for name, each in times.items():
        rows.append((name, 1e3 * float(np.median(each)), "ms"))
    for name, each in list(times.items())[1:]:
        ratios = np.asarray(each) / np.asarray(times["bare step"])
        rows.append((f"{name}, over the bare step", 100 * float(np.median(ratios) - 1), "%"))
    title = (
        f"loop: {config.method}, {data[_PLACEMENTS.value[0]].train.name}, batch "
        f"{config.batch_size}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    report.show(title, rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
