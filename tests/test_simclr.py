"""SimCLR against a NumPy oracle written from the paper (Chen et al. 2020), in float64."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from conftest import (
    IMAGE_SHAPE,
    LIGHTLY,
    MEAN,
    NUM_CLASSES,
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
from ml_collections import ConfigDict

from configs import simclr
from selfsup_jax import config as config_lib
from selfsup_jax.devices import collectives, parallel
from selfsup_jax.errors import UserError
from selfsup_jax.models.heads import l2_normalize
from selfsup_jax.run.checkpoint import Checkpoints
from selfsup_jax.training import pretrain
from simclr_jax import losses, method

BATCH = 8
PARTS = ("encoder", "projector", "classifier")
nt_xent = jax.jit(losses.nt_xent, static_argnames="gather")

# ---------------------------------------------------------------------------- the oracle


def oracle_nt_xent(z_1, z_2, temperature):
    """Algorithm 1: (the mean of equation 1 over 2 N views, how often the pair is the nearest)."""
    z = np.concatenate([z_1, z_2])
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    n = len(z_1)
    total, found = 0.0, 0
    for i in range(2 * n):
        pair = (i + n) % (2 * n)
        similarity = z @ z[i] / temperature
        others = [k for k in range(2 * n) if k != i]
        total += math.log(sum(math.exp(similarity[k]) for k in others)) - similarity[pair]
        found += max(others, key=lambda k: similarity[k]) == pair
    return total / (2 * n), found / (2 * n)


def oracle_norm(x, params, seen):
    """Batch norm over all rows, those of both views; notes the moments."""
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    seen.append((mean, var))
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params.get("bias", 0.0)


def oracle_forward(params, images):
    """`[2 N, H, W, C]` through `TinyEncoder` and g: representation, projection, moments."""
    encoder, projector = params["encoder"], params["projector"]
    seen = []
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(
        padded[:, i : i + height, j : j + width] @ encoder["conv"]["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    h = np.maximum(oracle_norm(x, encoder["bn"], seen), 0).mean((1, 2))
    # Section 4.2 and the authors' code: each layer of g is followed by a norm, the last one's
    # without an offset.
    x = np.maximum(oracle_norm(h @ projector["hidden"]["kernel"], projector["bn"], seen), 0)
    z = oracle_norm(x @ projector["output"]["kernel"], projector["output_bn"], seen)
    return h, z, dict(zip(("encoder/bn", "projector/bn", "projector/output_bn"), seen, strict=True))


def oracle_gradients(params, images, labels, temperature):
    """(loss, probe's loss, gradients) by central differences; the loss adds up both views'.

    The authors' linear head sees the features of both views, which are constants for it.
    """
    features = oracle_forward(params, images)[0]
    labels = np.concatenate([labels, labels])

    def loss():
        z = oracle_forward(params, images)[1]
        return 2 * oracle_nt_xent(*np.split(z, 2), temperature)[0]

    def probe_loss():
        head = params["classifier"]["output"]
        logits = features @ head["kernel"] + head["bias"]
        log_sum = np.log(np.exp(logits).sum(1))
        return np.mean(log_sum - logits[np.arange(len(labels)), labels])

    def of_leaf(function, leaf, epsilon=1e-6):
        gradient = np.zeros_like(leaf)
        for i in np.ndindex(leaf.shape):
            value = leaf[i]
            leaf[i] = value + epsilon
            above = function()
            leaf[i] = value - epsilon
            gradient[i] = (above - function()) / (2 * epsilon)
            leaf[i] = value
        return gradient

    gradients = {
        part: jax.tree.map(
            functools.partial(of_leaf, probe_loss if part == "classifier" else loss), tree
        )
        for part, tree in params.items()
    }
    return loss(), probe_loss(), gradients


def oracle_lars(path, w, g, trace, rate, *, eta, decay, momentum):
    """LARS as the authors' code has it: what is accumulated has its step's rate already.

    The linear head is left out of LARS, its decay is in the loss: half the square of its kernel.
    """
    if not path[-1].key.endswith(("bias", "scale")):
        g = g + decay * w
        if path[0].key != "classifier":
            g = g * eta * np.linalg.norm(w) / np.linalg.norm(g)
    trace = momentum * trace + rate * g
    return w - trace, trace


def as_float64(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def norm_of(*trees):
    return math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(trees)))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------ fixtures

TOTAL_STEPS, WARMUP_STEPS, PEAK = 6, 2, 0.5
ETA, DECAY, MOMENTUM = 0.2, 0.05, 0.9  # large, to be seen in four steps


def tiny_config(**changes) -> ConfigDict:
    """The paper's recipe for tiny images that are not changed, in large steps."""
    config = simclr.get_config("imagenet")
    fields = {
        f"views.global.view_1.{name}_prob": 0.0 for name in ("flip", "jitter", "grayscale", "blur")
    }
    fields |= {
        "batch_size": BATCH,
        "compute_dtype": "float32",
        "data.image_size": IMAGE_SHAPE[0],
        "data.test_resize": IMAGE_SHAPE[0],
        "projector.hidden_sizes": (6,),
        "projector.output_size": 3,
        "views.mean": MEAN,
        "views.std": STD,
        "optimizer.scaling": "none",
        "optimizer.learning_rate": PEAK,
        "optimizer.weight_decay": DECAY,
        "optimizer.trust_coefficient": ETA,
    }
    config.update_from_flattened_dict(fields | changes)
    return config


def tiny_build(config, num_classes=NUM_CLASSES, total_steps=TOTAL_STEPS, warmup_steps=WARMUP_STEPS):
    """`method.build` with an encoder of a hundred parameters."""
    config_lib.validate(config, method.build)
    built = method.build(config, num_classes, total_steps, warmup_steps)
    return with_network(built, encoder=TinyEncoder())


@pytest.fixture(scope="module")
def built():
    return tiny_build(tiny_config())


@pytest.fixture(scope="module")
def first_state(built):
    return jax.device_get(jax.jit(built.init_state)(jax.random.PRNGKey(0)))


@pytest.fixture(scope="module")
def step(built):
    """One update on one device, compiled once."""
    return jax.jit(built.train_step)


@pytest.fixture(scope="module")
def four_steps(step, first_state):
    """The states (the first one included) and the metrics of four steps on four batches."""
    state = first_state
    states, metrics = [state], []
    for k in range(4):
        state, values = step(state, random_batch(BATCH, seed=k))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(7).normal(size=(2, BATCH, *IMAGE_SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def loss_and_gradient(built, first_state, images):
    """The whole loss on one device, and its gradient by the parameters."""
    labels = random_batch(BATCH, seed=7)["label"]
    loss = total_loss(built, first_state, images, labels)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return jax.device_get(run(first_state.online_params, {})), labels


# ---------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_is_the_papers(temperature):
    """The mean over both views, of the loss and of how often the pair is the nearest."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(6, 4))
    views = unit(np.stack([first, first + rng.normal(size=(6, 4))]))
    got = nt_xent(*views.astype(np.float32), temperature)
    loss, top1 = oracle_nt_xent(*views, temperature)
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    np.testing.assert_allclose(got[1], top1, rtol=1e-6)
    assert 0 < top1 < 1


def test_a_row_is_compared_with_all_others_and_not_with_itself():
    """One image's two views alike and the others' opposite: 2 N - 2 negatives at -1."""
    n, temperature = 5, 0.3
    z = np.zeros((n, 2), np.float32)
    z[:, 0] = -1
    z[0, 0] = 1
    loss, top1 = nt_xent(z[:1], z[:1], temperature, gather=lambda _: (z, z))
    expected = math.log(1 + (2 * n - 2) * math.exp(-2 / temperature))
    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    assert top1 == 1
    # With all views alike, the pair is one of 2 N - 1.
    same = np.ones((n, 2), np.float32) / math.sqrt(2)
    loss, _ = nt_xent(same, same, temperature)
    np.testing.assert_allclose(loss, math.log(2 * n - 1), rtol=1e-6)


def test_batch_offset_is_the_devices_place_in_the_batch():
    """Blocks of rows, each from where it begins, make up the whole batch's loss."""
    z = unit(np.random.default_rng(1).normal(size=(2, 8, 4))).astype(np.float32)
    gather = lambda _: (z[0], z[1])  # noqa: E731
    whole = nt_xent(*z, 0.2)
    blocks = [nt_xent(*z[:, i : i + 2], 0.2, gather, i) for i in (0, 2, 4, 6)]
    np.testing.assert_allclose(np.mean(blocks, 0), np.asarray(whole), rtol=1e-6)
    wrong = nt_xent(*z[:, 2:4], 0.2, gather, 4)[0]
    assert abs(wrong - blocks[1][0]) > 1e-2


def naive_nt_xent(z, temperature):
    """The cross-entropy as the difference of a logarithm and a logit."""
    labels = jnp.arange(len(z[0]))
    same = jnp.where(labels == labels[:, None], -jnp.inf, z[0] @ z[0].T)
    logits = jnp.concatenate([z[0] @ z[1].T, same], 1) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_loss_is_precise_near_its_minimum():
    """Views alike, images apart: the digits of loss and gradient that are left are the oracle's."""
    rng = np.random.default_rng(3)
    z = np.repeat(np.eye(6)[None], 2, axis=0) + 0.05 * rng.normal(size=(2, 6, 6))
    temperature = 0.04

    def oracle(z):
        return oracle_nt_xent(*z, temperature)[0]

    def ours(z):
        return nt_xent(*l2_normalize(z), temperature)[0]

    def naive(z):
        return (naive_nt_xent(z, temperature) + naive_nt_xent(z[::-1], temperature)) / 2

    expected = oracle(z)
    assert 1e-11 < expected < 1e-8
    gradient = np.zeros_like(z)
    for i in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[i] = 1e-4
        gradient[i] = (oracle(z + step) - oracle(z - step)) / 2e-4
    scale = np.abs(gradient).max()

    def errors(loss):
        value, got = jax.value_and_grad(loss)(z.astype(np.float32))
        return abs(value / expected - 1), np.abs(got - gradient).max() / scale

    assert max(errors(ours)) < 1e-3
    assert min(errors(lambda z: naive(l2_normalize(z)))) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_on_devices_the_loss_is_the_plain_forms(devices):
    """Loss, accuracy and the gradient by every projection: of one call without any axis."""
    rng = np.random.default_rng(4)
    first = rng.normal(size=(16, 5))
    z = unit(np.stack([first, first + rng.normal(size=(16, 5))])).astype(np.float32)

    def sharded(z):
        offset = collectives.batch_offset(z.shape[1], "d")
        gather = functools.partial(collectives.gather, axis_name="d")
        value, top1 = losses.nt_xent(z[0], z[1], 0.2, gather, offset)
        return value, top1

    def mean_of_devices(z):
        values, top1 = jax.pmap(sharded, "d", devices=jax.devices()[:devices])(z)
        return values.mean(), top1.mean()

    parts = np.stack(np.split(z, devices, axis=1))
    (loss, top1), gradient = jax.value_and_grad(mean_of_devices, has_aux=True)(parts)
    plain = jax.value_and_grad(lambda z: nt_xent(z[0], z[1], 0.2), has_aux=True)
    (expected_loss, expected_top1), expected = plain(z)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(top1, expected_top1, rtol=1e-6)
    whole = np.concatenate(list(np.asarray(gradient)), axis=1)
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-6)
    assert 0 < expected_top1 < 1 and np.abs(expected).max() > 1e-2


def test_gradients_reach_both_views_and_all_rows():
    """Of the loss as a function of every projection: the oracle's finite differences."""
    z = np.random.default_rng(2).normal(size=(2, 5, 3))

    def loss(z):
        z = l2_normalize(z)
        return nt_xent(z[0], z[1], 0.2)[0]

    got = jax.jit(jax.grad(loss))(z.astype(np.float32))
    for i in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[i] = 1e-6
        above, below = (oracle_nt_xent(*(z + s), 0.2)[0] for s in (step, -step))
        np.testing.assert_allclose(got[i], (above - below) / 2e-6, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------- gradients


@pytest.mark.slow
def test_outputs_are_what_the_loss_compares(built, loss_and_gradient, first_state, images):
    ((total, out), _), labels = loss_and_gradient
    metrics, outputs = out.metrics, out.outputs
    params = as_float64(first_state.online_params)
    flat = images.astype(np.float64).reshape(-1, *IMAGE_SHAPE)
    h, z, _ = oracle_forward(params, flat)
    z = unit(z).reshape(2, BATCH, -1)
    expected = {
        "representation": h.reshape(2, BATCH, -1),
        "projection": z,
        "prediction": z,
        "target": z,
    }
    assert set(outputs._fields) == set(expected)
    for name, value in expected.items():
        got = getattr(outputs, name)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-4, err_msg=name)
    loss, top1 = oracle_nt_xent(*z, 0.1)
    np.testing.assert_allclose(metrics["loss"], 2 * loss, rtol=1e-5)
    assert metrics["contrast_top1"] == pytest.approx(top1)
    assert built.pairs == ((0, 1), (1, 0))  # a projection is compared with the other view's
    probe_loss = oracle_gradients(params, flat, labels, 0.1)[1]
    np.testing.assert_allclose(total, 2 * loss + probe_loss, rtol=1e-5)


@pytest.mark.slow
def test_gradient_is_that_of_finite_differences(loss_and_gradient, first_state, images):
    (_, gradient), labels = loss_and_gradient
    flat = images.astype(np.float64).reshape(-1, *IMAGE_SHAPE)
    expected = oracle_gradients(as_float64(first_state.online_params), flat, labels, 0.1)[2]
    assert set(expected) == set(PARTS)
    assert_close(gradient, expected, relative=2e-4, floor=0.1)


# -------------------------------------------------------------------------- whole updates


@pytest.mark.slow
def test_updates_are_the_papers(four_steps):
    """Parameters, averages and every metric after each of four steps, from a config on."""
    states, metrics = four_steps
    first = states[0]
    params, stats = as_float64((first.online_params, first.online_stats))
    assert set(params) == set(PARTS)
    traces = jax.tree.map(np.zeros_like, params)
    # By hand from the config: a warm-up of two steps to the peak, then a cosine over the rest.
    rates = [0.0, PEAK / 2, PEAK, PEAK * (1 + math.cos(math.pi / 4)) / 2]

    for k, rate in enumerate(rates):
        batch = random_batch(BATCH, seed=k)
        views = np.concatenate([batch["view_1"], batch["view_2"]])
        views = (views / 255 - MEAN) / STD
        loss, probe_loss, grads = oracle_gradients(params, views, batch["label"], 0.1)
        _, z, moments = oracle_forward(params, views)
        top1 = oracle_nt_xent(*np.split(z, 2), 0.1)[1]
        for path, (mean, var) in moments.items():
            part, norm = path.split("/")
            old = stats[part][norm]
            stats[part][norm] = {
                "mean": 0.9 * old["mean"] + 0.1 * mean,
                "var": 0.9 * old["var"] + 0.1 * var,
            }

        lars = functools.partial(oracle_lars, rate=rate, eta=ETA, decay=DECAY, momentum=MOMENTUM)
        pairs = jax.tree_util.tree_map_with_path(lars, params, grads, traces)
        before = params
        params, traces = jax.tree.transpose(
            jax.tree.structure(params), jax.tree.structure((0, 0)), pairs
        )

        def change(now, start):  # so that an update can't hide behind a large weight
            return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, now, start)

        state = states[k + 1]
        assert state.step == k + 1
        got, expected = (change(p, first.online_params) for p in (state.online_params, params))
        assert_close(got, expected, 5e-4, floor=1e-2)
        assert_close(state.online_stats, stats, 1e-5, floor=0.1)
        expected = {
            "loss": loss,
            "contrast_top1": top1,
            "probe_loss": probe_loss,
            "learning_rate": rate,
            **{f"grad_norm/{part}": norm_of(tree) for part, tree in grads.items()},
            "update_norm": norm_of(change(params, before)),
            "finite": 1.0,
        }
        assert set(metrics[k]) == {*expected, "probe_top1", "outputs"}
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[k][name], value, rtol=5e-4, atol=1e-7, err_msg=name)
    assert norm_of(grads) > 0.1 and norm_of(change(params, before)) > 0.1


