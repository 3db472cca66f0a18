"""Whether a run learned, in words, from what it logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from selfsup_jax.viz.titles import fraction

# Quantity -> (steps, values), as in `metrics.Recorder.history`.
History = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def course(history: History, results: Mapping[str, Any]) -> str:
    """Describes a run, as one sentence without its subject and without a full stop.

    What counts is whether the encoder is better than before training. Where the probes of one of
    them are missing (no labels), a loss that fell is a sign that the run learned, and no proof; one
    that rose is no sign against it if the targets move. A collapse shows that it did not learn.

    Args:
        history: what the run logged.
        results: of the run, as far as there are any.
    """
    loss, std, rank = (
        _ends(history.get(name, ((), ()))[1])
        for name in ("loss", "projection_std", "effective_rank")
    )
    scores, collapsed = _scores(results), bool(results.get("collapsed"))
    facts = []
    if collapsed:
        spread = f" (projection std {std[1]:.2g}, where 1 is healthy)" if std else ""
        what = f"has collapsed{spread}: all images look nearly the same to the encoder"
    elif scores is not None:
        name, value, base = scores
        what = "learned" if value > base + 0.005 else "learned nothing that its probes show"
        facts = [f"{name} {100 * value:.1f} %, never trained {100 * base:.1f} %"]
    elif loss is None:
        what = "logged too little to tell whether it learned"
    elif loss[1] < loss[0] - 0.01 * abs(loss[0]):
        what = "learned, as far as its loss can tell"
    else:
        what = "shows no clear sign in its loss that it learned"
    facts += [_loss(*loss)] if loss else []
    if std and not collapsed:
        facts.append(f"no collapse (projection std {std[1]:.2f}, where 1 is healthy)")
    if rank:
        facts.append(f"effective rank {rank[0]:.1f} -> {rank[1]:.1f}")
    return what + (f": {', '.join(facts)}" if facts else "")


def _scores(results: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """(name, top-1, top-1 of the untrained encoder) of the linear probe or else of kNN."""
    for name, what in (("linear_probe_top1", "linear probe"), ("knn_top1", "kNN")):
        value, base = (fraction(results.get(prefix + name)) for prefix in ("", "random_init_"))
        if value is not None and base is not None:
            return what, value, base
    return None


def _loss(first: float, last: float) -> str:
    if f"{first:.3g}" == f"{last:.3g}":
        return f"the loss stayed at {last:.3g}"
    return f"the loss {'fell' if last < first else 'rose'} from {first:.3g} to {last:.3g}"


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """The means of the first and of the last tenth of the finite values; None for fewer than 4."""
    finite = [v for v in values if math.isfinite(v)]
    if len(finite) < 4:
        return None
    count = max(1, len(finite) // 10)
    return sum(finite[:count]) / count, sum(finite[-count:]) / count
