"""Vision Transformers against a NumPy oracle in float64, and BYOL and its kin on a tiny one."""

from __future__ import annotations

import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_jobs
from conftest import (
    IMAGE_SHAPE,
    MEAN,
    STD,
    assert_close,
    flatten,
    random_batch,
    replicated,
)
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import byol, common
from selfsup_jax import Encoder, optim
from selfsup_jax import config as config_lib
from selfsup_jax.build import find
from selfsup_jax.devices import parallel
from selfsup_jax.devices.collectives import BatchLayout, RowNoise
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.interop import exporting
from selfsup_jax.models import attention, encoders, positions
from selfsup_jax.training import init_from

# 2 x 2 patches in images of 4 px.
SIZES = {"width": 8, "depth": 3, "heads": 2, "patch": 2}
TINY = {"encoder.name": "vit_ti4"} | {f"encoder.vit.{name}": n for name, n in SIZES.items()}
METHODS = ("byol", "moco", "simclr", "simsiam", "barlow_twins", "vicreg")


def tiny_vit(remat="none", dtype=jnp.float32, **fields):
    section = common.encoder(name="vit_ti4", vit=common.vit(**SIZES | fields), remat=remat)
    return encoders.make_encoder(section, dtype)


@pytest.fixture(scope="module")
def params():
    """With biases and scales that a mistake cannot hide behind."""
    made = jax.jit(tiny_vit().init)(jax.random.PRNGKey(0), jnp.zeros((1, *IMAGE_SHAPE)))["params"]
    leaves, structure = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.PRNGKey(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.device_get(jax.tree.unflatten(structure, moved))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, *IMAGE_SHAPE)).astype(np.float32)


# --------------------------------------------------------------------------- the oracle


def layer_norm(x, layer, epsilon=1e-6):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * layer["scale"] + layer["bias"]


