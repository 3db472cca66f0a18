"""Evaluation jobs from config to results: their numbers, what they leave alone, how they go on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_jobs
import tiny_runs
from conftest import REPOSITORY, assert_same, flatten, process_env
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_subset import TinyScenes
from tiny_jobs import (
    TEST,
    TRAIN,
    Killed,
    add_checkpoint,
    confusion,
    copy_run,
    make_config,
    read,
    run_job,
)

from configs import linear_probe
from selfsup_jax import export, jobs
from selfsup_jax.data import inputs
from selfsup_jax.errors import Stopped, UserError
from selfsup_jax.evaluation import encoder, features, probes, scores
from selfsup_jax.jobs import runner, training

TRAINED = ("finetune", "finetune:100pct", "linear_probe:byol", "linear_probe:moco")
CLASSIFIED = ("linear_probe", "knn", *TRAINED)
PREFIX = {name: name.partition(":")[0] for name in CLASSIFIED}


@pytest.fixture(scope="module", autouse=True)
def one_block():
    with tiny_jobs.small_encoder():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_jobs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A pretrained run, which no job may change."""
    workdir = tiny_jobs.make_run(data, tmp_path_factory.mktemp("pretrained") / "run")
    before = files_of(workdir)
    yield workdir
    assert files_of(workdir) == before


def files_of(folder: pathlib.Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p): hashlib.md5(p.read_bytes()).hexdigest() for p in sorted(paths)}


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    """`done(name, **changes)`: the workdir of a job that nothing disturbed; each is run once."""
    root = tmp_path_factory.mktemp("done")

    @functools.cache
    def once(name, **changes):
        workdir = root / hashlib.md5(repr((name, sorted(changes.items()))).encode()).hexdigest()
        run_job(name, run, workdir, **changes)
        return workdir

    return once


@pytest.fixture(scope="module")
def embedded(done):
    """`embedded(split)`: what the job `embed` wrote of it."""

    def load(split):
        with np.load(done("embed", split=split) / "features.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def stop(monkeypatch):
    """`stop(step, how)`: what happens when a job that trains fetches that step's batch."""
    train_batches = inputs.train_batches

    def arrange(step, how):
        def batches(config, data, first_step):
            each = train_batches(config, data, first_step)
            for i, batch in enumerate(each, start=first_step + 1):
                if i == step:
                    how()
                yield batch

        monkeypatch.setattr(inputs, "train_batches", batches)

    return arrange


@pytest.fixture
def looks(monkeypatch):
    """What is evaluated from here on: the number of looks at a split."""
    found = []
    stream = features.Extractor.stream

    def spy(self, variables, batches):
        found.append(variables)
        return stream(self, variables, batches)

    monkeypatch.setattr(features.Extractor, "stream", spy)
    return found


def relabelled(monkeypatch, change, splits=("test",)):
    """Labels of some splits are changed as they are read: `change(labels) -> labels`."""
    load_split = inputs.load_split

    def load(config, split, *args, **kwargs):
        source = load_split(config, split, *args, **kwargs)
        if split not in splits or source.labels is None:
            return source
        return dataclasses.replace(source, labels=change(source.labels))

    monkeypatch.setattr(inputs, "load_split", load)


# ------------------------------------------------------------------------------ features


@pytest.mark.slow
def test_embedded_features_are_the_encoders_of_these_very_images(run, data, embedded):
    """Each image once, with the label of its folder: by Pillow and Flax, one image at a time."""
    found = embedded("test")
    frozen = encoder.load(str(run))
    mean, std = (np.asarray(x, np.float32) for x in frozen.normalization)
    apply = jax.jit(encoder.module(frozen.config).apply)
    files = sorted(str(path) for path in (data / "test").rglob("*.png"))
    assert sorted(found["names"]) == files and len(files) == TEST
    assert list(found["class_names"]) == ["class_0", "class_1", "class_2"]
    for name, label, row in zip(found["names"], found["labels"], found["features"], strict=True):
        pixels = np.asarray(Image.open(name), np.float32) / 255
        expected = apply(frozen.variables, ((pixels - mean) / std)[None])[0]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
        assert pathlib.Path(name).parent.name == f"class_{label}"


@pytest.mark.slow
def test_features_in_several_files_are_the_same(done, embedded):
    whole = embedded("test")
    folder = done("embed", split="test", format="npy", rows_per_file=7)
    for name in ("features", "labels", "names"):
        parts = [np.load(path) for path in sorted(folder.glob(f"{name}-*.npy"))]
        assert [len(part) for part in parts] == [7, 7, 7, 3]
        joined = np.concatenate(parts)
        assert joined.dtype == whole[name].dtype
        np.testing.assert_array_equal(joined, whole[name])
    assert (folder / "class_names.txt").read_text().split() == list(whole["class_names"])
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
def test_embed_takes_the_runs_test_split_or_all_of_other_data(run, data, tmp_path):
    results = run_job("embed", run, tmp_path / "own")
    assert results["split"] == "test" and results["embedded_images"] == TEST
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    results = run_job("embed", run, tmp_path / "moved_job", data__dir=str(moved))
    assert results["embedded_images"] == TEST  # the run's data, at another place
    other = tmp_path / "other"
    tiny_jobs.write_split(other, 10, seed=3, classes=5)
    results = run_job("embed", run, tmp_path / "all", data__name="folder", data__dir=str(other))
    assert results["embedded_images"] == 10 and results["classes"] == 5
    results = run_job(
        "embed", run, tmp_path / "two", data__name="folder", data__dir=str(data / "train")
    )
    assert results["embedded_images"] == TRAIN


def test_embed_takes_images_without_labels(run, tmp_path):
    loose = tmp_path / "loose"
    tiny_jobs.write_split(loose, 6, seed=3, classes=1)
    run_job("embed", run, tmp_path / "job", data__name="folder", data__dir=str(loose / "class_0"))
    with np.load(tmp_path / "job" / "features.npz") as found:
        assert found["features"].shape[0] == 6 and set(found["labels"]) == {-1}
        assert len(found["class_names"]) == 0


def test_embed_takes_all_images_of_a_run_without_labels(run, tmp_path):
    """Such a run holds none out."""
    tiny_jobs.write_split(tmp_path / "loose", 6, seed=3, classes=1)
    frozen = encoder.load(str(run))
    loose = {"dir": str(tmp_path / "loose"), "train_split": "train", "test_split": "train[:0]"}
    unlabelled = frozen.config | {"data": frozen.config["data"] | loose}
    encoder.export(frozen._replace(config=unlabelled), str(tmp_path / "exported"))
    results = run_job("embed", tmp_path / "exported", tmp_path / "job")
    assert results["embedded_images"] == 6 and results["classes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 64])
def test_each_image_counts_once_whatever_the_batch(run, embedded, tmp_path, size):
    results = run_job("embed", run, tmp_path / "embed", split="test", feature_batch_size=size)
    assert results["embedded_images"] == TEST
    with np.load(tmp_path / "embed" / "features.npz") as found:
        np.testing.assert_array_equal(found["names"], embedded("test")["names"])
        np.testing.assert_allclose(
            found["features"], embedded("test")["features"], rtol=1e-4, atol=1e-5
        )
    run_job("knn", run, tmp_path / "knn", feature_batch_size=size)
    assert confusion(tmp_path / "knn").sum() == TEST


# ------------------------------------------------------------------------------- results


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CLASSIFIED, "fewshot", "transfer", "embed"])
def test_results_are_flat_and_say_where_they_come_from(name, done, run, transfer_sets):
    changes = transfer_sets if name == "transfer" else {}
    workdir = done(name, **changes)
    results = read(workdir / "results.json")
    for key, value in results.items():
        assert isinstance(value, str | int | float), key
        if key.endswith(("_top1", "_per_class", "_validation")):
            assert 0 <= value <= 1
    assert results["job"] == name.partition(":")[0]
    assert results["run"] == str(run) and results["step"] == tiny_jobs.STEPS
    assert results["checkpoint"] == str(run / "checkpoints" / str(tiny_jobs.STEPS))
    assert results["method"] == "byol" and results["run_seed"] == results["seed"] == 0
    assert results["device_count"] == jax.device_count()
    assert not list(workdir.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIED)
