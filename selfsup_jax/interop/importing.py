"""Imports other projects' checkpoints: finds out what a file is; runs nothing that is in it."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from flax.traverse_util import unflatten_dict

from selfsup_jax import stored
from selfsup_jax.data.views import SIZE
from selfsup_jax.errors import UserError, first_line, some_of
from selfsup_jax.evaluation import encoder
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.interop import from_byol, from_simclr, from_torch, from_vit, torch_files
from selfsup_jax.interop.weights import METADATA, Weights
from selfsup_jax.models import encoders
from selfsup_jax.run.identity import upgraded_tree

# Beside an export's weights: how to prepare images for it.
PREPROCESSING = "preprocessing.json"
_ENCODER = {"online_params/encoder/": "params/", "online_stats/encoder/": "batch_stats/"}
_FILES = ("model.safetensors", "model.pth", "pytorch_model.bin")


def read(source: str, prefix: str | None = None, **images: Any) -> tuple[FrozenEncoder, Weights]:
    """Reads a checkpoint of another project.

    Args:
        source: a file of PyTorch's (`.pth`, `.pth.tar`), `.safetensors`, `.pkl` (BYOL's authors) or
            TensorFlow's (its path without `.index`); or a folder that has one.
        prefix: of the encoder's names, where a file has several encoders.
        images: `mean`, `std`, `image_size`, `test_resize`, `resize_method`, if they are not those
            of the published evaluation; None for these.

    Returns:
        The encoder, whose arrays fit its architecture; and all that was read.

    Raises:
        UserError: the source is missing, is truncated or damaged, is of another kind or has
            another architecture, or names a class that is not read. Nothing in it was run.
    """
    images = {name: value for name, value in images.items() if value is not None}
    _check_images(images)
    path = _find(os.path.expanduser(source))
    try:
        weights = _read(path, prefix)
        _set_images(weights.config, _beside(path) | images)
    except ValueError as e:
        raise UserError(f"{source}: {e}") from e
    except Exception as e:  # a file from elsewhere may hold anything
        reason = (str(e).splitlines() or [""])[0][:100]
        raise UserError(f"{source}: is truncated or damaged: {type(e).__name__} {reason}") from e
    arrays = {
        new + name.removeprefix(old): array
        for name, array in weights.arrays.items()
        for old, new in _ENCODER.items()
        if name.startswith(old)
    }
    origin = f"{weights.origin} ({os.path.basename(os.path.normpath(path))})"
    variables = unflatten_dict(arrays, sep="/")
    try:
        encoder.check_config(weights.config)
        frozen = FrozenEncoder(variables, weights.config, source, None, 0, origin)
        encoder.check(frozen)
    except ValueError as e:
        what = f"is not as its names say ({weights.origin})"
        raise UserError(f"{source}: {what}: {str(e).removeprefix(f'{source}: ')}") from e
    return frozen, weights


def save(frozen: FrozenEncoder, weights: Weights, folder: str) -> None:
    """Writes an import as a checkpoint that every job takes as `config.checkpoint`.

    Raises:
        UserError: the folder cannot be written to, or has files that are not of an import.
    """
    training = {k: v for k, v in weights.arrays.items() if not k.startswith(tuple(_ENCODER))}
    encoder.export(frozen, folder, training, weights.left_out)


def _find(source: str) -> str:
    """The file to read, or the common beginning of the files of a TensorFlow checkpoint."""
    if os.path.isfile(f"{source}.index"):
        return source
    if os.path.isfile(source):
        return source.removesuffix(".index")
    if not os.path.isdir(source):
        hint = ": copy it to this machine first" * ("://" in source)
        raise UserError(f"{source}: there is no such file{hint}")
    if any(os.path.exists(os.path.join(source, name)) for name in (encoder.ABOUT, "checkpoints")):
        raise UserError(f"{source}: is a checkpoint already; use it as config.checkpoint")
    if file := file_in(source):
        return file
    indices = [name for name in sorted(os.listdir(source)) if name.endswith(".index")]
    if len(indices) == 1:
        return os.path.join(source, indices[0].removesuffix(".index"))
    several = f"; it has {', '.join(indices)}: name one" if indices else ""
    raise UserError(f"{source}: holds no {', '.join(_FILES)} nor one *.index{several}")


def file_in(folder: str) -> str:
    """The weights in a folder of timm's, of the Hugging Face hub or of an export; or ""."""
    paths = (os.path.join(folder, name) for name in _FILES)
    return next(filter(os.path.isfile, paths), "")


def _check_images(images: Mapping[str, Any]) -> None:
    """Checks what is given about the images; the message has the option's name."""
    for name, value in images.items():
        if name in ("mean", "std"):
            numbers = len(value) == 3 and all(map(math.isfinite, value))
            fits = numbers and (name == "mean" or min(value) > 0)
            why = "" if fits else "must be three numbers" + " above 0" * (name == "std")
        else:
            why = "" if name == "resize_method" else SIZE(value)
        if why:
            raise UserError(f"--{name.removeprefix('test_')}={value}: {why}")


