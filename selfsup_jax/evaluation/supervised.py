"""Training with labels: linear heads on a frozen encoder, and the encoder with a head.

Pure functions over a `TrainState`, as the methods' are. A frozen encoder stands where a method has
its target network: in `target_params` and `target_stats`, which nothing updates.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from selfsup_jax.data.augment import ViewAugmentation, augment_view, normalize
from selfsup_jax.devices import collectives
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models.heads import LinearClassifier
from selfsup_jax.state import Batch, Metrics, TrainState
from selfsup_jax.training import diagnostics


def flips(flip_prob: float) -> ViewAugmentation:
    """Horizontal flips and nothing else: with the crops, what both papers train classifiers on."""
    return ViewAugmentation(
        flip_prob, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, solarize_prob=0.0
    )


def _images(
    state: TrainState, batch: Batch, view: ViewAugmentation, mean: Any, std: Any
) -> jax.Array:
    rng = jax.random.fold_in(state.rng, state.step)
    return normalize(augment_view(rng, batch["view_1"], batch["index"], view), mean, std)


# --------------------------------------------------------- linear heads on a frozen encoder


def init_probes(
    rng: jax.Array,
    variables: Any,
    *,
    num_features: int,
    num_classes: int,
    num_heads: int,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Heads `[L, D, C]` that begin at zero (the problem is convex), and the encoder beside them."""
    params = {
        "classifier": {
            "kernel": jnp.zeros((num_heads, num_features, num_classes)),
            "bias": jnp.zeros((num_heads, num_classes)),
        }
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=rng,
        online_params=params,
        target_params={"encoder": variables["params"]},
        online_stats={},
        target_stats={"encoder": variables["batch_stats"]},
        opt_state=optimizer.init(params),
    )


