"""What a run would need on chips that are not attached."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import build, tiny_config

from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError
from selfsup_jax.plan import __main__ as bytes_table
from selfsup_jax.plan import chips, command, compiled, estimate, hlo


def test_names_of_pods():
    pod = chips.pod("v5e:4x4")
    assert (pod.chips, pod.hosts, pod.is_tpu) == (16, 4, True)
    assert chips.pod("v4:2x2x4").chips == 16
    pod = chips.pod("gpu:h100x8")
    assert (pod.kind, pod.chips, pod.hosts, pod.is_tpu) == ("h100", 8, 1, False)
    for name in ("v5e", "v5x:4x4", "gpu:h200x8", "gpu:h100x0", "4x4", "v5e:0x4"):
        with pytest.raises(UserError, match=f"--plan={name}: "):
            chips.pod(name)


PROGRAM = """HloModule step

FileNames
1 "/home/run.py"
2 "/home/x/selfsup_jax/models/norm.py"

FunctionNames
1 "main"

FileLocations
1 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=60 end_line=60 column=1 end_column=2}
3 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}

ENTRY %main (a: f32[10], b: bf16[4,5]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %b = bf16[4,5]{1,0:T(8,128)} parameter(1)
  %copy-start.1 = (bf16[4,5]{1,0:S(1)}, bf16[4,5]{1,0}, u32[]{:S(2)}) copy-start(%b), x={}
  %copy-done.1 = bf16[4,5]{1,0:S(1)} copy-done(%copy-start.1)
  %f.1 = f32[10]{0} fusion(%a, %copy-done.1), kind=kLoop, metadata={stack_frame_id=3}
  %all-reduce.1 = (f32[10]{0}, f32[2]{0:S(1)}) all-reduce(%f.1, %f.1), replica_groups={{0,1,2,3}}
  %g.1 = f32[8]{0} all-gather(%f.1), replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %f.2 = f32[10]{0} fusion(%f.1), kind=kLoop, metadata={stack_frame_id=1}
}
"""


def test_bytes_of_kernels_by_line():
    """On-chip arrays cost nothing; a copy belongs to the kernel that takes it."""
    moved = {kernel.name: kernel.moved for kernel in hlo.kernels(PROGRAM)}
    assert moved == {"copy-start.1": 40, "f.1": 80, "f.2": 80}
    by_line = hlo.bytes_by_line(PROGRAM)
    assert by_line == [("selfsup_jax/models/norm.py:60", 120, 2), ("elsewhere", 80, 1)]


def test_collectives_count_what_is_sent():
    found = hlo.collectives(PROGRAM, 4)
    assert found.counts == {"all-reduce": 1, "all-gather": 1}
    # All-reduce of 48 bytes among 4: 2 x 3/4 of them; all-gather to 32 among 2: half of them.
    assert found.sent == 72 + 16


def test_a_compiled_program_is_read():
    """The text of today's compiler: its collectives, and lines of this file."""

    def step(state, batch, *, axis_name):
        return state + jax.lax.psum(jnp.sin(batch).sum(), axis_name), batch

    mapped = parallel.step_over_devices(step, "pmap")
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    text = mapped.lower(jax.ShapeDtypeStruct((8, 100), jnp.float32), shape).compile().as_text()
    found = hlo.collectives(text, 8)
    assert found.counts == {"all-reduce": 1} and found.sent == 2 * 7 / 8 * 4
    lines = [line for line, _, _ in hlo.bytes_by_line(text, within=pathlib.Path(__file__).name)]
    assert any("test_plan.py:" in line for line in lines)


def made_up(**fields):
    values = {
        "flops": 197e12,
        "moved": 163.8e9,
        "arrays": 81.9e9,
        "arguments": 2**30,
        "temporaries": 2**31,
    }
    values |= {"collectives": hlo.Collectives({"all-reduce": 3}, 20e9), "seconds": 1.0} | fields
    return estimate.Program(**values)


