"""Whether two runs' workdirs hold the same, bit for bit: checkpoints, metrics, events, results."""

from __future__ import annotations

import json
import re
import sys
import types
from collections import defaultdict
from pathlib import Path
from typing import Any

_MEASURED = re.compile("second|memory")  # in the names of tags and fields that no rerun repeats


def arrays(runs: list[Path], step: int) -> tuple[int, list[str]]:
    """How many arrays the last checkpoints have, and the names of those not equal bit for bit."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found: list[dict[str, Any]] = []
    for run in runs:
        path = (run / "checkpoints" / str(step) / "state").absolute()
        named, _ = jax.tree_util.tree_flatten_with_path(ocp.StandardCheckpointer().restore(path))
        arrays = {jax.tree_util.keystr(k): np.asarray(x) for k, x in named}
        found.append({k: (x.dtype, x.shape, x.tobytes()) for k, x in arrays.items()})
    return _compare("array", *found)


def lines(runs: list[Path], name: str) -> tuple[int, list[str]]:
    """How many lines a text file has, and which of them are not equal byte for byte."""
    lines = [(run / name).read_bytes().splitlines(keepends=True) for run in runs]
    return _compare(f"{name}: line", *(dict(enumerate(of_run, start=1)) for of_run in lines))


def results(runs: list[Path]) -> tuple[int, list[str]]:
    """How many fields `results.json` has, timings left out, and the names of those not equal."""
    fields = [json.loads((run / "results.json").read_text()) for run in runs]
    return _compare(
        "result",
        *(
            {k: json.dumps(v) for k, v in of_run.items() if not _MEASURED.search(k)}
            for of_run in fields
        ),
    )


def scalars(runs: list[Path]) -> tuple[int, list[str]]:
    """How many (tag, step) TensorBoard has, and those not there once, with the same bits."""
    # Where TensorFlow is installed, tensorboard reads with it unless there is this module.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
    from tensorboard.backend.event_processing import event_file_loader
    from tensorboard.util import tensor_util

    found: list[dict[tuple[str, int], list[bytes]]] = []
    for run in runs:
        found.append(defaultdict(list))
        for path in sorted(run.rglob("*.tfevents.*")):
            for event in event_file_loader.EventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    bits = tensor_util.make_ndarray(value.tensor).tobytes()
                    found[-1][value.tag, event.step].append(bits)
    many = [f"TensorBoard {k}: {len(v)} times" for k, v in found[1].items() if len(v) > 1]
    kept = [{k: set(v) for k, v in f.items() if not _MEASURED.search(k[0])} for f in found]
    count, wrong = _compare("TensorBoard", *kept)
    return count, many + wrong


def _compare(what: str, wanted: dict[Any, Any], got: dict[Any, Any]) -> tuple[int, list[str]]:
    wrong = [f"{what} {k}: is missing" for k in wanted if k not in got]
    wrong += [f"{what} {k}: should not be" for k in got if k not in wanted]
    wrong += [f"{what} {k}: differs" for k in wanted if k in got and got[k] != wanted[k]]
    return len(wanted), wrong
