"""Sweeps: which runs are begun and which are not, the record and the table, and mistakes."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny_runs
from conftest import REPOSITORY, StandIn, process_env
from ml_collections import ConfigDict

from configs import byol_to_simclr, cifar10_methods, common, parsing
from selfsup_jax import config as config_lib
from selfsup_jax.build import find
from selfsup_jax.data import inputs
from selfsup_jax.errors import NotFinite, Stopped, UserError
from selfsup_jax.run import signals
from selfsup_jax.state import Outputs, TrainState
from selfsup_jax.training import sweep

RATES = {"low": 0.1, "high": 0.5}
METRICS = ("linear_probe_top1", "loss", "projection_std")
NAMES = ["low/seed_0", "high/seed_0", "low/seed_1", "high/seed_1"]


def quick_build(config, *_) -> StandIn:
    """A method that compiles in a blink: pixels times a matrix that wanders with the images.

    Its numbers depend on the seed, on the rate, on each step's images and on every step before.
    """
    size = config.data.image_size

    def init_state(rng):
        params = {"encoder": {"w": jax.random.normal(rng, (size * size * 3, 4))}}
        return TrainState(jnp.int32(0), rng, params, {}, params, {}, (jnp.zeros(1),))

    def represent(variables, images):
        pixels = images.reshape(len(images), -1)
        return (pixels - pixels.mean(1, keepdims=True)) @ variables["params"]["w"]

    def train_step(state, batch, *, axis_name):
        views = jnp.stack([batch["view_1"], batch["view_2"]]) / 255.0
        seen = jax.lax.pmean(views.mean((0, 1)).reshape(-1, 1), axis_name)
        noise = jax.random.normal(jax.random.fold_in(state.rng, state.step), (4,))
        rate = config.optimizer.learning_rate
        params = jax.tree.map(lambda w: w + rate * seen * noise, state.online_params)
        rows = jax.vmap(represent, (None, 0))({"params": params["encoder"]}, views)
        loss = jnp.mean(params["encoder"]["w"] ** 4)
        metrics = {"loss": loss, "finite": jnp.isfinite(loss) * 1.0}
        state = state.replace(step=state.step + 1, online_params=params)
        return state, metrics | {"outputs": Outputs(rows, rows, rows, rows)}

    return StandIn(init_state, train_step, represent)


def BUILDS(name):
    return quick_build if name == "byol" else find(name)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny_runs.write_images(tmp_path_factory.mktemp("images"), 3, 60)


def make_config(folder, seeds=(0, 1), each=None, variants=None, **changes) -> ConfigDict:
    """A sweep of two rates; `each` changes fields of every run, `variants` of single ones."""
    quick = {"steps": 4, "checkpoint_every_steps": 2, "log_every_steps": 1} | (each or {})
    variants = variants or {name: {"optimizer__learning_rate": r} for name, r in RATES.items()}
    runs = {name: tiny_runs.tiny_config(folder, **quick | v) for name, v in variants.items()}
    config = common.sweep("Two rates", runs, seeds)
    config.columns = ("use_predictor", "tau_base")
    config.metrics = METRICS
    config.update(changes)
    return config.lock()  # as one from the command line is


PROBED = {"eval__enabled": True, "eval__random_init": False, "monitor__diagnostics_every_steps": 2}


def spy_on(patch: pytest.MonkeyPatch, module) -> list[str]:
    """The names of the runs that are begun from here on, in order."""
    begun = []
    pretrain = module.pretrain

    def spy(config, folder, *args, **kwargs):
        begun.append("/".join(pathlib.Path(folder).parts[-2:]))
        return pretrain(config, folder, *args, **kwargs)

    patch.setattr(module, "pretrain", spy)
    return begun


@pytest.fixture
def begun(monkeypatch):
    return spy_on(monkeypatch, sweep)


@pytest.fixture
def pretended(monkeypatch):
    """No run is made: `pretended[name] = results`, or what it raises. Those begun: `.begun`."""

    class Pretended(dict):
        begun: list[str]

    outcomes = Pretended()

    def pretrain(config, folder, build, **kwargs):
        name = "/".join(pathlib.Path(folder).parts[-2:])
        numbers = {"loss": len(name) + config.seed / 4, "linear_probe_top1": 0.5}
        outcome = outcomes.get(name, numbers | {"collapsed": False, "images_per_second": 10.0})
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(sweep, "pretrain", pretrain)
    outcomes.begun = spy_on(monkeypatch, sweep)
    return outcomes


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def read_table(directory: pathlib.Path) -> dict[str, dict[str, str]]:
    """{first cell: {heading: cell}} of the Markdown."""
    lines = [line for line in (directory / "table.md").read_text().splitlines() if line[:1] == "|"]
    assert len({len(line) for line in lines}) == 1  # it reads well as it is
    head, rule, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert not "".join(rule).strip("-") and len(rule) == len(head)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def files_of(directory: pathlib.Path) -> dict:
    """All that lies in the runs' folders, and when it was written; who holds them is left out."""
    paths = [p for name in NAMES for p in (directory / name).rglob("*") if p.is_file()]
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in paths if p.name != ".lock"}