def _read(path: str, prefix: str | None) -> Weights:
    if os.path.isfile(f"{path}.index"):
        from selfsup_jax.data import tensorflow_variables  # imports TensorFlow

        return from_simclr.weights(tensorflow_variables.read(path))
    with open(path, "rb") as f:
        head = f.read(16)
    if torch_files.is_zip(path) or torch_files.is_legacy(path):
        return _of_torch(torch_files.names_of(_mapping(torch_files.read(path))), prefix)
    if head[8:9] == b"{":
        tensors, metadata = _safetensors(path)
        if METADATA in metadata:
            return _ours(tensors, metadata[METADATA])
        return _of_torch(tensors, prefix)
    if head[:1] == b"\x80":
        with open(path, "rb") as f:
            return from_byol.weights(from_byol.read(f))
    if not head:
        raise ValueError("is empty")
    if head[:4] == b"PK\x03\x04":
        is_whole = zipfile.is_zipfile(path)
        raise ValueError("is a zip, but none of PyTorch's" if is_whole else "is truncated")
    kinds = "PyTorch, safetensors, a pickle of BYOL's authors, TensorFlow"
    raise ValueError(f"is of no known kind ({kinds}), or its beginning is missing")


def _of_torch(tensors: Mapping[str, np.ndarray], prefix: str | None) -> Weights:
    kind = from_vit if from_vit.there(tensors) else from_torch
    return kind.weights(tensors, prefix)


def _mapping(tree: Any) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise ValueError(f"holds no dictionary of tensors but {type(tree).__name__}")
    return tree


def _ours(tensors: Mapping[str, np.ndarray], metadata: str) -> Weights:
    """An export of ours, which has the names that `encoder.npz` has too."""
    parts = {new: old for old, new in _ENCODER.items()}
    try:
        config = upgraded_tree(json.loads(metadata))
        named = {name.partition("/"): array for name, array in tensors.items()}
        arrays = {f"{parts[part + '/']}{rest}": array for (part, _, rest), array in named.items()}
        return Weights(arrays, config, encoders.describe(config["encoder"]), {})
    except Exception as e:  # a file from elsewhere may hold anything
        raise ValueError(f"is no export: {first_line(e)[:100]}") from e


def _safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors, and the file's metadata."""
    try:
        with safetensors.safe_open(path, framework="numpy") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no mapping
            return tensors, f.metadata() or {}
    except (safetensors.SafetensorError, TypeError, KeyError) as e:
        raise ValueError(f"is truncated or damaged, or not of float numbers: {e}") from e


def _beside(path: str) -> dict[str, Any]:
    """How images are prepared, from an export's `preprocessing.json` or timm's `config.json`."""
    folder = os.path.dirname(path)
    ours, timms = (os.path.join(folder, name) for name in (PREPROCESSING, "config.json"))
    if os.path.isfile(ours):
        return stored.read_json(ours)
    if not os.path.isfile(timms):
        return {}
    config = stored.read_json(timms).get("pretrained_cfg")
    if not isinstance(config, dict):
        return {}
    images = {k: config[k] for k in ("mean", "std") if k in config}
    if "interpolation" in config:
        images["resize_method"] = config["interpolation"]
    if "input_size" in config:
        size = images["image_size"] = config["input_size"][-1]
        if "crop_pct" in config:
            images["test_resize"] = round(size / config["crop_pct"])
    return images


def _set_images(config: dict[str, Any], images: Mapping[str, Any]) -> None:
    for section, names in (
        ("views", ("mean", "std")),
        ("data", ("image_size", "test_resize", "resize_method")),
    ):
        for name in names:
            if name in images:
                value = images[name]
                config[section][name] = list(value) if section == "views" else value
    data, views = config["data"], config["views"]
    views["global"]["size"] = data["image_size"]
    data["test_resize"] = max(data["test_resize"], data["image_size"])
    json.dumps(config)  # raises if it has values of another kind


def described(frozen: FrozenEncoder, weights: Weights) -> list[str]:
    """What was read, what it is for, and what was left out: lines for people."""
    data, views = frozen.config["data"], frozen.config["views"]
    parts: dict[str, int] = {}
    for name in weights.arrays:
        part = "/".join(name.split("/")[:2]).replace("_params/", " ").replace("_stats/", " ")
        parts[part] = parts.get(part, 0) + 1
    reasons: dict[str, list[str]] = {}
    for name, why in weights.left_out.items():
        reasons.setdefault(why, []).append(name)
    count = sum(x.size for x in jax.tree.leaves(frozen.variables["params"]))
    taken = ", ".join(f"{part} ({number})" for part, number in parts.items())
    fields = frozen.config["encoder"]
    padding = "" if encoders.is_vit(fields) else f", padding {fields['padding']}"
    lines = [
        f"{frozen.origin}: {count:,} parameters{padding}",
        f"images: {data['resize_method']} to {data['test_resize']} px, the centre "
        f"{data['image_size']} px, mean {tuple(views['mean'])}, deviation {tuple(views['std'])}",
        f"tensors taken: {taken}",
    ]
    for why, names in reasons.items():
        lines.append(f"left out ({len(names)}): {some_of(names)}: {why}")
    return lines
