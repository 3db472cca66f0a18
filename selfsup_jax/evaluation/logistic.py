"""Logistic regression on frozen features, for many L2 strengths at once in one vmapped solve.

The objective is scikit-learn's: `C * sum of losses + |W|^2 / 2`; the intercept is not penalised.
All strengths share each pass over the features, which are spread over all devices of all hosts: a
device sends the loss and gradient of its rows, no features. L-BFGS runs in coordinates in which an
upper bound of the Hessian is the identity (Boehning 1992), so that a few tens of passes are enough
for every strength.
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
from selfsup_jax.devices.table import Table, as_table, scan_blocks
from selfsup_jax.evaluation.features import Features

_BLOCK = 4096  # rows whose logits are in memory at once
_HISTORY = 10  # updates that L-BFGS keeps


class Heads(NamedTuple):
    """Linear classifiers on raw features, one for each strength.

    Attributes:
        kernel: `[S, D, C]` float32.
        bias: `[S, C]` float32.
        C: `[S]`, scikit-learn's C.
        iterations: `[S]`, of L-BFGS; fewer than the maximum if it converged.
    """

    kernel: np.ndarray
    bias: np.ndarray
    C: tuple[float, ...]
    iterations: np.ndarray

    def logits(self, x: np.ndarray | Table) -> np.ndarray:
        """`[N, D]` to `[S, N, C]` float32."""
        return logits(self.kernel, self.bias, x)


def logits(kernel: np.ndarray, bias: np.ndarray, x: np.ndarray | Table) -> np.ndarray:
    """As `Heads.logits`, with kernels `[S, D, C]`; of a table, a block is copied at a time."""
    values = np.empty((len(kernel), len(x), kernel.shape[2]), np.float32)
    for start in range(0, len(x), _BLOCK):
        rows = x[start : start + _BLOCK]
        for of_head, w, b in zip(values, kernel, bias, strict=True):
            of_head[start : start + _BLOCK] = rows @ w + b
    return values


def fit(
    features: Features,
    num_classes: int,
    C: Sequence[float],
    *,
    weights: np.ndarray | None = None,
    standardize: bool = True,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
    memory_gib: float = 4.0,
) -> Heads:
    """Fits one head for each strength.

    Args:
        features: `x` `[N, D]`; labels `[N]`, or `[N, C]` zeros and ones if an image can have
            several classes: then each class is a separate binary problem.
        num_classes: the number of classes, C in the shapes.
        C: scikit-learn's C of each strength, above 0.
        weights: `[N]`, the weight of each row's loss; rows of weight 0 are ignored. None: all 1.
        standardize: first scale the features to zero mean and unit deviation over the used rows.
        max_iterations: the maximum for L-BFGS.
        tolerance: a fit stops when no gradient entry, in the solver's basis, is larger than this.
        memory_gib: memory for L-BFGS; strengths that do not fit together are solved in groups.
    """
    table = as_table(features.x)
    weights = np.ones(len(table), np.float32) if weights is None else weights
    zeros, ones = np.zeros(table.shape[1], np.float32), np.ones(table.shape[1], np.float32)
    mean, scale = moments(table, weights) if standardize else (zeros, ones)
    # Padding rows have weight 0.
    columns = {"y": features.labels, "weight": weights.astype(np.float32)}
    parts = {k: table.column(column) for k, column in columns.items()} | {"x": table.part.rows}
    basis, curvature = parallel.pmap_reduce(_basis)(parts, (mean, scale))
    solve = _solver(num_classes, max_iterations, tolerance)
    gib_per_strength = table.shape[1] * num_classes * 4 * (2 * _HISTORY + 8) / 2**30
    at_once = max(1, int(memory_gib / gib_per_strength))
    total = float(weights.sum())
    solutions = []
    for start in range(0, len(C), at_once):
        group = np.asarray(C[start : start + at_once], np.float32)
        # Softmax splits scikit-learn's one column w into w/2 and -w/2, so |W|^2 is only half.
        factor = 2.0 if num_classes == 2 and features.labels.ndim == 1 else 1.0
        shared = (mean, scale, basis, curvature, factor / (group * total))
        solutions.append(jax.device_get(solve(parts, shared)))
    kernel, bias, iterations = (np.concatenate(column) for column in zip(*solutions, strict=True))
    return Heads(kernel, bias, tuple(map(float, C)), iterations)


def moments(x: np.ndarray | Table, weights: np.ndarray | None = None) -> tuple[Any, Any]:
    """Mean and deviation `[D]` over the rows whose weight is not 0; 1 for a constant feature."""
    table = as_table(x)
    used = np.ones(len(table), bool) if weights is None else weights > 0
    first = table[[int(np.argmax(used))]][0]
    parts = (table.part.rows, table.column(used))
    mean, scale = parallel.pmap_reduce(_moments)(parts, first)
    return mean, np.where(scale < 1e-6, np.float32(1.0), scale)


def _moments(parts: Any, first: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    def mean(value: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def add(sums: Any, block: Any, place: jax.Array) -> Any:
            rows, used = block[0], (block[1] & (place >= 0))[:, None]
            return sums[0] + jnp.sum(jnp.where(used, value(rows), 0.0), 0), sums[1] + used.sum()

        zeros = (jnp.zeros_like(first), jnp.zeros((), jnp.int32))
        sums, count = collectives.total(scan_blocks(add, zeros, parts, _BLOCK), axis_name)
        return sums / count

    # Relative to a row, so that a constant feature's deviation is 0 in float32 too.
    shift = mean(lambda rows: rows - first)
    variance = mean(lambda rows: jnp.square(rows - first - shift))
    return first + shift, jnp.sqrt(variance)


def _basis(parts: Any, shared: Any, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors `[D, D]` and eigenvalues `[D]` of the features' second-moment matrix."""
    mean, scale = shared

    def add(sums: Any, block: Any, place: jax.Array) -> Any:
        x = (block["x"] - mean) / scale
        weight = block["weight"] * (place >= 0)
        square = jnp.dot(x.T * weight, x, precision=lax.Precision.HIGHEST)
        return sums[0] + square, sums[1] + weight.sum()

    zeros = (jnp.zeros((len(mean), len(mean))), jnp.zeros(()))
    square, count = collectives.total(scan_blocks(add, zeros, parts, _BLOCK), axis_name)
    values, vectors = jnp.linalg.eigh(square / count)
    return vectors, jnp.maximum(values, 0.0)