def steady(results: dict) -> dict:
    return {k: v for k, v in results.items() if k != "images_per_second"}


# --------------------------------------------------------------------------- a whole sweep


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A sweep that nothing disturbs: (config, directory, what it returned, its runs in order)."""
    directory = tmp_path_factory.mktemp("whole") / "sweep"
    config = make_config(images, each=PROBED)
    with pytest.MonkeyPatch.context() as patch:
        begun = spy_on(patch, sweep)
        returned = sweep.run(config, str(directory), BUILDS)
    return config, directory, returned, begun


@pytest.mark.slow
def test_each_variant_is_run_once_with_each_seed(whole):
    """Seed by seed, so that a table of the first is there early."""
    _, directory, _, begun = whole
    assert begun == NAMES
    for variant, seed in itertools.product(RATES, (0, 1)):
        written = read(directory / variant / f"seed_{seed}" / "config.json")
        assert written["optimizer"]["learning_rate"] == RATES[variant]
        assert written["seed"] == seed
        assert read(directory / variant / f"seed_{seed}" / "results.json")["seed"] == seed


@pytest.mark.slow
def test_the_record_holds_every_run(whole):
    config, directory, _, _ = whole
    record = read(directory / "runs.json")
    assert sorted(record) == sorted(NAMES)
    here = {"data.dir", "data.download", "log_every_steps"}
    here |= {"checkpoint_every_steps", "keep_checkpoints", "keep_every_steps"}
    here |= {"monitor.knn_every_steps", "monitor.plots_every_steps", "data.max_undecodable"}
    here |= {"profile.first_step", "profile.num_steps", "wandb.project", "wandb.entity"}
    here |= {"data.placement", "data.device_share", "steps_per_call"}
    here |= {f"encoder.{name}" for name in ("remat", "pool_first", "product_norm_stages")}
    here |= {"encoder.vit.attention_kernel", "data.processes", "data.reader"}
    for name, entry in record.items():
        variant, seed = entry["variant"], entry["seed"]
        assert name == f"{variant}/seed_{seed}"
        assert set(entry["config"]) == set(parsing.field_names(config.variants[variant])) - here
        assert entry["config"]["optimizer.learning_rate"] == RATES[variant]
        assert entry["config"]["seed"] == seed
        assert entry["results"] == read(directory / name / "results.json")
        assert entry["seconds"] > 0 and entry["jax"] == jax.__version__


@pytest.mark.slow
def test_the_table_has_means_and_deviations(whole):
    """Of the results that the runs wrote themselves; fractions as percentages."""
    _, directory, returned, _ = whole
    rows = read_table(directory)
    results = read(directory / "results.json")
    assert results == returned and list(rows) == list(RATES)
    assert all(isinstance(value, int | float) for value in results.values())
    assert results["runs"] == results["of_runs"] == 4
    columns = {"linear_probe_top1": "linear probe, top-1", "loss": "loss"}
    columns |= {"projection_std": "projection std"}
    for variant, row in rows.items():
        runs = [read(directory / variant / f"seed_{seed}" / "results.json") for seed in (0, 1)]
        for measure, heading in columns.items():
            values = [run[measure] for run in runs]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            assert results[f"{variant}_{measure}_mean"] == pytest.approx(mean)
            assert results[f"{variant}_{measure}_std"] == pytest.approx(deviation)
            if measure.endswith("top1"):
                assert row[heading] == f"{100 * mean:.1f} ± {100 * deviation:.1f} %"
            else:
                assert row[heading] == f"{mean:.2f} ± {deviation:.2f}"
        assert (row["predictor"], row["tau base"], row["collapsed"]) == ("yes", "0.99", "no")
        speed = statistics.median(run["images_per_second"] for run in runs)
        assert row["images/s"] == f"{speed:,.0f}"
        assert results[f"{variant}_collapsed"] == 0
    assert results["low_loss_mean"] != results["high_loss_mean"]
    text = (directory / "table.md").read_text()
    assert text.startswith("Two rates\n") and "to come" not in text


@pytest.mark.slow
def test_a_second_call_repeats_nothing(whole, begun):
    config, directory, returned, _ = whole
    table, before = (directory / "table.md").read_bytes(), files_of(directory)
    (directory / "table.md").unlink()
    assert sweep.run(config, str(directory), BUILDS) == returned
    assert begun == [] and files_of(directory) == before
    assert (directory / "table.md").read_bytes() == table


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(name, step, f)`: f is called once, when that run asks for the batch of the step."""
    calls = {}
    train_batches = inputs.train_batches

    def interrupted(config, data, first_step):
        variant = next(v for v, rate in RATES.items() if rate == config.optimizer.learning_rate)
        batches = train_batches(config, data, first_step)
        for step, batch in enumerate(batches, first_step + 1):
            calls.pop((f"{variant}/seed_{config.seed}", step), lambda: None)()
            yield batch

    monkeypatch.setattr(inputs, "train_batches", interrupted)
    return lambda name, step, call: calls.update({(name, step): call})


