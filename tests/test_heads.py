"""Heads, and what batch norms and paddings are in each author's code, against NumPy."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, flatten

from configs import byol, simclr
from selfsup_jax.devices import collectives
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models import resnet
from selfsup_jax.models.heads import MLPHead, from_config, l2_normalize
from selfsup_jax.models.norm import BatchNorm
from selfsup_jax.models.resnet import ResNet

EPSILON = 1e-5
FEATURES, HIDDEN, OUTPUT = 5, 6, 3

# Style -> what a head with a hidden layer has, and what a linear one has.
PARAMETERS = {
    "byol": (
        {"hidden/kernel", "hidden/bias", "bn/scale", "bn/bias", "output/kernel"},
        {"output/kernel"},
    ),
    "moco": (
        {"hidden/kernel", "hidden/bias", "output/kernel", "output/bias"},
        {"output/kernel", "output/bias"},
    ),
    "simclr": (
        {"hidden/kernel", "bn/scale", "bn/bias", "output/kernel", "output_bn/scale"},
        {"output/kernel", "output_bn/scale"},
    ),
}
# Author's code -> the switches that make a head its.
STYLES = {
    "byol": {},
    "moco": {"linear_init": "torch", "hidden_norm": False, "output_bias": True},
    "simclr": {"linear_init": "normal", "hidden_bias": False, "output_norm": "scale"},
}
NORMS = {"byol": (("bn",), ()), "moco": ((), ()), "simclr": (("bn", "output_bn"), ("output_bn",))}
BOTH = [(style, hidden) for style in PARAMETERS for hidden in (HIDDEN, 0)]


def head_of(style, hidden, outputs=OUTPUT, **fields):
    """A head with one hidden layer, or with none."""
    return MLPHead((hidden,) if hidden else (), outputs, **STYLES[style], **fields)


def drawn(tree, seed=0):
    """Other numbers in each leaf, none of them at 0 or 1; variances and scales above 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
        return rng.normal(size=leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, tree)


def variables_of(module, shape, seed=0):
    """Parameters and running averages that are all set apart from their first values."""
    init = functools.partial(module.init, layout=None)
    return drawn(jax.eval_shape(init, jax.random.PRNGKey(0), jnp.zeros((1, *shape))), seed)


# --------------------------------------------------------------------------------- heads


