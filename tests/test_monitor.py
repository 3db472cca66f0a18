"""A run that watches itself: kNN, pictures, collapse, the reference, in runs of a few seconds."""

from __future__ import annotations

import functools
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from conftest import StandIn, tiny_method, tiny_networks, total_loss
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from selfsup_jax.data import inputs
from selfsup_jax.data.augment import augment_views, normalize
from selfsup_jax.evaluation.features import Features
from selfsup_jax.run import identity, metrics, workdir
from selfsup_jax.run.progress import Progress
from selfsup_jax.training import monitor, pretrain, reference
from selfsup_jax.viz import plots

PICTURES = ("learning_curves", "nearest_neighbours", "representation_map", "view_pairs")
STEPS = 8


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


class Drawn:
    """What each picture was given, the last time that it was drawn."""

    def __init__(self, patch):
        for name in PICTURES:
            draw = getattr(plots, name)

            def spy(*args, name=name, draw=draw, **kwargs):
                setattr(self, name, (args[1:], kwargs))
                draw(*args, **kwargs)

            patch.setattr(plots, name, spy)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Each of its own, in classes that nothing tells: kNN can't but be a matter of the features."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for i in range(200):
        parent = root / f"kind_{rng.integers(3)}"
        parent.mkdir(exist_ok=True)
        colors = rng.integers(0, 256, (1, 1, 3)) * 0.7 + rng.integers(0, 76, (10, 10, 3))
        Image.fromarray(colors.astype(np.uint8)).save(parent / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def labelled(images, tmp_path_factory):
    """A run with labels, without its last probes: config, data, workdir, what was drawn."""
    directory = tmp_path_factory.mktemp("labelled")
    config = tiny_runs.tiny_config(
        images,
        steps=STEPS,
        log_every_steps=3,
        keep_every_steps=1,
        eval__enabled=True,
        eval__batch_size=64,
        monitor__knn_every_steps=4,
        monitor__plots_every_steps=4,
        monitor__diagnostics_every_steps=2,
        monitor__knn_train_images=90,
        monitor__knn_test_images=17,
        monitor__map_images=11,
        monitor__view_pairs=5,
        optimizer__name="sgd",
        optimizer__learning_rate=1.0,
    )
    with pytest.MonkeyPatch.context() as patch:
        drawn = Drawn(patch)
        patch.setattr(pretrain.closing, "evaluate", lambda *args: {})
        pretrain.pretrain(config, str(directory), tiny_runs.build)
    config = config.copy_and_resolve_references()
    return config, inputs.load_data(config), directory, drawn


def features_at(config, data, directory, step: int) -> tuple[Features, Features]:
    """Of the bank and the queries, by the checkpoint's encoder and nothing of the monitor's."""
    state = tiny_runs.restore(config, directory, step)
    variables = {
        "params": state.online_params["encoder"],
        "batch_stats": state.online_stats["encoder"],
    }

    def features(source, limit: int) -> Features:
        batches = list(inputs.eval_batches(config.data, source, config.eval.batch_size, limit)())
        pictures = np.concatenate([batch["image"] for batch in batches]).astype(np.float32) / 255
        x = normalize(jnp.asarray(pictures), tuple(config.views.mean), tuple(config.views.std))
        labels = np.concatenate([batch["label"] for batch in batches])
        return Features(np.asarray(tiny_networks().encoder.apply(variables, x)), labels)

    return features(data.train, 90), features(data.test, 17)


def weighted_vote(bank: Features, queries: Features, k: int, temperature: float) -> float:
    """kNN's top-1; a tie counts against the label."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries.x, bank.x)]
    right = []
    for cosine, label in zip(unit[0] @ unit[1].T, queries.labels, strict=True):
        near = np.argsort(-cosine, kind="stable")[:k]
        votes = np.zeros(3)
        np.add.at(votes, bank.labels[near], np.exp(cosine[near] / temperature))
        right.append(np.all(np.delete(votes, label) < votes[label]))
    return float(np.mean(right))


@pytest.mark.slow
def test_knn_is_that_of_the_steps_encoder(labelled):
    config, data, directory, _ = labelled
    lines = {line["step"]: line for line in tiny_runs.recorded(directory)}
    assert [step for step, line in lines.items() if "knn_top1" in line] == [4, 8]
    expected = {}
    for step in (4, 8):
        bank, queries = features_at(config, data, directory, step)
        assert len(bank.x) == 90 and len(queries.x) == 17
        expected[step] = weighted_vote(bank, queries, k=5, temperature=0.1)
    assert {step: lines[step]["knn_top1"] for step in (4, 8)} == expected
    assert len(set(expected.values())) == 2  # else it could be any step's


@pytest.mark.slow
def test_a_look_is_recorded_though_no_line_is_due(labelled):
    lines = tiny_runs.recorded(labelled[2])
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]
    assert [line["step"] for line in lines if "projection_std" in line] == [2, 4, 6, 8]


@pytest.mark.slow
def test_pictures_are_there(labelled):
    folder = labelled[2] / "plots"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in PICTURES]
    for name in PICTURES:
        picture = pixels(folder / f"{name}.png")
        assert min(picture.shape[:2]) > 100 and picture.std() > 5, name


@pytest.mark.slow
def test_view_pairs_are_what_the_step_saw(labelled, tmp_path):
    config, data, directory, _ = labelled
    batch = next(inputs.train_batches(config, data, STEPS - 1))
    del batch["name"]
    feed = inputs.feed(config, data.train)
    batch = jax.jit(feed.views)(feed.arrays, np.int32(STEPS - 1), batch)
    before = tiny_runs.restore(config, directory, STEPS - 1)
    groups = tiny_runs.build(config, 3, STEPS, 2).augment.groups
    views_of = jax.jit(functools.partial(augment_views, groups=groups))

    def draw(number: int) -> tuple[np.ndarray, jax.Array]:
        views = views_of(jax.random.fold_in(before.rng, number), batch)["global"]
        plots.view_pairs(str(tmp_path / "a.png"), *np.asarray(views[:, :5]), step=STEPS)
        return pixels(tmp_path / "a.png"), views

    expected, views = draw(STEPS - 1)
    np.testing.assert_array_equal(pixels(directory / "plots" / "view_pairs.png"), expected)
    assert not np.array_equal(expected, draw(STEPS)[0])  # another step's are others

    # And the step did see them: they give the loss that it recorded.
    views = normalize(views, tuple(config.views.mean), tuple(config.views.std))
    loss_fn = jax.jit(total_loss(tiny_method(tiny_networks()), before, views, batch["label"]))
    loss, out = loss_fn(before.online_params, before.target_params)
    values = out.metrics
    recorded = tiny_runs.recorded(directory)[-1]
    assert recorded["step"] == STEPS
    np.testing.assert_allclose(values["loss"], recorded["loss"], rtol=1e-4)
    np.testing.assert_allclose(loss, recorded["loss"] + recorded["probe_loss"], rtol=1e-4)


@pytest.mark.slow
def test_neighbours_are_the_nearest_and_carry_their_classes(labelled):
    config, data, directory, drawn = labelled
    bank, queries = features_at(config, data, directory, STEPS)
    rows = np.linspace(0, 16, 8).astype(int)
    unit = [
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (bank.x, queries.x)
    ]
    cosine = unit[1][rows] @ unit[0].T
    (shown, neighbours, similarities), told = drawn.nearest_neighbours
    np.testing.assert_allclose(similarities, -np.sort(-cosine, axis=1)[:, :8], atol=1e-5)
    stored = {
        name: np.concatenate(
            [
                b["image"]
                for b in inputs.eval_batches(config.data, source, config.eval.batch_size, limit)()
            ]
        )
        for name, source, limit in (("bank", data.train, 90), ("queries", data.test, 17))
    }
    np.testing.assert_array_equal(shown, stored["queries"][rows])
    names = data.train.class_names
    assert told["query_names"] == [names[i] for i in queries.labels[rows]]
    for i in range(8):
        for image, name, value in zip(
            neighbours[i], told["neighbour_names"][i], similarities[i], strict=True
        ):
            (place,) = [j for j in range(90) if np.array_equal(stored["bank"][j], image)]
            assert names[bank.labels[place]] == name
            np.testing.assert_allclose(cosine[i, place], value, atol=1e-5)


@pytest.mark.slow
def test_the_map_shows_held_out_images(labelled):
    config, data, directory, drawn = labelled
    _, queries = features_at(config, data, directory, STEPS)
    (points, labels, names), _ = drawn.representation_map
    assert points.shape == (11, 2) and names == data.train.class_names
    np.testing.assert_array_equal(labels, queries.labels[:11])


@pytest.mark.slow
def test_curves_are_those_of_the_whole_run(labelled):
    (history,), told = labelled[3].learning_curves
    assert history == metrics.read_history(str(labelled[2]))
    assert told["reference"] is None and "byol" in told["title"]


@pytest.mark.slow
def test_a_run_without_labels(tmp_path, monkeypatch, fake_wandb, capfd):
    """No kNN accuracy; all pictures nevertheless, of the training images alone."""
    folder = tiny_runs.write_images(tmp_path / "images", 0, 40)
    config = tiny_runs.tiny_config(
        folder,
        steps=3,
        log_every_steps=1,
        eval__enabled=True,
        monitor__knn_every_steps=2,
        monitor__plots_every_steps=3,
        monitor__knn_train_images=30,
        wandb__project="mine",
    )
    drawn = Drawn(monkeypatch)
    results = pretrain.pretrain(config, str(tmp_path / "run"), tiny_runs.build)
    assert not [k for line in tiny_runs.recorded(tmp_path / "run") for k in line if "top1" in k]
    assert not [name for name in results if "top1" in name]
    for name in PICTURES:
        assert pixels(tmp_path / "run" / "plots" / f"{name}.png").std() > 5, name
    (queries, neighbours, similarities), told = drawn.nearest_neighbours
    assert queries.shape == (8, 8, 8, 3) and neighbours.shape == (8, 8, 8, 8, 3)
    for query, near, cosines in zip(queries, neighbours, similarities, strict=True):
        assert not any(np.array_equal(query, image) for image in near)  # none its own neighbour
        assert np.all(np.isfinite(cosines)) and np.all(np.diff(cosines) <= 0)
    files = {path.name: pixels(path) for path in tmp_path.rglob("images/*.png")}
    assert told["files"] and set(told["query_names"]) <= set(files)
    for name, image in zip(told["neighbour_names"][0], neighbours[0], strict=True):
        assert np.abs(files[name].mean((0, 1)) - image.mean((0, 1))).max() < 12, name
    # Beside them, those by the encoder before the first step, which finds others.
    untrained = told["untrained"]
    assert untrained.images.shape == (8, 4, 8, 8, 3)
    assert not np.array_equal(untrained.similarities, similarities[:, :4])
    (points, labels, names), told = drawn.representation_map
    assert points.shape == (30, 2) and labels is None and names is None
    assert told["images"].shape == (30, 8, 8, 3)
    check_tensorboard(tmp_path / "run", config)
    (sent,) = fake_wandb.runs
    assert {step for step, values in sent.logged if "train/loss" in values} == {1, 2, 3}
    assert set(PICTURES) <= set(sent.logged[-1][1]) and sent.finished
    # What is next, and whether it learned, as far as that can be told.
    told = capfd.readouterr().err
    assert "configs/embed.py" in told and f"pictures: {tmp_path}/run/plots" in told
    assert "the run logged too little to tell whether it learned" in told


def check_tensorboard(run, config):
    """The plots are shown at each step at which they were drawn, and the config once."""
    shown = EventAccumulator(str(run), {"images": 0, "tensors": 0}).Reload()
    assert set(shown.Tags()["images"]) == set(PICTURES)
    for name in PICTURES:
        (last,) = shown.Images(name)
        path = run / "plots" / f"{name}.png"
        decoded = np.asarray(Image.open(io.BytesIO(last.encoded_image_string)))
        assert last.step == 3 and np.array_equal(decoded, pixels(path))
    groups = {tag.partition("/")[0] for tag in shown.Tags()["scalars"]}
    assert groups == {"train", "optimizer", "representation", "speed"}
    (text,) = shown.Tensors("config")
    written = json.loads(text.tensor_proto.string_val[0].decode())
    assert (text.step, written["batch_size"]) == (0, config.batch_size)
    content = shown.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert started.hparams["optimizer.name"].string_value == config.optimizer.name
    assert started.hparams["seed"].number_value == config.seed


# ------------------------------------------------------------------- collapse, in whole runs


def collapse_config(images, **changes):
    """Without a predictor this collapses within 20 steps; with one it doesn't."""
    return tiny_runs.tiny_config(
        images,
        **{
            "steps": 40,
            "compute_dtype": "float32",  # what "auto" is on the CPU, for comparing configs
            "log_every_steps": 10,
            "monitor__diagnostics_every_steps": 5,
            "monitor__collapse_std": 0.2,
            "optimizer__name": "sgd",
            "optimizer__learning_rate": 0.3,
            "optimizer__weight_decay": 1e-4,
            "optimizer__schedule": "constant",
            "tau_base": 0.9,
            "tau_schedule": "constant",
            **changes,
        },
    )


@pytest.fixture(scope="module")
def separable(tmp_path_factory):
    return tiny_runs.write_images(tmp_path_factory.mktemp("separable"), 3, 60)


@pytest.mark.slow
def test_a_run_that_collapses_is_told_of_once(separable, tmp_path, capfd):
    """Also when it goes on in another process; and what it ends with says so."""
    config = collapse_config(separable, use_predictor=False)
    results = pretrain.pretrain(config, str(tmp_path), tiny_runs.build)
    told = capfd.readouterr().err
    spread = {
        r["step"]: r["projection_std"] for r in tiny_runs.recorded(tmp_path) if r["step"] % 5 == 0
    }
    low = [step for step, std in spread.items() if std < 0.2]
    step = low[1]
    assert low == list(range(low[0], 41, 5)) and step <= 30
    assert results["collapsed"] is True and results["collapsed_at_step"] == step
    assert results["projection_std"] == spread[40]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["collapsed"] is True and written["collapsed_at_step"] == step
    (warning,) = [line for line in told.splitlines() if "WARNING" in line]
    assert f"step {step}" in warning and f"{spread[step]:.3f}" in warning
    # When it happens, and not at the end.
    shown = told[: told.index("WARNING")].splitlines()[-1]
    assert shown.startswith(f"step {step}/")

    config = collapse_config(separable, use_predictor=False, steps=50)
    results = pretrain.pretrain(config, str(tmp_path), tiny_runs.build)
    told = capfd.readouterr().err
    assert "step 50/50" in told and "WARNING" not in told
    assert results["collapsed"] is True and results["collapsed_at_step"] == step


@pytest.mark.slow
def test_a_run_that_recovers_is_told_of(separable, tmp_path, capfd, monkeypatch):
    """A collapse that is over is news, and none is left in the results."""
    seen = iter([0.01, 0.01, 0.5, 0.5])
    measured = monitor.diagnostics.of_outputs

    def of_outputs(*args):
        return measured(*args) | {"projection_std": next(seen)}

    monkeypatch.setattr(monitor.diagnostics, "of_outputs", of_outputs)
    config = collapse_config(separable, steps=20)
    results = pretrain.pretrain(config, str(tmp_path), tiny_runs.build)
    told = capfd.readouterr().err
    assert told.index("WARNING: the run has collapsed by step 10") < told.index("recovered")
    assert told.count("WARNING") == told.count("recovered") == 1
    assert results["collapsed"] is False and "collapsed_at_step" not in results


@pytest.fixture
def far_reference(monkeypatch):
    """`far_reference(config)`: what that config's run is held against, with quite another loss."""

    def use(config, **changes) -> None:
        config = config.copy_and_resolve_references()
        run = workdir.describe_run(config, inputs.load_data(config).train)
        flat = identity.flat(workdir.config_json(run))
        ends = np.array([1, 1000])
        bands = {
            "loss": reference.Band(ends, *np.array([[90.0, 99], [95, 100], [100, 101]])),
            "projection_std": reference.Band(ends, *np.array([[0.0, 0], [0.5, 0.6], [1, 1]])),
        }
        loaded = reference.Reference("far", "", flat | changes, bands)
        monkeypatch.setattr(reference, "load", {"far": loaded, "": None}.__getitem__)

    return use


@pytest.mark.slow
def test_a_healthy_run_far_from_its_reference_is_told_that_once(
    separable, tmp_path, capfd, far_reference
):
    config = collapse_config(separable, monitor__reference="far")
    far_reference(config)
    results = pretrain.pretrain(config, str(tmp_path), tiny_runs.build)
    told = capfd.readouterr().err
    assert results["collapsed"] is False and "collapsed_at_step" not in results
    assert "WARNING" not in told
    (note,) = [line for line in told.splitlines() if "reference" in line]
    assert "loss" in note and "below" in note and "far" in note
    before = told[: told.index(note)].splitlines()
    assert before[-1].startswith("step 25/")  # as soon as there are five points


# -------------------------------------------------------------------- judging, by itself


@pytest.fixture
def watch(separable, tmp_path, far_reference):
    """`watch(history, ...)`: a monitor of a run that has recorded that."""

    def make(history, differs=None, **changes) -> monitor.Monitor:
        config = collapse_config(separable, **changes)
        far_reference(config, **(differs or {}))
        config = config.copy_and_resolve_references()
        data = inputs.load_data(config)
        return monitor.Monitor(
            config,
            workdir.describe_run(config, data.train),
            data,
            inputs.feed(config, data.train),
            StandIn(None, None),
            None,
            types.SimpleNamespace(history=history),
            Progress(1000, 0, 16),
            str(tmp_path),
        )

    return make


def add(history, step: int, **values: float) -> None:
    for name, value in values.items():
        steps, series = history.setdefault(name, ([], []))
        steps.append(step)
        series.append(value)


def test_what_is_wrong_is_told_when_it_is_seen_and_then_no_more(watch, capfd):
    history: dict = {}
    looking = watch(history, monitor__reference="far")
    capfd.readouterr()  # what is said of the data
    told = []
    for step in range(10, 110, 10):
        spread = 0.05 if step > 60 else 0.5
        add(history, step, loss=1.0, projection_std=spread, effective_rank=3.0)
        looking.judge()
        told += [
            (step, line.split()[0])
            for line in capfd.readouterr().err.splitlines()
            if line[0] != " "
        ]
    assert told == [(50, "NOTE:"), (80, "WARNING:")]
    assert looking.collapsed_at == 80
    results = looking.results()
    assert results["collapsed"] and results["collapsed_at_step"] == 80
    assert (results["loss"], results["projection_std"], results["effective_rank"]) == (
        1.0,
        0.05,
        3.0,
    )


def test_a_run_of_another_config_is_not_held_against_the_reference(
    watch, capfd, monkeypatch, tmp_path
):
    """Its curves are drawn beside the reference's nevertheless, which say what differs."""
    history: dict = {}
    looking = watch(history, monitor__reference="far", differs={"batch_size": 99})
    looking.draw_curves()
    assert not (tmp_path / "plots").exists()  # there is nothing to draw
    for step in range(10, 110, 10):
        add(history, step, loss=1.0, projection_std=0.5, effective_rank=3.0)
        looking.judge()
    assert not capfd.readouterr().err
    drawn = Drawn(monkeypatch)
    looking.draw_curves()
    (series,), told = drawn.learning_curves
    assert series is history and told["reference"].keys() == {"loss", "projection_std"}
    assert "far" in told["title"] and "batch_size" in told["title"]


def test_the_limits_are_the_configs(watch):
    history: dict = {}
    for step in (10, 20):
        add(history, step, projection_std=0.3, effective_rank=2.0)
    assert watch(history).collapsed_at is None
    assert watch(history, monitor__collapse_std=0.4).collapsed_at == 20
    assert watch(history, monitor__collapse_rank=2.5).collapsed_at == 20
    assert watch({}).results() == {"collapsed": False}


def test_another_hosts_monitor_says_nothing(watch, capfd, monkeypatch):
    history: dict = {}
    looking = watch(history, monitor__reference="far")
    for step in range(10, 110, 10):
        add(history, step, loss=1.0, projection_std=0.01, effective_rank=1.0)
    monkeypatch.setattr(monitor.hosts, "is_writer", lambda: False)
    looking.judge()
    assert capfd.readouterr() == ("", "")