def copy_without(source: pathlib.Path, target: pathlib.Path, names: list[str]) -> pathlib.Path:
    """A sweep's directory whose record does not have these runs."""
    shutil.copytree(source, target)
    record = {k: v for k, v in read(source / "runs.json").items() if k not in names}
    (target / "runs.json").write_text(json.dumps(record))
    return target


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on(whole, begun, at_step, tmp_path, capfd):
    """Told to stop in one run and broken off in another: all ends as if it had not been."""
    config, undisturbed, returned, _ = whole
    stopped_one, broken_one = NAMES[1:3]
    directory = copy_without(undisturbed, tmp_path / "copy", NAMES[1:3])
    for name in (stopped_one, broken_one):
        shutil.rmtree(directory / name)

    def interrupt():
        raise KeyboardInterrupt

    at_step(stopped_one, 3, lambda: signal.raise_signal(signal.SIGTERM))
    at_step(broken_one, 2, interrupt)
    with pytest.raises(Stopped) as stopped:
        sweep.run(config, str(directory), BUILDS)
    assert stopped.value.status == 143
    assert tiny_runs.saved_steps(directory / stopped_one)[-1] == 3
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, str(directory), BUILDS)
    assert "resuming from step 3" in capfd.readouterr().err
    assert sorted(read(directory / "runs.json")) == sorted({*NAMES} - {broken_one})
    assert steady(sweep.run(config, str(directory), BUILDS)) == steady(returned)
    assert begun == [stopped_one, stopped_one, broken_one, broken_one]

    record, expected = (read(folder / "runs.json") for folder in (directory, undisturbed))
    assert record.keys() == expected.keys()
    for name, entry in record.items():
        assert entry["config"] == expected[name]["config"]
        assert steady(entry["results"]) == steady(expected[name]["results"])
        lines = tiny_runs.recorded(directory / name)
        assert lines == tiny_runs.recorded(undisturbed / name) and len(lines) == 4


@pytest.mark.slow
def test_a_run_without_its_entry_is_not_trained_again(whole, begun, tmp_path):
    """As after a process that ended between the run's results and the record."""
    config, undisturbed, returned, _ = whole
    directory = copy_without(undisturbed, tmp_path / "copy", ["high/seed_0"])
    before = files_of(directory)
    assert sweep.run(config, str(directory), BUILDS) == returned
    assert begun == ["high/seed_0"]
    after = files_of(directory)
    touched = {p.relative_to(directory) for p in before if after[p] != before[p]}
    assert not [p for p in touched if p.parts[:2] != ("high", "seed_0")]
    assert not [p for p in touched if "checkpoints" in p.parts]
    for path in (p for p in before if p.suffix in (".json", ".jsonl")):
        assert after[path][0] == before[path][0], path


