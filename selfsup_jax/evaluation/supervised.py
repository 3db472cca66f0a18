"""Training with labels: linear heads on a frozen encoder, or finetuning of encoder and head.

Pure functions of a `TrainState`, like those of the methods. A frozen encoder is stored in place of
a method's target network: in `target_params` and `target_stats`, which are never updated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from selfsup_jax import optim
from selfsup_jax.data.augment import Augmentation
from selfsup_jax.devices import collectives
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.models.heads import LinearClassifier
from selfsup_jax.state import Batch, Metrics, TrainState, all_finite


def _images(state: TrainState, batch: Batch, augment: Augmentation) -> jax.Array:
    rng = jax.random.fold_in(state.rng, state.step)
    return augment.normalized(rng, batch)["global"][0]


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
    """Heads `[L, D, C]` initialised with zeros (the problem is convex), and the frozen encoder."""
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
    """The sum of the heads' cross-entropies, and the metrics of each head.

    Args:
        params: those of `init_probes`.
        representation: `[B, D]`; it gets no gradient.
        labels: `[B]` int32.

    Returns:
        The sum to minimise (a head's gradient is that of its own loss); `loss`, `top1`: `[L]` each.
    """
    head = params["classifier"]
    features = lax.stop_gradient(representation)
    logits = jnp.einsum("bd,ldc->lbc", features, head["kernel"]) + head["bias"][:, None]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[None])  # [L, B]
    top1 = (logits.argmax(-1) == labels).astype(jnp.float32).mean(1)
    return losses.mean(1).sum(), {"loss": losses.mean(1), "top1": top1}


def probe_step(
    state: TrainState,
    batch: Batch,
    *,
    represent: Callable[[Any, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    learning_rates: tuple[float, ...],
    augment: Augmentation,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of all heads, each with its own learning rate, with one pass of the encoder.

    A head's rate multiplies the optimizer's update: SGD's updates are proportional to the rate. A
    head is not changed if its loss or update is not finite.
    """
    variables = {
        "params": state.target_params["encoder"],
        "batch_stats": state.target_stats["encoder"],
    }
    grad_fn = jax.grad(probe_losses, has_aux=True)

    def microbatch_step(carry: Any, part: Batch) -> tuple[Any, Any, Any]:
        representation = represent(variables, _images(state, part, augment))
        return carry, grad_fn(state.online_params, representation, part["label"]), {}

    _, means, _ = collectives.accumulate(microbatch_step, (), batch, accumulate_steps)
    grads, values = collectives.mean(means, axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    rates = jnp.asarray(learning_rates)
    updates = jax.tree.map(lambda u: u * rates.reshape(-1, *[1] * (u.ndim - 1)), updates)
    finite = jnp.isfinite(values["loss"])
    for update in jax.tree.leaves(updates):
        finite &= jnp.isfinite(update).reshape(len(rates), -1).all(1)

    def apply(param: jax.Array, update: jax.Array) -> jax.Array:
        return jnp.where(finite.reshape(-1, *[1] * (param.ndim - 1)), param + update, param)

    new_state = state.replace(
        step=state.step + 1,
        online_params=jax.tree.map(apply, state.online_params, updates),
        opt_state=opt_state,
    )
    best = jnp.nanargmin(jnp.where(finite, values["loss"], jnp.nan)) if len(rates) > 1 else 0
    metrics = {"loss": values["loss"][best], "top1": values["top1"][best]}
    if len(rates) > 1:
        for i, rate in enumerate(learning_rates):
            metrics[f"top1/rate_{rate:g}"] = values["top1"][i]
    metrics["learning_rate_factor"] = schedule(state.step)
    return new_state, metrics | {"finite": finite.any()}


# ------------------------------------------------------------- the encoder and a classifier


def init_finetune(
    rng: jax.Array,
    variables: Any,
    *,
    num_features: int,
    num_classes: int,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The given encoder, and a newly initialised classifier."""
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
    """Logits `[B, C]` of normalised images, and the new statistics; evaluates if `layout=None`."""
    variables = {"params": params["encoder"], "batch_stats": stats["encoder"]}
    if layout is None:
        representation: Any = encoder.apply(variables, images)
    else:
        representation, new = encoder.apply(variables, images, layout, mutable=["batch_stats"])
        stats = {"encoder": new.get("batch_stats", {})}
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
    augment: Augmentation,
    train_batch_norm: bool = True,
    bn_groups: int = 1,
    accumulate_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, Metrics]:
    """One update of the encoder and the classifier with the cross-entropy loss."""
    groups = collectives.groups_of_microbatch(bn_groups, accumulate_steps)
    layout = collectives.batch_layout(groups, 1, axis_name) if train_batch_norm else None

    def loss_fn(params: Any, stats: Any, part: Batch) -> tuple[jax.Array, Any]:
        images = _images(state, part, augment)
        logits, stats = classify(
            params, stats, images, encoder=encoder, num_classes=num_classes, layout=layout
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, part["label"])
        top1 = (logits.argmax(-1) == part["label"]).astype(jnp.float32).mean()
        return losses.mean(), ({"loss": losses.mean(), "top1": top1}, stats)

    def microbatch_step(stats: Any, part: Batch) -> tuple[Any, Any, Any]:
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, (metrics, stats) = grad_fn(state.online_params, stats, part)
        return stats, (grads, metrics), {}

    stats, means, _ = collectives.accumulate(
        microbatch_step, state.online_stats, batch, accumulate_steps
    )
    grads, metrics = collectives.mean(means, axis_name)
    if train_batch_norm:  # otherwise unchanged; a mean would only round them
        stats = collectives.mean(stats, axis_name)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.online_params)
    metrics |= {"learning_rate": schedule(state.step)} | optim.norms(grads, updates)
    new_state = state.replace(
        step=state.step + 1,
        online_params=optax.apply_updates(state.online_params, updates),
        online_stats=stats,
        opt_state=opt_state,
    )
    return new_state, metrics | {"finite": all_finite(metrics)}


def finetune_optimizer(
    encoder: optax.GradientTransformation,
    head: optax.GradientTransformation,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """One optimizer for the encoder's parameters and another for the classifier's.

    `layer_decay`: the learning rate of an encoder's layer is that of the layer after it, times this
    (BEiT, arXiv 2106.08254, appendix H; MAE, arXiv 2111.06377, appendix A.2).
    """
    if layer_decay != 1.0:
        encoder = optax.chain(encoder, optax.stateless(_decayed(layer_decay)))
    parts = {"encoder": encoder, "classifier": head}
    return optax.partition(parts, {name: name for name in parts})


def _decayed(decay: float) -> Callable[[Any, Any], Any]:
    def scaled(updates: Any, params: Any) -> Any:
        del params
        parts = updates["encoder"]
        factors = {name: decay**distance for name, distance in head_distances(parts).items()}
        scaled = {
            name: jax.tree.map(lambda u, f=factors[name]: f * u, parts[name]) for name in parts
        }
        return updates | {"encoder": scaled}

    return scaled


def head_distances(encoder: Iterable[str]) -> dict[str, int]:
    """How many layers each part of an encoder's parameters is from the classifier.

    A layer is a stage of a ResNet or a block of a ViT. The stem, or the projection of the patches,
    the class token and the positions are the first one; the norm after the last block is none.
    """
    matches = {name: re.match(r"(?:stage|block)(\d+)", name) for name in encoder}
    layer = {name: int(match[1]) if match else 0 for name, match in matches.items()}
    last = max(layer.values()) + 1
    return {name: 0 if name == "norm" else last - number for name, number in layer.items()}