def probe_losses(
    params: Any, representation: jax.Array, labels: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the heads' cross-entropies, and each head's own.

    Args:
        params: of `init_probes`.
        representation: `[B, D]`; no gradient passes back to it.
        labels: `[B]` int32.

    Returns:
        The scalar to minimise, whose gradient is each head's own; `loss` and `top1`, `[L]` each.
    """
    head = params["classifier"]
    features = lax.stop_gradient(representation)
    logits = jnp.einsum("bd,ldc->lbc", features, head["kernel"]) + head["bias"][:, None]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None])  # [L, B]
    top1 = (logits.argmax(-1) == labels).astype(jnp.float32).mean(1)
    return each.mean(1).sum(), {"loss": each.mean(1), "top1": top1}


def probe_step(
    state: TrainState,
    batch: Batch,
    *,
    encoder: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    learning_rates: tuple[float, ...],
    view: ViewAugmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    accumulate_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of all heads, each with its learning rate, on one pass through the encoder.

    The optimizer's own rate is a factor of all; SGD's updates are in proportion to the rate. A head
    whose loss or update is not finite stays as it was.
    """
    variables = {
        "params": state.target_params["encoder"],
        "batch_stats": state.target_stats["encoder"],
    }
    grad_fn = jax.grad(probe_losses, has_aux=True)

    def microbatch_step(carry: Any, part: Batch) -> tuple[Any, Any, Any]:
        representation: Any = encoder.apply(variables, _images(state, part, view, mean, std))
        return carry, grad_fn(state.online_params, representation, part["label"]), {}

    _, means, _ = collectives.accumulate(microbatch_step, (), batch, accumulate_steps)
    grads, found = collectives.mean(means, axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    rates = jnp.asarray(learning_rates)
    updates = jax.tree.map(lambda u: u * rates.reshape(-1, *[1] * (u.ndim - 1)), updates)
    good = jnp.isfinite(found["loss"])
    for update in jax.tree.leaves(updates):
        good &= jnp.isfinite(update).reshape(len(rates), -1).all(1)

    def move(param: jax.Array, update: jax.Array) -> jax.Array:
        return jnp.where(good.reshape(-1, *[1] * (param.ndim - 1)), param + update, param)

    new_state = state.replace(
        step=state.step + 1,
        online_params=jax.tree.map(move, state.online_params, updates),
        opt_state=opt_state,
    )
    best = jnp.nanargmin(jnp.where(good, found["loss"], jnp.nan)) if len(rates) > 1 else 0
    metrics = {"loss": found["loss"][best], "top1": found["top1"][best]}
    if len(rates) > 1:
        for i, rate in enumerate(learning_rates):
            metrics[f"top1/rate_{rate:g}"] = found["top1"][i]
    metrics["learning_rate_factor"] = schedule(state.step)
    return new_state, metrics | {"finite": good.any()}


# ------------------------------------------------------------- the encoder and a classifier


def init_finetune(
    rng: jax.Array,
    variables: Any,
    *,
    num_features: int,
    num_classes: int,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The encoder as it was, and a fresh classifier."""
    init_rng, step_rng = jax.random.split(rng)
    classifier = LinearClassifier(num_classes).init(init_rng, jnp.zeros((1, num_features)))
    params = {"encoder": variables["params"], "classifier": classifier["params"]}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=step_rng,
        online_params=params,
        target_params={},
        online_stats={"encoder": variables["batch_stats"]},
        target_stats={},
        opt_state=optimizer.init(params),
    )


def classify(
    params: Any,
    stats: Any,
    images: jax.Array,
    *,
    encoder: nn.Module,
    num_classes: int,
    layout: BatchLayout | None = None,
) -> tuple[jax.Array, Any]:
    """Logits `[B, C]` of normalised images, and the new statistics; `layout=None` evaluates."""
    variables = {"params": params["encoder"], "batch_stats": stats["encoder"]}
    if layout is None:
        representation: Any = encoder.apply(variables, images)
    else:
        representation, new = encoder.apply(variables, images, layout, mutable=["batch_stats"])
        stats = {"encoder": new["batch_stats"]}
    classifier = LinearClassifier(num_classes)
    logits: Any = classifier.apply({"params": params["classifier"]}, representation)
    return logits, stats


def finetune_step(
    state: TrainState,
    batch: Batch,
    *,
    encoder: nn.Module,
    num_classes: int,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    view: ViewAugmentation,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    train_batch_norm: bool = True,
    bn_groups: int = 1,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of encoder and classifier by the cross-entropy of the labels."""
    groups = collectives.groups_of_microbatch(bn_groups, accumulate_steps)
    layout = collectives.batch_layout(groups, 1, axis_name) if train_batch_norm else None

    def loss_fn(params: Any, stats: Any, part: Batch) -> tuple[jax.Array, Any]:
        images = _images(state, part, view, mean, std)
        logits, stats = classify(
            params, stats, images, encoder=encoder, num_classes=num_classes, layout=layout
        )
        each = optax.softmax_cross_entropy_with_integer_labels(logits, part["label"])
        top1 = (logits.argmax(-1) == part["label"]).astype(jnp.float32).mean()
        return each.mean(), ({"loss": each.mean(), "top1": top1}, stats)

    def microbatch_step(stats: Any, part: Batch) -> tuple[Any, Any, Any]:
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, (metrics, stats) = grad_fn(state.online_params, stats, part)
        return stats, (grads, metrics), {}

    stats, means, _ = collectives.accumulate(
        microbatch_step, state.online_stats, batch, accumulate_steps
    )
    grads, metrics = collectives.mean(means, axis_name)
    if train_batch_norm:  # else they are what they were, which a mean would round
        stats = collectives.mean(stats, axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    metrics |= {"learning_rate": schedule(state.step)} | diagnostics.norms(grads, updates)
    new_state = state.replace(
        step=state.step + 1,
        online_params=optax.apply_updates(state.online_params, updates),
        online_stats=stats,
        opt_state=opt_state,
    )
    return new_state, metrics | {"finite": diagnostics.finite(metrics)}


def finetune_optimizer(
    encoder: optax.GradientTransformation, head: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One optimizer for the encoder's parameters and another for the classifier's."""
    parts = {"encoder": encoder, "classifier": head}
    return optax.partition(parts, {name: name for name in parts})
