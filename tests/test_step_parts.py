"""The parts of a step that `benchmarks.step` times: those that the method's own loss runs."""

from __future__ import annotations

import functools
import importlib

import jax
import numpy as np
import pytest
from test_dino import BATCH, random_batch, tiny_method

from benchmarks import report, step_parts
from selfsup_jax.build import find


def shapes_of(method, batch) -> step_parts.Given:
    state = jax.eval_shape(method.init_state, jax.random.PRNGKey(0))
    views = jax.eval_shape(functools.partial(step_parts.augmentation, method), state, batch)
    return step_parts.Given(state.online_params, state, batch, views)


@pytest.mark.parametrize(
    ("case", "views"),
    [
        # Both views, online and target.
        pytest.param("byol:demo", [2, 2], marks=pytest.mark.slow),
        ("simclr:demo", [2]),
        ("moco:demo", [1, 1]),  # queries of one view, keys of the other
        pytest.param("moco:v3_demo", [2, 2], marks=pytest.mark.slow),
        ("dino:demo", [2, 2, 2]),  # the student's two sizes, the teacher's one
        pytest.param("dino:imagenet", [2, 2, 8], marks=pytest.mark.slow),
        pytest.param("byol:imagenet,encoder.name=vit_s16", [2, 2], marks=pytest.mark.slow),
    ],
)
def test_all_passes_of_the_encoder_are_found(case, views):
    name, _, preset = case.partition(":")
    config = importlib.import_module(f"configs.{name}").get_config(preset)
    config.batch_size = 16
    method = find(config.method)(config, 10, 100, 1)
    given = shapes_of(method, report.fake_batch(16, report.sides(config)))
    found = jax.eval_shape(functools.partial(step_parts.encoder_forward, method), given)
    assert sorted(len(x) for x in found) == [16 * count for count in views]
    sides = sorted({group.shape[2] for group in given.views.values()})
    by_size = [
        len(jax.eval_shape(functools.partial(step_parts.encoder_forward, method, px=px), given))
        for px in sides
    ]
    assert sum(by_size) == len(views)


@pytest.mark.slow
def test_the_parts_make_the_loss():
    """Of views of two sizes; without the encoder's parameters, its results given."""
    method, batch = tiny_method(), random_batch(BATCH, 0) | {"label": np.zeros(BATCH, np.int32)}
    state = method.init_state(jax.random.PRNGKey(0))
    views = step_parts.augmentation(method, state, batch)
    given = step_parts.Given(state.online_params, state, batch, views)

    def both(given):
        features = step_parts.encoder_forward(method, given)
        nothing = {**given.params, "encoder": {}}
        after = step_parts.after_encoder(method, given._replace(params=nothing), features)
        return step_parts.forward(method, given)[0], after[0]

    whole, after = jax.jit(both)(given)
    assert float(whole) > 0 and float(whole) == float(after)
    run, inputs, params = step_parts.layers(method, given)
    assert len(run(inputs, params)) == 3  # one convolution, three passes
