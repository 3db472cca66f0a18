"""`config.data.intensity`: which values of deep images (more than 8 bits) are black and white."""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

import numpy as np

from selfsup_jax.data import pixels
from selfsup_jax.data.source import Source

RULES = ("auto", "full", "per_image")
_DEEP_ENDINGS = (".png", ".tif", ".tiff")
_IMAGES, _VALUES = 64, 16384  # looked at: images of each kind, and values of each image


def rule(value: Any) -> str:
    """The config field's: see `selfsup_jax/checks.py`."""
    try:
        valid = isinstance(value, str) and (value in RULES or bool(pixels.range_of(value)))
    except ValueError:
        valid = False
    return "" if valid else f"must be {', '.join(RULES)}, or LOW,HIGH such as 0,4095"


def of_data(source: Source) -> str | None:
    """What `auto` means for a data set: `"low,high"`, the same for all its images.

    99.8 % of the values of evenly spread images are between the two. None if there is no deep
    image among them. The result depends on the split alone, not on the host.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        values = [x for x in threads.map(_some_values, _spread_images(source)) if x is not None]
    if not values:
        return None
    low, high = pixels.black_and_white(np.concatenate(values))
    return f"{low:.6g},{high:.6g}"


def _some_values(image: pixels.Encoded) -> np.ndarray | None:
    values = pixels.deep_values(image)
    if values is None:
        return None
    drawn = values.ravel().astype(np.float64)
    if drawn.size > _VALUES:
        drawn = drawn[np.random.default_rng(0).integers(0, drawn.size, _VALUES)]
    finite: np.ndarray = drawn[np.isfinite(drawn)]
    return finite if finite.size else None


def _spread_images(source: Source) -> list[Any]:
    if source.kind == "path":
        kinds = [source.files(endings) for endings in (_DEEP_ENDINGS[:1], _DEEP_ENDINGS[1:])]
        return [kind[i] for kind in kinds for i in _spread(len(kind))]
    if source.kind == "encoded":
        return list(source.encoded(_spread(source.num_examples)))
    return []


def _spread(count: int) -> np.ndarray:
    return np.linspace(0, count, min(count, _IMAGES), endpoint=False).astype(int)
