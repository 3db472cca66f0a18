"""A frozen encoder, loaded from a run's checkpoint; its config gives the architecture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from selfsup_jax import paths, stored
from selfsup_jax.devices import process
from selfsup_jax.errors import UserError, bad_field, first_line
from selfsup_jax.models import encoders
from selfsup_jax.run import checkpoint_files
from selfsup_jax.run.files import read_json, whole_file, write_json, writing_to
from selfsup_jax.run.identity import upgraded_tree

# The two files of an exported or imported encoder.
ABOUT, VARIABLES = "encoder.json", "encoder.npz"
# Beside them, of an import: the other parts of the state, to train on; see `training/init_from.py`.
TRAINING = "training.npz"
_IMPORT = "; other files are imported first: python -m selfsup_jax.interop import"
_SECTIONS = ("encoder", "views", "data")
# An encoder's variables -> their parts of a run's state.
_OF_RUN = {"params": "params", "batch_stats": "stats"}  # after `online_` or `target_`


class FrozenEncoder(NamedTuple):
    """An encoder at one step of a run.

    Attributes:
        variables: `{"params", "batch_stats"}`, host arrays, float32.
        config: the resolved config of the run that trained it.
        path: of the checkpoint or of the exported encoder.
        run: the run's workdir; None for an exported encoder.
        step: of the checkpoint.
        origin: of an exported or imported encoder: its run, or what was imported, in words.
    """

    variables: Any
    config: dict[str, Any]
    path: str
    run: str | None
    step: int
    origin: str = ""

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation per channel, with which its images are normalised."""
        return tuple(self.config["views"]["mean"]), tuple(self.config["views"]["std"])

    @property
    def described(self) -> str:
        """Where it comes from, in words, without the folders above a run's."""
        run = os.path.basename(os.path.normpath(self.run)) if self.run else "unknown"
        return self.origin or f"run {run}, step {self.step}"

    @property
    def about(self) -> dict[str, Any]:
        """The origin of the encoder, for `config.json` and `results.json`."""
        origin = {"origin": self.origin} if self.origin else {}
        return {
            "checkpoint": self.path,
            "run": self.run,
            "step": self.step,
            "method": self.config.get("method", ""),
            "run_seed": self.config.get("seed", 0),
        } | origin


# ------------------------------------------------------------------------------- finding


checkpoint_steps = checkpoint_files.steps  # of a run


def locate(path: str, step: int | None = None, field: str = "checkpoint") -> tuple[str, int | None]:
    """Resolves a config's `checkpoint` to (run or exported encoder, step).

    Args:
        path: a run's workdir; one of its checkpoints (`WORKDIR/checkpoints/1000`); or a folder
            that `export` wrote.
        step: the step to take from a workdir; None for the newest.
        field: of the config, for messages.

    Returns:
        The folder's absolute path, and the step; None for an exported encoder.

    Raises:
        UserError: there is no such checkpoint or exported encoder.
    """
    if not path:
        raise bad_field(field, path, "must name a run's workdir, or a checkpoint in one")
    root = paths.absolute(os.path.expanduser(path))
    paths.check(root, f"config.{field}")
    parent, name = os.path.split(root)
    if os.path.basename(parent) == "checkpoints" and name.isdigit():
        root, step = os.path.dirname(parent), int(name)
    if not paths.isdir(root):
        hint = _IMPORT * paths.exists(root)
        raise bad_field(field, path, f"is not a directory{hint}")
    if paths.exists(os.path.join(root, ABOUT)):
        return root, None
    if os.path.basename(root) == "checkpoints":
        root = os.path.dirname(root)
    steps = checkpoint_steps(root)
    if not steps:
        hint = f"holds no checkpoint of a run, nor an exported encoder{_IMPORT}"
        raise bad_field(field, path, hint)
    if step is not None and step not in steps:
        available = ", ".join(map(str, steps))
        raise bad_field(field, path, f"there is no checkpoint of step {step}: {available}")
    return root, steps[-1] if step is None else step


# ------------------------------------------------------------------------------- loading


