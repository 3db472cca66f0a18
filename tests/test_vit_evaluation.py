"""Evaluating Vision Transformers: their tokens as features, layer-wise learning rates, pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_jobs
import tiny_runs
from conftest import flatten, tiny_method, tiny_networks

from configs import common, finetune, knn, linear_probe
from selfsup_jax.data import inputs
from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder, representations, supervised
from selfsup_jax.state import TrainState
from selfsup_jax.training import attention
from selfsup_jax.viz import plots

WIDTH, DEPTH = 8, 4
SIZES = {"width": WIDTH, "depth": DEPTH, "heads": 2, "patch": 4}


def vit_config(**changes):
    section = common.encoder(name="vit_ti4", vit=common.vit(**(SIZES | changes)))
    views = {"mean": [0.5] * 3, "std": [0.2] * 3}
    return {"encoder": section.to_dict(), "views": views, "data": {"image_size": 8}}


@pytest.fixture(scope="module")
def variables():
    return encoder.untrained(vit_config(), seed=0)


def test_tokens_of_the_last_blocks_are_features(variables):
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    module = encoder.module(vit_config(), "float32")
    blocks = np.asarray(module.apply(variables, images, DEPTH, method="intermediate"))
    assert blocks.shape == (DEPTH, 3, 1 + 4, WIDTH)
    expected = {
        "": blocks[-1][:, 0],
        "last4": np.concatenate(list(blocks[-4:, :, 0]), axis=1),  # the earliest of the 4 first
        "class_mean": np.concatenate([blocks[-1][:, 0], blocks[-1][:, 1:].mean(1)], axis=1),
    }
    assert set(expected) == set(representations.CHOICES)
    for features, value in expected.items():
        found = representations.of(vit_config(), "float32", features)
        got = jax.jit(found.apply)(variables, images)
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
        assert got.shape[1] == found.num_features and got.dtype == np.float32


def test_features_that_an_encoder_lacks_are_refused():
    resnet = {"encoder": common.encoder(depth=18).to_dict()}
    for config, features, message in (
        (resnet, "last4", "config.features='last4': must be '': a ResNet has no tokens"),
        (resnet, "class_mean", "config.features='class_mean': must be '': a ResNet has no tokens"),
        (
            vit_config(depth=3),
            "last4",
            "config.features='last4': must be '' or class_mean: 3 blocks",
        ),
    ):
        with pytest.raises(UserError) as error:
            representations.of(config, "float32", features)
        assert str(error.value) == message


def test_the_learning_rate_decays_towards_the_input(variables):
    """BEiT's groups: embeddings; each block; the last norm with the classifier."""
    of_vit = supervised.head_distances(variables["params"])
    first = {"patches": DEPTH + 1, "class_token": DEPTH + 1, "positions": DEPTH + 1}
    assert of_vit == first | {f"block{i}": DEPTH + 1 - i for i in range(1, DEPTH + 1)} | {"norm": 0}
    names = ("stem", "stem_bn", "stage1_block1_conv1", "stage4_block2_conv1_bn")
    assert supervised.head_distances(names) == dict(zip(names, (5, 5, 4, 1), strict=True))

    params = {"encoder": variables["params"], "classifier": {"kernel": jnp.ones(3)}}
    optimizer = supervised.finetune_optimizer(optax.sgd(1.0), optax.sgd(10.0), layer_decay=0.5)
    ones = jax.tree.map(jnp.ones_like, params)
    updates = flatten(optimizer.update(ones, optimizer.init(params), params)[0])
    for path, update in updates.items():
        part = path.split("/")[1]
        rate = 10.0 if path.startswith("classifier/") else 0.5 ** of_vit[part]
        np.testing.assert_allclose(update, -rate, err_msg=path)


def test_protocols_are_those_of_the_authors():
    config = linear_probe.get_config("dino")
    assert config.features == "last4" and tuple(config.learning_rates) == (0.001,)
    assert (config.epochs, config.batch_size, config.optimizer.scaling) == (100, 1024, "linear")
    config = linear_probe.get_config("moco_v3")
    assert config.features == "" and tuple(config.learning_rates) == (0.1,)
    assert (config.epochs, config.batch_size, config.optimizer.schedule) == (90, 1024, "cosine")
    config = knn.get_config("dino")
    assert (tuple(config.neighbours), tuple(config.temperatures)) == ((20,), (0.07,))
    config = finetune.get_config("vit")
    assert (config.layer_decay, config.optimizer.weight_decay, config.epochs) == (0.65, 0.05, 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a ViT, a few images, and the jobs' folder."""
    root = tmp_path_factory.mktemp("vit")
    data = tiny_jobs.write_data(root / "data")
    sizes = {f"encoder__vit__{name}": value for name, value in SIZES.items()}
    with tiny_jobs.small_encoder():  # the depth of a ResNet, which is checked as well
        yield tiny_jobs.make_run(data, root / "run", encoder__name="vit_ti4", **sizes), root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "changes", "expected"),
    [
        ("embed", {"features": "class_mean"}, {"embedded_dimensions": 2 * WIDTH}),
        ("fewshot", {"features": "last4"}, {}),
        ("linear_probe:dino", {}, {"linear_probe_learning_rate": 0.001}),
        ("finetune", {"layer_decay": 0.5}, {}),
    ],
)
def test_jobs_take_a_vit(run, job, changes, expected):
    workdir, root = run
    results = tiny_jobs.run_job(job, workdir, root / job.replace(":", "_"), **changes)
    assert results.items() >= expected.items()
    top1 = [value for name, value in results.items() if name.endswith("top1")]
    assert job == "embed" or (top1 and all(0 <= value <= 1 for value in top1))


def test_finetuning_has_no_other_features(run):
    workdir, root = run
    with pytest.raises(UserError, match=r"^config\.features='last4': must be '': the encoder is"):
        tiny_jobs.run_job("finetune", workdir, root / "no", features="last4")


def test_the_picture_has_the_attention_to_held_out_images(run, variables, monkeypatch):
    """Of every head, on images that are spread over the split; a ResNet has no such picture."""
    _, root = run
    config = tiny_runs.tiny_config(root / "data", eval__enabled=True).copy_and_resolve_references()
    source = inputs.load_data(config).test
    module = encoder.module(vit_config(), "float32")
    networks = tiny_networks().clone(encoder=module)
    params = {"encoder": variables["params"]}
    state = TrainState(jnp.int32(9), jax.random.PRNGKey(0), params, {}, {}, {}, ())
    state = parallel.replicate(lambda rng: state.replace(rng=rng), state.rng)
    drawn = []
    monkeypatch.setattr(
        plots, "attention_maps", lambda *args, **kwargs: drawn.append((args, kwargs))
    )
    attention.AttentionMaps(tiny_method(tiny_networks()), config, source).draw("a", 9, state)
    assert not drawn
    attention.AttentionMaps(tiny_method(networks), config, source).draw("a", 9, state)
    (((_, images, maps), told),) = drawn
    assert told == {"step": 9} and images.shape == (8, 8, 8, 3) and images.dtype == np.uint8
    assert maps.shape == (8, 2, 2, 2)
    x = (images / np.float32(255) - np.float32(config.views.mean)) / np.float32(config.views.std)
    expected = module.apply(variables, x, method="attention")
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)
    whole = np.concatenate([b["image"] for b in inputs.eval_batches(config.data, source, 32)()])
    rows = [np.flatnonzero((whole == image).all((1, 2, 3)))[0] for image in images]
    assert len(set(rows)) == 8 and max(rows) > len(whole) // 2
