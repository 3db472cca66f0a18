"""MoCo v3 against a NumPy oracle written from the paper (Chen et al. 2021, algorithm 1)."""

from __future__ import annotations

import copy
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from conftest import (
    IMAGE_SHAPE,
    LIGHTLY,
    MEAN,
    STD,
    TinyEncoder,
    assert_close,
    assert_same,
    flatten,
    random_batch,
    replicated,
    total_loss,
    with_network,
)
from flax.traverse_util import flatten_dict
from test_siamese import as_float64, forward, seen, unit

from configs import moco
from moco_jax import method
from moco_jax.v3_losses import contrastive_loss
from selfsup_jax import config as config_lib
from selfsup_jax.data import inputs
from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.run import checkpoint
from selfsup_jax.training import pretrain

BATCH, STEPS, TOTAL_STEPS = 8, 3, 4
PEAK, DECAY, MOMENTUM, TAU_BASE, TEMPERATURE = 0.1, 0.05, 0.9, 0.6, 0.3
PARTS = ("encoder", "projector")  # of the momentum encoder


def tiny_config(**changes):
    """The demo's recipe with small heads and images that stay as they are."""
    config = moco.get_config("v3_demo")
    fields = {
        f"views.global.{view}.{step}_prob": 0.0
        for view in ("view_1", "view_2")
        for step in ("flip", "jitter", "grayscale", "blur", "solarize")
    }
    for head in ("projector", "predictor"):
        fields |= {f"{head}.hidden_sizes": (6,), f"{head}.output_size": 4}
    fields |= {"data.image_size": IMAGE_SHAPE[0], "data.test_resize": IMAGE_SHAPE[0]}
    fields |= {"views.mean": MEAN, "views.std": STD}
    fields |= {"tau_base": TAU_BASE, "temperature": TEMPERATURE}
    rates = {"scaling": "none", "learning_rate": PEAK, "weight_decay": DECAY, "exclude": ()}
    fields |= {f"optimizer.{name}": value for name, value in rates.items()}
    config.update_from_flattened_dict(fields | changes)
    return config


def tiny_build(config, num_classes=None, total_steps=TOTAL_STEPS, warmup_steps=0):
    built = method.build(config, num_classes, total_steps, warmup_steps)
    return with_network(built, encoder=TinyEncoder())


# ---------------------------------------------------------------------------- the oracle


def oracle_ctr(q, k):
    """Algorithm 1's `ctr`, image by image: its own key among those of the batch."""
    q, k = unit(q), unit(k)
    losses = [
        math.log(sum(math.exp(q[i] @ other / TEMPERATURE) for other in k))
        - q[i] @ k[i] / TEMPERATURE
        for i in range(len(q))
    ]
    return 2 * TEMPERATURE * np.mean(losses)


def oracle_loss(params, stats, keys, views):
    (_, _, q), _ = forward(params, stats, views)
    return oracle_ctr(q[0], keys[1]) + oracle_ctr(q[1], keys[0])


def oracle_gradient(params, stats, keys, views):
    """Central differences; the keys are constants."""
    params = copy.deepcopy(params)

    def of_leaf(leaf):
        gradient = np.zeros_like(leaf)
        for i in np.ndindex(leaf.shape):
            value, around = leaf[i], []
            for leaf[i] in (value + 1e-6, value - 1e-6):
                around.append(oracle_loss(params, stats, keys, views))
            leaf[i] = value
            gradient[i] = (around[0] - around[1]) / 2e-6
        return gradient

    return jax.tree.map(of_leaf, params)


@pytest.fixture(scope="module")
def run():
    """(States with the first, metrics) of steps on batches of their own."""
    made = tiny_build(tiny_config())
    step = jax.jit(made.train_step)
    state = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    states, metrics = [state], []
    for k in range(STEPS):
        state, values = step(state, random_batch(BATCH, seed=k, labels=False))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics


