"""BYOL against a NumPy oracle written from the paper (Grill et al. 2020), in float64."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    IMAGE_SHAPE,
    MEAN,
    STD,
    assert_close,
    assert_same,
    flatten,
    random_batch,
    tiny_method,
    tiny_networks,
    tiny_step,
    total_loss,
    with_network,
)

from byol_jax import losses, method
from configs import byol
from selfsup_jax import optim
from selfsup_jax.data.augment import augment_views
from selfsup_jax.devices import parallel
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.method import apply
from selfsup_jax.models.norm import BatchNorm
from selfsup_jax.training import diagnostics

TWO_VIEWS = BatchLayout(num_views=2)
BATCH = 8

# ---------------------------------------------------------------------------- the oracle


def oracle_loss(prediction_1, prediction_2, projection_1, projection_2):
    """Equation 2 and its mirror image, written with norms and not with the cosine."""

    def distance(q, z):
        q = q / np.linalg.norm(q, axis=1, keepdims=True)
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        return ((q - z) ** 2).sum(1)

    return np.mean(distance(prediction_1, projection_2) + distance(prediction_2, projection_1))


def oracle_norm(x, params, moments):
    """Batch norm of one view; notes the moments for the running averages."""
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    moments.append((mean, var))
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def oracle_encoder(params, images, moments):
    """`TinyEncoder`: a 3x3 convolution with a border of zeros, batch norm, ReLU, mean."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(
        padded[:, i : i + height, j : j + width] @ params["conv"]["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    return np.maximum(oracle_norm(x, params["bn"], moments), 0).mean((1, 2))


def oracle_head(params, x, moments):
    """Linear, batch norm, ReLU, linear without bias (section 3.3)."""
    x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
    return np.maximum(oracle_norm(x, params["bn"], moments), 0) @ params["output"]["kernel"]


def oracle_forward(params, views, parts):
    """The views one after the other through `parts`: representations, outputs, moments."""
    representations, outputs = [], []
    moments: dict[str, list] = {part: [] for part in parts}
    for images in views:
        x = oracle_encoder(params["encoder"], images, moments["encoder"])
        representations.append(x)
        for part in parts[1:]:
            x = oracle_head(params[part], x, moments[part])
        outputs.append(x)
    return representations, outputs, moments


ONLINE = ("encoder", "projector", "predictor")
TARGET = ("encoder", "projector")


def oracle_gradients(online, target, views, labels, parts=ONLINE):
    """Central differences in float64 of the loss, and of the probe's loss for the probe only."""
    projections = oracle_forward(target, views, TARGET)[1]  # constants: the target gets no gradient

    def loss():
        return oracle_loss(*oracle_forward(online, views, parts)[1], *projections)

    features = oracle_forward(online, views, parts)[0][0]  # view 1, constants too

    def probe_loss():
        head = online["classifier"]["output"]
        logits = features @ head["kernel"] + head["bias"]
        log_sum = np.log(np.exp(logits).sum(1))
        return np.mean(log_sum - logits[np.arange(len(labels)), labels])

    def differences(part, function):
        def of_leaf(leaf):
            gradient = np.zeros_like(leaf)
            for i in np.ndindex(leaf.shape):
                value, epsilon = leaf[i], 1e-6
                leaf[i] = value + epsilon
                above = function()
                leaf[i] = value - epsilon
                gradient[i] = (above - function()) / (2 * epsilon)
                leaf[i] = value
            return gradient

        return jax.tree.map(of_leaf, online[part])

    gradients = {part: differences(part, loss) for part in parts}
    gradients["classifier"] = differences("classifier", probe_loss)
    return loss(), probe_loss(), gradients


def oracle_lars(path, w, g, trace, rate, *, eta, decay, momentum):
    """LARS as the authors' code has it; biases and norms take plain momentum SGD."""
    if not path.endswith(("bias", "scale")):
        g = g + decay * w
        g = g * eta * np.linalg.norm(w) / np.linalg.norm(g)
    trace = momentum * trace + g
    return w - rate * trace, trace


def oracle_averages(stats, moments):
    """Running averages: one step of decay 0.9 for each view, in turn."""

    def update(node, seen):
        mean, var = node["mean"], node["var"]
        for view_mean, view_var in seen:
            mean, var = 0.9 * mean + 0.1 * view_mean, 0.9 * var + 0.1 * view_var
        return {"mean": mean, "var": var}

    return {part: {"bn": update(stats[part]["bn"], moments[part])} for part in stats}


def as_float64(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def norm_of(*trees):
    """Of all their numbers as one vector."""
    return math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(trees)))


