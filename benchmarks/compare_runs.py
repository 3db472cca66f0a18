"""Compares two runs' workdirs bit for bit: checkpoints, metrics, events, results."""

from __future__ import annotations

import json
import re
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

_MEASURED = re.compile("second|memory")  # names of tags and fields that differ in every run


def arrays(runs: list[Path], step: int) -> tuple[int, list[str]]:
    """(number of arrays in the checkpoints of `step`, messages about arrays that differ)."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    checkpoints: list[dict[str, Any]] = []
    for run in runs:
        path = (run / "checkpoints" / str(step) / "state").absolute()
        named, _ = jax.tree_util.tree_flatten_with_path(ocp.StandardCheckpointer().restore(path))
        arrays = {jax.tree_util.keystr(k): np.asarray(x) for k, x in named}
        checkpoints.append({k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays.items()})
    return _compare("array", *checkpoints)


def lines(runs: list[Path], name: str) -> tuple[int, list[str]]:
    """(number of lines of a text file without their times, messages about lines that differ)."""
    time = re.compile(rb', "wall_time": [0-9.]+')
    lines = [time.sub(b"", (run / name).read_bytes()).splitlines(keepends=True) for run in runs]
    return _compare(f"{name}: line", *(dict(enumerate(of_run, start=1)) for of_run in lines))


def results(runs: list[Path]) -> tuple[int, list[str]]:
    """(number of fields of `results.json` without timings, messages about fields that differ)."""
    fields = [json.loads((run / "results.json").read_text()) for run in runs]
    return _compare(
        "result",
        *(
            {k: json.dumps(v) for k, v in of_run.items() if not _MEASURED.search(k)}
            for of_run in fields
        ),
    )


def scalars(runs: list[Path]) -> tuple[int, list[str]]:
    """(number of (tag, step) in TensorBoard, messages about those that differ or are repeated)."""
    # If TensorFlow is installed, tensorboard reads with it unless this module exists.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing import event_file_loader
    from tensorboard.util import tensor_util

    events: list[dict[tuple[str, int], list[bytes]]] = []
    for run in runs:
        events.append(defaultdict(list))
        for path in sorted(run.rglob("*.tfevents.*")):
            for event in event_file_loader.EventFileLoader(str(path)).Load():
                for value in event.summary.value if event.step else ():  # 0: config
                    if value.metadata.plugin_data.plugin_name == "images":
                        continue
                    bits = tensor_util.make_ndarray(value.tensor).tobytes()
                    events[-1][value.tag, event.step].append(bits)
    many = [f"TensorBoard {k}: {len(v)} times" for k, v in events[1].items() if len(v) > 1]
    kept = [{k: set(v) for k, v in f.items() if not _MEASURED.search(k[0])} for f in events]
    count, wrong = _compare("TensorBoard", *kept)
    return count, many + wrong


def _compare(what: str, wanted: dict[Any, Any], got: dict[Any, Any]) -> tuple[int, list[str]]:
    wrong = [f"{what} {k}: is missing" for k in wanted if k not in got]
    wrong += [f"{what} {k}: should not be" for k in got if k not in wanted]
    wrong += [f"{what} {k}: differs" for k in wanted if k in got and got[k] != wanted[k]]
    return len(wanted), wrong
