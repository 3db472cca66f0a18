"""Configs by name: `byol:demo`, `configs/byol.py:demo`, `mine.py:preset,field=value`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from selfsup_jax import command_line
from selfsup_jax.errors import UserError

# Beside this package, in a clone as in an installation.
_FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"


def load_config(name: str, /, **fields: Any) -> ConfigDict:
    """The config of a preset, which can be changed.

    Args:
        name: as on the command line: `byol`, `byol:demo`, `byol:imagenet,epochs=300`, or a file of
            your own: `mine.py:preset`.
        fields: values to set; `__` stands for the dot: `data__dir="images"`.

    Raises:
        UserError: there is no such config, preset or field, or a file raises an error.
    """
    config = _made(name)
    with _own_configs() as configs_parsing:
        try:
            for key, value in fields.items():
                configs_parsing.set_field(config, key.replace("__", "."), value)
        except configs_parsing.ConfigError as e:
            raise UserError(e) from e
    return config


def _made(name: str) -> ConfigDict:
    path, _, preset = name.partition(":")
    path = path_of(path) or path
    if not os.path.isfile(path):
        raise UserError(command_line.no_config(name, [f"configs/{known}.py" for known in _names()]))
    with _own_configs() as configs_parsing:
        try:
            get_config = getattr(command_line.load(path), "get_config", None)
            if get_config is None:
                raise UserError(f"{path}: has no function get_config")
            config = get_config(*([preset] if preset else []))
            if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
                made = type(config).__name__
                raise UserError(f"{path}: get_config returns no ConfigDict but {made}")
            configs_parsing.field_names(config)  # an error if it is a part of itself
        except (UserError, configs_parsing.ConfigError) as e:
            raise UserError(e) from e
        except (Exception, SystemExit) as e:
            raise UserError(command_line.raised_by(path, e)) from e
    return config


def path_of(name: str) -> str | None:
    """The file of `byol`, `byol.py` or `configs/byol.py`, wherever one is; None if it is none."""
    if os.path.isfile(name):
        return name
    stem = name.removeprefix("configs/").removesuffix(".py")
    return str(_FOLDER / f"{stem}.py") if stem in _names() else None


class Listed(NamedTuple):
    """A config file, for a list of them.

    Attributes:
        name: `byol`.
        job: of its configs: `pretrain`, `sweep`, or an evaluation.
        title: what it is, a line.
        presets: name -> a line; the default comes first.
    """

    name: str
    job: str
    title: str
    presets: dict[str, str]


def listed() -> list[Listed]:
    """All config files of this project, in the order of their names."""
    entries = []
    with _own_configs() as configs_parsing:
        for name in _names():
            module = importlib.import_module(f"configs.{name}")
            makers: dict[str, Callable] = configs_parsing.presets(module.get_config)
            lines = {preset: _first_line(make) for preset, make in makers.items()}
            entries.append(Listed(name, module.get_config().job, _first_line(module), lines))
    return entries


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").partition("\n")[0]


def _names() -> list[str]:
    names = {path.stem for path in _FOLDER.glob("[a-z]*.py")}
    return sorted(names - set(command_line.SHARED_CONFIGS))


# ------------------------------------------------------------------- the package `configs`


def parsing() -> Any:
    """The module `configs/parsing.py` of this project."""
    with _own_configs() as module:
        return module


_ours: dict[str, types.ModuleType] = {}


@contextlib.contextmanager
def _own_configs() -> Iterator[Any]:
    """Inside, `configs` is this project's package; yields its module `parsing`.

    Many projects have a package of that name, which a caller may have imported, or have first on
    the path: afterwards `configs` is what it was.
    """
    spec = importlib.util.find_spec("configs")
    ours = spec is not None and str(_FOLDER) in map(
        os.path.realpath, spec.submodule_search_locations or ()
    )
    theirs = _imported()
    if not ours:
        _replace(theirs, _ours)
    sys.path.insert(0, str(_FOLDER.parent))
    try:
        yield importlib.import_module("configs.parsing")
    finally:
        sys.path.remove(str(_FOLDER.parent))
        if not ours:
            _ours.update(_imported())
            _replace(_ours, theirs)


def _imported() -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == "configs"]
    return {name: sys.modules[name] for name in names}


def _replace(old: dict[str, types.ModuleType], new: dict[str, types.ModuleType]) -> None:
    for name in old:
        sys.modules.pop(name, None)
    sys.modules.update(new)
