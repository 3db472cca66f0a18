"""Steps whose numbers are none: found, named, and told with their images."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.run import nan_guard


def metrics_of_steps(*steps: dict[str, float]) -> dict:
    """What a call's metrics are like: replicated over the devices, not yet looked at."""
    rows = [{"loss": 1.5, "grad_norm/encoder": 0.25} | values for values in steps]
    for row in rows:
        row["finite"] = float(np.isfinite(list(row.values())).all())
    arrays = {name: np.float32([row[name] for row in rows]) for name in rows[0]}
    return parallel.replicate(lambda x: x, arrays)


def metrics_of_step(**values: float) -> dict:
    return metrics_of_steps(values)


def names_of_step(step: int) -> np.ndarray:
    return np.array([f"images/{step}_{i}.png" for i in range(4)])


def names_of_steps(first: int, count: int = 1) -> list[np.ndarray]:
    return [names_of_step(step) for step in range(first, first + count)]


def test_finite_steps_pass(tmp_path):
    watch = nan_guard.NanGuard(str(tmp_path))
    for step in range(1, 6):
        watch.add(step, metrics_of_step(), names_of_steps(step))
    watch.drain()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("lag", [0, 1, 2, 3])
def test_the_step_that_is_not_finite_is_named_though_it_is_looked_at_later(tmp_path, lag):
    watch = nan_guard.NanGuard(str(tmp_path), lag=lag)
    broken = metrics_of_step(loss=np.nan, **{"grad_norm/encoder": np.inf, "tau": 0.5})
    for step in range(1, 5):
        watch.add(step, metrics_of_step(), names_of_steps(step))

    def add_later_steps():
        watch.add(5, broken, names_of_steps(5))
        for step in range(6, 6 + lag):
            assert step <= 5 + lag
            watch.add(step, metrics_of_step(loss=np.nan), names_of_steps(step))

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
    watch.add(1, metrics_of_step(loss=np.nan), names_of_steps(1))
    watch.add(2, metrics_of_step(), names_of_steps(2))
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="step 1 is not finite"):
        watch.add(3, metrics_of_step(), names_of_steps(3))


def test_a_drain_looks_at_all_steps(tmp_path):
    watch = nan_guard.NanGuard(str(tmp_path))
    watch.add(7, metrics_of_step(), names_of_steps(7))
    watch.drain()
    watch.add(8, metrics_of_step(loss=-np.inf), names_of_steps(8))
    with pytest.raises(UserError, match="step 8 is not finite: loss -inf"):
        watch.drain()


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_step_within_a_call_is_named_with_its_own_images(tmp_path, place):
    """The first of several; its values, not those of the call's last step."""
    steps = [{"loss": float(i)} for i in range(5)]
    for i in range(place, 5):
        steps[i] = {"loss": np.nan, "grad_norm/encoder": float(10 * i)}
    watch = nan_guard.NanGuard(str(tmp_path))
    watch.add(1, metrics_of_step(), names_of_steps(1))
    watch.add(2, metrics_of_steps(*steps), names_of_steps(2, 5))
    with pytest.raises(UserError, match=f"^step {2 + place} is not finite: loss nan;"):
        watch.drain()
    found = json.loads((tmp_path / "non_finite.json").read_text())
    assert found == {
        "step": 2 + place,
        "non_finite": ["loss"],
        "metrics": {"loss": "nan", "grad_norm/encoder": 10.0 * place, "finite": 0.0},
        "images": names_of_step(2 + place).tolist(),
    }


def test_rows_without_a_step_are_ignored(tmp_path):
    """A call of fewer steps than its loop can hold leaves rows that mean nothing."""
    watch = nan_guard.NanGuard(str(tmp_path))
    watch.add(1, metrics_of_steps({}, {}, {"loss": np.nan}, {"loss": np.nan}), names_of_steps(1, 2))
    watch.drain()
    assert not os.listdir(tmp_path)


def test_the_lag_is_counted_in_calls(tmp_path):
    watch = nan_guard.NanGuard(str(tmp_path), lag=1)
    watch.add(1, metrics_of_steps({}, {}, {"loss": np.nan}), names_of_steps(1, 3))
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="step 3 is not finite"):
        watch.add(4, metrics_of_step(), names_of_steps(4))