def linear(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def oracle(params, images, factors=None, heads=2, patch=2):
    """Each block's tokens after the final norm, and the last one's attention, row by row."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    depth = sum(name.startswith("block") for name in p)
    tokens, maps = [[] for _ in range(depth)], []
    for row, image in enumerate(images.astype(np.float64)):
        side = image.shape[0] // patch
        cut = [
            image[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].ravel()
            for i in range(side)
            for j in range(side)
        ]
        x = np.vstack([p["class_token"], linear(np.array(cut), p["patches"])]) + p["positions"]
        for i in range(depth):
            block = p[f"block{i + 1}"]
            factor = np.ones(2) if factors is None else np.asarray(factors[row, i], np.float64)
            q, k, v = np.split(linear(layer_norm(x, block["norm1"]), block["qkv"]), 3, axis=1)
            of_heads, size = [], x.shape[1] // heads
            weights = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                weights.append(softmax(q[:, part] @ k[:, part].T / math.sqrt(size)))
                of_heads.append(weights[-1] @ v[:, part])
            x = x + factor[0] * linear(np.hstack(of_heads), block["attention_output"])
            hidden = gelu(linear(layer_norm(x, block["norm2"]), block["hidden"]))
            x = x + factor[1] * linear(hidden, block["output"])
            tokens[i].append(layer_norm(x, p["norm"]))
        maps.append([w[0, 1:].reshape(side, side) for w in weights])
    return [np.array(block) for block in tokens], np.array(maps)


def noise(rows, views, seed=5):
    """The layout of some rows of a global batch, and a draw for each, block and branch."""
    index = np.array([7, 2, 11, 3, 0, 5][: rows // views], np.int32)
    rng = jax.random.PRNGKey(seed)
    draws = np.zeros((rows, 2 * SIZES["depth"]))
    for view in range(views):
        for row, place in enumerate(index):
            key = jax.random.fold_in(jax.random.fold_in(rng, 0x64726F70), view)
            key = jax.random.fold_in(key, place)
            draws[view * len(index) + row] = jax.random.uniform(key, draws.shape[1:])
    return BatchLayout(views, noise=RowNoise(rng, index)), draws.reshape(rows, -1, 2)


def test_features_are_the_papers(params, images):
    """The class token or the mean of the patches, the last blocks' tokens, maps and attention."""
    variables, module = {"params": params}, tiny_vit()
    tokens, maps = oracle(params, images)

    @jax.jit
    def all_of(variables, images):
        of = {name: module.apply(variables, images, method=name) for name in ("attention",)}
        of["last"] = module.apply(variables, images, 2, method="intermediate")
        of["dense"] = module.apply(variables, images, pooled=False)
        of["mean"] = tiny_vit(features="mean").apply(variables, images)
        return of | {"class": module.apply(variables, images)}

    got = all_of(variables, images)
    close = {"rtol": 1e-4, "atol": 2e-5}
    np.testing.assert_allclose(got["class"], tokens[-1][:, 0], **close)
    np.testing.assert_allclose(got["mean"], tokens[-1][:, 1:].mean(1), **close)
    np.testing.assert_allclose(got["dense"].reshape(6, 4, 8), tokens[-1][:, 1:], **close)
    for ours, theirs in zip(got["last"], tokens[-2:], strict=True):
        np.testing.assert_allclose(ours, theirs, **close)
    np.testing.assert_allclose(got["attention"], maps, **close)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    with pytest.raises(ValueError, match="the last 4 blocks: there are 3"):
        module.apply(variables, images, 4, method="intermediate")


@pytest.mark.parametrize("views", [1, 2])
def test_drop_path_is_of_each_rows_place_view_and_block(params, images, views):
    """A branch is left out with a probability of 0 to the rate, or made larger by what is lost."""
    layout, draws = noise(len(images), views)
    rates = np.array([0.0, 0.25, 0.5])[:, None]
    factors = np.where(draws < rates, 0.0, 1 / (1 - rates))
    assert len(np.unique(factors)) == 4  # of the three blocks 1; 0, 4/3; 0, 2
    module = tiny_vit(drop_path=0.5)
    got = jax.jit(lambda p, x: module.apply({"params": p}, x, layout))(params, images)
    expected = oracle(params, images, factors)[0][-1][:, 0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)


def test_nothing_is_dropped_in_evaluation_nor_for_targets(params, images):
    layout, _ = noise(len(images), 1)
    plain, dropping = tiny_vit(), tiny_vit(drop_path=0.5)
    apply = lambda module, layout: module.apply({"params": params}, images, layout)  # noqa: E731
    expected = apply(plain, None)
    for module, given in ((dropping, None), (dropping, BatchLayout()), (plain, layout)):
        np.testing.assert_array_equal(apply(module, given), expected)
    assert "random_bits" not in str(jax.make_jaxpr(lambda: apply(plain, layout))())
    later = BatchLayout(noise=RowNoise(layout.noise.rng, layout.noise.index, first_view=2))
    assert np.abs(apply(dropping, layout) - apply(dropping, later)).max() > 0.1


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_gradient_is_that_of_finite_differences(params, images, remat):
    """Of the oracle in float64, along a direction in each parameter; also if it computes twice."""
    layout, draws = noise(len(images), 2)
    rates = np.array([0.0, 0.25, 0.5])[:, None]
    factors = np.where(draws < rates, 0.0, 1 / (1 - rates))
    target = np.random.default_rng(1).normal(size=(6, 8))
    module = tiny_vit(remat=remat, drop_path=0.5)

    def loss(params):
        return jnp.vdot(module.apply({"params": params}, images, layout), target)

    grads = flatten(jax.jit(jax.grad(loss))(params))
    rng, step = np.random.default_rng(2), 1e-5
    for name, x in flatten(params).items():
        if "block2" in name:
            continue
        direction = rng.normal(size=x.shape)

        def moved(amount, name=name, direction=direction):
            flat = flatten_dict(params, sep="/")
            flat[name] = flat[name] + amount * direction  # float64
            other = unflatten_dict(flat, sep="/")
            return np.vdot(oracle(other, images, factors)[0][-1][:, 0], target)

        expected = (moved(step) - moved(-step)) / (2 * step)
        size = np.linalg.norm(grads[name]) * np.linalg.norm(direction)
        assert abs(np.vdot(grads[name], direction) - expected) <= 1e-4 * max(size, 1e-2), name


def test_bfloat16_differs_by_its_rounding_only(params, images):
    module = tiny_vit(dtype=jnp.bfloat16)
    got = module.apply({"params": params}, images)
    assert got.dtype == jnp.float32
    expected = oracle(params, images)[0][-1][:, 0]
    assert 1e-4 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.03


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_is_the_plain_formula(dtype):
    """Also by `auto`, which has no cuDNN here; and what the backward pass makes of it."""
    draws = np.random.default_rng(0).normal(size=(4, 2, 5, 3, 8))
    q, k, v, g = (jnp.asarray(x, dtype) for x in draws)

    def plain(q, k, v):
        weights = softmax(np.einsum("rshd,rthd->rhst", *map(np.float64, (q, k))) / math.sqrt(8))
        return np.einsum("rhst,rthd->rshd", weights, np.float64(v))

    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for implementation in attention.ATTENTIONS:
        got, back = jax.vjp(lambda *x, i=implementation: attention.attend(*x, i), q, k, v)
        np.testing.assert_allclose(np.float64(got), plain(q, k, v), atol=tolerance)
        of_v = back(g)[2]
        weights = attention.weights(q, k)
        expected = np.einsum("rhst,rshd->rthd", np.float64(weights), np.float64(g))
        np.testing.assert_allclose(np.float64(of_v), expected, atol=4 * tolerance)


def test_cudnn_is_asked_before_it_is_taken(monkeypatch):
    """On a GPU without it, or with shapes that it does not take, attention is XLA's."""
    assert not attention._cudnn_takes((2, 5, 3, 8), jnp.dtype(jnp.bfloat16))
    taken = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *_, **how: taken.append(how) or _[0]
    )
    x = jnp.zeros((1, 5, 3, 8), jnp.bfloat16)
    for takes in (True, False):
        monkeypatch.setattr(attention, "_cudnn_takes", lambda *_, takes=takes: takes)
        attention.attend(x, x, x)
    attention.attend(x, x, x, "xla")
    assert [how["implementation"] for how in taken] == ["cudnn", "xla", "xla"]


