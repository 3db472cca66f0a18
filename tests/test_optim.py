"""Optimizers, masks and schedules against their formulas in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import byol
from selfsup_jax import optim
from selfsup_jax.errors import UserError
from selfsup_jax.models import heads, network, resnet
from selfsup_jax.models.network import SiameseWithPredictor

PARAMS = {
    "layer": {
        "kernel": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32),
        "bias": np.random.default_rng(1).normal(size=3).astype(np.float32),
    }
}
RATES = (0.4, 0.1, 0.3)  # changes from step to step: that shows where the rate stands
DECAY, MOMENTUM, ETA = 0.1, 0.9, 0.02


def rates(step):
    return jnp.asarray(RATES)[step]


def gradients(step):
    rng = np.random.default_rng(10 + step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)


def run(optimizer):
    """The parameters after each of the three updates."""
    params, state, seen = PARAMS, optimizer.init(PARAMS), []
    for step in range(3):
        updates, state = optimizer.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def by_hand(update):
    """The same with `update(name, w, g, trace, rate) -> (w, trace)` in float64."""
    params = {k: v.astype(np.float64) for k, v in PARAMS["layer"].items()}
    traces = {k: np.zeros_like(v) for k, v in params.items()}
    seen = []
    for step in range(3):
        for name, g in gradients(step)["layer"].items():
            params[name], traces[name] = update(
                name, params[name], g.astype(np.float64), traces[name], RATES[step]
            )
        seen.append({"layer": dict(params)})
    return seen


def assert_runs_agree(got, expected):
    for a, b in zip(got, expected, strict=True):
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(a["layer"][name], b["layer"][name], rtol=2e-5, atol=1e-6)


def lars(name, w, g, trace, rate, inside):
    if name == "kernel":
        g = g + DECAY * w
        g = g * ETA * np.linalg.norm(w) / np.linalg.norm(g)
    if inside:
        trace = MOMENTUM * trace + rate * g
        return w - trace, trace
    trace = MOMENTUM * trace + g
    return w - rate * trace, trace


def make_lars(inside):
    return optim.make_optimizer(
        rates,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        exclude=("bias$",),
        trust_coefficient=ETA,
        rate_inside_momentum=inside,
    )


# ---------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("inside", [False, True])
def test_lars(inside):
    expected = by_hand(lambda *args: lars(*args, inside=inside))
    assert_runs_agree(run(make_lars(inside)), expected)


def test_a_parameter_may_be_decayed_without_the_ratio():
    """As the linear head in SimCLR's code: its decay is in the loss, its update is not scaled."""
    optimizer = optim.make_optimizer(
        rates,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        exclude=("bias$",),
        trust_coefficient=ETA,
        no_ratio=("^layer/",),
    )

    def decayed(name, w, g, trace, rate):
        trace = MOMENTUM * trace + g + (DECAY * w if name == "kernel" else 0)
        return w - rate * trace, trace

    assert_runs_agree(run(optimizer), by_hand(decayed))


def test_lars_with_the_rate_inside_is_optax_lars():
    def mask(params):
        return optim.path_mask(params, ("bias$",))

    theirs = optax.lars(
        rates,
        weight_decay=DECAY,
        weight_decay_mask=mask,
        trust_coefficient=ETA,
        trust_ratio_mask=mask,
        momentum=MOMENTUM,
    )
    assert_runs_agree(run(make_lars(True)), run(theirs))


def test_place_of_the_rate_matters_once_it_changes():
    outside, inside = run(make_lars(False)), run(make_lars(True))
    # The first step has no momentum yet. After it the rate has changed, and so do the results.
    assert_runs_agree(outside[:1], inside[:1])
    for a, b in zip(outside[1:], inside[1:], strict=True):
        assert np.abs(a["layer"]["kernel"] - b["layer"]["kernel"]).max() > 1e-3
        assert np.abs(a["layer"]["bias"] - b["layer"]["bias"]).max() > 0.05


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(nesterov):
    def torch_sgd(name, w, g, trace, rate):
        del name  # PyTorch decays everything
        g = g + DECAY * w
        trace = MOMENTUM * trace + g
        return w - rate * (g + MOMENTUM * trace if nesterov else trace), trace

    optimizer = optim.make_optimizer(
        rates, momentum=MOMENTUM, weight_decay=DECAY, exclude=(), nesterov=nesterov
    )
    assert_runs_agree(run(optimizer), by_hand(torch_sgd))


