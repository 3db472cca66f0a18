"""Times the monitoring and the checkpoints of a run, relative to its steps.

    python -m benchmarks.overhead --config=configs/byol.py:demo
    python -m benchmarks.overhead --config=configs/byol.py --config.batch_size=8 --repeats=5

- *in the step*: the compiled training step against the same step without the norms and outputs,
  which the compiler then removes. Both run alternately; the result is the median ratio of the
  pairs.
- *diagnostics*: one snapshot of a step's outputs on the host, relative to the steps between two.
- *saving*: the delay of the next step by a checkpoint (the copy to the host, and the call that
  starts the writing while the device runs the next step), and the writing in the background;
  relative to the steps between two checkpoints. The checksums of all arrays are a part of the
  writing in the background, and the first checkpoint of a process is read back once.
- *resume*: reading the state, which verifies it, and putting it on the devices.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

import byol_jax.method
from benchmarks import report
from selfsup_jax.devices import parallel, process
from selfsup_jax.run import checkpoint_files
from selfsup_jax.run.checkpoint import Checkpoints
from selfsup_jax.state import Outputs
from selfsup_jax.training import diagnostics

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py:demo")
_REPEATS = flags.DEFINE_integer("repeats", 40, "pairs of steps; the median counts")
_CLASSES = flags.DEFINE_integer("classes", 10, "of the online probe")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds until the result of a call is ready, the result)."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def in_the_step(method: Any, batch: dict, repeats: int) -> tuple[list[report.Row], float, Any, Any]:
    """Rows; the seconds of a step; a state; the metrics of a step."""

    def bare_step(state: Any, batch: Any, *, axis_name: str) -> tuple[Any, Any]:
        state, metrics = method.train_step(state, batch, axis_name=axis_name)
        monitored = ("outputs", "finite", "update_norm", "grad_norm")
        return state, {k: v for k, v in metrics.items() if not k.startswith(monitored)}

    steps = [parallel.step_over_devices(step) for step in (method.train_step, bare_step)]
    states = [parallel.replicate(method.init_state, jax.random.PRNGKey(0)) for _ in steps]
    times: list[tuple[float, float]] = []
    metrics: Any = None
    for repeat in range(repeats + 2):
        pair = [0.0, 0.0]
        for i in (0, 1) if repeat % 2 else (1, 0):
            pair[i], (states[i], step_metrics) = seconds(lambda i=i: steps[i](states[i], batch))
            metrics = step_metrics if i == 0 else metrics
        times.append((pair[0], pair[1]))
    whole, bare = np.asarray(times[2:]).T  # the first two compile and warm up
    rows = [
        ("step, with norms and outputs", float(np.median(whole)) * 1e3, "ms"),
        ("step without them", float(np.median(bare)) * 1e3, "ms"),
        ("added in the step", 100 * float(np.median(whole / bare) - 1), "%"),
    ]
    return rows, float(np.median(whole)), states[0], metrics


def diagnosing(
    config: Any, method: Any, outputs: Outputs, state: Any, step_seconds: float
) -> list[report.Row]:
    """Rows of one snapshot of a step's outputs and of the state after it."""

    def snapshot() -> Any:
        rows = Outputs(*parallel.gather_rows(tuple(outputs), np.arange(config.batch_size)))
        params = parallel.local_copy((state.online_params, state.target_params))
        distance = diagnostics.target_distance(*params)
        return diagnostics.of_outputs(rows, method.pairs, config.monitor.max_rows), distance

    snapshot()
    taken = float(np.median([seconds(snapshot)[0] for _ in range(9)]))
    between = config.monitor.diagnostics_every_steps * step_seconds
    return [
        ("diagnostics of outputs and target", taken * 1e3, "ms"),
        ("the same, spread over the steps", 100 * taken / between, "%"),
    ]


def saving(config: Any, method: Any, state: Any, step_seconds: float) -> list[report.Row]:
    """Rows of taking, writing and reading a checkpoint."""
    taken, begun, written = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        checkpoints = Checkpoints(directory, config.keep_checkpoints)
        step = int(parallel.unreplicate(state.step))
        for i in range(7):
            count = np.full(jax.local_device_count(), step + i, np.int32)
            numbered = state.replace(step=parallel.replicate(lambda x: x, count[0]))
            taken.append(seconds(lambda s=numbered: checkpoints.take(s, {}))[0])
            begun.append(seconds(checkpoints.write)[0])
            written.append(seconds(checkpoints.wait)[0])
        like = jax.eval_shape(method.init_state, jax.random.PRNGKey(0))
        restored, host_state = seconds(lambda: checkpoints.restore(like))
        arrays = checkpoint_files.flat(jax.tree.map(np.asarray, host_state))
        sums = [seconds(lambda: checkpoint_files.with_checksums({}, arrays))[0] for _ in range(7)]
        placed, _ = seconds(lambda: parallel.replicate(lambda s: s, host_state))
        checkpoints.close()
    times = (taken, begun, written, sums)
    copy, call, background, summing = (float(np.median(x[1:])) for x in times)
    between = config.checkpoint_every_steps * step_seconds
    megabytes = sum(x.nbytes for x in jax.tree.leaves(host_state)) / 1e6
    return [
        ("state", megabytes, "MB"),
        ("copy to the host, which a step waits for", copy * 1e3, "ms"),
        ("begin to write, while the device works", call * 1e3, "ms"),
        ("write, in the background", background * 1e3, "ms"),
        ("of that the checksums", summing * 1e3, "ms"),
        ("checksums, spread over the steps", 100 * summing / between, "%"),
        ("the first write, which is read back", written[0] * 1e3, "ms"),
        ("copies, spread over the steps", 100 * copy / between, "%"),
        ("all of saving, spread over the steps", 100 * (copy + call + background) / between, "%"),
        ("resume: read", restored, "s"),
        ("resume: put on the devices", placed, "s"),
    ]


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    config = _CONFIG.value
    process.use_cpu_devices(0, config.batch_size, config.accumulate_steps, config.bn_groups)
    process.keep_freed_memory()
    method = byol_jax.method.build(config, _CLASSES.value, 1000, 10)
    batch = parallel.shard(report.fake_batch(config.batch_size, report.sides(config)))
    rows, step_seconds, state, metrics = in_the_step(method, batch, _REPEATS.value)
    rows += diagnosing(config, method, metrics["outputs"], state, step_seconds)
    rows += saving(config, method, state, step_seconds)
    title = f"{jax.device_count()} x {jax.devices()[0].device_kind}, batch {config.batch_size}"
    report.show(title, rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
