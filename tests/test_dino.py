"""DINO against a NumPy oracle from its paper and code, in float64; devices; runs; collapse."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import pytest
import tiny_runs
from conftest import (
    LIGHTLY,
    MEAN,
    STD,
    TinyEncoder,
    assert_close,
    assert_same,
    flatten,
    replicated,
    with_network,
)
from PIL import Image

from configs import dino
from dino_jax import losses, settings
from dino_jax import method as dino_method
from selfsup_jax import checks, durations, optim
from selfsup_jax import config as config_lib
from selfsup_jax.build import find
from selfsup_jax.data import inputs
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.models import heads, vit
from selfsup_jax.run import checkpoint
from selfsup_jax.state import encoder_variables
from selfsup_jax.training import diagnostics, init_from, pretrain
from selfsup_jax.viz import plots

BATCH, STEPS, TOTAL_STEPS, LOCAL = 6, 4, 8, 2
SIZES = (6, 6, 4, 4)  # pixels of the views
PEAK, DECAYS, CLIP, FROZEN, TAU = 0.05, (0.04, 0.4), 0.05, 2, 0.9
EPSILON = 1e-3  # of Adam; with a smaller one the sign of rounding would count
TEMPERATURES, WARMUP = (0.2, 0.1), 3  # of the teacher; the student has 0.15

TINY = {
    "data.image_size": SIZES[0],
    "data.test_resize": SIZES[0],
    "views.local.count": LOCAL,
    "views.local.size": SIZES[2],
    "views.mean": MEAN,
    "views.std": STD,
    "projector.hidden_sizes": (5, 6),
    "projector.output_size": 4,
    "projector.hidden_norm": False,
    "projector.linear_init": "torch",  # larger: the bottleneck's length is no rounding
    "prototypes": 7,
    "unit_prototypes": True,
    "student_temperature": 0.15,
    "teacher_first_temperature": TEMPERATURES[0],
    "teacher_temperature": TEMPERATURES[1],
    "teacher_warmup_steps": WARMUP,
    "centre_momentum": 0.8,
    "tau_base": TAU,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": PEAK,
    "optimizer.scaling": "none",
    "optimizer.end_fraction": 0.1,
    "optimizer.adam_epsilon": EPSILON,
    "optimizer.weight_decay": DECAYS[0],
    "optimizer.weight_decay_end": DECAYS[1],
    "optimizer.clip_norm": CLIP,
    "optimizer.exclude": ("bias$", "scale$"),
    "optimizer.freeze_steps": FROZEN,
}


def quiet(config):
    """Without augmentation, so that a step's images can be restated by hand."""
    for group in (config.views["global"], config.views.local):
        for view in (key for key in group if key.startswith("view_")):
            for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
                group[view][f"{name}_prob"] = 0.0
    return config


def tiny_config(**changes):
    config = quiet(dino.get_config("demo"))
    config.update_from_flattened_dict(TINY | changes)
    return config


def tiny_method(encoder=None, **changes):
    config = tiny_config(**changes)
    config_lib.validate(config, find("dino"))
    made = find("dino")(config, None, TOTAL_STEPS, 0)
    return with_network(made, encoder=encoder or TinyEncoder())


def random_batch(size, seed):
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 200, (size, 1, 1, 3))
    batch = {
        f"view_{i}": (colors + rng.integers(0, 56, (size, side, side, 3))).astype(np.uint8)
        for i, side in enumerate(SIZES, start=1)
    }
    return batch | {"index": np.arange(size, dtype=np.int32)}


