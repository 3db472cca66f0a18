"""Heads on a frozen encoder and finetuning, against NumPy and on several devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    IMAGE_SHAPE,
    MEAN,
    NO_AUGMENTATION,
    NUM_CLASSES,
    STD,
    TinyEncoder,
    assert_close,
    assert_same,
    flatten,
    random_batch,
    replicated,
)

from selfsup_jax import optim
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.evaluation import supervised

BATCH = 16
FEATURES = 4
ENCODER = TinyEncoder(FEATURES)
MOMENTUM, DECAY = 0.9, 0.01


@pytest.fixture(scope="module")
def variables():
    """An encoder whose running averages are not those of any batch."""
    made = jax.device_get(ENCODER.init(jax.random.PRNGKey(5), jnp.zeros((1, *IMAGE_SHAPE))))
    return {
        "params": made["params"],
        "batch_stats": jax.tree.map(lambda x: x + np.float32(0.3), made["batch_stats"]),
    }


def run_steps(step, state, batches, devices=None):
    """[(state, metrics)] after each batch: under `jit`, or spread over so many devices."""
    found = []
    if devices is None:
        each = jax.jit(step)
    else:
        bound = functools.partial(step, axis_name="d")
        each = jax.pmap(bound, axis_name="d", devices=jax.devices()[:devices])
        state = replicated(state, devices, "d")
        cut = lambda x: x.reshape(devices, -1, *x.shape[1:])  # noqa: E731
        batches = [jax.tree.map(cut, batch) for batch in batches]
    for batch in batches:
        state, metrics = each(state, batch)
        found.append(jax.device_get((state, metrics)))
        if devices is not None:
            for leaf in jax.tree.leaves(found[-1]):  # every device has the same
                np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
            found[-1] = jax.tree.map(lambda x: x[0], found[-1])
    return found


def normalised(batch):
    return ((batch["view_1"] / 255.0 - np.asarray(MEAN)) / np.asarray(STD)).astype(np.float32)


def flips(prob):
    """One view that is flipped, with that probability, and normalised."""
    view = dataclasses.replace(NO_AUGMENTATION, flip_prob=prob)
    return Augmentation({"global": (view,)}, MEAN, STD)


# --------------------------------------------------------- linear heads on a frozen encoder

RATES = (0.02, 0.3, 2.0)
SCHEDULE = optax.linear_schedule(1.0, 0.4, 4)


def probe(variables, rates=RATES, flip_prob=0.0, nesterov=True, **changes):
    """(step, state before the first)."""
    optimizer = optax.chain(
        optax.add_decayed_weights(DECAY), optax.sgd(SCHEDULE, MOMENTUM, nesterov=nesterov)
    )
    step = functools.partial(
        supervised.probe_step,
        represent=ENCODER.apply,
        optimizer=optimizer,
        schedule=SCHEDULE,
        learning_rates=rates,
        augment=flips(flip_prob),
        **changes,
    )
    state = supervised.init_probes(
        jax.random.PRNGKey(1),
        variables,
        num_features=FEATURES,
        num_classes=NUM_CLASSES,
        num_heads=len(rates),
        optimizer=optimizer,
    )
    return step, jax.device_get(state)


def sgd_by_hand(representations, labels, rate, nesterov):
    """One head's (kernel, bias, loss, top-1) after each step: softmax regression from zero."""
    w = {"kernel": np.zeros((FEATURES, NUM_CLASSES)), "bias": np.zeros(NUM_CLASSES)}
    speed = {k: np.zeros_like(v) for k, v in w.items()}
    found = []
    for k, (x, y) in enumerate(zip(representations, labels, strict=True)):
        logits = x @ w["kernel"] + w["bias"]
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        loss = -np.mean(np.log(p[np.arange(len(y)), y]))
        top1 = np.mean(logits.argmax(axis=1) == y)
        error = (p - np.eye(NUM_CLASSES)[y]) / len(y)
        grads = {"kernel": x.T @ error, "bias": error.sum(axis=0)}
        factor = 1.0 - 0.6 * min(k, 4) / 4  # SCHEDULE
        for name in w:
            grad = grads[name] + DECAY * w[name]
            speed[name] = MOMENTUM * speed[name] + grad
            direction = grad + MOMENTUM * speed[name] if nesterov else speed[name]
            w[name] = w[name] - rate * factor * direction
        found.append((w["kernel"].copy(), w["bias"].copy(), loss, top1))
    return found


@pytest.fixture(scope="module")
def batches():
    return [random_batch(BATCH, seed) for seed in range(5)]


@pytest.fixture(scope="module")
def probe_steps(variables, batches):
    step, state = probe(variables)
    return run_steps(step, state, batches)


