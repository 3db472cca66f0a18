"""Reference curves: how they are made of runs, and when a run is told that it lies far outside."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from configs import byol
from selfsup_jax.errors import UserError
from selfsup_jax.run import identity
from selfsup_jax.training import reference

PRESETS = ("imagenet", "cifar10", "imagenette", "demo", "folder")
CONFIG = {
    "seed": 0,
    "batch_size": 64,
    "log_every_steps": 62,
    "keep_checkpoints": 2,
    "eval.knn_k": 20,
    "monitor.reference": "",
    "data.dir": "",
    "data.name": "digits",
    "data.labels": "auto",
    "data.crop_on": "host",
    "data.canvas": 512,
    "data.intensity": "full",
    "data.exif_orientation": True,
    "optimizer.learning_rate": 0.3,
    "views.mean": [0.1, 0.1, 0.1],
    "data_info.train_images": 4000,
}


def history(**series) -> dict:
    """Each a (steps, values)."""
    return {name: (list(steps), list(values)) for name, (steps, values) in series.items()}


def curve(steps) -> np.ndarray:
    """A loss that falls from 3 to 1 in 1,000 steps."""
    return 1 + 2 * np.exp(-np.asarray(steps) / 200)


STEPS = np.arange(10, 1001, 10)


def runs(noise: float = 0.1, count: int = 3) -> list:
    rng = np.random.default_rng(0)
    return [
        (
            CONFIG | {"seed": seed},
            history(
                loss=(STEPS, curve(STEPS) + rng.uniform(-noise, noise, len(STEPS))),
                projection_std=(STEPS, 1 - 0.5 / curve(STEPS)),
                effective_rank=(STEPS, np.full(len(STEPS), 9.0)),
            ),
        )
        for seed in range(count)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """In place of the package: `references/` lies in it."""
    (tmp_path / "package" / "references").mkdir(parents=True)
    monkeypatch.setattr(reference.resources, "files", lambda package: tmp_path / "package")
    return tmp_path / "package" / "references"


@pytest.fixture
def loaded(folder):
    """As a preset would have it: written and read again."""
    (folder / "mine.json").write_text(json.dumps(reference.make(runs(), "by hand")))
    return reference.load("mine")


# -------------------------------------------------------------------------------- loading


def test_no_name_is_no_reference():
    assert reference.load("") is None


def test_an_unknown_name_is_told_with_the_nearest(folder):
    for name in ("byol_demo", "byol_cifar10", "other"):
        (folder / f"{name}.json").write_text("{}")
    with pytest.raises(UserError) as error:
        reference.load("byol_dmo")
    told = str(error.value)
    assert told.startswith("config.monitor.reference='byol_dmo'") and "byol_demo" in told
    assert "other" not in told and "\n" not in told


def test_what_was_made_is_loaded(loaded):
    assert loaded.name == "mine" and loaded.made == "by hand"
    assert loaded.config["batch_size"] == 64
    assert loaded.bands.keys() == {"loss", "projection_std", "effective_rank"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_reference_is_of_this_very_preset(preset):
    config = byol.get_config(preset)
    shipped = reference.load(config.monitor.reference)
    if shipped is None:
        assert preset != "demo"  # which everybody can run, and ours was
        return
    config.compute_dtype = "float32"  # on the CPU, where it was made
    flat = identity.flat(config)
    for field in ("data.train_split", "data.test_split"):  # that the data decides
        flat[field] = flat[field] or shipped.config[field]
    assert reference.differences(shipped, flat) == []
    assert shipped.made and {"loss", "projection_std"} <= shipped.bands.keys()
    for name, band in shipped.bands.items():
        assert np.all(np.diff(band.steps) > 0) and band.steps[0] >= 1, name
        assert np.all(np.isfinite(band.mean)), name
        assert np.all(band.low <= band.mean) and np.all(band.mean <= band.high), name
        assert np.any(band.low < band.high), name  # of more than one run


# ---------------------------------------------------------------------------- differences


def test_differences_are_those_of_the_mathematics(loaded):
    assert reference.differences(loaded, CONFIG) == []
    apart = {
        "seed": 7,
        "log_every_steps": 1,
        "checkpoint_every_steps": 5,
        "keep_checkpoints": 9,
        "keep_every_steps": 3,
        "eval.fewshot_draws": 200,
        "eval.linear.held_out_images": 7,
        "eval.enabled": False,
        "monitor.reference": "mine",
        "monitor.plots_every_steps": 0,
        "profile.first_step": 3,
        "data.dir": "/elsewhere",
        "data.download": True,
        "data.max_undecodable": 0.5,
        "data_info.train_images": 5,
    }
    assert reference.differences(loaded, CONFIG | apart) == []
    changed = {"batch_size": 65, "data.name": "folder", "views.mean": [0.1, 0.1, 0.2]}
    changed["eval.knn_k"] = 200  # another kNN is another quantity
    assert reference.differences(loaded, CONFIG | apart | changed) == sorted(changed)
    # A field that only one of the two has is a difference too.
    assert reference.differences(loaded, CONFIG | {"a_new_field": 1}) == ["a_new_field"]
    fewer = {k: v for k, v in CONFIG.items() if k != "optimizer.learning_rate"}
    assert reference.differences(loaded, fewer) == ["optimizer.learning_rate"]


def test_a_reference_of_an_earlier_version_is_read(folder):
    old = {"views.mean": "augment.mean", "data_info.train_images": "found.train_images"}
    earlier = {old.get(name, name): value for name, value in CONFIG.items()}
    made = reference.make(runs(), "by hand")
    (folder / "mine.json").write_text(json.dumps(made | {"config": earlier}))
    assert reference.load("mine").config == CONFIG
    assert reference.differences(reference.load("mine"), CONFIG) == []


# --------------------------------------------------------------------------------- making


def test_runs_of_different_configs_make_no_reference():
    runs_ = [(CONFIG | {"batch_size": b}, history(loss=([1], [2.0]))) for b in (64, 65)]
    with pytest.raises(UserError, match="batch_size"):
        reference.make(runs_, "two runs")


def test_bands_of_two_runs():
    values = np.array([[4.0, 1.0, 7.0, 2.0, 3.0], [0.0, 5.0, 1.0, 8.0, 3.0]])
    steps = [1, 2, 3, 5, 8]
    made = reference.make(
        [
            (CONFIG | {"seed": i}, history(loss=(steps, v), tau=(steps, v)))
            for i, v in enumerate(values)
        ],
        "two runs",
    )
    # Each point is the mean with its neighbours, of which the first and the last have but one.
    smooth = np.array([[v[max(0, i - 1) : i + 2].mean() for i in range(5)] for v in values])
    assert made["bands"].keys() == {"loss"}  # the learning rate and the like are no measure
    band = made["bands"]["loss"]
    assert band["steps"] == steps
    for name, expected in (
        ("low", smooth.min(0)),
        ("mean", smooth.mean(0)),
        ("high", smooth.max(0)),
    ):
        np.testing.assert_allclose(band[name], expected, rtol=1e-3, err_msg=name)
    assert made["made"] == "two runs"
    assert made["config"] == {
        k: CONFIG[k]
        for k in (
            *("batch_size", "data.name", "optimizer.learning_rate", "views.mean"),
            *("data.labels", "data.intensity", "data.exif_orientation", "eval.knn_k"),
            *("data.crop_on", "data.canvas"),
        )
    }
    assert json.loads(json.dumps(made)) == made


def test_long_curves_are_thinned_and_keep_their_ends():
    steps = list(range(1, 5001))
    series = history(loss=(steps, curve(steps)))
    band = reference.make([(CONFIG, series)], "one run")["bands"]["loss"]
    assert 50 <= len(band["steps"]) <= 100
    assert band["steps"][0] == 1 and band["steps"][-1] == 5000
    gaps = np.diff(band["steps"])
    assert gaps.min() > 0 and gaps.max() - gaps.min() <= 1
    np.testing.assert_allclose(band["mean"], curve(band["steps"]), rtol=1e-2)


def test_what_not_all_runs_have_is_left_out():
    with_knn = history(loss=(STEPS, curve(STEPS)), knn_top1=(STEPS, curve(STEPS)))
    without = history(loss=(STEPS, curve(STEPS)))
    made = reference.make([(CONFIG, with_knn), (CONFIG, without)], "")
    assert made["bands"].keys() == {"loss"}


# -------------------------------------------------------------------------------- judging


def judged(loaded, steps, values, name: str = "loss") -> dict[str, str]:
    return reference.far_outside(loaded, history(**{name: (steps, values)}))


@pytest.mark.parametrize("upto", [1, 4, 5, 20, 100])
def test_a_run_like_the_references_is_not_told_of(loaded, upto):
    rng = np.random.default_rng(1)
    values = (curve(STEPS) + rng.uniform(-0.1, 0.1, len(STEPS)))[:upto]
    assert judged(loaded, STEPS[:upto], values) == {}
    for _, same in runs():
        assert reference.far_outside(loaded, same) == {}
    # Nor is one that looks at other steps.
    steps = np.arange(17, 1000, 7)
    assert judged(loaded, steps, curve(steps)) == {}


@pytest.mark.parametrize(("shift", "where"), [(1.5, "above"), (-1.5, "below")])
def test_a_run_far_away_is_told_of(loaded, shift, where):
    steps = STEPS[:40]
    found = judged(loaded, steps, curve(steps) + shift)
    assert found.keys() == {"loss"}
    value = np.mean(curve(steps[-5:]) + shift)
    for part in ("loss", f"{value:.3g}", "400", where, "mine"):
        assert part in found["loss"], part
    other = {"above": "below", "below": "above"}[where]
    assert other not in found["loss"]
    assert judged(loaded, steps[:4], curve(steps[:4]) + shift) == {}  # too few to tell


def test_each_quantity_is_told_of_by_itself(loaded):
    far = history(
        loss=(STEPS, curve(STEPS)),
        projection_std=(STEPS, np.full(len(STEPS), 0.01)),
        effective_rank=(STEPS, np.full(len(STEPS), 1e6)),
        grad_norm=(STEPS, np.full(len(STEPS), 1e6)),
    )
    found = reference.far_outside(loaded, far)
    assert found.keys() == {"projection_std"} and "below" in found["projection_std"]


def test_a_difference_that_nobody_would_care_for_is_not_told_of(folder):
    """However narrow the band: runs that all but agree, on a curve that falls by 2."""
    (folder / "narrow.json").write_text(json.dumps(reference.make(runs(noise=0.0), "")))
    loaded = reference.load("narrow")
    fall = np.ptp(loaded.bands["loss"].mean)
    assert judged(loaded, STEPS, curve(STEPS) + 0.9 * fall / 7) == {}
    assert judged(loaded, STEPS, curve(STEPS) + 1.1 * fall / 7).keys() == {"loss"}


def test_a_wide_band_allows_for_more(folder):
    (folder / "wide.json").write_text(json.dumps(reference.make(runs(noise=1.0), "")))
    loaded = reference.load("wide")
    band = loaded.bands["loss"]
    width = np.mean((band.high - band.low)[-5:])
    assert 3 * width > np.ptp(band.mean) / 7
    middle = band.mean[-5:].mean()
    assert judged(loaded, STEPS[-5:], np.full(5, middle + 2.9 * width)) == {}
    assert judged(loaded, STEPS[-5:], np.full(5, middle + 3.1 * width)).keys() == {"loss"}


def test_one_noisy_point_is_not_told_of(loaded):
    for at in (-1, -3, 0):
        values = curve(STEPS[:40])
        values[at] += 1.2  # four times what a mean may be off
        assert judged(loaded, STEPS[:40], values) == {}


def test_only_the_last_points_count(loaded):
    values = curve(STEPS)
    values[:-5] += 50
    assert judged(loaded, STEPS, values) == {}


def test_steps_that_the_reference_does_not_have_are_not_judged(loaded):
    beyond = np.arange(900, 1100, 10)
    assert judged(loaded, beyond, np.full(len(beyond), 50.0)) == {}
    upto = np.arange(800, 1001, 10)
    assert judged(loaded, upto, np.full(len(upto), 50.0)).keys() == {"loss"}


def test_steps_before_the_references_first_are_not_judged(folder):
    """A run may be looked at more often than the reference's were, and begins far away."""
    steps = STEPS[10:]
    series = history(loss=(steps, curve(steps)))
    (folder / "late.json").write_text(json.dumps(reference.make([(CONFIG, series)] * 2, "")))
    loaded = reference.load("late")
    early = np.arange(1, 11)
    assert judged(loaded, early, curve(early)) == {}
    assert judged(loaded, steps, curve(steps) + 2).keys() == {"loss"}