def load(path: str, step: int | None = None) -> FrozenEncoder:
    """Loads an encoder; of a run's state, only the encoder is read.

    Args:
        path, step: see `locate`.

    Raises:
        UserError: it does not exist, cannot be read, or does not match its config.
    """
    root, step = locate(path, step)
    return _load_exported(root) if step is None else _load_step(root, step)


def _load_step(run: str, step: int) -> FrozenEncoder:
    folder = os.path.join(run, "checkpoints", str(step))
    try:
        config = _config_of(folder)
        network = config.get("eval", {}).get("network", "online")
        parts = {name: f"{network}_{part}" for name, part in _OF_RUN.items()}
        wanted = tuple(f"{part}/encoder/" for part in parts.values())
        arrays = checkpoint_files.read(folder, lambda name: name.startswith(wanted))[1]
    except checkpoint_files.Damaged as e:
        others = [other for other in checkpoint_steps(run) if other != step]
        hint = f"; there are also those of steps {', '.join(map(str, others))}" if others else ""
        raise checkpoint_files.Damaged(f"{e}{hint}") from e
    tree = unflatten_dict(arrays, sep="/")
    variables = {name: tree.get(part, {}).get("encoder", {}) for name, part in parts.items()}
    frozen = FrozenEncoder(variables, config, folder, run, step)
    check(frozen)
    return frozen


def _config_of(folder: str) -> dict[str, Any]:
    """The config of the run of a checkpoint."""
    try:
        meta = checkpoint_files.upgraded_meta(checkpoint_files.read_meta(folder))
        return upgraded_tree(meta["config"] | {"data_info": meta["data_info"]})
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"the checkpoint {folder} cannot be read: its meta has no {e}") from e


def check(frozen: FrozenEncoder) -> None:
    """Checks that the variables match the architecture in the config.

    Raises:
        UserError: the config is unusable, or a shape differs; names the first such variable.
    """
    for section in _SECTIONS:
        if section not in frozen.config:
            raise UserError(f"{frozen.path}: its config has no section {section!r}")
    try:
        side = encoders.image_side(frozen.config["encoder"], frozen.variables["params"])
        expected = jax.eval_shape(lambda: untrained(frozen.config, seed=0, side=side))
    except (TypeError, KeyError, ValueError) as e:
        raise UserError(f"{frozen.path}: unknown architecture: {e}") from e
    expected_shapes, actual = (
        {k: tuple(np.shape(v)) for k, v in flatten_dict(tree, sep="/").items()}
        for tree in (expected, frozen.variables)
    )
    for name in sorted(expected_shapes.keys() | actual.keys()):
        if expected_shapes.get(name) != actual.get(name):
            raise UserError(
                f"{frozen.path}: does not match its config: {name} has the shape "
                f"{actual.get(name, 'nothing')}, expected {expected_shapes.get(name, 'nothing')}"
            )


# ------------------------------------------------------------------------------- using


def module(config: dict[str, Any], compute_dtype: str = "") -> nn.Module:
    """The network of a run's config; a given `compute_dtype` replaces the run's.

    Its `apply` takes the variables and normalised images `[B, H, W, 3]`, and returns the
    representation `[B, D]`.
    """
    name = compute_dtype or config.get("compute_dtype", "float32")
    dtype = jnp.dtype(process.compute_dtype(name))
    return encoders.make_encoder(config["encoder"], dtype, trainable=True)


def untrained(config: dict[str, Any], seed: int, side: int | None = None) -> Any:
    """Random initial variables of an encoder with this architecture, drawn from the seed.

    `side`: pixels of the images that it starts on, by default those of the global views.
    """
    views = config["views"].get("global", {})
    side = side or views.get("size") or config["data"]["image_size"]
    images = jnp.zeros((1, side, side, 3))
    variables = jax.jit(module(config, "float32").init)(jax.random.PRNGKey(seed), images)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


# ------------------------------------------------------------------------------- exporting


