"""How a process joins its job and uses its machine."""

import os
from types import SimpleNamespace

import jax
import pytest
from jax._src.clusters import ClusterEnv

from selfsup_jax.devices import cluster, hosts, process
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


@pytest.mark.parametrize(
    ("count", "batch", "most"), [(-1, 64, 64), (100_000, 64, 64), (65, 64, 64), (257, 0, 256)]
)
def test_counts_that_no_machine_can_make_are_refused(monkeypatch, count, batch, most):
    monkeypatch.setenv("XLA_FLAGS", "")
    with pytest.raises(UserError, match=f"--cpu_devices={count}: must be from 0 to {most}"):
        process.use_cpu_devices(count, batch, 1, 1)


def test_blocks_of_temporaries_on_the_cpu_only(monkeypatch):
    flag = "--xla_multiheap_size_constraint_per_heap"
    for only_cpus, given, sets in ((True, "--a=1", True), (False, "", False), (True, flag, False)):
        monkeypatch.setenv("XLA_FLAGS", given)
        monkeypatch.setattr(process, "_only_cpus", lambda only_cpus=only_cpus: only_cpus)
        process._divide_temporaries()
        expected = f"{given} {flag}=25000000" if sets else given
        assert os.environ["XLA_FLAGS"] == expected


def test_small_steps_need_no_blocks(monkeypatch):
    """And their programs can be kept for the next start."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    divided = []
    monkeypatch.setattr(process, "_divide_temporaries", lambda: divided.append(True))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=print))
    process.keep_freed_memory(64 * 16**2)
    assert not divided
    process.keep_freed_memory(128 * 32**2)
    process.keep_freed_memory()
    assert len(divided) == 2


# --------------------------------------------------------------------------------- the job


@pytest.fixture
def joined(monkeypatch):
    """The arguments of each `hosts.join`, with nothing in the environment."""
    calls: list[tuple] = []
    monkeypatch.setattr(hosts, "join", lambda *args: calls.append(args))
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_")) or "COORDINATOR" in name:
            monkeypatch.delenv(name)
    return calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "all three"),
        ((None, 2, 0), "all three"),
        (("127.0.0.1:1", 2, 2), "--process_id=2.*num_processes - 1 = 1"),
        (("127.0.0.1:1", 0, 0), "--num_processes=0: must be at least 1"),
    ],
)
def test_start_refuses_half_a_job(joined, arguments, message):
    with pytest.raises(UserError, match=message):
        process.start(*arguments)
    assert not joined


def test_start_takes_its_arguments(joined):
    process.start("127.0.0.1:1", 2, 1, 9.0, 8.0)
    assert joined == [("127.0.0.1:1", 2, 1, 9.0, 8.0, None)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("", ()),
        ("--config=a.py --process_id=1", ()),
        ("--coordinator_address=h:1 --num_processes=2 --process_id=2", ()),
        ("--coordinator_address=h:1 --num_processes=2 --process_id=x", ()),
        ("--coordinator_address=h:1 --num_processes=2 --process_id 1", (300.0, "h:1", 2, 1)),
        (
            "--coordinator_address=h:1 --num_processes=2 --process_id=0 --start_timeout=9 --nope",
            (9.0, "h:1", 2, 0),
        ),
        (
            "--coordinator_address=h:1 --num_processes=2 --process_id=0 --start_timeout=nan",
            (300.0, "h:1", 2, 0),
        ),
    ],
)
def test_hosts_that_are_told_of_a_mistake_before_the_start(joined, words, found):
    assert cluster.still_to_join(["run_experiment.py", *words.split()]) == found


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["start_timeout", "host_timeout"])
def test_timeouts_are_checked(joined, name, seconds):
    with pytest.raises(UserError, match=f"--{name}="):
        process.start(**{name: seconds})
    assert not joined


@pytest.mark.parametrize(
    ("environment", "others"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "one,two"}, True),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, True),
        ({"SLURM_NTASKS": "4"}, False),  # a shell within an allocation, not one of its tasks
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, True),
    ],
)
def test_start_joins_others_where_the_environment_names_them(
    joined, monkeypatch, environment, others
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = ("host:1", 4, 2, [0])
    monkeypatch.setattr(ClusterEnv, "auto_detect_unset_distributed_params", lambda *_: found)
    process.start(None, None, None, 9.0, 8.0)
    assert joined == ([("host:1", 4, 2, 9.0, 8.0, [0])] if others else [])


def test_an_environment_that_does_not_tell_where_process_0_is(joined, monkeypatch):
    """Open MPI 5."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")

    def initialize(**_):  # as JAX does
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"coordinator_address should be defined.*: give --coord"):
        process.start()


@pytest.mark.parametrize("on_tpu", [True, False])
def test_a_missing_host_is_told(joined, monkeypatch, on_tpu):
    """A TPU VM that goes on alone would train a part of the batch."""

    def missing(*_):
        raise UserError("process 1 of 2 did not start")

    if not on_tpu:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setattr(cluster, "on_a_tpu_vm", lambda: on_tpu)
    monkeypatch.setattr(cluster, "found", lambda timeout: cluster.Place("host:1", 2, 0))
    monkeypatch.setattr(hosts, "join", missing)
    with pytest.raises(UserError, match=r"^process 1 of 2 did not start$"):
        process.start()


def test_a_cluster_of_one_or_of_an_unknown_kind_is_left_to_jax(joined, monkeypatch):
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: started.append(options))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    for found in (("host:1", 1, 0, None), ("host:1", None, None, None), ()):
        monkeypatch.setattr(
            ClusterEnv, "auto_detect_unset_distributed_params", lambda *_, found=found: found
        )
        process.start(None, None, None, 9.0)
    assert not joined and started == [{"initialization_timeout": 9}] * 3
