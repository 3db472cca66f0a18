"""Times a training step and its parts.

    python -m benchmarks.step --config=configs/byol.py --config.batch_size=8 --json=step.json
    python -m benchmarks.step --config=configs/moco.py --config.batch_size=64 \\
      --config.compute_dtype=float32 --repeats=3

Each part is compiled alone, on the same shapes:

- augmentation: all views, from uint8 to normalised float;
- encoder forward: all its passes, of the online and of the target network, each on its own views;
  with views of several sizes also those of each size;
- layers: the encoder's convolutions and 1x1 matmuls in order, or a ViT's linear layers, without
  what is between them; rest of the encoder: its forward passes minus these (norms, ReLUs, sums,
  pooling; attention, GELUs);
- heads and loss forward: the forward pass minus the encoder; forward: all of it;
- forward and backward: the same with the gradient; backward: the difference. The rest of a step is
  augmentation, queue or centre, optimizer and EMA;
- optimizer + EMA.

XLA fuses operations across the parts, so their sum may differ from the step. FLOPs and bytes are
XLA's count for the compiled step, two FLOPs per multiply-add. They are compared with a large matmul
in the config's compute dtype and with a large copy, on the same device: the step cannot take less
than the longer of the two times. With `--views=device` the step also gathers, crops and resizes its
images, from a data set on the device. `benchmarks.loop` measures what the training loop adds.
"""

from __future__ import annotations

import collections
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import report, step_parts
from selfsup_jax.build import find
from selfsup_jax.data import inputs, sources
from selfsup_jax.devices import parallel, process
from selfsup_jax.models import encoders

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls; the median counts")
_VIEWS = flags.DEFINE_enum("views", "given", ["given", "device"], "where the crops are made")
_CLASSES = flags.DEFINE_integer("classes", 1000, "of the online probe")


def step_with_crops(config: Any, method: Any, batch: dict, repeats: int) -> tuple[Any, Any, float]:
    """A step that crops its images, its (sharded) arguments, and the seconds of its crops alone.

    The arguments are a data set of images of `data.test_resize` pixels and rows of it.
    """
    size, images = config.data.test_resize, 4 * len(batch["index"])
    shape = (images, size, size, 3)
    labels = np.zeros(images, np.int32)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    source = sources.Source("noise", images, ("0", "1"), "array", noise, labels, shape=(size, size))
    feed = inputs.feed(config, source)
    rows = {"row": batch["index"], "index": batch["index"], "drawn": batch["index"]}

    def step(state: Any, given: Any, *, axis_name: str) -> tuple[Any, Any]:
        arrays, rows = given
        return method.train_step(state, feed.views(arrays, state.step, rows), axis_name=axis_name)

    arrays = parallel.replicate(lambda x: x, feed.arrays)
    crop = jax.jit(lambda arrays, step, rows: feed.views(arrays, step, rows))
    on_device = jax.device_put((feed.arrays, np.int32(0), rows))
    seconds = report.median_seconds(crop, *on_device, repeats=max(20, repeats))
    return step, (arrays, parallel.shard(rows)), seconds


def without_fused_attention(config: Any) -> Any:
    """The config without cuDNN's attention, whose FLOPs XLA does not count; None if it has none."""
    if jax.default_backend() != "gpu" or not encoders.is_vit(config.encoder):
        return None
    plain = config.copy_and_resolve_references()
    plain.encoder.vit.attention_kernel = "xla"
    return plain


