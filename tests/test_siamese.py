"""SimSiam, Barlow Twins and VICReg against NumPy oracles from their papers, in float64."""

from __future__ import annotations

import copy
import functools
import importlib
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    IMAGE_SHAPE,
    LIGHTLY,
    MEAN,
    STD,
    TinyEncoder,
    assert_close,
    assert_same,
    flatten,
    process_env,
    random_batch,
    replicated,
    with_network,
)

from barlow_twins_jax.losses import barlow_twins_loss
from selfsup_jax import checks
from selfsup_jax import config as config_lib
from selfsup_jax.build import find, parts_from_config
from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from simsiam_jax.losses import simsiam_loss
from vicreg_jax.losses import vicreg_terms

NAMES = ("simsiam", "barlow_twins", "vicreg")
BATCH, STEPS, TOTAL_STEPS, PEAK, DECAY, MOMENTUM = 8, 3, 4, 0.1, 0.05, 0.9

# What each is trained with: between them all that `make_optimizer` has to offer.
OPTIMIZERS = {
    "simsiam": {"name": "sgd", "exclude": (), "constant_rate": ("^predictor/",)},
    "barlow_twins": {"name": "sgd", "excluded_rate": 0.25, "end_fraction": 0.1},
    "vicreg": {"name": "adamw", "clip_norm": 2.0, "beta_2": 0.99, "adam_epsilon": 1e-2},
}


def preset(name, arg):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def tiny_config(name, **changes):
    """The demo's recipe with small heads and images that stay as they are."""
    config = preset(name, "demo")
    fields = {
        f"views.global.{view}.{step}_prob": 0.0
        for view in config.views["global"]
        if view.startswith("view_")
        for step in ("flip", "jitter", "grayscale", "blur", "solarize")
    }
    fields |= {f"optimizer.{field}": value for field, value in OPTIMIZERS[name].items()}
    fields |= {
        "projector.hidden_sizes": (6, 5),
        "projector.output_size": 4,
        "data.image_size": IMAGE_SHAPE[0],
        "data.test_resize": IMAGE_SHAPE[0],
        "views.mean": MEAN,
        "views.std": STD,
        "optimizer.scaling": "none",
        "optimizer.learning_rate": PEAK,
        "optimizer.weight_decay": DECAY,
        "optimizer.momentum": MOMENTUM,
    }
    if "predictor" in config:
        fields |= {"predictor.hidden_sizes": (6,), "predictor.output_size": 4}
    config.update_from_flattened_dict(fields | changes)
    return config


def tiny_method(name, **changes):
    config = tiny_config(name, **changes)
    config_lib.validate(config, find(name))
    return with_network(find(name)(config, None, TOTAL_STEPS, 0), encoder=TinyEncoder())


# --------------------------------------------------------------------------- the oracles


def normal(x, epsilon=1e-5):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon)


