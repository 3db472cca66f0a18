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
    "pool_first": checks.flag,
    "product_norm_stages": checks.whole(-1, 4),
}
FIELDS = {f"encoder.{name}": rule for name, rule in _RULES.items()}


def product_norm_stages(on_tpu: bool) -> int:
    """What -1 means for the field of this name: see `configs/common.py`."""
    return 2 if on_tpu else 0


def make_encoder(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The encoder of a `config.encoder` section: a module with `num_features` and `dtype`.

    Args:
        config: the fields of the encoder's class, and `name`, its kind (default: `resnet`).
        dtype: of the computation.

    Returns:
        A module from images `[B, H, W, 3]` and a layout (None: evaluation mode) to the
        representation `[B, num_features]` float32. Batch statistics are optional.
    """
    fields = dict(config)
    if fields.get("product_norm_stages", 0) < 0:
        fields["product_norm_stages"] = product_norm_stages(jax.default_backend() == "tpu")
    return KINDS[fields.pop("name", "resnet")](**fields, dtype=dtype)
