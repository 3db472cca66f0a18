"""The presets against the papers' recipes, and every mistake a user can make in a config."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest
import tiny_runs
from conftest import LIGHTLY
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from byol_jax.method import build
from configs import byol, byol_to_simclr, fewshot, finetune, linear_probe, moco, simclr, transfer
from selfsup_jax import config as config_lib
from selfsup_jax.durations import Intervals, described, intervals, to_steps, total_and_warmup
from selfsup_jax.errors import UserError, nearest
from selfsup_jax.run import checkpoint_files, identity, workdir
from selfsup_jax.training import loop, pretrain

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PRESETS = ("imagenet", "cifar10", "imagenette", "demo", "folder")


def get(config: ConfigDict, field: str):
    for key in field.split("."):
        config = config[key]
    return tuple(config) if isinstance(config, list) else config


def config_with(**fields) -> ConfigDict:
    """The paper's recipe with `optimizer__name="sgd"` and the like."""
    config = byol.get_config("imagenet")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


def assert_fields(config: ConfigDict, expected: dict) -> None:
    assert {field: get(config, field) for field in expected} == expected


# ----------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    config = byol.get_config(preset)
    config_lib.validate(config, build)
    assert config.method == "byol"
    assert config.bn_groups == 1  # one global group
    assert json.loads(config.to_json())  # can be written to the workdir


@pytest.mark.parametrize(
    ("epochs", "learning_rate", "weight_decay", "tau_base"),
    [
        (40, 0.45, 1e-6, 0.97),
        (100, 0.45, 1e-6, 0.99),
        (300, 0.3, 1e-6, 0.99),
        (1000, 0.2, 1.5e-6, 0.996),
        (200, 0.45, 1e-6, 0.99),  # the next shorter one's
        (2000, 0.2, 1.5e-6, 0.996),
        (5, 0.45, 1e-6, 0.97),
    ],
)
def test_a_length_brings_its_rate_decay_and_tau(epochs, learning_rate, weight_decay, tau_base):
    config = byol.get_config(f"imagenet,epochs={epochs}")
    expected = {
        "epochs": epochs,
        "optimizer.learning_rate": learning_rate,
        "optimizer.weight_decay": weight_decay,
        "tau_base": tau_base,
    }
    assert_fields(config, expected)
    assert_fields(byol.get_config(f"epochs={epochs}"), expected)  # `imagenet` is the default


def test_imagenet_is_the_papers_recipe():
    expected = {
        "epochs": 1000,
        "batch_size": 4096,
        "bn_groups": 1,
        "data.name": "imagenet2012",
        "data.image_size": 224,
        "data.test_resize": 256,
        "data.resize_method": "bicubic",
        "views.global.area": (0.08, 1.0),
        "views.global.aspect": (3 / 4, 4 / 3),
        "encoder.depth": 50,
        "encoder.width": 1.0,
        "encoder.stem": "imagenet",
        "encoder.padding": "same",
        "encoder.zero_init_gamma": True,
        "encoder.zero_init_basic": False,
        "encoder.stage1_projection": True,
        "encoder.kernel_init": "haiku",
        "projector.linear_init": "haiku",
        "predictor.linear_init": "haiku",
        "online_probe.kernel_init": "haiku",
        "online_probe.every_view": False,
        "online_probe.lars_ratio": True,
        "whole_epochs": False,
        "encoder.bn_decay": 0.9,
        "encoder.bn_epsilon": 1e-5,
        "projector.hidden_sizes": (4096,),
        "projector.output_size": 256,
        "predictor.hidden_sizes": (4096,),
        "predictor.output_size": 256,
        "optimizer.name": "lars",
        "optimizer.scaling": "linear",
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 10,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.rate_inside_momentum": False,
        "optimizer.trust_coefficient": 1e-3,
        "views.mean": (0.485, 0.456, 0.406),
        "views.std": (0.229, 0.224, 0.225),
    }
    both_views = {
        "flip_prob": 0.5,
        "jitter_prob": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "jitter_style": "tensorflow",
        "grayscale_prob": 0.2,
        "blur_kernel": 23,
        "blur_sigma_min": 0.1,
        "blur_sigma_max": 2.0,
        "solarize_threshold": 0.5,
    }
    config = byol.get_config("imagenet")
    assert_fields(config, expected)
    group = config.views["global"]
    assert group.count == 2 and group.size == 224
    assert_fields(group.view_1, both_views | {"blur_prob": 1.0, "solarize_prob": 0.0})
    assert_fields(group.view_2, both_views | {"blur_prob": 0.1, "solarize_prob": 0.2})


