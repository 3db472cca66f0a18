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


def _last4(module: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    def apply(variables: Any, images: jax.Array) -> jax.Array:
        blocks: Any = module.apply(variables, images, _LAST, method="intermediate")
        return jnp.concatenate([tokens[:, 0] for tokens in blocks], axis=-1)

    return apply


def _class_mean(module: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    def apply(variables: Any, images: jax.Array) -> jax.Array:
        blocks: Any = module.apply(variables, images, 1, method="intermediate")
        tokens = blocks[0]
        return jnp.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], axis=-1)

    return apply


# `config.features` -> (function of a module, its D in widths): DINO's for ViT-S, and for ViT-B.
_TOKENS = {"last4": (_last4, _LAST), "class_mean": (_class_mean, 2)}
CHOICES = ("", *_TOKENS)


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
    make, widths = _TOKENS[features]
    return Representation(make(module), widths * module.width)