# --------------------------------------------------------------------------- the oracle


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def encode(params, images):
    """Both views of a size are one batch for the norm, as in the authors' `MultiCropWrapper`."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["conv/kernel"]
    x = sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    x = x * params["bn/scale"] + params["bn/bias"]
    return np.maximum(x, 0).mean((1, 2))


def forward(params, views):
    """[V * B, F], and outputs [V * B, K] of views of several sizes."""
    part = lambda name: {  # noqa: E731
        k.removeprefix(f"{name}/"): v for k, v in params.items() if k.startswith(f"{name}/")
    }
    sizes = sorted({view.shape[1] for view in views}, reverse=True)
    same = [np.concatenate([v for v in views if v.shape[1] == size]) for size in sizes]
    features = x = np.concatenate([encode(part("encoder"), images) for images in same])
    head = part("projector")
    for name in ("hidden", "hidden_2"):
        x = gelu(x @ head[f"{name}/kernel"] + head[f"{name}/bias"])
    x = x @ head["output/kernel"] + head["output/bias"]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    kernel = part("prototypes")["kernel"]
    return features, x @ (kernel / np.linalg.norm(kernel, axis=0))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def oracle_loss(student, teacher, centre, student_temperature, teacher_temperature):
    """`DINOLoss.forward` of the authors' code, term by term."""
    views = np.split(student, len(SIZES))
    p = np.split(softmax((teacher - centre) / teacher_temperature), 2)
    terms = [
        -(p[t] * np.log(softmax(s / student_temperature))).sum(1).mean()
        for t in range(2)
        for v, s in enumerate(views)
        if v != t
    ]
    assert len(terms) == 2 * len(SIZES) - 2
    return np.mean(terms)


def oracle_gradient(params, loss):
    """Central differences."""
    gradients = {path: np.zeros_like(x) for path, x in params.items()}
    for path, leaf in params.items():
        for i in np.ndindex(leaf.shape):
            value, around = leaf[i], []
            for leaf[i] in (value + 1e-6, value - 1e-6):
                around.append(loss(params))
            leaf[i] = value
            gradients[path][i] = (around[0] - around[1]) / 2e-6
    return gradients


def cosine(start, end, step):
    return end + (start - end) * (1 + math.cos(math.pi * step / TOTAL_STEPS)) / 2


def oracle_update(params, gradients, memory, step):
    """The authors' loop with PyTorch's AdamW, which counts each tensor's steps by itself."""
    rate, decay = cosine(PEAK, 0.1 * PEAK, step), cosine(*DECAYS, step)
    new = {}
    for path, w in params.items():
        g = gradients[path]
        if path.startswith("prototypes") and step < FROZEN:  # `cancel_gradients_last_layer`
            new[path] = w
            continue
        g = g * min(1.0, CLIP / (np.linalg.norm(g) + 1e-6))  # `clip_gradients`
        m, v, count = memory.get(path, (0.0, 0.0, 0))
        m, v, count = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, count + 1
        memory[path] = m, v, count
        own = decay if w.ndim > 1 else 0.0
        moved = (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + EPSILON)
        new[path] = w * (1 - rate * own) - rate * moved
    return new


@pytest.fixture(scope="module")
def run():
    """(states with the first, metrics) of steps on batches of their own."""
    made = tiny_method()
    step = jax.jit(made.train_step)
    state = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    states, metrics = [state], []
    for k in range(STEPS):
        state, values = step(state, random_batch(BATCH, seed=k))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(values))
    return states, metrics


def as_float64(tree):
    return {path: x.astype(np.float64) for path, x in flatten(tree).items()}


@pytest.mark.slow
def test_each_update_is_the_papers(run):
    """From each state that a step found: loss, new student, teacher and centre, in four steps."""
    states, metrics = run
    memory: dict = {}
    assert_same(states[0].target_params, states[0].online_params)
    assert not states[0].centre.any()
    for k in range(STEPS):
        batch = random_batch(BATCH, seed=k)
        views = [(batch[f"view_{i}"] / 255 - MEAN) / STD for i in range(1, len(SIZES) + 1)]
        before, teacher = as_float64(states[k].online_params), as_float64(states[k].target_params)
        _, outputs = forward(teacher, views[:2])
        first, last = TEMPERATURES
        of_teacher = first + (last - first) * min(k / WARMUP, 1)
        centre = states[k].centre.astype(np.float64)

        def loss(params, views=views, outputs=outputs, centre=centre, of_teacher=of_teacher):
            return oracle_loss(forward(params, views)[1], outputs, centre, 0.15, of_teacher)

        np.testing.assert_allclose(metrics[k]["loss"], loss(before), rtol=2e-5)
        np.testing.assert_allclose(metrics[k]["teacher_temperature"], of_teacher, rtol=1e-6)
        p = softmax((outputs - centre) / of_teacher)
        entropy = -(p * np.log(p)).sum(1).mean()
        np.testing.assert_allclose(metrics[k]["teacher_entropy"], entropy, rtol=1e-4)
        np.testing.assert_allclose(metrics[k]["student_kl"], loss(before) - entropy, rtol=1e-3)
        usage = p.mean(0)
        to_uniform = (usage * np.log(usage * len(usage))).sum()
        np.testing.assert_allclose(metrics[k]["teacher_uniform_kl"], to_uniform, rtol=1e-3)

        gradients = oracle_gradient(before, loss)
        assert sum(np.linalg.norm(g) > CLIP for g in gradients.values()) > 2  # clipping acts
        expected = oracle_update(before, gradients, memory, k)
        got = flatten(states[k + 1].online_params)
        for path, value in expected.items():
            np.testing.assert_allclose(got[path], value, atol=3e-4, rtol=3e-4, err_msg=path)
            frozen = path.startswith("prototypes") and k < FROZEN
            assert (np.abs(value - before[path]).max() > 1e-3) != frozen, path
        tau = 1 - (1 - TAU) * (math.cos(math.pi * k / TOTAL_STEPS) + 1) / 2
        for path, value in flatten(states[k + 1].target_params).items():
            expected_teacher = tau * teacher[path] + (1 - tau) * got[path]
            np.testing.assert_allclose(value, expected_teacher, rtol=1e-5, atol=1e-6)
        renewed = 0.8 * centre + 0.2 * outputs.mean(0)  # after its use
        np.testing.assert_allclose(states[k + 1].centre, renewed, rtol=1e-4, atol=1e-6)