@pytest.mark.slow
def test_updates_are_the_papers(run):
    """Both networks, their averages and the loss after each of three steps, from the first on."""
    states, metrics = run
    online, online_stats = as_float64((states[0].online_params, states[0].online_stats))
    target, target_stats = as_float64((states[0].target_params, states[0].target_stats))
    assert_same(target, {part: online[part] for part in PARTS})  # it starts as a copy
    trace = dict.fromkeys(flatten(online), 0.0)
    for k in range(STEPS):
        views = seen(random_batch(BATCH, seed=k))
        # The momentum encoder follows first, so that the keys are those of the new one.
        tau = 1 - (1 - TAU_BASE) * (math.cos(math.pi * k / TOTAL_STEPS) + 1) / 2
        target = {
            part: jax.tree.map(lambda t, o: tau * t + (1 - tau) * o, target[part], online[part])  # noqa: B023
            for part in PARTS
        }
        (_, keys), key_moments = forward(target, target_stats, views)
        (_, z, q), moments = forward(online, online_stats, views)
        np.testing.assert_allclose(
            metrics[k]["loss"], oracle_loss(online, online_stats, keys, views), rtol=1e-4
        )
        np.testing.assert_allclose(metrics[k]["tau"], tau, rtol=1e-6)
        found = [
            np.argmax(unit(q[v]) @ unit(keys[1 - v]).T, axis=1) == np.arange(BATCH) for v in (0, 1)
        ]
        np.testing.assert_allclose(metrics[k]["contrast_top1"], np.mean(found))
        outputs = metrics[k]["outputs"]
        np.testing.assert_allclose(outputs.projection, z, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(outputs.prediction, [unit(x) for x in q], atol=1e-3)
        np.testing.assert_allclose(outputs.target, [unit(x) for x in keys], atol=1e-3)

        gradient = flatten(oracle_gradient(online, online_stats, keys, views))
        rate = PEAK * (1 + math.cos(math.pi * k / TOTAL_STEPS)) / 2
        for path, w in flatten(online).items():  # its arrays are those of `online`
            trace[path] = MOMENTUM * trace[path] + gradient[path] + DECAY * w
            w -= rate * trace[path]
        for stats, of_parts in ((online_stats, moments), (target_stats, key_moments)):
            follow(stats, of_parts)
        state = states[k + 1]
        assert_close(state.online_params, online, 2e-4, floor=1e-1)
        assert_close(state.target_params, target, 2e-4, floor=1e-1)
        assert_close(state.online_stats, online_stats, 1e-4, floor=0.1)
        assert_close(state.target_stats, target_stats, 1e-4, floor=0.1)
    moved = flatten(states[-1].online_params)["predictor/output/kernel"]
    assert np.abs(moved - flatten(states[0].online_params)["predictor/output/kernel"]).max() > 1e-2


def follow(stats, of_parts):
    """The running averages after both views, in place; the heads' variances are unbiased."""
    for part, norms in of_parts.items():
        for norm, both in norms.items():
            for mean, var, count in both:
                unbiased = var * (count / (count - 1) if part != "encoder" else 1.0)
                own = stats[part][norm]
                own["mean"] = 0.9 * own["mean"] + 0.1 * mean
                own["var"] = 0.9 * own["var"] + 0.1 * unbiased


# ------------------------------------------------------------------- losses and gradients


def vectors(*shape, seed=0):
    return unit(np.random.default_rng(seed).normal(size=shape))


def test_loss_is_the_papers():
    q, k = vectors(7, 5), vectors(7, 5, seed=1)
    loss, _ = contrastive_loss(*(x.astype(np.float32) for x in (q, k)), TEMPERATURE)
    np.testing.assert_allclose(loss, oracle_ctr(q, k), rtol=1e-5)
    # A device's rows among all: the mean over devices is the loss of the batch.
    parts = [contrastive_loss(q[i : i + 1], k, TEMPERATURE, i)[0] for i in range(7)]
    np.testing.assert_allclose(np.mean(parts), loss, rtol=1e-5)
    assert contrastive_loss(k, k, TEMPERATURE)[1] == 1
    assert contrastive_loss(k, np.ones_like(k), TEMPERATURE)[1] == 0  # a tie is no find


def test_no_gradient_reaches_the_momentum_encoder(run):
    """Nor do keys that depend on the queries' parameters change the gradient."""
    state, made = run[0][1], tiny_build(tiny_config())
    views = np.stack(seen(random_batch(BATCH, seed=9))).astype(np.float32)

    def loss(online, target):
        return total_loss(made, state, views, None)(online, target)[0]

    online, target = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        state.online_params, state.target_params
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(target))
    assert all(np.abs(x).max() > 1e-4 for name, x in flatten(online).items() if "kernel" in name)

    q = jnp.asarray(vectors(6, 5), jnp.float32)
    through = jax.grad(lambda q: contrastive_loss(q, q[::-1], 0.5)[0])(q)
    constant = jax.grad(lambda x: contrastive_loss(x, q[::-1], 0.5)[0])(q)
    np.testing.assert_array_equal(through, constant)


# ------------------------------------------------------------ devices, engines, a stopped run


