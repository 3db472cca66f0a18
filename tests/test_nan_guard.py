"""Steps whose numbers are none: found, named, and told with their images."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.run import nan_guard


def metrics_of_step(**values: float) -> dict:
    """What a step's metrics are like: replicated over the devices, not yet looked at."""
    numbers = {"loss": 1.5, "grad_norm/encoder": 0.25} | values
    finite = np.isfinite(list(numbers.values())).all()
    arrays = {name: np.float32(value) for name, value in (numbers | {"finite": finite}).items()}
    return parallel.replicate(lambda x: x, arrays)


def names_of_step(step: int) -> np.ndarray:
    return np.array([f"images/{step}_{i}.png" for i in range(4)])


def test_finite_steps_pass(tmp_path):
    watch = nan_guard.NanGuard(str(tmp_path))
    for step in range(1, 6):
        watch.add(step, metrics_of_step(), names_of_step(step))
    watch.drain()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_the_step_that_is_not_finite_is_named_though_it_is_looked_at_later(tmp_path, lag):
    watch = nan_guard.NanGuard(str(tmp_path), lag=lag)
    broken = metrics_of_step(loss=np.nan, **{"grad_norm/encoder": np.inf, "tau": 0.5})
    for step in range(1, 5):
        watch.add(step, metrics_of_step(), names_of_step(step))

    def add_later_steps():
        watch.add(5, broken, names_of_step(5))
        for step in range(6, 6 + lag):
            assert step <= 5 + lag
            watch.add(step, metrics_of_step(loss=np.nan), names_of_step(step))

    with pytest.raises(UserError) as error:
        add_later_steps()
    path = tmp_path / "non_finite.json"
    told = str(error.value)
    assert "\n" not in told and "step 5 " in told and str(path) in told
    assert "loss nan" in told and "grad_norm/encoder inf" in told and "tau" not in told
    assert "config.optimizer.learning_rate" in told
    assert json.loads(path.read_text()) == {
        "step": 5,
        "non_finite": ["grad_norm/encoder", "loss"],
        "metrics": {"loss": "nan", "grad_norm/encoder": "inf", "tau": 0.5, "finite": 0.0},
        "images": names_of_step(5).tolist(),
    }


def test_a_step_is_not_looked_at_before_its_time(tmp_path):
    """Looking would make the host wait for the device."""
    watch = nan_guard.NanGuard(str(tmp_path))
    watch.add(1, metrics_of_step(loss=np.nan), names_of_step(1))
    watch.add(2, metrics_of_step(), names_of_step(2))
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="step 1 is not finite"):
        watch.add(3, metrics_of_step(), names_of_step(3))


def test_a_drain_looks_at_all_steps(tmp_path):
    watch = nan_guard.NanGuard(str(tmp_path))
    watch.add(7, metrics_of_step(), names_of_step(7))
    watch.drain()
    watch.add(8, metrics_of_step(loss=-np.inf), names_of_step(8))
    with pytest.raises(UserError, match="step 8 is not finite: loss -inf"):
        watch.drain()