# ------------------------------------------------------------------------------ fixtures

TOTAL_STEPS, WARMUP_STEPS, PEAK = 6, 2, 0.5
ETA, DECAY, MOMENTUM, TAU_BASE = 0.2, 0.05, 0.9, 0.7  # large, to be seen in four steps


@pytest.fixture(scope="module")
def cosine_run(networks, initial_state):
    """Four steps on four batches: the states (the first one included), metrics, and the traces."""
    traces = []
    tau = functools.partial(optim.cosine_tau, total_steps=TOTAL_STEPS, tau_base=TAU_BASE)
    schedule = optim.learning_rate_schedule("cosine", PEAK, TOTAL_STEPS, WARMUP_STEPS)
    step, optimizer = tiny_step(networks, schedule=schedule, tau=tau, eta=ETA, decay=DECAY)

    @jax.jit
    def counted(state, batch):
        traces.append(1)
        return step(state, batch)

    state = initial_state.replace(opt_state=optimizer.init(initial_state.online_params))
    states, metrics = [state], []
    for k in range(4):
        state, values = counted(state, random_batch(BATCH, seed=k))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics, len(traces)


@pytest.fixture(scope="module")
def step_with_tau(networks, initial_state):
    """`tau -> (state before, state after)` of one update that moves the online network."""
    opt_state = tiny_method(networks).optimizer.init(initial_state.online_params)
    before = initial_state.replace(opt_state=opt_state)

    @jax.jit
    def after(tau):
        made = tiny_method(networks, tau=lambda _: tau)
        return made.train_step(before, random_batch(BATCH, seed=0))[0]

    return lambda tau: (before, jax.device_get(after(jnp.float32(tau))))


