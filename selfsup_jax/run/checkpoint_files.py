"""The files of one checkpoint: read, and compared with the checksums that were saved with them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import zlib
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from selfsup_jax import __version__, paths
from selfsup_jax.devices import hosts
from selfsup_jax.errors import UserError, first_line
from selfsup_jax.run import library_errors

# The parts of a checkpoint's folder, and the file with the JSON of `meta`.
STATE, META = "state", "meta"
_META_FILE = "metadata"
_CHECKSUMS = "checksums"  # in `meta`: array -> [dtype, shape, CRC-32]
_OWN = "meta"  # among the checksums: that of all other fields of `meta`

Arrays = dict[str, np.ndarray]  # by names such as `online_params/encoder/stem/kernel`


class Damaged(UserError):
    """A checkpoint cannot be read, or is not what was saved."""


def steps(workdir: str) -> list[int]:
    """The sorted steps of a workdir's complete checkpoints, without one that is being written."""
    folder = os.path.join(workdir, "checkpoints")
    return sorted(ocp.utils.checkpoint_steps(folder)) if paths.isdir(folder) else []


def read(folder: str, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Any, Arrays]:
    """Reads and verifies a checkpoint: (its `meta`, its arrays).

    A checkpoint of an earlier version has no checksums: it is only read.

    Args:
        folder: the checkpoint's folder.
        wanted: which arrays to read, by name; all by default.

    Raises:
        Damaged: a file cannot be read, or `meta` or an array is not what was saved.
    """
    library_errors.catch()
    meta = read_meta(folder)
    saved = meta.get(_CHECKSUMS)
    try:
        arrays = _read_arrays(epath.Path(paths.absolute(folder)) / STATE, wanted, saved)
    except Damaged as e:
        raise Damaged(f"the checkpoint {folder} is damaged: {e}") from e
    except Exception as e:  # Orbax, TensorStore and the disk raise many types
        raise _unreadable(folder, e) from e
    return meta, arrays


def read_meta(folder: str) -> dict[str, Any]:
    """Reads and verifies the `meta` of a checkpoint; raises as `read`."""
    try:
        with paths.open(os.path.join(folder, META, _META_FILE), encoding="utf-8") as f:
            meta = json.load(f)
        if not isinstance(meta, dict):
            raise ValueError("its meta is not a JSON object")
    except (OSError, ValueError, RecursionError) as e:
        raise _unreadable(folder, e) from e
    sums = meta.get(_CHECKSUMS)
    if sums is not None and not (isinstance(sums, dict) and sums.get(_OWN) == _of_meta(meta)):
        raise Damaged(f"the checkpoint {folder} is damaged: its meta does not match its checksum")
    return meta


def write_meta(folder: str, meta: Mapping[str, Any]) -> None:
    """Writes the `meta` of a checkpoint."""
    (epath.Path(folder) / _META_FILE).write_text(json.dumps(meta), encoding="utf-8")


def has_checksums(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this `meta` can be verified: not if an earlier version wrote it."""
    return _CHECKSUMS in meta


def with_checksums(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The `meta` of a checkpoint together with the checksums of its arrays and its own."""
    sums = {name: [*_kind(array), _of_array(array)] for name, array in arrays.items()}
    meta = json.loads(json.dumps({**meta, _CHECKSUMS: sums}))  # as it will be read
    return {**meta, _CHECKSUMS: {**sums, _OWN: _of_meta(meta)}}


def upgraded_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's `meta`, with the names of an earlier version replaced by the current ones."""
    return {("data_info" if name == "found" else name): value for name, value in meta.items()}


def versions() -> dict[str, str]:
    """The versions of the packages that affect the exact numbers of a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-cpu", "numpy")
    installed = {"selfsup-jax": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # such as tensorflow in place of tensorflow-cpu
            continue
    return installed


def flat(tree: Any) -> dict[str, Any]:
    """`{"a/b": leaf}` of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _read_arrays(
    state: epath.Path, wanted: Callable[[str], bool], saved: Mapping[str, Any] | None
) -> Arrays:
    reader = ocp.PyTreeCheckpointHandler()
    kinds = {k: v for k, v in flat(reader.metadata(state).tree).items() if hasattr(v, "shape")}
    if saved is not None:
        # Before anything is read: a damaged shape may ask for more memory than there is.
        expected = {name: entry[:2] for name, entry in saved.items() if name != _OWN}
        actual = {name: _kind(kind) for name, kind in kinds.items()}
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                raise Damaged(
                    f"{name} is {actual.get(name, 'missing')}, saved was {expected.get(name)}"
                )
    empty = {k: np.zeros(v.shape, v.dtype) for k, v in kinds.items() if wanted(k)}
    types = {k: ocp.RestoreArgs(restore_type=np.ndarray) for k in empty}
    # Reads host arrays, so that the result does not depend on any device layout.
    args = ocp.args.PyTreeRestore(
        item=unflatten_dict(empty, sep="/"),
        restore_args=unflatten_dict(types, sep="/"),
        partial_restore=True,
    )
    arrays = jax.tree.map(np.asarray, flat(reader.restore(state, args=args)))
    for name in sorted(arrays):
        if saved is not None and _of_array(arrays[name]) != saved[name][2]:
            raise Damaged(f"{name} does not match its checksum")
    return arrays


def _kind(array: Any) -> list[Any]:
    return [np.dtype(array.dtype).name, list(array.shape)]


def _of_array(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _of_meta(meta: Mapping[str, Any]) -> int:
    sums = {k: v for k, v in meta[_CHECKSUMS].items() if k != _OWN}
    return zlib.crc32(json.dumps({**meta, _CHECKSUMS: sums}, sort_keys=True).encode())


def _unreadable(folder: str, e: Exception) -> Damaged:
    return Damaged(f"the checkpoint {folder} cannot be read: {first_line(e)[:200]}")


class MetaHandler(ocp.JsonCheckpointHandler):
    """Writes `meta` with the checksums of the arrays, which it computes in the background."""

    async def async_save(  # noqa: D102
        self, directory: Any, item: Any = None, args: Any = None
    ) -> Any:
        del item

        async def write() -> None:
            if hosts.is_writer():
                meta = with_checksums(args.meta, args.arrays)
                write_meta(os.fspath(directory), meta)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="meta")]


@ocp.args.register_with_handler(MetaHandler, for_save=True, for_restore=True)
@dataclasses.dataclass(repr=False)
class MetaArgs(ocp.args.CheckpointArgs):
    """What `MetaHandler` takes: the `meta`, and the arrays that are saved with it."""

    meta: dict[str, Any]
    arrays: Arrays
