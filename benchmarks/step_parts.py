"""Times the parts of a method's training step, each compiled alone; `benchmarks.step` prints them.

The parts are found by following the method's own loss through its network, so there is nothing here
about any method: whatever passes through the encoder, with whatever sizes of views, is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import report
from selfsup_jax.devices import collectives
from selfsup_jax.method import Context, Method, Views, total_loss
from selfsup_jax.models.resnet import Conv
from selfsup_jax.state import TrainState


class Given(NamedTuple):
    """What a forward pass reads; `views` are augmented and normalised."""

    params: Any  # of the online network
    state: TrainState
    batch: dict[str, jax.Array]
    views: Views


def augmentation(method: Method, state: TrainState, batch: dict[str, jax.Array]) -> Views:
    """All views, from uint8 to normalised float."""
    dtype = getattr(method.network.encoder, "dtype", jnp.float32)
    return method.augment.normalized(state.rng, batch, dtype)


def forward(method: Method, given: Given) -> tuple[jax.Array, Any]:
    """All networks, the loss, the online probe."""
    state, batch = given.state, given.batch
    groups = collectives.groups_of_microbatch(method.bn_groups, method.accumulate_steps)
    context = Context(state.rng, batch["index"], groups, None)
    online = {"params": given.params, "batch_stats": state.online_stats}
    target = {"params": state.target_params, "batch_stats": state.target_stats}
    return total_loss(method, online, target, given.views, batch["label"], state, context)


def forward_and_backward(method: Method, given: Given) -> Any:
    """The gradient, and what the forward pass returns."""
    loss = lambda params: forward(method, given._replace(params=params))  # noqa: E731
    return jax.grad(loss, has_aux=True)(given.params)


def encoder_forward(method: Method, given: Given, px: int | None = None) -> list[jax.Array]:
    """The results of all passes of the encoder, or of those with images of `px` pixels."""
    results: list[jax.Array] = []

    def collect(module: nn.Module, x: jax.Array, run: Callable[[], Any]) -> Any:
        result = run()
        if module.path == ("encoder",) and px in (None, x.shape[1]):
            results.append(result)
        return result

    _intercepted(collect, method, given)  # the compiler leaves out all that is not a result
    return results


def after_encoder(method: Method, given: Given, features: list[jax.Array]) -> Any:
    """The forward pass where these are the results of the encoder's passes: heads and loss."""
    left = list(features)

    def replace(module: nn.Module, x: jax.Array, run: Callable[[], Any]) -> Any:
        return left.pop(0) if module.path == ("encoder",) else run()

    return _intercepted(replace, method, given)


def layers(method: Method, given: Given) -> tuple[Callable[..., list[jax.Array]], Any, Any]:
    """A function of all convolutions and linear layers of the encoder's passes; its arguments.

    These are an input of each shape that there is, and the parameters of each layer.
    """
    seen: list[tuple[nn.Module, tuple[int, ...]]] = []

    def collect(module: nn.Module, x: jax.Array, run: Callable[[], Any]) -> Any:
        if isinstance(module, Conv | nn.Dense) and module.path[0] == "encoder":
            seen.append((module.clone(parent=None), x.shape))
        return run()

    jax.eval_shape(lambda given: _intercepted(collect, method, given), given)
    rng, dtype = jax.random.PRNGKey(1), method.network.encoder.dtype
    shapes = sorted({shape for _, shape in seen})
    inputs = {shape: jax.random.normal(rng, shape, dtype) for shape in shapes}
    params = [
        jax.tree.map(
            lambda x: jnp.full(x.shape, 0.01, x.dtype),
            jax.eval_shape(module.init, rng, inputs[shape]),
        )
        for module, shape in seen
    ]

    def run(inputs: dict, params: list) -> list[jax.Array]:
        return [
            module.apply(own, inputs[shape])
            for (module, shape), own in zip(seen, params, strict=True)
        ]

    return run, inputs, params


def update(method: Method, state: TrainState, grads: Any) -> Any:
    """Optimizer and moving average."""
    updates, opt_state = method.optimizer.update(grads, state.opt_state, state.online_params)
    params = optax.apply_updates(state.online_params, updates)
    online = {part: params[part] for part in state.target_params}
    return params, opt_state, optax.incremental_update(online, state.target_params, 0.01)


def seconds(method: Method, batch: dict[str, jax.Array], repeats: int) -> dict[str, float]:
    """Seconds of each part, run alone on one device."""
    state = jax.jit(method.init_state)(jax.random.PRNGKey(0))

    def timed(fn: Callable[..., Any], *args: Any) -> float:
        return report.median_seconds(jax.jit(fn), *args, repeats=repeats)

    def part(fn: Callable[..., Any], *args: Any, **options: Any) -> float:
        return timed(functools.partial(fn, method, **options), *args)

    times = {"augmentation": part(augmentation, state, batch)}
    views = jax.jit(functools.partial(augmentation, method))(state, batch)
    given = Given(state.online_params, state, batch, views)
    times["layers"] = timed(*layers(method, given))
    times["encoder forward"] = part(encoder_forward, given)
    sizes = sorted({group.shape[2] for group in views.values()})
    for px in sizes if len(sizes) > 1 else ():
        times[f"encoder forward, {px} px"] = part(encoder_forward, given, px=px)
    times["rest of the encoder"] = max(0.0, times["encoder forward"] - times["layers"])
    features = jax.jit(functools.partial(encoder_forward, method))(given)
    times["heads and loss forward"] = part(after_encoder, given, features)
    times["forward"] = part(forward, given)
    times["forward and backward"] = part(forward_and_backward, given)
    times["backward"] = max(0.0, times["forward and backward"] - times["forward"])
    times["optimizer + EMA"] = part(update, state, state.online_params)
    return times


def _intercepted(
    intercept: Callable[[nn.Module, Any, Callable[[], Any]], Any], method: Method, given: Given
) -> Any:
    """The forward pass where each call of a module gives `intercept(module, its input, call)`."""

    def call(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        run = lambda: next_fn(*args, **kwargs)  # noqa: E731
        return (
            intercept(context.module, args[0], run) if context.method_name == "__call__" else run()
        )

    with nn.intercept_methods(call):
        return forward(method, given)
