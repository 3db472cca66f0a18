"""Encoders by name; the rest of the code does not depend on their kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from selfsup_jax import checks
from selfsup_jax.models.initializers import KERNEL_INITS
from selfsup_jax.models.resnet import PADDINGS, STAGES, STEMS, ResNet

KINDS = {"resnet": ResNet}


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
    return KINDS[fields.pop("name", "resnet")](**fields, dtype=dtype)


def check(config: Any) -> None:
    """Checks the section `encoder` of a config; raises `UserError`."""
    choices = {"depth": STAGES, "stem": STEMS, "padding": PADDINGS, "kernel_init": KERNEL_INITS}
    checks.one_of(config, "encoder.name", KINDS)
    for field, valid in choices.items():
        checks.one_of(config, f"encoder.{field}", valid)
    checks.in_range(config, ("encoder.width", "encoder.bn_epsilon"), 0, above=True)
    checks.in_range(config, ("encoder.bn_decay",), 0, 1)
