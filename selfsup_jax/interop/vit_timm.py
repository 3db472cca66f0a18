"""A Vision Transformer as timm has it: its arrays, and the arguments that make its model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.interop import vit_names
from selfsup_jax.models import encoders

# Models of timm, which has them with patches of 16 pixels; arguments change the rest.
_MODELS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}
EPSILON = 1e-6  # of its norms


def arrays(frozen: FrozenEncoder) -> dict[str, np.ndarray]:
    """The encoder's arrays by timm's names."""
    fields = encoders.used(frozen.config["encoder"])
    ours = flatten_dict(frozen.variables["params"], sep="/")
    return {
        theirs: vit_names.to_torch(name, ours[name], fields["patch"])
        for name, theirs in vit_names.pairs(fields["depth"])
    }


def model(frozen: FrozenEncoder) -> tuple[str, dict[str, Any]]:
    """The name of timm's model, and the arguments with which it has this architecture."""
    fields = encoders.used(frozen.config["encoder"])
    patches = len(frozen.variables["params"]["positions"]) - 1
    arguments: dict[str, Any] = {
        "img_size": math.isqrt(patches) * fields["patch"],
        "patch_size": fields["patch"],
        "embed_dim": fields["width"],
        "depth": fields["depth"],
        "num_heads": fields["heads"],
        "mlp_ratio": fields["mlp_ratio"],
    }
    if fields["features"] == "mean":  # of the patches, after the norm
        arguments |= {"global_pool": "avg", "fc_norm": False}
    return _MODELS.get(fields["width"], _MODELS[384]), arguments


def call(frozen: FrozenEncoder) -> str:
    """`"vit_small_patch16_224", img_size=224, ...`: for people."""
    name, arguments = model(frozen)
    return ", ".join([f'"{name}"', *(f"{k}={v!r}" for k, v in arguments.items())])


def config(frozen: FrozenEncoder, pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a model on the Hugging Face hub, as timm reads it."""
    name, arguments = model(frozen)
    own = {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": arguments["embed_dim"],
        "model_args": arguments,
        "pretrained_cfg": dict(pretrained) | own,
    }
