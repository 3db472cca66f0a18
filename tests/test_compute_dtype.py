"""bfloat16 where a device computes in it: chosen by the kind of device, and as good as float32."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from conftest import flatten

from configs import byol
from selfsup_jax.build import find
from selfsup_jax.data import sources
from selfsup_jax.devices import process
from selfsup_jax.models import resnet
from selfsup_jax.state import encoder_variables


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "gfx942", "bfloat16"),
    ],
)
def test_auto_is_what_the_device_is_fast_in(monkeypatch, platform, capability, expected):
    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert process.compute_dtype("auto") == expected
    assert [process.compute_dtype(name) for name in ("float32", "bfloat16")] == [
        "float32",
        "bfloat16",
    ]


@pytest.mark.parametrize("preset", ["imagenet", "cifar10", "imagenette", "folder", "demo"])
def test_every_preset_takes_what_the_device_is_fast_in(preset):
    assert byol.get_config(preset).compute_dtype == "auto"


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    monkeypatch.setitem(resnet.STAGES, 2, tiny_runs.ONE_BLOCK)


def demo(dtype: str):
    config = byol.get_config("demo")
    config.compute_dtype = dtype
    config.batch_size, config.encoder.depth, config.encoder.width = 32, 2, 0.0625
    config.projector.hidden_sizes = config.predictor.hidden_sizes = (32,)
    config.projector.output_size = config.predictor.output_size = 16
    return find("byol")(config.copy_and_resolve_references(), 10, 100, 1)


def images(count: int) -> np.ndarray:
    """Digits at 16 px."""
    digits = sources.load("digits", "", f"train[:{count}]", "data.train_split").images
    return np.ascontiguousarray(digits[:, 6:22, 6:22])


def cosine(a, b) -> np.ndarray:
    a, b = np.asarray(a), np.asarray(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.slow
def test_bfloat16_does_what_float32_does():
    """From the same parameters: features, loss, and the direction of the update.

    Further on, rounding alone takes two runs of BYOL apart.
    """
    views = images(32)
    normalized = (views / np.float32(255) - 0.13) / 0.31
    batch = {"view_1": views, "view_2": views, "index": np.arange(32, dtype=np.int32)}
    batch["label"] = np.arange(32, dtype=np.int32) % 10
    found = {}
    for dtype in ("float32", "bfloat16"):
        method = demo(dtype)
        state = jax.jit(method.init_state)(jax.random.PRNGKey(0))
        features = jax.jit(method.represent)(encoder_variables(state), normalized)
        start = flatten(state.online_params)
        step = jax.jit(method.train_step)
        for _ in range(3):
            state, metrics = step(state, batch)
        change = [(x - start[path]).ravel() for path, x in flatten(state.online_params).items()]
        found[dtype] = (np.asarray(features), float(metrics["loss"]), np.concatenate(change))
    (full, loss, change), (half, half_loss, half_change) = found.values()
    assert not np.array_equal(full, half) and half.dtype == np.float32
    assert cosine(full, half).min() > 0.999
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert cosine(change, half_change) > 0.9


def test_the_state_and_the_loss_stay_float32():
    method = demo("bfloat16")
    state = jax.eval_shape(method.init_state, jax.random.PRNGKey(0))
    views = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8)
    batch = {"view_1": views, "view_2": views} | {
        name: jax.ShapeDtypeStruct((4,), jnp.int32) for name in ("index", "label")
    }
    after, metrics = jax.eval_shape(method.train_step, state, batch)
    kinds = {x.dtype for x in jax.tree.leaves((after, metrics))}
    assert kinds <= {jnp.dtype(name) for name in ("float32", "int32", "uint32")}
    step = str(jax.make_jaxpr(method.train_step)(state, batch))
    assert "conv_general_dilated" in step and "bf16[" in step
