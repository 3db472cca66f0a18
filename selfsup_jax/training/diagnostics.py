"""Is it learning? What tells a run that has collapsed from one that has converged.

`norms` is part of a training step, on the device. `of_outputs` looks at a step's outputs on the
host, every so many steps: these are a few matrices, so that the step itself pays nothing for it;
`target_distance` then looks at its parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import ThreadpoolController

from selfsup_jax.state import Outputs

# Name -> (steps, values), as `metrics.Recorder` keeps it.
History = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def norms(grads: dict, updates: Any) -> dict[str, Any]:
    """Norms of a step's gradients and updates of the online parameters.

    Returns:
        float32 scalars: `grad_norm/PART` of each part of the online network, not finite as soon as
        one of its gradients isn't, and `update_norm`.
    """
    by_part = {f"grad_norm/{part}": optax.tree.norm(tree) for part, tree in grads.items()}
    return {**by_part, "update_norm": optax.tree.norm(updates)}


@jax.jit
def target_distance(online_params: dict, target_params: dict) -> jax.Array:
    """How far the target lags behind: the norm of online less target over that of online.

    Of the parts that the target has. Three passes over all parameters, so not part of a step.
    """
    followed = {part: online_params[part] for part in target_params}
    apart = jax.tree.map(jnp.subtract, followed, target_params)
    return optax.tree.norm(apart) / optax.tree.norm(followed)


def finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
    """1.0 where every metric of a step is a finite number, else 0.0: one scalar to look at."""
    return jnp.all(jnp.isfinite(jnp.stack(list(metrics.values())))).astype(jnp.float32)


def of_outputs(outputs: Outputs, max_rows: int) -> dict[str, float]:
    """Diagnostics of a global batch, from `[V, B, ...]` host arrays.

    Args:
        outputs: rows of the global batch.
        max_rows: examples that are looked at, the first of them: what follows costs their square.

    Returns:
        `projection_std`: the standard deviation over the batch of each dimension of the normalised
            projection, mean over dimensions, times sqrt(D): 1 for vectors all over the sphere, 0
            for a single point (SimSiam, arXiv 2011.10566, section 4.1).
        `effective_rank`: of the representation of all views, see `effective_rank`.
        `prediction_target_cosine`: mean over views and examples.
        `alignment`: mean squared distance of an image's two normalised projections, in [0, 4];
            `uniformity`: log of the mean of exp(-2 d^2) over the pairs of different images; lower
            is more uniform (Wang and Isola, arXiv 2005.10242, section 4).
    """
    # One thread: these matrices are small, and beside a step several would wait for each other.
    with _blas_threads().limit(limits=1):
        return _of_outputs([np.asarray(x[:, :max_rows], np.float32) for x in outputs])


_blas_threads = functools.cache(ThreadpoolController)


def _of_outputs(outputs: Sequence[np.ndarray]) -> dict[str, float]:
    representation, projection, prediction, target = outputs
    z = _unit(projection)
    std = z.reshape(-1, z.shape[-1]).std(axis=0).mean() * np.sqrt(z.shape[-1])
    cosine = np.mean(np.sum(_unit(prediction) * _unit(target), axis=-1))
    found = {
        "projection_std": float(std),
        "effective_rank": effective_rank(representation.reshape(-1, representation.shape[-1])),
        "prediction_target_cosine": float(cosine),
    }
    if len(z) > 1:
        found["alignment"] = float(np.mean(np.sum((z[0] - z[1]) ** 2, axis=-1)))
    if z.shape[1] > 1:
        found["uniformity"] = _uniformity(z[0])
    return found


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares, of `[N, D]`; from 1 to min(N, D).

    RankMe (arXiv 2210.02885), equation 2. The rows are not centred: one and the same row
    everywhere has rank 1.
    """
    singular = np.linalg.svd(x.astype(np.float32), compute_uv=False).astype(np.float64)
    if not singular.sum():
        return 1.0  # nothing but zeros: as collapsed as can be
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _uniformity(z: np.ndarray) -> float:
    squared = np.maximum(2.0 - 2.0 * (z @ z.T), 0.0)
    pairs = squared[~np.eye(len(z), dtype=bool)]
    return float(np.log(np.mean(np.exp(-2.0 * pairs))))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def collapsed_at(history: History, *, min_std: float, min_rank: float) -> int | None:
    """The step at which a run is seen to have collapsed, or None.

    Collapsed is: at two looks in a row all projections point one way (`projection_std` below
    `min_std`) or all representations do (`effective_rank` below `min_rank`), up to the last look;
    a dip that the run has recovered from is none. The step is the second look's.
    """
    found = None
    series = {name: history.get(name, ((), ())) for name in ("projection_std", "effective_rank")}
    looks = list(
        zip(
            series["projection_std"][0],
            series["projection_std"][1],
            series["effective_rank"][1],
            strict=True,
        )
    )
    low_before = False
    for step, std, rank in looks:
        low = std < min_std or rank < min_rank
        if not low:
            found = None
        elif low_before and found is None:
            found = step
        low_before = low
    return found


def collapse_warning(step: int, history: History, *, min_std: float) -> str:
    """What a reader is told when `collapsed_at` finds something: what was seen, likely causes."""
    std, rank = (history[name][1][-1] for name in ("projection_std", "effective_rank"))
    which = "projections" if std < min_std else "representations"
    return (
        f"WARNING: the run has collapsed by step {step:,}: the {which} of all images are nearly "
        f"the same (projection_std {std:.3f}, where 1 is healthy; effective_rank {rank:.1f}).\n"
        "  Likely causes: the learning rate is too high or its warm-up too short; tau is too low "
        "(the target follows at once); the predictor is missing or switched off; weight decay is "
        "too strong; the batch (or a batch-norm group) is too small. A falling loss is no sign of "
        "learning here."
    )
