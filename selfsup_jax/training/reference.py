"""Reference curves of real runs, shipped with a preset: is the loss of a run normal?

    python -m selfsup_jax.training.reference NAME WORKDIR...

creates `selfsup_jax/training/references/NAME.json` from finished runs of one config with different
seeds. A preset selects it with `config.monitor.reference`.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from selfsup_jax.command_line import Parser
from selfsup_jax.errors import UserError, nearest
from selfsup_jax.run import files, identity, metrics
from selfsup_jax.training.diagnostics import History
from selfsup_jax.viz.plots import ReferenceBand as Band

QUANTITIES = ("loss", "projection_std", "effective_rank", "knn_top1", "probe_top1")
_JUDGED = {"loss": 5, "projection_std": 5, "knn_top1": 2}  # name -> number of points averaged


class Reference(NamedTuple):
    """The reference of a preset.

    Attributes:
        name: the name of its file.
        made: a text: from which runs, on which devices and when it was made.
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
        UserError: there is no reference of that name.
    """
    if not name:
        return None
    folder = resources.files("selfsup_jax.training") / "references"
    names = sorted(f.name.removesuffix(".json") for f in folder.iterdir())
    if name not in names:
        raise UserError(
            f"config.monitor.reference={name!r}: there is no reference of that name; did you mean: "
            f"{nearest(name, names)}?"
        )
    saved = json.loads((folder / f"{name}.json").read_text())
    bands = {k: Band(*(np.asarray(v[f]) for f in Band._fields)) for k, v in saved["bands"].items()}
    return Reference(name, saved["made"], identity.upgraded(saved["config"]), bands)


def differences(reference: Reference, config: identity.Flat) -> list[str]:
    """The fields that differ from the reference's; if there are any, no comparison is possible."""
    return list(identity.differences(config, reference.config, identity.SAME_CURVES))


def far_outside(reference: Reference, history: History) -> dict[str, str]:
    """Quantity -> message, for the quantities that are far outside the reference.

    The mean of the last five points (kNN: two) is compared with the reference's mean at the same
    steps. "Far" is more than three times the width of the band there, and more than a seventh of
    the range of the reference's mean over its whole run. So neither the noise of one batch nor a
    negligible difference counts.
    """
    messages = {}
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
            messages[name] = (
                f"{name} {value:.3g} up to step {at[-1]:,} is far {where} the reference's "
                f"{mean:.3g} ({low:.3g} to {high:.3g}, {reference.name})"
            )
    return messages


def make(runs: Sequence[tuple[dict[str, Any], History]], made: str) -> dict[str, Any]:
    """The JSON of a reference, from (flat config, history) of runs that differ only in the seed."""
    configs = [identity.bound(config, identity.SAME_CURVES) for config, _ in runs]
    for config in configs[1:]:
        different = identity.differences(config, configs[0], ())
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
        stats = {"low": smooth.min(0), "mean": smooth.mean(0), "high": smooth.max(0)}
        curves = {k: [float(f"{v[i]:.4g}") for i in rows] for k, v in stats.items()}
        bands[name] = {"steps": [int(steps[i]) for i in rows], **curves}
    return {"made": made, "config": configs[0], "bands": bands}


def _smooth(values: np.ndarray, window: int = 3) -> np.ndarray:
    """The mean of each point and its neighbours; of fewer points at the ends."""
    padded = np.pad(values.astype(float), window // 2, constant_values=np.nan)
    return np.nanmean(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)


def main() -> None:
    """The command line in this file's docstring."""
    parser = Parser(description="Makes a reference curve out of finished runs.")
    parser.add_argument("name")
    parser.add_argument("workdirs", nargs="+")
    args = parser.parse_args()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", args.name):
        parser.error(f"NAME={args.name!r}: must be letters, digits, '_', '-' and '.': no path")
    runs = []
    try:
        for workdir in args.workdirs:
            config = identity.flat(files.read_json(os.path.join(workdir, "config.json")))
            runs.append((config, metrics.read_history(workdir)))
            results = files.read_json(os.path.join(workdir, "results.json"))
    except (OSError, UserError) as e:
        parser.error(f"{workdir}: no finished run: {e}")
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
    # Put each list on one line.
    text = re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    with open(path, "w") as f:
        f.write(text + "\n")
    print(f"wrote {path}: {made}")


if __name__ == "__main__":
    main()