def head_by_hand(style, variables, x, training):
    """(outputs, {norm: (mean, var) of its input}) in float64, from the authors' codes."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    moments = {}

    def linear(x, name):
        return x @ params[name]["kernel"] + params[name].get("bias", 0.0)

    def norm(x, name):
        moments[name] = x.mean(0), x.var(0)
        stats = variables.get("batch_stats", {})
        mean, var = moments[name] if training else (stats[name]["mean"], stats[name]["var"])
        return (x - mean) / np.sqrt(var + EPSILON) * params[name]["scale"]

    x = x.astype(np.float64)
    if "hidden" in params:
        x = linear(x, "hidden")
        if style != "moco":
            x = norm(x, "bn") + params["bn"]["bias"]
        x = np.maximum(x, 0)
    x = linear(x, "output")
    return (norm(x, "output_bn") if style == "simclr" else x), moments


@pytest.mark.parametrize(("style", "hidden"), BOTH)
def test_a_style_has_its_parameters(style, hidden):
    variables = variables_of(head_of(style, hidden), (FEATURES,))
    with_hidden, linear = PARAMETERS[style]
    assert set(flatten(variables["params"])) == (with_hidden if hidden else linear)
    norms = NORMS[style][0 if hidden else 1]
    assert set(variables.get("batch_stats", {})) == set(norms)
    shapes = {path: leaf.shape for path, leaf in flatten(variables["params"]).items()}
    assert shapes["output/kernel"] == (hidden or FEATURES, OUTPUT)
    assert not hidden or shapes["hidden/kernel"] == (FEATURES, HIDDEN)


@pytest.mark.slow
@pytest.mark.parametrize(("style", "hidden"), BOTH)
@pytest.mark.parametrize("training", [True, False])
def test_a_head_is_numpys(style, hidden, training):
    head = head_of(style, hidden)
    variables = variables_of(head, (FEATURES,))
    x = np.random.default_rng(1).normal(size=(7, FEATURES)).astype(np.float32)
    expected, moments = head_by_hand(style, variables, x, training)
    if not training:
        np.testing.assert_allclose(head.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
        return
    y, new = head.apply(variables, x, BatchLayout(), mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for name, (mean, var) in moments.items():
        before, after = variables["batch_stats"][name], new["batch_stats"][name]
        np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, rtol=1e-4)
        np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * var, rtol=1e-4)
    assert set(moments) == set(new.get("batch_stats", {}))


def test_simclrs_output_is_centred():
    """By a norm without an offset: over a batch each dimension has mean 0 and deviation gamma."""
    head = head_of("simclr", HIDDEN)
    variables = variables_of(head, (FEATURES,))
    x = np.random.default_rng(2).normal(size=(64, FEATURES)).astype(np.float32) + 3
    y, _ = head.apply(variables, x, BatchLayout(), mutable=["batch_stats"])
    np.testing.assert_allclose(np.mean(y, 0), np.zeros(OUTPUT), atol=1e-5)
    np.testing.assert_allclose(np.std(y, 0), variables["params"]["output_bn"]["scale"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("style", PARAMETERS)
@pytest.mark.parametrize("hidden", [128, 0])
def test_initialisation(style, hidden):
    """Haiku's truncated normal, PyTorch's uniform with its biases, SimCLR's deviation of 0.01."""
    features, outputs = 100, 80
    init = head_of(style, hidden, outputs).init(jax.random.PRNGKey(0), jnp.zeros((1, features)))
    for path, leaf in flatten(init["params"]).items():
        inputs = features if not hidden or path.startswith("hidden") else hidden
        unit = inputs**-0.5
        largest = np.abs(leaf).max()
        if path.endswith("scale"):
            np.testing.assert_array_equal(leaf, np.ones_like(leaf))
        elif path.endswith("bias") and style != "moco":
            np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
        elif path.endswith("bias"):
            assert 0.9 * unit < largest <= unit and leaf.min() < -0.8 * unit, path
        elif style == "byol":
            # Cut at two deviations of the normal, which then has 0.88 of its deviation; Haiku's
            # `TruncatedNormal`, which its `Linear` has, does not make up for it.
            assert np.std(leaf) == pytest.approx(0.8796 * unit, rel=0.03), path
            assert 1.9 * unit < largest <= 2 * unit, path
        elif style == "moco":
            assert np.std(leaf) == pytest.approx(unit / 3**0.5, rel=0.03), path
            assert 0.99 * unit < largest <= unit, path
        else:
            assert np.std(leaf) == pytest.approx(0.01, rel=0.03) and largest > 0.03, path
        if path.endswith("kernel"):
            assert abs(leaf.mean()) < 0.05 * leaf.std(), path
    stats = flatten(init.get("batch_stats", {}))
    assert all(np.all(leaf == path.endswith("var")) for path, leaf in stats.items())


def test_moco_draws_kernels_and_biases_apart():
    params = head_of("moco", 4, 4).init(jax.random.PRNGKey(0), jnp.zeros((1, 4)))["params"]
    leaves = [leaf.reshape(-1)[:4] for leaf in jax.tree.leaves(params)]
    assert len({tuple(np.asarray(leaf)) for leaf in leaves}) == 4


@pytest.mark.slow
def test_a_heads_norms_are_the_encoders():
    """Decay, epsilon and the kind of average of a config reach every norm of the head."""
    config = simclr.get_config("demo,encoder.bn_decay=0.5,encoder.bn_epsilon=2.0")
    config.encoder.bn_unbiased_average = True
    config.projector.update(hidden_sizes=(HIDDEN,), output_size=OUTPUT)
    head = from_config(config.projector, config.encoder, jnp.float32)
    assert head.linear_init == "normal" and head.output_norm == "scale"
    variables = variables_of(head, (FEATURES,))
    x = np.random.default_rng(1).normal(size=(4, FEATURES)).astype(np.float32)
    _, new = head.apply(variables, x, BatchLayout(), mutable=["batch_stats"])

    hidden = x.astype(np.float64) @ variables["params"]["hidden"]["kernel"]
    var = 0.5 * variables["batch_stats"]["bn"]["var"] + 0.5 * hidden.var(0, ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["bn"]["var"], var, rtol=1e-4)
    normal = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 2.0)
    params = variables["params"]
    hidden = np.maximum(normal * params["bn"]["scale"] + params["bn"]["bias"], 0)
    output = hidden @ params["output"]["kernel"]
    var = 0.5 * variables["batch_stats"]["output_bn"]["var"] + 0.5 * output.var(0, ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["output_bn"]["var"], var, rtol=1e-4)


def test_byols_heads_are_byols_unless_told():
    config = byol.get_config("imagenette")
    for section in (config.projector, config.predictor):
        made = from_config(section, config.encoder, jnp.float32)
        assert made == head_of("byol", *section.hidden_sizes, section.output_size)


