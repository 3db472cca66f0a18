"""Times this project's training steps on one device, with donated state and batches on the device.

`full` is the unchanged preset: augmentation, its optimizer, the online probe, MoCo's 8 batch-norm
groups, all metrics. `plain` equals the PyTorch step: no augmentation, SGD, no probe, one batch-norm
group, one direction of MoCo, only the loss. Up to 64 px the preset is `cifar10`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import step_shared
from benchmarks.gpu.step_shared import Case
from configs import recipes


def config_of(case: Case, variant: str, dtype: str) -> Any:
    """The config of a case: `full` or `plain`."""
    preset = "cifar10" if case.stem == "cifar" else "imagenet"
    config = importlib.import_module(f"configs.{case.method}").get_config(preset)
    config.batch_size, config.compute_dtype, config.data.image_size = case.batch, dtype, case.px
    config.encoder.depth, config.encoder.stem = case.depth, case.stem
    config.encoder.width = case.width
    if variant == "plain":
        config.bn_groups = 1
        if case.method == "moco":
            config.symmetric = False
        config.optimizer.update(name="sgd", learning_rate=0.03, scaling="none")
        for view in recipes.sections_of_views(config):
            view.update({field: 0.0 for field in view if field.endswith("_prob")})
    elif case.batch < 64:
        config.bn_groups = 1
    return config.copy_and_resolve_references()


def one(args: argparse.Namespace, case: Case, variant: str) -> dict[str, Any]:
    """Compiles and times a step."""
    full = variant == "full"
    config = config_of(case, variant, args.dtype)
    build = importlib.import_module(f"{case.method}_jax.method").build
    method = build(config, step_shared.CLASSES if full else None, 10_000, 0)

    def batch(seed: int) -> dict[str, jax.Array]:
        rng = np.random.default_rng(seed)
        shape = (case.batch, case.px, case.px, 3)
        made = {f"view_{i}": rng.integers(0, 256, shape, np.uint8) for i in (1, 2)}
        made["index"] = np.arange(case.batch, dtype=np.int32)
        if full:
            made["label"] = rng.integers(0, step_shared.CLASSES, case.batch).astype(np.int32)
        return jax.device_put(made)

    def step(state, batch):
        state, metrics = method.train_step(state, batch, axis_name=None)
        return state, metrics if full else metrics["loss"]

    batches = [batch(0), batch(1)]
    state = jax.block_until_ready(jax.jit(method.init_state)(jax.random.PRNGKey(0)))
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(state, batches[0])
    traced = time.perf_counter()
    compiled = lowered.compile()
    row: dict[str, Any] = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    memory = compiled.memory_analysis()
    if memory is not None:
        bytes_ = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        row["peak_gib"] = (
            bytes_ + memory.output_size_in_bytes - memory.alias_size_in_bytes
        ) / 2**30

    holder = [state, None]
    del state

    def call(i: int) -> None:
        holder[0], holder[1] = compiled(holder[0], batches[i % 2])

    row |= step_shared.measure(call, lambda: jax.block_until_ready(holder), args.repeats)
    loss = holder[1]["loss"] if full else holder[1]
    return row | {"loss": float(loss)}


def ceiling() -> dict[str, Any]:
    """Rates of a large bf16 matmul and a large copy (bytes read plus written), on random data."""
    on_gpu = jax.default_backend() == "gpu"
    n = 8192 if on_gpu else 512
    x = jax.random.normal(jax.random.PRNGKey(0), (n, n), jnp.bfloat16)
    big = jax.random.normal(jax.random.PRNGKey(1), (2**30 if on_gpu else 2**22,), jnp.bfloat16)
    product, copy = jax.jit(jnp.dot), jax.jit(lambda v: -v)
    kept: list[Any] = [None]

    def timed(fn, *inputs) -> float:
        def call(_: int) -> None:
            kept[0] = fn(*inputs)

        return (
            step_shared.measure(call, lambda: jax.block_until_ready(kept), 10)["in_a_row_ms"] / 1e3
        )

    rates = {
        "matmul_tflops": 2 * n**3 / timed(product, x, x) / 1e12,
        "copy_tb_s": 2 * big.nbytes / timed(copy, big) / 1e12,
    }
    return rates | {"device": jax.devices()[0].device_kind, "version": jax.__version__}


def main(args: argparse.Namespace) -> None:
    """Times all cases."""
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)

    def fresh(case: Case, variant: str) -> dict[str, Any]:
        try:
            return one(args, case, variant)
        finally:
            jax.clear_caches()

    step_shared.run_cases(args, "jax", args.ours, fresh, ceiling())