@functools.cache  # each problem is compiled only once
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
    """(kernel `[S, D, C]`, bias `[S, C]`, iterations `[S]`) for the raw features."""
    mean, scale, basis, curvature, penalties = shared
    one_label = parts["y"].ndim == 1
    bound = curvature * (0.5 if one_label else 0.25)  # upper bound of the Hessian in this basis
    total = collectives.total(parts["weight"].sum(), axis_name)
    rotate = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST)

    def losses(params: Any, block: Any) -> jax.Array:
        logits = ((block["x"] - mean) / scale) @ params["kernel"] + params["bias"]
        if one_label:
            row_losses = optax.softmax_cross_entropy_with_integer_labels(logits, block["y"])
        else:
            row_losses = optax.sigmoid_binary_cross_entropy(logits, block["y"]).sum(-1)
        return jnp.sum(row_losses * block["weight"])

    def whiten(params: Any, penalty: jax.Array) -> Any:
        rate = lax.rsqrt(bound + penalty)[:, None]
        return {"kernel": params["kernel"] * rate, "bias": params["bias"] / bound_of_bias}

    bound_of_bias = (0.5 if one_label else 0.25) ** 0.5

    # Loss and gradient are computed block by block, since the logits of all rows would not fit in
    # memory. The explicit gradient avoids autodiff, which would take the mean over devices twice.
    @jax.custom_vjp
    def objective(point: Any, penalty: jax.Array) -> jax.Array:
        return value_and_gradient(point, penalty)[0]

    def value_and_gradient(point: Any, penalty: jax.Array) -> tuple[jax.Array, Any]:
        params = whiten(point, penalty)
        # The kernel is rotated, not the features: of those no second copy is held.
        rotated = params | {"kernel": rotate(basis, params["kernel"])}

        def add(sums: Any, block: Any, place: jax.Array) -> Any:
            block = block | {"weight": block["weight"] * (place >= 0)}
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(losses)(rotated, block))

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        value, gradient = collectives.total(scan_blocks(add, zeros, parts, _BLOCK), axis_name)
        gradient["kernel"] = rotate(basis.T, gradient["kernel"])
        value = value / total + penalty * jnp.sum(jnp.square(params["kernel"])) / 2
        gradient = jax.tree.map(lambda g: g / total, gradient)
        gradient["kernel"] += penalty * params["kernel"]
        return value, whiten(gradient, penalty)

    objective.defvjp(
        value_and_gradient, lambda saved, g: (jax.tree.map(lambda s: g * s, saved), jnp.zeros(()))
    )

    def solve_one(penalty: jax.Array) -> tuple[Any, jax.Array]:
        point = {
            "kernel": jnp.zeros((len(mean), num_classes)),
            "bias": jnp.zeros((num_classes,)),
        }
        value_fn = functools.partial(objective, penalty=penalty)
        point, steps = _lbfgs(value_fn, point, max_iterations, tolerance)
        return whiten(point, penalty), steps

    params, steps = jax.vmap(solve_one)(penalties)
    kernel = jnp.einsum("de,sec->sdc", basis, params["kernel"], precision=lax.Precision.HIGHEST)
    kernel = kernel / scale[:, None]
    return kernel, params["bias"] - jnp.einsum("d,sdc->sc", mean, kernel), steps


def _lbfgs(
    value_fn: Callable, point: Any, max_iterations: int, tolerance: float
) -> tuple[Any, jax.Array]:
    """Minimises from `point` on; returns (the minimum, iterations)."""
    # In these coordinates the full step is nearly always good. The function is strictly convex, so
    # every step that decreases it gives L-BFGS a valid update.
    search = optax.scale_by_backtracking_linesearch(
        max_backtracking_steps=8,
        decrease_factor=0.5,
        max_learning_rate=1.0,
        rtol=1e-6,  # a smaller change is rounding error in float32
        store_grad=True,
    )
    solver = optax.lbfgs(memory_size=_HISTORY, linesearch=search)
    value_and_grad = optax.value_and_grad_from_state(value_fn)

    def unfinished(carry: Any) -> jax.Array:
        _, state, step = carry
        largest = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        return (step == 0) | ((step < max_iterations) & (largest > tolerance))

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