def test_what_is_done_is_told_while_the_rest_is_to_come(images, pretended, tmp_path, capfd):
    pretended["high/seed_1"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(make_config(images), str(tmp_path), BUILDS)
    assert list(read(tmp_path / "runs.json")) == sorted(NAMES[:3])
    text = (tmp_path / "table.md").read_text()
    assert text.endswith("\n\nStill to come: high/seed_1.\n")
    rows, results = read_table(tmp_path), read(tmp_path / "results.json")
    assert "±" in rows["low"]["loss"] and "±" not in rows["high"]["loss"]
    assert results["runs"] == 3 and results["of_runs"] == 4
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[")]
    assert told[0] == "[1/4] low/seed_0: 4 runs to go"
    for number, line in enumerate(told[1:], start=2):
        assert line.startswith(f"[{number}/4] {NAMES[number - 1]}: {5 - number} runs to go, about ")


# --------------------------------------------------------------- what is done, and what is new


@pytest.mark.slow
def test_an_added_seed_or_variant_adds_its_own_runs(images, pretended, tmp_path):
    sweep.run(make_config(images, seeds=(0,)), str(tmp_path), BUILDS)
    assert pretended.begun == ["low/seed_0", "high/seed_0"]
    sweep.run(make_config(images, seeds=(7, 0)), str(tmp_path), BUILDS)
    assert pretended.begun[2:] == ["low/seed_7", "high/seed_7"]
    rates = {name: {"optimizer__learning_rate": r} for name, r in (RATES | {"none": 0.0}).items()}
    sweep.run(make_config(images, seeds=(7, 0), variants=rates), str(tmp_path), BUILDS)
    assert pretended.begun[4:] == ["none/seed_7", "none/seed_0"]
    assert list(read_table(tmp_path)) == ["low", "high", "none"]

    # A sweep of a part of them shows that part; the record keeps the rest.
    part = make_config(images, seeds=(7,), variants=rates, only=("none", "low"))
    results = sweep.run(part, str(tmp_path), BUILDS)
    assert len(pretended.begun) == 6 == len(read(tmp_path / "runs.json"))
    assert list(read_table(tmp_path)) == ["none", "low"]
    assert results["runs"] == results["of_runs"] == 2
    assert "low_loss_mean" in results and "low_loss_std" not in results  # of one seed


def test_another_sweep_in_the_same_directory_is_refused(images, pretended, tmp_path):
    """Before anything is begun, and naming the field, both values and the run."""
    sweep.run(make_config(images, seeds=(0,)), str(tmp_path), BUILDS)
    before = (tmp_path / "runs.json").read_bytes()
    rates = {"low": {"optimizer__learning_rate": 0.1}, "high": {"optimizer__learning_rate": 0.75}}
    with pytest.raises(UserError) as error:
        sweep.run(make_config(images, variants=rates), str(tmp_path), BUILDS)
    told = str(error.value)
    assert told.startswith("config.variants.high.optimizer.learning_rate=0.75: ")
    assert "0.5" in told and "high/seed_0" in told and str(tmp_path / "runs.json") in told
    assert "\n" not in told and "low" not in told
    assert len(pretended.begun) == 2 and (tmp_path / "runs.json").read_bytes() == before

    each = {"tau_base": 0.9, "views__global__area": (0.2, 0.9)}
    with pytest.raises(UserError) as error:
        sweep.run(make_config(images, each=each), str(tmp_path), BUILDS)
    area = "low.views.global.area=[0.2, 0.9]: "
    for part in ("config.variants.low.tau_base=0.9: ", "0.99", area, "has [0.08, 1.0]"):
        assert part in str(error.value)


def test_where_the_data_lies_may_change(images, pretended, tmp_path):
    """And how often is logged and saved."""
    sweep.run(make_config(images), str(tmp_path), BUILDS)
    each = {"data__dir": "elsewhere", "data__download": True, "log_every_steps": 7}
    each |= {"checkpoint_every_steps": 5, "keep_checkpoints": 1, "keep_every_steps": 3}
    each |= {"monitor__knn_every_steps": 2, "monitor__plots_every_steps": 2}
    each |= {"data__max_undecodable": 0.5, "profile__first_step": 2}
    sweep.run(make_config(images, each=each), str(tmp_path), BUILDS)
    assert pretended.begun == NAMES


@pytest.mark.slow
@pytest.mark.parametrize(
    "field", ["monitor__diagnostics_every_steps", "monitor__max_rows", "eval__knn_k"]
)
def test_what_is_measured_may_not(images, pretended, tmp_path, field):
    """How often the spread is looked at decides whether, and when, a run has collapsed."""
    sweep.run(make_config(images), str(tmp_path), BUILDS)
    name = field.replace("__", ".")
    with pytest.raises(UserError, match=rf"^config\.variants\.low\.{name}=3: "):
        sweep.run(make_config(images, each={field: 3}), str(tmp_path), BUILDS)
    assert pretended.begun == NAMES


def test_a_record_of_an_earlier_version_counts(images, pretended, tmp_path):
    sweep.run(make_config(images), str(tmp_path), BUILDS)
    record = read(tmp_path / "runs.json")
    old = {"views.global.area": "data.crop_area", "views.global.aspect": "data.crop_aspect"}
    old |= {"views.mean": "augment.mean", "views.std": "augment.std"}
    for entry in record.values():
        fields, entry["config"] = entry["config"], {}
        for name, value in fields.items():
            if name not in ("views.global.count", "views.global.size"):
                earlier = name.replace("views.global.view_", "augment.view_")
                entry["config"][old.get(name, earlier)] = value
    (tmp_path / "runs.json").write_text(json.dumps(record))
    assert "views" not in (tmp_path / "runs.json").read_text()
    sweep.run(make_config(images), str(tmp_path), BUILDS)
    assert pretended.begun == NAMES
    each = {"views__global__view_2__hue": 0.2}
    with pytest.raises(UserError, match=r"low\.views\.global\.view_2\.hue=0\.2: .* has 0\.1;"):
        sweep.run(make_config(images, each=each), str(tmp_path), BUILDS)


# --------------------------------------------------------------------- runs that come to nothing


@pytest.mark.slow
def test_a_run_that_diverges_is_told_and_not_repeated(images, begun, tmp_path):
    """The others are run; what it would have measured is left out."""
    rates = {name: {"optimizer__learning_rate": r} for name, r in (("wild", 1e12), ("low", 0.1))}
    config = make_config(images, seeds=(0,), variants=rates)
    results = sweep.run(config, str(tmp_path), BUILDS)
    assert begun == ["wild/seed_0", "low/seed_0"]
    rows = read_table(tmp_path)
    assert rows["wild"]["collapsed"] == "diverged" and rows["low"]["collapsed"] == "no"
    assert rows["wild"]["loss"] == rows["wild"]["images/s"] == "" and rows["low"]["loss"]
    assert results["wild_collapsed"] == 1 and results["low_collapsed"] == 0
    assert "wild_loss_mean" not in results and results["runs"] == 2
    assert "to come" not in (tmp_path / "table.md").read_text()
    told = read(tmp_path / "runs.json")["wild/seed_0"]["results"]
    assert list(told) == ["diverged"] and "step 1 is not finite" in told["diverged"]
    assert str(tmp_path) not in json.dumps(told)  # it may be published

    assert sweep.run(config, str(tmp_path), BUILDS) == results
    assert len(begun) == 2


@pytest.mark.slow
def test_a_run_that_collapses_is_told(images, tmp_path):
    each = {"monitor__diagnostics_every_steps": 1}
    variants = {"flat": {"monitor__collapse_std": 1e9}, "fine": {"monitor__collapse_rank": 0.0}}
    variants["fine"]["monitor__collapse_std"] = 0.0
    config = make_config(images, seeds=(0,), each=each, variants=variants)
    results = sweep.run(config, str(tmp_path), BUILDS)
    step = read(tmp_path / "flat" / "seed_0" / "results.json")["collapsed_at_step"]
    rows = read_table(tmp_path)
    assert rows["flat"]["collapsed"] == f"step {step}" and rows["fine"]["collapsed"] == "no"
    assert results["flat_collapsed"] == 1 and results["fine_collapsed"] == 0
    assert rows["flat"]["projection std"] == f"{results['flat_projection_std_mean']:.2f}"


def test_the_table_counts_what_came_to_nothing(images, pretended, tmp_path):
    """The means are of the runs that have a number."""
    pretended["low/seed_0"] = NotFinite("step 3 is not finite: loss nan; see the file")
    pretended["low/seed_1"] = {"loss": 2.0, "collapsed": True, "collapsed_at_step": 1500}
    pretended["low/seed_2"] = {"loss": 3.0, "collapsed": False, "images_per_second": 1234.5}
    results = sweep.run(make_config(images, seeds=(0, 1, 2)), str(tmp_path), BUILDS)
    row = read_table(tmp_path)["low"]
    assert row["collapsed"] == "diverged, step 1,500" and results["low_collapsed"] == 2
    assert row["loss"] == "2.50 ± 0.71" and row["images/s"] == "1,234"
    assert results["low_loss_mean"] == 2.5 and results["low_loss_std"] == pytest.approx(0.5**0.5)


# ---------------------------------------------------------------------------------- the table


def test_fields_that_some_variants_have(images, pretended, tmp_path):
    config = make_config(images, columns=("optimizer.learning_rate", "queue_size"))
    with config.unlocked():
        config.variants.high.queue_size = 64
    sweep.run(config, str(tmp_path), BUILDS)
    rows = read_table(tmp_path)
    assert [row["optimizer learning rate"] for row in rows.values()] == ["0.1", "0.5"]
    assert [row["queue size"] for row in rows.values()] == ["", "64"]

    config.only = ("low",)  # which alone has no queue
    sweep.run(config, str(tmp_path / "one"), BUILDS)
    assert [row["queue size"] for row in read_table(tmp_path / "one").values()] == [""]


def test_each_variant_is_built_by_its_method(images, monkeypatch, tmp_path):
    built = {}

    def pretrain(config, folder, build, **kwargs):
        built[config.method] = build
        return {}

    monkeypatch.setattr(sweep, "pretrain", pretrain)
    builds = {name: functools.partial(quick_build) for name in ("moco", "byol", "simclr")}
    variants = {"one": {"method": "moco"}, "two": {"method": "byol"}}
    sweep.run(make_config(images, variants=variants), str(tmp_path), builds.__getitem__)
    assert built == {name: builds[name] for name in ("moco", "byol")}


def test_published_numbers_stand_beside(images, pretended, tmp_path):
    published = ConfigDict({"high": 72.5})
    config = make_config(images, published=published, published_title="paper")
    sweep.run(config, str(tmp_path), BUILDS)
    rows = read_table(tmp_path)
    assert rows["high"]["paper"] == "72.5" and rows["low"]["paper"] == ""
    assert list(rows["low"])[-1] == "paper"


@pytest.mark.slow
def test_table_and_record_are_published(images, pretended, tmp_path):
    """Once all is done, as in the sweep's own directory: what is there already may be whole."""
    here, there = tmp_path / "sweep", tmp_path / "docs" / "sweep"
    pretended["high/seed_1"] = Stopped("SIGTERM", 143)
    config = make_config(images, publish_dir=str(there))
    with pytest.raises(Stopped):
        sweep.run(config, str(here), BUILDS)
    assert len(read(here / "runs.json")) == 3 and os.listdir(there) == []
    del pretended["high/seed_1"]
    sweep.run(config, str(here), BUILDS)
    assert sorted(os.listdir(there)) == ["runs.json", "table.md", "table.png"]
    for name in os.listdir(there):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert "to come" not in (there / "table.md").read_text()


# ----------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("optimizer__learning_rate", -1.0, r"optimizer\.learning_rate=-1\.0: "),
        ("views__global__view_2__blur_kernel", 4, r"views\.global\.view_2\.blur_kernel=4: "),
        ("batch_size", 12, r"batch_size=12: "),  # on eight devices
        ("method", "simclrr", r"method='simclrr': there is no package .*byol.*simclr"),
    ],
)
def test_a_mistake_in_the_last_variant_is_told_first(
    images, pretended, tmp_path, field, value, named
):
    config = make_config(images, variants={"good": {}, "bad": {field: value}})
    with pytest.raises(UserError, match=r"^config\.variants\.bad\." + named) as error:
        sweep.run(config, str(tmp_path / "sweep"), BUILDS)
    assert "\n" not in str(error.value)
    assert pretended.begun == [] and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": ()}, r"config\.seeds=\(\): "),
        ({"seeds": (0, 1, 0)}, r"config\.seeds=\(0, 1, 0\): .*different"),
        ({"seeds": (0, -1)}, r"config\.seeds=\(0, -1\): .*not negative"),
        ({"only": ()}, r"config\.only=\(\): .*high, low"),
        ({"only": ("low", "hihg")}, r"config\.only=\('low', 'hihg'\): .*high, low"),
    ],
)
def test_seeds_and_variants_are_checked(images, pretended, tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        sweep.run(make_config(images, **changes), str(tmp_path / "sweep"), BUILDS)
    assert pretended.begun == [] and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("content", [b"", b'{"low/seed_0": {', b"\xff\xfe"])
def test_a_broken_record_is_named_and_kept(images, pretended, tmp_path, content):
    path = tmp_path / "runs.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: ") as error:
        sweep.run(make_config(images), str(tmp_path), BUILDS)
    assert "\n" not in str(error.value)
    assert pretended.begun == [] and path.read_bytes() == content