def test_cifar10_is_lightlys_recipe():
    """Its loss is the mean of two negative cosines, a quarter of ours."""
    config = byol.get_config("cifar10")
    expected = {
        "data.name": "cifar10",
        "data.image_size": 32,
        **LIGHTLY,
        "tau_base": 0.99,
        "tau_schedule": "constant",
        "projector.output_bias": True,
        "predictor.linear_init": "torch",
        "views.global.view_1.saturation": 0.2,
        "views.global.view_1.solarize_prob": 0.0,
        "views.global.view_2.solarize_prob": 0.2,
        "encoder.depth": 18,
        "encoder.stem": "cifar",
        "projector.hidden_sizes": (1024,),
        "projector.output_size": 256,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 4 * 5e-4,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 0,
        "views.global.view_1.blur_prob": 0,
        "views.global.view_2.blur_prob": 0,
    }
    assert_fields(config, expected)
    rate = config.optimizer.learning_rate * config.batch_size / 256  # linear scaling
    assert config.optimizer.scaling == "linear" and rate == pytest.approx(0.06 / 4)


def test_imagenette_is_the_authors_recipe():
    expected = {
        "data.image_size": 128,
        "encoder.depth": 18,
        "encoder.stage1_projection": True,  # the authors' ResNet-18
        "encoder.zero_init_basic": False,
        "encoder.kernel_init": "haiku",
        "batch_size": 256,
        "epochs": 1000,
        "whole_epochs": False,
        "optimizer.learning_rate": 2.0,
        "optimizer.weight_decay": 1e-6,
    }
    config = byol.get_config("imagenette")
    assert_fields(config, expected)
    assert config.data.name.startswith("imagenette/160px")


# ----------------------------------------------------------------------------- parsing


def test_fields_after_the_preset_are_set():
    config = byol.get_config(
        "cifar10, batch_size=64,data.name=mnist,views.global.view_2.blur_prob=1,epochs=3,steps=7"
    )
    expected = {
        "batch_size": 64,
        "data.name": "mnist",
        "views.global.view_2.blur_prob": 1.0,
        "epochs": 3.0,
        "steps": 7,
    }
    unchanged = flatten_dict(byol.get_config("cifar10").to_dict(), sep=".")
    assert_fields(config, expected)
    changed = {
        field
        for field, value in flatten_dict(config.to_dict(), sep=".").items()
        if value != unchanged[field]
    }
    assert changed == set(expected)


@pytest.mark.parametrize(
    ("arg", "named", "nearest"),
    [
        ("imagnet", "'imagnet'", "imagenet"),
        ("cifar", "'cifar'", "cifar10"),
        ("zzz", "'zzz'", "demo"),  # like none of them: all are named
        ("demo,bach_size=3", "config.bach_size", "batch_size"),
        ("demo,learning_rate=3", "config.learning_rate", "optimizer.learning_rate"),
        ("demo,optimiser.momentum=0.5", "config.optimiser.momentum", "optimizer.momentum"),
        ("demo,batch_size=many", "config.batch_size='many'", "int"),
        ("epochs=many", "config.epochs='many'", "number"),
        ("demo,batch_size", "'batch_size'", "field=value"),
    ],
)
def test_a_misspelt_preset_or_field_names_the_nearest(arg, named, nearest):
    with pytest.raises(ValueError) as error:
        byol.get_config(arg)
    assert named in str(error.value)
    assert nearest in str(error.value).replace(named, "")


def test_the_nearest_of_few_choices_are_all_of_them_of_many_three():
    few = [f"choice_{i}" for i in range(20)]
    assert nearest("choice_7", few, count=1) == "choice_7"
    assert nearest("zz", few).split(", ") == sorted(few)
    many = [*few, "zebra"]
    assert nearest("zz", many).split(", ")[0] == "zebra"
    assert len(nearest("zz", many).split(", ")) == 3