def test_the_confusion_matrix_holds_every_test_image_once(name, done):
    results, matrix = read(done(name) / "results.json"), confusion(done(name))
    per_class = TEST // tiny_jobs.CLASSES
    assert matrix.sum(1).tolist() == [per_class] * tiny_jobs.CLASSES
    assert results["test_images"] == TEST
    prefix = PREFIX[name]
    assert results[f"{prefix}_top1"] == pytest.approx(np.trace(matrix) / TEST)
    mean = np.mean(np.diag(matrix) / per_class)
    assert results[f"{prefix}_mean_per_class"] == pytest.approx(mean)
    table = (done(name) / "per_class.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in table[1:]] == [[f"class_{i}", "8"] for i in range(3)]
    assert (done(name) / "plots" / "confusion_matrix.png").stat().st_size


@pytest.mark.slow
def test_data_and_architecture_are_the_runs(done, run):
    ours = read(run / "config.json")
    for name in CLASSIFIED:
        written = read(done(name) / "config.json")
        for field in ("name", "dir", "train_split", "test_split", "image_size", "test_resize"):
            assert written["data"][field] == ours["data"][field], field
        assert written["encoder"] == ours["encoder"]
        normalization = {k: ours["views"][k] for k in ("mean", "std")}
        assert {k: v for k, v in written["views"].items() if k != "global"} == normalization
        assert ("global" in written["views"]) == (name in TRAINED)
        assert written["compute_dtype"] == ours["compute_dtype"]
    views, of_run = (
        config["views"]["global"] for config in (read(done("finetune") / "config.json"), ours)
    )
    for field in ("size", "area", "aspect"):
        assert views[field] == of_run[field], field
    assert views["count"] == 1 and "view_2" not in views
    assert views["view_1"]["flip_prob"] == of_run["view_1"]["flip_prob"]
    # MoCo's protocol has a crop of its own.
    views = read(done("linear_probe:moco") / "config.json")["views"]["global"]
    assert views["area"] == [0.08, 1.0] and views["aspect"] == of_run["aspect"]


def brute_force_knn(bank, queries, k, temperature, classes=tiny_jobs.CLASSES):
    """Top-1, one query and one neighbour at a time."""

    def unit(x):
        x = x.astype(np.float64)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    hits = 0
    for row, label in zip(unit(queries["features"]), queries["labels"], strict=True):
        cosines = unit(bank["features"]) @ row
        votes = [0.0] * classes
        for i in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[bank["labels"][i]] += math.exp(cosines[i] / temperature)
        hits += votes.index(max(votes)) == label
    return hits / len(queries["labels"])


@pytest.mark.slow
def test_knn_is_that_of_the_embedded_features(done, embedded):
    results = read(done("knn") / "results.json")
    assert (results["knn_k"], results["knn_temperature"]) == (5, 0.1)
    assert results["knn_top1"] == brute_force_knn(embedded("train"), embedded("test"), 5, 0.1)


GRID = {"neighbours": (1, 9), "temperatures": (0.01, 1.0)}


def test_knns_grid_is_picked_on_held_out_training_images(done, embedded):
    train, test = embedded("train"), embedded("test")
    held = probes.held_out_rows(train["labels"], 5000, seed=0)
    assert np.bincount(train["labels"][held]).tolist() in ([6, 6, 7], [6, 7, 6], [7, 6, 6])
    bank, queries = (
        {k: v[rows] for k, v in train.items() if k != "class_names"} for rows in (~held, held)
    )
    found = {
        (k, t): brute_force_knn(bank, queries, k, t)
        for k in GRID["neighbours"]
        for t in GRID["temperatures"]
    }
    best = max(found, key=found.get)
    results = read(done("knn", **GRID) / "results.json")
    assert (results["knn_k"], results["knn_temperature"]) == best
    assert results["knn_top1_held_out"] == pytest.approx(found[best])
    assert results["knn_top1"] == brute_force_knn(train, test, *best)


def scikit_learn(train, test, c, standardize=True):
    """Top-1 of its logistic regression."""
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(train["features"])
    model = LogisticRegression(C=c, max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(train["features"]), train["labels"])
    return model.score(scaler.transform(test["features"]), test["labels"])


def test_the_fast_probe_is_scikit_learns(done, embedded):
    results = read(done("linear_probe") / "results.json")
    assert results["linear_probe_C"] in (0.01, 1.0)
    train, test = embedded("train"), embedded("test")
    expected = scikit_learn(train, test, results["linear_probe_C"])
    assert abs(results["linear_probe_top1"] - expected) <= 1.01 / TEST  # one image on the edge


def test_few_labels_are_scikit_learns_over_the_same_draws(done, embedded):
    train, test = embedded("train"), embedded("test")
    scaler = StandardScaler().fit(train["features"])
    results = read(done("fewshot") / "results.json")
    found = []
    for draw in range(3):
        rng = np.random.default_rng((0, draw))
        rows = [rng.permutation(np.flatnonzero(train["labels"] == c))[:4] for c in range(3)]
        rows = np.concatenate(rows)
        model = LogisticRegression(max_iter=5000)
        model.fit(scaler.transform(train["features"][rows]), train["labels"][rows])
        found.append(model.score(scaler.transform(test["features"]), test["labels"]))
    assert results["fewshot_4_top1"] == pytest.approx(np.mean(found), abs=1.01 / TEST)
    assert results["fewshot_draws"] == 3 and results["fewshot_4_ci95"] >= 0


@pytest.mark.parametrize("name", ["linear_probe:byol", "linear_probe:moco"])
def test_a_probes_classifier_is_one_of_the_runs_features(name, done, embedded):
    """What was trained is what was tested: the picked rate's kernel on the embedded features."""
    workdir, test = done(name), embedded("test")
    results = read(workdir / "results.json")
    rates = read(workdir / "config.json")["learning_rates"]
    with np.load(workdir / "classifier.npz") as heads:
        best = rates.index(results["linear_probe_learning_rate"])
        assert heads["kernel"].shape[0] == len(rates) and np.any(heads["kernel"][best])
        logits = test["features"] @ heads["kernel"][best] + heads["bias"][best]
    assert results["linear_probe_top1"] == pytest.approx(
        np.mean(logits.argmax(1) == test["labels"])
    )
    assert ("linear_probe_top1_held_out" in results) == (name == "linear_probe:byol")
    # Of 96 training images 19 are held out where there is something to pick.
    assert results["train_images"] == (TRAIN - TRAIN // 5 if len(rates) > 1 else TRAIN)
    assert not (workdir / "checkpoints").exists()


def read_state(workdir: pathlib.Path, step: int | None = None) -> dict:
    """The arrays in a job's newest checkpoint."""
    step = step or encoder.checkpoint_steps(str(workdir))[-1]
    import orbax.checkpoint as ocp

    folder = workdir / "checkpoints" / str(step) / "state"
    return flatten(ocp.PyTreeCheckpointer().restore(str(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "finetune"])
def test_init_from_is_another_name_of_checkpoint(done, run, name):
    """So the job that is done is the same one."""
    config = make_config(name, "", init_from=str(run))
    assert jobs.run(config, str(done(name))) == read(done(name) / "results.json")
    assert "init_from" not in read(done(name) / "config.json")
    with pytest.raises(UserError, match=r"config\.init_from=.*config\.checkpoint: give one"):
        run_job(name, run, done(name), init_from=str(run))


@pytest.mark.slow
def test_a_finetuned_encoder_moved_and_can_be_evaluated_itself(done, run, tmp_path):
    """Its own checkpoint, embedded, with the classifier in it: the accuracy that was told."""
    workdir = done("finetune:100pct")
    run_job("embed", workdir, tmp_path / "job", split="test")
    state = read_state(workdir)
    with np.load(tmp_path / "job" / "features.npz") as found:
        kernel, bias = (state[f"online_params/classifier/output/{k}"] for k in ("kernel", "bias"))
        hits = (found["features"] @ kernel + bias).argmax(1) == found["labels"]
    assert read(workdir / "results.json")["finetune_top1"] == pytest.approx(hits.mean())
    before, after = (encoder.load(str(path)).variables for path in (run, workdir))
    for path, x in flatten(before["params"]).items():
        assert np.any(x != flatten(after["params"])[path]), path


@pytest.mark.slow
def test_a_share_of_the_labels_is_drawn_evenly(done, data, monkeypatch, run, tmp_path):
    assert read(done("finetune") / "results.json")["train_images"] == 9  # 9.6 of 96, in 3 classes
    assert read(done("finetune:100pct") / "results.json")["train_images"] == TRAIN
    used = []
    train = training.train

    def spy(config, source, *args):
        used.append([source.describe(i) for i in range(source.num_examples)])
        used.append(source.labels.tolist())
        return train(config, source, *args)

    monkeypatch.setattr(training, "train", spy)
    run_job("finetune", run, tmp_path / "share", steps=1)
    names, labels = used
    assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(set(names)) == 9
    for name, label in zip(names, labels, strict=True):
        assert pathlib.Path(name).parts[-3:-1] == ("train", f"class_{label}")

    # A list of files: these and no others, by their whole names or the last part.
    wanted = sorted((data / "train").rglob("*.png"))[::7]
    lines = [str(path) if i % 2 else path.name for i, path in enumerate(wanted)]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n\n")
    used.clear()
    changes = {"label_list": str(tmp_path / "list.txt"), "steps": 1}
    results = run_job("finetune", run, tmp_path / "list", **changes)
    assert sorted(used[0]) == [str(path) for path in wanted]
    assert results["train_images"] == len(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_probe", "knn", "fewshot", "finetune"])
def test_an_untrained_encoder_of_the_seed_is_measured_beside(name, run, done, tmp_path):
    changes = {"random_init": True}
    workdir = done(name, **changes)
    results = read(workdir / "results.json")
    beside = {k for k in results if k.startswith("random_init_")}
    assert {
        f"random_init_{k}" for k in runner.measures(results) if "random_init_" not in k
    } <= beside
    # An export of such an encoder, evaluated by itself, comes to the same.
    frozen = encoder.load(str(run))
    untrained = jax.device_get(encoder.untrained(frozen.config, seed=0))
    encoder.export(frozen._replace(variables=untrained), str(tmp_path / "untrained"))
    alone = run_job(name, tmp_path / "untrained", tmp_path / "job", random_init=False)
    for key in beside:
        assert alone[key.removeprefix("random_init_")] == pytest.approx(results[key]), key
    if "random_init" not in make_config(name, run) or not make_config(name, run).random_init:
        trained = read(done(name) / "results.json")
        assert {k: trained[k] for k in runner.measures(trained)} == {
            k: v for k, v in runner.measures(results).items() if "random_init_" not in k
        }


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 70])
def test_the_closing_evaluation_of_a_run_and_the_jobs_on_it_agree(limit, data, tmp_path):
    """To the last bit, at the defaults of both; of a part of the images too."""
    limits = {"eval__max_train_images": limit} if limit else {}
    run = tiny_jobs.make_run(data, tmp_path / "run", eval__enabled=True, **limits)
    closing, config = read(run / "results.json"), read(run / "config.json")
    fewshot = {"labels_per_class": (config["eval"]["fewshot_labels"],)}
    fewshot |= {"draws": config["eval"]["fewshot_draws"]}
    found = {}
    for name, changes in (
        ("linear_probe", {"C": linear_probe.get_config().C}),
        ("knn", {}),
        ("fewshot", fewshot),
    ):
        changes |= {"data__max_train_images": limit, "random_init": False}
        found |= run_job(name, run, tmp_path / name, **changes)
    assert found["linear_probe_top1"] == closing["linear_probe_top1"]
    assert found["knn_top1"] == closing["knn_top1"]
    assert found["fewshot_2_top1"] == closing["fewshot_top1"]
    for prefix, names in (
        ("linear_probe", ("top1", "mean_per_class", "top1_held_out", "C")),
        ("knn", ("top1", "mean_per_class", "k", "temperature")),
    ):
        both = {f"{prefix}_{name}" for name in names}
        for results in (found, closing):
            assert {key for key in results if key.startswith(f"{prefix}_")} == both
        assert {key: found[key] for key in both} == {key: closing[key] for key in both}
    assert found["train_images"] == (limit or TRAIN)


# ------------------------------------------------------------------------------ transfer


@pytest.fixture(scope="module")
def transfer_sets(data, tmp_path_factory):
    """A set that isn't there, one of a folder, and one with a validation split."""
    folder = tmp_path_factory.mktemp("sets")
    other = folder / "other"
    for split, count, seed in (("train", 30, 5), ("validation", 15, 6), ("test", 20, 7)):
        tiny_jobs.write_split(other / split, count, seed, classes=5)
    return {
        "only": ("cifar10", "aircraft", "dtd"),
        "data__dir": str(folder),
        "sets__aircraft__name": "folder",
        "sets__aircraft__dir": str(data),
        "sets__dtd__name": "folder",
        "sets__dtd__dir": str(other),
    }


@pytest.mark.slow
def test_transfer_is_scikit_learns_on_each_set_that_is_there(
    done, embedded, run, transfer_sets, tmp_path
):
    workdir = done("transfer", **transfer_sets)
    results = read(workdir / "results.json")
    assert not any("cifar10" in key for key in results)
    assert results["transfer_aircraft_metric"] == "mean_per_class"
    assert results["transfer_dtd_metric"] == "top1"
    assert results["left_out"] == "cifar10" and results["sets"] == "aircraft, dtd"
    table = (workdir / "table.md").read_text()
    assert "aircraft" in table and "Left out: cifar10: " in table
    for name in ("aircraft", "dtd"):
        assert f"{100 * results[f'transfer_{name}']:.1f} %" in table

    # Without a validation split a fifth of the training images is held out: all classes alike.
    best = results["transfer_aircraft_penalty"]
    expected = scikit_learn(
        embedded("train"), embedded("test"), 1 / (best * TRAIN), standardize=False
    )
    assert abs(results["transfer_aircraft"] - expected) <= 1.01 / TEST

    # With one: picked on it, then fitted to both.
    parts = {}
    folder = {"data__name": "folder", "data__dir": transfer_sets["sets__dtd__dir"]}
    for split in ("train", "validation", "test", "train+validation"):
        run_job("embed", run, tmp_path / split, split=split, **folder)
        with np.load(tmp_path / split / "features.npz") as found:
            parts[split] = dict(found)
    score = functools.partial(scikit_learn, standardize=False)
    found = {p: score(parts["train"], parts["validation"], 1 / (30 * p)) for p in (0.01, 1.0)}
    best = results["transfer_dtd_penalty"]
    assert abs(results["transfer_dtd_validation"] - max(found.values())) <= 1.01 / 15
    assert found[best] >= max(found.values()) - 1.01 / 15
    expected = score(parts["train+validation"], parts["test"], 1 / (45 * best))
    assert abs(results["transfer_dtd"] - expected) <= 1.01 / 20


# --------------------------------------------------------------- what the test set is for

PICKED = {
    "linear_probe": ({}, "linear_probe_C", "linear_probe"),
    "knn": (GRID, "knn_k", "knn"),
    "linear_probe:byol": ({}, "linear_probe_learning_rate", "linear_probe"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICKED)
def test_nothing_is_picked_by_the_test_set(name, done, run, tmp_path, monkeypatch):
    """Other test labels change the accuracy and nothing else."""
    changes, field, prefix = PICKED[name]
    straight = read(done(name, **changes) / "results.json")
    relabelled(monkeypatch, lambda labels: (labels + 1) % tiny_jobs.CLASSES)
    results = run_job(name, run, tmp_path / "job", **changes)
    assert results[field] == straight[field]
    assert results[f"{prefix}_top1_held_out"] == straight[f"{prefix}_top1_held_out"]
    matrix, before = (confusion(path) for path in (tmp_path / "job", done(name, **changes)))
    assert np.any(matrix != before)
    np.testing.assert_array_equal(matrix.sum(0), before.sum(0))  # the same predictions
    if name == "linear_probe:byol":
        heads = [np.load(path / "classifier.npz") for path in (tmp_path / "job", done(name))]
        assert_same(dict(heads[0]), dict(heads[1]))


@pytest.mark.slow
def test_transfer_picks_nothing_by_the_test_set(done, run, transfer_sets, tmp_path, monkeypatch):
    straight = read(done("transfer", **transfer_sets) / "results.json")
    relabelled(monkeypatch, lambda labels: labels[::-1].copy())
    results = run_job("transfer", run, tmp_path / "job", **transfer_sets)
    for name in ("aircraft", "dtd"):
        for key in (f"transfer_{name}_penalty", f"transfer_{name}_validation"):
            assert results[key] == straight[key]
    assert results["transfer_dtd"] != straight["transfer_dtd"]


# ------------------------------------------------------------- stopped, and begun again

ENDINGS = {
    "sigterm": functools.partial(signal.raise_signal, signal.SIGTERM),
    "killed": None,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ending", "at"),
    [
        ("finetune:100pct", "sigterm", 6),
        ("finetune:100pct", "killed", 6),
        ("finetune:100pct", "sigterm", 24),  # the last
        ("linear_probe:byol", "sigterm", 6),
        ("linear_probe:byol", "killed", 6),
        ("linear_probe:byol", "sigterm", 8),  # the last
    ],
)
def test_a_job_that_was_stopped_ends_as_one_that_never_was(
    name, ending, at, done, run, tmp_path, stop, capfd
):
    def kill():
        raise Killed

    workdir = tmp_path / "job"
    stop(at, ENDINGS[ending] or kill)
    with pytest.raises(Stopped if ENDINGS[ending] else Killed):
        run_job(name, run, workdir)
    assert not (workdir / "results.json").exists()
    saved = encoder.checkpoint_steps(str(workdir))[-1]
    assert saved == at if ENDINGS[ending] else 2 <= saved < at
    stop(0, kill)
    capfd.readouterr()
    run_job(name, run, workdir)
    assert f"resuming from step {saved} " in capfd.readouterr().err

    undisturbed = done(name)
    assert read(workdir / "results.json") == read(undisturbed / "results.json")
    assert tiny_runs.metrics_text(workdir) == tiny_runs.metrics_text(undisturbed)
    for file in ("config.json", "per_class.csv"):
        assert (workdir / file).read_bytes() == (undisturbed / file).read_bytes(), file
    if name == "finetune:100pct":
        assert_same(read_state(workdir), read_state(undisturbed))
    else:
        heads = [np.load(path / "classifier.npz") for path in (workdir, undisturbed)]
        assert_same(dict(heads[0]), dict(heads[1]))
        assert not (workdir / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_probe", "knn", "linear_probe:byol", "finetune:100pct"])
def test_a_job_killed_before_its_results_comes_to_the_same(name, done, run, tmp_path, monkeypatch):
    def kill(*_):
        raise Killed

    with killed_before_results(), pytest.raises(Killed):
        run_job(name, run, tmp_path / "job")
    assert not (tmp_path / "job" / "results.json").exists()
    # What was trained isn't trained again.
    monkeypatch.setattr(inputs, "train_batches", kill)
    assert run_job(name, run, tmp_path / "job") == read(done(name) / "results.json")
    np.testing.assert_array_equal(confusion(tmp_path / "job"), confusion(done(name)))


@pytest.mark.parametrize("name", [*CLASSIFIED, "fewshot", "embed"])
def test_a_job_that_is_done_is_not_repeated(name, done, run, looks):
    workdir = done(name)
    looks.clear()  # those of this very job, where no test before has done it
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"}
    # A field that changes nothing of the results may differ.
    assert run_job(name, run, workdir, feature_batch_size=7) == read(workdir / "results.json")
    assert not looks
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name != ".lock"}


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("knn", {"neighbours": (3,)}, r"config\.neighbours=\[3\]: the job there has \[5\]"),
        ("knn", {"seed": 1}, "config.seed=1: the job there has 0"),
        ("fewshot", {"draws": 5}, "config.draws=5: the job there has 3"),
        ("finetune:100pct", {"label_share": 0.5}, "config.label_share=0.5: the job there has 1.0"),
        ("linear_probe", {"data__test_split": "train"}, "config.data.test_split='train'.*'test'"),
    ],
)
def test_another_job_in_the_same_workdir_is_refused(name, changes, told, done, run, looks):
    before = files_of(done(name))
    with pytest.raises(UserError, match=told) as error:
        run_job(name, run, done(name), **changes)
    assert str(done(name)) in str(error.value) and "another --workdir" in str(error.value)
    assert "\n" not in str(error.value)
    assert not looks and files_of(done(name)) == before


EARLIER_NAMES = {
    "data_info": "found",
    "views": "augment",
    "C": "inverse_penalties",
    "only": "order",
    "follow": "watch",
    "follow_poll_seconds": "watch_poll_seconds",
    "follow_patience_hours": "watch_patience_hours",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_probe", "knn", "transfer"])
def test_a_job_that_an_earlier_version_did_is_not_repeated(
    name, done, run, transfer_sets, looks, tmp_path
):
    """Its fields had other names; another job is refused as ever."""
    changes = transfer_sets if name == "transfer" else {}
    shutil.copytree(done(name, **changes), tmp_path / "job")
    looks.clear()
    path = tmp_path / "job" / "config.json"
    now = read(path)
    path.write_text(json.dumps({EARLIER_NAMES.get(k, k): v for k, v in now.items()}))
    assert not {"data_info", "views", "C", "only", "follow"} & read(path).keys()
    results = run_job(name, run, tmp_path / "job", **changes)
    assert results == read(done(name, **changes) / "results.json") and not looks
    with pytest.raises(UserError, match=r"job: config\.seed=1: the job there has 0; use"):
        run_job(name, run, tmp_path / "job", seed=1, **changes)


def test_a_job_of_another_kind_or_run_is_refused(done, run, tmp_path):
    with pytest.raises(UserError, match=r"belongs to a knn job of .*, which a fewshot job would"):
        run_job("fewshot", run, done("knn"))
    with pytest.raises(UserError, match=r"data_info.run.*the job there has"):
        run_job("knn", copy_run(run, tmp_path / "other", 4), done("knn"))
    with pytest.raises(UserError, match=r"belongs to a pretraining run \(byol\), which a knn"):
        run_job("knn", run, run)  # which leaves the run as it is


@contextlib.contextmanager
def killed_before_results():
    def kill(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "write_confusion", kill)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["run", "7"])
def test_a_job_keeps_to_the_checkpoint_that_it_began_with(run, tmp_path, folder):
    """Though the run has gone on since."""

    going_on = copy_run(run, tmp_path / folder, 3)
    with killed_before_results(), pytest.raises(Killed):
        run_job("knn", going_on, tmp_path / "job")
    add_checkpoint(run, going_on, 4)
    results = run_job("knn", going_on, tmp_path / "job")
    assert results["step"] == 3
    # Once it is done too.
    assert run_job("knn", going_on, tmp_path / "job") == results
    # Another workdir takes the newest; a checkpoint that is named is the one.
    assert run_job("embed", going_on, tmp_path / "newest")["step"] == 4
    assert run_job("embed", going_on / "checkpoints" / "2", tmp_path / "named")["step"] == 2
    with pytest.raises(UserError, match=r"data_info\.step=4: the job there has 3"):
        run_job("knn", going_on / "checkpoints" / "4", tmp_path / "job")


def test_a_checkpoint_that_is_gone_is_told(run, tmp_path):
    going_on = copy_run(run, tmp_path / "run", 3)
    with killed_before_results(), pytest.raises(Killed):
        run_job("knn", going_on, tmp_path / "job")
    add_checkpoint(run, going_on, 4)
    shutil.rmtree(going_on / "checkpoints" / "3")
    with pytest.raises(UserError, match=r"step 3, which is no longer in .*; use another --workdir"):
        run_job("knn", going_on, tmp_path / "job")


# ------------------------------------------------------------------------- exported encoders


@pytest.mark.slow
def test_an_exported_encoder_is_worth_the_same(run, done, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "exported"
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(folder)])
    export.main()
    assert f"wrote {folder}" in capsys.readouterr().out
    files = ["README.md", "encoder.json", "encoder.npz", "preprocessing.json"]
    assert sorted(os.listdir(folder)) == files
    here, there = encoder.load(str(run)), encoder.load(str(folder))
    assert_same(there.variables, here.variables)
    assert (there.run, there.step) == (None, here.step)
    results = run_job("linear_probe", folder, tmp_path / "job")
    own = read(done("linear_probe") / "results.json")
    assert runner.measures(results) == runner.measures(own)
    assert results["step"] == own["step"] and results["run"] is None
    assert run_job("linear_probe", folder, tmp_path / "job") == results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "finetune"])
