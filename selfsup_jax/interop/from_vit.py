"""Vision Transformers of timm and DINO, alone or in the checkpoints of DINO and MoCo v3."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfsup_jax.interop import vit_names
from selfsup_jax.interop.from_torch import head
from selfsup_jax.interop.weights import Arrays, Tensors, Weights, chosen_root, config
from selfsup_jax.models import encoders, positions, vit

_FIRST = "patch_embed.proj.weight"
# MoCo v3's two encoders; where they are in its files.
_ONLINE, _TARGET = "base_encoder.", "momentum_encoder."


def there(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether the tensors of a file are of a Vision Transformer."""
    return any(name.endswith(_FIRST) for name in tensors)


def weights(tensors: Mapping[str, np.ndarray], prefix: str | None = None) -> Weights:
    """Finds the Vision Transformer among the tensors of a file.

    Args:
        tensors: by dotted names, such as `teacher.backbone.blocks.0.attn.qkv.weight`.
        prefix: of the encoder's names, where there are several; None to choose.

    Raises:
        ValueError: it is one of another kind; tensors are missing.
    """
    rest = Tensors(tensors)
    root = _root(rest, prefix)
    sizes = _sizes(rest, root)
    depth = sizes["depth"]
    arrays = _arrays(rest, root, depth, "online")
    table = arrays["online_params/encoder/positions"]
    encoder = _encoder(sizes, table, of_moco=root.endswith(_ONLINE))
    origin, how = "", "bicubic"
    if root.endswith(_ONLINE):
        origin, how = "MoCo v3, ", "bilinear"
        arrays |= head(rest, f"{root}head", "projector", "online")
        key_root = root.removesuffix(_ONLINE) + _TARGET
        if any(name.startswith(key_root) for name in rest):
            arrays |= _arrays(rest, key_root, depth, "target")
            arrays |= head(rest, f"{key_root}head", "projector", "target")
        arrays |= head(rest, f"{root.removesuffix(_ONLINE)}predictor", "predictor", "online")
    elif root.startswith("teacher."):
        origin = "DINO, "
        rest.leave(r"^student\.", "the student: the teacher is what is evaluated")
        rest.leave(r"^teacher\.head\.", "the teacher's head")
        rest.leave(r"^dino_loss\.", "the loss's own state")
    rest.leave(r"num_batches_tracked$", "a count that nothing uses")
    rest.leave(r"(^|\.)optimizer\.", "state of the optimizer")
    rest.leave(rf"^{re.escape(root)}head(_dist)?\.", "the classifier of its own labels")
    rest.refuse(f"^{re.escape(root)}.", "no part of a plain ViT, so its features would be wrong")
    rest.leave("", "no part of the encoder")
    side = math.isqrt(len(table) - 1) * sizes["patch"]
    made = config(encoder, size=side, resize=round(side / 0.875), resize_method=how)
    return Weights(arrays, made, f"{origin}{encoders.describe(encoder)}", rest.left_out)


def _root(tensors: Tensors, prefix: str | None) -> str:
    """What the names of the encoder's tensors begin with."""
    roots = [name.removesuffix(_FIRST) for name in tensors if name.endswith(_FIRST)]
    known = [r for r in roots if r.endswith(_ONLINE) or r.startswith("teacher.")]
    return chosen_root(roots, known, prefix)


def _sizes(tensors: Tensors, root: str) -> dict[str, int]:
    """What the shapes tell of the section `encoder.vit` of the config."""
    shape = tensors.shape(f"{root}{_FIRST}")
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(f"{root}{_FIRST} has the shape {list(shape)}, not [D, 3, p, p]")
    width, patch = shape[0], shape[2]
    blocks = {
        m[1] for m in (re.match(rf"{re.escape(root)}blocks\.(\d+)\.", n) for n in tensors) if m
    }
    if not blocks:
        raise ValueError(f"has no tensors {root}blocks.0...")
    table = tensors.shape(f"{root}pos_embed")
    if len(table) != 3 or math.isqrt(table[1] - 1) ** 2 != table[1] - 1 or table[2] != width:
        raise ValueError(f"{root}pos_embed has the shape {list(table)}: no square of patches")
    hidden = tensors.shape(f"{root}blocks.0.mlp.fc1.weight")[0]
    if hidden % width:
        raise ValueError(f"{root}blocks.0.mlp.fc1.weight has {hidden} rows for {width} features")
    return {"width": width, "depth": len(blocks), "patch": patch, "mlp_ratio": hidden // width}


def _encoder(sizes: dict[str, int], table: np.ndarray, of_moco: bool) -> dict[str, Any]:
    """The section `encoder` of the config.

    The heads are in no shape: MoCo v3, which its positions tell, has 12, others 64 features each.
    """
    width, sincos = sizes["width"], _is_sincos(table)
    heads = 12 if of_moco or sincos else max(1, width // 64)
    if width % heads:
        raise ValueError(f"has {width} features, no multiple of {heads} heads")
    same = [n for n, s in vit.SIZES.items() if all(s[k] == sizes[k] for k in ("width", "patch"))]
    fields: dict[str, Any] = {"positions": "sincos" if sincos else "learnt", "features": "class"}
    fields |= {"heads": heads, "layer_norm_epsilon": 1e-6}
    return {"name": same[0] if same else "vit_s16", "vit": sizes | fields}


def _is_sincos(table: np.ndarray) -> bool:
    """Whether these are MoCo v3's fixed positions."""
    side = math.isqrt(len(table) - 1)
    if table.shape[1] % 4 or side < 2:
        return False
    fixed = positions.sincos(side, side, table.shape[1])
    return np.allclose(table[1:], fixed[1:], atol=1e-4)


def _arrays(tensors: Tensors, root: str, depth: int, network: str) -> Arrays:
    return {
        f"{network}_params/encoder/{ours}": vit_names.from_torch(ours, tensors.take(root + theirs))
        for ours, theirs in vit_names.pairs(depth)
    }
