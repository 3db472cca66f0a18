"""Reads the files of a workdir; broken parts are left out and noted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import numpy as np

from selfsup_jax import paths, stored
from selfsup_jax.errors import some_of
from selfsup_jax.run.tags import WALL_TIME
from selfsup_jax.viz.titles import finite

History = dict[str, tuple[list[int], list[float]]]  # quantity -> (steps, values)


@dataclasses.dataclass
class Confusion:
    """`matrix` int64 `[C, C]`: rows are true classes, columns predictions; `names` of all C."""

    matrix: np.ndarray
    names: list[str]


def whole(value: Any) -> int | None:
    """`value` as an int (truncated) if it is a finite number, else None."""
    number = finite(value)
    return None if number is None else int(number)


def read_json(path: str, notes: list[str]) -> Any:
    """The content of a JSON file; None if it is missing or, with a note, if it is broken."""
    try:
        with paths.open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        notes.append(f"{path}: cannot be read, left out: {e}")
        return None


def read_results(folder: str, notes: list[str]) -> dict[str, Any] | None:
    """`results.json` of a folder; None if it is missing or, with a note, broken."""
    path = os.path.join(folder, "results.json")
    results = read_json(path, notes)
    if results is not None and not isinstance(results, dict):
        notes.append(f"{path}: holds no results, left out")
        return None
    return results


def read_history(path: str, notes: list[str]) -> History:
    """`metrics.jsonl` without broken lines (noted) and without an incomplete last line."""
    history: History = {}
    broken = []
    try:
        with paths.open(path, encoding="utf-8", errors="replace") as f:
            for number, text in enumerate(f, start=1):
                if not text.endswith("\n"):
                    break  # the run is writing it, or was killed while writing it
                try:
                    line = json.loads(text)
                    step = int(line["step"])
                except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                    broken.append(number)
                    continue
                for name, value in line.items():
                    if name not in ("step", WALL_TIME) and isinstance(value, int | float):
                        measured = finite(value)
                        steps, values = history.setdefault(name, ([], []))
                        steps.append(step)
                        values.append(math.nan if measured is None else measured)
    except FileNotFoundError:
        return history
    except OSError as e:
        notes.append(f"{path}: cannot be read, left out: {e}")
    if broken:
        lines = f"line{'s' * (len(broken) > 1)} {some_of(broken, 5)}"
        notes.append(f"{path}: {lines} cannot be read, left out")
    return history


def read_versions(folder: str) -> dict[str, str]:
    """Package -> version, from the newest checkpoint whose metadata has them; else empty."""
    checkpoints = os.path.join(folder, "checkpoints")
    steps = paths.listdir(checkpoints) if paths.isdir(checkpoints) else []
    for step in sorted((s for s in steps if s.isdecimal()), key=int, reverse=True):
        meta = read_json(os.path.join(checkpoints, step, "meta", "metadata"), [])
        versions = meta.get("versions") if isinstance(meta, dict) else None
        if isinstance(versions, dict):
            return {str(name): str(version) for name, version in versions.items()}
    return {}


def read_confusion(path: str, notes: list[str]) -> Confusion | None:
    """`confusion.npz`; None if it is missing or, with a note, broken."""
    if not paths.exists(path):
        return None
    try:
        with paths.local_copy(path) as file:
            headers = stored.npz_headers(file)
            arrays = stored.read_npz(file, headers, headers)
        matrix = np.asarray(arrays["matrix"], np.int64)
        names = [str(i) for i in range(len(matrix))]
        if "class_names" in arrays:
            names = [str(name) for name in arrays["class_names"]]
        if matrix.ndim != 2 or matrix.shape != (len(names), len(names)) or np.any(matrix < 0):
            raise ValueError(f"a matrix {list(matrix.shape)} for {len(names)} classes")
        return Confusion(matrix, names)
    except Exception as e:  # a broken zip archive raises many types of exceptions
        notes.append(f"{path}: cannot be read, left out: {e}")
        return None
