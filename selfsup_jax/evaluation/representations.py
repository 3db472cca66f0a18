"""What the features of a frozen encoder are: its own representation, or tokens of a ViT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax.errors import bad_field

_LAST = 4  # blocks


class Representation(NamedTuple):
    """A frozen encoder as a function.

    Attributes:
        apply: `(variables, normalised images [B, H, W, 3]) -> features [B, D]` float32.
        num_features: D.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    num_features: int


def _of_tokens(module: nn.Module, features: str) -> Callable[[Any, jax.Array], jax.Array]:
    def apply(variables: Any, images: jax.Array) -> jax.Array:
        count = _LAST if features == "last4" else 1
        blocks: Any = module.apply(variables, images, count, method="intermediate")
        parts = [tokens[:, 0] for tokens in blocks]
        if features == "class_mean":
            parts.append(blocks[0][:, 1:].mean(1))
        return jnp.concatenate(parts, axis=-1)

    return apply


# `config.features` -> its D in widths: DINO's for ViT-S, and for ViT-B.
_WIDTHS = {"last4": _LAST, "class_mean": 2}
CHOICES = ("", *_WIDTHS)


def of(config: Mapping[str, Any], compute_dtype: str = "", features: str = "") -> Representation:
    """The features of a run's encoder.

    Args:
        config: of the run.
        compute_dtype: in place of the run's.
        features: one of `CHOICES`. Empty: the encoder's own; `last4`: the class tokens of the last
            4 blocks; `class_mean`: the last block's class token and its patches' mean.

    Raises:
        UserError: the encoder has no such tokens.
    """
    from selfsup_jax.evaluation import encoder  # needs Orbax, which a config's checks do without

    module: Any = encoder.module(dict(config), compute_dtype)
    if not features:
        return Representation(module.apply, module.num_features)
    if not hasattr(module, "intermediate"):
        raise bad_field("features", features, "must be '': a ResNet has no tokens")
    if features == "last4" and module.depth < _LAST:
        raise bad_field("features", features, f"must be '' or class_mean: {module.depth} blocks")
    return Representation(_of_tokens(module, features), _WIDTHS[features] * module.width)
