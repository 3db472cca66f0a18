"""Checks of a config before anything is compiled: one clear line for each mistake."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from selfsup_jax import optim
from selfsup_jax.data.augment import BLUR_PADDINGS, JITTER_STYLES
from selfsup_jax.data.crops import RESIZE_METHODS
from selfsup_jax.devices import parallel
from selfsup_jax.errors import bad_field, nearest
from selfsup_jax.models.heads import HEAD_INITS, OUTPUT_NORMS
from selfsup_jax.models.resnet import KERNEL_INITS, PADDINGS, STAGES, STEMS


def validate(config: ConfigDict) -> None:
    """Checks a pretraining config's values, apart from what the data decides.

    A method's own fields are checked where the config has them; what only its method knows, such
    as a queue that must be a multiple of the batch, the method's `build` checks.

    Raises:
        UserError: naming the first field that is wrong, its value, and what would be valid.
    """
    check_values(config)
    for view in ("view_1", "view_2"):
        _check_view(config.augment[view], f"augment.{view}.")
    parallel.check_batch(config.batch_size, config.accumulate_steps, config.bn_groups)


def check_values(config: ConfigDict) -> None:
    """Checks each value for itself, of a pretraining config or an evaluation job's.

    Raises:
        UserError: as `validate`.
    """
    _choices(config)
    _ranges(config)
    _pairs(config)
    if config.data.test_resize < config.data.image_size:
        raise bad_field(
            "data.test_resize",
            config.data.test_resize,
            f"must be at least data.image_size={config.data.image_size}",
        )


def _choices(config: ConfigDict) -> None:
    choices: dict[str, Any] = {
        "compute_dtype": ("float32", "bfloat16"),
        "encoder.depth": tuple(STAGES),
        "encoder.stem": STEMS,
        "encoder.padding": PADDINGS,
        "encoder.kernel_init": tuple(KERNEL_INITS),
        "optimizer.name": optim.OPTIMIZERS,
        "optimizer.scaling": optim.SCALINGS,
        "optimizer.schedule": optim.SCHEDULES,
        "tau_schedule": optim.TAU_SCHEDULES,
        "data.resize_method": RESIZE_METHODS,
    }
    for head in ("projector", "predictor"):
        choices |= {f"{head}.linear_init": tuple(HEAD_INITS), f"{head}.output_norm": OUTPUT_NORMS}
    for field, value in _present(config, choices):
        _one_of(field, value, choices[field])


def _ranges(config: ConfigDict) -> None:
    at_least_one = [
        "batch_size",
        "feature_batch_size",
        "accumulate_steps",
        "bn_groups",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "data.image_size",
        "data.shuffle_buffer",
        "projector.output_size",
        "predictor.output_size",
        "eval.batch_size",
        "eval.knn_k",
        "eval.max_train_images",
        "eval.max_test_images",
        "eval.fewshot_labels",
        "eval.fewshot_draws",
        "monitor.max_rows",
        "monitor.knn_train_images",
        "monitor.knn_test_images",
        "monitor.map_images",
        "monitor.view_pairs",
        "profile.num_steps",
        "bank_rows",
        "query_rows",
        "max_iterations",
        "rows_per_file",
    ]
    for field, value in _present(config, at_least_one):
        if value < 1:
            raise bad_field(field, value, "must be at least 1")
    above_zero = (
        "encoder.width",
        "encoder.bn_epsilon",
        "optimizer.adam_epsilon",
        "eval.knn_temperature",
        "temperature",
        "tolerance",
        "inverse_penalty",
        "watch_poll_seconds",
        "watch_patience_hours",
    )
    for field, value in _present(config, above_zero):
        if not value > 0:
            raise bad_field(field, value, "must be above 0")
    not_negative = (
        "seed",
        "negatives_weight",
        "off_diagonal_weight",
        "invariance_weight",
        "variance_weight",
        "covariance_weight",
        "optimizer.learning_rate",
        "optimizer.weight_decay",
        "optimizer.trust_coefficient",
        "optimizer.clip_norm",
        "optimizer.weight_decay_end",
        "optimizer.excluded_rate",
        "data.cache_gib",
        "data.max_train_images",
        "held_out_images",
        "head_learning_rate",
        "keep_every_steps",
        "monitor.diagnostics_every_steps",
        "monitor.knn_every_steps",
        "monitor.plots_every_steps",
        "monitor.collapse_std",
        "monitor.collapse_rank",
        "profile.first_step",
    )
    for field, value in _present(config, not_negative):
        if value is not None and not value >= 0:  # None: a placeholder that is not given
            raise bad_field(field, value, "must not be negative")
    fractions = (
        "tau_base",
        "optimizer.momentum",
        "optimizer.beta_2",
        "optimizer.end_fraction",
        "optimizer.drop_factor",
        "encoder.bn_decay",
        "data.max_undecodable",
        "flip_prob",
        "label_share",
    )
    for field, value in _present(config, fractions):
        if not 0 <= value <= 1:
            raise bad_field(field, value, "must be from 0 to 1")
    predicts = "predictor" in config and config.get("use_predictor", True)
    if predicts and config.projector.output_size != config.predictor.output_size:
        raise bad_field(
            "predictor.output_size",
            config.predictor.output_size,
            f"must equal projector.output_size={config.projector.output_size}: the loss compares "
            "the two",
        )


def _pairs(config: ConfigDict) -> None:
    tops = {"data.crop_area": 1.0, "data.crop_aspect": float("inf")}
    for field, pair in _present(config, tops):
        top = tops[field]
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= top:
            raise bad_field(
                field, tuple(pair), f"must be (low, high) with 0 < low <= high <= {top}"
            )
    for field, sizes in _present(config, ("projector.hidden_sizes", "predictor.hidden_sizes")):
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise bad_field(field, tuple(sizes), "must be whole numbers, each at least 1")
        if not sizes and field.startswith("predictor"):
            raise bad_field(field, (), "must have at least one hidden layer")
    for field, triple in _present(config, ("augment.mean", "augment.std")):
        if len(triple) != 3 or (field.endswith("std") and not min(triple) > 0):
            raise bad_field(field, tuple(triple), "must be three numbers, deviations above 0")


def _check_view(view: ConfigDict, path: str) -> None:
    _one_of(path + "jitter_style", view.jitter_style, JITTER_STYLES)
    _one_of(path + "blur_padding", view.blur_padding, BLUR_PADDINGS)
    for field in view:
        if field.endswith("_prob") and not 0 <= view[field] <= 1:
            raise bad_field(path + field, view[field], "must be from 0 to 1")
    for field in ("brightness", "contrast", "saturation"):
        if not view[field] >= 0:  # nor NaN
            raise bad_field(path + field, view[field], "must not be negative")
    if not 0 <= view.hue <= 0.5:
        raise bad_field(path + "hue", view.hue, "must be from 0 to 0.5 (half a turn)")
    if view.blur_kernel < 1 or view.blur_kernel % 2 == 0:
        raise bad_field(path + "blur_kernel", view.blur_kernel, "must be odd and at least 1")
    if not 0 < view.blur_sigma_min <= view.blur_sigma_max:
        raise bad_field(
            path + "blur_sigma_min", view.blur_sigma_min, "must be above 0 and at most sigma_max"
        )


def check_batch_fits(config: ConfigDict, num_examples: int) -> None:
    """Raises `UserError` where an epoch would not hold a single batch."""
    if config.batch_size > num_examples:
        raise bad_field(
            "batch_size",
            config.batch_size,
            f"must be at most the {num_examples} images of data.train_split="
            f"{config.data.train_split!r}",
        )
    if config.get("queue_size", 0) > num_examples:
        logging.warning(
            "config.queue_size=%d: more keys than the %d images, so that an image has keys of its "
            "own among its negatives; a quarter of the images would do",
            config.queue_size,
            num_examples,
        )


def _present(config: ConfigDict, fields: Iterable[str]) -> list[tuple[str, Any]]:
    """The fields that this config has, with their values; a section may be missing."""
    found = []
    for field in fields:
        section, _, leaf = field.rpartition(".")
        holder = config.get(section) if section else config
        if holder is not None and leaf in holder:
            found.append((field, holder[leaf]))
    return found


def _one_of(field: str, value: Any, valid: tuple) -> None:
    if value not in valid:
        choices = ", ".join(map(str, valid))
        near = nearest(value, valid) if isinstance(value, str) else ""
        hint = f"; did you mean {near}?" if near and near != ", ".join(sorted(valid)) else ""
        raise bad_field(field, value, f"must be one of {choices}{hint}")