def test_the_slowest_bound_counts():
    run = estimate.Run(batch_size=1600, steps=3600, price=2.0, cpu_seconds=0.002)
    plan = estimate.estimate(run, chips.pod("v5e:4x4"), made_up())
    assert (plan["fits"], plan["bound_by"], plan["all_reduces"]) == (True, "flops", 3)
    assert plan["step_seconds_lower_bound"] == pytest.approx(1.0)
    assert plan["step_seconds_by_memory"] == plan["step_seconds_by_links"] == pytest.approx(0.1)
    assert plan["step_seconds_by_all_bytes"] == pytest.approx(0.2)
    assert plan["cpu_cores_per_host"] == pytest.approx(400 * 0.002)
    assert (plan["hours"], plan["chip_hours"], plan["cost"]) == pytest.approx((1, 16, 32))
    slow = estimate.estimate(run, chips.pod("v5e:4x4"), made_up(arrays=1638e9))
    assert slow["bound_by"] == "memory" and slow["hours"] == pytest.approx(2.0)
    too_large = estimate.estimate(run, chips.pod("v5e:4x4"), made_up(temporaries=16 * 2**30))
    assert too_large["fits"] is False
    unknown = estimate.estimate(run, chips.pod("gpu:h100x8"), made_up(temporaries=None))
    assert unknown["fits"] is None


def test_a_run_is_compared_with_its_plan(tmp_path, monkeypatch):
    share = functools.partial(estimate.share_of_plan, str(tmp_path), 16)
    assert share(50.0) is None
    plan = {"pod": "v5e:2x4", "chips": 8, "batch_size": 16, "images_per_second_upper_bound": 200}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert share(50.0) is None  # these are CPUs
    kind = chips.TPUS["v5e"]._replace(device_kind=jax.devices()[0].device_kind)
    monkeypatch.setitem(chips.TPUS, "v5e", kind)
    assert share(50.0) == 0.25
    assert estimate.share_of_plan(str(tmp_path), 32, 50.0) is None  # planned for another batch
    (tmp_path / "plan.json").write_text(json.dumps({"plans": [plan]}))
    assert share(50.0) is None