# ----------------------------------------------------------------------------- positions


def test_sincos_positions_are_moco_v3s():
    table = positions.sincos(3, 4, 8)
    assert table.shape == (13, 8) and not table[0].any()
    row, column = 2, 1
    expected = [f(x / t) for x in (row, column) for f in (math.sin, math.cos) for t in (1.0, 100.0)]
    np.testing.assert_allclose(table[1 + 4 * row + column], expected, rtol=1e-6)


def test_positions_are_interpolated_as_pytorch_does():
    """`torch.nn.functional.interpolate(mode="bicubic")` made these of the first row."""
    row = np.array([1.0, 2.0, 4.0, 8.0, 3.0])
    expected = {
        3: [1.203704595565796, 4.0, 4.796296119689941],
        8: [
            *(0.90716552734375, 1.268310546875, 2.12957763671875, 3.02252197265625),
            *(5.64276123046875, 8.01275634765625, 5.4720458984375, 2.53582763671875),
        ],
    }
    grid = np.repeat(row[None], 5, axis=0)  # columns differ, rows do not
    table = jnp.asarray(np.concatenate([[9.0], grid.ravel()])[:, None])
    for size, values in expected.items():
        wide = positions.interpolated(table, 2, size)
        assert wide[0] == 9
        np.testing.assert_allclose(wide[1:, 0].reshape(2, size), [values] * 2, rtol=1e-5)
        high = positions.interpolated(table.at[1:, 0].set(grid.T.ravel()), size, 2)
        np.testing.assert_allclose(high[1:, 0].reshape(size, 2).T, [values] * 2, rtol=1e-5)
    assert positions.interpolated(table, 5, 5) is table


def test_images_of_other_sizes_have_interpolated_positions(params):
    small = np.random.default_rng(3).normal(size=(2, 6, 6, 3)).astype(np.float32)
    table = np.asarray(positions.interpolated(params["positions"], 3, 3))
    expected = oracle(params | {"positions": table}, small)[0][-1][:, 0]
    got = tiny_vit().apply({"params": params}, small)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="images of 5 x 6 px: no multiples of 2"):
        tiny_vit().apply({"params": params}, small[:, :5])


