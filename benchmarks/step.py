"""Times a training step and its parts.

    python -m benchmarks.step --config=configs/byol.py --config.batch_size=8 --json=step.json
    python -m benchmarks.step --config=configs/moco.py --config.batch_size=64 \\
      --config.compute_dtype=float32 --repeats=3

Each part is compiled alone, on the same shapes:

- augmentation: both views, from uint8 to normalised float;
- convolutions: the encoder's convolutions and 1x1 matmuls in order, without the layers between;
- rest of the encoder: its forward pass minus its convolutions (norms, ReLUs, sums, pooling);
- forward of all networks: online and target, each on its own views;
- all networks alone: the same plus the online network's backward pass. The rest of a step is
  augmentation, loss, queue, optimizer and EMA;
- optimizer + EMA.

XLA fuses operations across the parts, so their sum may differ from the step. FLOPs are XLA's count
for the compiled step, two per multiply-add; the peak is measured with a 2048^3 float32 matmul.
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
from selfsup_jax.devices import collectives, parallel
from selfsup_jax.method import apply, stack_views
from selfsup_jax.models.resnet import Conv
from selfsup_jax.state import encoder_variables

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls; the median counts")
_CLASSES = flags.DEFINE_integer("classes", 1000, "of the online probe")


def whole_step(method: Any, batch: dict, repeats: int) -> tuple[list[report.Row], float, float]:
    """Rows of the compiled step, as the training loop runs it; its seconds; its FLOPs."""
    state = parallel.replicate(method.init_state, jax.random.PRNGKey(0))
    sharded = parallel.shard(batch)
    step = parallel.step_over_devices(method.train_step)
    start = time.perf_counter()
    compiled = step.lower(state, sharded).compile()
    compile_seconds = time.perf_counter() - start
    flops = float(compiled.cost_analysis()["flops"])
    memory = compiled.memory_analysis()
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, sharded)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    seconds = float(np.median(times[1:]))
    images = len(batch["index"])
    rows = [
        ("step", seconds * 1e3, "ms"),
        ("images per second", images / seconds, "1/s"),
        ("compile", compile_seconds, "s"),
        ("FLOPs per step", flops / 1e9, "GFLOP"),
        ("state, renewed in place", memory.alias_size_in_bytes / 2**20, "MiB"),
        ("temporaries", memory.temp_size_in_bytes / 2**20, "MiB"),
    ]
    return rows, seconds, flops


def matmul_peak(repeats: int) -> float:
    """FLOP/s of a 2048^3 float32 matmul on one device."""
    x = jax.random.normal(jax.random.PRNGKey(0), (2048, 2048))
    seconds = report.median_seconds(jax.jit(jnp.dot), x, x, repeats=max(5, repeats))
    return 2 * 2048**3 / seconds


def convolutions(encoder: nn.Module, variables: Any, images: jax.Array) -> Any:
    """A jitted function of all convolutions of the encoder, its inputs and its kernels."""
    seen: list[tuple[dict, tuple[int, ...]]] = []

    def record(next_fn, args, kwargs, context):
        if isinstance(context.module, Conv) and context.method_name == "__call__":
            fields = {
                f: getattr(context.module, f)
                for f in ("features", "size", "stride", "padding", "kernel_init")
            }
            seen.append((fields, args[0].shape))
        return next_fn(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(encoder.apply, variables, images)
    layers = [(Conv(**fields, parent=None), shape) for fields, shape in seen]
    rng = jax.random.PRNGKey(1)
    shapes = sorted({shape for _, shape in layers})
    inputs = {shape: jax.random.normal(rng, shape, encoder.dtype) for shape in shapes}
    kernels = [
        {"params": {"kernel": jnp.ones((m.size, m.size, shape[-1], m.features)) * 0.01}}
        for m, shape in layers
    ]

    def run(inputs: dict, kernels: list) -> list:
        return [
            module.apply(kernel, inputs[shape])
            for (module, shape), kernel in zip(layers, kernels, strict=True)
        ]

    return jax.jit(run), inputs, kernels


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
    convs, inputs, kernels = convolutions(encoder_module, variables, images)
    seconds["convolutions"] = timed(convs, inputs, kernels)
    encode = jax.jit(lambda v, x: apply(encoder_module, v, x, layout))
    encoder = timed(encode, variables, images)
    seconds["encoder forward"] = encoder
    seconds["rest of the encoder"] = max(0.0, encoder - seconds["convolutions"])

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
    del argv
    config = _CONFIG.value
    method = find(config.method)(config, _CLASSES.value, 1000, 10)
    batch = report.fake_batch(config.batch_size, config.data.image_size)
    rows, step, flops = whole_step(method, batch, _REPEATS.value)
    peak = matmul_peak(_REPEATS.value)
    share = flops / step / (peak * jax.device_count())
    rows += [
        ("matmul peak", peak / 1e9, "GFLOP/s"),
        ("share of the matmul peak", 100 * share, "%"),
    ]
    seconds = parts(config, method, batch, _REPEATS.value)
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
        f"step: {config.method}, ResNet-{config.encoder.depth} x{config.encoder.width:g}, "
        f"{config.data.image_size} px, batch {config.batch_size}, {config.compute_dtype}"
    )
    report.show(title, rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