def test_a_folder_that_takes_no_files_is_named(images, begun, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file/sweep.*: .*Not a directory") as error:
        sweep.run(make_config(images), str(tmp_path / "file" / "sweep"), BUILDS)
    assert begun in ([], NAMES[:1]) and "\n" not in str(error.value)


def test_a_publish_dir_that_takes_no_files_is_named(images, pretended, tmp_path):
    """What was done by then is in the sweep's own directory."""
    (tmp_path / "file").write_text("")
    config = make_config(images, publish_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=f"^{tmp_path}/file/below: .*Not a directory"):
        sweep.run(config, str(tmp_path / "sweep"), BUILDS)
    assert sorted(read(tmp_path / "sweep" / "runs.json")) == pretended.begun


# ------------------------------------------------------------------------ from BYOL to SimCLR


@pytest.mark.parametrize("preset", ["demo", "cifar10", "imagenet"])
def test_the_path_from_byol_to_simclr(preset):
    """Every combination once; but for what the sweep is about, each has BYOL's recipe."""
    config = byol_to_simclr.get_config(preset)
    rows, recipes = set(), set()
    for name in config.only:
        run = config.variants[name].copy_and_resolve_references()
        config_lib.validate(run, find(run.method))
        rows.add((run.use_predictor, run.use_target_network, run.negatives_weight))
        assert run.temperature == (0.3 if run.use_target_network else 0.1)
        assert (("no_predictor" in name), ("no_target" in name)) == (
            not run.use_predictor,
            not run.use_target_network,
        )
        assert name.endswith(f"_{run.negatives_weight:g}")
        run.update(use_predictor=True, use_target_network=True, negatives_weight=0, temperature=0.3)
        recipes.add(run.to_json())
    assert rows == set(itertools.product((True, False), (True, False), (0.0, 1.0)))
    assert len(recipes) == 1 and set(config.published) == set(config.only)


def test_a_field_after_the_preset_is_set_in_every_variant():
    config = byol_to_simclr.get_config("demo,epochs=3,optimizer.learning_rate=0.25,seeds=(1, 2)")
    assert len(config.variants) == 8 and config.seeds == (1, 2)
    for run in config.variants.values():
        assert run.epochs == 3 and run.optimizer.learning_rate == 0.25
    one = byol_to_simclr.get_config("variants.predictor_target_beta_0.epochs=3")
    assert [name for name in one.only if one.variants[name].epochs == 3] == [one.only[0]]


@pytest.mark.parametrize(
    ("arg", "named", "near"),
    [
        ("demo,epoch=3", "config.epoch;", "epochs"),
        ("demo,optimiser.momentum=3", "config.optimiser.momentum;", "optimizer.momentum"),
        ("demo,variants.predictor.epochs=3", "config.variants.predictor.epochs;", "epochs"),
        ("demo,epochs=many", "config.epochs='many'", "number"),
        ("dmeo", "'dmeo'", "demo"),
    ],
)
def test_a_misspelt_field_names_the_nearest(arg, named, near):
    with pytest.raises(ValueError) as error:
        byol_to_simclr.get_config(arg)
    assert named in str(error.value) and near in str(error.value).partition(named)[2]


@pytest.mark.slow
def test_the_command_line_runs_a_sweep(images, tmp_path):
    """A process from the command to the table, with tiny networks."""
    fields = tiny_runs.fields(images, steps=2, data__name="folder", eval__max_test_images=6)
    arg = ",".join(f"{name}={value}" for name, value in fields.items())
    name = "no_predictor_target_beta_0"
    done = subprocess.run(
        [
            *(sys.executable, "tests/tiny_process.py", "--compilation_cache="),
            f"--config=configs/byol_to_simclr.py:demo,{arg}",
            *(f"--config.only=('{name}',)", "--config.seeds=(3,)", f"--workdir={tmp_path}"),
        ],
        cwd=REPOSITORY,
        env=process_env(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.md").read_text() in done.stderr + done.stdout
    ((title, row),) = read_table(tmp_path).items()
    assert title == name.replace("_", " ") and row["predictor"] == "no"
    assert row["projection std"] and row["paper, ImageNet"] == "0.2"
    assert list(read(tmp_path / "runs.json")) == [f"{name}/seed_3"]
    assert read(tmp_path / "results.json")["runs"] == 1


# ------------------------------------------------------------------- what is told beforehand


def test_a_stopped_run_of_a_sweep_does_not_send_to_another_workdir():
    told = str(signals.stopped(15, 3, "runs/sweep/low/seed_0"))
    assert "--workdir=" not in told and "runs/sweep/low/seed_0" in told


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"only": ("low", "low")}, r"config\.only=\('low', 'low'\): .*different"),
        ({"seeds": (0, 0.5)}, r"config\.seeds=\(0, 0\.5\): "),
        ({"seeds": ("a",)}, r"config\.seeds=\('a',\): "),
        ({"columns": ("use_predicter",)}, r"config\.columns=\('use_predicter',\): .*use_predictor"),
    ],
)
def test_more_of_a_sweep_is_checked(images, pretended, tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        sweep.run(make_config(images, **changes), str(tmp_path / "sweep"), BUILDS)
    assert pretended.begun == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "cannot be read: "),
        ("null", "cannot be read: "),
        ('{"low/seed_0": 3}', "low/seed_0 is not a run's entry; move it away"),
        ('{"low/seed_0": {}}', "low/seed_0 is not a run's entry; move it away"),
    ],
)
def test_a_record_of_another_kind_is_named(images, pretended, tmp_path, content, told):
    path = tmp_path / "runs.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        sweep.run(make_config(images), str(tmp_path), BUILDS)
    assert str(error.value).startswith(f"{path}: {told}") and "\n" not in str(error.value)
    assert pretended.begun == [] and path.read_text() == content