@pytest.fixture(scope="module")
def views():
    """`[2 * B, H, W, 3]`, near what a step makes of images."""
    return np.random.default_rng(7).normal(size=(2 * BATCH, *IMAGE_SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def labels():
    return random_batch(BATCH, seed=7)["label"]


# ---------------------------------------------------------------------------------- loss


def test_loss_is_the_papers():
    vectors = np.random.default_rng(0).normal(size=(4, 16, 5)) * 3
    got = losses.byol_loss(*vectors.astype(np.float32))
    np.testing.assert_allclose(got, oracle_loss(*vectors), rtol=1e-5)


def test_loss_spans_0_to_8():
    x = np.random.default_rng(1).normal(size=(2, 6, 4)).astype(np.float32)
    # View 1's prediction is compared with view 2's projection: hence the exchanged order.
    np.testing.assert_allclose(losses.byol_loss(x[0], x[1], 3 * x[1], 2 * x[0]), 0, atol=1e-5)
    np.testing.assert_allclose(losses.byol_loss(x[0], x[1], -x[1], -5 * x[0]), 8, rtol=1e-6)


def test_loss_takes_targets_as_constants():
    """The gradient is that of constant targets even where they depend on the same variable."""
    x = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
    target_of = np.random.default_rng(3).normal(size=(5, 5)).astype(np.float32)

    def loss(x):
        target = x @ target_of
        return losses.byol_loss(x, x, target, target)

    def analytic(q, z):  # d/dq of 2 (2 - 2 cos(q, z)), z constant
        norm = np.linalg.norm(q, axis=1, keepdims=True)
        q, z = q / norm, z / np.linalg.norm(z, axis=1, keepdims=True)
        cosine = (q * z).sum(1, keepdims=True)
        return -4 * (z - cosine * q) / norm / len(q)

    expected = analytic(x.astype(np.float64), x.astype(np.float64) @ target_of)
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def losses_and_gradients(networks, initial_state, views, labels):
    """`loss_fn` whole, and its gradients by all that it takes as parameters, in three settings."""

    def of(networks, labels):
        s = initial_state
        parts = [name for name in s.online_params if getattr(networks, name) is not None]
        loss = total_loss(tiny_method(networks), s, views.reshape(2, BATCH, *IMAGE_SHAPE), labels)
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return jax.device_get(both({k: s.online_params[k] for k in parts}, s.target_params))

    return {
        "labels": of(networks, labels),
        "no labels": of(networks, None),
        "no predictor": of(networks.clone(predictor=None), labels),
    }


@pytest.fixture(scope="module")
def gradients(losses_and_gradients):
    """Of the online and of the target parameters, in each setting."""
    return {setting: gradients for setting, (_, gradients) in losses_and_gradients.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "parts"), [("labels", ONLINE), ("no labels", ONLINE), ("no predictor", TARGET)]
)
def test_outputs_are_what_the_loss_compares(
    losses_and_gradients, networks, initial_state, views, labels, setting, parts
):
    """Each of them against the oracle, and the loss again from the predictions and targets."""
    (total, found), _ = losses_and_gradients[setting]
    metrics, outputs = found.metrics, found.outputs
    online, target = as_float64((initial_state.online_params, initial_state.target_params))
    both_views = np.split(views.astype(np.float64), 2)
    representations, predictions, _ = oracle_forward(online, both_views, parts)
    projections_1, projections_2 = oracle_forward(target, both_views, TARGET)[1]
    expected = {
        "representation": representations,
        "projection": oracle_forward(online, both_views, TARGET)[1],
        "prediction": predictions,
        "target": [projections_1, projections_2],
    }
    assert set(outputs._fields) == set(expected)
    for name, value in expected.items():
        got = getattr(outputs, name)
        assert got.dtype == np.float32 and got.shape[:2] == (2, BATCH), name
        np.testing.assert_allclose(got, np.stack(value), rtol=1e-4, atol=1e-5, err_msg=name)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    q, z = unit(as_float64(outputs.prediction)), unit(as_float64(outputs.target))
    compared = [np.mean(2 - 2 * np.sum(q[i] * z[j], -1)) for i, j in tiny_method(networks).pairs]
    np.testing.assert_allclose(metrics["loss"], np.sum(compared), rtol=1e-5)
    loss, probe_loss, _ = oracle_gradients(online, target, both_views, labels, parts)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert ("probe_loss" in metrics) == (setting != "no labels")
    expected_total = loss + (probe_loss if setting != "no labels" else 0)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "parts"), [("labels", ONLINE), ("no predictor", TARGET)])
def test_gradient_is_that_of_finite_differences(
    gradients, initial_state, views, labels, setting, parts
):
    online, target = as_float64((initial_state.online_params, initial_state.target_params))
    both_views = np.split(views.astype(np.float64), 2)
    expected = oracle_gradients(online, target, both_views, labels, parts)[2]
    assert set(expected) == {*parts, "classifier"}
    assert_close(gradients[setting][0], expected, relative=1e-4, floor=0.1)


@pytest.mark.parametrize("setting", ["labels", "no labels", "no predictor"])
def test_no_gradient_reaches_the_target(gradients, setting):
    for name, gradient in flatten(gradients[setting][1]).items():
        assert not gradient.any(), name


def test_probe_passes_no_gradient_to_the_encoder(gradients):
    with_labels, without = gradients["labels"][0], gradients["no labels"][0]
    for part in ONLINE:
        assert_same(with_labels[part], without[part])
    assert np.abs(with_labels["classifier"]["output"]["kernel"]).max() > 1e-3
    assert not without["classifier"]["output"]["kernel"].any()


# -------------------------------------------------------------------------- whole updates


