"""Groups runs that differ only in their seeds into recipes; names and compares recipes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfsup_jax.run import identity
from selfsup_jax.viz.report.files import whole
from selfsup_jax.viz.report.records import Run
from selfsup_jax.viz.titles import finite

METHODS = {"byol": "BYOL", "moco": "MoCo", "simclr": "SimCLR", "dino": "DINO"}
METHODS |= {"simsiam": "SimSiam", "barlow_twins": "Barlow Twins", "vicreg": "VICReg"}


@dataclasses.dataclass
class Recipe:
    """Runs whose configs differ only in the seed, one run per seed, ordered by seed."""

    runs: list[Run]
    name: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The flat config of the first run."""
        return self.runs[0].settings

    @property
    def done(self) -> list[Run]:
        """The runs that have results."""
        return [run for run in self.runs if run.results is not None]

    @property
    def labelled(self) -> bool:
        """Whether the runs' data has labels, as far as is known."""
        return bool(self.settings.get("data_info.classes", True))

    @property
    def method(self) -> str:
        """The method's name as the papers write it."""
        return method_name(self.settings.get("method"))

    @property
    def data(self) -> str:
        """Name of the data set; for a folder of images, also its path."""
        name, where = str(self.settings.get("data.name", "")), self.settings.get("data.dir")
        return f"{name} {where}" if name == "folder" and where else name


def method_name(method: Any) -> str:
    """`"moco"` -> `"MoCo"`; an unknown name is returned unchanged."""
    return METHODS.get(str(method), str(method)) if method is not None else ""


def group(runs: Sequence[Run]) -> list[Recipe]:
    """Groups runs into recipes with unique names.

    A second run with the same config and the same seed belongs to a separate recipe.
    """
    recipes: dict[tuple[str, int], Recipe] = {}
    times: Counter[tuple[str, str]] = Counter()
    for run in runs:
        key = json.dumps(sorted(_bound(run.settings).items()), default=str)
        again = times[key, str(run.seed)]
        times[key, str(run.seed)] += 1
        recipes.setdefault((key, again), Recipe([])).runs.append(run)
    for recipe in recipes.values():
        recipe.runs.sort(key=lambda run: (whole(run.seed) or 0, str(run.seed)))
    _name(list(recipes.values()))
    return list(recipes.values())


def differences(recipes: Sequence[Recipe]) -> list[tuple[str, list[Any]]]:
    """(field, its value in each recipe or None), for the fields whose values differ."""
    configs = [_bound(recipe.settings) for recipe in recipes]
    fields = sorted({field for config in configs for field in config})
    rows = [(field, [config.get(field) for config in configs]) for field in fields]
    return [(field, values) for field, values in rows if any(v != values[0] for v in values)]


def shown(value: Any) -> str:
    """A value of a config or of results as short, readable text."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(v) for v in value) or "none"
    return str(value)


def duration(settings: dict[str, Any]) -> str:
    """The training length of a config: `46 epochs`."""
    for unit in ("steps", "examples", "epochs"):  # in the order that a run reads them
        value = finite(settings.get(unit))
        if value:
            return f"{value:,.6g} {unit}" if value < 1e6 else f"{int(value):,} {unit}"
    return ""


def overview(recipe: Recipe) -> dict[str, str]:
    """A recipe's row in the table of runs: heading -> text."""
    settings, results = recipe.settings, [run.results or {} for run in recipe.done]
    images = [whole(run.settings.get("data_info.train_images")) for run in recipe.runs]
    size, speeds = settings.get("data.image_size"), [r.get("images_per_second") for r in results]
    rates = [rate for rate in map(finite, speeds) if rate is not None]
    ran = [r for r in results if "device_kind" in r]
    devices = [f"{r.get('device_count', '?')} x {r['device_kind']}" for r in ran]
    return {
        "method": recipe.method,
        "data": recipe.data + (f", {size} px" if size else ""),
        "images": _all(f"{n:,}" for n in images if n),
        "asked for": duration(settings),
        "steps run": _all(f"{run.last_step:,}" for run in recipe.runs if run.last_step),
        "epochs run": _all(_epochs(run) for run in recipe.runs),
        "batch": shown(settings.get("batch_size")),
        "seeds": ", ".join(shown(run.seed) for run in recipe.runs),
        "ran on": _all(devices),
        "images/s": f"{np.median(rates):,.0f}" if rates else "",
        "not finished": _all(_unfinished(run, len(recipe.runs) > 1) for run in recipe.runs),
        "collapsed": _collapsed(recipe),
    }


