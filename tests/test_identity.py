"""When two configs are of the same run, whichever version of this code wrote them."""

from __future__ import annotations

import copy
import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny_jobs
from conftest import REPOSITORY, assert_same
from tiny_jobs import read

from configs import byol, dino, finetune, knn, linear_probe, moco, simclr, simsiam, transfer
from selfsup_jax import durations
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.run import identity
from selfsup_jax.run.identity import differences, flat, upgraded

# What an earlier version (commit a3a5468) wrote of `configs/byol.py:demo`.
EARLIER = {
    "job": "pretrain",
    "seed": 0,
    **{"steps": None, "examples": None, "epochs": 46.0},
    **{"batch_size": 64, "accumulate_steps": 1, "bn_groups": 1, "compute_dtype": "float32"},
    "data": {
        **{"name": "digits", "dir": "", "download": False, "train_split": "", "test_split": ""},
        **{"image_size": 16, "test_resize": 20, "resize_method": "area"},
        **{"crop_area": [0.4, 1.0], "crop_aspect": [0.75, 4 / 3]},
        **{"cache_gib": 4.0, "shuffle_buffer": 16384, "max_undecodable": 0.01},
    },
    **{"log_every_steps": 62, "checkpoint_every_steps": 310},
    **{"keep_checkpoints": 2, "keep_every_steps": 0},
    "monitor": {
        **{"diagnostics_every_steps": 62, "knn_every_steps": 620, "plots_every_steps": 1240},
        **{"max_rows": 512, "knn_train_images": 5000, "knn_test_images": 1000},
        **{"map_images": 500, "view_pairs": 12},
        **{"collapse_std": 0.1, "collapse_rank": 1.5, "reference": "byol_demo"},
    },
    "profile": {"first_step": 0, "num_steps": 5},
    "eval": {
        **{"enabled": True, "batch_size": 256},
        **{"max_train_images": 20000, "max_test_images": 50000},
        **{"knn_k": 20, "knn_temperature": 0.1, "fewshot_labels": 10, "fewshot_draws": 10},
        **{"random_init": True, "pixels": True},
    },
    **{"method": "byol", "tau_base": 0.98, "tau_schedule": "cosine"},
    **{"use_predictor": True, "use_target_network": True},
    **{"negatives_weight": 0.0, "temperature": 0.3},
    "encoder": {
        **{"depth": 18, "width": 0.25, "stem": "cifar", "padding": "same"},
        **{"zero_init_gamma": True, "kernel_init": "lecun"},
        **{"bn_decay": 0.9, "bn_epsilon": 1e-5, "bn_unbiased_average": False},
    },
    "projector": {"hidden_size": 512, "output_size": 128},
    "predictor": {"hidden_size": 512, "output_size": 128},
    "optimizer": {
        **{"name": "sgd", "learning_rate": 0.3, "scaling": "linear", "schedule": "cosine"},
        **{"drops": [], "drop_factor": 0.1},
        **{"warmup_steps": None, "warmup_examples": None, "warmup_epochs": 2.0},
        **{"momentum": 0.9, "nesterov": False, "rate_inside_momentum": False},
        **{"weight_decay": 4e-4, "trust_coefficient": 1e-3, "exclude": ["bias$", "scale$"]},
    },
    "augment": {
        **{
            view: {
                **{"flip_prob": 0.0, "jitter_prob": 0.8, "brightness": 0.4, "contrast": 0.4},
                **{"saturation": 0.0, "hue": 0.0, "jitter_style": "tensorflow"},
                **{"grayscale_prob": 0.0, "blur_prob": 0.5, "blur_kernel": 5},
                **{"blur_sigma_min": 0.1, "blur_sigma_max": 2.0, "blur_padding": "zero"},
                **{"solarize_prob": 0.0, "solarize_threshold": 0.5},
            }
            for view in ("view_1", "view_2")
        },
        **{"mean": [0.13, 0.13, 0.13], "std": [0.31, 0.31, 0.31]},
    },
}
DATA_INFO = {"train_images": 4000, "classes": 10}
# What was no part of a config: the probe at the end, and where the images are.
NO_PROBE = (
    *("eval.linear.*", "data.placement", "data.device_share", "steps_per_call"),
    *("data.processes", "data.reader"),
)


