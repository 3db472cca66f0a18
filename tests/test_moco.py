"""MoCo against a NumPy oracle written from the papers (He et al. 2019, Chen et al. 2020)."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    IMAGE_SHAPE,
    LIGHTLY,
    MEAN,
    NUM_CLASSES,
    PLAIN_VIEWS,
    STD,
    TinyEncoder,
    assert_close,
    assert_same,
    messages,
    random_batch,
    replicated,
    total_loss,
)
from flax.traverse_util import flatten_dict

from configs import moco
from moco_jax import keys as keys_lib
from moco_jax import losses, method
from moco_jax.method import MoCo
from selfsup_jax import config as config_lib
from selfsup_jax import optim
from selfsup_jax.devices import parallel
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.errors import UserError
from selfsup_jax.method import Context, Method, apply, split_views, stack_views
from selfsup_jax.models.heads import LinearClassifier, MLPHead
from selfsup_jax.models.norm import BatchNorm
from selfsup_jax.training import pretrain

KEY_PARTS = ("encoder", "projector")
PAIRS = {False: ((0, 0),), True: ((0, 0), (1, 1))}  # by whether the loss is symmetric
WIDTH = 3  # of queries and keys
MOMENTUM, DECAY, TEMPERATURE = 0.9, 0.05, 0.2


def moco_networks(hidden_sizes=(12,), output_size=WIDTH, dtype=np.float32):
    """MoCo's networks with a few hundred parameters; no `hidden_sizes` is v1's head."""
    return MoCo(
        encoder=TinyEncoder(dtype=dtype),
        projector=MLPHead(
            hidden_sizes, output_size, "torch", hidden_norm=False, output_bias=True, dtype=dtype
        ),
        classifier=LinearClassifier(NUM_CLASSES),
    )


def moco_step(networks, schedule=None, **changes):
    """(`train_step` with everything but the axis bound, its optimizer): SGD with decay on all."""
    schedule = schedule or optax.constant_schedule(0.05)
    optimizer = optim.make_optimizer(schedule, momentum=MOMENTUM, weight_decay=DECAY, exclude=())
    made = moco_method(networks, optimizer, schedule=schedule, **changes)
    return made.train_step, optimizer


def moco_method(networks, optimizer=None, queue_size=24, symmetric=False, **changes):
    arguments = {
        "network": networks,
        "loss": functools.partial(method.loss, temperature=TEMPERATURE, symmetric=symmetric),
        "start": functools.partial(method.start, image_shape=IMAGE_SHAPE, queue_size=queue_size),
        "optimizer": optimizer or optax.identity(),
        "schedule": optax.constant_schedule(0.05),
        "tau": lambda step: 0.9,
        "augment": PLAIN_VIEWS,
        "average_first": True,
        "carry": method.carry,
        "pairs": PAIRS[symmetric],
        "bn_groups": 8,
    }
    return Method(**(arguments | changes))


def init_of(networks, optimizer=None, queue_size=24):
    """`rng -> state` of a run that is about to begin."""
    return moco_method(networks, optimizer, queue_size).init_state


@functools.cache
def fresh_state(networks):
    return jax.device_get(jax.jit(init_of(networks))(jax.random.PRNGKey(0)))


def start_of(networks, optimizer, queue_size):
    """A state before its first update, the key encoder not quite the queries'."""
    state = fresh_state(networks)
    return state.replace(
        target_params=jax.tree.map(lambda x: 0.8 * x + np.float32(0.05), state.target_params),
        opt_state=jax.device_get(optimizer.init(state.online_params)),
        queue=np.asarray(keys_lib.init_queue(jax.random.PRNGKey(1), queue_size, WIDTH)),
    )


# ---------------------------------------------------------------------------- the oracle


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def oracle_logits(q, k, keys):
    """Equation 1's similarities: the own key first, then the queue's."""
    return np.concatenate([(q * k).sum(1)[:, None], q @ keys.T], axis=1) / TEMPERATURE


def oracle_loss(q, k, keys):
    """Equation 1, the mean over the queries."""
    logits = oracle_logits(q, k, keys)
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])


def oracle_encoder(params, images, groups):
    """`TinyEncoder`, normalised in `groups` of places: representations, and the groups' moments."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(
        padded[:, i : i + height, j : j + width] @ params["conv"]["kernel"][i, j]
        for i in range(3)
        for j in range(3)
    )
    y, moments = np.empty_like(x), []
    for places in groups:
        mean, var = x[places].mean((0, 1, 2)), x[places].var((0, 1, 2))
        moments.append((mean, var))
        y[places] = (x[places] - mean) / np.sqrt(var + 1e-5)
    y = y * params["bn"]["scale"] + params["bn"]["bias"]
    return np.maximum(y, 0).mean((1, 2)), moments


def oracle_head(params, x):
    """v2: linear, ReLU, linear; v1: linear (biases everywhere, no batch norm)."""
    if "hidden" in params:
        x = np.maximum(x @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    return x @ params["output"]["kernel"] + params["output"]["bias"]


def oracle_vectors(params, images, groups):
    """One view's representations, its queries or keys, and the groups' moments."""
    x, moments = oracle_encoder(params["encoder"], images, groups)
    return x, unit(oracle_head(params["projector"], x)), moments


def oracle_averages(stats, moments_of_views):
    """The encoder's running averages: one step for each view, towards the mean over its groups."""
    mean, var = stats["encoder"]["bn"]["mean"], stats["encoder"]["bn"]["var"]
    for moments in moments_of_views:
        mean = 0.9 * mean + 0.1 * np.mean([m for m, _ in moments], 0)
        var = 0.9 * var + 0.1 * np.mean([v for _, v in moments], 0)
    return {"encoder": {"bn": {"mean": mean, "var": var}}}


