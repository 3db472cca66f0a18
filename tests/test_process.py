import os

import jax
import pytest

from selfsup_jax import process
from selfsup_jax.errors import UserError


@pytest.mark.parametrize(
    ("count", "cores", "batch", "devices"),
    [
        (0, 2, (64, 1, 1), 2),
        (0, 1, (64, 1, 1), 1),
        (0, 2, (7, 1, 1), 1),  # an odd batch must run without a word about devices
        (0, 2, (6, 2, 1), 1),  # nor do its microbatches divide
        (0, 2, (64, 1, 3), 1),  # nor the batch-norm groups
        (4, 2, (64, 1, 1), 4),
    ],
)
def test_cpu_devices(monkeypatch, count, cores, batch, devices):
    asked = {}
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    process.use_cpu_devices(count, *batch)
    assert asked == {"jax_num_cpu_devices": devices}


def test_explicit_flags_go_before(monkeypatch):
    asked = {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    process.use_cpu_devices(0, 64, 1, 1)
    assert not asked


def test_a_negative_count_is_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match="--cpu_devices=-1"):
        process.use_cpu_devices(-1, 64, 1, 1)
