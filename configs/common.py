"""Defaults that the methods' configs share, and the reading of `file.py:preset,field=value`."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable

from ml_collections import ConfigDict, config_dict

# What fields of earlier versions are called now.
RENAMED = {
    "projector.hidden_size": "projector.hidden_sizes, such as (4096,)",
    "predictor.hidden_size": "predictor.hidden_sizes, such as (4096,)",
    "projector.style": "projector.linear_init, .hidden_norm, .output_bias and .output_norm",
}


def parse(
    arg: str | None, presets: dict[str, Callable[..., ConfigDict]], default: str
) -> ConfigDict:
    """Makes the config of `preset,field=value,...`; the preset may be left out.

    What the preset's function takes is handed to it, such as `epochs=300` where recipes differ by
    length; any other field, dotted where nested, is set on the result.

    Raises:
        ValueError: an unknown preset or field, naming the nearest valid ones.
    """
    outside_brackets = r",(?![^(]*\))"
    parts = [part.strip() for part in re.split(outside_brackets, arg or "") if part.strip()]
    name = parts.pop(0) if parts and "=" not in parts[0] else default
    if name not in presets:
        raise ValueError(f"unknown preset {name!r}; did you mean: {_nearest(name, presets)}?")
    fields = {}
    for part in parts:
        key, separator, text = part.partition("=")
        if not separator:
            raise ValueError(f"{part!r} is not field=value; presets come first: {name},{part}=...")
        fields[key.strip()] = _literal(text.strip())
    make = presets[name]
    if not isinstance(fields.get("epochs", 1), int | float):
        raise ValueError(f"config.epochs={fields['epochs']!r}: must be a number")
    taken = set(inspect.signature(make).parameters) & set(fields)
    config = make(**{key: fields.pop(key) for key in taken})
    for key, value in fields.items():
        set_field(config, key, value)
    return config


def set_field(config: ConfigDict, key: str, value: object) -> None:
    """`config.a.b = value` for the key `a.b`, which must be there already.

    In a study, a field that is not the study's own is set in each of its variants that has it; the
    seed is not theirs.
    """
    if "variants" in config and key.partition(".")[0] not in config:
        runs = [run for run in config.variants.values() if key != "seed" and _has(run, key)]
        for run in runs:
            set_field(run, key, value)
        if runs:
            return
        own = set(config) - {"variants", "published"}
        names = {name for run in config.variants.values() for name in field_names(run)}
        near = _nearest(key, (names | own) - {"seed"})
        raise ValueError(f"unknown field config.{key}; did you mean: {near}?")
    check_field(config, key)
    try:
        config.update_from_flattened_dict({key: value})
    except TypeError as e:
        raise ValueError(f"config.{key}={value!r}: {e}") from e


def check_field(config: ConfigDict, key: str) -> None:
    """Raises `ValueError`, naming the nearest ones, where the config has no field `a.b`."""
    if key in RENAMED and not _has(config, key):
        raise ValueError(f"unknown field config.{key}: it is now {RENAMED[key]}")
    if not _has(config, key):
        near = _nearest(key, field_names(config))
        raise ValueError(f"unknown field config.{key}; did you mean: {near}?")


def _has(config: ConfigDict, key: str) -> bool:
    """Whether there is such a field, or a section of fields."""
    names = field_names(config)
    return key in names or key in {name.rpartition(".")[0] for name in names}


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every field's dotted name."""
    names = []
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            names += field_names(value, f"{prefix}{key}.")
        else:
            names.append(prefix + key)
    return names