def oracle_gradients(online, views, keys, keys_before, labels, groups):
    """Central differences in float64 of the loss, and of the probe's loss for the probe only."""
    features = oracle_vectors(online, views[0], groups)[0]  # of view 1, constants for the probe

    def loss():
        queries = [oracle_vectors(online, images, groups)[1] for images in views]
        return sum(oracle_loss(q, k, keys_before) for q, k in zip(queries, keys, strict=True))

    def probe_loss():
        head = online["classifier"]["output"]
        logits = features @ head["kernel"] + head["bias"]
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels])

    def differences(function):
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

        return of_leaf

    gradients = {part: jax.tree.map(differences(loss), online[part]) for part in KEY_PARTS}
    gradients["classifier"] = jax.tree.map(differences(probe_loss), online["classifier"])
    return loss(), probe_loss(), gradients


def oracle_sgd(online, grads, traces, rate):
    """PyTorch's SGD: the decay joins the gradient, the rate multiplies what leaves the momentum."""
    traces = jax.tree.map(lambda w, g, v: MOMENTUM * v + g + DECAY * w, online, grads, traces)
    return jax.tree.map(lambda w, v: w - rate * v, online, traces), traces


def dealt_groups(state, step, view, batch_size, groups):
    """The places that the step's shuffling puts into each of the groups: `[G, B / G]`."""
    key = jax.random.fold_in(jax.random.fold_in(state.rng, step), 0)
    order = keys_lib.shuffle_order(jax.random.fold_in(key, view), jnp.arange(batch_size), groups)
    places = np.arange(batch_size).reshape(-1, groups)
    return np.take_along_axis(places, np.asarray(order), axis=1).T


def as_float64(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


def norm_of(*trees):
    """Of all their numbers as one vector."""
    return math.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(trees)))


# -------------------------------------------------------------------------- whole updates

STEPS, BATCH, GROUPS = 5, 12, 3  # three groups: a permutation of two undoes itself
# name -> (the head's hidden size, whether the loss is symmetric)
RECIPES = {"v1": ((), False), "v2 symmetric": ((12,), True)}


def tau_of(step):
    return 0.6 + 0.05 * step


def rate_of(step):
    return 0.3 / (1 + step)


@pytest.fixture(scope="module", params=RECIPES)
def run(request):
    """(States, the first one included; metrics; keys of a step) of five steps on five batches.

    The queue takes the keys of three steps.
    """
    hidden_sizes, symmetric = RECIPES[request.param]
    networks, keys = moco_networks(hidden_sizes), BATCH * (1 + symmetric)
    step, optimizer = moco_step(
        networks, schedule=rate_of, tau=tau_of, symmetric=symmetric, bn_groups=GROUPS
    )
    state = start_of(networks, optimizer, queue_size=3 * keys)
    states, metrics, compiled = [state], [], jax.jit(step)
    for k in range(STEPS):
        state, values = compiled(state, random_batch(BATCH, seed=k))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics, keys