def test_an_encoder_that_an_earlier_version_exported_is_worth_the_same(name, run, done, tmp_path):
    """Its crops, flips and normalisation lay elsewhere in the config."""
    folder = tmp_path / "exported"
    encoder.export(encoder.load(str(run)), str(folder))
    about = read(folder / "encoder.json")
    config = about["config"]
    config["found"], views = config.pop("data_info"), config.pop("views")
    group = views.pop("global")
    config["augment"] = views | {view: group[view] for view in ("view_1", "view_2")}
    config["data"] |= {f"crop_{field}": group[field] for field in ("area", "aspect")}
    (folder / "encoder.json").write_text(json.dumps(about))
    results, own = run_job(name, folder, tmp_path / "job"), read(done(name) / "results.json")
    assert runner.measures(results) == runner.measures(own)
    ours, theirs = (read(path / "config.json") for path in (tmp_path / "job", done(name)))
    assert ours["views"] == theirs["views"] and ours["data"] == theirs["data"]


def test_an_export_that_cannot_be_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path), str(tmp_path / "to")])
    with pytest.raises(SystemExit) as ended:
        export.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: config.checkpoint=")
    assert len(told.splitlines()) == 1 and not (tmp_path / "to").exists()


# ---------------------------------------------------------------------------------- mistakes