@pytest.mark.parametrize("share", [True, False])
def test_whether_both_views_share_their_statistics(built, first_state, images, share):
    """Another offset of view 2 changes view 1's projections if they are normalised together."""
    made = dataclasses.replace(built, loss=functools.partial(built.loss, views_share_norm=share))

    @jax.jit
    def loss(views):
        return total_loss(made, first_state, views, None)(first_state.online_params, {})[1]

    found, other = loss(images), loss(np.stack([images[0], 5 * images[1] + 3])).outputs
    metrics, outputs = found.metrics, found.outputs
    assert set(metrics) == {"loss", "contrast_top1"}  # without labels there is no probe
    change = np.abs(outputs.projection[0] - other.projection[0]).max()
    assert change > 0.1 if share else change < 1e-5


def test_a_fresh_state_has_no_target(first_state):
    assert first_state.target_params == {} and first_state.target_stats == {}
    assert set(first_state.online_params) == set(PARTS)
    assert set(first_state.online_stats) == {"encoder", "projector"}
    kernel = first_state.online_params["classifier"]["output"]["kernel"]
    assert 0.005 < np.std(kernel) < 0.02  # the authors' deviation of 0.01
    assert set(flatten(first_state.online_params["projector"])) == {
        "hidden/kernel",
        "bn/scale",
        "bn/bias",
        "output/kernel",
        "output_bn/scale",
    }


