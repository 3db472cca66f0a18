"""ResNets of torchvision and timm, alone or inside the checkpoints of MoCo, MoCo v3 and DINO."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfsup_jax.interop import names
from selfsup_jax.interop.weights import (
    Arrays,
    Tensors,
    Weights,
    chosen_root,
    config,
    encoder_arrays,
    head_names,
    norm_arrays,
)

_MOMENTUM = "momentum."  # what the names of MoCo's momentum are made to begin with
# Of two encoders in a file, the one that is taken, and the other's place in the names.
_ONLINE = {"encoder_q.": "encoder_k.", "base_encoder.": "momentum_encoder."}


def weights(tensors: Mapping[str, np.ndarray], prefix: str | None = None) -> Weights:
    """Finds the ResNet among the tensors of a file.

    Args:
        tensors: by dotted names, such as `state_dict.module.encoder_q.conv1.weight`.
        prefix: of the encoder's names, where there are several; None to choose.

    Raises:
        ValueError: there is no ResNet, or one of another kind; tensors are missing.
    """
    root = _root(Tensors(tensors), prefix)
    rest = Tensors(_with_momentum(tensors, root))
    encoder = _encoder(rest, root)
    arrays = encoder_arrays(encoder, functools.partial(_layer, rest, root))
    family = next((name for name in _ONLINE if root.endswith(name)), "")
    options: dict[str, Any] = {}
    origin = f"ResNet-{encoder['depth']}"
    if family:
        arrays |= head(rest, f"{root}fc", "projector", "online")
        key_root = root.removesuffix(family) + _ONLINE[family]
        if any(name.startswith(key_root) for name in rest):
            arrays |= encoder_arrays(encoder, functools.partial(_layer, rest, key_root), "target")
            arrays |= head(rest, f"{key_root}fc", "projector", "target")
    if family == "encoder_q.":
        if f"{_MOMENTUM}conv1.weight" in rest:
            layer = functools.partial(_layer, rest, _MOMENTUM)
            arrays |= encoder_arrays(encoder, layer, "sgd_momentum")
            arrays |= head(rest, f"{_MOMENTUM}fc", "projector", "sgd_momentum")
        layers = "v2" if "online_params/projector/hidden/kernel" in arrays else "v1"
        origin = f"MoCo {layers}, {origin}"
        options = {"method": "moco", "area": (0.2, 1.0)}
        arrays |= _queue(rest, root.removesuffix(family), tensors)
    elif family:
        origin = f"MoCo v3, {origin}"
        arrays |= head(rest, f"{root.removesuffix(family)}predictor", "predictor", "online")
    elif "teacher." in root:
        origin = f"DINO, {origin}"
        rest.leave(r"^student\.", "the student: the teacher is what is evaluated")
        rest.leave(r"^dino_loss\.", "the loss's own state")
    rest.refuse(
        rf"^{re.escape(root)}(conv|bn|layer|downsample|stem|maxpool)(?!.*num_batches_tracked$)",
        "no part of a plain ResNet, so its features would be wrong",
    )
    rest.leave(r"num_batches_tracked$", "a count that nothing uses")
    rest.leave(r"(^|\.)optimizer\.", "state of the optimizer")
    rest.leave(rf"^{re.escape(root)}(fc|head)\.", "the classifier of its own labels")
    rest.leave("", "no part of the encoder")
    return Weights(arrays, config(encoder, **options), origin, rest.left_out)


def _root(tensors: Tensors, prefix: str | None) -> str:
    """What the names of the encoder's tensors begin with."""
    firsts = [name for name in tensors if name.endswith("conv1.weight")]
    roots = [name.removesuffix("conv1.weight") for name in firsts]
    also = ("bn1.weight", "layer1.0.conv1.weight")
    roots = [root for root in roots if all(f"{root}{name}" in tensors for name in also)]
    if not roots:
        raise ValueError(
            "has no ResNet: no tensors conv1.weight, bn1.weight and layer1.0.conv1.weight"
            + (f"; its first is {first}" if (first := next(iter(tensors), "")) else "")
        )
    known = [r for r in roots if r.endswith(tuple(_ONLINE)) or r.startswith("teacher.")]
    return chosen_root(roots, known, prefix)