# -------------------------------------------------------------------- initialisation, optimizer


@pytest.mark.parametrize("init", ["normal", "xavier"])
def test_initialisation_is_the_authors(init):
    section = common.encoder(name="vit_ti16", vit=common.vit(init=init, depth=1))
    made = jax.jit(encoders.make_encoder(section).init)(
        jax.random.PRNGKey(0), jnp.zeros((1, 32, 32, 3))
    )["params"]
    uniform = lambda limit: (limit, limit / 3**0.5)  # noqa: E731
    kernels = {f"block1/{name}": made["block1"][name]["kernel"] for name in LAYERS}
    of = {"patches": made["patches"]["kernel"]} | kernels
    for name, x in of.items():
        rows, columns = x.shape
        if name == "patches":
            bound, deviation = uniform(768**-0.5 if init == "normal" else (6 / (768 + 192)) ** 0.5)
        elif init == "normal":
            bound, deviation = 0.2, 0.02
        else:  # queries, keys and values are three matrices
            columns //= 3 if name.endswith("qkv") else 1
            bound, deviation = uniform((6 / (rows + columns)) ** 0.5)
        assert 0.98 * deviation < np.std(x) < 1.02 * deviation, name
        assert np.abs(x).max() <= bound, name
        if init == "xavier" or name == "patches":
            assert np.abs(x).max() > 0.98 * bound, name
    assert bool(np.any(made["patches"]["bias"])) == (init == "normal")
    assert np.std(made["class_token"]) == pytest.approx(0.02 if init == "normal" else 1e-6, rel=0.2)
    assert np.std(made["positions"]) == pytest.approx(0.02, rel=0.1)
    for name in LAYERS:
        assert not np.any(made["block1"][name]["bias"])


LAYERS = ("qkv", "attention_output", "hidden", "output")


def test_decay_excludes_what_dino_excludes(params):
    """Biases and norms, all of one dimension; of these the class token has two in its code."""
    kept = flatten(optim.path_mask({"encoder": params}, common.optimizer().exclude))
    without = {name for name, decayed in kept.items() if not decayed}
    shapes = {name: x.shape for name, x in flatten({"encoder": params}).items()}
    assert without == {name for name, shape in shapes.items() if len(shape) == 1} - {
        "encoder/class_token"
    }
    assert "encoder/positions" not in without


# ------------------------------------------------------------------------------ methods


def config_of(name, preset="demo", **changes):
    """A preset on a tiny ViT and tiny heads; images stay as they are."""
    config = importlib.import_module(f"configs.{name}").get_config(preset)
    steps = ("flip", "jitter", "grayscale", "blur", "solarize")
    fields = {f"views.global.view_1.{step}_prob": 0.0 for step in steps}
    fields |= {
        field.replace("_1.", "_2."): 0.0 for field in fields if "view_2" in config.views["global"]
    }
    fields |= {
        "projector.hidden_sizes": (6,),
        "projector.output_size": 4,
        "data.image_size": IMAGE_SHAPE[0],
        "data.test_resize": IMAGE_SHAPE[0],
        "views.mean": MEAN,
        "views.std": STD,
    }
    if "predictor" in config:
        fields |= {"predictor.hidden_sizes": (6,), "predictor.output_size": 4}
    config.update_from_flattened_dict(fields | TINY | changes)
    return config


def method_of(name, **changes):
    config = config_of(name, **changes)
    config_lib.validate(config, find(name))
    return find(name)(config, 3, 4, 0)


