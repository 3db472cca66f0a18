"""The eight variants between BYOL and SimCLR against an oracle of section 5 of BYOL's paper."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import numpy as np
import pytest
import tiny_runs
from conftest import (
    IMAGE_SHAPE,
    MEAN,
    NUM_CLASSES,
    STD,
    TinyEncoder,
    assert_close,
    assert_same,
    flatten,
    random_batch,
    replicated,
    tiny_method,
    tiny_networks,
    total_loss,
    with_network,
)
from test_byol import TARGET, as_float64, oracle_forward

from byol_jax import losses, method
from byol_jax.negatives import negatives_loss
from configs import byol, byol_to_simclr
from selfsup_jax import config as config_lib
from selfsup_jax.errors import UserError
from selfsup_jax.models.heads import MLPHead
from selfsup_jax.training import pretrain

BATCH = 6
# (predictor, target network, beta)
VARIANTS = list(itertools.product((True, False), (True, False), (0.0, 1.0)))
ALPHA = 0.3

# ---------------------------------------------------------------------------- the oracle


def oracle_info_nce(phi, psi, alpha, beta):
    """2 - InfoNCE of section 5 for both directions, added; `phi`, `psi` `[2, N, D]`.

    The paper maximises InfoNCE: 2 / N sum of S(v_i, v'_i) less beta 2 alpha / N sum of ln(sum over
    j != i of exp(S(v_i, v_j) / alpha) + sum over j of exp(S(v_i, v'_j) / alpha)).
    """

    def similarity(u, v):  # of phi(u) and psi(v)
        return (u @ v) / (np.linalg.norm(u) * np.linalg.norm(v))

    n = len(phi[0])
    loss = 0.0
    for view in (0, 1):
        own, other = psi[view], psi[1 - view]
        for i, u in enumerate(phi[view]):
            loss += (2 - 2 * similarity(u, other[i])) / n
            if beta:
                total = sum(math.exp(similarity(u, v) / alpha) for v in other)
                total += sum(math.exp(similarity(u, own[j]) / alpha) for j in range(n) if j != i)
                loss += beta * 2 * alpha * math.log(total) / n
    return loss


def oracle_loss(online, target, views, predictor, beta, alpha=ALPHA):
    """Of a variant; without a target network psi is the online projection, of these parameters."""
    parts = (*TARGET, "predictor") if predictor else TARGET
    phi = oracle_forward(online, views, parts)[1]
    psi = oracle_forward(target or online, views, TARGET)[1]
    return oracle_info_nce(phi, psi, alpha, beta)


def oracle_gradient(online, function):
    """Central differences of `function()` by each number in `online`."""

    def of_leaf(leaf, epsilon=1e-6):
        gradient = np.zeros_like(leaf)
        for i in np.ndindex(leaf.shape):
            value = leaf[i]
            leaf[i] = value + epsilon
            above = function()
            leaf[i] = value - epsilon
            gradient[i] = (above - function()) / (2 * epsilon)
            leaf[i] = value
        return gradient

    return jax.tree.map(of_leaf, online)


# ------------------------------------------------------------------------------ fixtures


def tiny_config(predictor, target, beta, **changes):
    """A variant of the demo for tiny images that are not changed, in small even steps."""
    config = byol.get_config("demo")
    fields = {
        f"views.global.{view}.{name}_prob": 0.0
        for view in ("view_1", "view_2")
        for name in ("flip", "jitter", "grayscale", "blur", "solarize")
    }
    fields |= {
        "use_predictor": predictor,
        "use_target_network": target,
        "negatives_weight": beta,
        "temperature": ALPHA,
        "data.image_size": IMAGE_SHAPE[0],
        "data.test_resize": IMAGE_SHAPE[0],
        "views.mean": MEAN,
        "views.std": STD,
        "optimizer.scaling": "none",
        "optimizer.learning_rate": 0.05,
        "optimizer.schedule": "constant",
    }
    fields |= {
        f"{head}.{size}": value
        for head in ("projector", "predictor")
        for size, value in (("hidden_sizes", (12,)), ("output_size", 3))
    }
    config.update_from_flattened_dict(fields | changes)
    return config


def tiny_build(config, num_classes=NUM_CLASSES, total_steps=4, warmup_steps=0):
    """`method.build` with an encoder of a hundred parameters."""
    config_lib.validate(config, method.build)
    built = method.build(config, num_classes, total_steps, warmup_steps)
    return with_network(built, encoder=TinyEncoder())


@pytest.fixture(scope="module")
def full_state():
    """With a predictor and a target network."""
    built = tiny_build(tiny_config(True, True, 0.0), num_classes=None)
    return jax.device_get(jax.jit(built.init_state)(jax.random.PRNGKey(1)))


def state_of(full, built):
    """What a variant has of it."""
    made = jax.eval_shape(built.init_state, jax.random.PRNGKey(0))
    fields = {
        name: {part: getattr(full, name)[part] for part in getattr(made, name)}
        for name in ("online_params", "online_stats", "target_params", "target_stats")
    }
    opt_state = jax.device_get(built.optimizer.init(fields["online_params"]))
    return full.replace(**fields, opt_state=opt_state)


@pytest.fixture(scope="module")
def views():
    return np.random.default_rng(7).normal(size=(2, BATCH, *IMAGE_SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def losses_and_gradients(full_state, views):
    """`variant -> (state, (loss, Loss), gradients by online and target)`."""

    @functools.cache
    def of(predictor, target, beta):
        built = tiny_build(tiny_config(predictor, target, beta), num_classes=None)
        state = state_of(full_state, built)
        loss = total_loss(built, state, views, None)
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return state, *jax.device_get(run(state.online_params, state.target_params))

    return of


# ---------------------------------------------------------------------- loss and gradient


@pytest.mark.slow
@pytest.mark.parametrize(("predictor", "target", "beta"), VARIANTS)
def test_a_variant_is_the_papers(losses_and_gradients, views, predictor, target, beta):
    """Loss and gradient; without a target network the gradient passes through both sides."""
    state, found, (by_online, by_target) = losses_and_gradients(predictor, target, beta)
    total, out = found
    metrics, outputs, target_stats = out.metrics, out.outputs, out.target_stats
    online, other = as_float64((state.online_params, state.target_params))
    images = list(views.astype(np.float64))
    loss = functools.partial(oracle_loss, online, other, images, predictor, beta)
    np.testing.assert_allclose(total, loss(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    assert_close(by_online, oracle_gradient(online, loss), relative=2e-4, floor=0.1)
    for path, gradient in flatten(by_target).items():
        assert not gradient.any(), path
    assert set(by_target) == set(target_stats) == (set(TARGET) if target else set())
    # What the diagnostics look at: psi of both views, each of which is compared with the other.
    projections = oracle_forward(other or online, images, TARGET)[1]
    np.testing.assert_allclose(outputs.target, projections, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("predictor", "beta"), [(True, 0.0), (True, 1.0), (False, 1.0)])
def test_both_sides_carry_gradient_without_a_target_network(
    losses_and_gradients, views, predictor, beta
):
    """With the online projection held constant it would be another gradient."""
    state, _, (gradient, _) = losses_and_gradients(predictor, False, beta)
    online = as_float64(state.online_params)
    constant = jax.tree.map(np.copy, online)
    one_sided = oracle_gradient(
        online, lambda: oracle_loss(online, constant, list(views), predictor, beta)
    )
    got, other = (tree["encoder"]["conv"]["kernel"] for tree in (gradient, one_sided))
    assert np.abs(got - other).max() > 0.1 * np.abs(got).max()


def test_byol_is_byols_loss(losses_and_gradients):
    """With predictor, target network and beta 0, whatever the temperature."""
    _, (total, out), _ = losses_and_gradients(True, True, 0.0)
    outputs = out.outputs
    expected = losses.byol_loss(*outputs.prediction, *outputs.target)
    np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_simclr_is_nt_xent(alpha):
    """No predictor, no target network, beta 1: 4 + 4 alpha times the mean over both views."""
    z = np.random.default_rng(0).normal(size=(2, 7, 4))
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    rows = np.concatenate(list(unit))
    similarity = rows @ rows.T / alpha
    np.fill_diagonal(similarity, -np.inf)
    pairs = np.concatenate([np.arange(7, 14), np.arange(7)])
    nt_xent = np.log(np.exp(similarity).sum(1)) - similarity[np.arange(14), pairs]
    expected = 4 + 4 * alpha * nt_xent.mean()

    @jax.jit
    def simclr(z_1, z_2):
        negatives = negatives_loss(z_1, z_1, z_2, alpha)
        negatives += negatives_loss(z_2, z_2, z_1, alpha)
        return losses.positive_loss(z_1, z_2, z_1, z_2) + negatives

    np.testing.assert_allclose(simclr(*z.astype(np.float32)), expected, rtol=1e-5)
    np.testing.assert_allclose(oracle_info_nce(z, z, alpha, 1.0), expected, rtol=1e-9)


def test_negatives_of_a_devices_rows_are_the_whole_batchs():
    """Blocks of rows, each from where it begins, make up the loss of all of them."""
    phi, own, other = np.random.default_rng(1).normal(size=(3, 8, 4)).astype(np.float32)
    run = jax.jit(lambda phi, offset: negatives_loss(phi, own, other, 0.2, offset))
    blocks = [run(phi[i : i + 2], i) for i in (0, 2, 4, 6)]
    np.testing.assert_allclose(np.mean(blocks), run(phi, 0), rtol=1e-6)
    assert abs(run(phi[2:4], 4) - blocks[1]) > 1e-3


# ------------------------------------------------------------------------------- updates

GLOBAL_BATCH = 16
SMALL_ALPHA = 0.1  # as the config has it without a target network


@pytest.fixture(scope="module")
def start_of(full_state):
    """`(predictor, target) -> (train step, the same under jit, a first state)`, with negatives."""

    @functools.cache
    def start(predictor, target):
        config = tiny_config(predictor, target, 1.0, temperature=SMALL_ALPHA)
        built = tiny_build(config, num_classes=None)
        return built.train_step, jax.jit(built.train_step), state_of(full_state, built)

    return start


@pytest.fixture(scope="module")
def two_updates(start_of):
    """`(predictor, target, devices) -> (state, metrics)`; 0 devices: plain `jit`."""

    @functools.cache
    def after(predictor, target, devices):
        train_step, run, state = start_of(predictor, target)
        batches = [random_batch(GLOBAL_BATCH, seed=k, labels=False) for k in range(2)]
        if devices == 0:
            for batch in batches:
                state, metrics = run(state, batch)
            return jax.device_get((state, {k: metrics[k] for k in metrics if k != "outputs"}))

        step = functools.partial(train_step, axis_name="d")
        run = jax.pmap(step, axis_name="d", devices=jax.devices()[:devices])
        state = replicated(state, devices, "d")
        for batch in batches:
            parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
            state, metrics = run(state, parts)
        del metrics["outputs"]
        per_device = jax.device_get((state, metrics))
        first = jax.tree.map(lambda x: x[0], per_device)
        for device in range(1, devices):  # replicas never drift apart
            assert_same(jax.tree.map(lambda x, d=device: x[d], per_device), first)
        return first

    return after


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predictor", "target", "devices"),
    [*itertools.product([False], [False], [1, 2, 4, 8]), (True, True, 4)],
)
def test_devices_do_not_change_the_update(two_updates, predictor, target, devices):
    """The negatives are the global batch's, and their gradient comes back to their devices."""
    a, a_metrics = two_updates(predictor, target, devices)
    b, b_metrics = two_updates(predictor, target, 0)
    np.testing.assert_allclose(a_metrics["loss"], b_metrics["loss"], rtol=1e-5)
    assert_close(a_metrics, b_metrics, 1e-4, floor=1e-2)
    for field in ("online_params", "target_params", "online_stats", "target_stats"):
        assert_close(getattr(a, field), getattr(b, field), floor=0.1)
    assert_close(a.opt_state, b.opt_state, floor=1.0)
    assert a.step == b.step == 2 and a_metrics["finite"] == 1.0
    assert set(a.target_params) == (set(TARGET) if target else set())


def test_a_config_binds_its_variant(start_of):
    """A step of what `build` makes has the loss of the config's beta and temperature."""
    _, run, state = start_of(False, False)
    assert state.target_params == {} and state.target_stats == {}
    assert set(state.online_params) == set(TARGET)
    batch = random_batch(GLOBAL_BATCH, seed=3, labels=False)
    images = [(batch[f"view_{i}"] / 255 - MEAN) / STD for i in (1, 2)]
    online = as_float64(state.online_params)
    after, metrics = run(state, batch)
    expected = oracle_loss(online, {}, images, False, 1.0, alpha=SMALL_ALPHA)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)

    # And training goes on: the loss of this batch falls.
    for _ in range(20):
        after, metrics = run(after, batch)
    assert after.target_params == {} and after.step == 21
    assert metrics["finite"] == 1.0 and metrics["loss"] < expected - 0.1


@pytest.mark.slow
def test_a_run_without_a_target_network(tmp_path):
    """From the images to a checkpoint; there is no target to be far from."""
    folder = tiny_runs.write_images(tmp_path / "images", classes=3, count=32)
    fields = tiny_runs.fields(
        folder, steps=2, log_every_steps=1, monitor__diagnostics_every_steps=1
    )
    config = tiny_config(True, False, 0.0)
    config.update_from_flattened_dict(fields | {"data.name": "folder"})
    config.monitor.reference = ""
    pretrain.pretrain(config, str(tmp_path / "run"), tiny_build)
    names = set().union(*tiny_runs.recorded(tmp_path / "run"))
    assert {"loss", "projection_std", "effective_rank"} <= names
    assert "target_distance" not in names
    assert tiny_runs.saved_steps(tmp_path / "run") == [2]


def test_negatives_are_those_of_one_batch():
    config = tiny_config(True, True, 1.0, accumulate_steps=2)
    with pytest.raises(UserError) as error:
        tiny_build(config)
    message = str(error.value)
    assert message.startswith(
        "config.accumulate_steps=2: must be 1: with negatives_weight=1.0 all are of one"
    )
    assert "\n" not in message
    tiny_build(tiny_config(True, True, 0.0, accumulate_steps=2))


# ------------------------------------------------------------------------------- configs


def switches(config):
    return config.use_predictor, config.use_target_network, config.negatives_weight


@pytest.mark.parametrize("preset", ["demo", "cifar10", "imagenet"])
def test_a_sweep_has_the_eight_variants(preset):
    """Each once, with the paper's number, and otherwise one and the same recipe."""
    sweep = byol_to_simclr.get_config(preset)
    assert sweep.job == "sweep" and set(sweep.only) == set(sweep.variants)
    assert len(sweep.only) == 8
    published = {
        (True, True, 0.0): 72.5,
        (True, True, 1.0): 70.9,
        (False, True, 1.0): 70.7,
        (False, False, 1.0): 69.4,
        (True, False, 1.0): 69.1,
        (True, False, 0.0): 0.3,
        (False, True, 0.0): 0.2,
        (False, False, 0.0): 0.1,
    }
    found = {switches(config): name for name, config in sweep.variants.items()}
    assert set(found) == set(VARIANTS) == set(published)
    recipes = []
    for variant, name in found.items():
        config = sweep.variants[name]
        config_lib.validate(config, method.build)
        assert sweep.published[name] == published[variant]
        assert config.temperature == (0.3 if variant[1] else 0.1)
        words = zip(("predictor", "target"), variant[:2], strict=True)
        words = [word if there else f"no_{word}" for word, there in words]
        assert name == "_".join([*words, f"beta_{variant[2]:g}"])
        apart = ("use_predictor", "use_target_network", "negatives_weight", "temperature")
        recipes.append({k: v for k, v in config.to_dict().items() if k not in apart})
    assert all(recipe == recipes[0] for recipe in recipes)


def test_fields_after_the_preset_are_set_in_each_variant():
    arg = "demo,optimizer.learning_rate=0.125,epochs=3,eval.enabled=False,seeds=(1,2)"
    sweep = byol_to_simclr.get_config(arg)
    for config in sweep.variants.values():
        assert config.optimizer.learning_rate == 0.125
        assert config.epochs == 3 and config.eval.enabled is False
    assert tuple(sweep.seeds) == (1, 2)
    assert {switches(config) for config in sweep.variants.values()} == set(VARIANTS)
    smaller = byol_to_simclr.get_config("demo,data.image_size=8")
    for config in smaller.variants.values():  # the crops' size follows the images'
        assert config.data.image_size == config.views["global"].size == 8
    changed = sweep.variants[sweep.only[0]]
    changed.optimizer.momentum = 0.5  # a variant's config is its own
    assert [c.optimizer.momentum for c in sweep.variants.values()].count(0.5) == 1


def test_a_linear_projector_has_no_statistics():
    networks = tiny_networks().clone(projector=MLPHead(hidden_sizes=(), output_size=3))
    state = jax.eval_shape(tiny_method(networks).init_state, jax.random.PRNGKey(0))
    assert set(state.target_params) == {"encoder", "projector"}
    assert set(state.target_stats) == {"encoder"}