def test_a_publish_dir_is_tried_first(images, pretended, tmp_path):
    (tmp_path / "file").write_text("")
    config = make_config(images, publish_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"below: .*Not a directory"):
        sweep.run(config, str(tmp_path / "sweep"), BUILDS)
    assert pretended.begun == []


def test_only_a_table_of_the_same_runs_is_replaced(images, pretended, tmp_path):
    there = tmp_path / "docs"
    there.mkdir()
    (there / "table.md").write_text("of somebody")
    config = make_config(images, publish_dir=str(there))
    with pytest.raises(UserError, match=r"config\.publish_dir='.*': has a table\.md that is not"):
        sweep.run(config, str(tmp_path / "sweep"), BUILDS)
    assert pretended.begun == [] and (there / "table.md").read_text() == "of somebody"
    (there / "table.md").unlink()
    sweep.run(config, str(tmp_path / "sweep"), BUILDS)
    sweep.run(config, str(tmp_path / "sweep"), BUILDS)
    record = read(there / "runs.json")
    record["low/seed_0"]["config"]["batch_size"] = 99
    (there / "runs.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"batch_size=\d+: the run that is done has 99.*docs"):
        sweep.run(config, str(tmp_path / "another"), BUILDS)


def test_an_unknown_reference_is_told_first(images, begun, tmp_path):
    variants = {"good": {}, "bad": {"monitor__reference": "nope"}}
    with pytest.raises(UserError, match=r"^config\.variants\.bad\.monitor\.reference='nope'"):
        sweep.run(make_config(images, variants=variants), str(tmp_path), BUILDS)
    assert begun == []


def test_a_seed_after_the_preset_is_refused():
    for arg in ("demo,seed=1", "cifar10,seed=1"):
        with pytest.raises(ValueError, match=r"seeds"):
            byol_to_simclr.get_config(arg)


def test_a_misspelt_field_of_the_sweep_names_it():
    with pytest.raises(ValueError, match=r"did you mean: .*metrics"):
        byol_to_simclr.get_config("demo,metrcs=('a',)")


def test_a_field_that_some_variants_have_is_set_there():
    config = cifar10_methods.get_config("queue_size=512")
    assert config.variants.MoCo_v1.queue_size == config.variants.MoCo_v2.queue_size == 512
    assert "queue_size" not in config.variants.BYOL


def test_what_a_method_cannot_take_is_told_before_the_first_run(images, pretended, tmp_path):
    def build(config, *args):
        if config.optimizer.learning_rate == RATES["high"]:
            raise UserError("config.queue_size=7: must be a multiple of 16")
        return quick_build(config, *args)

    with pytest.raises(UserError, match=r"^config\.variants\.high\.queue_size=7: must be"):
        sweep.run(make_config(images), str(tmp_path), lambda name: build)
    assert pretended.begun == []


def test_a_misspelt_measure_is_told(images, pretended, tmp_path):
    config = make_config(images, metrics=("linear_probe",))
    with pytest.raises(UserError, match=r"config\.metrics=.*linear_probe_top1"):
        sweep.run(config, str(tmp_path), BUILDS)