def test_without_labels():
    built = tiny_build(tiny_config(), num_classes=None)
    state = jax.eval_shape(built.init_state, jax.random.PRNGKey(0))
    assert set(state.online_params) == {"encoder", "projector"}
    batch = random_batch(BATCH, seed=0, labels=False)
    after, metrics = jax.eval_shape(built.train_step, state, batch)
    assert set(after.online_params) == {"encoder", "projector"}
    assert not any("probe" in name or "classifier" in name for name in metrics)


# ------------------------------------------------------------------------------- devices

GLOBAL_BATCH = 16


@pytest.fixture(scope="module")
def two_updates(first_state):
    """`devices -> (state, metrics, outputs [2, B, ...])` after two updates; 0 is plain `jit`."""
    # Small steps, the first one too: far ones would blow up the rounding.
    built = tiny_build(tiny_config(**{"optimizer.learning_rate": 0.05}), warmup_steps=0)
    batches = [random_batch(GLOBAL_BATCH, seed=k) for k in range(2)]

    @functools.cache
    def on(devices):
        state = first_state
        if devices == 0:
            run = jax.jit(built.train_step)
            for batch in batches:
                state, metrics = run(state, batch)
            outputs = metrics.pop("outputs")
            return jax.device_get((state, metrics, outputs))

        step = functools.partial(built.train_step, axis_name="d")
        run = jax.pmap(step, axis_name="d", devices=jax.devices()[:devices])
        state = replicated(state, devices, "d")
        for batch in batches:
            parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
            state, metrics = run(state, parts)
        outputs = jax.device_get(metrics.pop("outputs"))
        outputs = jax.tree.map(lambda x: np.concatenate(list(x), axis=1), outputs)
        per_device = jax.device_get((state, metrics))
        first = jax.tree.map(lambda x: x[0], per_device)
        for device in range(1, devices):  # replicas never drift apart
            assert_same(jax.tree.map(lambda x, d=device: x[d], per_device), first)
        return *first, outputs

    return on


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_devices_do_not_change_the_update(two_updates, devices):
    """The negatives are those of the global batch, and its norms: all is the same to 1e-5."""
    (a, a_metrics, a_outputs), (b, b_metrics, b_outputs) = two_updates(devices), two_updates(0)
    assert_close(a_metrics, b_metrics, floor=1e-2)
    assert_close(a_outputs, b_outputs, floor=0.1)
    assert_close(a.online_params, b.online_params, floor=0.1)
    assert_close(a.online_stats, b.online_stats, floor=0.1)
    assert_close(a.opt_state, b.opt_state, floor=1.0)
    assert a.target_params == {} and a.step == b.step == 2


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
def test_gradients_flow_through_gathered_rows(devices):
    """The mean of the devices' gradients is one device's; it isn't if the rows were constants."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, GLOBAL_BATCH, 5)).astype(np.float32)
    w = rng.normal(size=(5, 4)).astype(np.float32)

    def loss(w, x, axis_name, gather):
        z = l2_normalize(x @ w)
        offset = collectives.batch_offset(x.shape[1], axis_name)
        gather = functools.partial(gather, axis_name=axis_name)
        return losses.nt_xent(z[0], z[1], 0.2, gather, offset)[0]

    def constants(tree, axis_name):
        return jax.lax.stop_gradient(collectives.gather(tree, axis_name))

    def on_devices(gather):
        def gradient(w, x):
            return collectives.mean(jax.grad(loss)(w, x, "d", gather), "d")

        parts = np.stack(np.split(x, devices, axis=1))
        mapped = jax.pmap(gradient, "d", in_axes=(None, 0), devices=jax.devices()[:devices])
        return np.asarray(mapped(w, parts)[0])

    whole = jax.jit(lambda w: jax.grad(loss)(w, x, None, collectives.gather))
    expected = np.asarray(whole(w))
    np.testing.assert_allclose(on_devices(collectives.gather), expected, rtol=1e-4, atol=1e-6)
    assert np.abs(on_devices(constants) - expected).max() > 0.1 * np.abs(expected).max()


# --------------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_saved_state_goes_on_as_if_it_had_not_been(four_steps, step, tmp_path):
    states, _ = four_steps
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.take(parallel.replicate(lambda s: s, states[2]), {"config": {}})
    checkpoints.write()
    checkpoints.wait()
    restored = checkpoints.restore(jax.eval_shape(lambda: states[0]))
    checkpoints.close()
    assert_same(restored, states[2])
    assert restored.target_params == {} and restored.target_stats == {}
    after = jax.device_get(step(restored, random_batch(BATCH, seed=2))[0])
    assert_same(after, states[3])


@pytest.mark.slow
def test_a_run_is_watched_without_a_target(tmp_path):
    """What is measured of a run's outputs is, and a distance of the target is not."""
    folder = tiny_runs.write_images(tmp_path / "images", classes=3, count=32)
    fields = tiny_runs.fields(
        folder,
        projector__hidden_sizes=(6,),
        projector__output_size=3,
        steps=2,
        log_every_steps=1,
        monitor__diagnostics_every_steps=1,
    )
    config = simclr.get_config("folder")  # whose view_1 is that of both views
    fields = {name: value for name, value in fields.items() if ".view_2." not in name}
    config.update_from_flattened_dict(fields)
    pretrain.pretrain(config, str(tmp_path / "run"), tiny_build)
    names = set().union(*tiny_runs.recorded(tmp_path / "run"))
    assert {"loss", "contrast_top1", "effective_rank", "prediction_target_cosine"} <= names
    assert "target_distance" not in names and "tau" not in names
    assert tiny_runs.saved_steps(tmp_path / "run") == [2]