@pytest.mark.parametrize("name", METHODS)
def test_only_the_branches_that_learn_may_drop(name):
    """Every method runs on a ViT by its config alone, and its target network draws nothing."""
    made = method_of(name, **{"encoder.vit.drop_path": 0.5, "batch_size": 16})
    seen = []

    def record(next_fn, args, kwargs, context):
        if context.module.__class__.__name__ == "ViT" and context.method_name == "__call__":
            seen.append((len(args[0]), args[1].noise))
        return next_fn(*args, **kwargs)

    state = jax.eval_shape(made.init_state, jax.random.PRNGKey(0))
    assert "encoder" not in state.online_stats
    with nn.intercept_methods(record):
        jax.eval_shape(made.train_step, state, random_batch(16, seed=0))
    draws = [rows for rows, given in seen if given is not None]
    assert draws == [16 if name == "moco" else 32]
    assert len(seen) - len(draws) == (name in ("byol", "moco"))


FLAT = {"projector.hidden_norm": False, "predictor.hidden_norm": False, "optimizer.name": "sgd"}
FLAT |= {"encoder.vit.drop_path": 0.5, "optimizer.learning_rate": 0.3, "optimizer.scaling": "none"}
FLAT |= {"optimizer.warmup_epochs": 0.0, "encoder.vit.depth": 2}


@pytest.fixture(scope="module")
def byol_update():
    """BYOL without batch norm: its state before, its batch, and the state after one update."""
    made = method_of("byol", **FLAT)
    start = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    batch = random_batch(16, seed=0)
    after, metrics = jax.jit(made.train_step)(start, batch)
    metrics.pop("outputs")
    return made, start, batch, jax.device_get((after.online_params, metrics))


@pytest.mark.slow
@pytest.mark.parametrize("engine", parallel.ENGINES)
def test_devices_do_not_change_what_is_dropped(byol_update, engine):
    """One device, without an axis, against 2 and 4 by pmap and 8 by shard_map."""
    made, start, batch, (params, metrics) = byol_update
    for devices in (2, 4) if engine == "pmap" else (8,):
        if engine == "pmap":
            step = jax.pmap(
                lambda s, b: made.train_step(s, b, axis_name="d"),
                axis_name="d",
                devices=jax.devices()[:devices],
            )
            state = replicated(start, devices, "d")
        else:
            step = parallel.step_over_devices(made.train_step, engine)
            state = parallel.replicate(lambda s: s, start)
        parts = jax.tree.map(lambda x, n=devices: x.reshape(n, -1, *x.shape[1:]), batch)
        state, measured = step(state, parts)
        measured.pop("outputs")
        got = jax.tree.map(lambda x: x[0], jax.device_get((state.online_params, measured)))
        assert_close(got[0], params, floor=0.1)
        assert_close(got[1], metrics, floor=0.1)


@pytest.mark.slow
def test_microbatches_do_not_change_what_is_dropped(byol_update):
    _, start, batch, (params, metrics) = byol_update
    made = method_of("byol", **FLAT, accumulate_steps=4)
    state, measured = jax.jit(made.train_step)(start, batch)
    measured.pop("outputs")
    assert_close(jax.device_get(state.online_params), params, floor=0.1)
    assert_close(jax.device_get(measured), metrics, floor=0.1)


@pytest.mark.slow
def test_frozen_parameters_stay_to_the_bit(images):
    """MoCo v3's patches and positions: no gradient, and no weight decay either."""
    fields = {"encoder.vit.positions": "sincos", "encoder.vit.frozen_patches": True}
    fields |= {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1, "optimizer.exclude": ()}
    made = method_of("byol", **FLAT | fields)
    start = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    before = start.online_params["encoder"]
    np.testing.assert_array_equal(before["positions"], positions.sincos(2, 2, 8))

    @jax.jit
    def updates(state):
        def loss(params):
            return made.network.encoder.apply({"params": params["encoder"]}, images).sum()

        grads = jax.grad(loss)(state.online_params)
        return made.optimizer.update(grads, state.opt_state, state.online_params)[0]

    moved = {
        name.split("/")[0] for name, x in flatten(updates(start)["encoder"]).items() if x.any()
    }
    fixed = {"patches", "positions"}
    assert moved == before.keys() - fixed
    section = config_of("byol", **fields).encoder
    assert set(encoders.frozen(section)) == fixed
    assert encoders.make_encoder(section, trainable=True).frozen == ()


