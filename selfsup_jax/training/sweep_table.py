"""A comparison of the runs of several recipes: statistics, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from selfsup_jax.run import identity
from selfsup_jax.viz import plots, titles

# Variant -> its finished runs: entries of a sweep's record, in the order of the seeds.
Done = dict[str, list[dict[str, Any]]]

_UNTRAINED = "random_init_"


def statistics(metrics: Sequence[str], done: Done) -> dict[str, Any]:
    """Mean and (for several seeds) sample standard deviation of each variant's metrics, flat."""
    results: dict[str, Any] = {}
    for variant, entries in done.items():
        for metric in metrics:
            values = _values(metric, entries)
            if values:
                results[f"{variant}_{metric}_mean"] = float(np.mean(values))
            if len(values) > 1:
                results[f"{variant}_{metric}_std"] = float(np.std(values, ddof=1))
        if entries:
            results[f"{variant}_collapsed"] = sum(bool(_failure(entry)) for entry in entries)
    return results


def table(config: ConfigDict, done: Done, missing: Sequence[str]) -> str:
    """The table as Markdown with aligned columns, also readable as plain text.

    Args:
        config: the config of the sweep.
        done: see `Done`.
        missing: names of the runs that are not finished.
    """
    head = ["", *(titles.heading(f) for f in config.columns)]
    head += [titles.heading(m) for m in config.metrics] + ["collapsed", "images/s"]
    rows = [head + [config.published_title] * bool(config.published)]
    for variant, entries in done.items():
        settings = identity.flat(config.variants[variant])
        failures = [_failure(entry) for entry in entries if _failure(entry)]
        speeds = _values("images_per_second", entries)
        row = [_name(variant), *(_formatted(settings.get(field)) for field in config.columns)]
        row += [_mean_and_std(metric, _values(metric, entries)) for metric in config.metrics]
        row.append(", ".join(failures) if failures else "no" * bool(entries))
        row.append(f"{np.median(speeds):,.0f}" if speeds else "")
        if config.published:
            row.append(_formatted(config.published.get(variant)))
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
    """Plots the metrics as bars, with a dot for each seed and a line for the untrained encoder."""
    panels = []
    for metric in config.metrics:
        if metric.startswith(_UNTRAINED):
            continue
        scale, unit = (100, ", %") if _is_fraction(metric) else (1, "")
        panels.append(
            plots.Panel(
                titles.heading(metric) + unit,
                [[scale * v for v in _values(metric, entries)] for entries in done.values()],
                [[scale * v for v in _values(_UNTRAINED + metric, e)] for e in done.values()],
            )
        )
    plots.comparison(path, [_name(variant) for variant in done], panels, title=config.title)


def _values(metric: str, entries: Sequence[Mapping[str, Any]]) -> list[float]:
    return [e["results"][metric] for e in entries if metric in e["results"]]


def _failure(entry: Mapping[str, Any]) -> str:
    """How a run failed: "diverged", or the step of its collapse; empty for a good run."""
    if "diverged" in entry["results"]:
        return "diverged"
    if entry["results"].get("collapsed"):
        return f"step {entry['results']['collapsed_at_step']:,}"
    return ""


def _name(variant: str) -> str:
    return variant.replace("_", " ")


def _formatted(value: Any) -> str:
    if value is None:  # a field that other variants have
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _is_fraction(metric: str) -> bool:
    return metric.endswith(("_top1", "_top5"))


def _mean_and_std(metric: str, values: list[float]) -> str:
    """Mean and (for several seeds) standard deviation; fractions as percentages."""
    if not values:
        return ""
    scale, digits, unit = (100, 1, " %") if _is_fraction(metric) else (1, 2, "")
    text = f"{scale * np.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * np.std(values, ddof=1):.{digits}f}"
    return text + unit