# ------------------------------------------------------------------------------- configs

PROBE_FIELDS = ("kernel_init", "every_view", "lars_ratio")
PRESETS = ("imagenet", "cifar10", "cifar10_lars", "imagenette", "demo", "folder")


def assert_fields(config: ConfigDict, expected: dict) -> None:
    assert {field: get(config, field) for field in expected} == expected


def get(config, field):
    for key in field.split("."):
        config = config[key]
    return config


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    config = simclr.get_config(preset)
    config_lib.validate(config, method.build)
    assert config.method == "simclr"
    assert config.encoder.kernel_init == ("torch" if preset == "cifar10" else "lecun")
    released = preset in ("imagenet", "cifar10_lars", "imagenette")  # the others are our own
    assert config.encoder.stage1_projection == released and config.encoder.zero_init_basic
    assert config.whole_epochs != released
    probe = ("normal", True, False) if released else ("lecun", False, True)
    assert tuple(config.online_probe[f] for f in PROBE_FIELDS) == probe
    authors = preset != "cifar10"  # which is lightly's recipe
    assert config.projector.output_norm == ("scale" if authors else "affine")
    assert config.encoder.padding == ("fixed" if authors else "torch")
    assert config.views["global"].count == 2 and "view_2" not in config.views["global"]
    config.views["global"].view_1.hue = 0.05
    built = method.build(config, 10, total_steps=100, warmup_steps=10)
    assert [view.hue for view in built.augment.groups["global"]] == [0.05, 0.05]  # of both
    state = jax.eval_shape(built.init_state, jax.random.PRNGKey(0))
    assert state.target_params == {}
    assert f"{2 * config.batch_size - 2:,}" in built.notes[0]