def whole_step(
    method: Any, train_step: Any, given: Any, images: int, repeats: int, counted: Any = None
) -> tuple[list[report.Row], float, float, float]:
    """Rows of the compiled step, as the training loop runs it; its seconds, FLOPs and bytes.

    `counted`: the step whose FLOPs count in place of its own.
    """
    state = parallel.replicate(method.init_state, jax.random.PRNGKey(0))
    step = parallel.step_over_devices(train_step)
    start = time.perf_counter()
    compiled = step.lower(state, given).compile()
    compile_seconds = time.perf_counter() - start
    cost = compiled.cost_analysis()
    flops, moved = float(cost["flops"]), float(cost.get("bytes accessed", 0))
    if counted is not None:
        cost = parallel.step_over_devices(counted).lower(state, given).cost_analysis()
        flops = float(cost["flops"])
    memory = compiled.memory_analysis()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, given)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times[1:]))
    rows = [
        ("step", seconds * 1e3, "ms"),
        ("images per second", images / seconds, "1/s"),
        ("compile", compile_seconds, "s"),
        ("FLOPs per step", flops / 1e9, "GFLOP"),
        ("bytes per step", moved / 1e9, "GB"),
        ("state, renewed in place", memory.alias_size_in_bytes / 2**20, "MiB"),
        ("temporaries", memory.temp_size_in_bytes / 2**20, "MiB"),
    ]
    return rows, seconds, flops, moved


def ceilings(dtype: str, repeats: int) -> tuple[float, float]:
    """FLOP/s of a large matmul and bytes/s of a large copy (read and written) on one device."""
    on_cpu = jax.default_backend() == "cpu"
    n, count = (2048, 2**24) if on_cpu else (8192, 2**29)
    key = jax.random.PRNGKey(0)
    x = jax.random.normal(key, (n, n), dtype)
    matmul = report.median_seconds(jax.jit(jnp.dot), x, x, repeats=max(5, repeats))
    flat = jax.random.normal(key, (count,), dtype)
    copy = report.median_seconds(jax.jit(jnp.negative), flat, repeats=max(5, repeats))
    return 2 * n**3 / matmul, 2 * flat.nbytes / copy


def crops_of(config: Any) -> str:
    """The views in words: `2 x 224 px + 8 x 96 px`."""
    counts = collections.Counter(report.sides(config))
    return " + ".join(f"{count} x {side} px" for side, count in counts.items())


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    process.keep_freed_memory()
    config = _CONFIG.value
    method = find(config.method)(config, _CLASSES.value, 1000, 10)
    batch = report.fake_batch(config.batch_size, report.sides(config))
    train_step, given = method.train_step, parallel.shard(batch)
    repeats, crops = _REPEATS.value, 0.0
    if _VIEWS.value == "device":
        train_step, given, crops = step_with_crops(config, method, batch, repeats)
    plain = without_fused_attention(config)
    counted = find(config.method)(plain, _CLASSES.value, 1000, 10).train_step if plain else None
    rows, step, flops, moved = whole_step(
        method, train_step, given, config.batch_size, repeats, counted
    )
    dtype = process.compute_dtype(config.compute_dtype)
    peak, bandwidth = ceilings(dtype, repeats)
    # XLA counts the FLOPs and bytes of one device.
    by_arithmetic, by_bytes = flops / peak, moved / bandwidth
    rows += [
        (f"{dtype} matmul", peak / 1e12, "TFLOP/s"),
        ("copy", bandwidth / 1e12, "TB/s"),
        ("MFU, share of the matmul rate", 100 * by_arithmetic / step, "%"),
        ("least time by arithmetic", 1e3 * by_arithmetic, "ms"),
        ("least time by bytes, unfused", 1e3 * by_bytes, "ms"),
    ]
    seconds = step_parts.seconds(method, batch, repeats)
    if crops:
        seconds["gather and crops"] = crops
    rows += [(name, value * 1e3, "ms") for name, value in seconds.items()]
    alone, of_encoder = seconds["forward and backward"], seconds["encoder forward"]
    rows += [("step, over forward and backward", 100 * (step / alone - 1), "%")]
    rows += [
        (f"{name}, share of the step", 100 * value / step, "%")
        for name, value in seconds.items()
        if name not in ("layers", "rest of the encoder", "forward", "forward and backward")
    ]
    rest = 100 * seconds["rest of the encoder"] / of_encoder
    rows += [("rest of the encoder, share of the encoder", rest, "%")]
    title = (
        f"step: {config.method}, {encoders.describe(config.encoder)}, "
        f"{crops_of(config)}, batch {config.batch_size}, {dtype}, views {_VIEWS.value}"
    )
    report.show(title, rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