@pytest.mark.parametrize("nesterov", [True, False])
def test_each_head_is_sgd_with_its_rate(variables, batches, probe_steps, nesterov):
    """Softmax regression in NumPy on the encoder's representation, step by step."""
    if not nesterov:
        step, state = probe(variables, nesterov=False)
        probe_steps = run_steps(step, state, batches)
    # In evaluation mode: the running averages, and no example of the others'.
    x = [np.asarray(ENCODER.apply(variables, normalised(b)), np.float64) for b in batches]
    labels = [b["label"] for b in batches]
    expected = [sgd_by_hand(x, labels, rate, nesterov) for rate in RATES]
    for k, (state, metrics) in enumerate(probe_steps):
        head = state.online_params["classifier"]
        for i in range(len(RATES)):
            kernel, bias, _, top1 = expected[i][k]
            np.testing.assert_allclose(head["kernel"][i], kernel, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(head["bias"][i], bias, rtol=1e-4, atol=1e-5)
            assert metrics[f"top1/rate_{RATES[i]:g}"] == pytest.approx(top1)
        best = int(np.argmin([e[k][2] for e in expected]))
        assert metrics["loss"] == pytest.approx(expected[best][k][2], rel=1e-4)
        assert metrics["learning_rate_factor"] == pytest.approx(1 - 0.15 * k)
        assert metrics["finite"] and state.step == k + 1
    lengths = np.linalg.norm(head["kernel"], axis=(1, 2))
    assert (lengths[1:] > 2 * lengths[:-1]).all()  # they are not the same head thrice


def test_a_head_alone_is_the_one_among_others(variables, batches, probe_steps):
    step, state = probe(variables, RATES[1:2])
    state, metrics = run_steps(step, state, batches)[-1]
    together, told = probe_steps[-1]
    assert_close(state.online_params, jax.tree.map(lambda x: x[1:2], together.online_params))
    assert metrics["top1"] == pytest.approx(told[f"top1/rate_{RATES[1]:g}"])
    assert not [name for name in metrics if "/" in name]


def test_the_encoder_stays_as_it_was(variables, probe_steps):
    """Bit by bit, parameters and running averages, and nothing else is carried along."""
    for state, _ in probe_steps:
        assert_same(state.target_params, {"encoder": variables["params"]})
        assert_same(state.target_stats, {"encoder": variables["batch_stats"]})
        assert state.online_params.keys() == {"classifier"} and state.online_stats == {}


@pytest.mark.slow
def test_no_gradient_passes_back_to_the_encoder(probe_steps):
    params = probe_steps[-1][0].online_params
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, FEATURES)).astype(np.float32)
    labels = rng.integers(0, NUM_CLASSES, 6)
    loss = lambda params, x: supervised.probe_losses(params, x, labels)[0]  # noqa: E731
    to_params, to_x = jax.grad(loss, argnums=(0, 1))(params, x)
    np.testing.assert_array_equal(to_x, 0.0)
    assert all(np.abs(g).min(axis=-1).max() > 0 for g in jax.tree.leaves(to_params))