@pytest.mark.parametrize(
    ("arg", "old", "new"),
    [
        (
            "demo,augment.view_1.blur_prob=0",
            "augment.view_1.blur_prob",
            "views.global.view_1.blur",
        ),
        (
            "demo,augment.view_2.hue=0",
            "augment.view_2.hue",
            "views.global.view_2.hue (view_1 where ",
        ),
        ("demo,augment.mean=(0,0,0)", "augment.mean", "views.mean"),
        ("demo,augment.std=(1,1,1)", "augment.std", "views.std"),
        ("demo,data.crop_area=(1,1)", "data.crop_area", "views.global.area"),
        ("demo,data.crop_aspect=(1,1)", "data.crop_aspect", "views.global.aspect"),
        ("demo,projector.hidden_size=64", "projector.hidden_size", "projector.hidden_sizes"),
        ("demo,predictor.hidden_size=64", "predictor.hidden_size", "predictor.hidden_sizes"),
        ("demo,projector.style=moco", "projector.style", "projector.linear_init"),
    ],
)
def test_a_field_of_an_earlier_version_is_answered_with_its_name_of_today(arg, old, new):
    with pytest.raises(ValueError) as error:
        byol.get_config(arg)
    assert str(error.value).startswith(f"unknown field config.{old}: it is now {new}")


@pytest.mark.parametrize(
    ("module", "arg", "told"),
    [
        (finetune, "hundredth", "preset 'hundredth': it is now 1pct"),
        (finetune, "tenth", "preset 'tenth': it is now 10pct"),
        (finetune, "all", "preset 'all': it is now 100pct"),
        (finetune, "flip_prob=0", "flip_prob: it is now views.global.view_1.flip_prob"),
        (finetune, "data.crop_area=(1,1)", "data.crop_area: it is now views.global.area"),
        (byol, "demo,checkpoint=RUN", "pretraining starts from weights by config.init_from"),
        (linear_probe, "watch=True", "watch: it is now follow"),
        (linear_probe, "watch_poll_seconds=1", "it is now follow_poll_seconds"),
        (linear_probe, "watch_patience_hours=1", "it is now follow_patience_hours"),
        (linear_probe, "inverse_penalties=(1,)", "inverse_penalties: it is now C"),
        (fewshot, "inverse_penalty=1", "inverse_penalty: it is now C"),
        (transfer, "order=('a',)", "order: it is now only"),
        (byol_to_simclr, "demo,order=('a',)", "order: it is now only"),
        (byol_to_simclr, "demo,show=('a',)", "show: it is now columns"),
        (byol_to_simclr, "demo,measures=('a',)", "measures: it is now metrics"),
    ],
)
def test_so_are_those_of_jobs_and_sweeps_and_presets(module, arg, told):
    with pytest.raises(ValueError) as error:
        module.get_config(arg)
    assert str(error.value).endswith(told)


# -------------------------------------------------------------------------- validation