def test_imagenet_is_the_papers_recipe():
    expected = {
        "epochs": 1000,
        "batch_size": 4096,
        "bn_groups": 1,
        "temperature": 0.1,
        "data.name": "imagenet2012",
        "data.image_size": 224,
        "encoder.depth": 50,
        "encoder.bn_decay": 0.9,
        "encoder.bn_epsilon": 1e-5,
        "encoder.bn_unbiased_average": False,
        "projector.hidden_sizes": (2048,),
        "projector.output_size": 128,
        "optimizer.name": "lars",
        "optimizer.learning_rate": 0.3,
        "optimizer.scaling": "linear",
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 10,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.rate_inside_momentum": True,
        "optimizer.weight_decay": 1e-6,
        "optimizer.trust_coefficient": 1e-3,
        "views.mean": (0, 0, 0),
        "views.std": (1, 1, 1),
    }
    view = {
        "flip_prob": 0.5,
        "jitter_prob": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "grayscale_prob": 0.2,
        "blur_prob": 0.5,
        "blur_kernel": 23,
        "blur_sigma_min": 0.1,
        "blur_sigma_max": 2.0,
        "solarize_prob": 0.0,
    }
    for config in (simclr.get_config(), simclr.get_config("imagenet")):
        assert_fields(config, expected)
        assert_fields(config.views["global"].view_1, view)
        assert config.views["global"].count == 2 and "view_2" not in config.views["global"]
    # The peak: 4.8 for a batch of 4096, either way.
    for arg, base in (("imagenet,scaling=sqrt", 0.075), ("scaling=linear", 0.3)):
        config = simclr.get_config(arg)
        assert_fields(config, {"optimizer.learning_rate": base, "batch_size": 4096})
        built = method.build(config, 10, total_steps=100, warmup_steps=10)
        assert built.schedule(10) == pytest.approx(4.8)
        assert built.loss.keywords == {"temperature": 0.1, "views_share_norm": True}