# ----------------------------------------------------------------------- the command line


def write_workdir(path, seed: int, flat: dict, series: dict) -> str:
    path.mkdir()
    nested = {
        "seed": seed,
        "batch_size": 64,
        "data": {"dir": "/x", "name": "digits"},
        "data_info": {"train_images": 4000},
    }
    (path / "config.json").write_text(json.dumps(nested | flat))
    steps = series["loss"][0]
    rows = [
        {"step": int(s)} | {name: float(values[i]) for name, (_, values) in series.items()}
        for i, s in enumerate(steps)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {"steps": 1000, "device_count": 2, "device_kind": "cpu"}
    (path / "results.json").write_text(json.dumps(results))
    return str(path)


def test_the_command_line_makes_a_file_that_loads(folder, tmp_path, monkeypatch, capsys):
    series = [series for _, series in runs(count=2)]
    workdirs = [
        write_workdir(tmp_path / f"run{seed}", seed, {"exclude": ["bias$", "scale$"]}, each)
        for seed, each in zip((3, 8), series, strict=True)
    ]
    monkeypatch.setattr(sys, "argv", ["reference", "digits_64", *workdirs])
    reference.main()
    assert str(folder / "digits_64.json") in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["digits_64.json"]

    loaded = reference.load("digits_64")
    for part in ("2 runs", "3, 8", "1,000 steps", "2 x cpu"):
        assert part in loaded.made
    assert loaded.config == {
        "batch_size": 64,
        "data.name": "digits",
        "data.crop_on": "host",
        "data.canvas": 512,
        "data.labels": "auto",
        "data.intensity": "full",
        "data.exif_orientation": True,
        "exclude": ["bias$", "scale$"],
    }
    expected = reference.make([(CONFIG, each) for each in series], "")["bands"]
    assert loaded.bands.keys() == expected.keys()
    for name, band in loaded.bands.items():
        for field, values in zip(band._fields, band, strict=True):
            np.testing.assert_array_equal(values, expected[name][field])


def test_the_command_line_wants_runs(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reference", "digits_64"])
    with pytest.raises(SystemExit) as ended:
        reference.main()
    assert ended.value.code == 2 and "workdirs" in capsys.readouterr().err
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["../mine", "/mine", "a/b", "", "..", "a b"])
def test_a_reference_stays_in_its_folder(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["reference", name, str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        reference.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith(f"error: NAME={name!r}: ")
    assert told.count("\n") == 1 and not list(folder.iterdir())


def test_a_workdir_without_a_finished_run_is_named(folder, tmp_path, monkeypatch, capsys):
    for content in (None, "{"):
        if content:
            (tmp_path / "config.json").write_text(content)
        monkeypatch.setattr(sys, "argv", ["reference", "mine", str(tmp_path)])
        with pytest.raises(SystemExit):
            reference.main()
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no finished run: ")
