"""Checks a config before anything is compiled; a mistake is reported in one clear line.

Fields that all configs share are checked here; the modules of encoders, heads, optimizers, views
and methods check their own fields.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from selfsup_jax import checks, optim
from selfsup_jax.build import Build
from selfsup_jax.data import inputs, intensity, views
from selfsup_jax.devices import parallel
from selfsup_jax.errors import bad_field
from selfsup_jax.models import encoders, heads
from selfsup_jax.training import reference

_AT_LEAST_ONE = (
    *("batch_size", "feature_batch_size", "accumulate_steps", "bn_groups", "log_every_steps"),
    *("checkpoint_every_steps", "keep_checkpoints", "profile.num_steps", "rows_per_file"),
    *("data.image_size", "data.shuffle_buffer", "bank_rows", "query_rows", "max_iterations"),
    *("eval.batch_size", "eval.knn_k", "eval.max_train_images", "eval.max_test_images"),
    *("eval.fewshot_labels", "eval.fewshot_draws", "eval.linear.max_iterations"),
    *("monitor.max_rows", "monitor.knn_train_images", "monitor.knn_test_images"),
    *("monitor.map_images", "monitor.view_pairs"),
)
_ABOVE_ZERO = (
    *("eval.knn_temperature", "eval.linear.tolerance", "tolerance", "follow_poll_seconds"),
    "follow_patience_hours",
)
_NOT_NEGATIVE = (
    *(
        "seed",
        "steps_per_call",
        "keep_every_steps",
        "data.cache_gib",
        "data.max_train_images",
        "held_out_images",
    ),
    *("head_learning_rate", "eval.linear.held_out_images", "profile.first_step"),
    *("monitor.diagnostics_every_steps", "monitor.knn_every_steps"),
    *("monitor.plots_every_steps", "monitor.collapse_std", "monitor.collapse_rank"),
)


def validate(config: ConfigDict, build: Build) -> None:
    """Checks a pretraining config, except for what depends on the data.

    Args:
        config: a resolved config.
        build: the method's `build`, which checks the method's own fields.

    Raises:
        UserError: a field is invalid; the message has its name, its value and what is valid.
    """
    check_values(config)
    checks.numbers(config, "eval.linear.C")
    parallel.check_batch(config.batch_size, config.accumulate_steps, config.bn_groups)
    reference.load(config.monitor.reference)  # raises if there is none of that name
    build(config, None, 1, 0)


def check_values(config: ConfigDict) -> None:
    """Checks each value on its own, in the config of a pretraining run or an evaluation job.

    Raises:
        UserError: as `validate`.
    """
    checks.one_of(config, "compute_dtype", ("auto", "float32", "bfloat16"))
    checks.one_of(config, "data.resize_method", views.RESIZE_METHODS)
    checks.one_of(config, "data.placement", inputs.PLACEMENTS)
    checks.one_of(config, "data.labels", inputs.LABELS)
    intensity.check(config)
    checks.in_range(config, _AT_LEAST_ONE, 1)
    checks.in_range(config, _ABOVE_ZERO, 0, above=True)
    checks.in_range(config, _NOT_NEGATIVE, 0)
    checks.in_range(config, ("data.max_undecodable", "data.device_share", "label_share"), 0, 1)
    size, resize = config.data.image_size, config.data.test_resize
    if resize < size:
        raise bad_field("data.test_resize", resize, f"must be at least data.image_size={size}")
    encoders.check(config)
    heads.check(config)
    optim.check(config)
    if "views" in config:
        views.check(config)
