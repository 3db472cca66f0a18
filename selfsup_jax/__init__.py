"""Code that all methods share: data, encoders, optimizers, devices, the training loop.

For programs: `run_job` runs a config; `load_config`, `build_method` and `make_views` pretrain with
a loop of one's own (see `library.py`); `Encoder` is a trained encoder.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from typing import Any

# Set before TensorFlow is imported: no start-up banners, and no oneDNN, which has nothing to speed
# up because TensorFlow only reads images here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Orbax's and TFDS's paths (etils) then read buckets with gcsfs, as `paths.py` does, and without
# TensorFlow. Without gcsfs TensorFlow reads them, enough for TFDS's data.
if importlib.util.find_spec("gcsfs"):
    os.environ.setdefault("EPATH_USE_TF", "false")

# When the process started: a run logs the time from here to the end of its first step.
STARTED = time.perf_counter()

__version__ = "0.3.0"


# What programs use -> the module it is in.
_LIBRARY = {
    "Encoder": "interop.api",
    "build_method": "library",
    "load_config": "presets",
    "make_views": "library",
    "run_job": "library",
}


def __getattr__(name: str) -> Any:
    """`selfsup_jax.Encoder`, imported when it is used: most commands need no JAX to start."""
    if name in _LIBRARY:
        return getattr(importlib.import_module(f"{__name__}.{_LIBRARY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIBRARY})