MISTAKES = [
    ("linear_probe", {"protocol": "slow"}, "protocol='slow': must be one of fast, sgd"),
    ("linear_probe", {"C": ()}, r"C=\(\): must be one or more"),
    ("linear_probe", {"C": (1.0, 0.0)}, "C=.*above 0"),
    ("linear_probe", {"held_out_images": 0}, "held_out_images=0: must be at least 1"),
    ("linear_probe:byol", {"held_out_images": 0}, "held_out_images=0: must be at least 1"),
    ("linear_probe:byol", {"learning_rates": ()}, r"learning_rates=\(\): must be one or more"),
    ("linear_probe:byol", {"learning_rates": (0.1, 0.1)}, "learning_rates=.*different numbers"),
    ("linear_probe:byol", {"optimizer__name": "lars"}, "optimizer.name='lars': must be sgd"),
    ("linear_probe:byol", {"batch_size": 80}, "batch_size=80: must be at most the 77 images"),
    ("linear_probe:byol", {"batch_size": 12}, "batch_size=12: must be a multiple of 8"),
    ("linear_probe:byol", {"epochs": 0.0}, "the length rounds to 0 steps"),
    ("knn", GRID | {"held_out_images": 0}, "held_out_images=0: must be at least 1"),
    ("knn", {"neighbours": (97,)}, r"neighbours=\(97,\): must be at most the 96 training images"),
    ("knn", {"neighbours": (0,)}, r"neighbours=\(0,\): .*whole numbers above 0"),
    ("knn", {"temperatures": (-1.0,)}, "temperatures=.*above 0"),
    ("knn", {"feature_batch_size": 0}, "feature_batch_size=0: must be at least 1"),
    ("knn", {"data__test_split": "tset"}, "data.test_split='tset': .*splits: train, test"),
    ("knn", {"data__test_split": "test[:0]"}, r"data.test_split='test\[:0\]': holds no images"),
    ("knn", {"data__dir": "/nowhere"}, "data.dir='/nowhere': is not a directory"),
    ("knn", {"data__name": "imagnet"}, "data.name='imagnet'.*did you mean"),
    ("knn", {"compute_dtype": "float8"}, "compute_dtype='float8': must be one of auto"),
    ("fewshot", {"labels_per_class": ()}, r"labels_per_class=\(\): must be one or more"),
    ("fewshot", {"draws": 1}, "draws=1: must be at least 2"),
    ("fewshot", {"C": 0.0}, "config.C=0.0: must be above 0"),
    ("finetune", {"views__global__count": 2}, "views.global.count=2: must be 1: the job trains"),
    ("finetune", {"batch_size": 16}, "batch_size=16: must be at most the 9 images"),
    ("finetune", {"label_share": 0.0}, "label_share=0.0: must be above 0"),
    ("finetune", {"label_share": 1.5}, "label_share=1.5: must be above 0, at most 1"),
    ("finetune", {"label_list": "/no/list"}, "label_list='/no/list': cannot be read"),
    ("transfer", {"only": ("cifar11",)}, "only=.'cifar11',.: must be one or more of aircraft"),
    ("transfer", {"sets__pets__metric": "top2"}, "sets.pets.metric='top2': must be one of top1"),
    ("transfer", {"penalties": ()}, r"penalties=\(\): must be one or more"),
    ("transfer", {"only": ("cifar10",)}, "config.only: none of cifar10 is there"),
    ("embed", {"format": "csv"}, "format='csv': must be one of npz, npy"),
    ("embed", {"split": "tset"}, "split='tset': "),
    ("embed", {"rows_per_file": 0}, "rows_per_file=0: must be at least 1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes", "told"), MISTAKES)
