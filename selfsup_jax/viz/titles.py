"""Titles and order of quantities and results in plots, tables and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Quantity(NamedTuple):
    """A quantity that a run logs.

    Attributes:
        title: of its own panel; if it contains %, the values are fractions.
        panel: title of a panel shared with other quantities; empty for its own panel.
        label: in a shared panel.
        log: whether the axis is logarithmic.
    """

    title: str
    panel: str = ""
    label: str = "all"
    log: bool = False


# In the order of the panels; `a/b` is sorted with `a`.
QUANTITIES = {
    "loss": Quantity("loss"),
    "knn_top1": Quantity("kNN top-1, %", "top-1 accuracy, %", "kNN"),
    "probe_top1": Quantity("online probe top-1, %", "top-1 accuracy, %", "online probe"),
    "projection_std": Quantity("projection std (1 healthy, 0 collapsed)"),
    "effective_rank": Quantity("effective rank"),
    "learning_rate": Quantity("learning rate"),
    "probe_loss": Quantity("loss of the online probe"),
    "contrast_top1": Quantity("own view found first, %"),
    "teacher_entropy": Quantity("teacher's output, nats", "teacher's output, nats", "entropy"),
    "teacher_uniform_kl": Quantity("KL to uniform", "teacher's output, nats", "KL to uniform"),
    "student_kl": Quantity("KL of teacher and student, nats"),
    "teacher_temperature": Quantity("teacher's temperature"),
    "prediction_target_cosine": Quantity("cosine of prediction and target"),
    "alignment": Quantity("alignment"),
    "uniformity": Quantity("uniformity"),
    "grad_norm": Quantity("gradient norm", log=True),
    "update_norm": Quantity("update norm", log=True),
    "target_distance": Quantity("target distance, relative", log=True),
    "tau": Quantity("tau"),
    "input_wait": Quantity("time without a batch, %"),
}


def quantity(name: str) -> Quantity:
    """The quantity of a logged name, `a` or `a/b`; an unknown name becomes the title."""
    stem = name.partition("/")[0]
    return QUANTITIES.get(stem, Quantity(stem.replace("_", " ")))


def quantity_rank(name: str) -> int:
    """Sort key of logged names: the order of `QUANTITIES`, then unknown names."""
    names = list(QUANTITIES)
    stem = name.partition("/")[0]
    return names.index(stem) if stem in names else len(names)


# ----------------------------------------------------------------------------------- results

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
CLOSING = ("linear_probe_top1", "linear_probe_top5", "fewshot_top1", "knn_top1", "knn_top5")
# Metrics that the results of a pretraining run may contain.
METRICS = (
    *CLOSING,
    *(prefix + name for prefix in BASELINES for name in CLOSING),
    *("effective_rank", "projection_std", "loss", "teacher_entropy", "teacher_uniform_kl"),
)


def finite(value: Any) -> float | None:
    """`value` as a float if it is a finite number and not a bool; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def fraction(value: Any) -> float | None:
    """`value` as a float if it is a number in [0, 1], like all measures; else None."""
    number = finite(value)
    return number if number is not None and 0 <= number <= 1 else None


def measures(results: Mapping[str, Any]) -> dict[str, float]:
    """The measures among flat results, in [0, 1]; baselines and spreads are left out."""
    selected = {}
    for name, value in results.items():
        number = fraction(value)
        transfer = name.startswith("transfer_") and f"{name}_metric" in results
        score = transfer or name.endswith(tuple(SCORES))
        if number is not None and score and not name.startswith(tuple(BASELINES)):
            selected[name] = number
    return selected


def measure_title(name: str, group: str = "", metric: Any = None) -> str:
    """`fewshot_5_top1` -> `few labels, 5 per class, top-1`; omits the kind if `group` names it."""
    score = next((s for s in SCORES if name.endswith(s)), "")
    stem = name.removesuffix(score)
    kind = next((k for k in KINDS if f"{stem}_".startswith(f"{k}_")), "")
    rest = stem.removeprefix(kind).strip("_").replace("_", " ")
    if kind == "fewshot" and rest.isdecimal():
        rest = f"{rest} per class"
    what = KINDS[kind] if kind and not group.startswith(KINDS[kind]) else ""
    value = str(metric).replace("_", " ") if metric else SCORES.get(score, "")
    return ", ".join(filter(None, (what, rest, value)))


def heading(name: str) -> str:
    """The column heading of a measure, a baseline's measure, a quantity or a config field."""
    prefix = next((p for p in BASELINES if name.startswith(p)), "")
    if prefix:
        return f"{BASELINES[prefix]}: {heading(name.removeprefix(prefix))}"
    if name.endswith(tuple(SCORES)):
        return measure_title(name)
    return name.removeprefix("use_").replace(".", " ").replace("_", " ")


def rank(name: str) -> tuple[int, int, int, str]:
    """Sort key of measures: kind, then the number in the name, then score."""
    kind = next((i for i, k in enumerate(KINDS) if name.startswith(f"{k}_")), len(KINDS))
    number = next((int(part) for part in name.split("_") if part.isdecimal()), 0)
    score = next((i for i, s in enumerate(SCORES) if name.endswith(s)), len(SCORES))
    return kind, number, score, name
