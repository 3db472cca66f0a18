"""The checkpoints of SimCLR's authors, by their code for TensorFlow 1 (v1, v2) and 2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfsup_jax.interop import names
from selfsup_jax.interop.weights import (
    NONE,
    Arrays,
    Tensors,
    Weights,
    config,
    encoder_arrays,
    head_names,
    norm_arrays,
)

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# The first convolution of each kind of checkpoint.
_FIRST = ("base_model/conv2d/kernel", "resnet_model/initial_conv_relu_max_pool/0/conv2d/kernel")


def weights(tensors: Mapping[str, np.ndarray]) -> Weights:
    """The encoder, the projector and, where there is one, the linear classifier.

    Raises:
        ValueError: it is another kind of checkpoint, a ResNet of another kind, or tensors are
            missing.
    """
    rest = Tensors({name.removesuffix(_VALUE): array for name, array in tensors.items()})
    firsts = [name for name in rest if name.endswith(_FIRST)]
    if not firsts:
        raise ValueError(f"is of no SimCLR: it has neither {_FIRST[0]} nor {_FIRST[1]}")
    first = min(firsts, key=len)  # an optimizer's slots have longer names
    keras = first.endswith(_FIRST[1])
    root = first.removesuffix(_FIRST[1] if keras else _FIRST[0])
    slots = r"(/|_)(Momentum|LARSOptimizer|m|v|ExponentialMovingAverage|\.OPTIMIZER_SLOT.*)$"
    rest.leave(slots, "state of the optimizer")
    rest.leave(r"(^|/)(global_step|save_counter|iter|learning_rate|momentum|decay)$", "a count")
    find = _Keras(rest, root) if keras else _Graph(rest, root)
    encoder = find.encoder()
    arrays = encoder_arrays(encoder, find.layer)
    arrays |= find.projector()
    head = find.classifier()
    if f"{head}/kernel" in rest:
        for part in ("kernel", "bias"):
            arrays[f"online_params/classifier/output/{part}"] = rest.take(f"{head}/{part}")
    rest.leave(r"(^|/)optimizer/", "state of the optimizer")
    rest.refuse("", "no part of a plain ResNet with a projector: selective kernels?")
    options: dict[str, Any] = {"normalization": NONE, "resize_method": "bicubic"}
    origin = f"SimCLR's authors, ResNet-{encoder['depth']} x{encoder['width']:g}"
    return Weights(arrays, config(encoder, method="simclr", **options), origin, rest.left_out)


def _fields(depth: int, kernel_shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "depth": depth,
        "width": kernel_shape[-1] / 64,
        "stem": "imagenet" if kernel_shape[0] == 7 else "cifar",
        "padding": "fixed",
        "stage1_projection": True,
        "zero_init_gamma": True,
        "zero_init_basic": True,
        "kernel_init": "lecun",
        "bn_unbiased_average": False,
    }


class _Graph:
    """A checkpoint of a graph: layers are numbered in the order in which they were made."""

    def __init__(self, tensors: Tensors, root: str):
        self._tensors, self._root = tensors, root

    def encoder(self) -> dict[str, Any]:
        pattern = rf"^{re.escape(self._root)}base_model/conv2d(_\d+)?/kernel$"
        count = len([name for name in self._tensors if re.search(pattern, name)])
        stem = self._tensors.shape(f"{self._root}{_FIRST[0]}")
        for depth in names.STAGES:
            fields = _fields(depth, stem)
            convolutions = list(names.convolutions(fields))
            if len(convolutions) == count and self._sizes(convolutions) == self._expected(fields):
                self._order = {conv: i for i, conv in enumerate(convolutions)}
                return fields
        raise ValueError(f"has {count} convolutions, as no plain ResNet: selective kernels?")

    def _sizes(self, convolutions: list[str]) -> list[int]:
        there = [
            f"{self._root}{names.of_simclr_tf1(i)[0]}/kernel" for i in range(len(convolutions))
        ]
        return [self._tensors.shape(name)[0] for name in there]

    @staticmethod
    def _expected(fields: Mapping[str, Any]) -> list[int]:
        bottleneck = names.STAGES[fields["depth"]][1]
        pointwise = ("shortcut", "conv1", "conv3") if bottleneck else ("shortcut",)
        stem = 7 if fields["stem"] == "imagenet" else 3
        rest = (
            1 if conv.endswith(pointwise) else 3 for conv in list(names.convolutions(fields))[1:]
        )
        return [stem, *rest]

    def layer(self, conv: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        weight, norm = names.of_simclr_tf1(self._order[conv])
        norm_tensors = self._tensors.norm(names.norm_in_tensorflow(f"{self._root}{norm}"))
        return self._tensors.take(f"{self._root}{weight}/kernel"), norm_tensors

    def projector(self) -> Arrays:
        root = f"{self._root}head_contrastive/nl_"
        return _projector(self._tensors, root, "dense", "batch_normalization")

    def classifier(self) -> str:
        return f"{self._root}head_supervised/linear_layer/dense"


class _Keras:
    """A checkpoint of objects: layers have the names of the attributes that hold them."""

    def __init__(self, tensors: Tensors, root: str):
        self._tensors, self._root = tensors, root

    def encoder(self) -> dict[str, Any]:
        there = list(self._tensors)
        counts = names.counts_in(there, r"resnet_model/block_groups/(\d)/layers/(\d+)/")
        self._bottleneck = any("/conv_relu_dropblock_layers/" in name for name in there)
        depth = names.depth_of({k + 1: n for k, n in counts.items()}, self._bottleneck)
        return _fields(depth, self._tensors.shape(f"{self._root}{_FIRST[1]}"))

    def layer(self, conv: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        weight, norm = names.of_simclr_tf2(conv, self._bottleneck)
        root = f"{self._root}resnet_model/"
        norm_tensors = self._tensors.norm(names.norm_in_tensorflow(f"{root}{norm}"))
        return self._tensors.take(f"{root}{weight}/kernel"), norm_tensors

    def projector(self) -> Arrays:
        root = f"{self._root}_projection_head/linear_layers/"
        return _projector(self._tensors, root, "dense", "bn_relu/bn")

    def classifier(self) -> str:
        return f"{self._root}supervised_head/linear_layer/dense"


def _projector(tensors: Tensors, root: str, dense: str, norm: str) -> Arrays:
    pattern = rf"^{re.escape(root)}(\d+)/{dense}/kernel$"
    count = len([name for name in tensors if re.search(pattern, name)])
    arrays: Arrays = {}
    for i, (ours, ours_norm) in enumerate(head_names(count) if count else []):
        arrays[f"online_params/projector/{ours}/kernel"] = tensors.take(f"{root}{i}/{dense}/kernel")
        # The last norm has no offset.
        norm_tensors = tensors.norm(names.norm_in_tensorflow(f"{root}{i}/{norm}"), optional=True)
        arrays |= norm_arrays(norm_tensors, f"projector/{ours_norm}", "online")
    return arrays
