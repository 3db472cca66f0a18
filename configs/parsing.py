"""Reads `file.py:preset,field=value`: presets, overrides, and the names of earlier versions."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import re
from collections.abc import Callable

from ml_collections import ConfigDict

# Fields of earlier versions -> their names now.
RENAMED = {
    "augment.view_1": "views.global.view_1",
    "augment.view_2": "views.global.view_2 (view_1 where both views are augmented alike)",
    "augment.mean": "views.mean",
    "augment.std": "views.std",
    "data.crop_area": "views.global.area",
    "data.crop_aspect": "views.global.aspect",
    "flip_prob": "views.global.view_1.flip_prob",
    "inverse_penalties": "C",
    "inverse_penalty": "C",
    "watch": "follow",
    "watch_poll_seconds": "follow_poll_seconds",
    "watch_patience_hours": "follow_patience_hours",
    "order": "only",
    "show": "columns",
    "measures": "metrics",
    "projector.hidden_size": "projector.hidden_sizes, such as (4096,)",
    "predictor.hidden_size": "predictor.hidden_sizes, such as (4096,)",
    "projector.style": "projector.linear_init, .hidden_norm, .output_bias and .output_norm",
}
# Fields of other jobs -> what this one has.
_OF_OTHER_JOBS = {
    "checkpoint": "evaluation jobs have it; pretraining starts from weights by config.init_from",
}
RENAMED_PRESETS = {"hundredth": "1pct", "tenth": "10pct", "all": "100pct"}


class ConfigError(ValueError):
    """The preset or a field in `file.py:preset,field=value` is not valid."""


_ALL = object()  # in place of a preset's name: the presets themselves


def presets(get_config: Callable) -> dict[str, Callable[..., ConfigDict]]:
    """The presets of a config file, by name; the default comes first."""
    return get_config(_ALL)


def parse(
    arg: str | None, /, *functions: Callable[..., ConfigDict], **named: Callable[..., ConfigDict]
) -> ConfigDict:
    """Makes the config of `preset,field=value,...`; the first preset is the default.

    Parameters of the preset's function are passed to it, such as `epochs=300` if the recipe depends
    on the length; other fields (nested ones with dots) are set in the resulting config.

    Args:
        arg: the text after `file.py:` on the command line.
        functions: presets that have the names of their functions.
        named: presets that have other names.

    Raises:
        ConfigError: a preset or field is unknown; the message has the nearest valid names.
    """
    presets = {function.__name__: function for function in functions} | named
    if arg is _ALL:
        return presets
    outside_brackets = r",(?![^(]*\))"
    parts = [part.strip() for part in re.split(outside_brackets, arg or "") if part.strip()]
    name = parts.pop(0) if parts and "=" not in parts[0] else next(iter(presets))
    if name not in presets and name in RENAMED_PRESETS:
        raise ConfigError(f"unknown preset {name!r}: it is now {RENAMED_PRESETS[name]}")
    if name not in presets:
        raise ConfigError(f"unknown preset {name!r}; did you mean: {_nearest(name, presets)}?")
    fields = {}
    for part in parts:
        key, separator, text = part.partition("=")
        if not separator:
            raise ConfigError(f"{part!r} is not field=value; presets come first: {name},{part}=...")
        fields[key.strip()] = _literal(text.strip())
    make = presets[name]
    epochs = fields.get("epochs", 1)  # recipes depend on it
    if not isinstance(epochs, int | float) or not 0 <= epochs <= 1e12:
        raise ConfigError(f"config.epochs={epochs!r}: must be a number, not negative")
    taken = set(inspect.signature(make).parameters) & set(fields)
    config = make(**{key: fields.pop(key) for key in taken})
    for key, value in fields.items():
        set_field(config, key, value)
    return config


def set_field(config: ConfigDict, key: str, value: object) -> None:
    """`config.a.b = value` for the key `a.b`, which must exist.

    In a sweep, a field that the sweep itself does not have is set in each variant that has it,
    except for the seed.
    """
    if "variants" in config and key.partition(".")[0] not in config:
        runs = [run for run in config.variants.values() if key != "seed" and has(run, key)]
        for run in runs:
            set_field(run, key, value)
        if runs:
            return
        _check_renamed(key)
        own = set(config) - {"variants", "published"}
        names = {name for run in config.variants.values() for name in field_names(run)}
        near = _nearest(key, (names | own) - {"seed"})
        raise ConfigError(f"unknown field config.{key}; did you mean: {near}?")
    check_field(config, key)
    if key not in field_names(config):
        raise ConfigError(f"config.{key}: is a section; give its fields, as {key}.NAME=value")
    *sections, leaf = key.split(".")
    section = functools.reduce(ConfigDict.__getitem__, sections, config)
    try:
        section[leaf] = value
    except TypeError as e:
        kind = section.get_type(leaf).__name__
        raise ConfigError(f"config.{key}={value!r}: must be of type {kind}") from e


def check_field(config: ConfigDict, key: str) -> None:
    """Raises `ConfigError` with the nearest field names if the config has no field `key`."""
    if not has(config, key):
        _check_renamed(key)
        near = _nearest(key, _alike(key, field_names(config)))
        raise ConfigError(f"unknown field config.{key}; did you mean: {near}?")


def _alike(key: str, names: list[str]) -> list[str]:
    """Without the fields of other variants than the key's: there may be thousands."""
    variants = {name.split(".")[1]: None for name in names if name.startswith("variants.")}
    own = key.split(".")[1] if key.count(".") else ""
    near = [own] if own in variants else difflib.get_close_matches(own, variants, n=1, cutoff=0)
    others = tuple(f"variants.{variant}." for variant in variants if variant not in near)
    return [name for name in names if not name.startswith(others)]


def _check_renamed(key: str) -> None:
    if key in _OF_OTHER_JOBS:
        raise ConfigError(f"unknown field config.{key}: {_OF_OTHER_JOBS[key]}")
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            name, space, hint = new.partition(" ")
            name += key.removeprefix(old)
            raise ConfigError(f"unknown field config.{key}: it is now {name}{space}{hint}")


def has(config: ConfigDict, key: str) -> bool:
    """Whether the config has such a field or section."""
    return any(f"{name}.".startswith(f"{key}.") for name in field_names(config)) and bool(key)


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted names of all fields."""
    names = []
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            names += field_names(value, f"{prefix}{key}.")
        else:
            names.append(prefix + key)
    return names


def _nearest(name: str, choices) -> str:
    leaf = {choice.rpartition(".")[2]: choice for choice in choices}
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    close += [leaf[m] for m in difflib.get_close_matches(name.rpartition(".")[2], leaf, n=3)]
    top = {choice.partition(".")[0] for choice in choices}
    return ", ".join(dict.fromkeys(close)) or ", ".join(sorted(top))


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
