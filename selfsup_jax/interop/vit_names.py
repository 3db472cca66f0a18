"""What the parameters of a Vision Transformer are called, here and in timm, DINO and MoCo v3."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_BLOCK = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "attention_output": "attn.proj",
    "norm2": "norm2",
    "hidden": "mlp.fc1",
    "output": "mlp.fc2",
}


def pairs(depth: int) -> Iterator[tuple[str, str]]:
    """(Ours, theirs) of every parameter: `block1/qkv/kernel`, `blocks.0.attn.qkv.weight`."""
    yield from (("class_token", "cls_token"), ("positions", "pos_embed"))
    yield from _layer("patches", "patch_embed.proj")
    for i in range(depth):
        for ours, theirs in _BLOCK.items():
            yield from _layer(f"block{i + 1}/{ours}", f"blocks.{i}.{theirs}")
    yield from _layer("norm", "norm")


def _layer(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    weight = "scale" if "norm" in ours.rpartition("/")[2] else "kernel"
    yield f"{ours}/{weight}", f"{theirs}.weight"
    yield f"{ours}/bias", f"{theirs}.bias"


def from_torch(ours: str, array: np.ndarray) -> np.ndarray:
    """PyTorch's array as it is here; raises `ValueError` for another number of dimensions."""
    dimensions = {"class_token": 3, "positions": 3, "patches/kernel": 4}
    wanted = dimensions.get(ours, 2 if ours.endswith("kernel") else 1)
    if array.ndim != wanted:
        raise ValueError(f"{ours} has the shape {list(array.shape)}, not {wanted} dimensions")
    if ours == "class_token":
        return array.reshape(-1)
    if ours == "positions":
        return array[0]
    if ours == "patches/kernel":  # [D, 3, p, p]: a patch's rows, columns and colours here
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0)).reshape(-1, len(array))
    return np.ascontiguousarray(array.T) if wanted == 2 else array


def to_torch(ours: str, array: np.ndarray, patch: int) -> np.ndarray:
    """Our array as PyTorch has it."""
    array = np.asarray(array, np.float32)
    if ours == "class_token":
        return array.reshape(1, 1, -1)
    if ours == "positions":
        return array[None]
    if ours == "patches/kernel":
        array = array.reshape(patch, patch, -1, array.shape[-1]).transpose(3, 2, 0, 1)
    elif ours.endswith("kernel"):
        array = array.T
    return np.ascontiguousarray(array)