def export(
    frozen: FrozenEncoder,
    folder: str,
    training: Mapping[str, np.ndarray] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> None:
    """Writes only an encoder: `encoder.json` (config, step) and `encoder.npz` (its arrays).

    Arrays have names such as `params/stem/kernel`. `load` reads the folder like a run.

    Args:
        frozen: the encoder.
        folder: to write to.
        training: of an import: the state's other arrays, as `online_params/projector/...`.
        left_out: of an import: tensors that were not taken, each with the reason.

    Raises:
        UserError: the folder cannot be written to, or has files that are not of an export.
    """
    paths.check(folder, "FOLDER")
    _check_export(folder)
    arrays = {k: np.asarray(v) for k, v in flatten_dict(frozen.variables, sep="/").items()}
    keep = (*_SECTIONS, "eval", "compute_dtype", "method", "seed", "data_info")
    about = {"config": {k: v for k, v in frozen.config.items() if k in keep}, "step": frozen.step}
    about["origin"] = frozen.described
    about |= {"left_out": dict(left_out)} if left_out else {}
    with writing_to(folder):
        paths.makedirs(folder)
        for name, content in ((VARIABLES, arrays), (TRAINING, training)):
            path = os.path.join(folder, name)
            if content:
                with whole_file(path, "wb") as f:
                    np.savez(f, **content)
            elif paths.exists(path):  # of an earlier import
                paths.remove(path)
        write_json(os.path.join(folder, ABOUT), about)  # last: marks the export as complete


def _check_export(folder: str) -> None:
    """Only an earlier export may be replaced; and a run with these files would be taken for one."""
    about = os.path.join(folder, ABOUT)
    ours = paths.exists(about) and {"config", "step"} <= read_json(about).keys()
    if not ours:
        for name in ("config.json", "runs.json", "checkpoints", ABOUT, VARIABLES, TRAINING):
            if paths.exists(os.path.join(folder, name)):
                raise UserError(
                    f"{folder}: has a {name} that is not of an export; choose another folder"
                )


def _load_exported(folder: str) -> FrozenEncoder:
    """Reads an exported encoder, from anywhere: the arrays come last, after all checks."""
    about_file, arrays_file = (os.path.join(folder, name) for name in (ABOUT, VARIABLES))
    try:
        with paths.local_copy(about_file) as path:
            about = stored.read_json(path)
        with paths.local_copy(arrays_file) as path:
            return _read_exported(folder, about, path)
    except UserError:
        raise
    except Exception as e:  # files from elsewhere may hold anything
        reason = first_line(e)[:200]
        raise UserError(f"the exported encoder {folder} cannot be read: {reason}") from e


def _read_exported(folder: str, about: dict[str, Any], path: str) -> FrozenEncoder:
    headers = stored.npz_headers(path)
    for name, header in headers.items():
        if header.dtype.kind != "f":
            raise ValueError(f"{name} is {header.dtype}, not floating-point")
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in headers.items()}
    config = upgraded_tree(about["config"])
    variables = unflatten_dict(shapes, sep="/")
    step, origin = int(about.get("step") or 0), str(about.get("origin", ""))[:200]
    frozen = FrozenEncoder(variables, config, folder, None, step, origin)
    check_config(config)
    check(frozen)
    arrays = {k: _float32(k, v) for k, v in stored.read_npz(path, headers, headers).items()}
    return frozen._replace(variables=unflatten_dict(arrays, sep="/"))


def _float32(name: str, array: np.ndarray) -> np.ndarray:
    """In this machine's byte order; raises `ValueError` if a value is not finite there."""
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has values that are not finite")
    return values


def check_config(config: dict[str, Any]) -> None:
    """Raises `ValueError` if the sections of a config are not what its readers take them for."""
    for section in (*_SECTIONS, "eval"):
        if not isinstance(config.get(section, {}), dict):
            raise ValueError(f"its config's {section!r} is no section")
    for name in ("mean", "std"):
        values = config.get("views", {}).get(name)
        numbers = isinstance(values, list) and len(values) == 3
        numbers = numbers and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
        if not numbers or (name == "std" and min(values) <= 0):
            raise ValueError(f"its config's views.{name} is not three numbers: {values!r:.60}")