def test_outputs_are_those_of_the_global_views(run):
    states, metrics = run
    rows = metrics[0]["outputs"]
    assert rows.representation.shape == (2, BATCH, 4) and rows.target.shape == (2, BATCH, 4)
    batch = random_batch(BATCH, 0)
    views = [(batch[f"view_{i}"] / 255 - MEAN) / STD for i in (1, 2)]
    features, _ = forward(as_float64(states[0].online_params), views)
    np.testing.assert_allclose(rows.representation.reshape(-1, 4), features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(rows.projection, axis=-1), 1.0, rtol=1e-5)


def test_a_start_from_another_runs_weights_takes_its_centre(run):
    first, last = run[0][0], run[0][-1]
    arrays = {
        f"{name}/{path}": leaf
        for name in ("online_params", "online_stats", "target_params", "target_stats")
        for path, leaf in flatten(getattr(last, name)).items()
    }
    source = init_from.Source("a run", {}, arrays | {"centre": last.centre}, "")
    state, told = init_from.begin(first, source)
    assert_same(state.target_params, last.target_params)
    np.testing.assert_array_equal(state.centre, last.centre)
    assert "target prototypes, centre" in told.taken and told.new == "optimizer"
    source = source._replace(arrays={k: v for k, v in source.arrays.items() if "proto" not in k})
    state, told = init_from.begin(first, source)  # other prototypes have no use for it
    assert not state.centre.any() and "centre" in told.new


def test_no_gradient_flows_into_the_teacher_and_the_centre():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(4, 3, 5)), rng.normal(size=(2, 3, 5))

    def loss(*args):
        return losses.dino_loss(*args, 0.1, 0.05).loss

    arguments = [np.asarray(x, np.float32) for x in (student, teacher)]
    of_student, of_teacher = jax.jit(jax.grad(loss, (0, 1)))(*arguments, np.zeros(5, np.float32))
    assert np.abs(of_student).min() > 0 and not np.any(of_teacher)


def test_terms_at_both_collapses():
    """Uniform: entropy log K; one prototype: entropy 0, and its KL to uniform is log K."""
    none = np.zeros(8, np.float32)
    terms = jax.jit(lambda s, t, c: losses.dino_loss(s, t, c, 0.1, 0.04))
    even = terms(np.zeros((3, 4, 8), np.float32), np.zeros((2, 4, 8), np.float32), none)
    np.testing.assert_allclose(even[:3], [math.log(8), math.log(8), 0], atol=1e-5)
    assert float(losses.uniform_kl(even.usage)) == pytest.approx(0, abs=1e-5)
    one = np.zeros((3, 4, 8), np.float32)
    one[..., 2] = 9.0
    single = terms(one, one[:2], none)
    np.testing.assert_allclose(single[:3], [0, 0, 0], atol=1e-5)
    assert float(losses.uniform_kl(single.usage)) == pytest.approx(math.log(8), abs=1e-5)
    centred = terms(one, one[:2], one[0, 0])  # the centre takes it away
    assert float(centred.entropy) == pytest.approx(math.log(8), abs=1e-5)