def test_bytes_of_products():
    def product(x, kernel, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return jnp.sin(y).reshape(2, -1) @ w

    arrays = jnp.zeros((2, 4, 4, 3), jnp.bfloat16), jnp.zeros((3, 3, 3, 5), jnp.bfloat16)
    text = jax.jit(product).lower(*arrays, jnp.zeros((80, 7), jnp.bfloat16)).as_text()
    expected = 2 * (2 * 16 * 3 + 27 * 5 + 2 * 16 * 5 + 2 * 80 + 80 * 7 + 2 * 7)
    assert compiled._moved_by_products(text) == expected


@pytest.fixture
def on_simulated_devices(monkeypatch):
    """The tests' eight CPU devices in place of eight chips."""
    monkeypatch.setattr(compiled, "_devices", lambda pod: jax.devices()[: pod.chips])
    monkeypatch.setattr(compiled, "_set_environment", lambda: None)


def test_the_compilers_options_are_set_before_anything_can_load_it(tmp_path, monkeypatch):
    """Building a method draws random numbers, for which JAX looks for devices, TPUs too."""
    order = []
    monkeypatch.setattr(compiled, "_set_environment", lambda: order.append("options"))

    def build(*args):
        order.append("build")
        raise UserError("seen")

    with pytest.raises(UserError, match="seen"):
        command.run(tiny_config(tmp_path), "v5e:2x4", str(tmp_path), build=build)
    assert order == ["options", "build"]


@pytest.mark.usefixtures("on_simulated_devices")
def test_a_plan_is_printed_and_written(tmp_path, capsys):
    config = tiny_config(tmp_path)
    (plan,) = command.run(config, "v5e:2x4", str(tmp_path), 4000, 1.5, build=build)
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    expected = {"fits", "hbm_bytes_per_step", "temporary_bytes", "argument_bytes"}
    expected |= {"flops_per_step", "all_reduces", "compile_seconds", "step_seconds_lower_bound"}
    assert expected <= set(plan) and plan["fits"] and plan["all_reduces"] > 0
    text = capsys.readouterr().out
    assert "plan for v5e:2x4: 8 x v5e" in text and "memory    fits" in text
    bytes_table.main([str(tmp_path), "--lines=5"])
    assert "selfsup_jax/" in capsys.readouterr().out


def test_crops_on_the_devices_are_planned_with_the_step(tmp_path):
    """Two products a view and image: here of 32 pixels, to 8."""
    flops = {}
    for crop_on in ("host", "device"):
        config = tiny_config(tmp_path, data__crop_on=crop_on, data__canvas=32)
        (plan,) = command.run(config, "gpu:h100x1", str(tmp_path), build=build)
        flops[crop_on] = plan["flops_per_step"]
    products = 2 * config.batch_size * (8 * 32 * 32 + 8 * 32 * 8) * 3 * 2
    assert products <= flops["device"] - flops["host"] < 2 * products


@pytest.mark.slow
def test_plans_of_gpus_make_a_table(tmp_path, capsys):
    config = tiny_config(tmp_path)
    one, two = command.run(config, "gpu:h100x1,gpu:a100x2", str(tmp_path), build=build)
    assert one["flops_per_step"] == pytest.approx(2 * two["flops_per_step"], rel=0.1)
    assert (tmp_path / "plan.png").stat().st_size > 5000
    text = capsys.readouterr().out
    assert "temporaries are not known" in text and "its length is not known" in text
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["gpu:h100x1", "gpu:a100x2"]
    assert json.loads((tmp_path / "plan.json").read_text())["plans"] == [one, two]


def test_the_largest_batch_that_fits(tmp_path, monkeypatch):
    """Compiled once each; other pods of the same call keep the config's batch."""
    tried = []

    def program(config, build, classes, pod):
        per_chip = config.batch_size // pod.chips
        tried.append(per_chip)
        # Not quite linear: the line through the first two says 120.
        needed = 2**30 * (1 + per_chip / 8 + max(0, per_chip - 32) / 64)
        return made_up(arguments=2**30, temporaries=needed - 2**30)

    monkeypatch.setattr(compiled, "program", program)
    config = tiny_config(tmp_path)
    plans = command.run(config, "v5e:2x4:batch,v5e:2x2", str(tmp_path), build=build)
    assert tried[:3] == [8, 32, 120] and sorted(tried[2:-1], reverse=True) == tried[2:-1]
    fits = tried[-2]
    assert 1 + fits / 8 + (fits - 32) / 64 <= 16 < 1 + (fits + 8) / 8 + (fits - 24) / 64
    assert [plan["batch_size"] for plan in plans] == [8 * fits, 16] and config.batch_size == 16
    assert tried[-1] == 4 and plans[0]["fits"]
    monkeypatch.setitem(chips.TPUS, "v5e", chips.TPUS["v5e"]._replace(memory=2**30))
    with pytest.raises(UserError, match="not even 8 images a chip"):
        command.run(config, "v5e:2x4:batch", str(tmp_path), build=build)
    with pytest.raises(UserError, match="GPU's temporaries"):
        command.run(config, "gpu:h100x8:batch", str(tmp_path), build=build)


def test_what_cannot_be_planned(tmp_path):
    config = tiny_config(tmp_path)
    for pods, what in (("v5e:3x3", "batch_size"), ("v5e:4x4,x", "--plan=x"), ("", "--plan=")):
        with pytest.raises(UserError, match=what):
            command.run(config, pods, str(tmp_path), build=build)
    for given in ({"images": 0}, {"price": float("nan")}):
        with pytest.raises(UserError, match=r"^--plan_(images=0|price=nan): must be"):
            command.run(config, "v5e:4x4", str(tmp_path), build=build, **given)
    config.job = "knn"
    with pytest.raises(UserError, match="for pretraining"):
        command.run(config, "v5e:4x4", str(tmp_path), build=build)
    assert not list(tmp_path.iterdir())
