"""bfloat16 where a device computes in it: chosen by the kind of device, and as good as float32."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from configs import byol
from selfsup_jax.build import find
from selfsup_jax.devices import process
from selfsup_jax.training import pretrain


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


def demo(dtype: str):
    config = byol.get_config("demo")
    config.compute_dtype = dtype
    config.epochs, config.optimizer.warmup_epochs = 1.0, 0.5
    config.encoder.width = 0.0625
    config.projector.hidden_sizes = config.predictor.hidden_sizes = (32,)
    config.projector.output_size = config.predictor.output_size = 16
    config.data.train_split, config.data.test_split = "train[:1280]", "test"
    config.eval.random_init = config.eval.pixels = False
    config.monitor.plots_every_steps = config.monitor.knn_every_steps = 0
    return config


@pytest.mark.slow
def test_bfloat16_ends_where_float32_does(tmp_path):
    """Over 20 steps; further on, rounding alone takes two runs of BYOL apart."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        results[dtype] = pretrain.pretrain(demo(dtype), str(tmp_path / dtype))
    assert results["bfloat16"]["loss"] != results["float32"]["loss"]
    for name, most in (("loss", 0.1), ("linear_probe_top1", 0.05), ("knn_top1", 0.05)):
        assert abs(results["bfloat16"][name] - results["float32"][name]) <= most, (name, results)


def test_the_state_and_the_loss_stay_float32():
    config = demo("bfloat16").copy_and_resolve_references()
    method = find("byol")(config, 10, 10, 1)
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