BAD_VALUES = [
    ("compute_dtype", "float16", "bfloat16"),
    ("encoder.depth", 51, "50"),
    ("encoder.stem", "imagnet", "imagenet"),
    ("encoder.padding", "valid", "same"),
    ("encoder.kernel_init", "he", "lecun"),
    ("online_probe.kernel_init", "norml", "normal"),
    ("optimizer.name", "adam", "sgd"),
    ("optimizer.scaling", "square", "sqrt"),
    ("optimizer.schedule", "cosin", "cosine"),
    ("tau_schedule", "cosin", "cosine"),
    ("tau_schedule", "linear", "constant"),
    ("data.resize_method", "nearest", "bicubic"),
    ("batch_size", 0, "at least 1"),
    ("accumulate_steps", 0, "at least 1"),
    ("bn_groups", 0, "at least 1"),
    ("log_every_steps", 0, "at least 1"),
    ("checkpoint_every_steps", 0, "at least 1"),
    ("keep_checkpoints", 0, "at least 1"),
    ("data.image_size", 0, "at least 1"),
    ("data.processes", -1, "must not be negative"),
    ("data.reader", "grian", "one of builtin, grain"),
    ("projector.output_size", 0, "at least 1"),
    ("predictor.hidden_sizes", (), "at least one"),
    ("predictor.output_size", -1, "at least 1"),
    ("predictor.output_size", 64, "must be 256: that of the projector"),
    ("eval.batch_size", 0, "at least 1"),
    ("eval.knn_k", 0, "at least 1"),
    ("eval.fewshot_draws", 0, "at least 1"),
    ("monitor.max_rows", 0, "at least 1"),
    ("monitor.knn_train_images", 0, "at least 1"),
    ("monitor.knn_test_images", 0, "at least 1"),
    ("monitor.map_images", 0, "at least 1"),
    ("monitor.view_pairs", 0, "at least 1"),
    ("profile.num_steps", 0, "at least 1"),
    ("encoder.width", 0.0, "above 0"),
    ("encoder.bn_epsilon", 0.0, "above 0"),
    ("eval.knn_temperature", -0.1, "above 0"),
    ("temperature", 0.0, "above 0"),
    ("seed", -1, "negative"),
    ("projector.hidden_sizes", (-1,), "at least 1"),
    ("negatives_weight", -1.0, "negative"),
    ("optimizer.learning_rate", -0.1, "negative"),
    ("optimizer.learning_rate", float("nan"), "negative"),
    ("optimizer.weight_decay", -1e-6, "negative"),
    ("data.cache_gib", -1.0, "negative"),
    ("keep_every_steps", -1, "negative"),
    ("monitor.diagnostics_every_steps", -2, "negative, or -1"),
    ("monitor.knn_every_steps", -2, "negative, or -1"),
    ("monitor.plots_every_steps", -2, "negative, or -1"),
    ("monitor.collapse_std", -0.1, "negative"),
    ("monitor.collapse_rank", float("nan"), "negative"),
    ("profile.first_step", -1, "negative"),
    ("tau_base", 1.5, "0 to 1"),
    ("tau_base", float("nan"), "finite"),
    ("optimizer.momentum", -0.9, "0 to 1"),
    ("encoder.bn_decay", 9.0, "0 to 1"),
    ("data.max_undecodable", 1.1, "0 to 1"),
    ("data.device_share", 1.1, "0 to 1"),
    ("data.device_share", -0.1, "0 to 1"),
    ("data.device_share", float("nan"), "0 to 1"),
    ("data.placement", "gpu", "auto, device, host"),
    ("data.placement", "devise", "did you mean device"),
    ("steps_per_call", -1, "negative"),
    ("views.global.area", (0.0, 1.0), "low"),
    ("views.global.area", (0.5, 0.1), "low"),
    ("views.global.area", (0.5, 1.1), "1.0"),
    ("views.global.aspect", (1.5, 0.5), "low"),
    ("views.global.aspect", (1.0,), "low"),
    ("data.test_resize", 200, "data.image_size=224"),
    ("views.mean", (0.5,), "three"),
    ("views.std", (0.1, 0.0, 0.1), "above 0"),
    ("views.global.view_1.jitter_style", "torch", "torchvision"),
    ("views.global.view_2.blur_padding", "same", "reflect"),
    ("views.global.view_1.flip_prob", 1.5, "0 to 1"),
    ("views.global.view_2.solarize_prob", -0.1, "0 to 1"),
    ("views.global.view_1.contrast", -0.4, "negative"),
    ("views.global.view_1.hue", 0.6, "0.5"),
    ("views.global.view_2.blur_kernel", 4, "odd"),
    ("views.global.view_1.blur_kernel", -1, "odd"),
    ("views.global.view_1.blur_sigma_min", 3.0, "sigma_max"),
    ("views.global.view_1.blur_sigma_min", 0.0, "above 0"),
    ("bn_groups", 3, "batch_size=4096"),
]


@pytest.mark.parametrize(("field", "value", "hint"), BAD_VALUES)
def test_a_bad_value_is_named_with_what_would_be_valid(field, value, hint):
    config = config_with(**{field: value})
    with pytest.raises(UserError) as error:
        config_lib.validate(config, build)
    message = str(error.value)
    start = f"config.{field}={value!r}: "
    assert message.startswith(start)
    assert hint in message.removeprefix(start) and "\n" not in message