@functools.cache
def after(devices, engine="pmap"):
    """(State, metrics) after two batches of 16; 0 devices are plain `jax.jit`."""
    made = tiny_build(tiny_config(**{"optimizer.learning_rate": 0.02}))
    state = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    batches = [random_batch(16, seed=k, labels=False) for k in range(2)]
    if engine == "shard_map":
        state = parallel.replicate(made.init_state, jax.random.PRNGKey(0))
        step = parallel.step_over_devices(made.train_step, engine)
        batches = [parallel.shard(batch) for batch in batches]
    elif devices:
        state = replicated(state, devices, "d")
        step = functools.partial(made.train_step, axis_name="d")
        step = jax.pmap(step, axis_name="d", devices=jax.devices()[:devices])
        batches = [
            jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch) for batch in batches
        ]
    else:
        step = jax.jit(made.train_step)
    for batch in batches:
        state, metrics = step(state, batch)
    metrics.pop("outputs")
    if engine == "shard_map":
        return parallel.unreplicate((state, metrics))
    found = jax.device_get((state, metrics))
    if not devices:
        return found
    first = jax.tree.map(lambda x: x[0], found)
    for device in range(1, devices):  # replicas never drift apart
        assert_same(jax.tree.map(lambda x, d=device: x[d], found), first)
    return first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "engine"), [(1, "pmap"), (2, "pmap"), (4, "pmap"), (8, "pmap"), (8, "shard_map")]
)
def test_devices_and_engines_do_not_change_the_update(devices, engine):
    """The negatives are those of the global batch, wherever they are."""
    (state, metrics), (expected, expected_metrics) = after(devices, engine), after(0)
    assert_close(metrics, expected_metrics, 2e-5, floor=0.1)
    for field in ("online_params", "target_params", "online_stats", "target_stats"):
        assert_close(getattr(state, field), getattr(expected, field), 2e-5, floor=0.1)
    assert int(state.step) == 2


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_bit_by_bit(tmp_path, monkeypatch):
    data = tiny_runs.write_images(tmp_path / "data", 3, 48)
    quick = tiny_runs.fields(data, steps=4, log_every_steps=1, checkpoint_every_steps=2)
    quick |= {"monitor.diagnostics_every_steps": 0, "data.name": "folder"}
    config = tiny_config(**quick)
    pretrain.pretrain(config, str(tmp_path / "whole"), tiny_build)

    train_batches = inputs.train_batches

    def stopped(config, data, first_step):
        for step, batch in enumerate(train_batches(config, data, first_step), first_step):
            if step == 3:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inputs, "train_batches", stopped)
        pretrain.pretrain(config, str(tmp_path / "twice"), tiny_build)
    assert tiny_runs.saved_steps(tmp_path / "twice")[-1] in (2, 3)
    pretrain.pretrain(config, str(tmp_path / "twice"), tiny_build)

    like = jax.eval_shape(tiny_build(config, 3).init_state, jax.random.PRNGKey(0))
    states = []
    for folder in ("whole", "twice"):
        checkpoints = checkpoint.Checkpoints(str(tmp_path / folder))
        assert checkpoints.latest_step == 4
        states.append(checkpoints.restore(like))
        checkpoints.close()
    assert_same(*states)


# -------------------------------------------------------------------------------- configs


def assert_fields(config, expected):
    fields = flatten_dict(config.to_dict(), sep=".")
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize(
    "preset", ["v3", "v3_vit", "v3_cifar10", "v3_imagenette", "v3_demo", "v3_folder"]
)
def test_every_preset_is_valid(preset):
    config = moco.get_config(preset)
    config_lib.validate(config, method.build)
    made = method.build(config, 10, 100, 10)
    state = jax.eval_shape(made.init_state, jax.random.PRNGKey(0))
    assert set(state.online_params) == {*PARTS, "predictor", "classifier"}
    assert set(state.target_params) == set(PARTS) and not hasattr(state, "queue")
    assert made.average_first and made.pairs == ((0, 1), (1, 0))
    assert made.notes == (
        f"negatives: the keys of the {config.batch_size - 1:,} other images of a batch",
    )


