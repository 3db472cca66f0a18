"""Checks a config before anything is compiled; a mistake is reported in one clear line.

`TABLE` has the type and the range of every field but the methods' own, which their `build` checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from selfsup_jax import checks, optim
from selfsup_jax.build import Build
from selfsup_jax.checks import (
    different,
    flag,
    not_negative,
    one_of,
    optional,
    positive,
    text,
    whole,
)
from selfsup_jax.data import grain_reader, inputs, intensity, views
from selfsup_jax.devices import parallel
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import representations
from selfsup_jax.models import encoders, heads
from selfsup_jax.run import wandb_writer
from selfsup_jax.state import NETWORKS
from selfsup_jax.training import reference

_COUNT, _COUNT_OR_0, _LENGTH = whole(1), whole(0), optional(whole(0))
_BATCH = whole(1, largest=2**20)
_SEED = whole(0)  # an argument of compiled functions: int32
_PROBE: checks.Table = {
    "held_out_images": _COUNT_OR_0,
    "standardize": flag,
    "max_iterations": _COUNT,
    "tolerance": positive,
}
_NAMES = checks.each(text, "a tuple of texts, as \"('a','b')\"")


def _interval(low: int) -> checks.Rule:
    """Steps, or -1 for what fits the length of the run."""
    rule = optional(whole(low), -1)
    return lambda value: f"{valid}, or -1 to fit the run" if (valid := rule(value)) else ""


_RUN: checks.Table = {  # of every pretraining config
    **{"job": text, "method": text, "seed": _SEED, "init_from": text},
    **{"steps": _LENGTH, "examples": _LENGTH, "epochs": optional(not_negative)},
    "whole_epochs": flag,
    **{"batch_size": _BATCH, "accumulate_steps": _BATCH, "bn_groups": _BATCH},
    "compute_dtype": one_of(("auto", "float32", "bfloat16")),
    **{f"data.{field}": text for field in ("name", "dir", "train_split", "test_split")},
    "data.download": flag,
    "data.image_size": views.SIZE,
    "data.test_resize": views.SIZE,
    "data.resize_method": one_of(views.RESIZE_METHODS),
    "data.cache_gib": not_negative,
    "data.placement": one_of(inputs.PLACEMENTS),
    "data.crop_on": one_of(inputs.CROP_ON),
    "data.canvas": views.SIZE,
    "data.processes": whole(0, largest=1024),
    "data.reader": grain_reader.rule,
    "data.labels": one_of(inputs.LABELS),
    "data.intensity": intensity.rule,
    "data.exif_orientation": flag,
    "data.device_share": checks.share,
    "data.max_undecodable": checks.share,
    **{"steps_per_call": _COUNT_OR_0, "checkpoint_every_steps": _COUNT},
    "log_every_steps": _interval(1),
    **{"keep_checkpoints": _COUNT, "keep_every_steps": _COUNT_OR_0},
    "monitor.*_every_steps": _interval(0),
    **{f"monitor.{field}": not_negative for field in ("collapse_std", "collapse_rank")},
    "monitor.collapse_*": not_negative,  # of one method
    "monitor.reference": text,
    "wandb.*": text,
    "monitor.*": _COUNT,
    **{"profile.first_step": _COUNT_OR_0, "profile.num_steps": _COUNT},
    **{"eval.batch_size": _BATCH, "eval.knn_temperature": positive},
    "eval.network": one_of(NETWORKS),
    **{f"eval.{field}": flag for field in ("enabled", "random_init", "pixels")},
    **{f"eval.linear.{field}": rule for field, rule in _PROBE.items()},
    "eval.linear.C": different(positive, "numbers above 0"),
    "eval.*": _COUNT,
}
_JOBS: checks.Table = {
    **_PROBE,
    "C": different(positive, "numbers above 0"),
    **{"checkpoint": text, "follow": flag, "feature_batch_size": _BATCH},
    "follow_poll_seconds": checks.number(0, 86_400, above=True),
    "follow_patience_hours": checks.number(0, 1e6, above=True),
    **{"data.max_train_images": _COUNT_OR_0, "data.allow_unseen_classes": flag},
    **{"protocol": one_of(("fast", "sgd")), "random_init": flag, "train_batch_norm": flag},
    "learning_rates": different(positive, "numbers above 0"),
    **{"label_share": checks.number(0, 1, above=True), "label_list": text},
    "head_learning_rate": not_negative,
    "layer_decay": checks.number(0, 1, above=True),
    "features": one_of(representations.CHOICES),
    "neighbours": different(_COUNT, "whole numbers above 0"),
    "temperatures": different(positive, "numbers above 0"),
    **{"bank_rows": _COUNT, "query_rows": _COUNT},
    "labels_per_class": different(_COUNT, "whole numbers above 0"),
    "draws": whole(2),  # for an interval
    "penalties": different(positive, "numbers above 0"),
    "sets.*": text,
    **{"split": text, "format": one_of(("npz", "npy")), "rows_per_file": _COUNT},
    # Sweeps.
    **dict.fromkeys(("title", "published_title", "publish_dir"), text),
    **dict.fromkeys(("only", "columns", "metrics"), _NAMES),
    "seeds": different(_SEED, "whole numbers, not negative"),
    "published.*": checks.any_number,
}
TABLE = _RUN | _JOBS | encoders.FIELDS | heads.FIELDS | optim.FIELDS | views.FIELDS
# Fields of an evaluation job that may be empty: they are then those of the run.
_OF_THE_RUN: checks.Table = {
    field: optional(TABLE[field], "", 0, ())
    for field in (
        *("compute_dtype", "data.image_size", "data.test_resize", "data.resize_method"),
        *("data.intensity", "views.*.size", "views.*.area", "views.*.aspect"),
        *("neighbours", "temperatures"),
    )
} | {"data.exif_orientation": optional(flag)}
# Job -> a field of its configs alone.
_FIELD_OF_JOB = {
    **{"pretrain": "method", "sweep": "variants", "linear_probe": "protocol", "knn": "neighbours"},
    **{"finetune": "label_share", "transfer": "sets", "fewshot": "draws", "embed": "format"},
}
_UNRESOLVED = TABLE | _OF_THE_RUN | {"views.*.view_*.flip_prob": optional(checks.share)}


def check_fields(config: ConfigDict) -> None:
    """Checks the type and the range of each field in a config of any job, as it was given.

    Raises:
        UserError: as `validate`.
    """
    job = config.get("job")
    if valid := one_of(_FIELD_OF_JOB)(job):
        raise bad_field("job", job, valid)
    if _FIELD_OF_JOB[job] not in config:
        raise bad_field("job", job, f"has other fields, such as {_FIELD_OF_JOB[job]}")
    if job == "pretrain":
        return _check_run(config)
    own = {name: value for name, value in config.items() if name != "variants"}
    checks.fields(own, _UNRESOLVED | _of_job(config), others=checks.finite)
    if "optimizer" in config:
        optim.check(config)
    for variant, run in config.get("variants", {}).items():
        with of_variant(variant):
            _check_run(run)


def _of_job(config: ConfigDict) -> checks.Table:
    """The rules of a job's own where its field has another job's name."""
    return {"C": positive} if config.job == "fewshot" else {}  # nothing to choose it on


def _check_run(config: ConfigDict) -> None:
    there = {field for field, _ in checks.leaves(config)}
    for field in (*_RUN, *optim.FIELDS, "views.global.count", "views.mean", "views.std"):
        if field not in there and "*" not in field and field != "tau_schedule":
            raise UserError(f"config.{field}: is missing; start from the config of a method")
    checks.fields(config, TABLE, others=checks.finite)


@contextlib.contextmanager
def of_variant(variant: str) -> Iterator[None]:
    """A `UserError` in this block names a field of this variant of a sweep."""
    try:
        yield
    except UserError as e:
        message = str(e).removeprefix("config.")
        raise UserError(f"config.variants.{variant}.{message}") from e


def validate(config: ConfigDict, build: Build) -> None:
    """Checks a pretraining config, except for what depends on the data.

    Args:
        config: a resolved config.
        build: the method's `build`, which checks the method's own fields.

    Raises:
        UserError: a field is invalid; the message has its name, its value and what is valid.
    """
    _check_run(config)
    _check_together(config)
    parallel.check_batch(config.batch_size, config.accumulate_steps, config.bn_groups)
    reference.load(config.monitor.reference)  # raises if there is none of that name
    wandb_writer.check(config)
    build(config, None, 1, 0)


def check_patterns(config: ConfigDict, build: Build) -> None:
    """Checks that the optimizer's patterns match parameters; takes up to half a second.

    Args:
        config, build: as for `validate`.

    Raises:
        UserError: one matches none, also not of the online probe, which runs without labels lack.
    """
    optimizer = config.optimizer
    if optimizer.exclude or optimizer.constant_rate or optimizer.freeze:
        method = build(config, 2, 1, 0)
        jax.eval_shape(lambda: method.init_state(jax.random.PRNGKey(0)))


def check_values(config: ConfigDict) -> None:
    """Checks the resolved config of an evaluation job.

    Raises:
        UserError: as `validate`.
    """
    checks.fields(config, TABLE | _of_job(config), others=checks.finite)
    _check_together(config)


def _check_together(config: ConfigDict) -> None:
    size, resize = config.data.image_size, config.data.test_resize
    if resize < size:
        raise bad_field("data.test_resize", resize, f"must be at least data.image_size={size}")
    if "optimizer" in config:
        optim.check(config)
    if "views" in config:
        views.check(config)
    if "encoder" in config:
        encoders.check(config.encoder, [("data.image_size", size), *views.sizes(config)])