@pytest.mark.slow
def test_updates_are_the_papers(cosine_run):
    """Parameters, target, averages and every metric after each of four steps."""
    states, metrics, _ = cosine_run
    first = states[0]
    online, target = as_float64((first.online_params, first.target_params))
    online_stats, target_stats = as_float64((first.online_stats, first.target_stats))
    traces = jax.tree.map(np.zeros_like, online)
    # By hand from the config: a warm-up of two steps to the peak, then a cosine over the rest.
    rates = [0.0, PEAK / 2, PEAK, PEAK * (1 + math.cos(math.pi / 4)) / 2]

    for k in range(4):
        batch = random_batch(BATCH, seed=k)
        images = [(batch[f"view_{i}"] / 255 - MEAN) / STD for i in (1, 2)]
        loss, probe_loss, grads = oracle_gradients(online, target, images, batch["label"])
        online_moments = oracle_forward(online, images, ONLINE)[2]
        target_moments = oracle_forward(target, images, TARGET)[2]
        online_stats = oracle_averages(online_stats, online_moments)
        target_stats = oracle_averages(target_stats, target_moments)

        pairs = jax.tree_util.tree_map_with_path(
            lambda path, w, g, v, rate=rates[k]: oracle_lars(
                path[-1].key, w, g, v, rate, eta=ETA, decay=DECAY, momentum=MOMENTUM
            ),
            online,
            grads,
            traces,
        )
        before = online
        online, traces = jax.tree.transpose(
            jax.tree.structure(online), jax.tree.structure((0, 0)), pairs
        )
        tau = 1 - (1 - TAU_BASE) * (math.cos(math.pi * k / TOTAL_STEPS) + 1) / 2
        target = {
            part: jax.tree.map(lambda t, o: tau * t + (1 - tau) * o, target[part], online[part])  # noqa: B023
            for part in TARGET
        }

        state = states[k + 1]
        assert state.step == k + 1

        # What has changed since the start, so that an update can't hide behind a large weight.
        def change(now, start):
            return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, now, start)

        for got, expected, start in (
            (state.online_params, online, first.online_params),
            (state.target_params, target, first.target_params),
        ):
            assert_close(change(got, start), change(expected, start), 2e-4, floor=1e-2)
        assert_close(state.online_stats, online_stats, 1e-5, floor=0.1)
        assert_close(state.target_stats, target_stats, 1e-5, floor=0.1)
        expected = {
            "loss": loss,
            "probe_loss": probe_loss,
            "learning_rate": rates[k],
            "tau": tau,
            **{f"grad_norm/{part}": norm_of(tree) for part, tree in grads.items()},
            "update_norm": norm_of(change(online, before)),
            "finite": 1.0,
        }
        assert set(metrics[k]) == {*expected, "probe_top1", "outputs"}
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[k][name], value, rtol=2e-4, atol=1e-7, err_msg=name)
        assert metrics[k]["outputs"].prediction.shape == (2, BATCH, 3)
        followed = {part: online[part] for part in TARGET}
        distance = norm_of(change(followed, target)) / norm_of(followed)
        got = diagnostics.target_distance(state.online_params, state.target_params)
        np.testing.assert_allclose(got, distance, rtol=2e-4)
    assert norm_of(grads) > 0.1 and norm_of(change(online, before)) > 0.1


@pytest.mark.slow
def test_first_step_of_a_warmup_moves_only_the_target(cosine_run):
    states, _, _ = cosine_run
    assert_same(states[0].online_params, states[1].online_params)
    before, after = (flatten(s.target_params) for s in states[:2])
    assert not np.array_equal(before["encoder/conv/kernel"], after["encoder/conv/kernel"])


def test_step_is_traced_once(cosine_run):
    assert cosine_run[2] == 1


def test_rng_stays_and_keys_differ(cosine_run):
    """The base key is never replaced: a resumed step draws what an uninterrupted one draws."""
    states, _, _ = cosine_run
    for state in states[1:]:
        np.testing.assert_array_equal(state.rng, states[0].rng)