def with_data_info(config) -> identity.Flat:
    return flat(config) | {f"data_info.{name}": value for name, value in DATA_INFO.items()}


# The demo as it was then. A run writes what "auto" is on its devices.
THEN = "demo,compute_dtype=float32,encoder.depth=18,encoder.zero_init_gamma=True,epochs=46"
DEMO = with_data_info(byol.get_config(THEN))


def earlier(config: dict) -> dict:
    """A config of today as that version wrote it, of a method with heads like BYOL's."""
    old = copy.deepcopy(config)
    views = old.pop("views")
    group = views.pop("global")
    old["augment"] = views | {k: v for k, v in group.items() if k.startswith("view_")}
    old["data"] |= {"crop_area": group["area"], "crop_aspect": group["aspect"]}
    for name in ("projector", "predictor"):
        (hidden,) = old[name]["hidden_sizes"]
        old[name] = {"hidden_size": hidden, "output_size": old[name]["output_size"]}
    for name in ("end_fraction", "weight_decay_end", "excluded_rate", "constant_rate"):
        del old["optimizer"][name]
    for name in ("clip_norm", "clip_each", "beta_2", "adam_epsilon", "freeze"):
        del old["optimizer"][name]
    for unit in ("steps", "examples", "epochs"):
        del old["optimizer"][f"freeze_{unit}"]
    computed = ("remat", "pool_first", "product_norm_stages")
    for name in ("stage1_projection", "zero_init_basic", *computed, "name", "vit"):
        del old["encoder"][name]
    del old["whole_epochs"], old["online_probe"], old["init_from"]
    del old["eval"]["linear"], old["eval"]["network"], old["steps_per_call"], old["wandb"]
    for name in ("placement", "device_share", "labels", "intensity", "exif_orientation"):
        del old["data"][name]
    for name in ("crop_on", "canvas", "processes", "reader"):
        del old["data"][name]
    old["data"]["shuffle_buffer"] = 16384
    return old


# ---------------------------------------------------------------- what earlier versions wrote


def test_an_earlier_config_is_read_as_that_of_todays_preset():
    before = upgraded(identity.flatten(EARLIER | {"found": DATA_INFO}))
    assert before == identity.bound(DEMO, NO_PROBE) | {
        name: value for name, value in DEMO.items() if ".view_2." in name
    } | {"data.intensity": "full"}
    assert differences(DEMO, before, NO_PROBE) == {}
    assert flat(EARLIER | {"found": DATA_INFO}) == before
    tree = identity.upgraded_tree(EARLIER | {"found": DATA_INFO})
    assert tree["data_info"] == DATA_INFO and tree["views"]["global"]["area"] == [0.4, 1.0]
    assert identity.flatten(tree) == before
    # What the other tests make of a config of today is what that version wrote.
    config = byol.get_config(THEN)
    assert earlier(json.loads(config.to_json())) == EARLIER


@pytest.mark.parametrize(
    ("config", "style", "hidden", "output"),
    [
        (byol.get_config("folder"), None, 1024, 256),
        (byol.get_config("folder"), "byol", 1024, 256),
        (moco.get_config("v1"), "moco", 0, 128),
        (moco.get_config("imagenet"), "moco", 2048, 128),
        (moco.get_config("demo"), "moco", 128, 64),
        (simclr.get_config("imagenet"), "simclr", 2048, 128),
        (simclr.get_config("demo"), "simclr", 128, 64),
    ],
)
@pytest.mark.parametrize("head", ["projector", "predictor"])
def test_an_earlier_head_is_the_methods(config, style, hidden, output, head):
    old = {f"{head}.hidden_size": hidden, f"{head}.output_size": output}
    old |= {f"{head}.style": style} if style else {}
    expected = {k: v for k, v in flat(config).items() if k.startswith("projector.")}
    assert upgraded(old) == {k.replace("projector", head): v for k, v in expected.items()}


