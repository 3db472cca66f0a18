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


def train_on(step, state):
    """Three passes over 800 digits; the second view is a pixel beside the first."""
    digits = sources.load("digits", "", "train[:800]", "data.train_split").images[:, 6:23, 6:23]
    for start in [*range(0, 800, 32)] * 3:
        rows = np.arange(start, start + 32)
        views = {"view_1": digits[rows, :16, :16], "view_2": digits[rows, 1:, 1:]}
        index, label = rows.astype(np.int32), np.zeros(32, np.int32)
        state, _ = step(state, views | {"index": index, "label": label})
    return state


def nearest_top1(method, state) -> float:
    """Of 400 held-out digits, how many have the label of the nearest of 800, by cosine."""
    splits = [
        sources.load("digits", "", f"{split}[:{count}]", "data.train_split")
        for split, count in (("train", 800), ("test", 400))
    ]
    represent = jax.jit(method.represent)
    train, test = (
        represent(
            encoder_variables(state), (x.images[:, 6:22, 6:22] / np.float32(255) - 0.13) / 0.31
        )
        for x in splits
    )
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    found = splits[0].labels[np.argmax(unit[1] @ unit[0].T, axis=1)]
    return float(np.mean(found == splits[1].labels))


def cosine(a, b) -> np.ndarray:
    a, b = np.asarray(a), np.asarray(b)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.slow
def test_bfloat16_does_what_float32_does():
    """From the same parameters: features, loss, and the direction of the update.

    Further on, rounding alone takes two runs of BYOL apart, but what they have learned is as good.
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
        loss = float(metrics["loss"])
        right = nearest_top1(method, train_on(step, state))
        found[dtype] = (np.asarray(features), loss, np.concatenate(change), right)
    (full, loss, change, right), (half, half_loss, half_change, half_right) = found.values()
    assert not np.array_equal(full, half) and half.dtype == np.float32
    assert cosine(full, half).min() > 0.999
    assert half_loss == pytest.approx(loss, rel=0.02)
    assert cosine(change, half_change) > 0.9
    assert min(right, half_right) > 0.3 and abs(right - half_right) < 0.06


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
