"""Logistic regression of frozen features at many L2 strengths at once, in one vmapped solve.

The objective is scikit-learn's: `C * sum of losses + |W|^2 / 2`, the intercept free. All strengths
share each pass over the features, which are spread over this host's devices; L-BFGS runs in
coordinates in which an upper bound of the Hessian is the identity (Boehning 1992), so that some
tens of passes do whatever the strength.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from selfsup_jax.devices import collectives, parallel
from selfsup_jax.evaluation.features import Features

_BLOCK = 4096  # rows whose logits are held at once
_HISTORY = 10  # of L-BFGS


class Heads(NamedTuple):
    """Linear classifiers of raw features, one for each strength.

    Attributes:
        kernel: `[S, D, C]` float32.
        bias: `[S, C]` float32.
        inverse_penalties: `[S]`, scikit-learn's C.
        iterations: `[S]`, of L-BFGS; fewer than allowed where it has converged.
    """

    kernel: np.ndarray
    bias: np.ndarray
    inverse_penalties: tuple[float, ...]
    iterations: np.ndarray

    def logits(self, x: np.ndarray) -> np.ndarray:
        """`[N, D]` to `[S, N, C]` float32."""
        return np.stack([x @ w + b for w, b in zip(self.kernel, self.bias, strict=True)])


def fit(
    features: Features,
    num_classes: int,
    inverse_penalties: Sequence[float],
    *,
    weights: np.ndarray | None = None,
    standardize: bool = True,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
    memory_gib: float = 4.0,
) -> Heads:
    """Fits a head for each strength.

    Args:
        features: `x` `[N, D]`; labels `[N]`, or `[N, C]` zeros and ones where an image may be of
            several classes: then each class is a problem of its own.
        num_classes: C.
        inverse_penalties: scikit-learn's C of each, above 0.
        weights: `[N]`, of each row's loss; a row of weight 0 takes no part. None: all 1.
        standardize: features to zero mean and unit deviation first, over the rows that take part.
        max_iterations: of L-BFGS.
        tolerance: the largest slope, in its own coordinates, at which a fit is done.
        memory_gib: for L-BFGS; more strengths than it holds are taken in turn.
    """
    weights = np.ones(len(features.x), np.float32) if weights is None else weights
    mean, scale = _moments(features.x, weights, standardize)
    table = {"x": features.x, "y": features.labels, "weight": weights.astype(np.float32)}
    # Padding rows weigh nothing.
    parts = jax.tree.map(lambda column: parallel.spread_rows(column, _BLOCK).rows, table)
    basis, curvature = _basis_of_parts()(parts, (mean, scale))
    solve = _solver(num_classes, max_iterations, tolerance)
    each = features.x.shape[1] * num_classes * 4 * (2 * _HISTORY + 8) / 2**30
    at_once = max(1, int(memory_gib / each))
    total = float(weights.sum())
    found = []
    for start in range(0, len(inverse_penalties), at_once):
        part = np.asarray(inverse_penalties[start : start + at_once], np.float32)
        # Two columns of softmax share what is one column of scikit-learn's: half the penalty.
        share = 2.0 if num_classes == 2 and features.labels.ndim == 1 else 1.0
        shared = (mean, scale, basis, curvature, share / (part * total))
        found.append(jax.device_get(solve(parts, shared)))
    kernel, bias, iterations = (np.concatenate(column) for column in zip(*found, strict=True))
    return Heads(kernel, bias, tuple(map(float, inverse_penalties)), iterations)


def _moments(x: np.ndarray, weights: np.ndarray, standardize: bool) -> tuple[Any, Any]:
    if not standardize:
        return np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)
    used = x[weights > 0]
    scale = used.std(axis=0, dtype=np.float64)
    scale[scale < 1e-6] = 1.0  # a feature that never changes
    return used.mean(axis=0, dtype=np.float64).astype(np.float32), scale.astype(np.float32)


@functools.cache
def _basis_of_parts() -> Callable[..., Any]:
    return parallel.pmap_reduce(_basis)


def _basis(parts: Any, shared: Any, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors `[D, D]` and eigenvalues `[D]` of the mean square of the features."""
    mean, scale = shared

    def add(total: Any, block: Any) -> tuple[Any, None]:
        x = (block["x"] - mean) / scale
        square = jnp.dot(x.T * block["weight"], x, precision=lax.Precision.HIGHEST)
        return (total[0] + square, total[1] + block["weight"].sum()), None

    nothing = (jnp.zeros((len(mean), len(mean))), jnp.zeros(()))
    square, count = collectives.mean(lax.scan(add, nothing, parts)[0], axis_name)
    values, vectors = jnp.linalg.eigh(square / count)
    return vectors, jnp.maximum(values, 0.0)