@pytest.mark.parametrize("module", [moco, simclr, simsiam])
def test_two_views_that_were_alike_are_one_now(module):
    now = flat(module.get_config("demo"))
    first = {k: v for k, v in now.items() if k.startswith("views.global.view_1.")}
    second = {k.replace("view_1", "view_2"): v for k, v in first.items()}
    before = now | second
    assert first and before.keys() - now.keys() == second.keys()
    assert differences(now, before, ()) == differences(before, now, ()) == {}
    assert identity.bound(before, ()) == identity.bound(now, ()) == now


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"watch": False, "watch_poll_seconds": 30.0, "watch_patience_hours": 24.0},
            {"follow": False, "follow_poll_seconds": 30.0, "follow_patience_hours": 24.0},
        ),
        ({"inverse_penalties": [0.1, 1.0]}, {"C": [0.1, 1.0]}),
        ({"inverse_penalty": 1.0}, {"C": 1.0}),
        ({"order": ["dtd"]}, {"only": ["dtd"]}),
        ({"found.step": 7, "found.run": "/a"}, {"data_info.step": 7, "data_info.run": "/a"}),
        ({"augment.mean": [0.5], "augment.std": [0.1]}, {"views.mean": [0.5], "views.std": [0.1]}),
        (
            {
                "flip_prob": 0.5,
                "data.crop_area": [0.2, 1.0],
                "data.crop_aspect": [1.0, 1.0],
                "data.image_size": 32,
            },
            {
                "views.global.view_1.flip_prob": 0.5,
                "views.global.area": [0.2, 1.0],
                "views.global.aspect": [1.0, 1.0],
                "views.global.size": 32,
                "views.global.count": 1,
                "data.image_size": 32,
            },
        ),
    ],
)
def test_an_earlier_jobs_fields_have_their_names_of_today(old, new):
    if "flip_prob" in old:  # what a job of today has, but for the flips
        today = flat(linear_probe.get_config("byol")).items()
        new = {k: v for k, v in today if k.startswith("views.global.view_1.")} | new
    assert upgraded(old) == new


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("[a-z]*.py")))
def test_what_this_version_writes_stays_as_it_is(path):
    module = importlib.import_module(f"configs.{path.stem}")
    if not hasattr(module, "get_config"):
        return
    config = json.loads(module.get_config().to_json())
    runs = config["variants"].values() if "variants" in config else [config]
    for run in runs:
        assert flat(run) == identity.flatten(run)
        assert identity.upgraded_tree(run) == run


def test_what_earlier_versions_called_haikus_initialisation_is_lecuns():
    """It was corrected for the truncation; what Haiku does has that name since."""
    earlier = {f"{head}.linear_init": "haiku" for head in ("projector", "predictor")}
    assert set(upgraded(earlier).values()) == {"lecun"}
    assert set(upgraded(dict.fromkeys(earlier, "torch")).values()) == {"torch"}
    today = earlier | {"whole_epochs": True}
    assert upgraded(today) == today


OF_THE_AUTHORS = {  # field -> (of `configs/byol.py:imagenette` today, of earlier versions)
    "encoder.kernel_init": ("haiku", "lecun"),
    "encoder.stage1_projection": (True, False),
    "encoder.zero_init_basic": (False, True),
    "online_probe.kernel_init": ("haiku", "lecun"),
    "predictor.linear_init": ("haiku", "lecun"),
    "projector.linear_init": ("haiku", "lecun"),
    "whole_epochs": (False, True),
}


def test_an_earlier_run_of_the_authors_recipe_has_the_earlier_mathematics():
    """It is not continued with another; with its own it is, and for as many steps as it began."""
    config = byol.get_config("imagenette")
    config.encoder.kernel_init = "lecun"
    before = flat(earlier(json.loads(config.to_json())))
    assert differences(flat(byol.get_config("imagenette")), before, NO_PROBE) == OF_THE_AUTHORS
    config.update_from_flattened_dict({k: was for k, (_, was) in OF_THE_AUTHORS.items()})
    assert differences(flat(config), before, NO_PROBE) == {}
    assert durations.total_and_warmup(config, 9469) == (36_000, 360)
    assert durations.total_and_warmup(byol.get_config("imagenette"), 9469) == (36_988, 369)


def test_an_earlier_run_on_deep_images_is_continued_only_with_their_higher_byte():
    """A run has a range in place of `auto` if it has such images; else nothing differs."""
    before = flat(EARLIER | {"data": EARLIER["data"] | {"name": "folder"}})
    assert before["data.intensity"] == "full" and before["data.exif_orientation"] is False
    now = before | {"data.exif_orientation": True}
    for intensity, differs in (("112,1873", True), ("auto", False), ("full", False)):
        found = differences(now | {"data.intensity": intensity}, before, ())
        expected = {"data.intensity": (intensity, "full")} if differs else {}
        assert found == expected | {"data.exif_orientation": (True, False)}
    assert differences(now | {"data.intensity": "auto"}, now | {"data.intensity": "per_image"}, ())


