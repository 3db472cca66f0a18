"""Encoders by name; the rest of the code does not depend on their kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selfsup_jax import checks
from selfsup_jax.errors import bad_field
from selfsup_jax.models import vit
from selfsup_jax.models.attention import ATTENTIONS
from selfsup_jax.models.initializers import KERNEL_INITS
from selfsup_jax.models.resnet import PADDINGS, REMATS, STAGES, STEMS, ResNet

KINDS: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    **dict.fromkeys(vit.SIZES, vit.ViT),
}
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
_VIT_RULES: checks.Table = {
    **{"width": checks.whole(0, 2**14), "depth": checks.whole(0, 1000)},
    **{"heads": checks.whole(0, 2**10), "patch": checks.whole(0, 2**10)},
    "mlp_ratio": checks.whole(1, 64),
    "positions": checks.one_of(vit.POSITIONS),
    "frozen_patches": checks.flag,
    "drop_path": checks.number(0, 0.99),
    "features": checks.one_of(vit.FEATURES),
    "layer_norm_epsilon": checks.positive,
    "init": checks.one_of(vit.INITS),
    "attention_kernel": checks.one_of(ATTENTIONS),
}
FIELDS = {f"encoder.{name}": rule for name, rule in _RULES.items()}
FIELDS |= {f"encoder.vit.{name}": rule for name, rule in _VIT_RULES.items()}
# Fields that change what the same weights compute.
_FUNCTION = ("depth", "width", "stem", "padding", "stage1_projection", "bn_epsilon")
_VIT_FUNCTION = ("width", "depth", "heads", "patch", "features", "layer_norm_epsilon")


def is_vit(config: Mapping[str, Any]) -> bool:
    """Whether the section `encoder` is of a Vision Transformer; ResNets have no such name."""
    return config.get("name", "resnet") in vit.SIZES


def for_platform(config: Mapping[str, Any], on_tpu: bool) -> dict[str, Any]:
    """The section `encoder` without `auto` and -1: see `configs/common.py`."""
    fields = dict(config)
    if fields.get("pool_first") == "auto":
        fields["pool_first"] = "yes" if on_tpu else "no"
    if fields.get("product_norm_stages", 0) < 0:
        fields["product_norm_stages"] = 2 if on_tpu else 0
    return fields


def make_encoder(
    config: Mapping[str, Any], dtype: Any = jnp.float32, *, trainable: bool = False
) -> nn.Module:
    """The encoder of a `config.encoder` section: a module with `num_features` and `dtype`.

    Args:
        config: the fields of the encoder's class, and `name`, its kind (default: `resnet`); those
            of a Vision Transformer are in its section `vit`.
        dtype: of the computation.
        trainable: the parameters that pretraining leaves as they are get a gradient too.

    Returns:
        A module from images `[B, H, W, 3]` and a layout (None: evaluation mode) to the
        representation `[B, num_features]` float32. Batch statistics are optional.
    """
    if is_vit(config):
        fields = _vit_fields(config) | {"frozen": () if trainable else frozen(config)}
        return KINDS[config["name"]](**fields, dtype=dtype)
    fields = for_platform(config, on_tpu=jax.default_backend() == "tpu")
    fields.pop("vit", None)
    if "pool_first" in fields:
        fields["pool_first"] = fields["pool_first"] == "yes"
    return KINDS[fields.pop("name", "resnet")](**fields, dtype=dtype)


def _vit_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ViT`, with the sizes of the name where the section has 0."""
    fields = dict(config.get("vit", {}))
    fields.pop("frozen_patches", None)
    fields["weight_init"] = fields.pop("init", "normal")  # a module has a method `init`
    sizes = {name: fields.get(name) or size for name, size in vit.SIZES[config["name"]].items()}
    return fields | sizes | {"remat": config.get("remat", "none")}


def frozen(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The encoder's parameters that pretraining leaves as they are; the optimizer must, too."""
    if not is_vit(config):
        return ()
    fields = config.get("vit", {})
    fixed = {
        "patches": fields.get("frozen_patches", False),
        "positions": fields.get("positions", "learnt") == "sincos",
    }
    return tuple(name for name, holds in fixed.items() if holds)


def function(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that change what the same weights compute, by their paths in the section."""
    name = {"name": config.get("name", "resnet")}
    if not is_vit(config):
        return name | {field: config[field] for field in _FUNCTION}
    fields = _vit_fields(config)
    return name | {f"vit.{field}": fields.get(field) for field in _VIT_FUNCTION}


def used(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that its kind of encoder has, with `name` where it is not a ResNet."""
    if is_vit(config):
        sizes = {field: _vit_fields(config)[field] for field in vit.SIZES[config["name"]]}
        return {"name": config["name"]} | dict(config.get("vit", {})) | sizes
    return {field: value for field, value in config.items() if field not in ("name", "vit")}


def describe(config: Mapping[str, Any]) -> str:
    """`ResNet-50`, `ResNet-18 x0.25`, `vit_s16`, `vit_s16 (heads 12)`."""
    if not is_vit(config):
        width = f" x{config['width']:g}" if config["width"] != 1 else ""
        return f"ResNet-{config['depth']}{width}"
    usual, fields = vit.SIZES[config["name"]], _vit_fields(config)
    other = [f"{name} {fields[name]}" for name, size in usual.items() if fields[name] != size]
    return config["name"] + (f" ({', '.join(other)})" if other else "")


def image_side(config: Mapping[str, Any], params: Any) -> int | None:
    """Pixels of the images that parameters, or their shapes, were made for; None: any."""
    if not is_vit(config) or len(getattr(params.get("positions"), "shape", ())) != 2:
        return None
    return vit.side_of(params, _vit_fields(config)["patch"])


def check(config: Mapping[str, Any], sizes: Iterable[tuple[str, int]]) -> None:
    """Checks what an encoder's fields are together.

    Args:
        config: the section `encoder`, whose fields are valid each by itself.
        sizes: (field, pixels) of the images that it is given.

    Raises:
        UserError: the first field that does not fit.
    """
    if not is_vit(config):
        return
    fields = _vit_fields(config)
    if fields["remat"] not in vit.REMATS:
        valid = f"must be one of {', '.join(vit.REMATS)} with encoder.name={config['name']!r}"
        raise bad_field("encoder.remat", fields["remat"], valid)
    if fields["width"] % fields["heads"]:
        width = fields["width"]
        raise bad_field("encoder.vit.heads", fields["heads"], f"must divide the width, {width}")
    if fields.get("positions") == "sincos" and fields["width"] % 4:
        valid = "must be a multiple of 4 with encoder.vit.positions='sincos'"
        raise bad_field("encoder.vit.width", fields["width"], valid)
    patch = fields["patch"]
    for field, size in sizes:
        if size % patch:
            near = max(patch, round(size / patch) * patch)
            valid = f"must be a multiple of {patch}, the patch of {config['name']}, such as {near}"
            raise bad_field(field, size, valid)