@functools.cache  # so that the same problem is compiled once
def _solver(num_classes: int, max_iterations: int, tolerance: float) -> Callable[..., Any]:
    return parallel.pmap_reduce(
        functools.partial(
            _solve, num_classes=num_classes, max_iterations=max_iterations, tolerance=tolerance
        )
    )


def _solve(
    parts: Any,
    shared: Any,
    axis_name: str | None,
    *,
    num_classes: int,
    max_iterations: int,
    tolerance: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(kernel `[S, D, C]`, bias `[S, C]`, iterations `[S]`) of the raw features."""
    mean, scale, basis, curvature, penalties = shared
    one_label = parts["y"].ndim == 2  # [blocks, rows]
    # Rotated once, so that each pass is a single product.
    rotate = lambda x: jnp.dot((x - mean) / scale, basis, precision=lax.Precision.HIGHEST)  # noqa: E731
    parts = parts | {"x": lax.map(rotate, parts["x"])}
    bound = curvature * (0.5 if one_label else 0.25)  # of the Hessian, in this basis
    total = collectives.mean(parts["weight"].sum(), axis_name)

    def losses(params: Any, block: Any) -> jax.Array:
        logits = block["x"] @ params["kernel"] + params["bias"]
        if one_label:
            each = optax.softmax_cross_entropy_with_integer_labels(logits, block["y"])
        else:
            each = optax.sigmoid_binary_cross_entropy(logits, block["y"]).sum(-1)
        return jnp.sum(each * block["weight"])

    def whiten(params: Any, penalty: jax.Array) -> Any:
        rate = lax.rsqrt(bound + penalty)[:, None]
        return {"kernel": params["kernel"] * rate, "bias": params["bias"] / bound_of_bias}

    bound_of_bias = (0.5 if one_label else 0.25) ** 0.5

    # The gradient is taken block by block as the loss is, since logits of all rows would not fit;
    # and summed over devices by hand, since autodiff through a mean would do so twice.
    @jax.custom_vjp
    def objective(point: Any, penalty: jax.Array) -> jax.Array:
        return value_and_slope(point, penalty)[0]

    def value_and_slope(point: Any, penalty: jax.Array) -> tuple[jax.Array, Any]:
        params = whiten(point, penalty)

        def add(so_far: Any, block: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, jax.value_and_grad(losses)(params, block)), None

        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        value, slope = collectives.mean(lax.scan(add, nothing, parts)[0], axis_name)
        value = value / total + penalty * jnp.sum(jnp.square(params["kernel"])) / 2
        slope = jax.tree.map(lambda g: g / total, slope)
        slope["kernel"] += penalty * params["kernel"]
        return value, whiten(slope, penalty)

    objective.defvjp(
        value_and_slope, lambda slope, g: (jax.tree.map(lambda s: g * s, slope), jnp.zeros(()))
    )

    def one(penalty: jax.Array) -> tuple[Any, jax.Array]:
        point = {
            "kernel": jnp.zeros((len(mean), num_classes)),
            "bias": jnp.zeros((num_classes,)),
        }
        value_fn = functools.partial(objective, penalty=penalty)
        point, steps = _lbfgs(value_fn, point, max_iterations, tolerance)
        return whiten(point, penalty), steps

    params, steps = jax.vmap(one)(penalties)
    kernel = jnp.einsum("de,sec->sdc", basis, params["kernel"], precision=lax.Precision.HIGHEST)
    kernel = kernel / scale[:, None]
    return kernel, params["bias"] - jnp.einsum("d,sdc->sc", mean, kernel), steps


def _lbfgs(
    value_fn: Callable, point: Any, max_iterations: int, tolerance: float
) -> tuple[Any, jax.Array]:
    """(the minimum, iterations)."""
    # In these coordinates the full step is nearly always right, and of a strictly convex function
    # any step that goes down is one to learn from.
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=8,
        decrease_factor=0.5,
        max_learning_rate=1.0,
        rtol=1e-6,  # what float32 can't tell apart
        store_grad=True,
    )
    solver = optax.lbfgs(memory_size=_HISTORY, linesearch=search)
    value_and_grad = optax.value_and_grad_from_state(value_fn)

    def unfinished(carry: Any) -> jax.Array:
        _, state, step = carry
        slope = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        return (step == 0) | ((step < max_iterations) & (slope > tolerance))

    def update(carry: Any) -> Any:
        point, state, step = carry
        value, grad = value_and_grad(point, state=state)
        updates, state = solver.update(
            grad, state, point, value=value, grad=grad, value_fn=value_fn
        )
        return optax.apply_updates(point, updates), state, step + 1

    start = (point, solver.init(point), jnp.zeros((), jnp.int32))
    point, _, steps = lax.while_loop(unfinished, update, start)
    return point, steps
