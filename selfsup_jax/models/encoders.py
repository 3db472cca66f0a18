"""Encoders by name: all that the rest of the code knows of their kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from selfsup_jax.models.resnet import ResNet

KINDS = {"resnet": ResNet}


def make_encoder(config: Mapping[str, Any], dtype: Any = jnp.float32) -> nn.Module:
    """The encoder of a `config.encoder` section: a module with `num_features` and `dtype`.

    Args:
        config: the fields of the encoder's class, and `name`, its kind; `resnet` if not given.
        dtype: what it computes in.

    Returns:
        A module that takes images `[B, H, W, 3]` and a layout (None evaluates) and gives the
        representation `[B, num_features]` float32. It may have batch statistics or none.
    """
    fields = dict(config)
    return KINDS[fields.pop("name", "resnet")](**fields, dtype=dtype)
