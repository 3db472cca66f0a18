"""Command lines for tests: parsed and checked in this process, as `run_experiment.py` does it."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator

from absl.testing import flagsaver
from conftest import REPOSITORY
from ml_collections import ConfigDict

import run_experiment
from configs import parsing
from selfsup_jax import build, config


def check(*argv: str) -> None:
    """What happens before any device or data is touched; raises `UserError`."""
    saved, before = flagsaver.save_flag_values(), sys.argv
    try:
        run_experiment.read_flags(["run_experiment.py", "--workdir=unused", *argv])
        check_config(run_experiment._CONFIG.value)
    finally:
        sys.argv = before
        flagsaver.restore_flag_values(saved)


def check_config(given: ConfigDict) -> None:
    """The checks of a config, with those of its method; raises `UserError`."""
    config.check_fields(given)
    if given.job == "pretrain":
        resolved = given.copy_and_resolve_references()
        config.validate(resolved, build.find(resolved.method))


@functools.cache
def presets() -> dict[str, tuple[str, ...]]:
    """`configs/FILE.py` -> its presets, the default one first."""
    found = {}
    for path in sorted((REPOSITORY / "configs").glob("[a-z]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        if hasattr(module, "get_config"):
            found[f"configs/{path.name}"] = tuple(_names(module))
    return found


def _names(module) -> Iterator[str]:
    parse = parsing.parse
    try:
        parsing.parse = lambda arg, *functions, **named: [f.__name__ for f in functions] + [*named]
        yield from module.get_config()
    finally:
        parsing.parse = parse


@functools.cache
def config_of(path: str, preset: str) -> ConfigDict:
    """The config of a preset; not to be changed."""
    return importlib.import_module(f"configs.{path[8:-3]}").get_config(preset)
