"""What must be equal on all hosts of a job before it starts: config, code, package versions."""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
from typing import Any

from ml_collections import ConfigDict

import selfsup_jax
from selfsup_jax.run import checkpoint_files, identity

# Paths may differ from host to host; what is read there is compared by itself.
_PATHS = ("data.dir", "checkpoint", "init_from", "publish_dir")


def facts(config: ConfigDict, **flags: Any) -> dict[str, Any]:
    """The config's fields except for paths, the code's hash, versions, and the given flags."""
    fields = identity.flat(config)
    methods = {str(v) for k, v in fields.items() if k == "method" or k.endswith(".method")}
    versions = {f"version of {name}": value for name, value in checkpoint_files.versions().items()}
    given = {f"--{name}": value for name, value in flags.items()}
    return config_facts(config) | {"code": code_hash(methods)} | versions | given


def config_facts(config: ConfigDict) -> dict[str, Any]:
    """`config.FIELD` -> value, for all fields that are no paths."""
    return {
        f"config.{name}": value
        for name, value in identity.flat(config).items()
        if not any(f".{name}".endswith(f".{path}") for path in _PATHS)
    }


def code_hash(methods: set[str]) -> str:
    """A short hash of the source of this library and of the methods' packages."""
    specs = [importlib.util.find_spec(f"{name}_jax") for name in sorted(methods) if name]
    origins = [selfsup_jax.__file__, *(spec.origin for spec in specs if spec and spec.origin)]
    digest = hashlib.sha256()
    for origin in origins:
        package = pathlib.Path(str(origin)).parent
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