def test_the_bounds_themselves_are_valid():
    config = config_with(
        seed=0, tau_base=1.0, optimizer__momentum=0.0, optimizer__learning_rate=0.0,
        views__global__area=(1.0, 1.0), data__test_resize=224, views__global__view_1__hue=0.5,
        views__global__view_1__blur_kernel=1, views__global__view_1__blur_sigma_min=2.0, steps=1,
        tau_schedule="constant", keep_every_steps=0, monitor__diagnostics_every_steps=0,
        monitor__knn_every_steps=0, monitor__plots_every_steps=0, monitor__collapse_std=0.0,
        projector__hidden_sizes=(), negatives_weight=0.0,
    )  # fmt: skip
    config_lib.validate(config, build)
    assert total_and_warmup(config, config.batch_size) == (1, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch_size": 100, "accumulate_steps": 3}, "config.batch_size=100"),
        ({"batch_size": 96, "accumulate_steps": 2, "bn_groups": 3}, "config.bn_groups=3"),
    ],
)
def test_a_batch_that_does_not_divide_is_named(fields, named):
    with pytest.raises(UserError) as error:
        config_lib.validate(config_with(**fields), build)
    assert str(error.value).startswith(named)


def test_a_batch_larger_than_the_data_is_named():
    with pytest.raises(UserError) as error:
        total_and_warmup(config_with(data__train_split="train[:1%]"), 100)
    message = str(error.value)
    assert message.startswith("config.batch_size=4096")
    assert "100 images" in message and "'train[:1%]'" in message


# --------------------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"steps": 7, "examples": 800, "epochs": 3.0}, 7),  # the first that is given counts
        ({"examples": 800, "epochs": 3.0}, 100),
        ({"epochs": 3.0}, 36),  # of 12 whole batches each
        ({"epochs": 0.5}, 6),
        ({"steps": 0, "epochs": 3.0}, 0),  # 0 is given, too
        # The authors': of the images of the whole run, the last batch is left out.
        ({"epochs": 3.0, "whole_epochs": False}, 37),
        ({"epochs": 0.5, "whole_epochs": False}, 6),
        ({"epochs": 4.0, "whole_epochs": False}, 50),
        ({"examples": 799, "epochs": 3.0, "whole_epochs": False}, 100),
    ],
)
@pytest.mark.parametrize("prefix", ["", "warmup_"])
def test_durations_come_to_steps(fields, steps, prefix):
    whole_epochs = fields.get("whole_epochs", True)
    given = {"steps": None, "examples": None, "epochs": None} | fields
    section = {prefix + unit: value for unit, value in given.items()}
    assert to_steps(section, 100, 8, prefix, whole_epochs=whole_epochs) == steps


@pytest.mark.parametrize(
    ("config", "images", "total", "warmup", "epochs"),
    [
        # epochs x images // batch, and the warm-up's 10 epochs, as the authors' code has them.
        (byol.get_config("imagenet"), 1_281_167, 312_784, 3_127, "1,000"),
        (byol.get_config("imagenet,epochs=40"), 1_281_167, 12_511, 3_127, "40"),
        (simclr.get_config("cifar10_lars"), 50_000, 97_656, 976, "1,000"),
        (finetune.get_config("1pct"), 12_811, 750, 0, "59.95"),
        # epochs x (images // batch), as PyTorch's.
        (moco.get_config("imagenet"), 1_281_167, 200 * 5_004, 0, "200"),
        (byol.get_config("cifar10"), 50_000, 200 * 390, 0, "200"),
        (linear_probe.get_config("moco"), 1_281_167, 100 * 5_004, 0, "100"),
    ],
)
def test_lengths_are_the_authors(config, images, total, warmup, epochs):
    assert total_and_warmup(config, images) == (total, warmup)
    assert described(config, images, total).endswith(f" images ({epochs} epochs)")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"epochs": -1.0}, "config.optimizer.warmup_epochs=-1.0"),
        ({"steps": -5, "epochs": 1.0}, "config.optimizer.warmup_steps=-5"),
        ({}, "config.optimizer.warmup_epochs=None"),
    ],
)
def test_a_bad_duration_is_named(fields, named):
    given = {"steps": None, "examples": None, "epochs": None} | fields
    section = {"warmup_" + unit: value for unit, value in given.items()}
    with pytest.raises(UserError) as error:
        to_steps(section, 100, 8, prefix="warmup_", path="optimizer.")
    assert str(error.value).startswith(named)


@pytest.mark.parametrize("fields", [{"steps": 0}, {"examples": 7}, {"epochs": 0.001}])
def test_a_run_without_a_step_is_refused(fields):
    with pytest.raises(UserError, match=r"config.epochs.*rounds to 0 steps"):
        total_and_warmup(config_with(batch_size=16, **fields), 100)


