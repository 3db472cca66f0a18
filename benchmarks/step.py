"""What a training step costs, and where the time goes.

    python -m benchmarks.step --config=configs/byol.py --config.batch_size=8 --json=step.json

Times the whole step and its parts, each compiled alone on the same shapes:

- augmentation: both views, from uint8 to normalised float;
- convolutions: the encoder's convolutions and 1x1 matmuls in order, with nothing between them;
- rest of the encoder: its forward pass less its convolutions (norms, ReLUs, sums, pooling);
- forward of online, forward of target: whole networks, both views;
- backward: the gradient of the loss less its forward;
- optimizer + EMA.

XLA fuses across the parts, so they need not add up to the step exactly. FLOPs are XLA's count of
the compiled step, two per multiply-add; the peak is a 2048^3 float32 matmul, measured here and now.
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

import byol_jax.method
from benchmarks import report
from byol_jax.method import TARGET_PARTS
from selfsup_jax import collectives, parallel
from selfsup_jax.augment import normalize
from selfsup_jax.models.resnet import Conv

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_REPEATS = flags.DEFINE_integer("repeats", 5, "timed calls; the median counts")
_CLASSES = flags.DEFINE_integer("classes", 1000, "of the online probe")


def whole_step(method: Any, batch: dict, repeats: int) -> tuple[list[report.Row], float, float]:
    """Rows of the compiled step, as the loop runs it; its seconds and its FLOPs."""
    state = parallel.replicate(method.init_state, jax.random.PRNGKey(0))
    sharded = parallel.shard(batch)
    step = parallel.pmap_step(method.train_step)
    start = time.perf_counter()
    compiled = step.lower(state, sharded).compile()
    compile_seconds = time.perf_counter() - start
    flops = float(compiled.cost_analysis()["flops"])
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
    ]
    return rows, seconds, flops


def matmul_peak(repeats: int) -> float:
    """FLOP/s of a 2048^3 float32 matmul on one device."""
    x = jax.random.normal(jax.random.PRNGKey(0), (2048, 2048))
    seconds = report.median_seconds(jax.jit(jnp.dot), x, x, repeats=max(5, repeats))
    return 2 * 2048**3 / seconds


def convolutions(encoder: nn.Module, variables: Any, images: jax.Array) -> Any:
    """A function of all the encoder's convolutions, each on an input of the shape it sees."""
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


def parts(method: Any, batch: dict, repeats: int) -> dict[str, float]:
    """Seconds of each part alone, on one device."""
    bound = method.train_step.keywords
    networks, optimizer = bound["networks_"], bound["optimizer"]
    state = jax.jit(method.init_state)(jax.random.PRNGKey(0))
    layout = collectives.batch_layout(1, 2, None)
    labels = jnp.asarray(batch["label"])

    @jax.jit
    def augmentation(rng, batch):
        views = method.augment_views(rng, batch)
        return normalize(views.reshape(-1, *views.shape[2:]), bound["mean"], bound["std"])

    def timed(fn, *args):
        return report.median_seconds(fn, *args, repeats=repeats)

    seconds = {"augmentation": timed(augmentation, state.rng, batch)}
    images = augmentation(state.rng, batch)

    variables = {
        "params": state.online_params["encoder"],
        "batch_stats": state.online_stats["encoder"],
    }
    convs, inputs, kernels = convolutions(networks.encoder, variables, images)
    seconds["convolutions"] = timed(convs, inputs, kernels)
    encode = jax.jit(lambda v, x: networks.encoder.apply(v, x, layout, mutable=["batch_stats"]))
    encoder = timed(encode, variables, images)
    seconds["encoder forward"] = encoder
    seconds["rest of the encoder"] = max(0.0, encoder - seconds["convolutions"])

    def loss(params, state, images, labels):
        return byol_jax.method.loss_fn(
            params,
            state.target_params,
            state.online_stats,
            state.target_stats,
            images,
            labels,
            networks_=networks,
            layout=layout,
        )

    forward = timed(jax.jit(loss), state.online_params, state, images, labels)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    seconds["forward, online and target"] = forward
    both = timed(gradient, state.online_params, state, images, labels)
    seconds["backward"] = max(0.0, both - forward)

    @jax.jit
    def update(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
        params = optax.apply_updates(state.online_params, updates)
        online = {part: params[part] for part in TARGET_PARTS}
        return params, opt_state, optax.incremental_update(online, state.target_params, 0.01)

    seconds["optimizer + EMA"] = timed(update, state, state.online_params)
    return seconds


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    config = _CONFIG.value
    method = byol_jax.method.build(config, _CLASSES.value, 1000, 10)
    batch = report.fake_batch(config.batch_size, config.data.image_size)
    rows, step, flops = whole_step(method, batch, _REPEATS.value)
    peak = matmul_peak(_REPEATS.value)
    share = flops / step / (peak * jax.device_count())
    rows += [
        ("matmul peak", peak / 1e9, "GFLOP/s"),
        ("share of the matmul peak", 100 * share, "%"),
    ]
    seconds = parts(method, batch, _REPEATS.value)
    rows += [(name, value * 1e3, "ms") for name, value in seconds.items()]
    rows += [
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
