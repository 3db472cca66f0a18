"""The checkpoints of BYOL's authors: Haiku's parameters and states in a pickled named tuple."""

from __future__ import annotations

import functools
import re
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
_DILL = ("dill._dill", "dill.dill")  # with which the authors pickle
_OPTIMIZERS = ("byol.utils.optimizers", "optax._src.transform", "optax._src.base")
_STATES = ("AddWeightDecayState", "ScaleByLarsState", "ScaleState", "EmptyState")
_RECORDS: unpickle.Table = {
    ("byol.byol_experiment", "_ByolExperimentState"): unpickle.Record,
    ("__main__", "_ByolExperimentState"): unpickle.Record,
    **{(module, state): unpickle.Record for module in _OPTIMIZERS for state in _STATES},
}


TABLE: unpickle.Table = {
    **unpickle.PLAIN,
    **{(_HAIKU, name): dict for name in ("FlatMapping", "FlatMap", "frozendict")},
    **_RECORDS,
    **{(module, "_create_namedtuple"): unpickle.named_tuple for module in _DILL},
    **{(module, "_create_array"): unpickle.array for module in _DILL},
}
_MOMENTUM = "lars_momentum"  # named as if it were a network
_NEEDED = ("online_params", "online_state")
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
    values = tree.values if isinstance(tree, unpickle.Record) else ()
    fields = (tree.fields if values else ()) or _FIELDS
    if len(fields) != len(values) or not set(_NEEDED) <= set(fields):
        raise ValueError("is a pickle, but of no checkpoint of BYOL's authors")
    tensors: dict[str, np.ndarray] = {}
    for field, value in zip(fields, values, strict=True):
        _collect(value, field, tensors)
    # Some versions of Haiku number the first two layers.
    return {re.sub(r"(/initial_\w+)_1(?=[:/])", r"\1", name): x for name, x in tensors.items()}


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
    """The online and the target network, and the optimizer's momentum.

    Raises:
        ValueError: it is no ResNet of theirs, or tensors are missing.
    """
    stem = re.compile(r"^online_params:(.*)/~/initial_conv:w$")
    roots = [match[1] for name in tensors if (match := stem.match(name))]
    if not roots:
        raise ValueError("has no ResNet: no tensor /~/initial_conv:w")
    root = roots[0]
    rest = Tensors(_with_momentum(tensors, root))
    rest.refuse("final_batchnorm", "ResNets of version 2 are not known here")
    encoder = _encoder(rest, root)
    arrays: Arrays = {}
    for network in ("online", "target", _MOMENTUM):
        if not any(name.startswith(f"{network}_params:{root}/") for name in rest):
            continue
        layer = functools.partial(_layer, rest, root, network)
        arrays |= encoder_arrays(encoder, layer, network)
        arrays |= _head(rest, "projector", network)
        if network == "target":  # it needs no others
            continue
        arrays |= _head(rest, "predictor", network)
        for theirs, ours in (("w", "kernel"), ("b", "bias")):
            if (name := f"{network}_params:classifier:{theirs}") in rest:
                arrays[f"{network}_params/classifier/output/{ours}"] = rest.take(name)
    rest.leave("^target_(params|state):(predictor|classifier)", "the target network needs none")
    rest.leave("_ema:(hidden|counter)$", "the running average is stored once more, debiased")
    rest.leave("^opt_state", "state of the optimizer")
    rest.leave(":logits", "a layer that is not used")
    rest.refuse("", "no part of a ResNet with projector and predictor")
    options: dict[str, Any] = {"method": "byol", "resize_method": "bicubic"}
    origin = f"BYOL's authors, ResNet-{encoder['depth']} x{encoder['width']:g}"
    return Weights(arrays, config(encoder, **options), origin, rest.left_out)


def _with_momentum(tensors: Mapping[str, np.ndarray], root: str) -> dict[str, np.ndarray]:
    """Names LARS's momentum, which has the structure of the parameters, as if it were a network."""
    stem = re.compile(rf"^(opt_state(?::\d+)+):{re.escape(root)}/~/initial_conv:w$")
    stems = [match[1] for name in tensors if (match := stem.match(name))]
    of = f"{stems[0]}:" if len(stems) == 1 else "no momentum"
    return {
        f"{_MOMENTUM}_params:{name.removeprefix(of)}" if name.startswith(of) else name: array
        for name, array in tensors.items()
    }


def _norm(tensors: Tensors, norm: str, network: str) -> dict[str, np.ndarray]:
    return tensors.norm(names.norm_in_haiku(norm, network), optional=network == _MOMENTUM)


def _layer(
    tensors: Tensors, root: str, network: str, conv: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    module, norm = names.of_haiku(conv, root)
    return tensors.take(f"{network}_params:{module}:w"), _norm(tensors, norm, network)


def _head(tensors: Tensors, part: str, network: str) -> Arrays:
    params = f"{network}_params"
    arrays = norm_arrays(_norm(tensors, f"{part}/batch_norm", network), f"{part}/bn", network)
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