def test_intervals_fit_the_run_where_the_config_says_so():
    """The preset for your own images does; given ones stay, and those of the other presets."""
    config = byol.get_config("folder")
    assert intervals(config, 1) == Intervals(1, 1, 1, 1, 1, 1)
    assert intervals(config, 300) == Intervals(6, 6, 30, 30, 6, 6)
    assert intervals(config, 100_000) == Intervals(50, 500, 5000, 5000, 2000, 2000)
    config.monitor.knn_every_steps, config.monitor.plots_every_steps = 0, 7
    assert intervals(config, 300) == Intervals(6, 6, 0, 7, 6 * 0, 0)
    assert intervals(byol.get_config("demo"), 300) == Intervals(62, 62, 620, 1240, 0, 0)
    every = intervals(byol.get_config("folder"), 300)
    due = [step for step in range(1, 301) if loop.schedule(config, every, step, step == 300).draw]
    assert due == [6, *range(30, 301, 30)]


def test_a_warm_up_as_long_as_the_run_is_scaled_or_refused():
    """A preset's, in epochs, is scaled, and told; one that is given in steps or images is meant."""
    config = byol.get_config("folder,steps=30")  # 10 epochs of warm-up
    assert total_and_warmup(config, 640) == (30, 3)
    told = "30 steps of 64 images (3 epochs"
    scaled = "; the warm-up of 100 steps does not fit: scaled to 3)"
    assert described(config, 640, 30) == told + scaled
    config.optimizer.warmup_epochs = 2.9
    assert total_and_warmup(config, 640) == (30, 29)
    for field, value in (("warmup_steps", 31), ("warmup_examples", 31 * 64)):
        with config.ignore_type():
            config.optimizer.update(warmup_steps=None, warmup_examples=None)
            config.optimizer[field] = value
        with pytest.raises(UserError, match=rf"^config.optimizer.{field}={value}: .* run's 30$"):
            total_and_warmup(config, 640)
    for steps in (29, 30):
        config.optimizer.warmup_examples = steps * 64
        assert total_and_warmup(config, 640) == (30, steps)
        assert described(config, 640, 30) == told + ")"


def test_a_run_too_long_to_count_is_refused():
    with pytest.raises(UserError, match=r"^config\.epochs=100000000000.0: .*2\^31 - 1 steps"):
        total_and_warmup(config_with(epochs=1e11), 10_000)


# --------------------------------------------------------------------- whose the workdir is


def run_of(config: ConfigDict, train_images: int = 10_000, classes: int | None = 10) -> dict:
    """What `workdir.describe_run` makes of a config and such data."""
    source = types.SimpleNamespace(num_examples=train_images, num_classes=classes)
    return workdir.describe_run(config, source)


def saved_by(config: ConfigDict, **data) -> dict:
    """What a checkpoint of that run says of itself, read back from the disk."""
    meta = workdir.meta(run_of(config, **data), step=3) | {"versions": checkpoint_files.versions()}
    return json.loads(json.dumps(meta))


def check(config: ConfigDict, saved: dict, **data) -> None:
    workdir.check_same_run(run_of(config, **data), saved, "DIR")


