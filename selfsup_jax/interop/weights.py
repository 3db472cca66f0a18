"""What an import gives, and the account of every tensor of its source."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from selfsup_jax.interop import names

# Mean and standard deviation per channel.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# In the metadata of a `.safetensors` file of ours: what `about` returns, as JSON.
METADATA = "selfsup_jax"

Arrays = dict[str, np.ndarray]


class Weights(NamedTuple):
    """Weights of another project, as they are called here.

    Attributes:
        arrays: by their names in a run's state, such as `online_params/encoder/stem/kernel`.
        config: the sections `encoder`, `views` and `data` of a run's config.
        origin: what they are, in words.
        left_out: tensor of the source -> why it is not among the arrays.
    """

    arrays: Arrays
    config: dict[str, Any]
    origin: str
    left_out: dict[str, str]


class Tensors:
    """The tensors of a file: each is taken once, or left out for a reason."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._rest = dict(tensors)
        self.left_out: dict[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._rest)

    def __contains__(self, name: object) -> bool:
        return name in self._rest

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that was not taken yet; raises `ValueError` if there is none."""
        if name not in self._rest:
            raise ValueError(f"has no tensor {name}")
        return self._rest[name].shape

    def take(self, name: str) -> np.ndarray:
        """The tensor, float32; raises `ValueError` if it is missing or is not of finite numbers."""
        self.shape(name)
        array = self._rest.pop(name)
        if array.dtype.kind not in "fV":  # bfloat16 is of kind V
            raise ValueError(f"{name} is {array.dtype}, not floating-point")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")
        return array

    def norm(self, of: Mapping[str, str], *, optional: bool = False) -> dict[str, np.ndarray]:
        """The parts of a batch norm, flat; those that there are, if they are `optional`."""
        there = {part: name for part, name in of.items() if name in self or not optional}
        return {part: self.take(name).reshape(-1) for part, name in there.items()}

    def leave(self, pattern: str, why: str) -> None:
        """Leaves out all tensors whose name contains the regular expression."""
        for name in [name for name in self._rest if re.search(pattern, name)]:
            del self._rest[name]
            self.left_out[name] = why

    def refuse(self, pattern: str, why: str) -> None:
        """Raises `ValueError` if there are such tensors."""
        matching = [name for name in self._rest if re.search(pattern, name)]
        if matching:
            more = f" and {len(matching) - 1} more" if len(matching) > 1 else ""
            raise ValueError(f"has {matching[0]}{more}: {why}")


def chosen_root(roots: Sequence[str], known: Sequence[str], prefix: str | None) -> str:
    """What the names of the encoder's tensors begin with.

    Args:
        roots: of all encoders of a file, at least one.
        known: of the one that is taken of several; empty if it is not known.
        prefix: the one that is asked for; None to choose.

    Raises:
        ValueError: there are several to choose from, or not the one that is asked for.
    """
    if prefix is not None:
        if prefix not in roots:
            there = ", ".join(map(repr, roots))
            raise ValueError(f"has no encoder with the prefix {prefix!r}; there is {there}")
        return prefix
    chosen = known or roots
    if len(chosen) > 1:
        raise ValueError(f"has several encoders: choose one by --prefix: {', '.join(chosen)}")
    return chosen[0]


# `(convolution, here) -> (its kernel [H, W, C, D], {"scale": [D], ...} of its norm)`
Layer = Callable[[str], tuple[np.ndarray, Mapping[str, np.ndarray]]]


def encoder_arrays(encoder: Mapping[str, Any], layer: Layer, network: str = "online") -> Arrays:
    """All layers of a ResNet, of the `online` or the `target` network."""
    arrays: Arrays = {}
    for conv in names.convolutions(encoder):
        kernel, norm = layer(conv)
        arrays[f"{network}_params/encoder/{conv}/kernel"] = np.ascontiguousarray(kernel)
        arrays |= norm_arrays(norm, f"encoder/{conv}_bn", network)
    return arrays


def norm_arrays(norm: Mapping[str, np.ndarray], path: str, network: str) -> Arrays:
    """The parts of a batch norm, in the state's collections."""
    collections = {"params": f"{network}_params", "batch_stats": f"{network}_stats"}
    return {
        f"{collections[names.NORM[part][0]]}/{path}/{part}": array for part, array in norm.items()
    }


def head_names(layers: int) -> list[tuple[str, str]]:
    """(Linear layer, norm after it) of a head here: `hidden`, `hidden_2`, ..., `output`."""
    hidden = [(f"hidden_{i}" if i > 1 else "hidden") for i in range(1, layers)]
    pairs = [(name, name.replace("hidden", "bn")) for name in hidden]
    return [*pairs, ("output", "output_bn")]


def config(
    encoder: Mapping[str, Any],
    *,
    method: str = "",
    normalization: tuple[Iterable[float], Iterable[float]] = IMAGENET,
    size: int = 224,
    resize: int = 256,
    resize_method: str = "bilinear",
    area: tuple[float, float] = (0.08, 1.0),
) -> dict[str, Any]:
    """The sections of a run's config that tell how to use an encoder.

    Args:
        encoder: fields of the encoder that differ from torchvision's.
        method: that trained it, if known.
        normalization: mean and standard deviation per channel.
        size, resize: pixels of the test image, and of its shorter side before the centre crop.
        resize_method: see `data.views.RESIZE_METHODS`.
        area: of the training's crops, which fine-tuning takes over.
    """
    torchvision = {
        **{"width": 1.0, "stem": "imagenet", "padding": "torch", "stage1_projection": False},
        **{"zero_init_gamma": False, "zero_init_basic": True, "kernel_init": "kaiming_fan_out"},
        **{"bn_decay": 0.9, "bn_epsilon": 1e-5, "bn_unbiased_average": True},
    }
    mean, std = ([float(x) for x in values] for values in normalization)
    group = {"count": 1, "size": size, "area": list(area), "aspect": [3 / 4, 4 / 3]}
    data = {"image_size": size, "test_resize": resize, "resize_method": resize_method}
    unknown = dict.fromkeys(("name", "dir", "train_split", "test_split"), "")
    reading = {"labels": "auto", "intensity": "auto", "exif_orientation": True}
    return {
        "method": method,
        "seed": 0,
        "compute_dtype": "float32",
        "encoder": torchvision | dict(encoder),
        "views": {"global": group | {"view_1": {"flip_prob": 0.5}}, "mean": mean, "std": std},
        "data": unknown | reading | data,
    }


def about(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a config that an encoder cannot be used without."""
    return {k: config[k] for k in ("encoder", "views", "data", "method") if k in config}