# --------------------------------------------------------------------------- what differs


def test_an_earlier_run_of_dino_had_the_shares_of_today():
    now = flat(dino.get_config("demo"))
    new = {"monitor.collapse_entropy": 0.995, "monitor.collapse_uniform_kl": 0.9}
    assert new.items() <= now.items()
    assert upgraded({name: value for name, value in now.items() if name not in new}) == now
    assert not differences(now | dict.fromkeys(new, 0.5), now, identity.SAME_STEPS)


@pytest.mark.parametrize("method", [dino, simclr])
def test_views_of_an_earlier_run_shared_their_statistics(method):
    now = flat(method.get_config("demo"))
    before = {name: value for name, value in now.items() if name != "views_share_norm"}
    assert now["views_share_norm"] is True and upgraded(before) == now
    assert differences(now | {"views_share_norm": False}, before, identity.SAME_STEPS)


def test_every_difference_is_named_with_both_values():
    now = DEMO | {"seed": 3, "tau_base": 0.5, "new": 1, "data_info.classes": 9}
    before = {k: v for k, v in DEMO.items() if k != "temperature"}
    found = differences(now, before, ("tau_*",))
    assert found == {
        "data_info.classes": (9, 10),
        "new": (1, None),
        "seed": (3, 0),
        "temperature": (0.3, None),
    }
    assert identity.described(found, "the run in DIR") == (
        "data_info.classes=9: the run in DIR has 10; config.new=1: the run in DIR has None; "
        "config.seed=3: the run in DIR has 0; config.temperature=0.3: the run in DIR has None"
    )
    assert identity.described({"seed": ("a", 0)}, "that one", "config.variants.low.") == (
        "config.variants.low.seed='a': that one has 0"
    )
    assert differences(DEMO, DEMO, ()) == {} and identity.described({}, "that one") == ""


def test_of_two_views_those_fields_are_named_that_differ():
    """Also where one of the configs has a single section for both views."""
    one = {"views.global.view_1.hue": 0.1, "views.global.view_1.blur_prob": 0.5}
    second = {name.replace("view_1", "view_2"): value for name, value in one.items()}
    other = one | second | {"views.global.view_2.hue": 0.2}
    assert differences(one, other, ()) == {"views.global.view_2.hue": (0.1, 0.2)}
    assert differences(other, one, ()) == {"views.global.view_2.hue": (0.2, 0.1)}
    assert differences(one | second, other, ()) == {"views.global.view_2.hue": (0.1, 0.2)}
    assert differences(one, other, ("views.*",)) == {}
    both = {name.replace("view_1", view): 0.3 for name in one for view in ("view_1", "view_2")}
    assert differences(both, one, ()) == {
        "views.global.view_1.blur_prob": (0.3, 0.5),
        "views.global.view_1.hue": (0.3, 0.1),
    }


