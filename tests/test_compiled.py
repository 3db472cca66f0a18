"""Compiled programs that are kept: the next start finds them, also after `--compile_only`."""

from __future__ import annotations

import os

import jax
import pytest
import tiny_runs
from jax.experimental.compilation_cache import compilation_cache

from selfsup_jax.devices import cluster, compiled, hosts
from selfsup_jax.training import calls, compile_only, pretrain


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder in which each program is kept, however quick it was to compile."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compiled.keep(str(tmp_path / "kept"))
    jax.config.update(names[1], 0.0)
    compilation_cache.reset_cache()  # so that it is looked for anew
    yield tmp_path / "kept"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
def test_the_run_finds_the_step_that_was_compiled_before(kept, tmp_path, monkeypatch, capsys):
    data = tiny_runs.write_images(tmp_path / "images", classes=3, count=40)
    config = tiny_runs.tiny_config(
        data, steps=1, optimizer__warmup_steps=0, monitor__diagnostics_every_steps=0
    )
    tables = []
    compile_all = pretrain.compile_all
    monkeypatch.setattr(pretrain, "compile_all", lambda *args: tables.append(compile_all(*args)))
    for _ in range(2):
        options = {"build": tiny_runs.build, "compile_only": True}
        assert pretrain.pretrain(config, str(tmp_path / "run"), **options) == {}
    assert not (tmp_path / "run").exists() and list(kept.glob("*-cache"))
    first, second = ({row.name: row for row in rows} for rows in tables)
    step = first[compile_only._STEP]
    assert step.timed[1:] == (0, 1) and step.memory.temp_size_in_bytes > 0
    assert second[compile_only._STEP].timed[1:] == (1, 0)
    assert f"kept in {kept}" in capsys.readouterr().err

    calls_of_run, call = [], calls.Call.__call__

    def timed_call(self, *args):
        result, timed = compiled.timed(lambda: call(self, *args))
        calls_of_run.append(timed)
        return result

    monkeypatch.setattr(calls.Call, "__call__", timed_call)
    pretrain.pretrain(config, str(tmp_path / "run"), build=tiny_runs.build)
    assert [timed[1:] for timed in calls_of_run] == [(1, 0)]


def test_too_many_programs_go_the_oldest_first(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for i, name in enumerate("dbca"):
        for end in ("-cache", "-atime"):
            (tmp_path / f"{name}{end}").write_bytes(bytes(100))
            os.utime(tmp_path / f"{name}{end}", (1000 + i,) * 2)
    (tmp_path / "of_the_user").write_bytes(bytes(1000))
    compiled._remove_oldest(compiled.epath.Path(tmp_path), 200)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a-atime", "a-cache", "c-atime", "c-cache", "of_the_user"]


@pytest.mark.parametrize(
    ("several", "on_tpu", "workdir", "shared"),
    [
        (False, False, "runs/x", False),
        (True, False, "runs/x", True),
        (False, True, "runs/x", True),
        (False, False, "gs://bucket/x", True),
    ],
)
def test_where_programs_are_kept(monkeypatch, several, on_tpu, workdir, shared):
    monkeypatch.setattr(hosts, "several", lambda: several)
    monkeypatch.setattr(cluster, "on_a_tpu_vm", lambda: on_tpu)
    found = compiled.directory("auto", workdir)
    assert found == (f"{workdir}/compiled" if shared else "~/.cache/selfsup_jax/compiled")
    assert compiled.directory("", workdir) == "" and compiled.directory("/a", workdir) == "/a"


def test_jaxs_own_variables_for_compiled_programs_come_first(tmp_path, monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        compiled.keep(str(tmp_path))
        assert {name: getattr(jax.config, name) for name in names} == before
        for name in names:
            monkeypatch.delenv(name.upper())
        compiled.keep("")
        assert jax.config.jax_compilation_cache_dir == before[names[0]]
        compiled.keep(str(tmp_path))
        assert [getattr(jax.config, name) for name in names] == [str(tmp_path), 0.5]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
