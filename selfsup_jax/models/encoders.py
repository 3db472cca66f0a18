"""Encoders by name; the rest of the code does not depend on their kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax import checks
from selfsup_jax.models.initializers import KERNEL_INITS
from selfsup_jax.models.resnet import PADDINGS, REMATS, STAGES, STEMS, ResNet

KINDS = {"resnet": ResNet}
_RULES: checks.Table = {
    "name": checks.one_of(KINDS),
    "depth": checks.one_of(STAGES),
    "width": checks.number(0, 64, above=True),
    "stem": checks.one_of(STEMS),
    "padding": checks.one_of(PADDINGS),
    "kernel_init": checks.one_of(KERNEL_INITS),
    "bn_decay": checks.share,
    "bn_epsilon": checks.positive,
    "bn_unbiased_average": checks.flag,
    "stage1_projection": checks.flag,
    "zero_init_gamma": checks.flag,
    "zero_init_basic": checks.flag,
    "remat": checks.one_of(REMATS),
    "pool_first": checks.one_of(("auto", "yes", "no")),
    "product_norm_stages": checks.whole(-1, 4),
}
FIELDS = {f"encoder.{name}": rule for name, rule in _RULES.items()}


def for_platform(config: Mapping[str, Any], on_tpu: bool) -> dict[str, Any]:
    """The section `encoder` without `auto` and -1: see `configs/common.py`."""
    fields = dict(config)
    if fields.get("pool_first") == "auto":
        fields["pool_first"] = "yes" if on_tpu else "no"
    if fields.get("product_norm_stages", 0) < 0:
        fields["product_norm_stages"] = 2 if on_tpu else 0
    return fields


def make_encoder(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The encoder of a `config.encoder` section: a module with `num_features` and `dtype`.

    Args:
        config: the fields of the encoder's class, and `name`, its kind (default: `resnet`).
        dtype: of the computation.

    Returns:
        A module from images `[B, H, W, 3]` and a layout (None: evaluation mode) to the
        representation `[B, num_features]` float32. Batch statistics are optional.
    """
    fields = for_platform(config, on_tpu=jax.default_backend() == "tpu")
    if "pool_first" in fields:
        fields["pool_first"] = fields["pool_first"] == "yes"
    return KINDS[fields.pop("name", "resnet")](**fields, dtype=dtype)
