"""Pretraining that starts from weights: those of a run, of an export or of an import."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from selfsup_jax import paths, stored
from selfsup_jax.errors import UserError, bad_field
from selfsup_jax.evaluation import encoder
from selfsup_jax.models import encoders
from selfsup_jax.run import checkpoint_files
from selfsup_jax.state import TrainState

_NETWORKS = ("online_params", "online_stats", "target_params", "target_stats")
_MOMENTUM = "_momentum_params/"  # that an import has, after the name of the optimizer
_DERIVED = ("queue", "queue_index", "centre")  # of the heads' outputs

Arrays = dict[str, np.ndarray]  # by names such as `online_params/encoder/stem/kernel`


class Source(NamedTuple):
    """Weights to start from.

    Attributes:
        path: as given in the config.
        config: of the run, or of the import.
        arrays: the networks' parameters and statistics, and a queue or a centre.
        about: their origin, in words.
    """

    path: str
    config: dict[str, Any]
    arrays: Arrays
    about: str

    @property
    def digest(self) -> str:
        """Of the arrays: hosts, or a second machine, have the same weights if it is equal."""
        code = 0
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            code = zlib.crc32(
                array.reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), code)
            )
        return f"{code:08x}"


class Taken(NamedTuple):
    """What a state has of a source, in words."""

    taken: str
    new: str
    left_out: str


def load(path: str, config: Mapping[str, Any]) -> Source:
    """Reads the weights of `config.init_from`.

    Args:
        path: a run's workdir, one of its checkpoints, an exported or an imported encoder.
        config: of the run that is to start.

    Raises:
        UserError: there is no such source, it cannot be read, or its encoder computes something
            else than that of the config.
    """
    root, step = encoder.locate(path, field="init_from")
    frozen = encoder.load(path)
    if step is None:
        arrays = {
            f"online_{'params' if part == 'params' else 'stats'}/encoder/{name}": array
            for part, tree in frozen.variables.items()
            for name, array in flatten_dict(tree, sep="/").items()
        } | _training(root)
        about = frozen.origin or os.path.basename(root)
    else:
        _, arrays = checkpoint_files.read(frozen.path, _is_wanted)
        about = f"run {os.path.basename(root)}, step {step}"
    _check_encoder(path, frozen.config["encoder"], config["encoder"])
    optimizer = config["optimizer"]
    kind = "none" if optimizer["rate_inside_momentum"] else optimizer["name"]
    own = f"{kind}{_MOMENTUM}"  # in another optimizer it would mean something else
    arrays = {k: v for k, v in arrays.items() if _MOMENTUM not in k or k.startswith(own)}
    return Source(path, frozen.config, arrays, about)


def _is_wanted(name: str) -> bool:
    of_a_network = name.startswith(tuple(f"{part}/" for part in _NETWORKS))
    return of_a_network or _MOMENTUM in name or name in _DERIVED


def _training(folder: str) -> Arrays:
    path = os.path.join(folder, encoder.TRAINING)
    if not paths.exists(path):
        return {}
    try:
        with paths.local_copy(path) as local:
            headers = stored.npz_headers(local)
            return stored.read_npz(local, filter(_is_wanted, headers), headers)
    except (ValueError, OSError) as e:
        raise bad_field("init_from", folder, f"cannot be read: {e}") from e


def _check_encoder(path: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Another padding, say, fits all shapes and computes something else."""
    theirs, ours = encoders.function(theirs), encoders.function(ours)
    differ = [name for name, value in theirs.items() if ours.get(name) != value]
    if differ:
        flags = " ".join(f"--config.encoder.{name}={theirs[name]}" for name in differ)
        has = ", ".join(f"{name} {ours[name]}" for name in differ if name in ours)
        why = f"has another encoder than this run ({has}): add {flags}"
        raise bad_field("init_from", path, why)


def normalization_note(source: Source, views: Any) -> str:
    """A warning if a run normalises its images otherwise than the source did; or ""."""
    theirs, ours = (
        [tuple(float(x) for x in section[name]) for name in ("mean", "std")]
        for section in (source.config["views"], views)
    )
    if theirs == ours:
        return ""
    flags = " ".join(
        f"--config.views.{name}='{value}'"
        for name, value in zip(("mean", "std"), theirs, strict=True)
    )
    return f"WARNING: config.init_from was trained on images normalised otherwise: {flags}"