@pytest.mark.slow
def test_updates_are_the_papers(run):
    """Both encoders, queue, averages and every metric after each of five steps."""
    states, metrics, num_keys = run
    first = states[0]
    online, target = as_float64((first.online_params, first.target_params))
    online_stats, target_stats = as_float64((first.online_stats, first.target_stats))
    traces = jax.tree.map(np.zeros_like, online)
    keys_before, index = np.array(first.queue, np.float64), 0
    blocks = np.arange(BATCH).reshape(GROUPS, -1)

    for k in range(STEPS):
        batch = random_batch(BATCH, seed=k)
        images = [(batch[f"view_{i}"] / 255 - MEAN) / STD for i in (1, 2)]
        symmetric = num_keys == 2 * BATCH
        queries_of, keys_of = (images, images[::-1]) if symmetric else (images[:1], images[1:])
        # The average first, so that the keys are those of the new key encoder.
        tau = tau_of(k)
        target = {
            part: jax.tree.map(lambda t, o: tau * t + (1 - tau) * o, target[part], online[part])  # noqa: B023
            for part in KEY_PARTS
        }
        made = [
            oracle_vectors(target, x, dealt_groups(first, k, view, BATCH, GROUPS))
            for view, x in enumerate(keys_of)
        ]
        keys = [vectors for _, vectors, _ in made]
        target_stats = oracle_averages(target_stats, [moments for _, _, moments in made])
        seen = [oracle_vectors(online, x, blocks) for x in queries_of]
        online_stats = oracle_averages(online_stats, [moments for _, _, moments in seen])
        picked = [
            oracle_logits(vectors, own, keys_before).argmax(1) == 0
            for (_, vectors, _), own in zip(seen, keys, strict=True)
        ]
        loss, probe_loss, grads = oracle_gradients(
            online, queries_of, keys, keys_before, batch["label"], blocks
        )
        before = online
        online, traces = oracle_sgd(online, grads, traces, rate_of(k))
        keys_before[(index + np.arange(num_keys)) % len(keys_before)] = np.concatenate(keys)
        index = (index + num_keys) % len(keys_before)

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
        np.testing.assert_allclose(state.queue, keys_before, atol=1e-4)
        assert state.queue_index == index
        assert_close(state.online_stats, online_stats, 1e-5, floor=0.1)
        assert_close(state.target_stats, target_stats, 1e-5, floor=0.1)
        expected = {
            "loss": loss,
            "contrast_top1": np.mean(picked),
            "probe_loss": probe_loss,
            "learning_rate": rate_of(k),
            "tau": tau,
            **{f"grad_norm/{part}": norm_of(tree) for part, tree in grads.items()},
            "update_norm": norm_of(change(online, before)),
            "finite": 1.0,
        }
        assert set(metrics[k]) == {*expected, "probe_top1", "outputs"}
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[k][name], value, rtol=2e-4, atol=1e-7, err_msg=name)
        outputs = metrics[k]["outputs"]
        np.testing.assert_allclose(outputs.prediction, [v for _, v, _ in seen], atol=1e-4)
        np.testing.assert_allclose(outputs.representation, [x for x, _, _ in seen], atol=1e-4)
        np.testing.assert_allclose(outputs.target, keys, atol=1e-4)
        assert_same(outputs.projection, outputs.prediction)
    assert norm_of(grads) > 0.1 and norm_of(change(online, before)) > 0.01


# ------------------------------------------------------------------- losses and gradients


def vectors(*shape, seed=0):
    return unit(np.random.default_rng(seed).normal(size=shape))


def test_loss_is_the_papers():
    q, k, keys = vectors(16, 5), vectors(16, 5, seed=1), vectors(40, 5, seed=2)
    k[:6] = unit(q[:6] + 0.2 * k[:6])  # of some the own key is the nearest
    args = (x.astype(np.float32) for x in (q, k, keys))
    loss, top1 = jax.jit(losses.info_nce)(*args, TEMPERATURE)
    np.testing.assert_allclose(loss, oracle_loss(q, k, keys), rtol=1e-5)
    assert top1 == np.mean((q * k).sum(1) > (q @ keys.T).max(1)) >= 6 / 16


def test_loss_is_precise_near_its_minimum():
    """Own keys near, the queue's far: the digits of loss and gradient that are left are right."""
    temperature = 0.04
    q, k = np.eye(6), unit(np.eye(6) + 0.02 * vectors(6, 6))
    keys = -unit(np.eye(6) + 0.2 * vectors(6, 6, seed=1))

    def oracle(q):
        excess = (q @ keys.T - (q * k).sum(1)[:, None]) / temperature
        return np.mean(np.log1p(np.exp(excess).sum(1)))

    def cross_entropy(q):
        logits = losses.contrastive_logits(q, *constants, temperature)
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    expected = oracle(q)
    assert 1e-12 < expected < 1e-8
    gradient = np.zeros_like(q)
    for i in np.ndindex(q.shape):
        step = np.zeros_like(q)
        step[i] = 1e-5
        gradient[i] = (oracle(q + step) - oracle(q - step)) / 2e-5
    constants = k.astype(np.float32), keys.astype(np.float32)

    def errors(loss):
        value, got = jax.value_and_grad(loss)(q.astype(np.float32))
        return abs(value / expected - 1), np.abs(got - gradient).max() / np.abs(gradient).max()

    assert max(errors(lambda q: losses.info_nce(q, *constants, temperature)[0])) < 1e-3
    assert min(errors(cross_entropy)) > 0.1


def test_loss_takes_keys_as_constants():
    """The gradient is that of constant keys even where they depend on the same variable."""
    q, towards = vectors(6, 5), vectors(5, 5, seed=1)

    def loss(q):
        key = q @ towards
        return losses.info_nce(q, key, jnp.concatenate([key, -q]), TEMPERATURE)[0]

    gradient, key = np.zeros_like(q), q @ towards
    for i in np.ndindex(q.shape):
        step = np.zeros_like(q)
        step[i] = 1e-6
        above, below = (
            oracle_loss(x, key, np.concatenate([key, -q])) for x in (q + step, q - step)
        )
        gradient[i] = (above - below) / 2e-6
    got = jax.jit(jax.grad(loss))(q.astype(np.float32))
    np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_keys_and_queue():
    networks = moco_networks()
    state = fresh_state(networks)
    views = np.random.default_rng(7).normal(size=(2, BATCH, *IMAGE_SHAPE)).astype(np.float32)

    made = moco_method(networks, bn_groups=1)

    def loss(params, target_params, queue_):
        with_queue = state.replace(queue=queue_)
        labels = random_batch(BATCH, seed=7)["label"]
        return total_loss(made, with_queue, views, labels)(params, target_params)[0]

    queue_ = vectors(24, WIDTH, seed=2).astype(np.float32)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(
        state.online_params, state.target_params, queue_
    )
    assert np.abs(grads[0]["encoder"]["conv"]["kernel"]).max() > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[1:]))


