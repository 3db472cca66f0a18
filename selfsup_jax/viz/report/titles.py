"""Names of measures: which results are measures, what they are called, and in which order."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from selfsup_jax.viz.report.files import fraction
from selfsup_jax.viz.report.recipes import shown
from selfsup_jax.viz.report.records import Job

BASELINES = {"random_init_": "never trained", "pixels_": "raw pixels"}  # prefix -> name
KINDS = {
    "linear_probe": "linear probe",
    "knn": "kNN",
    "finetune": "fine-tuning",
    "fewshot": "few labels",
    "transfer": "transfer",
}
SCORES = {
    "_top1": "top-1",
    "_top5": "top-5",
    "_mean_per_class": "mean per class",
    "_accuracy": "accuracy",
    "_map": "mAP",
    "_auc": "AUC",
}

# Fields of a job that are about the run, or change nothing of what is measured.
_OF_THE_RUN = (
    *("seed", "checkpoint", "found", "encoder", "projector", "data.dir", "data.download"),
    *("log_every_steps", "watch"),
)
_MOST_TOLD = 3  # fields that tell jobs apart; beyond these their folders' names are clearer


def measures(results: Mapping[str, Any]) -> dict[str, float]:
    """The measures among flat results, in [0, 1]; baselines and spreads are none."""
    found = {}
    for name, value in results.items():
        number = fraction(value)
        transfer = name.startswith("transfer_") and f"{name}_metric" in results
        score = transfer or name.endswith(tuple(SCORES))
        if number is not None and score and not name.startswith(tuple(BASELINES)):
            found[name] = number
    return found


def measure_title(name: str, group: str, metric: Any = None) -> str:
    """`fewshot_5_top1` -> `few labels, 5 per class, top-1`; without what `group` says already."""
    score = next((s for s in SCORES if name.endswith(s)), "")
    stem = name.removesuffix(score)
    kind = next((k for k in KINDS if f"{stem}_".startswith(f"{k}_")), "")
    rest = stem.removeprefix(kind).strip("_").replace("_", " ")
    if kind == "fewshot" and rest.isdecimal():
        rest = f"{rest} per class"
    what = KINDS[kind] if kind and not group.startswith(KINDS[kind]) else ""
    value = str(metric).replace("_", " ") if metric else SCORES.get(score, "")
    return ", ".join(filter(None, (what, rest, value)))


def rank(name: str) -> tuple[int, int, int, str]:
    """Sorts measures by kind, then by the number in their names, then by score."""
    kind = next((i for i, k in enumerate(KINDS) if name.startswith(f"{k}_")), len(KINDS))
    number = next((int(part) for part in name.split("_") if part.isdecimal()), 0)
    score = next((i for i, s in enumerate(SCORES) if name.endswith(s)), len(SCORES))
    return kind, number, score, name


def group_rank(label: str) -> tuple[int, str]:
    """Sorts the kinds of evaluation as `KINDS` are."""
    titles = list(KINDS.values())
    return next((i for i, t in enumerate(titles) if label.startswith(t)), len(titles)), label


def group_labels(jobs: Sequence[Job]) -> dict[str, str]:
    """Path of a job -> what it is called; jobs whose configs differ are called differently."""
    labels: dict[str, str] = {}
    for kind in dict.fromkeys(job.kind for job in jobs):
        name = KINDS.get(kind, kind.replace("_", " "))
        configs = {job.path: _bound(job) for job in jobs if job.kind == kind}
        alike: dict[str, list[str]] = {}  # a config -> the jobs that have it
        for path, config in configs.items():
            identity = json.dumps(sorted(config.items()), default=str)
            alike.setdefault(identity, []).append(path)
        apart = [configs[paths[0]] for paths in alike.values()]
        fields = sorted({field for config in apart for field in config})
        differ = [f for f in fields if any(c.get(f) != apart[0].get(f) for c in apart)]
        if "data.name" in differ and len({str(c.get("data.name")) for c in apart}) == len(apart):
            differ = ["data.name"]  # tells them all apart
        for paths in alike.values():
            config = configs[paths[0]]
            told = ", ".join(f"{f.rpartition('.')[2]} {shown(config.get(f))}" for f in differ)
            if differ == ["data.name"]:
                told = shown(config.get("data.name"))
            elif len(differ) > _MOST_TOLD:
                told = os.path.basename(paths[0])
            labels |= dict.fromkeys(paths, f"{name} ({told})" if told else name)
    return labels


def _bound(job: Job) -> dict[str, Any]:
    free = tuple(f"{field}." for field in _OF_THE_RUN)
    return {k: v for k, v in job.settings.items() if not f"{k}.".startswith(free)}
