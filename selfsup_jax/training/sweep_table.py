"""Runs of several recipes side by side: their statistics, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from selfsup_jax.viz import plots

# The runs that are done of each variant: entries of a study's record, in the order of the seeds.
Done = dict[str, list[dict[str, Any]]]

# Results and config fields that a study may show -> their headings.
HEADINGS = {
    "linear_probe_top1": "linear probe",
    "linear_probe_top5": "linear probe, top 5",
    "fewshot_top1": "few labels",
    "knn_top1": "kNN",
    "random_init_linear_probe_top1": "untrained: linear probe",
    "random_init_fewshot_top1": "untrained: few labels",
    "random_init_knn_top1": "untrained: kNN",
    "pixels_linear_probe_top1": "pixels: linear probe",
    "pixels_fewshot_top1": "pixels: few labels",
    "pixels_knn_top1": "pixels: kNN",
    "effective_rank": "effective rank",
    "projection_std": "projection std",
    "loss": "loss",
    "use_predictor": "predictor",
    "use_target_network": "target network",
    "negatives_weight": "negatives",
}
_UNTRAINED = "random_init_"


def flat(config: ConfigDict) -> dict[str, Any]:
    """`{"optimizer.name": ...}` of a config."""
    return flatten_dict(json.loads(config.to_json()), sep=".")


def statistics(measures: Sequence[str], done: Done) -> dict[str, Any]:
    """Mean and, of several seeds, sample standard deviation of each variant's measures, flat."""
    found: dict[str, Any] = {}
    for variant, entries in done.items():
        for measure in measures:
            values = _values(measure, entries)
            if values:
                found[f"{variant}_{measure}_mean"] = float(np.mean(values))
            if len(values) > 1:
                found[f"{variant}_{measure}_std"] = float(np.std(values, ddof=1))
        if entries:
            found[f"{variant}_collapsed"] = sum(bool(_ending(entry)) for entry in entries)
    return found


def table(config: ConfigDict, done: Done, missing: Sequence[str]) -> str:
    """The table as Markdown, which reads well as it is, too.

    Args:
        config: the study's.
        done: see `Done`.
        missing: names of the runs that are still to come.
    """
    head = ["", *(HEADINGS.get(f, f) for f in config.show)]
    head += [HEADINGS.get(m, m) for m in config.measures] + ["collapsed", "images/s"]
    rows = [head + [config.published_title] * bool(config.published)]
    for variant, entries in done.items():
        settings = flat(config.variants[variant])
        endings = [_ending(entry) for entry in entries if _ending(entry)]
        speeds = _values("images_per_second", entries)
        row = [_name(variant), *(_shown(settings.get(field)) for field in config.show)]
        row += [_spread(measure, _values(measure, entries)) for measure in config.measures]
        row.append(", ".join(endings) if endings else "no" * bool(entries))
        row.append(f"{np.median(speeds):,.0f}" if speeds else "")
        if config.published:
            row.append(_shown(config.published.get(variant)))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    note = f"\n\nStill to come: {', '.join(missing)}." if missing else ""
    return f"{config.title}\n\n" + "\n".join(lines) + note


def draw(path: str, config: ConfigDict, done: Done) -> None:
    """The measures as bars, with a dot for each seed and a line for the untrained encoder."""
    panels = []
    for measure in config.measures:
        if measure.startswith(_UNTRAINED):
            continue
        scale, unit = (100, ", %") if _is_fraction(measure) else (1, "")
        panels.append(
            plots.Panel(
                HEADINGS.get(measure, measure) + unit,
                [[scale * v for v in _values(measure, entries)] for entries in done.values()],
                [[scale * v for v in _values(_UNTRAINED + measure, e)] for e in done.values()],
            )
        )
    plots.comparison(path, [_name(variant) for variant in done], panels, title=config.title)


def _values(measure: str, entries: Sequence[Mapping[str, Any]]) -> list[float]:
    return [e["results"][measure] for e in entries if measure in e["results"]]


def _ending(entry: Mapping[str, Any]) -> str:
    """What became of a run that came to nothing; empty for a good one."""
    if "diverged" in entry["results"]:
        return "diverged"
    if entry["results"].get("collapsed"):
        return f"step {entry['results']['collapsed_at_step']:,}"
    return ""


def _name(variant: str) -> str:
    return variant.replace("_", " ")


def _shown(value: Any) -> str:
    if value is None:  # a field that other variants have
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _is_fraction(measure: str) -> bool:
    return measure.endswith(("_top1", "_top5"))


def _spread(measure: str, values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation; fractions as percentages."""
    if not values:
        return ""
    scale, digits, unit = (100, 1, " %") if _is_fraction(measure) else (1, 2, "")
    text = f"{scale * np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * np.std(values, ddof=1):.{digits}f}"
    return text + unit