def test_a_gain_scales_a_prototype():
    layer = heads.Prototypes(7, unit=False)
    x, kernel = (np.random.default_rng(0).normal(size=(3, 4, 7)).astype(np.float32))[:2]

    def run(gain, kernel):
        return layer.apply({"params": {"gain": gain, "kernel": kernel}}, x.T)

    apply = jax.jit(run)
    before = apply(np.ones(7, np.float32), kernel)
    after = apply(np.full(7, 2, np.float32), 5 * kernel)
    np.testing.assert_allclose(after, 2.0 * np.asarray(before), atol=1e-5)
    np.testing.assert_allclose(before, x.T @ (kernel / np.linalg.norm(kernel, axis=0)), atol=1e-5)


# ---------------------------------------------------------------------------- devices


def after_two_steps(made, devices, batch_size=16):
    """(state, metrics) of two steps on so many devices; 0: without a mapped axis."""
    state = jax.device_get(jax.jit(made.init_state)(jax.random.PRNGKey(0)))
    if devices:
        state = replicated(state, devices, "d")
        step = functools.partial(made.train_step, axis_name="d")
        step = jax.pmap(step, axis_name="d", devices=jax.devices()[:devices])
    else:
        step = jax.jit(made.train_step)
    for k in range(2):
        batch = random_batch(batch_size, seed=k)
        if devices:
            batch = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        state, metrics = step(state, batch)
    metrics.pop("outputs")
    state, metrics = jax.device_get((state, metrics))
    if not devices:
        return state, metrics
    first = jax.tree.map(lambda x: x[0], (state, metrics))
    for device in range(1, devices):  # replicas never drift apart
        assert_same(jax.tree.map(lambda x, d=device: x[d], (state, metrics)), first)
    return first


def assert_equal_runs(found, expected):
    (state, metrics), (expected_state, expected_metrics) = found, expected
    assert_close(metrics, expected_metrics, 1e-5, floor=0.1)
    for field in ("online_params", "target_params", "online_stats", "target_stats", "centre"):
        assert_close(getattr(state, field), getattr(expected_state, field), 1e-5, floor=0.1)


@pytest.mark.slow
def test_devices_do_not_change_the_update():
    """Loss, centre, student and teacher, with small crops: all agree to 1e-5."""
    made = tiny_method(**{"optimizer.learning_rate": 0.01, "optimizer.freeze_steps": 0})
    expected = after_two_steps(made, 0)
    assert expected[0].centre.any()
    for devices in (1, 2, 4, 8):
        assert_equal_runs(after_two_steps(made, devices), expected)


@pytest.mark.slow
def test_microbatches_do_not_change_the_update():
    """With a ViT and its drop path; the centre is that of the whole batch."""
    encoder = vit.ViT(width=8, depth=2, heads=2, patch=2, drop_path=0.5)
    rate = {"optimizer.learning_rate": 0.01}
    expected_state, expected = after_two_steps(tiny_method(encoder, **rate), 0)
    state, metrics = after_two_steps(tiny_method(encoder, accumulate_steps=2, **rate), 2)
    for values in (metrics, expected):
        del values["teacher_uniform_kl"]  # of a microbatch
    assert_equal_runs((state, metrics), (expected_state, expected))


seen: list = []


class Spy(TinyEncoder):
    """Notes what it is called with."""

    def __call__(self, x, layout=None):
        if layout is not None:
            seen.append((x.shape, layout.num_views, layout.noise and layout.noise.first_view))
        return super().__call__(x, layout)


def test_each_size_goes_through_an_encoder_once():
    """Drop path is the student's, with other draws for the small crops."""
    made = tiny_method(Spy())
    state = jax.eval_shape(made.init_state, jax.random.PRNGKey(0))
    seen.clear()
    jax.eval_shape(made.train_step, state, random_batch(BATCH, 0))
    large, small = ((2 * BATCH, side, side, 3) for side in (SIZES[0], SIZES[2]))
    assert seen == [(large, 1, 0), (small, 1, 2), (large, 1, None)]