def masked(params):
    return optim.path_mask(params, ("bias$",))


def test_adamw_and_lamb_are_optaxs():
    fields = {"momentum": MOMENTUM, "weight_decay": DECAY, "adam": (0.99, 1e-4)}
    theirs = {"b1": MOMENTUM, "b2": 0.99, "eps": 1e-4, "weight_decay": DECAY}
    ours = optim.make_optimizer(rates, exclude=("bias$",), **fields)
    assert_runs_agree(run(ours), run(optax.adamw(rates, mask=masked, **theirs)))
    ours = optim.make_optimizer(rates, exclude=(), trust_coefficient=1.0, **fields)
    assert_runs_agree(run(ours), run(optax.lamb(rates, **theirs)))


def test_clipping_is_of_the_whole_gradient():
    plain = {"momentum": MOMENTUM, "weight_decay": DECAY, "exclude": ()}
    ours = optim.make_optimizer(rates, clip_norm=0.5, **plain)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), optim.make_optimizer(rates, **plain))
    assert_runs_agree(run(ours), run(theirs))
    unclipped = run(optim.make_optimizer(rates, **plain))
    assert np.abs(run(ours)[-1]["layer"]["kernel"] - unclipped[-1]["layer"]["kernel"]).max() > 1e-3


def test_decay_may_follow_a_cosine():
    """From its first value to the last, as DINO's from 0.04 to 0.4; then it stays."""
    decay = optim.cosine_between(0.04, 0.4, 100)
    values = [float(decay(jnp.int32(step))) for step in (0, 50, 100, 120)]
    np.testing.assert_allclose(values, [0.04, 0.22, 0.4, 0.4], rtol=1e-6)
    config = byol.get_config("imagenet").optimizer
    config.update(name="sgd", learning_rate=0.5, scaling="none", schedule="constant", momentum=0.0)
    config.update(weight_decay=0.1, weight_decay_end=0.3, exclude=())
    _, optimizer = optim.from_config(config, 256, total_steps=2, warmup_steps=0)
    params = {"w": jnp.ones(())}
    state = optimizer.init(params)
    for decay in (0.1, 0.2, 0.3):
        updates, state = optimizer.update({"w": jnp.zeros(())}, state, params)
        np.testing.assert_allclose(updates["w"], -0.5 * decay, rtol=1e-5)


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_from_config(name):
    """The config's fields reach their places, the rate scaled by the batch."""
    config = byol.get_config("imagenet").optimizer
    config.update(name=name, learning_rate=0.1, weight_decay=DECAY, trust_coefficient=ETA)
    config.update(schedule="constant", exclude=("bias$",), momentum=MOMENTUM)
    schedule, optimizer = optim.from_config(config, 512, total_steps=10, warmup_steps=0)
    assert schedule(0) == pytest.approx(0.2)

    def update(parameter, w, g, trace, rate):
        del rate
        if name == "lars":
            return lars(parameter, w, g, trace, 0.2, inside=False)
        trace = MOMENTUM * trace + g + (DECAY * w if parameter == "kernel" else 0)
        return w - 0.2 * trace, trace

    assert_runs_agree(run(optimizer), by_hand(update))


# --------------------------------------------------------------------------------- masks


def test_mask_over_byols_parameters():
    """Every kernel is decayed and adapted, and no bias, no norm; by the path of each parameter."""
    networks = SiameseWithPredictor(
        encoder=resnet.ResNet(50, width=1 / 16),
        projector=heads.MLPHead((8,), 4),
        predictor=heads.MLPHead((8,), 4),
        classifier=heads.LinearClassifier(10),
    )
    params = jax.eval_shape(
        lambda rng: network.init(rng, networks, (32, 32, 3))[0], jax.random.PRNGKey(0)
    )
    exclude = byol.get_config("imagenet").optimizer.exclude
    mask = jax.tree_util.tree_flatten_with_path(optim.path_mask(params, exclude))[0]
    kept: dict[bool, set[str]] = {True: set(), False: set()}
    for path, keep in mask:
        kept[keep].add("/".join(key.key for key in path))

    assert {name.rpartition("/")[2] for name in kept[True]} == {"kernel"}
    assert {name.rpartition("/")[2] for name in kept[False]} == {"bias", "scale"}
    # 53 convolutions, two layers in each head, one in the probe; a norm for each convolution and
    # head; a bias in each head's hidden layer and the probe.
    assert len(kept[True]) == 53 + 2 * 2 + 1
    assert len(kept[False]) == 2 * (53 + 2) + 2 + 1
    assert "classifier/output/kernel" in kept[True] and "classifier/output/bias" in kept[False]
    assert "encoder/stage4_block1_shortcut_bn/scale" in kept[False]