def test_the_resolved_config_is_written_and_taken_again(tmp_path):
    config = config_with(batch_size=64)
    workdir.write_config(run_of(config), str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    data_info = {"train_images": 10_000, "classes": 10}
    assert written == json.loads(config.to_json()) | {"data_info": data_info}
    assert written["views"]["global"]["area"] == [0.08, 1.0]
    assert os.listdir(tmp_path) == ["config.json"]
    check(config_with(batch_size=64), saved_by(config))  # tuples and all
    flat = identity.flat(workdir.config_json(run_of(config)))
    assert flat["data_info.classes"] == 10 and flat["optimizer.name"] == "lars"
    workdir.write_config(run_of(config_with(batch_size=32)), str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 32


def test_a_workdir_that_takes_no_file_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"--workdir={tmp_path}/no: .*No such file"):
        workdir.write_config(run_of(config_with()), str(tmp_path / "no"))
    (tmp_path / "file").write_text("")
    for name, reason in (("file", "File exists"), ("file/below", "Not a directory")):
        with (
            pytest.raises(UserError, match=f"--workdir={tmp_path}/{name}: .*{reason}"),
            workdir.opened(config_with(), f"{tmp_path}/{name}"),
        ):
            raise AssertionError
    with (
        pytest.raises(UserError, match="--workdir=s3://bucket/run: must be a path, or gs://"),
        workdir.opened(config_with(), "s3://bucket/run"),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    ("step", "epoch", "batch"), [(0, 0, 0), (38, 0, 38), (39, 1, 0), (85, 2, 7)]
)
def test_a_checkpoint_says_where_in_the_data_it_is(step, epoch, batch):
    run = run_of(config_with(batch_size=256))  # 39 whole batches of 10,000 images
    meta = workdir.meta(run, step)
    assert meta["data_position"] == {"epoch": epoch, "batch": batch, "steps_per_epoch": 39}
    assert meta["config"] == run["config"] and meta["data_info"] == run["data_info"]
    assert [v for k, v in meta.items() if "device" in k] == [jax.device_count()]
    assert [v for k, v in meta.items() if "host" in k] == [1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("batch_size", 64),
        ("epochs", 41.0),
        ("whole_epochs", True),
        ("steps", 100),
        ("examples", 10**6),
        ("tau_base", 0.5),
        ("tau_schedule", "constant"),
        ("use_predictor", False),
        ("compute_dtype", "float32"),
        ("encoder.depth", 18),
        ("optimizer.learning_rate", 0.31),
        ("optimizer.schedule", "constant"),
        ("data.train_split", "train[:50%]"),
        ("views.global.area", (0.5, 1.0)),
        ("views.global.view_2.blur_prob", 0.25),
    ],
)
def test_a_run_goes_on_with_its_own_mathematics_only(field, value):
    with pytest.raises(UserError) as error:
        check(config_with(**{field: value}), saved_by(config_with()))
    as_json = json.loads(json.dumps([value, get(config_with(), field)]))
    new, old = map(repr, as_json)
    assert str(error.value).startswith(f"config.{field}={new}: ")
    assert old in str(error.value).removeprefix(f"config.{field}={new}: ")
    assert "DIR" in str(error.value) and "\n" not in str(error.value)


def test_all_that_differs_is_named_at_once():
    changed = config_with(seed=1, tau_base=0.5, eval__knn_k=3, optimizer__momentum=0.8)
    with pytest.raises(UserError) as error:
        check(changed, saved_by(config_with()), train_images=9_999)
    for field, new, old in (
        ("config.seed", 1, 0),
        ("config.tau_base", 0.5, 0.996),
        ("config.optimizer.momentum", 0.8, 0.9),
        ("data_info.train_images", 9_999, 10_000),
    ):
        assert f"{field}={new}: the run in DIR has {old}" in str(error.value)
    assert "knn_k" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log_every_steps", 1),
        ("checkpoint_every_steps", 3),
        ("keep_checkpoints", 9),
        ("keep_every_steps", 5),
        ("eval.knn_k", 5),
        ("monitor.plots_every_steps", 0),
        ("monitor.reference", "another"),
        ("profile.first_step", 7),
        ("data.dir", "/elsewhere"),
        ("data.download", True),
        ("data.test_split", "test"),
        ("data.max_undecodable", 0.5),
        ("data.placement", "host"),
        ("data.device_share", 0.5),
        ("steps_per_call", 7),
    ],
)
def test_what_does_not_touch_the_mathematics_may_change(field, value):
    assert get(config_with(), field) != value
    check(config_with(**{field: value}), saved_by(config_with()))


CONSTANT = {"optimizer__schedule": "constant", "tau_schedule": "constant"}


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 100), ("examples", 10**6), ("epochs", 41.0)]
)
def test_a_run_may_become_longer_where_no_schedule_depends_on_it(field, value):
    check(config_with(**CONSTANT, **{field: value}), saved_by(config_with(**CONSTANT)))
    for cosine in CONSTANT:  # one that does is enough
        fields = CONSTANT | {cosine: "cosine"}
        with pytest.raises(UserError, match=f"config.{field}={value}: .*schedules depend on its"):
            check(config_with(**fields, **{field: value}), saved_by(config_with(**fields)))
    # Nor may the length change together with the schedule.
    with pytest.raises(
        UserError, match=f"config.{field}={value}: .*config.tau_schedule='constant'"
    ):
        check(
            config_with(**CONSTANT, **{field: value}),
            saved_by(config_with(optimizer__schedule="constant")),
        )