def test_each_view_may_have_statistics_of_its_own():
    """Another offset of view 2 changes what view 1's outputs are only if they share statistics."""
    batch = random_batch(BATCH, 0)
    other = batch | {"view_2": batch["view_2"] // 2}
    for share in (True, False):
        made = tiny_method(**{"projector.hidden_norm": True, "views_share_norm": share})
        state = jax.jit(made.init_state)(jax.random.PRNGKey(0))
        step = jax.jit(made.train_step)
        outputs = [step(state, each)[1]["outputs"] for each in (batch, other)]
        for field in ("projection", "target"):  # the student's head, which has norms, the teacher's
            a, b = (getattr(rows, field)[0] for rows in outputs)
            change = np.abs(a - b).max()
            assert change > 0.01 if share else change < 1e-5, (field, share)


# ------------------------------------------------------------------------------ whole runs


def build(config, *args):
    """`dino_jax.method.build` with an encoder that compiles at once."""
    return with_network(dino_method.build(config, *args), encoder=TinyEncoder())


def run_config(folder, **changes):
    """The preset `folder` on tiny images: with the whole of its augmentation."""
    config = dino.get_config("folder")
    fields = {k: v for k, v in tiny_runs.fields(folder).items() if not k.startswith("views.")}
    small = {k: TINY[k] for k in TINY if k.startswith(("projector.", "views.local", "prototypes"))}
    fields |= {"steps": 8, "log_every_steps": 1, "checkpoint_every_steps": 2, "keep_checkpoints": 9}
    fields |= {
        "keep_every_steps": 2,
        "teacher_warmup_epochs": 1.0,
        "teacher_temperature": 0.07,
        "compute_dtype": "float32",
    }
    config.update_from_flattened_dict(small | fields | changes)
    return config


def restore(config, workdir, step=None):
    like = jax.eval_shape(build(config, 3, 8, 2).init_state, jax.random.PRNGKey(0))
    checkpoints = checkpoint.Checkpoints(str(workdir), keep=99)
    state = checkpoints.restore(like, step)
    checkpoints.close()
    return state


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_runs.write_images(tmp_path_factory.mktemp("images"), 3, 60)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """(config, workdir) of an uninterrupted run with pictures."""
    workdir = tmp_path_factory.mktemp("whole")
    config = run_config(images, **{"monitor.plots_every_steps": 8, "monitor.view_pairs": 4})
    pretrain.pretrain(config, str(workdir), build)
    return config, workdir


@pytest.mark.slow
def test_a_run(whole):
    config, workdir = whole
    lines = tiny_runs.recorded(workdir)
    assert len(lines) == 8 and all("teacher_entropy" in line for line in lines)
    # 54 training images in batches of 16: an epoch has three steps.
    np.testing.assert_allclose(
        [line["teacher_temperature"] for line in lines[:5]], [0.04, 0.05, 0.06, 0.07, 0.07], 1e-5
    )
    states = [restore(config, workdir, step) for step in (2, 4)]
    prototypes = [state.online_params["prototypes"]["kernel"] for state in states]
    assert (prototypes[0] != prototypes[1]).any() and states[1].centre.any()
    with Image.open(workdir / "plots" / "view_pairs.png") as picture:
        assert picture.height > 100


@pytest.mark.slow
def test_the_teacher_is_evaluated(whole, monkeypatch):
    """As by the authors."""
    config, workdir = whole
    monkeypatch.setattr(encoder, "check", lambda frozen: None)  # not the config's architecture
    state = restore(config, workdir)
    teacher, student = state.target_params["encoder"], state.online_params["encoder"]
    assert_same(encoder.load(str(workdir)).variables["params"], teacher)
    assert_same(encoder_variables(state, config.eval.network)["params"], teacher)
    assert_same(encoder_variables(state)["params"], student)


def test_without_a_target_network_there_is_none_to_evaluate(images, tmp_path):
    config = tiny_runs.tiny_config(images, eval__network="target", use_target_network=False)
    with pytest.raises(UserError, match=r"config\.eval\.network='target': must be online: this"):
        pretrain.pretrain(config, str(tmp_path))


class Killed(Exception):
    """In place of whatever ends a process at once."""


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_by_bit(whole, images, tmp_path, monkeypatch):
    """After the checkpoint of step 4, with the centre; and several steps in a call."""
    batches = inputs.train_batches

    def until_killed(config, data, first_step):
        for step, batch in enumerate(batches(config, data, first_step), start=first_step):
            if step == 5:
                raise Killed
            yield batch

    monkeypatch.setattr(inputs, "train_batches", until_killed)
    config = run_config(images)
    with pytest.raises(Killed):
        pretrain.pretrain(config, str(tmp_path), build)
    assert tiny_runs.saved_steps(tmp_path)[-1] == 4
    monkeypatch.undo()
    config.steps_per_call = 3
    pretrain.pretrain(config, str(tmp_path), build)
    assert_same(restore(config, tmp_path, 8), restore(config, whole[1], 8))


@pytest.mark.parametrize(
    "fields",
    [
        {"data.placement": "device"},
        {"data.placement": "host"},
        {"data.placement": "host", "data.crop_on": "device", "data.canvas": 16},
    ],
    ids=["on the device", "on the host", "cropped on the device"],
)
def test_small_crops_are_the_same_wherever_they_are_cropped(images, fields):
    """Of sizes of their own, from boxes of their own; up to one grey level by rounding."""
    config = run_config(images, **{"seed": 3} | fields).copy_and_resolve_references()
    data = inputs.load_data(config)
    batch = next(inputs.train_batches(config, data, 0))
    batch.pop("name")
    views = jax.device_get(inputs.with_views(inputs.feed(config, data.train), 0, batch))
    assert [views[f"view_{i}"].shape for i in range(1, 5)] == [
        (16, size, size, 3) for size in (8, 8, 4, 4)
    ]
    pixels = np.concatenate([views[f"view_{i}"].reshape(-1) for i in range(1, 5)]).astype(int)
    expected = of_the_first.setdefault("pixels", pixels)
    assert np.abs(pixels - expected).max() <= 1
    assert (views["view_3"] != views["view_4"]).any()


of_the_first: dict = {}


# ------------------------------------------------------------------------ config, collapse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn_groups": 2}, "bn_groups=2: must be 1"),
        ({"views.global.count": 3}, "views.global.count=3: must be 2"),
        ({"teacher_temperature": 0.0}, "teacher_temperature=0.0: must be above 0"),
        ({"centre_momentum": 1.5}, "centre_momentum=1.5: must be from 0 to 1"),
        ({"monitor.collapse_entropy": 1.5}, "monitor.collapse_entropy=1.5: must be from 0 to 1"),
        ({"prototypes": 1}, "prototypes=1: must be at least 2"),
        ({"optimizer.freeze": ("^prototype/",)}, "optimizer.freeze='.prototype/': matches no"),
    ],
)
def test_mistakes_are_named(changes, message):
    config = tiny_config(**changes)
    with pytest.raises(UserError, match=f"config.{message}"):
        config_lib.validate(config, find("dino"))
        config_lib.check_patterns(config, find("dino"))