def test_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match="gamma"):
        optim.path_mask(PARAMS, ("bias$", "gamma$"))


# ----------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.0), (5, 0.4), (10, 0.8), (60, 0.4), (35, 0.4 * (1 + np.sqrt(0.5))), (110, 0.0)],
)
def test_warmup_and_cosine(step, value):
    schedule = optim.learning_rate_schedule("cosine", 0.8, total_steps=110, warmup_steps=10)
    np.testing.assert_allclose(schedule(step), value, atol=1e-7)


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_step_drops_are_fractions_of_the_whole_run(warmup_steps):
    schedule = optim.learning_rate_schedule(
        "step", 0.5, 200, warmup_steps, drops=(0.6, 0.8), drop_factor=0.1
    )
    steps = [warmup_steps, 119, 121, 159, 161, 199]
    values = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(values, [0.5, 0.5, 0.05, 0.05, 0.005, 0.005], rtol=1e-6)


def test_drops_of_a_short_run_on_the_same_step():
    schedule = optim.learning_rate_schedule("step", 0.5, 3, drops=(0.6, 0.7), drop_factor=0.1)
    values = [float(schedule(step)) for step in range(3)]
    np.testing.assert_allclose(values, [0.5, 0.5, 0.005], rtol=1e-6)


def test_constant_after_a_warmup():
    schedule = optim.learning_rate_schedule("constant", 0.3, 100, warmup_steps=4)
    values = [float(schedule(step)) for step in (0, 1, 4, 99)]
    np.testing.assert_allclose(values, [0, 0.075, 0.3, 0.3], rtol=1e-6)


def test_tau_schedules():
    steps = jnp.asarray([0, 100, 200])
    cosine = optim.tau_schedule("cosine", 0.996, 200)
    np.testing.assert_allclose([cosine(step) for step in steps], [0.996, 0.998, 1.0], rtol=1e-6)
    constant = optim.tau_schedule("constant", 0.97, 200)
    np.testing.assert_allclose([constant(step) for step in steps], [0.97] * 3, rtol=1e-6)
    assert constant(steps[0]).dtype == jnp.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            ("learning rate 3.2 =", "0.2 x 4096 / 256 (linear", "10 steps of warm-up", "90 steps"),
        ),
        ({"scaling": "sqrt"}, ("learning rate 12.8 =", "0.2 x sqrt(4096)", "cosine to 0")),
        ({"scaling": "none"}, ("learning rate 0.2 (not scaled", "LARS")),
        ({"schedule": "constant", "name": "sgd"}, ("then constant", "SGD")),
        ({"schedule": "step", "drops": (0.6, 0.8)}, ("x 0.1 at steps 60, 80",)),
    ],
)
def test_the_rate_is_told_with_the_rule_that_it_came_from(changes, words):
    config = byol.get_config("imagenet").optimizer
    config.update(changes)
    told = optim.describe(config, batch_size=4096, total_steps=100, warmup_steps=10)
    for word in words:
        assert word in told
    assert "warm-up" not in optim.describe(config, 4096, total_steps=100, warmup_steps=0)
    # The rate that is told is the one that is used.
    peak = max(float(optim.from_config(config, 4096, 100, 10)[0](step)) for step in range(100))
    assert float(told.split()[2].rstrip(";")) == pytest.approx(peak, rel=1e-3)


def test_scaling_rules():
    assert optim.scaled_learning_rate(0.2, 4096, "linear") == pytest.approx(3.2)
    assert optim.scaled_learning_rate(0.075, 4096, "sqrt") == pytest.approx(4.8)
    assert optim.scaled_learning_rate(0.03, 4096, "none") == 0.03
