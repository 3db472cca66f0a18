"""Batch norm over views, groups and devices against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfsup_jax.devices import collectives
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models.norm import BatchNorm, batch_norm, relu

CHANNELS, BATCH = 3, 16  # the batch is that of one view
EPSILON = 1e-5


def noise(shape, seed=0):
    """Every row and channel at a level of its own, so that no two sets have the same moments."""
    rng = np.random.default_rng(seed)
    levels = rng.normal(size=(shape[0], *(1,) * (len(shape) - 2), shape[-1]))
    return (rng.normal(size=shape) + 2 * levels).astype(np.float32)


def variables(seed=1):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32)  # noqa: E731
    return {
        "params": {"scale": draw(), "bias": draw()},
        "batch_stats": {"mean": draw(), "var": draw()},
    }


def by_hand(x, v, views, groups):
    """(outputs, running mean, running variance) in float64: views in turn, groups averaged."""
    x = x.astype(np.float64)
    mean, var = (v["batch_stats"][k].astype(np.float64) for k in ("mean", "var"))
    outputs = []
    for view in np.split(x, views):
        means, variances = [], []
        for group in np.split(view, groups):
            axes = tuple(range(group.ndim - 1))
            means.append(group.mean(axes))
            variances.append(((group - means[-1]) ** 2).mean(axes))  # biased
            normal = (group - means[-1]) / np.sqrt(variances[-1] + EPSILON)
            outputs.append(normal * v["params"]["scale"] + v["params"]["bias"])
        mean = 0.9 * mean + 0.1 * np.mean(means, 0)
        var = 0.9 * var + 0.1 * np.mean(variances, 0)
    return np.concatenate(outputs), mean, var


@pytest.mark.parametrize("shape", [(2 * BATCH, CHANNELS), (2 * BATCH, 2, 3, CHANNELS)])
@pytest.mark.parametrize(("views", "groups"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_is_numpys(shape, views, groups):
    x, v = noise(shape), variables()
    y, new = BatchNorm().apply(v, x, BatchLayout(views, groups), mutable=["batch_stats"])
    outputs, mean, var = by_hand(x, v, views, groups)
    np.testing.assert_allclose(y, outputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["batch_stats"]["var"], var, rtol=1e-5)


def test_evaluation_takes_the_running_averages():
    x, v = noise((5, 2, 2, CHANNELS)), variables()
    y = BatchNorm().apply(v, x, None)  # nothing mutable: it would raise if it touched them
    stats = v["batch_stats"]
    normal = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
    np.testing.assert_allclose(
        y, normal * v["params"]["scale"] + v["params"]["bias"], rtol=1e-5, atol=1e-5
    )


def test_decay_and_epsilon_are_fields():
    x, v = noise((8, CHANNELS)), variables()
    norm = BatchNorm(decay=0.5, epsilon=2.0)
    y, new = norm.apply(v, x, BatchLayout(), mutable=["batch_stats"])
    x = x.astype(np.float64)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 2.0) * v["params"]["scale"] + v["params"][
        "bias"
    ]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    mean = 0.5 * v["batch_stats"]["mean"] + 0.5 * x.mean(0)
    np.testing.assert_allclose(new["batch_stats"]["mean"], mean, rtol=1e-5, atol=1e-6)


def test_initialisation():
    rng, x = jax.random.PRNGKey(0), noise((8, CHANNELS))
    for zero in (False, True):
        v = BatchNorm(zero_init_scale=zero).init(rng, x, BatchLayout())
        np.testing.assert_array_equal(v["params"]["scale"], np.full(CHANNELS, 1 - zero))
        np.testing.assert_array_equal(v["params"]["bias"], np.zeros(CHANNELS))
        # What the initialising batch holds leaves no mark.
        np.testing.assert_array_equal(v["batch_stats"]["mean"], np.zeros(CHANNELS))
        np.testing.assert_array_equal(v["batch_stats"]["var"], np.ones(CHANNELS))


def test_bfloat16_input_keeps_float32_statistics():
    # Around 10 the steps of bfloat16 are 1/16: moments taken in it would be off by percents.
    x = jnp.asarray(noise((512, CHANNELS)) + 10, jnp.bfloat16)
    v = variables()
    y, new = BatchNorm().apply(v, x, BatchLayout(), mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    outputs, mean, var = by_hand(np.asarray(x, np.float32), v, 1, 1)
    for name, expected in (("mean", mean), ("var", var)):
        assert new["batch_stats"][name].dtype == jnp.float32
        np.testing.assert_allclose(new["batch_stats"][name], expected, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(y, np.float32), outputs, rtol=0.01, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("views", "groups"), [(1, 1), (2, 4)])
@pytest.mark.parametrize("shape", [(2 * BATCH, CHANNELS), (2 * BATCH, 2, 3, CHANNELS)])
def test_gradient_is_that_of_the_plain_formula(shape, views, groups, relu):
    x, weights, v = noise(shape), noise(shape, 2), variables()["params"]

    def plain(x, scale, bias):
        sets = x.reshape(views * groups, -1, *shape[1:])
        axes = tuple(range(1, sets.ndim - 1))
        mean, var = sets.mean(axes, keepdims=True), sets.var(axes, keepdims=True)
        y = (sets - mean) / jnp.sqrt(var + EPSILON) * scale + bias
        return jnp.sum((jnp.maximum(y, 0) if relu else y).reshape(shape) * weights)

    def ours(x, scale, bias):
        y, _, _ = batch_norm(x, scale, bias, BatchLayout(views, groups), EPSILON, relu)
        return jnp.sum(y * weights)

    gradients = [jax.grad(f, (0, 1, 2))(x, v["scale"], v["bias"]) for f in (ours, plain)]
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_relu_in_the_norm_is_relu_after_it():
    x, v, layout = noise((2 * BATCH, 2, 3, CHANNELS)), variables(), BatchLayout(2, 2)
    for mode in (layout, None):
        apart = BatchNorm().apply(v, x, mode, mutable=["batch_stats"])[0]
        together = BatchNorm(relu=True).apply(v, x, mode, mutable=["batch_stats"])[0]
        np.testing.assert_array_equal(together, np.maximum(apart, 0))


def test_relu_passes_gradient_where_its_result_is_positive():
    x = jnp.asarray([-1.0, 0.0, 2.0])
    y, pull = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, [0.0, 0.0, 2.0])
    np.testing.assert_array_equal(pull(jnp.asarray([3.0, 4.0, 5.0]))[0], [0.0, 0.0, 5.0])


# ------------------------------------------------------------------ groups over devices


def weighted_output(params, x, stats, weights, layout):
    """A scalar that depends on every output, with (outputs, new statistics)."""
    v = {"params": params, "batch_stats": stats}
    y, new = BatchNorm().apply(v, x, layout, mutable=["batch_stats"])
    return jnp.mean(y * weights), (y, new["batch_stats"])


@functools.cache
def expected_for(groups):
    """Outputs and statistics by hand; gradients by differentiating a plain restatement."""
    x, weights, v = noise((2 * BATCH, CHANNELS)), noise((2 * BATCH, CHANNELS), 5), variables()

    def restated(params, x):
        sets = x.reshape(2 * groups, -1, CHANNELS)
        normal = (sets - sets.mean(1, keepdims=True)) / jnp.sqrt(
            sets.var(1, keepdims=True) + EPSILON
        )
        return jnp.mean((normal.reshape(x.shape) * params["scale"] + params["bias"]) * weights)

    grads = jax.grad(restated, argnums=(0, 1))(v["params"], x)
    return by_hand(x, v, 2, groups), jax.device_get(grads)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_groups_are_the_same_on_any_number_of_devices(groups, devices):
    """Fewer devices than groups, as many, and more: outputs, statistics and gradients agree."""
    x, weights, v = noise((2 * BATCH, CHANNELS)), noise((2 * BATCH, CHANNELS), 5), variables()

    def shard(rows):  # a device holds its part of view 1, then its part of view 2
        parts = rows.reshape(2, devices, BATCH // devices, CHANNELS)
        return parts.transpose(1, 0, 2, 3).reshape(devices, -1, CHANNELS)

    def gather(parts):
        parts = np.asarray(parts).reshape(devices, 2, BATCH // devices, CHANNELS)
        return parts.transpose(1, 0, 2, 3).reshape(2 * BATCH, CHANNELS)

    def on_device(x, weights):
        layout = collectives.batch_layout(groups, 2, "d")
        differentiate = jax.grad(weighted_output, argnums=(0, 1), has_aux=True)
        grads, (y, stats) = differentiate(v["params"], x, v["batch_stats"], weights, layout)
        params_grad, stats = collectives.mean((grads[0], stats), "d")
        return params_grad, grads[1] / devices, y, stats

    mapped = jax.pmap(on_device, axis_name="d", devices=jax.devices()[:devices])
    params_grad, x_grad, y, stats = mapped(shard(x), shard(weights))

    (outputs, mean, var), (expected_params_grad, expected_x_grad) = expected_for(groups)
    np.testing.assert_allclose(gather(y), outputs, rtol=1e-4, atol=1e-5)
    for device in range(devices):
        np.testing.assert_allclose(stats["mean"][device], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"][device], var, rtol=1e-5)
        for name, expected in expected_params_grad.items():
            np.testing.assert_allclose(params_grad[name][device], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gather(x_grad), expected_x_grad, rtol=1e-3, atol=1e-6)