def _nearest(name: str, choices) -> str:
    leaf = {choice.rpartition(".")[2]: choice for choice in choices}
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    close += [leaf[m] for m in difflib.get_close_matches(name.rpartition(".")[2], leaf, n=3)]
    return ", ".join(dict.fromkeys(close)) or ", ".join(sorted(choices))


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def pretrain_defaults() -> ConfigDict:
    """What every pretraining config has, whatever the method."""
    config = ConfigDict()
    config.job = "pretrain"
    config.seed = 0

    # Length. The first that is given counts: steps, examples, epochs.
    config.steps = config_dict.placeholder(int)
    config.examples = config_dict.placeholder(int)
    config.epochs = 1000.0

    config.batch_size = 4096  # global: over all devices of all hosts
    config.accumulate_steps = 1  # microbatches per update
    config.bn_groups = 1  # batch-norm groups of the global batch; 1 is global batch norm
    config.compute_dtype = "bfloat16"  # of convolutions and matmuls; float32 on the CPU

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # a TFDS name, `folder`, or `digits`
    config.data.dir = ""  # TFDS's data_dir (its own default if empty), or the folder of images
    config.data.download = False  # let TFDS fetch and prepare what is not in config.data.dir
    config.data.train_split = ""  # TFDS split syntax; empty chooses by what the data set has
    config.data.test_split = ""  # held-out images for the evaluation at the end
    config.data.image_size = 224  # pixels, of the crops and of the test images
    config.data.test_resize = 256  # shorter side before the test's centre crop
    config.data.resize_method = "bicubic"
    config.data.crop_area = (0.08, 1.0)  # share of the image's area
    config.data.crop_aspect = (3 / 4, 4 / 3)  # width / height, log-uniform
    config.data.cache_gib = 4.0  # a TFDS split up to this size is held in memory, else streamed
    config.data.shuffle_buffer = 16384  # images, for streamed splits
    config.data.max_undecodable = 0.01  # share of images that may be broken before the run stops

    config.log_every_steps = 50
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints = 2  # the newest
    config.keep_every_steps = 0  # checkpoints of multiples of it are kept for good; 0: none

    config.monitor = ConfigDict()  # looking at the run as it goes; intervals of 0: never
    config.monitor.diagnostics_every_steps = 500  # spread, rank, alignment, uniformity
    config.monitor.knn_every_steps = 5000  # kNN on held-out images, if eval.enabled
    config.monitor.plots_every_steps = 5000
    config.monitor.max_rows = 512  # examples of a batch that the diagnostics look at
    config.monitor.knn_train_images = 5000
    config.monitor.knn_test_images = 1000
    config.monitor.map_images = 1000  # held-out images on the map
    config.monitor.view_pairs = 12
    config.monitor.collapse_std = 0.1  # below it the projections count as collapsed (1 is healthy)
    config.monitor.collapse_rank = 1.5  # below it the representations do
    config.monitor.reference = ""  # a curve in `selfsup_jax/training/references/` to compare with

    config.profile = ConfigDict()  # a trace for TensorBoard's profiler or Perfetto
    config.profile.first_step = 0  # 0: none
    config.profile.num_steps = 5

    config.eval = ConfigDict()  # the evaluation of the last step's encoder
    config.eval.enabled = True
    config.eval.batch_size = 256
    config.eval.max_train_images = 20000  # labelled images for the probes
    config.eval.max_test_images = 50000
    config.eval.knn_k = 200
    config.eval.knn_temperature = 0.1
    config.eval.fewshot_labels = 10  # per class
    config.eval.fewshot_draws = 10
    config.eval.random_init = True  # the same probes on an encoder that was never trained
    config.eval.pixels = False  # and on raw pixels
    return config


def study(title: str, variants: dict[str, ConfigDict], seeds: tuple[int, ...]) -> ConfigDict:
    """A study: every variant pretrained with every seed, and one table of what they learned."""
    config = ConfigDict()
    config.job = "study"
    config.title = title
    config.seeds = seeds
    config.variants = ConfigDict(variants)  # name -> the config of a run; its seed is replaced
    config.order = tuple(variants)  # which of them are run, in which order
    # The table's columns: `show` are fields of the variants' configs, `measures` of their results.
    config.show = ()
    config.measures = (
        "linear_probe_top1",
        "knn_top1",
        "random_init_linear_probe_top1",
        "random_init_knn_top1",
    )
    config.published = ConfigDict()  # variant -> published top-1, to stand beside
    config.published_title = "published"
    config.publish_dir = ""  # a folder that also takes table and record, once all runs are done
    return config


def encoder(**changes) -> ConfigDict:
    """The encoder, BYOL's where not said otherwise (`selfsup_jax/models/resnet.py:ResNet`)."""
    fields = {
        "depth": 50,
        "width": 1.0,  # multiplies every stage's channels
        "stem": "imagenet",  # or `cifar`
        "padding": "same",  # BYOL's code; `torch`: MoCo's; `fixed`: SimCLR's
        "zero_init_gamma": True,  # the last norm of each residual branch starts at 0
        "kernel_init": "lecun",  # BYOL's and SimCLR's codes; `kaiming_fan_out`: MoCo's
        "bn_decay": 0.9,
        "bn_epsilon": 1e-5,
        "bn_unbiased_average": False,  # running variance times n / (n - 1), as PyTorch's
    }
    return _changed("an encoder", fields, changes)


