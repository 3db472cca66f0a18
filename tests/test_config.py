"""The presets against the papers' recipes, and every mistake a user can make in a config."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from configs import byol
from selfsup_jax import config as config_lib
from selfsup_jax.durations import to_steps
from selfsup_jax.errors import UserError

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
    config_lib.validate(config)
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
        "data.crop_area": (0.08, 1.0),
        "data.crop_aspect": (3 / 4, 4 / 3),
        "encoder.depth": 50,
        "encoder.width": 1.0,
        "encoder.stem": "imagenet",
        "encoder.padding": "same",
        "encoder.zero_init_gamma": True,
        "encoder.bn_decay": 0.9,
        "encoder.bn_epsilon": 1e-5,
        "projector.hidden_size": 4096,
        "projector.output_size": 256,
        "predictor.hidden_size": 4096,
        "predictor.output_size": 256,
        "optimizer.name": "lars",
        "optimizer.scaling": "linear",
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 10,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.rate_inside_momentum": False,
        "optimizer.trust_coefficient": 1e-3,
        "augment.mean": (0.485, 0.456, 0.406),
        "augment.std": (0.229, 0.224, 0.225),
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
    assert_fields(config.augment.view_1, both_views | {"blur_prob": 1.0, "solarize_prob": 0.0})
    assert_fields(config.augment.view_2, both_views | {"blur_prob": 0.1, "solarize_prob": 0.2})


def test_cifar10_is_lightlys_recipe():
    config = byol.get_config("cifar10")
    expected = {
        "data.name": "cifar10",
        "data.image_size": 32,
        "epochs": 200,
        "batch_size": 128,
        "tau_base": 0.99,
        "encoder.depth": 18,
        "encoder.stem": "cifar",
        "projector.hidden_size": 1024,
        "projector.output_size": 256,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 5e-4,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_epochs": 0,
        "augment.view_1.blur_prob": 0,
        "augment.view_2.blur_prob": 0,
    }
    assert_fields(config, expected)
    rate = config.optimizer.learning_rate * config.batch_size / 256  # linear scaling
    assert config.optimizer.scaling == "linear" and rate == pytest.approx(0.06)


def test_imagenette_is_the_authors_recipe():
    expected = {
        "data.image_size": 128,
        "encoder.depth": 18,
        "batch_size": 256,
        "epochs": 1000,
        "optimizer.learning_rate": 2.0,
        "optimizer.weight_decay": 1e-6,
    }
    config = byol.get_config("imagenette")
    assert_fields(config, expected)
    assert config.data.name.startswith("imagenette/160px")


# ----------------------------------------------------------------------------- parsing


def test_fields_after_the_preset_are_set():
    config = byol.get_config(
        "cifar10, batch_size=64,data.name=mnist,augment.view_2.blur_prob=1,epochs=3,steps=7"
    )
    expected = {
        "batch_size": 64,
        "data.name": "mnist",
        "augment.view_2.blur_prob": 1.0,
        "epochs": 3.0,
        "steps": 7,
    }
    unchanged = config_lib._flatten(byol.get_config("cifar10").to_dict())
    assert_fields(config, expected)
    changed = {
        field
        for field, value in config_lib._flatten(config.to_dict()).items()
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


# -------------------------------------------------------------------------- validation

BAD_VALUES = [
    ("compute_dtype", "float16", "bfloat16"),
    ("encoder.depth", 51, "50"),
    ("encoder.stem", "imagnet", "imagenet"),
    ("encoder.padding", "valid", "same"),
    ("encoder.kernel_init", "he", "lecun"),
    ("optimizer.name", "adam", "sgd"),
    ("optimizer.scaling", "square", "sqrt"),
    ("optimizer.schedule", "cosin", "cosine"),
    ("data.resize_method", "nearest", "bicubic"),
    ("batch_size", 0, "at least 1"),
    ("accumulate_steps", 0, "at least 1"),
    ("bn_groups", 0, "at least 1"),
    ("log_every_steps", 0, "at least 1"),
    ("checkpoint_every_steps", 0, "at least 1"),
    ("keep_checkpoints", 0, "at least 1"),
    ("data.image_size", 0, "at least 1"),
    ("data.shuffle_buffer", 0, "at least 1"),
    ("projector.hidden_size", 0, "at least 1"),
    ("predictor.output_size", -1, "at least 1"),
    ("predictor.output_size", 64, "projector.output_size=256"),
    ("eval.batch_size", 0, "at least 1"),
    ("eval.knn_k", 0, "at least 1"),
    ("eval.fewshot_draws", 0, "at least 1"),
    ("encoder.width", 0.0, "above 0"),
    ("encoder.bn_epsilon", 0.0, "above 0"),
    ("eval.knn_temperature", -0.1, "above 0"),
    ("seed", -1, "negative"),
    ("optimizer.learning_rate", -0.1, "negative"),
    ("optimizer.learning_rate", float("nan"), "negative"),
    ("optimizer.weight_decay", -1e-6, "negative"),
    ("data.cache_gib", -1.0, "negative"),
    ("tau_base", 1.5, "0 to 1"),
    ("tau_base", float("nan"), "0 to 1"),
    ("optimizer.momentum", -0.9, "0 to 1"),
    ("encoder.bn_decay", 9.0, "0 to 1"),
    ("data.max_undecodable", 1.1, "0 to 1"),
    ("data.crop_area", (0.0, 1.0), "low"),
    ("data.crop_area", (0.5, 0.1), "low"),
    ("data.crop_area", (0.5, 1.1), "1.0"),
    ("data.crop_aspect", (1.5, 0.5), "low"),
    ("data.crop_aspect", (1.0,), "low"),
    ("data.test_resize", 200, "data.image_size=224"),
    ("augment.mean", (0.5,), "three"),
    ("augment.std", (0.1, 0.0, 0.1), "above 0"),
    ("augment.view_1.jitter_style", "torch", "torchvision"),
    ("augment.view_2.blur_padding", "same", "reflect"),
    ("augment.view_1.flip_prob", 1.5, "0 to 1"),
    ("augment.view_2.solarize_prob", -0.1, "0 to 1"),
    ("augment.view_1.contrast", -0.4, "negative"),
    ("augment.view_1.hue", 0.6, "0.5"),
    ("augment.view_2.blur_kernel", 4, "odd"),
    ("augment.view_1.blur_kernel", -1, "odd"),
    ("augment.view_1.blur_sigma_min", 3.0, "sigma_max"),
    ("augment.view_1.blur_sigma_min", 0.0, "above 0"),
    ("bn_groups", 3, "batch_size=4096"),
]


@pytest.mark.parametrize(("field", "value", "hint"), BAD_VALUES)
def test_a_bad_value_is_named_with_what_would_be_valid(field, value, hint):
    config = config_with(**{field: value})
    with pytest.raises(UserError) as error:
        config_lib.validate(config)
    message = str(error.value)
    start = f"config.{field}={value!r}: "
    assert message.startswith(start)
    assert hint in message.removeprefix(start) and "\n" not in message


def test_the_bounds_themselves_are_valid():
    config = config_with(
        seed=0, tau_base=1.0, optimizer__momentum=0.0, optimizer__learning_rate=0.0,
        data__crop_area=(1.0, 1.0), data__test_resize=224, augment__view_1__hue=0.5,
        augment__view_1__blur_kernel=1, augment__view_1__blur_sigma_min=2.0, steps=1,
    )  # fmt: skip
    config_lib.validate(config)
    config_lib.check_batch_fits(config, config.batch_size)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch_size": 100, "accumulate_steps": 3}, "config.batch_size=100"),
        ({"batch_size": 96, "accumulate_steps": 2, "bn_groups": 3}, "config.bn_groups=3"),
    ],
)
def test_a_batch_that_does_not_divide_is_named(fields, named):
    with pytest.raises(UserError) as error:
        config_lib.validate(config_with(**fields))
    assert str(error.value).startswith(named)


def test_a_batch_larger_than_the_data_is_named():
    with pytest.raises(UserError) as error:
        config_lib.check_batch_fits(config_with(data__train_split="train[:1%]"), 100)
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
    ],
)
@pytest.mark.parametrize("prefix", ["", "warmup_"])
def test_durations_come_to_steps(fields, steps, prefix):
    given = {"steps": None, "examples": None, "epochs": None} | fields
    section = {prefix + unit: value for unit, value in given.items()}
    assert to_steps(section, num_examples=100, batch_size=8, prefix=prefix) == steps


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


# ------------------------------------------------------------------------- config.json


FOUND = {"train_images": 100, "classes": 10}


def written(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "config.json").read_text())


def write_or_check(config, workdir, going_on=True, found=FOUND):
    config_lib.write_or_check(config, str(workdir), going_on=going_on, found=found)


def test_the_resolved_config_is_written_and_taken_again(tmp_path):
    config = config_with(batch_size=64)
    write_or_check(config, tmp_path)
    assert written(tmp_path) == json.loads(config.to_json()) | {"found": FOUND}
    assert written(tmp_path)["data"]["crop_area"] == [0.08, 1.0]
    assert os.listdir(tmp_path) == ["config.json"]
    write_or_check(config_with(batch_size=64), tmp_path)  # tuples and all


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("batch_size", 64),
        ("epochs", 41.0),
        ("steps", 100),
        ("tau_base", 0.5),
        ("compute_dtype", "float32"),
        ("encoder.depth", 18),
        ("optimizer.learning_rate", 0.31),
        ("data.train_split", "train[:50%]"),
        ("data.crop_area", (0.5, 1.0)),
        ("augment.view_2.blur_prob", 0.25),
    ],
)
def test_a_run_goes_on_with_its_own_mathematics_only(tmp_path, field, value):
    write_or_check(config_with(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError) as error:
        write_or_check(config_with(**{field: value}), tmp_path)
    as_json = json.loads(json.dumps([value, get(config_with(), field)]))
    new, old = map(repr, as_json)
    assert str(error.value).startswith(f"config.{field}={new}: ")
    assert old in str(error.value).removeprefix(f"config.{field}={new}: ")
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log_every_steps", 1),
        ("checkpoint_every_steps", 3),
        ("keep_checkpoints", 9),
        ("eval.knn_k", 5),
        ("data.dir", "/elsewhere"),
        ("data.max_undecodable", 0.5),
    ],
)
def test_what_does_not_touch_the_mathematics_may_change(tmp_path, field, value):
    write_or_check(config_with(), tmp_path)
    write_or_check(config_with(**{field: value}), tmp_path)
    assert get(ConfigDict(written(tmp_path)), field) == value


def test_without_a_checkpoint_there_is_no_run_to_keep_to(tmp_path):
    """A mistake that is found after the config was written must not lock the workdir."""
    write_or_check(config_with(), tmp_path, going_on=False)
    write_or_check(config_with(batch_size=64), tmp_path, going_on=False)
    assert written(tmp_path)["batch_size"] == 64


def test_other_data_under_the_same_name_is_noticed(tmp_path):
    write_or_check(config_with(), tmp_path)
    with pytest.raises(UserError, match=r"found.train_images=99.*100"):
        write_or_check(config_with(), tmp_path, found={"train_images": 99, "classes": 10})


# -------------------------------------------------------------------- the command line

DEMO = "--config=configs/byol.py:demo"


@pytest.mark.parametrize(
    ("args", "named", "hint"),
    [
        ([DEMO, "--config.bach_size=3"], "config.bach_size", "batch_size"),
        ([DEMO + ",bach_size=3"], "config.bach_size", "batch_size"),
        (["--config=configs/byol.py:dmo"], "'dmo'", "demo"),
        ([DEMO, "--config.batch_size=many"], "config.batch_size", "many"),
        ([DEMO, "--config.tau_base=2"], "config.tau_base=2.0", "0 to 1"),
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