def test_mistakes_are_told_before_anything_is_done(
    name, changes, told, run, tmp_path, looks, transfer_sets
):
    where = {"data__dir": transfer_sets["data__dir"]} if name == "transfer" else {}
    with pytest.raises(UserError, match=f"^config.{told}|{told}") as error:
        run_job(name, run, tmp_path / "job", **where | changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "job" / "results.json").exists()
    # Only what the features tell is found later.
    assert not looks or "neighbours" in changes


def test_wrong_checkpoints_are_told(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = copy_run(run, tmp_path / "broken", 1)
    for path in (broken / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    for path, told in (
        ("", "config.checkpoint='': must name a run's workdir"),
        (tmp_path / "nowhere", "is not a directory"),
        (empty, "holds no checkpoint of a run, nor an exported encoder"),
        (run / "checkpoints" / "9", "there is no checkpoint of step 9: 1, 2, 3, 4"),
        (broken, "checkpoints/1 cannot be read"),
    ):
        with pytest.raises(UserError, match=told) as error:
            run_job("knn", path, tmp_path / "job")
        assert "\n" not in str(error.value)


@pytest.fixture
def all_but_one_class(data, tmp_path):
    """A data set whose test images have a class that no training image has."""
    folder = tmp_path / "unseen"
    shutil.copytree(data, folder)
    shutil.rmtree(folder / "train" / "class_2")
    return {"data__dir": str(folder)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["linear_probe", "knn", "fewshot", "finetune:100pct", "linear_probe:byol"]
)
def test_test_classes_without_training_images(name, run, all_but_one_class, tmp_path):
    told = "1 of its classes have no image in .*allow_unseen_classes=True"
    with pytest.raises(UserError, match=told):
        run_job(name, run, tmp_path / "job", **all_but_one_class)
    allowed = all_but_one_class | {"data__allow_unseen_classes": True}
    results = run_job(name, run, tmp_path / "job", **allowed)
    assert results["test_images"] == TEST and results["classes"] == 3
    if name != "fewshot":
        matrix = confusion(tmp_path / "job")
        assert matrix.sum(1).tolist() == [8, 8, 8]
        assert matrix[:, 2].sum() == 0 or name in TRAINED  # they count as wrong
        assert results[f"{PREFIX[name]}_top1"] == pytest.approx(np.trace(matrix) / TEST)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["knn", "linear_probe", "fewshot", "finetune:100pct", "linear_probe:byol"]
)
def test_labels_that_no_classifier_can_be_made_of(name, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        relabelled(patch, lambda labels: labels + 1)
        told = "data.test_split='test': has labels from 1 to 3, but 3 classes"
        with pytest.raises(UserError, match=told):
            run_job(name, run, tmp_path / "job")
    relabelled(monkeypatch, np.zeros_like, splits=("train", "test"))
    told = "data.train_split='train': has images of one class only"
    with pytest.raises(UserError, match=told):
        run_job(name, run, tmp_path / "job")


@pytest.mark.parametrize(
    "name", ["knn", "linear_probe", "fewshot", "finetune", "linear_probe:byol"]
)
def test_data_without_labels_is_told(name, run, tmp_path):
    tiny_jobs.write_split(tmp_path / "loose", 20, seed=3, classes=1)
    folder = {"data__name": "folder", "data__dir": str(tmp_path / "loose" / "class_0")}
    with pytest.raises(UserError, match=r"data\.train_split='train\[:90%\]': .* has no labels"):
        run_job(name, run, tmp_path / "job", **folder)


def test_other_classes_in_the_test_split_are_told(run, data, tmp_path, monkeypatch):
    load_split = inputs.load_split

    def load(config, split, *args, **kwargs):
        source = load_split(config, split, *args, **kwargs)
        names = ("a", "b", "c", "d")
        return dataclasses.replace(source, class_names=names) if split == "test" else source

    monkeypatch.setattr(inputs, "load_split", load)
    with pytest.raises(UserError, match=r"data\.test_split=.* 4 classes are not the 3 of"):
        run_job("knn", run, tmp_path / "job")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "names no file"),
        ("00.png\nnone.png\n", "1 of its 2 files are not in the training split, such as none.png"),
    ],
)
def test_a_list_of_labels_that_does_not_fit_is_told(lines, told, run, tmp_path):
    (tmp_path / "list").write_text(lines)
    with pytest.raises(UserError, match=f"label_list=.*{told}"):
        run_job("finetune", run, tmp_path / "job", label_list=str(tmp_path / "list"))