@pytest.mark.slow
def test_bfloat16_is_for_the_matmuls_only():
    for style in PARAMETERS:
        head = head_of(style, HIDDEN, dtype=jnp.bfloat16)
        variables = variables_of(head, (FEATURES,))
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
        x = np.random.default_rng(1).normal(size=(7, FEATURES)).astype(np.float32)
        y = head.apply(variables, x)
        assert y.dtype == jnp.float32
        expected = head_by_hand(style, variables, x, training=False)[0]
        assert 1e-4 < np.abs(y - expected).max() < 0.02 * np.abs(expected).max()


# -------------------------------------------------------------------------- unit vectors


def test_rows_come_to_unit_length():
    x = np.random.default_rng(0).normal(size=(2, 6, 4)) * np.logspace(-6, 6, 6)[:, None]
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(x.astype(np.float32)), expected, rtol=1e-5)


@pytest.mark.slow
def test_a_row_of_zeros_stays_one_and_has_a_finite_gradient():
    x = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0]], np.float32)
    weights = np.array([1.0, 2.0, 3.0], np.float32)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(l2_normalize(x) * weights))(x)
    assert value == pytest.approx(0.6 + 3 * 0.8)
    assert np.isfinite(gradient).all()
    unit = np.array([0.6, 0.0, 0.8])
    np.testing.assert_allclose(gradient[1], (weights - (unit @ weights) * unit) / 5, rtol=1e-5)


# ---------------------------------------------------------------------------- batch norm


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 3), (16, 2, 3, 3)])
@pytest.mark.parametrize(("devices", "groups"), [(0, 1), (0, 4), (4, 1), (4, 2), (4, 4), (2, 4)])
def test_unbiased_averages(shape, devices, groups):
    """The running variance takes n / (n - 1) of a group: its rows, its places, on all its devices.

    What is normalised is divided by the biased deviation all the same.
    """
    views = 2
    rng = np.random.default_rng(0)
    x = rng.normal(size=(views, *shape)) * rng.uniform(0.5, 3, (views, shape[0], *shape[1:]))
    x = (x + 2 * rng.normal(size=shape[-1])).astype(np.float32)
    norm = BatchNorm(unbiased_average=True)
    v = variables_of(norm, shape[1:])

    def pass_through(rows, axis_name=None):  # [V, b, ...]
        layout = collectives.batch_layout(groups, views, axis_name)
        flat = rows.reshape(-1, *shape[1:])
        y, new = norm.apply(v, flat, layout, mutable=["batch_stats"])
        return y.reshape(rows.shape), collectives.mean(new["batch_stats"], axis_name)

    if devices == 0:
        y, stats = pass_through(x)
    else:
        parts = np.stack(np.split(x, devices, axis=1))
        mapped = functools.partial(pass_through, axis_name="d")
        y, stats = jax.pmap(mapped, "d", devices=jax.devices()[:devices])(parts)
        y = np.concatenate(list(y), axis=1)
        stats = jax.tree.map(lambda leaf: leaf[-1], stats)

    axes = tuple(range(len(shape) - 1))
    mean, var = (v["batch_stats"][name].astype(np.float64) for name in ("mean", "var"))
    expected = np.zeros(x.shape)
    for view in range(views):
        cut = np.split(x[view].astype(np.float64), groups)
        mean = 0.9 * mean + 0.1 * np.mean([part.mean(axes) for part in cut], 0)
        var = 0.9 * var + 0.1 * np.mean([part.var(axes, ddof=1) for part in cut], 0)
        normal = [(part - part.mean(axes)) / np.sqrt(part.var(axes) + EPSILON) for part in cut]
        expected[view] = np.concatenate(normal) * v["params"]["scale"] + v["params"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


def test_an_unbiased_average_of_one_row_is_finite():
    norm = BatchNorm(unbiased_average=True)
    v = variables_of(norm, (3,))
    x = np.ones((1, 3), np.float32)
    _, new = norm.apply(v, x, BatchLayout(), mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 * v["batch_stats"]["var"], rtol=1e-6)


@pytest.mark.parametrize("layout", [BatchLayout(), None])
def test_a_norm_without_an_offset(layout):
    """It is the norm whose offset is 0, and has no parameter for one."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32) + 1
    with_offset, without = BatchNorm(), BatchNorm(use_bias=False)
    v = variables_of(without, (3,))
    assert set(v["params"]) == {"scale"} and set(v["batch_stats"]) == {"mean", "var"}
    zero = v | {"params": v["params"] | {"bias": np.zeros(3, np.float32)}}
    y, new = without.apply(v, x, layout, mutable=["batch_stats"])
    expected, new_expected = with_offset.apply(zero, x, layout, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, expected)
    assert_close(new, new_expected, 1e-7)


# ------------------------------------------------------------------------------- padding


@pytest.fixture(scope="module")
def maps():
    """What some layers make of one image with each padding, with kernels that let them be seen."""
    x = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    model = ResNet(18, width=1 / 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.STAGES, 18, ((1, 1, 0, 0), False))  # to compile no more than is seen
        yield x, *_maps(model, x)


def _maps(model, x):
    variables = variables_of(model, x.shape[1:])
    params = variables["params"]
    # A 3x3 of a one in the middle shows the map that it is given, or every second place of it.
    for name, channels in (("stage1_block1_conv1", 4), ("stage2_block1_conv1", 4)):
        kernel = np.zeros_like(params[name]["kernel"])
        kernel[1, 1, :channels, :channels] = np.eye(channels)
        params[name]["kernel"] = kernel
    kernel = np.zeros_like(params["stage2_block1_shortcut"]["kernel"])
    kernel[0, 0, :4, :4] = np.eye(4)  # a 1x1: the even places
    params["stage2_block1_shortcut"]["kernel"] = kernel

    names = ("stem", "stem_bn", "stage1_block1_conv1", "stage2_block1_conv1")
    found = {}
    for padding in ("same", "torch", "fixed"):
        apply = functools.partial(
            model.clone(padding=padding).apply,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        seen = jax.device_get(jax.jit(apply)(variables, x)[1]["intermediates"])
        found[padding] = {
            name: seen[name]["__call__"][0] for name in (*names, "stage2_block1_shortcut")
        }
    return params["stem"]["kernel"], found


@pytest.mark.slow
def test_fixed_padding_is_symmetric_in_convolutions(maps):
    """At stride 2 on even maps, where TensorFlow's `same` begins a pixel later."""
    x, kernel, found = maps
    padded = np.pad(x.astype(np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)))
    expected = np.zeros((1, 16, 16, 4))
    for i in range(16):
        for j in range(16):
            patch = padded[:, 2 * i : 2 * i + 7, 2 * j : 2 * j + 7]
            expected[:, i, j] = np.tensordot(patch, kernel, 3)
    np.testing.assert_allclose(found["fixed"]["stem"], expected, rtol=1e-3, atol=1e-5)
    assert np.abs(found["same"]["stem"] - expected).max() > 0.1

    # The middle of a symmetric 3x3 of stride 2 stands on the even places, as a 1x1 does.
    for padding, even in (("fixed", True), ("torch", True), ("same", False)):
        middle, ones = (found[padding][f"stage2_block1_{k}"] for k in ("conv1", "shortcut"))
        assert np.abs(ones).max() > 0.1
        assert np.allclose(middle, ones, rtol=1e-5, atol=1e-6) == even, padding