def test_a_head_that_diverges_leaves_the_others_alone(variables, batches, probe_steps):
    """A rate beyond float32 before all others: it stays finite, and no part of the loss."""
    found = run_steps(*probe(variables, (1e38, *RATES)), 2 * batches)
    for state, metrics in found:
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.online_params))
        assert metrics["finite"]
    for k in range(len(batches)):
        state, metrics = found[k]
        others = jax.tree.map(lambda x: x[1:], state.online_params)
        assert_close(others, probe_steps[k][0].online_params)
        if k:
            assert metrics["loss"] == pytest.approx(probe_steps[k][1]["loss"], rel=1e-5)
    # Where every head has, that is told.
    step, state = probe(variables, (1e38,))
    images = [b | {"view_1": b["view_1"] // 2 + 60} for b in batches]
    assert not all(metrics["finite"] for _, metrics in run_steps(step, state, 2 * images))


@pytest.fixture(scope="module")
def flipped_probe(variables, batches):
    """(step, first state, what `jit` makes of it), with flips."""
    step, state = probe(variables, flip_prob=0.5)
    return step, state, run_steps(step, state, batches[:3])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_probes_are_the_same_on_any_number_of_devices(flipped_probe, probe_steps, batches, devices):
    """With flips, which are drawn for each example wherever it lies."""
    step, state, expected = flipped_probe
    found = run_steps(step, state, batches[:3], devices)
    for (state, metrics), (wanted, wanted_metrics) in zip(found, expected, strict=True):
        assert_close(state.online_params, wanted.online_params, relative=1e-4)
        assert metrics.keys() == wanted_metrics.keys()
        assert metrics["loss"] == pytest.approx(wanted_metrics["loss"], rel=1e-4)
    a, b = (x[2][0].online_params["classifier"]["kernel"] for x in (expected, probe_steps))
    assert np.abs(a - b).max() > 1e-3  # the flips are no matter of form


def test_probes_of_microbatches_are_those_of_the_batch(variables, batches, probe_steps):
    found = run_steps(*probe(variables, accumulate_steps=4), batches)
    for (state, metrics), (wanted, told) in zip(found, probe_steps, strict=True):
        assert_close(state.online_params, wanted.online_params, relative=1e-4)
        assert metrics["loss"] == pytest.approx(told["loss"], rel=1e-4)


# ------------------------------------------------------------- the encoder and a classifier


def sgd(rate, exclude=("bias$",)):
    schedule = optax.constant_schedule(rate)
    return optim.make_optimizer(schedule, momentum=MOMENTUM, weight_decay=DECAY, exclude=exclude)


def finetune(variables, rates=(0.1, 1.0), flip_prob=0.0, **changes):
    """(step, state before the first); the rates are the encoder's and the classifier's."""
    optimizer = supervised.finetune_optimizer(sgd(rates[0], ("bias$", "scale$")), sgd(rates[1]))
    step = functools.partial(
        supervised.finetune_step,
        encoder=ENCODER,
        num_classes=NUM_CLASSES,
        optimizer=optimizer,
        schedule=optax.constant_schedule(rates[0]),
        augment=flips(flip_prob),
        **changes,
    )
    state = supervised.init_finetune(
        jax.random.PRNGKey(1),
        variables,
        num_features=FEATURES,
        num_classes=NUM_CLASSES,
        optimizer=optimizer,
    )
    return step, jax.device_get(state)


@pytest.fixture(scope="module")
def finetune_steps(variables, batches):
    step, state = finetune(variables)
    return run_steps(step, state, batches)


def loss_by_hand(params, stats, batch, train):
    """Mean cross-entropy, and the new running averages: each part by its formula."""
    kernel, norm = params["encoder"]["conv"]["kernel"], params["encoder"]["bn"]
    x = jax.lax.conv_general_dilated(
        normalised(batch), kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    running = stats["encoder"]["bn"]
    mean, var = running["mean"], running["var"]
    if train:
        mean, var = x.mean((0, 1, 2)), jnp.square(x - x.mean((0, 1, 2))).mean((0, 1, 2))
        running = {
            "mean": 0.9 * running["mean"] + 0.1 * mean,
            "var": 0.9 * running["var"] + 0.1 * var,
        }
    x = (x - mean) / jnp.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
    x = jnp.maximum(x, 0).mean((1, 2))
    head = params["classifier"]["output"]
    logits = x @ head["kernel"] + head["bias"]
    rows = jnp.arange(len(logits))
    each = jax.scipy.special.logsumexp(logits, axis=1) - logits[rows, batch["label"]]
    return each.mean(), {"encoder": {"bn": running}}


@pytest.mark.parametrize("train_batch_norm", [True, False])
def test_finetuning_is_sgd_of_both_parts(variables, batches, finetune_steps, train_batch_norm):
    """Each with its rate, its momentum and its weight decay, biases and scales without."""
    step, state = finetune(variables, train_batch_norm=train_batch_norm)
    if not train_batch_norm:
        finetune_steps = run_steps(step, state, batches)
    params, stats = state.online_params, state.online_stats
    assert_same(params["encoder"], variables["params"])
    speed = {name: np.zeros_like(x) for name, x in flatten(params).items()}
    by_hand = jax.jit(
        jax.value_and_grad(functools.partial(loss_by_hand, train=train_batch_norm), has_aux=True)
    )
    for (state, metrics), batch in zip(finetune_steps, batches, strict=True):
        (loss, stats), grads = by_hand(params, stats, batch)
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-4)
        values, grads = flatten(params), flatten(grads)
        for name in values:
            decays = name.endswith("kernel")
            grad = grads[name] + DECAY * decays * values[name]
            speed[name] = MOMENTUM * speed[name] + grad
            values[name] = values[name] - (0.1 if "encoder" in name else 1.0) * speed[name]
        leaves = [values[name] for name in flatten(params)]
        params = jax.tree.unflatten(jax.tree.structure(params), leaves)
        assert_close(state.online_params, params, relative=1e-3)
        assert_close(state.online_stats, stats, relative=1e-3)
        assert metrics["finite"] and state.target_params == {}


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["encoder", "classifier"])
def test_the_two_rates_are_apart(variables, batches, frozen):
    """With a rate of 0 a part stays as it was, bit by bit, while the other learns."""
    step, before = finetune(variables, rates=(0.0, 1.0) if frozen == "encoder" else (0.1, 0.0))
    after = run_steps(step, before, batches[:2])[-1][0]
    moving = "classifier" if frozen == "encoder" else "encoder"
    assert_same(after.online_params[frozen], before.online_params[frozen])
    moved = jax.tree.map(np.subtract, after.online_params[moving], before.online_params[moving])
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(moved))