def test_a_missing_file_is_told_though_others_have_names_in_common(run, data, tmp_path):
    """Two classes may each have a `1.png`."""
    folder = tmp_path / "twins"
    shutil.copytree(data, folder)
    shutil.copy(folder / "train/class_0/00.png", folder / "train/class_1/00.png")
    (tmp_path / "list").write_text("00.png\n01.png\nnone.png\n")
    changes = {"label_list": str(tmp_path / "list"), "data__dir": str(folder)}
    with pytest.raises(UserError, match=r"1 of its 3 files are not in .* such as none.png"):
        run_job("finetune", run, tmp_path / "job", **changes)


def test_a_mended_command_may_go_to_the_same_workdir(run, tmp_path):
    """After a mistake that only the features told; what is trained would stay."""
    with pytest.raises(UserError, match="neighbours"):
        run_job("knn", run, tmp_path / "job", neighbours=(200,))
    assert run_job("knn", run, tmp_path / "job", neighbours=(20,))["knn_k"] == 20


def test_a_handful_of_training_images_leaves_nothing_to_pick_on(run, tmp_path):
    """Four images: the first of the grid is taken."""
    changes = {"data__train_split": "train[:4]", "neighbours": (1, 2)}
    results = run_job("knn", run, tmp_path / "knn", data__allow_unseen_classes=True, **changes)
    assert results["knn_k"] == 1 and "knn_top1_held_out" not in results