# ------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"encoder.name": "vit_s12"}, r"encoder\.name='vit_s12': must be one of .* vit_s16"),
        ({"encoder.remat": "stages"}, r"encoder\.remat='stages': must be one of none, blocks"),
        ({"encoder.vit.heads": 3}, r"encoder\.vit\.heads=3: must divide the width, 8"),
        ({"encoder.vit.patch": 3}, r"data\.image_size=4: must be a multiple of 3, .* such as 3"),
        ({"views.global.size": 5}, r"views\.global\.size=5: must be a multiple of 2, .* as 4"),
        (
            {"encoder.vit.positions": "sincos", "encoder.vit.width": 6},
            r"encoder\.vit\.width=6: must be a multiple of 4",
        ),
        ({"encoder.vit.drop_path": 1.0}, r"encoder\.vit\.drop_path=1\.0: must be from 0"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_compiled(fields, told):
    with pytest.raises(UserError, match=f"^config\\.{told}"):
        config_lib.validate(config_of("byol", **fields), find("byol"))


def test_a_name_alone_makes_any_preset_a_vit():
    for name in METHODS:
        config = importlib.import_module(f"configs.{name}").get_config()
        config.encoder.name = "vit_s16"
        config_lib.validate(config, find(name))
        module = find(name)(config, None, 1, 0).network.encoder
        assert (module.width, module.depth, module.heads, module.patch) == (384, 12, 6, 16)
    assert encoders.describe(config.encoder) == "vit_s16"
    config.encoder.vit.heads = 12  # MoCo v3's ViT-S
    assert encoders.describe(config.encoder) == "vit_s16 (heads 12)"


# --------------------------------------------------------------------- its run, its evaluation


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    data = tiny_jobs.write_data(folder / "data")
    fields = {
        name.replace(".", "__"): value for name, value in (TINY | {"encoder.vit.patch": 4}).items()
    }
    with tiny_jobs.small_encoder():  # for its depth, which a ViT does not read
        yield tiny_jobs.make_run(data, folder / "run", **fields)


@pytest.mark.slow
def test_a_runs_encoder_is_read_exported_and_used(run, tmp_path):
    frozen = encoder.load(str(run), 2)
    assert frozen.variables["batch_stats"] == {} and frozen.variables["params"]["class_token"].any()
    with pytest.raises(UserError, match="--to=torchvision: holds ResNets"):
        exporting.check(frozen.config, "torchvision", measured=False)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    expected = Encoder(frozen).transform([pixels])
    for to, file in (("npz", ""), ("safetensors", "model.safetensors")):
        exporting.export(frozen, str(tmp_path / to), to, {})
        again = Encoder.load(tmp_path / to / file)
        np.testing.assert_array_equal(again.transform([pixels]), expected)
        assert "vit_ti4 (width 8, depth 3, heads 2)" in (tmp_path / to / "README.md").read_text()
    assert Encoder(frozen).transform([pixels], dense=True).shape == (1, 2, 2, 8)
    config = byol.get_config("folder")
    config.encoder.name = "vit_ti4"
    told = r"add --config\.encoder\.vit\.width=8 --config\.encoder\.vit\.depth=3"
    with pytest.raises(UserError, match=told):
        init_from.load(str(tmp_path / "npz"), config.to_dict())
    with pytest.raises(UserError, match=r"add --config\.encoder\.name=vit_ti4"):
        init_from.load(str(run), byol.get_config("folder").to_dict())


@pytest.mark.slow
def test_fine_tuning_on_larger_images(run, tmp_path):
    """Positions are interpolated from those of the run, which a checkpoint of the job still has."""
    larger = {"data__image_size": 12, "data__test_resize": 12, "views__global__size": 12}
    results = tiny_jobs.run_job("finetune", run, tmp_path, **larger)
    assert 0 <= results["finetune_top1"] <= 1
    frozen = encoder.load(str(tmp_path))
    assert frozen.config["views"]["global"]["size"] == 12
    assert frozen.variables["params"]["positions"].shape == (5, 8)
    with pytest.raises(UserError, match=r"image_size=10: must be a multiple of 4"):
        tiny_jobs.run_job(
            "finetune", run, tmp_path / "2", data__image_size=10, data__test_resize=10
        )