# ------------------------------------------------------------------------------ the queue


def test_queue_holds_the_newest_keys(run):
    """The first key is the oldest, also when the newest have gone back to the array's start."""
    states, metrics, num_keys = run
    came = [*states[0].queue]
    for k in range(STEPS):
        came += [*metrics[k]["outputs"].target.reshape(num_keys, WIDTH)]
        found = np.roll(states[k + 1].queue, -states[k + 1].queue_index, axis=0)
        np.testing.assert_array_equal(found, came[-3 * num_keys :])
    assert [s.queue_index // num_keys for s in states] == [0, 1, 2, 0, 1, 2]  # it wrapped around


@pytest.mark.parametrize("keys", [1, 4, 12])
def test_enqueue_wraps_around(keys):
    held, index = np.zeros((12, 2), np.float32), jnp.int32(0)
    for k in range(1, 30):
        held, index = keys_lib.enqueue(
            held, index, np.full((keys, 2), k, np.float32), after=np.float32(0)
        )
        expected = np.repeat(np.maximum(np.arange(k - 12 // keys, k) + 1, 0), keys)
        np.testing.assert_array_equal(jnp.roll(held, -index, axis=0)[:, 0], expected)
        assert index.dtype == jnp.int32 and 0 <= index < 12


def test_keys_are_float32_unit_vectors(run):
    for state in run[0]:
        assert state.queue.dtype == np.float32 and state.queue_index.dtype == np.int32
        np.testing.assert_allclose(np.linalg.norm(state.queue, axis=1), 1, rtol=1e-6)


def test_keys_of_a_half_precision_encoder_are_float32_unit_vectors():
    networks, state = moco_networks(dtype=jnp.bfloat16), fresh_state(moco_networks())
    images = np.random.default_rng(0).normal(size=(BATCH, *IMAGE_SHAPE)).astype(np.float32)
    variables = {"params": state.target_params, "batch_stats": state.target_stats}
    (_, keys), _ = jax.jit(lambda v, x: apply(networks, v, x, BatchLayout()))(variables, images)
    assert keys.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, rtol=1e-6)


# --------------------------------------------------------------- devices and microbatches

MANY, KEPT = 64, 256  # the least batch that eight devices can deal out to eight groups


def spread(batch, devices, accumulate_steps):
    """The global batch as `devices` devices hold it: a part of every microbatch for each."""

    def rows(x):
        x = x.reshape(accumulate_steps, devices, -1, *x.shape[1:])
        return np.swapaxes(x, 0, 1).reshape(devices, -1, *x.shape[3:])

    return jax.tree.map(rows, batch)


@functools.cache
def updates(devices, bn_groups=8, symmetric=False, accumulate_steps=1, batch_size=MANY):
    """[(state, metrics, outputs)] after each of two updates; `devices` 0 is plain `jax.jit`.

    The outputs are of the global batch, `[V, B, ...]`, in its order.
    """
    networks = moco_networks()
    step, optimizer = moco_step(
        networks, symmetric=symmetric, bn_groups=bn_groups, accumulate_steps=accumulate_steps
    )
    state, found = start_of(networks, optimizer, KEPT), []
    batches = [random_batch(MANY, seed=k) for k in range(2)]
    batches = [jax.tree.map(lambda x: x[:batch_size], batch) for batch in batches]
    if devices == 0:
        compiled = jax.jit(step)
        for batch in batches:
            state, metrics = compiled(state, batch)
            found.append(jax.device_get((state, metrics, metrics.pop("outputs"))))
        return found

    compiled = jax.pmap(
        functools.partial(step, axis_name="d"), axis_name="d", devices=jax.devices()[:devices]
    )
    state = replicated(state, devices, "d")
    order = spread(np.arange(batch_size), devices, accumulate_steps).reshape(-1)
    for batch in batches:
        state, metrics = compiled(state, spread(batch, devices, accumulate_steps))
        outputs = parallel.gather_rows(metrics.pop("outputs"), order)
        per_device = jax.device_get((state, metrics))
        first = jax.tree.map(lambda x: x[0], per_device)
        for device in range(1, devices):  # replicas never drift apart
            assert_same(jax.tree.map(lambda x, d=device: x[d], per_device), first)
        found.append((*first, outputs))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {}),
        (2, {}),
        (4, {}),
        (8, {}),
        (8, {"bn_groups": 2, "symmetric": True}),  # a group spans four devices
        (4, {"accumulate_steps": 2}),
    ],
)
def test_devices_do_not_change_the_update(devices, changes):
    """Metrics, outputs, parameters, queue, averages and momentum after two global batches."""
    (a, a_metrics, a_outputs), (b, b_metrics, b_outputs) = (
        updates(n, **changes)[-1] for n in (devices, 0)
    )
    assert_close(a_metrics, b_metrics, floor=1e-2)
    assert_close(a_outputs, b_outputs, floor=0.1)
    for field in ("online_params", "target_params", "online_stats", "target_stats", "queue"):
        assert_close(getattr(a, field), getattr(b, field), floor=0.1)
    assert_close(a.opt_state, b.opt_state, floor=1.0)  # sums of gradients of that size
    views = 2 if "symmetric" in changes else 1
    assert a.queue_index == b.queue_index == 2 * MANY * views % KEPT
    assert a.step == b.step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "changes"),
    [(0, {}), (8, {}), (8, {"bn_groups": 2, "symmetric": True}), (4, {"accumulate_steps": 2})],
)
def test_keys_are_enqueued_in_the_order_of_the_global_batch(devices, changes):
    first, second = updates(devices, **changes)
    keys = [outputs.target.reshape(-1, WIDTH) for _, _, outputs in (first, second)]
    found = second[0].queue[: 2 * len(keys[0])]
    np.testing.assert_array_equal(found, np.concatenate(keys))