def test_imagenet_is_the_papers_recipe():
    """Of the code for each length: LARS, asymmetric views, two-layer heads.

    There a ResNet's predictor has no norm after its last layer; in the paper it has.
    """
    heads = {
        f"{head}.{name}": value
        for head in ("projector", "predictor")
        for name, value in {
            **{"hidden_sizes": (4096,), "output_size": 256, "linear_init": "torch"},
            **{"hidden_bias": False, "hidden_norm": True},
            **{"output_bias": False, "output_norm": "plain"},
        }.items()
    }
    expected = heads | {
        "predictor.output_norm": "none",
        **{"method": "moco", "batch_size": 4096, "bn_groups": 1, "temperature": 1.0},
        **{"tau_schedule": "cosine", "data.image_size": 224, "whole_epochs": True},
        **{"encoder.depth": 50, "encoder.padding": "torch", "encoder.zero_init_gamma": True},
        "encoder.kernel_init": "kaiming_fan_out",
        **{"optimizer.name": "lars", "optimizer.warmup_epochs": 10.0, "optimizer.momentum": 0.9},
        **{"optimizer.exclude": ("bias$", "scale$"), "optimizer.trust_coefficient": 1e-3},
        "views.global.area": (0.2, 1.0),
        "data.resize_method": "bilinear",
    }
    for i, (blur, solarize) in enumerate(((1.0, 0.0), (0.1, 0.2)), start=1):
        view = {"jitter_prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2}
        view |= {"hue": 0.1, "jitter_style": "torchvision", "grayscale_prob": 0.2}
        view |= {"blur_prob": blur, "solarize_prob": solarize, "flip_prob": 0.5}
        expected |= {f"views.global.view_{i}.{name}": value for name, value in view.items()}
    lengths = {100: (0.6, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.3, 1.5e-6, 0.996)}
    for epochs, (rate, decay, tau) in lengths.items():
        config = moco.get_config(f"v3,epochs={epochs}")
        own = {"epochs": epochs, "optimizer.learning_rate": rate, "tau_base": tau}
        assert_fields(config, expected | own | {"optimizer.weight_decay": decay})
    assert moco.get_config("v3") == moco.get_config("v3,epochs=300")


@pytest.mark.slow
def test_the_recipe_for_vits():
    """AdamW that decays everything that learns; the patches' projection and positions don't."""
    config = moco.get_config("v3_vit")
    expected = {
        **{"encoder.name": "vit_s16", "encoder.vit.heads": 12, "encoder.vit.init": "xavier"},
        **{"encoder.vit.positions": "sincos", "encoder.vit.frozen_patches": True},
        **{"temperature": 0.2, "tau_base": 0.99, "epochs": 300, "batch_size": 4096},
        **{"projector.hidden_sizes": (4096, 4096), "predictor.hidden_sizes": (4096,)},
        **{"optimizer.name": "adamw", "optimizer.learning_rate": 1.5e-4},
        **{"optimizer.weight_decay": 0.1, "optimizer.warmup_epochs": 40, "optimizer.exclude": ()},
        **{"projector.output_norm": "plain", "predictor.output_norm": "plain"},
        "views.global.area": (0.08, 1.0),
    }
    assert_fields(config, expected)
    small = {"width": 8, "depth": 1, "heads": 2, "patch": 4}
    config.encoder.vit.update(small)
    config.data.image_size = config.data.test_resize = 8
    config.batch_size = 4
    for head, hidden in (("projector", (4, 4)), ("predictor", (4,))):
        config[head].update(hidden_sizes=hidden, output_size=4)
    made = method.build(config, None, 10, 0)
    state = jax.jit(made.init_state)(jax.random.PRNGKey(0))
    batch = {f"view_{i}": np.full((4, 8, 8, 3), 40 * i, np.uint8) for i in (1, 2)}
    after, _ = jax.jit(made.train_step)(state, batch | {"index": np.arange(4, dtype=np.int32)})
    for path, x in flatten(after.online_params["encoder"]).items():
        same = np.array_equal(x, flatten(state.online_params["encoder"])[path])
        assert same == path.startswith(("patches/", "positions")), path


def test_cifar10_is_lightlys_recipe():
    """Lightly's loss is the mean of two directions; ours, 2 tau times their sum, is 0.8 of it."""
    expected = LIGHTLY | {"optimizer.learning_rate": 0.12 / 0.8, "temperature": 0.2}
    norms = {f"{head}.output_norm": "plain" for head in ("projector", "predictor")}
    assert_fields(moco.get_config("v3_cifar10"), expected | norms)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bn_groups", 8, "bn_groups=8: must be 1: "),
        ("accumulate_steps", 2, "accumulate_steps=2: must be 1: "),
        ("predictor.output_size", 32, "predictor.output_size=32: must be 4: "),
        ("temperature", 0.0, "temperature=0.0: must be above 0"),
        ("tau_base", 1.5, "tau_base=1.5: must be from 0 to 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(field, value, message):
    with pytest.raises(UserError) as error:
        method.build(tiny_config(**{field: value}), None, 4, 0)
    assert str(error.value).startswith(f"config.{message}") and "\n" not in str(error.value)
