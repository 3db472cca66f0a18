"""Compares two configs: do they give the same steps, results, curves, recipe or job?

A config is compared as flat fields, `{"optimizer.name": ...}`; facts about its data are under
`data_info.`. Configs of earlier versions are first converted to the current field names.
"""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from selfsup_jax.checks import leaves
from selfsup_jax.errors import bad_field

Flat = dict[str, Any]

# Groups of fields, as patterns of `fnmatch`.
_DATA_ACCESS = (
    *("data.dir", "data.download", "data.max_undecodable", "data.placement", "data.device_share"),
    *("data.processes", "data.reader", "steps_per_call"),
    *("encoder.remat", "encoder.pool_first", "encoder.product_norm_stages"),
    "encoder.vit.attention_kernel",
)
_INTERVALS = (
    *("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "profile.*", "wandb.*"),
    *("monitor.knn_every_steps", "monitor.plots_every_steps"),
)
_KEEP = ("keep_every_steps",)
_RUN = ("seed", "data_info.*")
_FOLLOWING = ("checkpoint", "follow", "follow_*")
_MEMORY = ("feature_batch_size", "bank_rows", "query_rows")

# Fields that may differ between two configs that give the same steps, results, ...
SAME_STEPS = (
    *(*_DATA_ACCESS, *_INTERVALS, "eval.*", "monitor.*", "data.test_split"),
    "data_info.init_from.*",  # of the first start: the source may be gone
)
SAME_RESULTS = (*_DATA_ACCESS, *_INTERVALS, *_KEEP)
SAME_CURVES = (
    *(*_RUN, *_DATA_ACCESS, *_INTERVALS, *_KEEP),
    *("eval.enabled", "eval.batch_size", "eval.max_*", "eval.linear.*", "eval.fewshot_*"),
    *("eval.random_init", "eval.pixels"),
    *("monitor.map_images", "monitor.view_pairs", "monitor.collapse_*", "monitor.reference"),
    "monitor.diagnostics_every_steps",
)
SAME_RECIPE = (*_RUN, *_DATA_ACCESS, *_INTERVALS, *_KEEP, "monitor.*")
SAME_JOB = (*SAME_RESULTS, *_FOLLOWING, *_MEMORY, "data.allow_unseen_classes")
SAME_MEASURE = (*SAME_RESULTS, *_RUN, *_FOLLOWING, "encoder.*", "projector.*", "method")

LENGTHS = ("steps", "examples", "epochs", "whole_epochs")


def flat(config: ConfigDict | Mapping[str, Any]) -> Flat:
    """The flat fields of a config; a config of an earlier version is converted."""
    if isinstance(config, ConfigDict):
        config = json.loads(config.to_json())
    return upgraded(flatten(config))


def flatten(tree: Mapping[str, Any]) -> Flat:
    """Nested dictionaries as `{"a.b": ...}`; empty dictionaries are left out."""
    return dict(leaves(tree))


def bound(fields: Flat, free: Sequence[str]) -> Flat:
    """The fields that must not differ: all that match no pattern in `free`."""
    view_2 = [name for name in fields if name.startswith("views.") and ".view_2." in name]
    same_views = all(fields[name] == fields.get(name.replace("_2.", "_1.")) for name in view_2)
    patterns = tuple(free)
    return {
        name: value
        for name, value in fields.items()
        if not _matches(name, patterns)
        and not (same_views and name in view_2)  # a second view equal to the first may be left out
    }


@functools.cache
def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def differences(now: Flat, before: Flat, free: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Field -> (value now, value before), for the fields that differ but must not."""

    def value(fields: Flat, name: str) -> Any:
        return fields.get(name, fields.get(name.replace(".view_2.", ".view_1.")))

    fields = sorted(bound(now, free).keys() | bound(before, free).keys())
    pairs = {field: (value(now, field), value(before, field)) for field in fields}
    return {
        field: pair
        for field, pair in pairs.items()
        if pair[0] != pair[1] and not _are_equal(field, pair)
    }


def _are_equal(field: str, pair: tuple[Any, Any]) -> bool:
    # A run with images of more than 8 bits has a range in place of `auto`.
    return field == "data.intensity" and set(pair) == {"auto", "full"}


def described(different: Mapping[str, tuple[Any, Any]], owner: str, prefix: str = "config.") -> str:
    """Every difference with both values: `config.seed=1: OWNER has 0; ...`."""
    return "; ".join(
        f"{'' if field.startswith('data_info.') else prefix}{field}={now!r}: {owner} has {before!r}"
        for field, (now, before) in different.items()
    )


def steps_free(now: Flat, before: Flat) -> tuple[str, ...]:
    """Fields that may differ on resume: `SAME_STEPS`, and the length if schedules are constant."""
    free: tuple[str, ...] = SAME_STEPS
    if not before.get("keep_every_steps"):  # otherwise checkpoints to keep would be deleted
        free += _KEEP
    constant = all(
        fields.get(name, "constant") == "constant"
        for fields in (now, before)
        for name in ("optimizer.schedule", "tau_schedule")
    )
    constant_decay = not any(fields.get("optimizer.weight_decay_end") for fields in (now, before))
    return free + LENGTHS * (constant and constant_decay)


# ------------------------------------------------------------------- configs of earlier versions

_RENAMED = {  # prefix of a field name -> its replacement
    "found.": "data_info.",
    "augment.view_": "views.global.view_",
    "augment.": "views.",
    "data.crop_area": "views.global.area",
    "data.crop_aspect": "views.global.aspect",
    "flip_prob": "views.global.view_1.flip_prob",
    "inverse_penalties": "C",
    "inverse_penalty": "C",
    "watch": "follow",
    "order": "only",
}
_STYLES = {
    "byol": ("lecun", True, True, False, "none"),
    "moco": ("torch", True, False, True, "none"),
    "simclr": ("normal", False, True, False, "scale"),
}
_STYLE_FIELDS = ("linear_init", "hidden_bias", "hidden_norm", "output_bias", "output_norm")
# A field of the configs that have newer fields -> these, with the values of the old behaviour.
_ADDED: dict[str, Flat] = {
    "optimizer.name": {
        "optimizer.end_fraction": 0.0,
        "optimizer.weight_decay_end": None,
        "optimizer.excluded_rate": 1.0,
        "optimizer.constant_rate": [],
        "optimizer.clip_norm": 0.0,
        "optimizer.clip_each": False,
        "optimizer.freeze": [],
        **dict.fromkeys(f"optimizer.freeze_{unit}" for unit in ("steps", "examples", "epochs")),
        "optimizer.beta_2": 0.999,
        "optimizer.adam_epsilon": 1e-8,
        "whole_epochs": True,
    },
    "data.name": {
        "data.labels": "auto",
        "data.intensity": "full",
        "data.crop_on": "host",
        "data.canvas": 512,
    },
    "encoder.depth": {
        **{"encoder.stage1_projection": False, "encoder.zero_init_basic": True},
        **{"encoder.remat": "none", "encoder.pool_first": "auto"},
        "encoder.product_norm_stages": -1,
        "encoder.name": "resnet",
        **{f"encoder.vit.{size}": 0 for size in ("width", "depth", "heads", "patch")},
        **{"encoder.vit.mlp_ratio": 4, "encoder.vit.positions": "learnt"},
        **{"encoder.vit.frozen_patches": False, "encoder.vit.drop_path": 0.0},
        **{"encoder.vit.features": "class", "encoder.vit.layer_norm_epsilon": 1e-6},
        **{"encoder.vit.init": "normal", "encoder.vit.attention_kernel": "auto"},
    },
    "projector.output_size": {"projector.activation": "relu"},
    "predictor.output_size": {"predictor.activation": "relu"},
    "feature_batch_size": {"features": ""},
    "label_share": {"layer_decay": 1.0},
    "centre_momentum": {"monitor.collapse_entropy": 0.995, "monitor.collapse_uniform_kl": 0.9},
    "monitor.max_rows": {
        "init_from": "",
        "online_probe.kernel_init": "lecun",
        "online_probe.every_view": False,
        "online_probe.lars_ratio": True,
        **{"wandb.project": "", "wandb.entity": "", "eval.network": "online"},
    },
}


_FLIPS: Flat = {
    **{f"{name}_prob": 0.0 for name in ("jitter", "grayscale", "blur", "solarize")},
    **{"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
    **{"jitter_style": "tensorflow", "blur_padding": "zero", "blur_kernel": 23},
    **{"blur_sigma_min": 0.1, "blur_sigma_max": 2.0, "solarize_threshold": 0.5},
}


def upgraded(fields: Flat) -> Flat:
    """Flat fields under their current names; newer fields get the value of the old behaviour."""
    new: Flat = {}
    for name, value in fields.items():
        old = next((old for old in _RENAMED if name.startswith(old)), None)
        new[name.replace(old, _RENAMED[old], 1) if old else name] = value
    for head in ("projector", "predictor"):
        if f"{head}.hidden_size" in new:
            name = new.pop(f"{head}.style", "byol")
            if not isinstance(name, str) or name not in _STYLES:
                raise bad_field(f"{head}.style", name, f"must be one of {', '.join(_STYLES)}")
            style = _STYLES[name]
            new |= {f"{head}.{f}": value for f, value in zip(_STYLE_FIELDS, style, strict=True)}
            hidden = new.pop(f"{head}.hidden_size")
            new[f"{head}.hidden_sizes"] = [hidden] if hidden else []
        if new.get(f"{head}.linear_init") == "haiku" and "whole_epochs" not in new:
            new[f"{head}.linear_init"] = "lecun"  # what `haiku` was before it was Haiku's
    for field, added in _ADDED.items():
        if field in new:
            new = added | new
    if new.get("method") in ("simclr", "dino"):
        new.setdefault("views_share_norm", True)
    new.pop("data.shuffle_buffer", None)  # of large splits, whose order was not their seed's alone
    if "data.name" in new:  # only folders' images are turned
        new.setdefault("data.exif_orientation", new["data.name"] != "folder")
    if "flip_prob" in fields:  # a job that trained on flipped crops
        new = {f"views.global.view_1.{name}": value for name, value in _FLIPS.items()} | new
    if "views.global.area" in new:
        new.setdefault("views.global.count", 2 if "views.global.view_2.flip_prob" in new else 1)
        new.setdefault("views.global.size", new.get("data.image_size"))
    return new


def upgraded_tree(config: Mapping[str, Any]) -> dict[str, Any]:
    """`upgraded` for nested dictionaries."""
    from flax.traverse_util import unflatten_dict  # the report needs neither this nor JAX

    return unflatten_dict(upgraded(flatten(config)), sep=".")