def collapsed_at(run: Run) -> int | None:
    """The step at which a run recorded a collapse, or None."""
    results = run.results or {}
    return whole(results.get("collapsed_at_step")) if results.get("collapsed") else None


def _collapsed(recipe: Recipe) -> str:
    checked = [run for run in recipe.done if "collapsed" in (run.results or {})]
    collapsed = [run for run in checked if (run.results or {})["collapsed"]]
    if not collapsed:
        return "no" if checked else ""
    steps = [collapsed_at(run) for run in collapsed]
    by = "; ".join(f"{step:,}" for step in steps if step is not None)
    count = f"{len(collapsed)} of {len(checked)}" if len(checked) > 1 else "yes"
    return count + (f", by step {by}" if by else "")


def _epochs(run: Run) -> str:
    """Of all images; a run of whole epochs leaves out the rest of each after its last batch."""
    images = whole(run.settings.get("data_info.train_images"))
    batch = whole(run.settings.get("batch_size"))
    if not images or not batch or not run.last_step:
        return ""
    whole_epochs = run.settings.get("whole_epochs", True) and images >= batch
    per_epoch = images // batch if whole_epochs else images / batch
    return f"{run.last_step / per_epoch:,.3g}"


def _unfinished(run: Run, many: bool) -> str:
    if run.results is not None:
        return ""
    at = f"step {run.last_step:,}" if run.last_step else "nothing logged"
    seed = f"seed {shown(run.seed)}: " if many else ""
    return f"{seed}{at}{f' ({run.ended})' if run.ended else ''}"


def _all(texts: Any) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))


def _bound(settings: dict[str, Any]) -> dict[str, Any]:
    """The config fields that identify a recipe."""
    kept = identity.bound(settings, identity.SAME_RECIPE)
    if settings.get("data.name") == "folder" and "data.dir" in settings:
        kept["data.dir"] = settings["data.dir"]
    return kept


def _name(recipes: Sequence[Recipe]) -> None:
    for recipe in recipes:
        recipe.name = _own_name(recipe)
    for depth in (1, 2):  # prefixed with one parent folder, then with two
        counts = Counter(recipe.name for recipe in recipes)
        for recipe in recipes:
            if counts[recipe.name] > 1:
                parent = os.path.dirname(recipe.runs[0].path)
                if os.path.basename(recipe.runs[0].path).startswith("seed_"):
                    parent = os.path.dirname(parent)
                parts = parent.split(os.sep)[-depth:]
                recipe.name = "/".join([*parts, _own_name(recipe)])
    counts = Counter()
    for recipe in recipes:
        counts[recipe.name] += 1
        if counts[recipe.name] > 1:
            recipe.name += f" ({counts[recipe.name]})"


def _own_name(recipe: Recipe) -> str:
    """The variant's name in a sweep, or the folder's name without the seed."""
    first = recipe.runs[0]
    if first.variant:
        return first.variant.replace("_", " ")
    folders = [os.path.basename(run.path) for run in recipe.runs]
    if all(re.fullmatch(r"seed_\d+", folder) for folder in folders):
        return os.path.basename(os.path.dirname(first.path)) or first.path
    stems = [re.sub(r"[\s._-]*(seed|s)?[\s._-]*\d*$", "", folder) for folder in folders]
    if len(folders) == 1:
        return folders[0] or first.path
    return (
        (stems[0] if len(set(stems)) == 1 else " + ".join(folders[:2]))
        or recipe.method
        or first.path
    )