@pytest.fixture(scope="module")
def flipped_finetune(variables, batches):
    """`train_batch_norm -> (step, first state, what jit makes of it)`, with flips."""

    @functools.cache
    def start(train_batch_norm):
        step, state = finetune(variables, flip_prob=0.5, train_batch_norm=train_batch_norm)
        return step, state, run_steps(step, state, batches[:3])

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "train_batch_norm"), [(1, True), (2, True), (4, True), (8, True), (8, False)]
)
def test_finetuning_is_the_same_on_any_number_of_devices(
    flipped_finetune, variables, batches, devices, train_batch_norm
):
    """Averages that are not trained stay as they were, bit by bit; trained ones move."""
    step, state, expected = flipped_finetune(train_batch_norm)
    found = run_steps(step, state, batches[:3], devices)
    for (state, metrics), (wanted, wanted_metrics) in zip(found, expected, strict=True):
        assert_close(state.online_params, wanted.online_params, relative=1e-3)
        assert_close(state.online_stats, wanted.online_stats, relative=1e-3)
        assert metrics.keys() == wanted_metrics.keys()
        for name in metrics:
            assert metrics[name] == pytest.approx(wanted_metrics[name], rel=1e-3), name
        before = {"encoder": variables["batch_stats"]}
        if not train_batch_norm:
            assert_same(state.online_stats, before)
            assert_same(wanted.online_stats, before)
        else:
            moved = jax.tree.map(np.subtract, state.online_stats, before)
            assert all(np.abs(x).min() > 0 for x in jax.tree.leaves(moved))


def test_each_step_and_each_seed_draws_flips_of_its_own(flipped_finetune, batches):
    """With the same images and parameters: the loss tells which of them were flipped."""
    step, state, _ = flipped_finetune(True)
    run = jax.jit(step)
    other = np.asarray(jax.random.PRNGKey(9))
    starts = [state, state, state.replace(step=np.int32(1)), state.replace(rng=other)]
    losses = [float(run(start, batches[0])[1]["loss"]) for start in starts]
    assert losses[0] == losses[1] and len(set(losses)) == 3


@pytest.mark.slow
def test_every_image_is_flipped_where_that_is_sure(variables, batches):
    """As if the images had been mirrored before, for heads and for finetuning."""
    mirrored = batches[0] | {"view_1": batches[0]["view_1"][:, :, ::-1]}
    for make in (probe, finetune):
        (flipping, state), (step, _) = make(variables, flip_prob=1.0), make(variables)
        ((found, _),) = run_steps(flipping, state, batches[:1])
        ((expected, _),) = run_steps(step, state, [mirrored])
        ((without, _),) = run_steps(step, state, batches[:1])
        assert_same(found.online_params, expected.online_params)
        kernels = [flatten(x.online_params) for x in (found, without)]
        assert any(np.abs(kernels[0][name] - kernels[1][name]).max() > 1e-5 for name in kernels[0])


def test_batch_norm_groups_and_microbatches(variables, batches, finetune_steps):
    """Two microbatches, each normalised by its own statistics, are two groups of the batch."""
    found = []
    for changes in ({"bn_groups": 2}, {"bn_groups": 2, "accumulate_steps": 2}):
        step, state = finetune(variables, **changes)
        found.append(run_steps(step, state, batches[:1])[0][0].online_params)
    assert_close(*found, relative=1e-3)
    one_group = finetune_steps[0][0].online_params
    a, b = (params["encoder"]["conv"]["kernel"] for params in (found[0], one_group))
    assert np.abs(a - b).max() > 1e-5


def test_classify_evaluates_what_finetuning_has_learnt(variables, batches, finetune_steps):
    """By the running averages: an image's logits don't depend on its neighbours."""
    state = finetune_steps[-1][0]
    images = normalised(batches[0])
    classify = functools.partial(
        supervised.classify,
        state.online_params,
        state.online_stats,
        encoder=ENCODER,
        num_classes=NUM_CLASSES,
    )
    logits, stats = classify(jnp.asarray(images))
    assert logits.shape == (BATCH, NUM_CLASSES)
    assert_same(stats, state.online_stats)
    alone, _ = classify(jnp.asarray(images[3:4]))
    np.testing.assert_allclose(logits[3], alone[0], rtol=1e-5, atol=1e-6)