def _encoder(tensors: Tensors, root: str) -> dict[str, Any]:
    """The fields of the config that the shapes tell."""
    escaped = re.escape(root)
    counts = names.counts_in(list(tensors), rf"^{escaped}layer(\d)\.(\d+)\.conv1\.weight$")
    bottleneck = f"{root}layer1.0.conv3.weight" in tensors
    features, _, size, _ = _four(tensors, f"{root}conv1.weight")
    if size not in (3, 7):
        raise ValueError(f"{root}conv1.weight has {size}x{size} pixels, which is no known stem")
    return {
        "depth": names.depth_of(counts, bottleneck),
        "width": features / 64,
        "stem": "imagenet" if size == 7 else "cifar",
        "stage1_projection": not bottleneck and f"{root}layer1.0.downsample.0.weight" in tensors,
    }


def _four(tensors: Tensors, name: str) -> tuple[int, ...]:
    shape = tensors.shape(name)
    if len(shape) != 4:
        raise ValueError(f"{name} has the shape {list(shape)}, which is no convolution's")
    return shape


def _layer(tensors: Tensors, root: str, conv: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    weight, norm = names.of_torch(conv)
    _four(tensors, f"{root}{weight}.weight")
    kernel = tensors.take(f"{root}{weight}.weight").transpose(2, 3, 1, 0)
    parts = names.norm_in_torch(f"{root}{norm}")
    return kernel, tensors.norm(parts, optional=root == _MOMENTUM)


def _with_momentum(tensors: Mapping[str, np.ndarray], root: str) -> dict[str, np.ndarray]:
    """Names the buffers of PyTorch's SGD by the parameters that they are of, if root is MoCo's.

    The buffers have numbers for names, but come in the order of the parameters.
    """
    if not root.endswith("encoder_q."):
        return dict(tensors)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    params = [n for n in tensors if n.startswith(root) and not n.endswith(statistics)]
    buffers = [n for n in tensors if re.search(r"^optimizer\.state\.\d+\.momentum_buffer$", n)]
    shapes = [[np.shape(tensors[name]) for name in group] for group in (params, buffers)]
    of = dict(zip(buffers, params, strict=True)) if shapes[0] == shapes[1] else {}
    renamed = {name: f"{_MOMENTUM}{param.removeprefix(root)}" for name, param in of.items()}
    return {renamed.get(name, name): array for name, array in tensors.items()}


def head(tensors: Tensors, root: str, part: str, network: str) -> Arrays:
    """A linear layer, or linear layers in a `Sequential`, perhaps with batch norm."""
    linear = [root] if f"{root}.weight" in tensors else _linear_layers(tensors, root)
    arrays: Arrays = {}
    for layer, (ours, norm) in zip(linear, head_names(len(linear)), strict=True):
        kernel = np.ascontiguousarray(tensors.take(f"{layer}.weight").T)
        arrays[f"{network}_params/{part}/{ours}/kernel"] = kernel
        if f"{layer}.bias" in tensors:
            arrays[f"{network}_params/{part}/{ours}/bias"] = tensors.take(f"{layer}.bias")
        head, _, index = layer.rpartition(".")
        after = f"{head}.{int(index) + 1}" if index.isdigit() else ""
        if f"{after}.running_mean" in tensors:
            values = tensors.norm(names.norm_in_torch(after), optional=True)
            arrays |= norm_arrays(values, f"{part}/{norm}", network)
    return arrays


def _linear_layers(tensors: Tensors, root: str) -> list[str]:
    """Those of a `Sequential`, in their order."""
    matches = (re.fullmatch(rf"{re.escape(root)}\.(\d+)\.weight", name) for name in tensors)
    indices = sorted(int(m[1]) for m in matches if m and len(tensors.shape(m[0])) == 2)
    return [f"{root}.{i}" for i in indices]


def _queue(tensors: Tensors, root: str, given: Mapping[str, np.ndarray]) -> Arrays:
    """MoCo's keys `[D, K]`, and where the oldest one is."""
    if f"{root}queue" not in given:
        return {}
    index = given[f"{root}queue_ptr"].reshape(-1) if f"{root}queue_ptr" in given else [0]
    queue = np.ascontiguousarray(tensors.take(f"{root}queue").T)
    tensors.leave(rf"^{re.escape(root)}queue_ptr$", "kept as queue_index")
    return {"queue": queue, "queue_index": np.asarray(index[0], np.int32)}
