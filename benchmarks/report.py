"""Shared by the benchmarks: timing, a table, flat JSON."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from selfsup_jax import command_line
from selfsup_jax.data import views
from selfsup_jax.errors import UserError

Row = tuple[str, float, str]  # name, value, unit


def refuse_words(argv: Sequence[str]) -> None:
    """Ends the process, with status 2, if words are left that belong to no flag."""
    try:
        command_line.refuse_words(sys.argv, argv[1:], list(flags.FLAGS))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def median_seconds(fn: Callable[..., Any], *args: Any, repeats: int = 5) -> float:
    """The median time of `fn(*args)` in seconds, after one call that compiles."""
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sides(config: Any) -> list[int]:
    """The pixels of each view of a config."""
    return [group.size for _, group in views.groups_of(config.views) for _ in range(group.count)]


def fake_batch(size: int, sides: Sequence[int]) -> dict[str, np.ndarray]:
    """A batch of noise with the shapes and dtypes of the input pipeline: views of these sides."""
    rng = np.random.default_rng(0)
    images = {
        f"view_{i}": rng.integers(0, 256, (size, side, side, 3), np.uint8)
        for i, side in enumerate(sides, start=1)
    }
    return images | {"index": np.arange(size, dtype=np.int32), "label": np.zeros(size, np.int32)}


def show(title: str, rows: list[Row], json_path: str = "") -> None:
    """Prints a table and, if a path is given, also writes it as flat JSON."""
    machine = f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"\n{title}\n{datetime.date.today()}, {machine}, jax {jax.__version__}\n")
    width = max(len(name) for name, _, _ in rows)
    for name, value, unit in rows:
        print(f"  {name:<{width}}  {value:>12,.4g} {unit}")
    if json_path:
        flat = {name.replace(" ", "_"): value for name, value, _ in rows}
        flat |= {f"{name.replace(' ', '_')}_unit": unit for name, _, unit in rows if unit}
        with open(json_path, "w") as f:
            json.dump(flat | {"title": title, "machine": machine}, f, indent=2)
            f.write("\n")
