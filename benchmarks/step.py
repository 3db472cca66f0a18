"""Times a training step and its parts.

    python -m benchmarks.step --config=configs/byol.py --config.batch_size=8 --json=step.json
    python -m benchmarks.step --config=configs/moco.py --config.batch_size=64 \\
      --config.compute_dtype=float32 --repeats=3

Each part is compiled alone, on the same shapes:

- augmentation: both views, from uint8 to normalised float;
- layers: the encoder's convolutions and 1x1 matmuls in order, or a ViT's linear layers, without
  what is between them;
- rest of the encoder: its forward pass minus these (norms, ReLUs, sums, pooling; attention, GELUs);
- forward of all networks: online and target, each on its own views;
- all networks alone: the same plus the online network's backward pass. The rest of a step is
  augmentation, loss, queue, optimizer and EMA;
- optimizer + EMA.

XLA fuses operations across the parts, so their sum may differ from the step. FLOPs and bytes are
XLA's count for the compiled step, two FLOPs per multiply-add. They are compared with a large matmul
in the config's compute dtype and with a large copy, on the same device: the step cannot take less
than the longer of the two times. With `--views=device` the step also gathers, crops and resizes its
images, from a data set on the device. `benchmarks.loop` measures what the training loop adds.
"""

from __future__ import annotations

import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax.build import find
from selfsup_jax.data import inputs, sources
from selfsup_jax.devices import collectives, parallel, process
from selfsup_jax.method import apply, stack_views
from selfsup_jax.models import encoders
from selfsup_jax.models.resnet import Conv
from selfsup_jax.state import encoder_variables

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


def layers(encoder: nn.Module, variables: Any, images: jax.Array) -> Any:
    """A jitted function of all convolutions and linear layers, its inputs and its parameters."""
    seen: list[tuple[nn.Module, tuple[int, ...]]] = []

    def record(next_fn, args, kwargs, context):
        if isinstance(context.module, Conv | nn.Dense) and context.method_name == "__call__":
            seen.append((context.module.clone(parent=None), args[0].shape))
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(encoder.apply, variables, images)
    rng = jax.random.PRNGKey(1)
    shapes = sorted({shape for _, shape in seen})
    inputs = {shape: jax.random.normal(rng, shape, encoder.dtype) for shape in shapes}
    params = [
        jax.tree.map(
            lambda x: jnp.full(x.shape, 0.01, x.dtype),
            jax.eval_shape(module.init, rng, inputs[shape]),
        )
        for module, shape in seen
    ]

    def run(inputs: dict, params: list) -> list:
        return [
            module.apply(own, inputs[shape])
            for (module, shape), own in zip(seen, params, strict=True)
        ]

    return jax.jit(run), inputs, params


def networks_alone(config: Any, method: Any, state: Any) -> tuple[Any, Any]:
    """Two functions of normalised images `[V, B, H, W, 3]`: forward, and forward with backward.

    They contain only the necessary network passes: the online network on its views and the target
    network on its views. MoCo computes queries from one view and keys from the other, unless it is
    symmetric.
    """
    one_sided = config.method == "moco" and not config.symmetric
    views = 1 if one_sided else 2
    # In SimCLR, both views share one batch for batch norm.
    layout = collectives.batch_layout(
        config.bn_groups, 1 if config.method == "simclr" else views, None
    )
    net = method.network

    def forward(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        online = {"params": params, "batch_stats": state.online_stats}
        outputs, _ = apply(net, online, stack_views(images[:views]), layout)
        z, projected = outputs[-1], None
        if state.target_params:
            target = {"params": state.target_params, "batch_stats": state.target_stats}
            seen = stack_views(images[1:] if one_sided else images)
            project = getattr(net, "project", None)  # without the predictor
            projected, _ = apply(net, target, seen, layout, method=project)
        # An arbitrary direction: XLA would simplify the gradient of a plain sum.
        direction = jnp.sin(jnp.arange(z.size, dtype=jnp.float32)).reshape(z.shape)
        return jnp.vdot(z, direction), projected

    return jax.jit(forward), jax.jit(jax.grad(forward, has_aux=True))


def parts(config: Any, method: Any, batch: dict, repeats: int) -> dict[str, float]:
    """Seconds of each part, run alone on one device."""
    encoder_module, optimizer = method.network.encoder, method.optimizer
    state = jax.jit(method.init_state)(jax.random.PRNGKey(0))
    layout = collectives.batch_layout(1, 2, None)

    @jax.jit
    def augmentation(rng, batch):
        return method.augment.normalized(rng, batch)["global"]

    def timed(fn, *args):
        return report.median_seconds(fn, *args, repeats=repeats)

    seconds = {"augmentation": timed(augmentation, state.rng, batch)}
    views = augmentation(state.rng, batch)
    images = stack_views(views)

    variables = encoder_variables(state)
    seconds["layers"] = timed(*layers(encoder_module, variables, images))
    encode = jax.jit(lambda v, x: apply(encoder_module, v, x, layout))
    encoder = timed(encode, variables, images)
    seconds["encoder forward"] = encoder
    seconds["rest of the encoder"] = max(0.0, encoder - seconds["layers"])

    forward, gradient = networks_alone(config, method, state)
    seconds["forward of all networks"] = timed(forward, state.online_params, views)
    seconds["all networks alone"] = timed(gradient, state.online_params, views)

    @jax.jit
    def update(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
        params = optax.apply_updates(state.online_params, updates)
        online = {part: params[part] for part in state.target_params}
        return params, opt_state, optax.incremental_update(online, state.target_params, 0.01)

    seconds["optimizer + EMA"] = timed(update, state, state.online_params)
    return seconds


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    process.keep_freed_memory()
    config = _CONFIG.value
    method = find(config.method)(config, _CLASSES.value, 1000, 10)
    batch = report.fake_batch(config.batch_size, config.data.image_size)
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
    seconds = parts(config, method, batch, repeats)
    if crops:
        seconds["gather and crops"] = crops
    rows += [(name, value * 1e3, "ms") for name, value in seconds.items()]
    rows += [
        ("step, over its networks alone", 100 * (step / seconds["all networks alone"] - 1), "%"),
        ("augmentation, share of the step", 100 * seconds["augmentation"] / step, "%"),
        (
            "rest of the encoder, share of the encoder",
            100 * seconds["rest of the encoder"] / seconds["encoder forward"],
            "%",
        ),
    ]
    title = (
        f"step: {config.method}, {encoders.describe(config.encoder)}, "
        f"{config.data.image_size} px, batch {config.batch_size}, {dtype}, views {_VIEWS.value}"
    )
    report.show(title, rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