def test_without_small_crops_there_are_two_views():
    config = tiny_config(**{"views.local.count": 0})
    made = find("dino")(config, None, TOTAL_STEPS, 0)
    assert {name: len(views) for name, views in made.augment.groups.items()} == {"global": 2}
    assert made.notes[0].startswith("crops of an image: 2 of 6 px; 7 prototypes")


def test_durations_become_steps():
    config = dino.get_config("folder")
    config.update(batch_size=10, teacher_warmup_epochs=2.0, teacher_temperature=0.07)
    durations.fill_in(config, 105)
    assert config.teacher_warmup_steps == 20 and config.optimizer.freeze_steps == 10
    assert config.optimizer.warmup_steps is None and config.steps is None
    config.teacher_warmup_steps, config.teacher_warmup_examples = None, 45
    durations.fill_in(config, 105)
    assert config.teacher_warmup_steps == 4
    temperature = settings.teacher_temperature(config)
    values = [float(temperature(k)) for k in (0, 2, 4, 9)]
    np.testing.assert_allclose(values, [0.04, 0.055, 0.07, 0.07], rtol=1e-6)


def history(**series):
    steps = [1, 2, 3]
    healthy = {"projection_std": [0.9] * 3, "effective_rank": [30.0] * 3}
    return {name: (steps, values) for name, values in (healthy | series).items()}