@pytest.mark.slow
def test_without_labels(step_with_tau, initial_state):
    """A batch without labels trains the same encoder, and reports no probe."""
    step, optimizer = tiny_step(tiny_networks(classes=None))
    params = {k: v for k, v in initial_state.online_params.items() if k != "classifier"}
    state = initial_state.replace(online_params=params, opt_state=optimizer.init(params))
    after, metrics = jax.jit(step)(state, random_batch(BATCH, seed=0, labels=False))
    norms = {f"grad_norm/{part}" for part in ONLINE} | {"update_norm"}
    assert set(metrics) == {"loss", "tau", "learning_rate", "finite", "outputs"} | norms
    assert set(after.online_params) == set(ONLINE)
    # What a run with labels makes of these parts: the probe only watches.
    with_labels = step_with_tau(0.9)[1]
    assert_close(after.online_params, {k: with_labels.online_params[k] for k in ONLINE}, floor=0.1)


@pytest.mark.slow
def test_without_a_predictor(networks, initial_state):
    """The ablation: a step trains the other parts, and nothing of a predictor is left."""
    config = byol.get_config("demo,use_predictor=False")
    built = method.build(config, num_classes=10, total_steps=2, warmup_steps=0)
    made = jax.eval_shape(built.init_state, jax.random.PRNGKey(0))
    assert set(made.online_params) == {*TARGET, "classifier"}
    assert set(made.online_stats) == set(made.target_params) == set(TARGET)

    step, optimizer = tiny_step(networks.clone(predictor=None))
    params = {k: v for k, v in initial_state.online_params.items() if k != "predictor"}
    stats = {k: v for k, v in initial_state.online_stats.items() if k != "predictor"}
    state = initial_state.replace(
        online_params=params, online_stats=stats, opt_state=optimizer.init(params)
    )
    after, metrics = jax.jit(step)(state, random_batch(BATCH, seed=0))
    assert set(after.online_params) == set(params) and set(after.online_stats) == set(stats)
    assert {k for k in metrics if k.startswith("grad_norm/")} == {f"grad_norm/{k}" for k in params}
    assert metrics["finite"] == 1.0
    assert_same(metrics["outputs"].prediction, metrics["outputs"].projection)
    for part, layer in (("encoder", "conv"), ("projector", "output"), ("classifier", "output")):
        old, new = (s.online_params[part][layer]["kernel"] for s in (state, after))
        assert np.abs(old - new).max() > 1e-4, part


# ----------------------------------------------------------------------------- the views


class Showing(nn.Module):
    """An encoder whose representation is its input."""

    num_features: int

    @nn.compact
    def __call__(self, x, layout=None):
        BatchNorm(name="bn")(x, layout)  # parameters and averages, as every encoder has
        return x.reshape(len(x), -1)


@pytest.mark.slow
def test_augment_views_are_what_a_step_sees():
    """With the step's key, before the normalisation: bit by bit, and other ones at other steps."""
    size = IMAGE_SHAPE[0]
    config = byol.get_config("demo,projector.hidden_sizes=(4,),predictor.hidden_sizes=(4,)")
    config.data.image_size = size
    config.views.mean, config.views.std = (0.0,) * 3, (1.0,) * 3  # nothing is normalised
    built = method.build(config, num_classes=10, total_steps=9, warmup_steps=0)
    built = with_network(built, encoder=Showing(3 * size**2))
    state = built.init_state(jax.random.PRNGKey(0))
    step = jax.jit(built.train_step)
    batch = random_batch(BATCH, seed=0) | {"index": np.arange(5, 5 + BATCH, dtype=np.int32)}

    groups, views = built.augment.groups, {}
    for number in (0, 4):
        metrics = step(state.replace(step=jnp.int32(number)), batch)[1]
        key = jax.random.fold_in(state.rng, number)
        made = jax.jit(functools.partial(augment_views, groups=groups))(key, batch)
        assert set(made) == {"global"}
        views[number] = np.asarray(made["global"])
        assert views[number].shape == (2, BATCH, *IMAGE_SHAPE)
        assert views[number].dtype == np.float32
        assert views[number].min() >= 0 and views[number].max() <= 1
        seen = np.asarray(metrics["outputs"].representation).reshape(views[number].shape)
        np.testing.assert_array_equal(seen, views[number])
    plain = np.stack([batch["view_1"], batch["view_2"]]) / np.float32(255)
    different = [views[0] != views[4], views[0] != plain, views[4] != plain]
    assert all(x.any(axis=(2, 3, 4)).mean() > 0.5 for x in different)


