"""Is my loss normal? Curves of real runs that a preset ships, to hold a run's own against.

    python -m selfsup_jax.training.reference NAME WORKDIR...

makes `selfsup_jax/training/references/NAME.json` out of finished runs of one config with different
seeds; a preset names it in `config.monitor.reference`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from selfsup_jax.errors import UserError, nearest
from selfsup_jax.run import metrics
from selfsup_jax.training.diagnostics import History

QUANTITIES = ("loss", "projection_std", "effective_rank", "knn_top1", "probe_top1")
_JUDGED = {"loss": 5, "projection_std": 5, "knn_top1": 2}  # and over how many points
# A run may keep its own rhythm of looks and saves, its own seed and place of the data.
_APART = (
    *("seed", "log_every_steps", "checkpoint_every_steps", "keep_", "profile."),
    *("eval.enabled", "eval.batch_size", "eval.max_", "eval.fewshot_", "eval.random_init"),
    *("eval.pixels", "monitor.diagnostics_every", "monitor.knn_every", "monitor.plots_every"),
    *("monitor.map_images", "monitor.view_pairs", "monitor.collapse_", "monitor.reference"),
    *("data.dir", "data.download", "data.max_undecodable", "found."),
)


class Band(NamedTuple):
    """A quantity over the reference's runs: `[n]` each."""

    steps: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


class Reference(NamedTuple):
    """What a preset ships.

    Attributes:
        name: of its file.
        made: from what, when, on what, in words.
        config: the runs' resolved config, flat.
        bands: quantity -> band.
    """

    name: str
    made: str
    config: dict[str, Any]
    bands: dict[str, Band]


def load(name: str) -> Reference | None:
    """The reference of that name, or None for the empty name.

    Raises:
        UserError: there is none of that name.
    """
    if not name:
        return None
    folder = resources.files("selfsup_jax.training") / "references"
    there = sorted(f.name.removesuffix(".json") for f in folder.iterdir())
    if name not in there:
        raise UserError(
            f"config.monitor.reference={name!r}: there is none of that name; did you mean: "
            f"{nearest(name, there)}?"
        )
    found = json.loads((folder / f"{name}.json").read_text())
    bands = {k: Band(*(np.asarray(v[f]) for f in Band._fields)) for k, v in found["bands"].items()}
    return Reference(name, found["made"], found["config"], bands)


def differences(reference: Reference, config: dict[str, Any]) -> list[str]:
    """The fields in which a run differs from the reference's; where any does, it is no yardstick.

    Args:
        reference: as loaded.
        config: the run's, flat and as JSON has it.
    """
    fields = reference.config.keys() | config.keys()
    return sorted(
        f for f in fields if reference.config.get(f) != config.get(f) and not f.startswith(_APART)
    )


def far_outside(reference: Reference, history: History) -> dict[str, str]:
    """Which quantities lie far outside the reference, and how far, in words.

    The mean of the last five points (kNN: two) is held against the reference's at the same steps.
    Far is more than three times the width of the band there, and more than a seventh of all that
    the reference's mean goes through in its run: so neither the noise of one batch nor a
    difference that nobody would care for counts.
    """
    found = {}
    for name, window in _JUDGED.items():
        steps, values = history.get(name, ((), ()))
        band = reference.bands.get(name)
        if band is None or len(steps) < window:
            continue
        if steps[-window] < band.steps[0] or steps[-1] > band.steps[-1]:
            continue
        at = np.asarray(steps[-window:])
        mean, low, high = (
            float(np.mean(np.interp(at, band.steps, y))) for y in (band.mean, band.low, band.high)
        )
        value = float(np.mean(values[-window:]))
        allowed = max(3 * (high - low), np.ptp(band.mean) / 7)
        if abs(value - mean) > allowed:
            where = "above" if value > mean else "below"
            found[name] = (
                f"{name} {value:.3g} up to step {at[-1]:,} is far {where} the reference's "
                f"{mean:.3g} ({low:.3g} to {high:.3g}, {reference.name})"
            )
    return found


def make(runs: Sequence[tuple[dict[str, Any], History]], made: str) -> dict[str, Any]:
    """The JSON of a reference from (flat config, history) of runs that differ in their seeds."""
    configs = [{k: v for k, v in c.items() if not k.startswith(_APART)} for c, _ in runs]
    for config in configs[1:]:
        different = sorted(k for k in config | configs[0] if config.get(k) != configs[0].get(k))
        if different:
            raise UserError(f"the runs differ in more than their seeds: {', '.join(different)}")
    bands: dict[str, dict[str, list]] = {}
    for name in QUANTITIES:
        if not all(name in history for _, history in runs):
            continue
        steps = runs[0][1][name][0]
        values = np.asarray([history[name][1] for _, history in runs])  # [runs, n]
        smooth = np.stack([_smooth(v) for v in values])
        rows = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 100)).astype(int))
        found = {"low": smooth.min(0), "mean": smooth.mean(0), "high": smooth.max(0)}
        curves = {k: [float(f"{v[i]:.4g}") for i in rows] for k, v in found.items()}
        bands[name] = {"steps": [int(steps[i]) for i in rows], **curves}
    return {"made": made, "config": configs[0], "bands": bands}


def _smooth(values: np.ndarray, window: int = 3) -> np.ndarray:
    """The mean of each point and its neighbours; fewer at the ends."""
    padded = np.pad(values.astype(float), window // 2, constant_values=np.nan)
    return np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def main() -> None:
    """The command line of this file's docstring."""
    parser = argparse.ArgumentParser(description="Makes a reference curve out of finished runs.")
    parser.add_argument("name")
    parser.add_argument("workdirs", nargs="+")
    args = parser.parse_args()
    runs = []
    for workdir in args.workdirs:
        with open(os.path.join(workdir, "config.json")) as f:
            config = flatten_dict(json.load(f), sep=".")
        runs.append((config, metrics.read_history(workdir)))
        with open(os.path.join(workdir, "results.json")) as f:
            results = json.load(f)
    seeds = ", ".join(str(config["seed"]) for config, _ in runs)
    made = (
        f"{len(runs)} runs (seeds {seeds}), {results['steps']:,} steps, on "
        f"{results['device_count']} x {results['device_kind']}, {datetime.date.today()}"
    )
    path = str(resources.files("selfsup_jax.training") / "references" / f"{args.name}.json")
    try:
        text = json.dumps(make(runs, made), indent=1, sort_keys=True)
    except UserError as e:
        parser.error(str(e))
    # A list to a line.
    text = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    with open(path, "w") as f:
        f.write(text + "\n")
    print(f"wrote {path}: {made}")


if __name__ == "__main__":
    main()