# ---------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_real_processes(run, done, tmp_path):
    """SIGTERM while it trains, then the same command again; and a mistake, in one line."""
    fields = ["--config.batch_size=8", "--config.epochs=2.0", "--config.checkpoint_every_steps=2"]
    command = [
        *(sys.executable, "tests/tiny_jobs.py", "--config=configs/finetune.py:100pct"),
        *(f"--config.checkpoint={run}", f"--workdir={tmp_path / 'job'}", *fields),
        "--compilation_cache=",
    ]
    wrong = [
        *(sys.executable, "run_experiment.py", "--config=configs/knn.py"),
        *("--config.checkpoint=/nowhere", f"--workdir={tmp_path / 'wrong'}"),
        "--compilation_cache=",
    ]
    begin = functools.partial(
        subprocess.Popen, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    slow = process_env(jax.device_count()) | {"TINY_PAUSE": "0.3"}
    with begin(command, env=slow) as child, begin(wrong, env=process_env()) as mistaken:
        try:
            out, told = mistaken.communicate(timeout=120)
            assert mistaken.returncode == 2 and not out
            assert told == "error: config.checkpoint='/nowhere': is not a directory\n"
            for line in child.stderr:
                if line.startswith("first step done"):
                    break
            child.send_signal(signal.SIGTERM)
            printed = child.stderr.read()
            assert child.wait(120) == 143, printed
        finally:
            child.kill()
            mistaken.kill()
    assert "which is saved in" in printed.splitlines()[-1]
    assert not (tmp_path / "job" / "results.json").exists()
    saved = encoder.checkpoint_steps(str(tmp_path / "job"))[-1]
    assert 1 <= saved < 2 * (TRAIN // 8)
    with begin(command, env=process_env(jax.device_count())) as child:
        _, printed = child.communicate(timeout=120)
    assert child.returncode == 0, printed
    assert f"resuming from step {saved}" in printed
    undisturbed = done("finetune:100pct")
    assert read(tmp_path / "job" / "results.json") == read(undisturbed / "results.json")
    assert_same(read_state(tmp_path / "job"), read_state(undisturbed))


@pytest.mark.parametrize("partial", ["sets.json", "classifier.npz", "checkpoints", None])
def test_a_workdir_with_something_to_go_on_from_stays_its_jobs(partial, tmp_path):
    """Else another encoder's job would go on from it."""
    if partial:
        (tmp_path / partial).write_text("")
    with pytest.raises(UserError, match="later"), runner.begun({"job": "knn"}, str(tmp_path)):
        raise UserError("later")
    assert (tmp_path / "config.json").exists() == (partial is not None)


def test_parts_of_a_stopped_embedding_do_not_stay(run, tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "features-00099.npy").write_bytes(b"of fewer rows to a file")
    run_job("embed", run, tmp_path / "job", format="npy", rows_per_file=9)
    parts = sorted(path.name for path in (tmp_path / "job").glob("features-*.npy"))
    assert parts and parts == [f"features-{i:05d}.npy" for i in range(len(parts))]


@pytest.mark.slow
def test_transfer_of_images_of_several_classes(run, tmp_path):
    """A problem for each class, and VOC's metric."""
    TinyScenes(data_dir=str(tmp_path / "sets")).download_and_prepare()
    splits = {"train": "train[:10]", "validation": "train[10:16]", "test": "train[16:]"}
    entry = {f"sets__voc2007__{name}_split": split for name, split in splits.items()}
    results = run_job(
        "transfer",
        run,
        tmp_path / "job",
        only=("voc2007",),
        sets__voc2007__name="tiny_scenes",
        penalties=(0.01, 1.0),
        data__dir=str(tmp_path / "sets"),
        **entry,
    )
    frozen = encoder.load(str(run))
    data = make_config("transfer", run).data
    data.update({k: frozen.config["data"][k] for k in ("image_size", "test_resize")})
    data.resize_method = frozen.config["data"]["resize_method"]
    data.update({"name": "tiny_scenes", "dir": str(tmp_path / "sets")})
    extract = features.Extractor(encoder.module(frozen.config).apply, *frozen.normalization)
    found = {}
    for name, split in (("fitted", "train[:16]"), ("test", "train[16:]")):
        source = inputs.load_split(data, split, "split", several_labels=True)
        found[name] = extract(frozen.variables, inputs.eval_batches(data, source, 5)())
    strength = 1 / (16 * results["transfer_voc2007_penalty"])
    scores_of_classes = [
        LogisticRegression(C=strength, tol=1e-8, max_iter=2000)
        .fit(found["fitted"].x, found["fitted"].labels[:, i])
        .decision_function(found["test"].x)
        for i in range(3)
    ]
    expected = scores.voc_map(np.stack(scores_of_classes, axis=1), found["test"].labels)
    assert results["transfer_voc2007_metric"] == "voc_map"
    assert results["transfer_voc2007"] == pytest.approx(expected, abs=1e-3)
