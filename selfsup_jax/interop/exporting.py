"""Encoders out: files that torchvision, timm and the Hugging Face hub, Detectron2 and ONNX read."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.interop import card, names, torch_files, vit_timm
from selfsup_jax.interop.importing import PREPROCESSING
from selfsup_jax.interop.weights import METADATA, about
from selfsup_jax.models import encoders
from selfsup_jax.models.resnet import STAGES
from selfsup_jax.run.files import whole_file, write_json, writing_to

_NAMED = (18, 34, 50, 101, 152)  # depths that all libraries have


class Target(NamedTuple):
    """A kind of export.

    Attributes:
        file: with the weights.
        depths: that it can express; empty for all.
        torch: whether it is PyTorch's ResNet, which pads symmetrically and has one width.
        vit: whether it can express Vision Transformers.
    """

    file: str
    depths: tuple[int, ...] = ()
    torch: bool = True
    vit: bool = False


TARGETS = {
    "npz": Target(encoder.VARIABLES, torch=False, vit=True),
    "safetensors": Target("model.safetensors", torch=False, vit=True),
    "onnx": Target("model.onnx", torch=False),
    "torchvision": Target("model.pth"),
    "timm": Target("model.safetensors", (*_NAMED, 200), vit=True),
    "detectron2": Target("model.pth", (50, 101, 152)),
}


def check(config: Mapping[str, Any], to: str, measured: bool) -> None:
    """Checks that a target can express an encoder.

    Args:
        config: the run's.
        to: a key of `TARGETS`.
        measured: whether another padding is accepted, because its effect is measured.

    Raises:
        UserError: it cannot; says why, and what would.
    """
    fields, target = config["encoder"], TARGETS[to]
    if to == "onnx" and importlib.util.find_spec("onnx") is None:
        raise UserError("--to=onnx: needs the package onnx: pip install 'selfsup-jax[onnx]'")
    if encoders.is_vit(fields):
        _check_vit(fields, to)
    elif target.torch:
        _check_resnet(fields, to, measured)


def _check_vit(fields: Mapping[str, Any], to: str) -> None:
    able = ", ".join(name for name, target in TARGETS.items() if target.vit)
    if not TARGETS[to].vit:
        raise UserError(f"--to={to}: holds ResNets; {able} can hold {encoders.describe(fields)}")
    epsilon = encoders.used(fields)["layer_norm_epsilon"]
    if to == "timm" and epsilon != vit_timm.EPSILON:
        raise UserError(
            f"--to=timm: it has norms of epsilon {vit_timm.EPSILON:g}, not {epsilon:g} "
            "(encoder.vit.layer_norm_epsilon); --to=safetensors or npz can hold it"
        )


def _check_resnet(fields: Mapping[str, Any], to: str, measured: bool) -> None:
    target = TARGETS[to]
    bottleneck = STAGES[fields["depth"]][1]
    reasons = {
        f"has no ResNet-{fields['depth']}": target.depths and fields["depth"] not in target.depths,
        f"has no ResNet {fields['width']:g} times as wide": fields["width"] != 1,
        "has no projection in stage 1 (encoder.stage1_projection)": fields["stage1_projection"]
        and not bottleneck,
        "has batch norms of epsilon 1e-5": fields["bn_epsilon"] != 1e-5,
        "has no 3x3 stem (encoder.stem)": to == "detectron2" and fields["stem"] != "imagenet",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"--to={to}: it {reason}; --to=onnx, safetensors or npz can hold it")
    if fields["padding"] != "torch" and not measured:
        raise UserError(
            f"--to={to}: this encoder pads like {fields['padding']!r}, PyTorch's convolutions pad "
            "symmetrically, so its features would differ (BYOL's ResNet-50 lost 4 points); train "
            "with --config.encoder.padding=torch (as configs/byol.py:imagenet_torch), or use "
            "--to=onnx, or add --measure=IMAGES to export it nonetheless, with the difference on "
            "these images"
        )


def export(
    frozen: FrozenEncoder, folder: str, to: str, results: Mapping[str, Any], measured: str = ""
) -> None:
    """Writes weights, `preprocessing.json` and a model card, `README.md`.

    Args:
        frozen: the encoder, which passed `check`.
        folder: to write to.
        to: a key of `TARGETS`.
        results: of its run, flat; empty if unknown.
        measured: what another padding changes, in words.

    Raises:
        UserError: the folder cannot be written to.
    """
    _check_folder(folder, to)
    if to == "npz":
        encoder.export(frozen, folder)
    images = card.preprocessing(frozen.config)
    with writing_to(folder):
        os.makedirs(folder, exist_ok=True)
        if to != "npz":
            with whole_file(os.path.join(folder, TARGETS[to].file), "wb") as f:
                _WRITERS[to](f, frozen)
        if to == "timm":
            write_json(os.path.join(folder, "config.json"), _timm_config(frozen))
        write_json(os.path.join(folder, PREPROCESSING), images)
        with whole_file(os.path.join(folder, "README.md"), encoding="utf-8") as f:
            f.write(card.text(frozen, to, TARGETS[to].file, results, measured))


def _check_folder(folder: str, to: str) -> None:
    """An export may replace one of the same kind; two in one folder would be taken for each other.

    For `npz`, `encoder.export` refuses the files that are of no export.
    """

    def is_there(name: str) -> bool:
        return os.path.exists(os.path.join(folder, name))

    is_export = is_there(PREPROCESSING)
    for name in ("config.json", "runs.json", "checkpoints", encoder.ABOUT):
        if to != "npz" and is_there(name) and not is_export:
            raise UserError(
                f"{folder}: has a {name} that is not of an export; choose another folder"
            )
    own = {TARGETS[to].file, *(["config.json"] if to == "timm" else [])}
    files = {"config.json", *(target.file for target in TARGETS.values())}
    for name in sorted(files - own):
        if is_export and is_there(name):
            raise UserError(f"{folder}: has the {name} of another export; choose another folder")


def torch_arrays(
    frozen: FrozenEncoder, name_of: Callable[[str], tuple[str, str]], counts: bool = True
) -> dict[str, np.ndarray]:
    """The encoder's arrays by PyTorch's names, `[D, C, H, W]`; `counts`: `num_batches_tracked`."""
    variables = frozen.variables
    arrays: dict[str, np.ndarray] = {}
    for conv in names.convolutions(frozen.config["encoder"]):
        weight, norm = name_of(conv)
        kernel = np.asarray(variables["params"][conv]["kernel"], np.float32)
        arrays[f"{weight}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        for part, (collection, theirs, _) in names.NORM.items():
            values = variables[collection][f"{conv}_bn"][part]
            arrays[f"{norm}.{theirs}"] = np.asarray(values, np.float32)
        if counts:
            arrays[f"{norm}.num_batches_tracked"] = np.asarray(frozen.step, np.int64)
    return arrays


def _write_torchvision(file: Any, frozen: FrozenEncoder) -> None:
    torch_files.write(file, torch_arrays(frozen, names.of_torch))


def _write_detectron2(file: Any, frozen: FrozenEncoder) -> None:
    arrays = torch_arrays(frozen, names.of_detectron2, counts=False)
    # Detectron2 then finds the layers of its detectors by the end of their names.
    others = {"__author__": "selfsup-jax", "matching_heuristics": True}
    torch_files.write(file, arrays, "model", **others)


def _write_timm(file: Any, frozen: FrozenEncoder) -> None:
    if encoders.is_vit(frozen.config["encoder"]):
        arrays = vit_timm.arrays(frozen)
    else:
        arrays = torch_arrays(frozen, names.of_torch)
    file.write(safetensors.numpy.save(arrays, {"format": "pt"}))


def _write_safetensors(file: Any, frozen: FrozenEncoder) -> None:
    arrays = flatten_dict(frozen.variables, sep="/")
    arrays = {k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}
    file.write(safetensors.numpy.save(arrays, {METADATA: json.dumps(about(frozen.config))}))


def _write_onnx(file: Any, frozen: FrozenEncoder) -> None:
    from selfsup_jax.interop import onnx_graph  # needs the package onnx

    file.write(onnx_graph.model(frozen).SerializeToString())


_WRITERS: dict[str, Callable[[Any, FrozenEncoder], None]] = {
    "torchvision": _write_torchvision,
    "detectron2": _write_detectron2,
    "timm": _write_timm,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}


def _timm_config(frozen: FrozenEncoder) -> dict[str, Any]:
    """The `config.json` of a model on the Hugging Face hub, as timm reads it."""
    images, fields = card.preprocessing(frozen.config), frozen.config["encoder"]
    size = images["image_size"]
    pretrained = {
        "num_classes": 0,
        "input_size": [3, size, size],
        "crop_pct": _crop_pct(size, images["test_resize"]),
        "crop_mode": "center",
        "interpolation": images["resize_method"],
        "mean": images["mean"],
        "std": images["std"],
    }
    if encoders.is_vit(fields):
        return vit_timm.config(frozen, pretrained)
    return {
        "architecture": f"resnet{fields['depth']}",
        "num_classes": 0,
        "num_features": 2048 if STAGES[fields["depth"]][1] else 512,
        "pretrained_cfg": pretrained | {"first_conv": "conv1", "classifier": "fc"},
    }


def _crop_pct(size: int, resize: int) -> float:
    """The share from which timm computes `resize` again, by `floor(size / share)`."""
    share = size / resize
    while math.floor(size / share) < resize:
        share = math.nextafter(share, 0)
    return share