PLACES = {"data.dir", "data.download", "data.max_undecodable"}
PLACES |= {"data.placement", "data.device_share", "data.processes", "data.reader", "steps_per_call"}
PLACES |= {"encoder.remat", "encoder.pool_first", "encoder.product_norm_stages"}
PLACES |= {"encoder.vit.attention_kernel"}
INTERVALS = {"log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "profile.first_step"}
INTERVALS |= {"profile.num_steps", "monitor.knn_every_steps", "monitor.plots_every_steps"}
INTERVALS |= {"wandb.project", "wandb.entity"}
KEEP = {"keep_every_steps"}
WHICH_RUN = {"seed", "data_info.train_images", "data_info.classes"}
EVAL = {name for name in DEMO if name.startswith("eval.")}
MONITOR = {name for name in DEMO if name.startswith("monitor.")}
OTHER_QUANTITIES = {"eval.knn_k", "eval.knn_temperature", "eval.network", "monitor.max_rows"}
OTHER_QUANTITIES |= {"monitor.knn_train_images", "monitor.knn_test_images"}
FREE = {
    "SAME_STEPS": PLACES | INTERVALS | EVAL | MONITOR | {"data.test_split"},
    "SAME_RESULTS": PLACES | INTERVALS | KEEP,
    "SAME_CURVES": (PLACES | INTERVALS | KEEP | WHICH_RUN | EVAL | MONITOR) - OTHER_QUANTITIES,
    "SAME_RECIPE": PLACES | INTERVALS | KEEP | WHICH_RUN | MONITOR,
}


@pytest.mark.parametrize("question", FREE)
def test_what_may_differ_between_runs(question):
    """Each field of a run by itself: these may, and no others."""
    free = getattr(identity, question)
    assert FREE[question] < DEMO.keys()
    for name, value in DEMO.items():
        found = differences(DEMO | {name: "another"}, DEMO, free)
        assert found == ({} if name in FREE[question] else {name: ("another", value)}), name
    for name in ("batch_size", "data.train_split", "views.global.area", "tau_base", "method"):
        assert name in DEMO and name not in FREE[question]


FOLLOWING = {"checkpoint", "follow", "follow_poll_seconds", "follow_patience_hours"}
OF_THE_JOB = {"log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "keep_every_steps"}
MEMORY = {"feature_batch_size", "bank_rows", "query_rows"}
OF_THE_RUN = {
    "encoder.depth": 18,
    "projector.output_size": 64,
    "method": "byol",
    "data_info.step": 4,
    "data_info.run": "/a",
}


@pytest.mark.parametrize(
    "config", [knn.get_config(), linear_probe.get_config("byol"), finetune.get_config()]
)
@pytest.mark.parametrize(
    ("question", "may"),
    [
        ("SAME_JOB", PLACES | OF_THE_JOB | FOLLOWING | MEMORY | {"data.allow_unseen_classes"}),
        ("SAME_MEASURE", PLACES | OF_THE_JOB | FOLLOWING | OF_THE_RUN.keys() | {"seed"}),
    ],
)
def test_what_may_differ_between_jobs(config, question, may):
    job = flat(config) | OF_THE_RUN
    for name, value in job.items():
        found = differences(job | {name: "another"}, job, getattr(identity, question))
        assert found == ({} if name in may else {name: ("another", value)}), name
    for name in ("job", "data.name", "data.test_split", "data.max_train_images"):
        assert name in job and name not in may


def test_a_transfers_sets_are_bound():
    job = flat(transfer.get_config())
    for name in ("only", "penalties", "sets.dtd.test_split"):
        changed = differences(job | {name: "another"}, job, identity.SAME_JOB)
        assert changed == {name: ("another", job[name])}


# ------------------------------------------------------------------------- runs that go on

LENGTHS = {"steps", "examples", "epochs", "whole_epochs"}
COSINE = {"optimizer.schedule": "cosine", "tau_schedule": "cosine"}
CONSTANT = dict.fromkeys(COSINE, "constant")


def may_change(now: identity.Flat, before: identity.Flat) -> set[str]:
    free = identity.steps_free(now, before)
    return {name for name in now if not differences(now | {name: "another"}, now, free)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "before", "free"),
    [
        (COSINE, COSINE, False),
        (CONSTANT, CONSTANT, True),
        (CONSTANT, COSINE, False),
        (COSINE, CONSTANT, False),
        (CONSTANT | {"tau_schedule": "cosine"}, CONSTANT | {"tau_schedule": "cosine"}, False),
        (COSINE | {"tau_schedule": "constant"}, COSINE | {"tau_schedule": "constant"}, False),
        (CONSTANT | {"optimizer.schedule": "step"}, CONSTANT, False),
    ],
)
def test_the_length_is_free_where_no_schedule_depends_on_it(now, before, free):
    found = may_change(DEMO | now, DEMO | before)
    assert found - LENGTHS == FREE["SAME_STEPS"] | KEEP
    assert found & LENGTHS == (LENGTHS if free else set())


def test_a_method_without_an_average_has_one_schedule():
    for schedule, free in (("constant", LENGTHS), ("cosine", set())):
        config = flat(simclr.get_config("demo")) | {"optimizer.schedule": schedule}
        assert "tau_schedule" not in config
        assert may_change(config, config) & LENGTHS == free


def test_a_decay_that_changes_depends_on_the_length():
    config = flat(simclr.get_config("demo")) | {"optimizer.schedule": "constant"}
    assert may_change(config, config) & LENGTHS == LENGTHS
    config["optimizer.weight_decay_end"] = 0.4
    assert not may_change(config, config) & LENGTHS


@pytest.mark.parametrize(("before", "free"), [(0, KEEP), (None, KEEP), (2, set()), (7, set())])
def test_what_is_kept_for_good_is_not_given_up(before, free):
    """Another multiple would delete it; where nothing is kept, one may begin to."""
    was = DEMO | {"keep_every_steps": before}
    assert may_change(DEMO | {"keep_every_steps": 5}, was) & KEEP == free
    found = differences(DEMO | {"keep_every_steps": 5}, was, identity.steps_free(DEMO, was))
    assert found == ({} if free else {"keep_every_steps": (5, before)})


# ------------------------------------------------------------- a checkpoint of that version


@pytest.fixture(scope="module", autouse=True)
def small_encoder():
    with tiny_jobs.small_encoder():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_jobs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return tiny_jobs.make_run(data, tmp_path_factory.mktemp("pretrained") / "run")


def age(workdir: pathlib.Path) -> None:
    """Makes a run's files those of the earlier version."""
    for path in workdir.glob("checkpoints/*/meta/metadata"):
        meta = read(path)
        del meta["checksums"]
        meta |= {"config": earlier(meta["config"]), "found": meta.pop("data_info")}
        path.write_text(json.dumps(meta))
        assert "views" not in path.read_text() and "data_info" not in path.read_text()
    if (workdir / "config.json").exists():
        config = read(workdir / "config.json")
        config["found"] = config.pop("data_info")
        (workdir / "config.json").write_text(json.dumps(earlier(config)))


@pytest.mark.slow
def test_an_earlier_run_goes_on(run, data, tmp_path, capfd):
    workdir = tiny_jobs.copy_run(run, tmp_path / "run", steps=2)
    age(workdir)
    with pytest.raises(UserError, match=r"^config\.data\.exif_orientation=True: .* has False; use"):
        tiny_jobs.make_run(data, workdir)  # photographs would be turned from here on
    tiny_jobs.make_run(data, workdir, data__exif_orientation=False)
    assert "resuming from step 2" in capfd.readouterr().err
    for step in (2, tiny_jobs.STEPS):
        here, there = (encoder.load(str(folder), step).variables for folder in (workdir, run))
        assert_same(here, there)
    meta = [read(workdir / f"checkpoints/{step}/meta/metadata") for step in (2, 3)]
    assert "found" in meta[0] and meta[0]["found"] == meta[1]["data_info"]
    config = read(run / "config.json")
    config["data"]["exif_orientation"] = False
    assert read(workdir / "config.json") == config


@pytest.mark.slow
def test_an_earlier_run_goes_on_as_itself_only(run, data, tmp_path):
    workdir = tiny_jobs.copy_run(run, tmp_path / "run", steps=2)
    age(workdir)
    changed = r"^config\.views\.global\.view_2\.solarize_prob=0\.75: the run in .* has 0\.2;"
    other = {"views__global__view_2__solarize_prob": 0.75, "data__exif_orientation": False}
    with pytest.raises(UserError, match=changed):
        tiny_jobs.make_run(data, workdir, **other)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["knn", "linear_probe:byol"])
def test_an_earlier_run_is_evaluated(run, tmp_path, job):
    """With its own normalisation, crops and flips: the numbers are those of the run of today."""
    aged = pathlib.Path(shutil.copytree(run, tmp_path / "aged"))
    age(aged)
    config = encoder.load(str(run)).config
    del config["eval"]["linear"], config["steps_per_call"]
    for name in ("placement", "device_share", "processes", "reader"):
        del config["data"][name]
    config["data"] |= {"intensity": "full", "exif_orientation": False}
    assert encoder.load(str(aged)).config == config
    results = [tiny_jobs.run_job(job, r, tmp_path / "jobs" / r.name) for r in (run, aged)]
    of_the_place = {"checkpoint", "run", "images_per_second"}
    now, before = ({k: v for k, v in r.items() if k not in of_the_place} for r in results)
    assert now == before and now
    logits = [tiny_jobs.confusion(tmp_path / "jobs" / r.name) for r in (run, aged)]
    np.testing.assert_array_equal(*logits)
