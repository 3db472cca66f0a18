"""The checkpoints of BYOL's authors: Haiku's parameters and states in a pickled named tuple."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

import numpy as np

from selfsup_jax.interop import names, unpickle
from selfsup_jax.interop.weights import (
    Arrays,
    Tensors,
    Weights,
    config,
    encoder_arrays,
    norm_arrays,
)

_HAIKU = "haiku._src.data_structures"
_OPTIMIZERS = ("byol.utils.optimizers", "optax._src.transform", "optax._src.base")
_STATES = ("AddWeightDecayState", "ScaleByLarsState", "ScaleState", "EmptyState")
_RECORDS: unpickle.Table = {
    ("byol.byol_experiment", "_ByolExperimentState"): unpickle.Record,
    ("__main__", "_ByolExperimentState"): unpickle.Record,
    **{(module, state): unpickle.Record for module in _OPTIMIZERS for state in _STATES},
}


def _named_tuple(name: str, fields: Any, module: str, *_: Any) -> type:
    """What dill, with which the authors pickle, calls to make a class of named tuples again."""
    if (module, name) not in _RECORDS:
        raise unpickle.Refused(f"names {module}.{name}, which is not read: it could be a program")
    return unpickle.Record


TABLE: unpickle.Table = {
    **unpickle.PLAIN,
    **{(_HAIKU, name): dict for name in ("FlatMapping", "FlatMap", "frozendict")},
    **_RECORDS,
    **{(module, "_create_namedtuple"): _named_tuple for module in ("dill._dill", "dill.dill")},
    **{(module, "_create_array"): unpickle.array for module in ("dill._dill", "dill.dill")},
}
_FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")
# Layers of the projector and the predictor: theirs -> ours.
_LINEAR = {"linear": "hidden", "linear_1": "output"}


def read(file: IO[bytes]) -> dict[str, np.ndarray]:
    """The tensors of a pickle, as `online_params:res_net50/~/initial_conv:w`.

    Raises:
        ValueError: it is no such pickle, is damaged, or names something that is not read.
    """
    tree = unpickle.load(file, TABLE)
    if isinstance(tree, Mapping):
        tree = tree.get("experiment_state", tree)
    if not isinstance(tree, unpickle.Record) or len(tree.values) != len(_FIELDS):
        raise ValueError("is a pickle, but of no checkpoint of BYOL's authors")
    tensors: dict[str, np.ndarray] = {}
    for field, value in zip(_FIELDS, tree.values, strict=True):
        _collect(value, field, tensors)
    return tensors


def _collect(node: Any, name: str, into: dict[str, np.ndarray]) -> None:
    if isinstance(node, unpickle.Array):
        into[name] = node.array
    elif isinstance(node, Mapping):
        for key, value in node.items():
            _collect(value, f"{name}:{key}", into)
    elif isinstance(node, unpickle.Record | list | tuple):
        values = node.values if isinstance(node, unpickle.Record) else node
        for i, value in enumerate(values):
            _collect(value, f"{name}:{i}", into)


def weights(tensors: Mapping[str, np.ndarray]) -> Weights:
    """The online and the target network.

    Raises:
        ValueError: it is no ResNet of theirs, or tensors are missing.
    """
    rest = Tensors(tensors)
    roots = [name for name in rest if name.endswith("/~/initial_conv:w")]
    roots = [name.split(":")[1].removesuffix("/~/initial_conv") for name in roots]
    if not roots:
        raise ValueError("has no ResNet: no tensor /~/initial_conv:w")
    root = roots[0]
    rest.refuse("final_batchnorm", "ResNets of version 2 are not known here")
    encoder = _encoder(rest, root)
    arrays: Arrays = {}
    for network in ("online", "target"):
        if not any(name.startswith(f"{network}_params:{root}/") for name in rest):
            continue
        layer = _Layers(rest, root, network)
        arrays |= encoder_arrays(encoder, layer, network)
        for part in ("projector", "predictor") if network == "online" else ("projector",):
            arrays |= _head(rest, part, network)
    for theirs, ours in (("w", "kernel"), ("b", "bias")):
        if (name := f"online_params:classifier:{theirs}") in rest:
            arrays[f"online_params/classifier/output/{ours}"] = rest.take(name)
    rest.leave("^target_(params|state):(predictor|classifier)", "the target network needs none")
    rest.leave("_ema:(hidden|counter)$", "the running average is stored once more, debiased")
    rest.leave("^opt_state", "state of the optimizer")
    rest.leave(":logits", "a layer that is not used")
    rest.refuse("", "no part of a ResNet with projector and predictor")
    options: dict[str, Any] = {"method": "byol", "resize_method": "bicubic"}
    origin = f"BYOL's authors, ResNet-{encoder['depth']} x{encoder['width']:g}"
    return Weights(arrays, config(encoder, **options), origin, rest.left_out)


class _Layers:
    """The layers of one network's encoder."""

    def __init__(self, tensors: Tensors, root: str, network: str):
        self._tensors, self._root, self._network = tensors, root, network

    def __call__(self, conv: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        module, norm = names.of_haiku(conv, self._root)
        kernel = self._tensors.take(f"{self._network}_params:{module}:w")
        return kernel, self._tensors.norm(names.norm_in_haiku(norm, self._network))


def _head(tensors: Tensors, part: str, network: str) -> Arrays:
    params = f"{network}_params"
    norm = tensors.norm(names.norm_in_haiku(f"{part}/batch_norm", network))
    arrays = norm_arrays(norm, f"{part}/bn", network)
    for theirs, ours in _LINEAR.items():
        name = f"{params}:{part}/{theirs}"
        arrays[f"{params}/{part}/{ours}/kernel"] = tensors.take(f"{name}:w")
        if f"{name}:b" in tensors:
            arrays[f"{params}/{part}/{ours}/bias"] = tensors.take(f"{name}:b")
    return arrays


def _encoder(tensors: Tensors, root: str) -> dict[str, Any]:
    counts = names.counts_in(list(tensors), r"online_params:.*block_group_(\d)/~/block_(\d+)/")
    block = f"online_params:{root}/~/block_group_0/~/block_0/~"
    bottleneck = f"{block}/conv_2:w" in tensors
    shape = tensors.shape(f"online_params:{root}/~/initial_conv:w")
    return {
        "depth": names.depth_of({stage + 1: n for stage, n in counts.items()}, bottleneck),
        "width": shape[-1] / 64,
        "padding": "same",
        "stage1_projection": not bottleneck and f"{block}/shortcut_conv:w" in tensors,
        "zero_init_gamma": True,
        "zero_init_basic": False,
        "kernel_init": "haiku",
        "bn_unbiased_average": False,
    }