# ------------------------------------------------------------------------------------ tau


def test_tau_0_copies_the_new_online_network(step_with_tau):
    before, after = step_with_tau(0.0)
    assert_same(after.target_params, {part: after.online_params[part] for part in TARGET})
    kernel = ("encoder", "conv", "kernel")
    old, new = (flatten(s.online_params)["/".join(kernel)] for s in (before, after))
    assert np.abs(old - new).max() > 1e-3  # the copy is of the network after its update


def test_tau_1_leaves_the_target(step_with_tau):
    before, after = step_with_tau(1.0)
    assert_same(after.target_params, before.target_params)


def test_tau_between_mixes(step_with_tau):
    before, after = step_with_tau(0.99)
    online = {part: after.online_params[part] for part in TARGET}
    expected = jax.tree.map(lambda t, o: 0.99 * t + 0.01 * o, before.target_params, online)
    assert_close(after.target_params, expected, 1e-6, floor=1.0)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_ema_never_touches_batch_statistics(step_with_tau, networks, initial_state, tau):
    """The target's averages come from its own forward pass, whatever tau is."""
    _, after = step_with_tau(tau)
    batch = random_batch(BATCH, seed=0)
    images = [(batch[f"view_{i}"] / 255 - MEAN) / STD for i in (1, 2)]
    moments = oracle_forward(as_float64(initial_state.target_params), images, TARGET)[2]
    expected = oracle_averages(as_float64(initial_state.target_stats), moments)
    assert_close(after.target_stats, expected, 1e-5, floor=0.1)


def test_cosine_tau():
    tau = functools.partial(optim.cosine_tau, total_steps=200, tau_base=0.996)
    np.testing.assert_allclose(tau(jnp.int32(0)), 0.996, rtol=1e-6)
    np.testing.assert_allclose(tau(jnp.int32(100)), 0.998, rtol=1e-6)
    np.testing.assert_allclose(tau(jnp.int32(200)), 1.0, rtol=1e-6)
    np.testing.assert_allclose(tau(jnp.int32(300)), 1.0, rtol=1e-6)  # and never below again


# ------------------------------------------------------------------------------ networks


def test_target_starts_from_its_own_draw_without_a_predictor(initial_state):
    assert set(initial_state.target_params) == set(TARGET)
    online, target = initial_state.online_params, initial_state.target_params
    for part, layer in (("encoder", "conv"), ("projector", "hidden"), ("projector", "output")):
        difference = online[part][layer]["kernel"] - target[part][layer]["kernel"]
        assert np.abs(difference).min() > 0


def test_online_and_target_read_the_views_apart(networks, initial_state, views):
    """Each view is normalised by its own statistics: exchanging the views exchanges the outputs."""
    s = initial_state
    project = jax.jit(
        lambda views: apply(
            networks,
            {"params": s.target_params, "batch_stats": s.target_stats},
            views,
            TWO_VIEWS,
            method=networks.project,
        )[0]
    )
    first, second = np.split(views, 2)
    # Another offset for the second view would change the first's outputs if they shared statistics.
    apart = project(np.concatenate([first, 5 * second + 3]))
    np.testing.assert_allclose(apart[:BATCH], project(views)[:BATCH], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_pmap_step_is_traced_once(networks, initial_state):
    """Over all devices, with a donated state that is first a host's and then the devices'."""
    traces = []
    step, optimizer = tiny_step(networks)

    def counted(state, batch, *, axis_name):
        traces.append(axis_name)
        return step(state, batch, axis_name=axis_name)

    state = initial_state.replace(opt_state=optimizer.init(initial_state.online_params))
    state = parallel.replicate(lambda s: s, state)
    run = parallel.step_over_devices(counted)
    for k in range(3):
        state, metrics = run(state, parallel.shard(random_batch(16, seed=k)))
    assert len(traces) == 1
    assert int(parallel.unreplicate(state).step) == 3
    assert np.isfinite(parallel.unreplicate(metrics)["loss"])