def begin(state: TrainState, source: Source) -> tuple[TrainState, Taken]:
    """Puts a source's weights into an initial state.

    A part (encoder, projector, ...) is taken as a whole if all of its arrays are there with the
    same shapes, else it stays new. A part of the target network that the source lacks is a copy of
    the online network's. The optimizer is new, but for the momentum of the parts that are taken if
    the source has it; the step and the random keys are always new.

    Args:
        state: before the first step; host arrays.
        source: of `load`.

    Raises:
        UserError: the encoder does not fit.
    """
    fields = {name: flatten_dict(getattr(state, name), sep="/") for name in _NETWORKS}
    taken, new = [], []
    online = {part: _misfit(fields, source.arrays, part, "online") for part in state.online_params}
    if online["encoder"]:
        raise bad_field("init_from", source.path, f"its encoder does not fit: {online['encoder']}")
    for part, why in online.items():
        if why:
            new.append(f"{part} ({why})")
            continue
        _put(fields, source.arrays, part, "online", "online")
        taken.append(part)
    for part in state.target_params:
        if online[part]:
            continue
        own = not _misfit(fields, source.arrays, part, "target")
        _put(fields, source.arrays, part, "target", "target" if own else "online")
        taken.append(f"target {part}" + ("" if own else " (a copy of the online one)"))
    from_heads = online.get("projector") or online.get("prototypes")
    derived, fits = _derived(state, {} if from_heads else source.arrays)
    if derived:
        (taken if fits else new).append(next(iter(derived)))
    opt_state, moving = _with_momentum(state, source.arrays, [x for x in online if not online[x]])
    if moving:
        taken.append("momentum" + ("" if moving == [*online] else f" of {' and '.join(moving)}"))
    left = {name.split("/")[1] for name in source.arrays if name.startswith("online_params/")}
    networks = {name: unflatten_dict(values, sep="/") for name, values in fields.items()}
    new += [] if moving else ["optimizer"]
    told = Taken(", ".join(taken), ", ".join(new), ", ".join(sorted(left - set(taken))))
    return state.replace(**networks, **derived, opt_state=opt_state), told


def _derived(state: TrainState, arrays: Arrays) -> tuple[dict[str, Any], bool]:
    """The state's fields that the heads made, such as a queue; whether they are the source's."""
    own = {name: getattr(state, name) for name in _DERIVED if hasattr(state, name)}
    if any(name not in arrays or arrays[name].shape != x.shape for name, x in own.items()):
        return own, False
    return {name: np.asarray(arrays[name], x.dtype) for name, x in own.items()}, True


def _with_momentum(state: TrainState, arrays: Arrays, parts: list[str]) -> tuple[Any, list[str]]:
    """The optimizer's state with the source's momentum; of which of these parts it has it."""
    params = flatten_dict(state.online_params, sep="/")
    momentum = {k.split(_MOMENTUM)[1]: x for k, x in arrays.items() if _MOMENTUM in k}
    taken: dict[str, np.ndarray] = {}
    for part in parts:
        own = {name: x.shape for name, x in params.items() if name.startswith(f"{part}/")}
        theirs = {name: momentum.get(name) for name in own}
        if all(x is not None and x.shape == own[name] for name, x in theirs.items()):
            taken |= {name: np.asarray(x, params[name].dtype) for name, x in theirs.items()}

    def put(node: Any) -> Any:
        if not isinstance(node, optax.TraceState):
            return node
        trace = flatten_dict(node.trace, sep="/") | taken
        return node._replace(trace=unflatten_dict(trace, sep="/"))

    is_trace = lambda node: isinstance(node, optax.TraceState)  # noqa: E731
    moving = [part for part in parts if any(name.startswith(f"{part}/") for name in taken)]
    return jax.tree.map(put, state.opt_state, is_leaf=is_trace), moving


def _names(
    fields: Mapping[str, Mapping[str, Any]], part: str, network: str
) -> list[tuple[str, str]]:
    """(Field of the state, name in it) of a part's parameters and statistics."""
    sections = (f"{network}_params", f"{network}_stats")
    return [(s, name) for s in sections for name in fields[s] if name.startswith(f"{part}/")]


def _misfit(
    fields: Mapping[str, Mapping[str, Any]], arrays: Arrays, part: str, network: str
) -> str:
    """Why a part of a network cannot be taken from the source; "" if it can."""
    names = _names(fields, part, network)
    wanted = {f"{section}/{name}": fields[section][name].shape for section, name in names}
    own = (f"{network}_params/{part}/", f"{network}_stats/{part}/")
    there = {name: array.shape for name, array in arrays.items() if name.startswith(own)}
    if not there:
        return "not in the source"
    for name in sorted(wanted.keys() | there.keys()):
        shapes = [list(x[name]) if name in x else "nothing" for x in (there, wanted)]
        if shapes[0] != shapes[1]:
            return f"{name.split('/', 2)[2]} is {shapes[0]} in the source, {shapes[1]} here"
    return ""


def _put(
    fields: dict[str, dict[str, Any]], arrays: Arrays, part: str, network: str, of: str
) -> None:
    for section, name in _names(fields, part, network):
        array = arrays[f"{section.replace(network, of)}/{name}"]
        if not np.isfinite(array).all():
            raise UserError(f"config.init_from: {section}/{name} is not finite")
        fields[section][name] = np.asarray(array, fields[section][name].dtype)