def head(**changes) -> ConfigDict:
    """A projector or predictor, BYOL's where not said otherwise (`selfsup_jax/models/heads.py`)."""
    fields = {
        "hidden_sizes": (4096,),  # () is a linear head
        "output_size": 256,
        "linear_init": "haiku",  # BYOL's code; `torch`: MoCo's; `normal`: SimCLR's
        "hidden_bias": True,
        "hidden_norm": True,
        "output_bias": False,
        "output_norm": "none",  # or `affine`, `scale` (no offset), `plain` (neither)
    }
    return _changed("a head", fields, changes)


def wide_head(size: int) -> ConfigDict:
    """Three layers of one size, as Barlow Twins' projector and VICReg's expander."""
    return head(hidden_sizes=(size, size), output_size=size, linear_init="torch", hidden_bias=False)


def adamw(learning_rate: float = 1e-3, warmup_epochs: float = 10.0) -> ConfigDict:
    """AdamW for small batches, where LARS is slow: our choice, no paper's."""
    return optimizer(
        name="adamw",
        learning_rate=learning_rate,
        scaling="none",
        weight_decay=1e-2,
        warmup_epochs=warmup_epochs,
    )


def optimizer(warmup_epochs: float = 10.0, **changes) -> ConfigDict:
    """The optimizer: LARS in the order of BYOL's code where not said otherwise."""
    fields = {
        "name": "lars",  # or `sgd`, `adamw`, `lamb`
        "learning_rate": 0.2,
        "scaling": "linear",  # x batch_size / 256; or `sqrt`, x sqrt(batch_size); or `none`
        "schedule": "cosine",  # or `step`, `constant`
        "end_fraction": 0.0,  # of the peak, where the cosine ends
        "drops": (),  # of the step schedule, as fractions of the run
        "drop_factor": 0.1,
        "warmup_steps": config_dict.placeholder(int),  # the first of these that is given counts
        "warmup_examples": config_dict.placeholder(int),
        "warmup_epochs": warmup_epochs,
        "momentum": 0.9,
        "nesterov": False,
        "rate_inside_momentum": False,  # outside: BYOL's code and PyTorch; inside: SimCLR's
        "weight_decay": 1.5e-6,
        "weight_decay_end": config_dict.placeholder(float),  # a cosine leads there; none: constant
        "trust_coefficient": 1e-3,  # LARS's eta
        "exclude": ("bias$", "scale$"),  # biases and norms: no decay, no LARS ratio
        "excluded_rate": 1.0,  # times the learning rate, for these
        "constant_rate": (),  # patterns of parameters whose rate follows no schedule
        "clip_norm": 0.0,  # the gradient's norm is cut to this; 0: never
        "beta_2": 0.999,  # of AdamW and LAMB, whose first beta is the momentum
        "adam_epsilon": 1e-8,
    }
    return _changed("an optimizer", fields, changes)


def view(**changes) -> ConfigDict:
    """One view's augmentation, BYOL's view 1 (Grill et al., appendix B) where not said otherwise.

    `selfsup_jax/data/augment.py:ViewAugmentation` says what each field means.
    """
    fields = {
        "flip_prob": 0.5,
        "jitter_prob": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "jitter_style": "tensorflow",
        "grayscale_prob": 0.2,
        "blur_prob": 1.0,
        "blur_kernel": 23,
        "blur_sigma_min": 0.1,
        "blur_sigma_max": 2.0,
        "blur_padding": "zero",
        "solarize_prob": 0.0,
        "solarize_threshold": 0.5,
    }
    return _changed("a view", fields, changes)


def augmentation(view_1: ConfigDict, view_2: ConfigDict) -> ConfigDict:
    """Two views, normalised by ImageNet's mean and deviation."""
    config = ConfigDict({"view_1": view_1, "view_2": view_2})
    config.mean = (0.485, 0.456, 0.406)
    config.std = (0.229, 0.224, 0.225)
    return config


def _changed(what: str, fields: dict, changes: dict) -> ConfigDict:
    unknown = set(changes) - set(fields)
    if unknown:
        raise KeyError(f"no such field of {what}: {sorted(unknown)}")
    return ConfigDict(fields | changes)