def norm_layer(x, name, params, stats, moments):
    if name not in stats:
        return x
    axes = tuple(range(x.ndim - 1))
    moments.setdefault(name, []).append((x.mean(axes), x.var(axes), x.size // x.shape[-1]))
    given = params.get(name, {})
    return normal(x) * given.get("scale", 1.0) + given.get("bias", 0.0)


def head(params, stats, x, moments):
    for place in ("", "_2"):
        if f"hidden{place}" not in params:
            break
        layer = params[f"hidden{place}"]
        x = x @ layer["kernel"] + layer.get("bias", 0.0)
        x = np.maximum(norm_layer(x, f"bn{place}", params, stats, moments), 0)
    x = x @ params["output"]["kernel"] + params["output"].get("bias", 0.0)
    return norm_layer(x, "output_bn", params, stats, moments)


def forward(params, stats, views):
    """`[h, z]` or, with a predictor, `[h, z, p]`, each of both views, and what norms have seen."""
    moments: dict[str, dict] = {part: {} for part in params}
    rows: list[list[np.ndarray]] = [[], []] + [[]] * ("predictor" in params)
    for images in views:
        height, width = images.shape[1:3]
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        kernel = params["encoder"]["conv"]["kernel"]
        x = sum(
            padded[:, i : i + height, j : j + width] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        x = norm_layer(x, "bn", params["encoder"], stats["encoder"], moments["encoder"])
        x = np.maximum(x, 0).mean((1, 2))
        for row, part in zip(rows, ("encoder", "projector", "predictor"), strict=False):
            x = x if part == "encoder" else head(params[part], stats[part], x, moments[part])
            row.append(x)
    return rows, moments


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def simsiam_oracle(p, z):
    """Equation 1 and 2: negative cosines, half of each direction."""
    return -sum((unit(p[v]) * unit(z[1 - v])).sum(1).mean() / 2 for v in (0, 1))


def barlow_oracle(z, weight):
    """Equations 1 and 2, entry by entry of the matrix."""
    a, b = (normal(x) for x in z)
    loss = 0.0
    for i in range(a.shape[1]):
        for j in range(b.shape[1]):
            c = np.mean(a[:, i] * b[:, j])
            loss += (1 - c) ** 2 if i == j else weight * c**2
    return loss


def vicreg_oracle(z, weights):
    """Equations 1 to 6, with the pseudo-code's mean in the invariance."""
    invariance = np.mean((z[0] - z[1]) ** 2)
    variance = covariance = 0.0
    for x in z:
        std = np.sqrt(x.var(0, ddof=1) + 1e-4)
        variance += np.maximum(0, 1 - std).mean()
        c = np.cov(x.T)
        covariance += (c**2 - np.diag(np.diag(c**2))).sum() / len(c)
    return float(np.dot(weights, (invariance, variance, covariance)))


def oracle_loss(name, config, params, constant, stats, views):
    """The loss, where `constant` parameters make what the gradient is stopped at."""
    rows, _ = forward(params, stats, views)
    if name == "simsiam":
        return simsiam_oracle(rows[2], forward(constant, stats, views)[0][1])
    if name == "barlow_twins":
        return barlow_oracle(rows[1], config.off_diagonal_weight)
    weights = (config.invariance_weight, config.variance_weight, config.covariance_weight)
    return vicreg_oracle(rows[1], weights)


def oracle_gradient(name, config, params, stats, views):
    """Central differences."""
    constant = copy.deepcopy(params)

    def of_leaf(leaf):
        gradient = np.zeros_like(leaf)
        for i in np.ndindex(leaf.shape):
            value, epsilon = leaf[i], 1e-6
            around = []
            for leaf[i] in (value + epsilon, value - epsilon):
                around.append(oracle_loss(name, config, params, constant, stats, views))
            leaf[i] = value
            gradient[i] = (around[0] - around[1]) / (2 * epsilon)
        return gradient

    return jax.tree.map(of_leaf, params)


def oracle_updates(name, params, gradients, memory, step):
    """New parameters, by path; `memory` holds what the optimizer keeps."""
    o = {"exclude": ("bias", "scale"), "end_fraction": 0.0} | OPTIMIZERS[name]
    rate = PEAK * (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2
    rate = o["end_fraction"] * PEAK + (1 - o["end_fraction"]) * rate
    whole = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    new = {}
    for path, w in params.items():
        g, excluded = gradients[path], path.endswith(tuple(o["exclude"])) and bool(o["exclude"])
        own = PEAK if path.startswith("predictor") else rate
        own *= o.get("excluded_rate", 1.0) if excluded else 1.0
        if o["name"] == "sgd":
            g = g if excluded else g + DECAY * w
            memory[path] = g = MOMENTUM * memory.get(path, 0.0) + g
        else:
            g = g * min(1.0, o["clip_norm"] / whole)
            m, v = memory.get(path, (0.0, 0.0))
            m, v = MOMENTUM * m + (1 - MOMENTUM) * g, o["beta_2"] * v + (1 - o["beta_2"]) * g**2
            memory[path] = m, v
            m, v = m / (1 - MOMENTUM ** (step + 1)), v / (1 - o["beta_2"] ** (step + 1))
            g = m / (np.sqrt(v) + o["adam_epsilon"])
            g = g if excluded else g + DECAY * w
        new[path] = w - own * g
    return new


def as_float64(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def seen(batch):
    return [(batch[f"view_{i}"] / 255 - MEAN) / STD for i in (1, 2)]


# -------------------------------------------------------------------------------- updates


@pytest.fixture(scope="module", params=NAMES)
def run(request):
    """(name, config, states with the first, metrics) of steps on batches of their own."""
    made = tiny_method(request.param)
    step = jax.jit(made.train_step)
    state = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    states, metrics = [state], []
    for k in range(STEPS):
        state, values = step(state, random_batch(BATCH, seed=k, labels=False))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return request.param, tiny_config(request.param), states, metrics


@pytest.mark.slow
def test_each_update_is_the_papers(run):
    """From each state that a step found: loss, new parameters and averages, in three steps."""
    name, config, states, metrics = run
    memory: dict = {}
    for k in range(STEPS):
        views = seen(random_batch(BATCH, seed=k))
        params, stats = as_float64((states[k].online_params, states[k].online_stats))
        loss = oracle_loss(name, config, params, params, stats, views)
        np.testing.assert_allclose(metrics[k]["loss"], loss, rtol=2e-5)
        gradients = flatten(oracle_gradient(name, config, params, stats, views))
        expected = oracle_updates(name, flatten(params), gradients, memory, k)
        got, before = flatten(states[k + 1].online_params), flatten(params)
        moved = 0.0
        for path, value in expected.items():
            np.testing.assert_allclose(got[path], value, atol=2e-4, rtol=2e-4, err_msg=path)
            moved = max(moved, np.abs(got[path] - before[path]).max())
        assert moved > 1e-2
        _, moments = forward(params, stats, views)
        unbiased = config.encoder.bn_unbiased_average
        for part, norms in moments.items():
            for norm, both in norms.items():
                mean, var = (stats[part][norm][field] for field in ("mean", "var"))
                for view_mean, view_var, count in both:
                    # `TinyEncoder` has the default norms; the heads' are the config's.
                    adjust = count / (count - 1) if unbiased and part != "encoder" else 1.0
                    mean, var = (
                        0.9 * mean + 0.1 * view_mean,
                        0.9 * var + 0.1 * view_var * adjust,
                    )
                after = states[k + 1].online_stats[part][norm]
                np.testing.assert_allclose(after["mean"], mean, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(after["var"], var, rtol=1e-4, atol=1e-5)


def test_outputs_are_what_the_loss_compares(run):
    name, _, states, metrics = run
    rows, _ = forward(
        *as_float64((states[0].online_params, states[0].online_stats)), seen(random_batch(BATCH, 0))
    )
    outputs = metrics[0]["outputs"]
    expected = [rows[0], rows[1], rows[-1], rows[1]]
    for got, value in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(got, np.stack(value), rtol=1e-3, atol=1e-4)
    extra = {"barlow_twins": {"correlation"}, "vicreg": {"invariance", "variance", "covariance"}}
    assert extra.get(name, set()) <= set(metrics[0])
    assert tiny_method(name).pairs == ((0, 1), (1, 0))  # each view with the other
    assert states[0].target_params == {} and "tau" not in metrics[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_devices_do_not_change_the_update(name):
    """Moments, the matrices and the norms are those of the global batch: all agree to 1e-5."""
    changes = {"optimizer.learning_rate": 0.02, "optimizer.clip_norm": 0.0}
    made = tiny_method(name, **changes)
    start = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    batches = [random_batch(16, seed=k, labels=False) for k in range(2)]

    def after(devices):
        state = start if devices == 0 else replicated(start, devices, "d")
        step = functools.partial(made.train_step, axis_name="d")
        mapped = jax.pmap(step, axis_name="d", devices=jax.devices()[: devices or 1])
        for batch in batches:
            if devices == 0:
                state, metrics = jax.jit(made.train_step)(state, batch)
                continue
            parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
            state, metrics = mapped(state, parts)
        metrics.pop("outputs")
        if devices == 0:
            return jax.device_get((state, metrics))
        per_device = jax.device_get((state, metrics))
        first = jax.tree.map(lambda x: x[0], per_device)
        for device in range(1, devices):  # replicas never drift apart
            assert_same(jax.tree.map(lambda x, d=device: x[d], per_device), first)
        return first

    expected_state, expected_metrics = after(0)
    for devices in (1, 2, 4, 8):
        state, metrics = after(devices)
        assert_close(metrics, expected_metrics, 2e-5, floor=0.1)
        assert_close(state.online_params, expected_state.online_params, 2e-5, floor=0.1)
        assert_close(state.online_stats, expected_state.online_stats, 2e-5, floor=0.1)


ALL = ("byol", "moco", "simclr", *NAMES)


@pytest.fixture(scope="module", params=ALL)
def both_engines(request):
    """State and metrics after two updates on all devices, by pmap and by shard_map."""
    name, batch_size = request.param, 64
    if name in NAMES:
        made = tiny_method(name, **{"optimizer.clip_norm": 0.0})
    else:
        config = preset(name, "demo")
        config.data.image_size = config.data.test_resize = IMAGE_SHAPE[0]
        config.batch_size, config.optimizer.learning_rate = batch_size, 0.02
        config.projector.hidden_sizes, config.projector.output_size = (6,), 4
        if "predictor" in config:
            config.predictor.hidden_sizes, config.predictor.output_size = (6,), 4
        made = with_network(find(name)(config, None, TOTAL_STEPS, 0), encoder=TinyEncoder())

    def after(engine):
        state = parallel.replicate(made.init_state, jax.random.PRNGKey(0))
        step = parallel.step_over_devices(made.train_step, engine)
        for k in range(2):
            batch = random_batch(batch_size, seed=k, labels=False)
            state, metrics = step(state, parallel.shard(batch))
        assert parallel.gather_rows(metrics.pop("outputs"), np.arange(batch_size))
        return parallel.unreplicate((state, metrics))

    return after("pmap"), after("shard_map")


@pytest.mark.slow
def test_both_engines_give_the_same(both_engines):
    (state, metrics), (other_state, other_metrics) = both_engines
    assert_close(metrics, other_metrics, 1e-6, floor=0.1)
    for field in ("online_params", "target_params", "online_stats", "target_stats"):
        assert_close(getattr(state, field), getattr(other_state, field), 1e-6, floor=0.1)
    assert int(state.step) == 2


def test_an_engine_that_is_not_there():
    with pytest.raises(UserError, match="--parallel=xmap: must be one of pmap, shard_map"):
        parallel.use_engine("xmap")


# --------------------------------------------------------------------------------- losses


def vectors(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.slow
def test_losses_are_the_papers():
    p, z = vectors(2, 7, 4), 2 * vectors(2, 7, 4, seed=1) + 1
    p32, z32 = p.astype(np.float32), z.astype(np.float32)
    np.testing.assert_allclose(simsiam_loss(*p32, *z32), simsiam_oracle(p, z), rtol=1e-5)
    got, diagonal = barlow_twins_loss(*z32, 0.3)
    np.testing.assert_allclose(got, barlow_oracle(z, 0.3), rtol=1e-5)
    products = [np.mean(normal(z[0])[:, i] * normal(z[1])[:, i]) for i in range(4)]
    np.testing.assert_allclose(diagonal, np.mean(products), rtol=1e-5)
    for i, weights in enumerate(np.eye(3)):
        terms = vicreg_terms(*z32, 7)
        np.testing.assert_allclose(terms[i], vicreg_oracle(z, weights), rtol=1e-5, atol=1e-6)


def test_losses_at_their_ends():
    """Equal views; and what collapse looks like to each."""
    z = vectors(64, 4).astype(np.float32)
    np.testing.assert_allclose(simsiam_loss(z, z, 2 * z, 3 * z), -1, rtol=1e-6)
    same = np.ones_like(z)
    assert barlow_twins_loss(z, z, 0.0)[0] < 1e-6
    np.testing.assert_allclose(barlow_twins_loss(same, same, 1.0)[0], 4, rtol=1e-5)
    terms = vicreg_terms(same, same, 64)
    np.testing.assert_allclose(terms, (0, 2 * (1 - 0.01), 0), atol=1e-5)


@pytest.mark.slow
def test_simsiam_takes_projections_as_constants():
    """The gradient is that of constant targets even where they depend on the same variable."""
    p = vectors(6, 5).astype(np.float32)
    towards = vectors(5, 5, seed=1).astype(np.float32)
    through = jax.grad(lambda p: simsiam_loss(p, p, p @ towards, p @ towards))(p)
    constant = jnp.asarray(p @ towards)
    expected = jax.grad(lambda p: simsiam_loss(p, p, constant, constant))(p)
    np.testing.assert_array_equal(through, expected)
    gradients = jax.grad(lambda z: simsiam_loss(p, p, z, z))(constant)
    assert not np.any(gradients)


# -------------------------------------------------------------------------------- recipes


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arg", ["imagenet", "cifar10", "imagenette", "folder", "demo"])
def test_every_preset_is_valid(name, arg):
    config = preset(name, arg)
    config_lib.validate(config, find(name))
    assert config.method == name and config.bn_groups == 1
    made = find(name)(config, 10, 100, 10)
    state = jax.eval_shape(made.init_state, jax.random.PRNGKey(0))
    parts = {"encoder", "projector", "classifier"} | ({"predictor"} & set(config))
    assert set(state.online_params) == parts and state.target_params == {}


def test_the_papers_recipes():
    shared = {"encoder.depth": 50, "data.image_size": 224, "encoder.padding": "torch"}
    expected = {
        "simsiam": shared
        | {"batch_size": 256, "epochs": 100, "optimizer.learning_rate": 0.05}
        | {"optimizer.weight_decay": 1e-4, "projector.hidden_sizes": (2048, 2048)}
        | {"projector.output_norm": "plain", "predictor.hidden_sizes": (512,)}
        | {"optimizer.constant_rate": ("^predictor/",), "optimizer.exclude": ()},
        "barlow_twins": shared
        | {"batch_size": 2048, "epochs": 1000, "off_diagonal_weight": 0.0051}
        | {"projector.hidden_sizes": (8192, 8192), "projector.output_size": 8192}
        | {"optimizer.name": "lars", "optimizer.learning_rate": 0.2},
        "vicreg": shared
        | {"batch_size": 2048, "epochs": 1000, "variance_weight": 12.5, "invariance_weight": 25}
        | {"projector.output_size": 8192, "optimizer.weight_decay": 1e-6},
    }
    for name, fields in expected.items():
        config = preset(name, "imagenet")
        for field, value in fields.items():
            section, _, leaf = field.rpartition(".")
            found = (config[section] if section else config)[leaf]
            assert found == value, f"{name}: {field}"
    assert preset("vicreg", "imagenet,epochs=100").optimizer.learning_rate == 0.3
    # Biases of Barlow Twins at batch 2048: 0.0048 x 8.
    optimizer = preset("barlow_twins", "imagenet").optimizer
    assert optimizer.excluded_rate * optimizer.learning_rate == pytest.approx(0.0048)


def test_cifar10_is_lightlys_recipe():
    """Both losses are lightly's, and so are the rate and the decay."""
    view = {"saturation": 0.4, "solarize_prob": 0.0, "blur_prob": 0.0}
    mild = view | {"saturation": 0.2}
    expected = {
        "simsiam": {
            "projector.hidden_sizes": (2048,),
            "projector.output_norm": "affine",
            "predictor.hidden_sizes": (512,),
            "predictor.output_bias": True,
            "optimizer.constant_rate": (),
            "views.global.area": (0.2, 1.0),
            **{f"views.global.view_1.{name}": value for name, value in view.items()},
        },
        "barlow_twins": {
            "projector.hidden_sizes": (2048,),
            "projector.output_size": 2048,
            "projector.output_bias": True,
            "projector.output_norm": "none",
            "off_diagonal_weight": 0.005,
            "optimizer.excluded_rate": 1.0,
            **{f"views.global.view_1.{name}": value for name, value in mild.items()},
            **{f"views.global.view_2.{name}": value for name, value in mild.items()},
            "views.global.view_2.solarize_prob": 0.2,
        },
    }
    shared = {"optimizer.learning_rate": 0.12, "optimizer.weight_decay": 5e-4}
    for name, own in expected.items():
        fields = dict(checks.leaves(preset(name, "cifar10")))
        for field, value in (LIGHTLY | shared | {"projector.hidden_bias": False} | own).items():
            assert fields[field] == value, f"{name}: {field}"


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_one_microbatch_only(name):
    with pytest.raises(UserError, match=r"accumulate_steps=2: must be 1"):
        find(name)(tiny_config(name, accumulate_steps=2), None, 4, 0)


def with_local_views(config, count):
    """The config with a second group of views, smaller ones."""
    config.views.local = config.views["global"].copy_and_resolve_references()
    config.views.local.update(count=count, size=IMAGE_SHAPE[0] // 2, area=(0.05, 0.2))
    return config


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_method_of_two_views_takes_no_other_number(name, count):
    config = preset(name, "demo")
    config.views["global"].count = count
    for make in (parts_from_config, find(name)):
        with pytest.raises(UserError) as error:
            make(config, None, 4, 0)
        assert str(error.value) == f"config.views.global.count={count}: must be 2 for {name}"
    with pytest.raises(UserError, match=rf"^config\.views\.global\.count={count}: .*[^\n]$"):
        config_lib.validate(config, find(name))


@pytest.mark.parametrize("name", ALL)
def test_a_method_of_one_group_takes_no_local_views(name):
    with pytest.raises(UserError) as error:
        find(name)(with_local_views(preset(name, "demo"), 3), None, 4, 0)
    assert str(error.value) == f"config.views.local.count=3: must be 0 for {name}"
    assert find(name)(with_local_views(preset(name, "demo"), 0), None, 4, 0)  # the same as none


def test_a_method_of_more_views_says_how_many():
    """What a method of one's own hands to `parts_from_config`, against what the config has."""
    config, wanted = tiny_config("simsiam"), {"global": 2, "local": 3}
    for count in (None, 2, 4):
        other = config if count is None else with_local_views(tiny_config("simsiam"), count)
        with pytest.raises(UserError) as error:
            parts_from_config(other, None, 4, 0, views=wanted)
        assert str(error.value) == f"config.views.local.count={count or 0}: must be 3 for simsiam"
    parts = parts_from_config(with_local_views(config, 3), None, 4, 0, views=wanted)
    assert {k: len(v) for k, v in parts.shared["augment"].groups.items()} == wanted
    assert list(parts.shared["augment"].groups) == ["global", "local"]
    assert parts.image_shape == IMAGE_SHAPE


def test_a_method_that_is_not_there():
    with pytest.raises(UserError, match=r"no package simsiamm_jax .*vicreg; did you mean simsiam"):
        find("simsiamm")


def test_a_method_of_ones_own(tmp_path, monkeypatch):
    """A package on the path is found by its name, with nothing to register."""
    package = tmp_path / "mine_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text("def build(config, classes, steps, warmup):\n    return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find("mine")(None, None, 1, 0) == 7
    # What such a package lacks itself is its own error, not "there is no package".
    (package / "__init__.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.delitem(sys.modules, "mine_jax")
    monkeypatch.delitem(sys.modules, "mine_jax.method")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        find("mine")


@pytest.mark.parametrize("name", ["selfsup", "", "byol.method", "../byol"])
def test_what_is_no_method(name):
    with pytest.raises(UserError, match="there is no package"):
        find(name)


@pytest.mark.slow
def test_methods_are_found_from_anywhere(tmp_path):
    """Also where the packages are installed as editable, which no listing of the path shows."""
    command = "from selfsup_jax.build import find, names; find('byol'); print(*names())"
    env = {k: v for k, v in process_env().items() if k != "PYTHONPATH"}
    run = [sys.executable, "-c", command]
    told = subprocess.run(run, cwd=tmp_path, env=env, text=True, capture_output=True, check=True)
    assert {"byol", "moco", "simclr", *NAMES} <= set(told.stdout.split())