def test_cifar10_is_lightlys_recipe():
    """Its loss is the mean of both views: for their sum half the rate and twice the decay."""
    expected = {
        **LIGHTLY,
        "temperature": 0.5,
        "views_share_norm": False,
        "projector.hidden_sizes": (512,),
        "projector.output_size": 128,
        "projector.output_norm": "affine",
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.12 / 2,
        "optimizer.weight_decay": 2 * 5e-4,
    }
    view = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "blur_prob": 0.0}
    config = simclr.get_config("cifar10")
    assert_fields(config, expected)
    assert_fields(config.views["global"].view_1, view | {"jitter_style": "torchvision"})


def test_cifar10_lars_is_the_authors_recipe():
    expected = {
        "data.name": "cifar10",
        "data.image_size": 32,
        "epochs": 1000,
        "batch_size": 512,
        "temperature": 0.5,
        "encoder.depth": 18,
        "encoder.stem": "cifar",
        "projector.hidden_sizes": (512, 512),  # the released code has 3 layers unless told
        "projector.output_size": 128,
        "projector.hidden_bias": False,
        "projector.hidden_norm": True,
        "projector.output_norm": "scale",
        "optimizer.name": "lars",
        "optimizer.learning_rate": 1.0,
        "optimizer.scaling": "linear",
        "optimizer.weight_decay": 1e-4,
        "views.mean": (0, 0, 0),
        "views.std": (1, 1, 1),
    }
    view = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "blur_prob": 0.0}
    config = simclr.get_config("cifar10_lars")
    assert_fields(config, expected)
    assert_fields(config.views["global"].view_1, view)
    assert config.views["global"].count == 2 and "view_2" not in config.views["global"]


@pytest.mark.parametrize(
    ("field", "value", "valid"),
    [
        ("accumulate_steps", 2, "must be 1"),
        ("bn_groups", 2, "must be 1"),
        ("optimizer.scaling", "foo", "must be one of linear, sqrt, none"),
        ("temperature", 0.0, "must be above 0"),
        ("temperature", float("nan"), "must be a finite number"),
        ("projector.output_norm", "scales", "must be one of none, affine, scale, plain"),
    ],
)
def test_a_bad_value_is_named_with_what_would_be_valid(field, value, valid):
    config = simclr.get_config("demo")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError) as error:
        config_lib.validate(config, method.build)
        method.build(config, 10, total_steps=9, warmup_steps=0)
    message = str(error.value)
    assert message.startswith(f"config.{field}={value!r}: {valid}") and "\n" not in message


def test_a_bad_scaling_is_named():
    with pytest.raises(ValueError) as error:
        simclr.get_config("imagenet,scaling=foo")
    assert str(error.value) == "scaling='foo': must be one of linear, sqrt"