@pytest.mark.parametrize(("padding", "before"), [("fixed", 0), ("same", 0), ("torch", 1)])
def test_the_max_pool_pads_at_the_end_but_for_torch(maps, padding, before):
    """16 places to 8, windows of 3: TensorFlow's `same` adds one at the end, PyTorch one before."""
    seen = maps[2][padding]
    given = np.maximum(seen["stem_bn"], 0)
    margin = (before, 1 - before)
    padded = np.pad(given, ((0, 0), margin, margin, (0, 0)), constant_values=-np.inf)
    windows = [padded[:, i : i + 15 : 2, j : j + 15 : 2] for i in range(3) for j in range(3)]
    expected = np.max(windows, axis=0)
    np.testing.assert_allclose(seen["stage1_block1_conv1"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_hidden_layers_one_after_the_other():
    """Three layers, the output normalised without scale or offset: SimSiam's projector."""
    head = MLPHead((HIDDEN, 4), OUTPUT, hidden_bias=False, output_norm="plain")
    variables = variables_of(head, (FEATURES,))
    assert set(flatten(variables["params"])) == {
        *("hidden/kernel", "bn/scale", "bn/bias"),
        *("hidden_2/kernel", "bn_2/scale", "bn_2/bias"),
        "output/kernel",
    }
    x = np.random.default_rng(1).normal(size=(7, FEATURES)).astype(np.float32)
    y, _ = head.apply(variables, x, BatchLayout(), mutable=["batch_stats"])
    params = variables["params"]

    def normal(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)

    expected = x.astype(np.float64)
    for place in ("", "_2"):
        norm = params[f"bn{place}"]
        expected = normal(expected @ params[f"hidden{place}"]["kernel"])
        expected = np.maximum(expected * norm["scale"] + norm["bias"], 0)
    expected = normal(expected @ params["output"]["kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