def test_both_collapses_are_told_as_such():
    signs = settings.signs(tiny_config())
    limits = {"min_std": 0.1, "min_rank": 1.5, "signs": signs}
    most = math.log(7)
    sharp = {"teacher_entropy": [0.1] * 3, "teacher_uniform_kl": [0.5] * 3}
    assert diagnostics.collapsed_at(history(**sharp), **limits) is None
    uniform = history(teacher_entropy=[1.0, most, most], teacher_uniform_kl=[0.3, 0.0, 0.0])
    assert diagnostics.collapsed_at(uniform, **limits) == 3
    told = diagnostics.collapse_warning(3, uniform, min_std=0.1, signs=signs)
    assert "uniform for all images" in told and "lower config.teacher_temperature" in told
    single = history(teacher_entropy=[0.0] * 3, teacher_uniform_kl=[most] * 3)
    assert diagnostics.collapsed_at(single, **limits) == 2
    told = diagnostics.collapse_warning(2, single, min_std=0.1, signs=signs)
    assert "one prototype" in told and "lower config.centre_momentum" in told
    assert diagnostics.collapsed_at(single, min_std=0.1, min_rank=1.5) is None
    shares = {"monitor.collapse_entropy": 0.04, "monitor.collapse_uniform_kl": 0.2}
    limits["signs"] = settings.signs(tiny_config(**shares))
    assert diagnostics.collapsed_at(history(**sharp), **limits) == 2  # 0.1 and 0.5 of log 7 = 1.95
    limits["signs"] = settings.signs(tiny_config(**dict.fromkeys(shares, 1.0)))
    assert diagnostics.collapsed_at(single, **limits) is None
    notes = " ".join(settings.notes(tiny_config(centre_momentum=1.0, teacher_temperature=0.15)))
    assert "no centring" in notes and "no sharpening" in notes


def test_pictures_show_the_small_crops(tmp_path):
    pair = np.zeros((2, 3, 16, 16, 3))
    sizes = []
    for local in (None, np.ones((5, 3, 8, 8, 3))):
        path = str(tmp_path / "pairs.png")
        plots.view_pairs(path, *pair, local, step=1)
        with Image.open(path) as picture:
            sizes.append((picture.size, np.asarray(picture.convert("L"))))
    assert sizes[1][0][1] > sizes[0][0][1] and sizes[1][0][0] == sizes[0][0][0]


def test_the_presets_are_the_papers():
    config = dino.get_config()
    assert config.encoder.name == "vit_s16" and config.encoder.vit.drop_path == 0.1
    assert config.views["global"].area == (0.4, 1.0) and config.views["global"].count == 2
    local = config.views.local
    assert (local.count, local.size, local.area) == (8, 96, (0.05, 0.4))
    peak = optim.scaled_learning_rate(config.optimizer.learning_rate, config.batch_size, "linear")
    assert peak == 2e-3 and peak * config.optimizer.end_fraction == pytest.approx(1e-6)
    names = ("weight_decay", "weight_decay_end", "clip_norm", "clip_each", "warmup_epochs")
    assert [config.optimizer[name] for name in names] == [0.04, 0.4, 3.0, True, 10.0]
    resnet = dino.get_config("imagenet_resnet50")
    assert resnet.encoder.name == "resnet" and resnet.encoder.depth == 50
    assert resnet.views["global"].area == (0.14, 1.0) and resnet.views.local.area == (0.05, 0.14)


def test_cifar10_resnet18_is_lightlys_recipe():
    expected = LIGHTLY | {
        "views.global.area": (0.4, 1.0),
        "data.resize_method": "bicubic",
        "views.global.view_1.saturation": 0.2,
        "views.global.view_1.solarize_prob": 0.0,
        "views.global.view_2.solarize_prob": 0.2,
        "views.local.count": 0,
        "views_share_norm": False,
        "projector.hidden_sizes": (2048,),
        "projector.hidden_norm": True,
        "projector.hidden_bias": False,
        "projector.output_bias": True,
        "projector.output_size": 256,
        "prototypes": 2048,
        "unit_prototypes": True,
        "teacher_temperature": 0.04,
        "teacher_warmup_epochs": 0.0,
        "tau_base": 0.99,
        "tau_schedule": "constant",
        "optimizer.learning_rate": 0.12,
        "optimizer.weight_decay": 5e-4,
        "optimizer.clip_norm": 0.0,
        "optimizer.freeze": (),
        "eval.network": "online",
        "eval.knn_k": 200,
        "eval.knn_temperature": 0.1,
    }
    fields = dict(checks.leaves(dino.get_config("cifar10_resnet18")))
    assert {field: fields[field] for field in expected} == expected