@pytest.mark.slow
def test_microbatches_see_the_queue_as_it_was():
    """Two microbatches of four groups are two passes over the halves, and then one update."""
    state, metrics, outputs = updates(0, accumulate_steps=2)[0]
    networks = moco_networks()
    step, optimizer = moco_step(networks, bn_groups=4)
    start, halves = start_of(networks, optimizer, KEPT), []
    compiled, batch = jax.jit(step), random_batch(MANY, seed=0)
    for rows in (slice(0, MANY // 2), slice(MANY // 2, MANY)):
        halves.append(compiled(start, {name: x[rows] for name, x in batch.items()}))
        # The averages go on; all else is from before the update.
        after = halves[-1][0]
        start = start.replace(online_stats=after.online_stats, target_stats=after.target_stats)
    (one, one_metrics), (two, two_metrics) = jax.device_get(halves)

    for name in ("loss", "contrast_top1", "probe_loss"):
        mean = (one_metrics[name] + two_metrics[name]) / 2
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one.online_params, two.online_params)
    assert_close(state.online_params, mean, floor=0.1)
    assert_close(state.target_params, one.target_params, floor=0.1)
    for field in ("online_stats", "target_stats"):
        assert_close(getattr(state, field), getattr(two, field), floor=0.1)
    keys = [metrics["outputs"].target[0] for metrics in (one_metrics, two_metrics)]
    np.testing.assert_allclose(state.queue[:MANY], np.concatenate(keys), atol=1e-5)
    np.testing.assert_array_equal(state.queue[MANY:], start.queue[MANY:])
    assert outputs.target.shape == (1, MANY, WIDTH)


def test_a_step_sends_no_more_images_than_a_device_holds():
    """Each key's image travels once, on any number of devices; only keys go to everyone."""
    local = 16
    step, optimizer = moco_step(moco_networks())
    state = start_of(moco_networks(), optimizer, KEPT)
    for devices in (2, 8):
        mapped = jax.pmap(
            functools.partial(step, axis_name="d"), axis_name="d", devices=jax.devices()[:devices]
        )
        states = replicated(state, devices, "d")
        sent = messages(mapped.lower(states, spread(random_batch(local * devices, 0), devices, 1)))
        keys = local * WIDTH
        assert sent["all_to_all"] == [local * math.prod(IMAGE_SHAPE), keys]
        assert sent["all_gather"] == [keys]
        assert set(sent) <= {"all_to_all", "all_gather", "all_reduce"}


# ------------------------------------------------------------------- shuffled batch norm


class Telling(nn.Module):
    """Tells of its batch-norm group and of nothing else: the value of a pixel that is always black.

    Normalised, it is the group's mean over its deviation.
    """

    dtype: type = np.float32

    @nn.compact
    def __call__(self, x, layout=None):
        return BatchNorm(name="bn")(x, layout)[:, 0, 0]


class Same(nn.Module):
    """A head that changes nothing."""

    def __call__(self, x, layout=None):
        return x


TELLING = MoCo(Telling(), Same(), None)
TOLD = 256  # images, in eight groups of 32


def told(shuffled, devices=0, seed=0):
    """Queries, and two views' keys, of images that `Telling` sees only the statistics of.

    Batch norm has eight groups; the keys' images are shuffled over them, or not.
    """
    rng = np.random.default_rng(0)
    views = np.zeros((3, TOLD, 1, 2, 16), np.float32)
    views[..., 1, :] = rng.normal(size=(TOLD, 1, 16)) + 0.2 * rng.normal(size=(3, TOLD, 1, 16))
    params = {"encoder": {"bn": {"scale": np.ones(16), "bias": np.zeros(16)}}, "projector": {}}
    stats = {"encoder": {"bn": {"mean": np.zeros(16), "var": np.ones(16)}}}
    key = jax.random.PRNGKey(seed)

    def both(views, index, axis_name=None):
        views = jnp.moveaxis(views, 1, 0)
        variables = {"params": params, "batch_stats": stats}
        context = Context(key, index, 8, axis_name)
        (_, query), _ = apply(TELLING, variables, views[0], context.layout(1))
        if shuffled:
            keys, _ = keys_lib.encode_keys(TELLING, variables, views[1:], context)
        else:
            (_, keys), _ = apply(TELLING, variables, stack_views(views[1:]), context.layout(2))
            keys = split_views(keys)
        return query, jnp.moveaxis(keys, 0, 1)

    index = np.arange(TOLD, dtype=np.int32)
    rows = views.swapaxes(0, 1)
    if devices == 0:
        query, keys = jax.jit(both)(rows, index)
    else:
        mapped = jax.pmap(
            functools.partial(both, axis_name="d"), axis_name="d", devices=jax.devices()[:devices]
        )
        query, keys = mapped(*spread((rows, index), devices, 1))
    return np.reshape(query, (TOLD, 16)), np.reshape(keys, (TOLD, 2, 16)).swapaxes(0, 1)


def found_by_statistics(query, keys):
    """How many queries have their own key among the nearest; a group's keys are all alike."""
    similar = query @ keys.T
    return np.mean(np.diag(similar) > similar.max(1) - 1e-4)


@pytest.mark.parametrize("devices", [0, 8])
def test_statistics_give_the_positive_away_without_shuffling(devices):
    query, keys = told(shuffled=False, devices=devices)
    for view in keys:
        assert found_by_statistics(query, view) > 0.95


@pytest.mark.parametrize("devices", [0, 8])
def test_shuffled_statistics_tell_nothing(devices):
    """At chance: a group of queries has as many of its keys in each of the eight groups."""
    query, keys = told(shuffled=True, devices=devices)
    for view in keys:
        assert found_by_statistics(query, view) == 1 / 8


@pytest.mark.slow
def test_each_view_and_each_step_is_dealt_anew():
    """Which images share a group, by their keys: never two of a cell, and other ones each time."""
    partners = []
    for seed in (0, 1):
        for keys in told(shuffled=True, seed=seed)[1]:
            alike = keys @ keys.T > 1 - 1e-4  # [TOLD, TOLD]: in the same group
            np.testing.assert_array_equal(alike.sum(0), TOLD // 8)
            cells = alike.reshape(TOLD // 8, 8, TOLD // 8, 8)
            np.testing.assert_array_equal(cells.sum(3), 1)  # of each cell one
            partners.append(alike)
    for i, a in enumerate(partners):
        for b in partners[:i]:
            assert (a & b).sum() < 0.3 * a.sum()  # by chance: 1 in 8, and oneself


# --------------------------------------------------------------------------------- memory


@pytest.mark.slow
def test_a_step_holds_no_second_queue():
    """With the state donated, a queue of the paper's size is written where it lies."""
    networks, local, size = moco_networks(output_size=128), 8, 65536
    step, optimizer = moco_step(networks, bn_groups=2)
    mapped = jax.pmap(
        functools.partial(step, axis_name="d"),
        axis_name="d",
        donate_argnums=0,
        devices=jax.devices()[:2],
    )
    state = jax.eval_shape(init_of(networks, optimizer, size), jax.random.PRNGKey(0))
    args = (state, random_batch(local, seed=0))
    on_both = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), args)
    memory = mapped.lower(*on_both).compile().memory_analysis()
    queue_bytes = size * 128 * 4
    assert memory.alias_size_in_bytes > queue_bytes  # the new queue lies where the old one did
    # Logits and their gradient are an eighth of it, all else is far smaller.
    assert 2 * local * size * 4 == queue_bytes / 8
    assert memory.temp_size_in_bytes < queue_bytes / 2


# ------------------------------------------------------------------------- initialisation


@pytest.mark.slow
def test_both_encoders_start_equal_in_buffers_of_their_own():
    state = init_of(moco_networks(hidden_sizes=()), optax.trace(0.9))(jax.random.PRNGKey(0))
    assert set(state.target_params) == {*KEY_PARTS}
    assert_same(state.target_params, {part: state.online_params[part] for part in KEY_PARTS})
    assert_same(state.target_stats, state.online_stats)
    leaves = jax.tree.leaves(state)
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_the_queue_starts_in_random_directions():
    held = keys_lib.init_queue(jax.random.PRNGKey(0), 4096, 16)
    assert held.shape == (4096, 16) and held.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(held, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(held.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(held.T @ held / 4096, np.eye(16) / 16, atol=0.01)


# -------------------------------------------------------------------------------- configs


def assert_fields(config, expected):
    fields = flatten_dict(config.to_dict(), sep=".")
    assert {name: fields[name] for name in expected} == expected


def both_views(fields):
    """One section is that of both."""
    alike = {f"views.global.view_1.{name}": value for name, value in fields.items()}
    return {"views.global.count": 2} | alike


def built(config, **changes):
    return method.build(config, 10, **({"total_steps": 100, "warmup_steps": 0} | changes))


IMAGENET = {
    "method": "moco",
    "epochs": 200,
    "batch_size": 256,
    "accumulate_steps": 1,
    "bn_groups": 8,
    "tau_base": 0.999,
    "tau_schedule": "constant",
    "queue_size": 65536,
    "symmetric": False,
    "data.name": "imagenet2012",
    "data.image_size": 224,
    "views.global.area": (0.2, 1.0),
    "data.resize_method": "bilinear",
    "encoder.depth": 50,
    "encoder.stem": "imagenet",
    "encoder.padding": "torch",
    "encoder.kernel_init": "kaiming_fan_out",
    "encoder.zero_init_gamma": False,
    "encoder.bn_decay": 0.9,
    "encoder.bn_epsilon": 1e-5,
    "encoder.bn_unbiased_average": True,
    "projector.output_size": 128,
    "projector.linear_init": "torch",
    "projector.hidden_norm": False,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.03,
    "optimizer.scaling": "linear",
    "optimizer.warmup_epochs": 0,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.rate_inside_momentum": False,
    "optimizer.weight_decay": 1e-4,
    "optimizer.exclude": (),
    "views.mean": (0.485, 0.456, 0.406),
    "views.std": (0.229, 0.224, 0.225),
    **both_views(
        {
            "flip_prob": 0.5,
            "grayscale_prob": 0.2,
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.4,
            "jitter_style": "torchvision",
            "solarize_prob": 0.0,
        }
    ),
}


@pytest.mark.parametrize("preset", ["imagenet", "v1", "cifar10", "imagenette", "demo", "folder"])
def test_every_preset_is_valid(preset):
    config = moco.get_config(preset)
    config_lib.validate(config, method.build)
    made = built(config)
    assert_fields(config, {"method": "moco", "optimizer.exclude": ()})
    keys = config.batch_size * (2 if config.symmetric else 1)
    assert config.queue_size % keys == 0
    assert "view_2" not in config.views["global"]
    assert len(made.augment.groups["global"]) == 2 and len(set(made.augment.groups["global"])) == 1
    assert made.pairs == PAIRS[config.symmetric]
    (note,) = made.notes
    assert f"{config.queue_size:,} keys" in note
    assert f"last {config.queue_size // keys:,} steps" in note
    groups = config.bn_groups
    assert f"{groups} groups of {config.batch_size // groups}, keys shuffled" in note


def test_imagenet_is_v2s_recipe():
    config = moco.get_config()
    assert_fields(config, IMAGENET)
    assert_fields(
        config,
        {
            "temperature": 0.2,
            "projector.hidden_sizes": (2048,),
            "optimizer.schedule": "cosine",
            **both_views(
                {
                    "jitter_prob": 0.8,
                    "hue": 0.1,
                    "blur_prob": 0.5,
                    "blur_sigma_min": 0.1,
                    "blur_sigma_max": 2.0,
                }
            ),
        },
    )
    rate = built(config, total_steps=1000).schedule
    expected = [0.03, 0.015 * (1 + math.cos(math.pi / 4)), 0.015, 0]
    np.testing.assert_allclose([rate(k) for k in (0, 250, 500, 1000)], expected, atol=1e-8)


def test_v1_is_v1s_recipe():
    config = moco.get_config("v1")
    assert_fields(config, IMAGENET)
    assert_fields(
        config,
        {
            "temperature": 0.07,
            "projector.hidden_sizes": (),
            "optimizer.schedule": "step",
            **both_views({"jitter_prob": 1.0, "hue": 0.4, "blur_prob": 0.0}),
        },
    )
    # By tens after 120 and after 160 of 200 epochs; ImageNet has 5,004 steps in each.
    made = built(config, total_steps=200 * 5004)
    rate = made.schedule
    drops = {0: 0.03, 120: 0.003, 160: 0.0003}
    for epoch, expected in drops.items():
        np.testing.assert_allclose(rate(epoch * 5004 + 1), expected, rtol=1e-5)
        np.testing.assert_allclose(rate(max(0, epoch * 5004 - 1)), 10 * expected if epoch else 0.03)
    np.testing.assert_allclose(rate(200 * 5004), 0.0003, rtol=1e-5)
    np.testing.assert_allclose(made.tau(7), 0.999, rtol=1e-6)
    state = jax.eval_shape(made.init_state, jax.random.PRNGKey(0))
    assert set(state.online_params["projector"]) == {"output"}
    assert state.queue.shape == (65536, 128) and state.queue.dtype == np.float32


def test_cifar10_is_the_benchmarks_recipe():
    """Its loss is the mean of both directions: for their sum half the rate and twice the decay."""
    expected = {
        **LIGHTLY,
        "tau_base": 0.99,
        "queue_size": 4096,
        "temperature": 0.1,
        "symmetric": True,
        "projector.hidden_sizes": (512,),
        "projector.output_size": 128,
        "optimizer.momentum": 0.9,
        "optimizer.learning_rate": 0.12 / 2,
        "optimizer.weight_decay": 2 * 5e-4,
        "optimizer.schedule": "cosine",
        "data.image_size": 32,
        "encoder.depth": 18,
        "encoder.stem": "cifar",
        **both_views({"blur_prob": 0.0}),
    }
    assert_fields(moco.get_config("cifar10"), expected)


@pytest.mark.parametrize(
    ("preset", "name", "most", "depth"),
    [
        ("imagenette", "imagenette/160px-v2", 9469 / 2, 18),
        ("demo", "digits", 2000, 10),
        ("folder", "folder", 4096, 18),
    ],
)
def test_small_presets_have_a_small_queue(preset, name, most, depth):
    """Of no more than half of the images, and a key encoder that follows faster."""
    config = moco.get_config(preset)
    v2 = ("tau_schedule", "optimizer.name", "optimizer.momentum", "encoder.padding")
    expected = {"encoder.depth": depth, "data.name": name, "symmetric": False}
    assert_fields(config, expected | {field: IMAGENET[field] for field in v2})
    assert config.queue_size <= most and config.tau_base < 0.999


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("queue_size=1000", r"queue_size=1000: .*multiple of the 64 keys.*nearest: 1024"),
        ("queue_size=-64", r"queue_size=-64: .*multiple of the 64 keys.*nearest: 64"),
        ("queue_size=0", r"queue_size=0: .*multiple of the 64 keys.*nearest: 64"),
        ("queue_size=32", r"queue_size=32: .*multiple of the 64 keys.*nearest: 64"),
        (
            "symmetric=True,queue_size=192",
            r"queue_size=192: .*multiple of the 128 keys.*batch_size=64 x 2 views.*nearest: 256",
        ),
        # Eight devices here: what is dealt out to 8 groups must be a multiple of 64.
        ("batch_size=32", r"batch_size=32: .*multiple of 64 .*devices 8.*bn_groups=8.*nearest: 64"),
        (
            "batch_size=96,queue_size=960",
            r"batch_size=96: .*multiple of 64 .*devices 8.*bn_groups=8.*nearest: 128",
        ),
        (
            "batch_size=32,accumulate_steps=2",
            r"batch_size=32: .*multiple of 64 .*bn_groups=8.*nearest: 64",
        ),
        ("temperature=0.0", r"temperature=0.0: must be above 0"),
        ("temperature=-0.2", r"temperature=-0.2: must be above 0"),
        ("bn_groups=0", r"bn_groups=0: must be at least 1"),
        ("tau_base=1.5", r"tau_base=1.5: must be from 0 to 1"),
        ("projector.linear_init='torhc'", r"projector.linear_init='torhc': .*did you mean torch"),
        ("tau_schedule='step'", r"tau_schedule='step': must be one of cosine, constant"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(fields, message):
    """The field, its value, and what would be valid."""
    config = moco.get_config(f"demo,bn_groups=8,{fields}")
    with pytest.raises(UserError, match=rf"^config\.{message}") as error:
        config_lib.validate(config, method.build)
        built(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields", ["batch_size=32,bn_groups=4", "batch_size=8,bn_groups=1", "symmetric=True"]
)
def test_what_can_be_dealt_out_is_taken(fields):
    config = moco.get_config(f"demo,bn_groups=8,{fields}")
    config_lib.validate(config, method.build)
    assert built(config).notes


@pytest.mark.parametrize("fields", ["bn_groups=1", "bn_groups=2,accumulate_steps=2"])
def test_one_group_is_warned_of(fields):
    """Where nothing can be shuffled, whether by the config's groups or by its microbatches."""
    config = moco.get_config(f"demo,bn_groups=8,{fields}")
    config_lib.validate(config, method.build)
    _, warning = built(config).notes
    assert warning.startswith(f"WARNING: config.bn_groups={config.bn_groups} leaves")


@pytest.mark.slow
def test_a_queue_of_more_keys_than_images_is_warned_of(caplog, tmp_path):
    """Before a run trains anything."""

    class AboutToTrain(Exception):
        pass

    def build(config, num_classes, total_steps, warmup_steps):
        if num_classes:  # the second time, with the data at hand
            raise AboutToTrain

    def warnings(images):
        config = moco.get_config(f"demo,data.train_split='train[:{images}]',eval.enabled=False")
        with pytest.raises(AboutToTrain):
            pretrain.pretrain(config, str(tmp_path), build)
        return [record.getMessage() for record in caplog.records]

    assert not warnings(4000)
    (told,) = warnings(1000)
    assert "config.queue_size=1024" in told and "1000" in told


@pytest.mark.slow
def test_a_tie_is_no_find():
    """All vectors alike: the own key is not told from the queue's."""
    same = np.ones((4, 3), np.float32) / np.sqrt(3, dtype=np.float32)
    assert losses.info_nce(same, same, same, 0.1)[1] == 0