def test_other_data_under_the_same_name_is_noticed():
    with pytest.raises(UserError, match=r"data_info.train_images=9999: .*10000"):
        check(config_with(), saved_by(config_with()), train_images=9_999)
    with pytest.raises(UserError, match=r"data_info.classes=None: .*10"):
        check(config_with(), saved_by(config_with()), classes=None)


def test_other_versions_are_told_and_accepted(capfd):
    saved = saved_by(config_with())
    check(config_with(), saved)
    assert not capfd.readouterr().err
    saved["versions"]["jax"] = "0.1.2"
    check(config_with(), saved)
    assert f"jax 0.1.2 -> {jax.__version__}" in capfd.readouterr().err


HOLD = """
import sys
from configs import byol, byol_to_simclr, fewshot, finetune, linear_probe, transfer
from selfsup_jax.run import workdir
with workdir.opened(byol.get_config("demo"), sys.argv[1]):
    print("opened", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_workdir_is_one_processs(tmp_path):
    """Another is told whose it is, and takes it once that one has ended, however it ended."""
    config = byol.get_config("demo")
    for end in ("regular", "killed"):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout.readline() == "opened\n"
            with (
                pytest.raises(
                    UserError, match=f"{tmp_path}: process {holder.pid} is running there"
                ),
                workdir.opened(config, str(tmp_path)),
            ):
                raise AssertionError
        finally:
            if end == "killed":
                holder.kill()
            holder.communicate(timeout=60)  # closes its stdin
        with workdir.opened(config, str(tmp_path)) as checkpoints:
            assert checkpoints.latest_step is None
            assert (tmp_path / ".lock").read_text() == str(os.getpid())
            with (tmp_path / ".lock").open() as another, pytest.raises(BlockingIOError):
                fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_workdir_is_let_go_after_an_error(tmp_path):
    for _ in range(2):
        with (
            pytest.raises(ZeroDivisionError),
            workdir.opened(byol.get_config("demo"), str(tmp_path)),
        ):
            raise ZeroDivisionError


# -------------------------------------------------------------------- the command line

DEMO = "--config=configs/byol.py:demo"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "named", "hint"),
    [
        ([DEMO, "--config.bach_size=3"], "config.bach_size", "batch_size"),
        ([DEMO + ",bach_size=3"], "config.bach_size", "batch_size"),
        (["--config=configs/byol.py:dmo"], "'dmo'", "demo"),
        ([DEMO, "--config.batch_size=many"], "config.batch_size", "many"),
        ([DEMO, "--config.tau_base=2"], "config.tau_base=2.0", "0 to 1"),
        (
            [DEMO, "--config.optimiser.momentum=0"],
            "config.optimiser.momentum",
            "optimizer.momentum",
        ),
        ([DEMO, "--config.views.global.area=2"], "config.views.global.area=(2,)", "0 < low"),
        (
            [DEMO, "--config.views.global.view_1.hue=a"],
            "config.views.global.view_1.hue=a",
            "number",
        ),
        ([DEMO, "--config.views.global.aera=1"], "config.views.global.aera", "views.global.area"),
        ([DEMO, "--config.augment.mean=1"], "config.augment.mean", "it is now views.mean"),
        (["--config=configs/byol_to_simclr.py", "--config.order=a"], "config.order", "now only"),
        (["--config=configs/bylo.py"], "configs/bylo.py", "configs/byol.py"),
        ([DEMO, "--workdir="], "--workdir", "--config"),
        ([DEMO, "--wrkdir=x"], "wrkdir", "workdir"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_2(tmp_path, args, named, hint):
    workdir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "run_experiment.py", f"--workdir={workdir}", *args],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert "Traceback" not in done.stderr + done.stdout
    assert named in lines[-1] and hint in lines[-1].replace(named, "")
    assert not workdir.exists()  # nothing was begun


@pytest.mark.parametrize("field", ["exclude", "constant_rate"])
def test_patterns_that_match_nothing_are_told_before_any_data_is_read(tmp_path, field):
    config = byol.get_config("folder")
    config.data.dir = str(tmp_path / "no such folder")
    config.optimizer[field] = ("^classifier/", "biass$")  # the probe is there, with labels
    with pytest.raises(UserError, match=rf"config\.optimizer\.{field}='biass\$': matches no"):
        pretrain.pretrain(config, str(tmp_path / "run"), tiny_runs.build)
    assert not (tmp_path / "run").exists()
