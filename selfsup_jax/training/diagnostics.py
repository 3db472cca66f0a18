"""Diagnostics that distinguish a collapsed run from a converged one.

Every few steps, `of_outputs` reads the outputs of a step on the host. The outputs are a few
matrices, so they add no cost to the step itself. `target_distance` reads the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import ThreadpoolController

from selfsup_jax.state import Outputs, Sign
from selfsup_jax.viz.verdict import History


@jax.jit
def target_distance(online_params: dict, target_params: dict) -> jax.Array:
    """Relative distance of the target: norm(online - target) / norm(online).

    Only over the parts that the target has. It reads all parameters three times, so it is not part
    of a step.
    """
    online = {part: online_params[part] for part in target_params}
    difference = jax.tree.map(jnp.subtract, online, target_params)
    return optax.tree.norm(difference) / optax.tree.norm(online)


def of_outputs(
    outputs: Outputs, pairs: Sequence[tuple[int, int]], max_rows: int
) -> dict[str, float]:
    """Diagnostics of a global batch, from `[V, B, ...]` host arrays.

    Args:
        outputs: rows of the global batch.
        pairs: see `Method.pairs`.
        max_rows: only this many examples are used, since the cost grows with their square.

    Returns:
        `projection_std`: the standard deviation over the batch of each dimension of the normalised
            projection, averaged over dimensions, times sqrt(D): 1 for vectors spread uniformly over
            the sphere, 0 for a single point (SimSiam, arXiv 2011.10566, section 4.1).
        `effective_rank`: that of the representations of all views, see `effective_rank`.
        `prediction_target_cosine`: mean over pairs and examples.
        `alignment`: mean squared distance of an image's two normalised projections, in [0, 4].
        `uniformity`: log of the mean of exp(-2 d^2) over the pairs of different images; lower is
            more uniform (both: Wang and Isola, arXiv 2005.10242, section 4).
    """
    # One thread: the matrices are small, and several threads would wait during a step.
    with _blas_threads().limit(limits=1):
        return _of_outputs([np.asarray(x[:, :max_rows], np.float32) for x in outputs], pairs)


_blas_threads = functools.cache(ThreadpoolController)


def _of_outputs(
    outputs: Sequence[np.ndarray], pairs: Sequence[tuple[int, int]]
) -> dict[str, float]:
    representation, projection, prediction, target = outputs
    z = _unit(projection)
    std = z.reshape(-1, z.shape[-1]).std(axis=0).mean() * np.sqrt(z.shape[-1])
    predicted, compared = zip(*pairs, strict=True)
    cosines = _unit(prediction)[list(predicted)] * _unit(target)[list(compared)]
    cosine = np.mean(np.sum(cosines, axis=-1))
    values = {
        "projection_std": float(std),
        "effective_rank": effective_rank(representation.reshape(-1, representation.shape[-1])),
        "prediction_target_cosine": float(cosine),
    }
    if len(z) > 1:
        values["alignment"] = float(np.mean(np.sum((z[0] - z[1]) ** 2, axis=-1)))
    if z.shape[1] > 1:
        values["uniformity"] = _uniformity(z[0])
    return values


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of `[N, D]`; from 1 to min(N, D).

    RankMe (arXiv 2210.02885), equation 2. The rows are not centred: N equal rows have rank 1.
    """
    singular = np.linalg.svd(x.astype(np.float32), compute_uv=False).astype(np.float64)
    if not singular.sum():
        return 1.0  # all values are 0: a complete collapse
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _uniformity(z: np.ndarray) -> float:
    squared = np.maximum(2.0 - 2.0 * (z @ z.T), 0.0)
    pairs = squared[~np.eye(len(z), dtype=bool)]
    return float(np.log(np.mean(np.exp(-2.0 * pairs))))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def collapsed_at(
    history: History, *, min_std: float, min_rank: float, signs: Sequence[Sign] = ()
) -> int | None:
    """The step at which a run collapsed, or None.

    A measurement is low if all projections are nearly equal (`projection_std` below `min_std`), or
    all representations are (`effective_rank` below `min_rank`), or there is one of the method's
    own signs. A run has collapsed if its last measurements, at least two, are low; the result is
    the step of the second one.
    """
    steps, stds = history.get("projection_std", ((), ()))
    ranks = history.get("effective_rank", ((), ()))[1]
    seen = _steps_of(history, signs)
    collapsed, low_before = None, False
    for step, std, rank in zip(steps, stds, ranks, strict=True):
        low = std < min_std or rank < min_rank or step in seen
        if not low:
            collapsed = None
        elif low_before and collapsed is None:
            collapsed = step
        low_before = low
    return collapsed


def _steps_of(history: History, signs: Sequence[Sign]) -> set[int]:
    """The steps at which a method's own signs of collapse were there."""
    pairs = [(sign, history.get(sign.metric, ((), ()))) for sign in signs]
    return {
        step
        for sign, series in pairs
        for step, value in zip(*series, strict=True)
        if value > sign.limit
    }


def collapse_warning(
    step: int, history: History, *, min_std: float, signs: Sequence[Sign] = ()
) -> str:
    """The warning of a collapse: the measured values and the likely causes."""
    std, rank = (history[name][1][-1] for name in ("projection_std", "effective_rank"))
    latest = {sign: history.get(sign.metric, ((), (0.0,)))[1][-1] for sign in signs}
    for sign, value in latest.items():
        if value > sign.limit:
            return (
                f"WARNING: the run has collapsed by step {step:,}: {sign.meaning} ({sign.metric} "
                f"{value:.3f}, above {sign.limit:.3f}; projection_std {std:.3f}, effective_rank "
                f"{rank:.1f})"
            )
    which = "projections" if std < min_std else "representations"
    return (
        f"WARNING: the run has collapsed by step {step:,}: the {which} of all images are nearly "
        f"the same (projection_std {std:.3f}, where 1 is healthy; effective_rank {rank:.1f}).\n"
        "  Likely causes: the learning rate is too high or its warm-up too short; tau is too low "
        "(the target follows at once); the predictor is missing or switched off; weight decay is "
        "too strong; the batch (or a batch-norm group) is too small. A falling loss does not mean "
        "that it learns."
    )
