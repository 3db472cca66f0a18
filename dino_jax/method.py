"""DINO (Caron et al. 2021, arXiv 2104.14294): algorithm 1, with multi-crop, on any devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dino_jax import losses, settings
from selfsup_jax.build import parts_from_config, start_with_copy
from selfsup_jax.devices.collectives import BatchLayout
from selfsup_jax.method import Context, Loss, Method, Views, apply, split_views, stack_views
from selfsup_jax.models.heads import Prototypes, l2_normalize
from selfsup_jax.state import Outputs, PyTree, TrainState

# The parts of the teacher: a moving average of these parts of the student.
TEACHER_PARTS = ("encoder", "projector", "prototypes")


class DINO(nn.Module):
    """Encoder, projector to unit vectors, prototypes: student and teacher; and an online probe."""

    encoder: nn.Module
    projector: nn.Module
    prototypes: nn.Module
    classifier: nn.Module | None

    def __call__(
        self, images: Sequence[jax.Array], layouts: Sequence[BatchLayout], head_layout: BatchLayout
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Stacked views of each size to representation `[V * b, F]`, projection, `[V * b, K]`.

        The encoder runs once for each size, the head once for all, as in the authors' code.
        """
        features = [self.encoder(*group) for group in zip(images, layouts, strict=True)]
        representation = jnp.concatenate(features)
        projection = l2_normalize(self.projector(representation, head_layout))
        return representation, projection, self.prototypes(projection)


class DINOState(TrainState):
    """Student (online), teacher (target) and `centre` `[K]`, of the teacher's outputs."""

    centre: jax.Array


def loss(
    net: DINO,
    online: PyTree,
    target: PyTree,
    views: Views,
    state: DINOState,
    context: Context,
    *,
    student_temperature: float,
    teacher_temperature: Callable[[jax.Array], jax.Array],
    views_share_norm: bool = True,
) -> Loss:
    """Each view of the student against each other global view of the teacher; see `Method.loss`.

    `views_share_norm`: the views of a size share their batch statistics, as in the authors' code.
    """
    groups = list(views.values())  # the two global views come first
    counts = [len(group) for group in groups]
    images = [stack_views(group) for group in groups]
    layout = lambda count, **kw: context.layout(1 if views_share_norm else count, **kw)  # noqa: E731
    layouts = [layout(count, noise=True, first_view=2 * i) for i, count in enumerate(counts)]
    outputs, stats = apply(net, online, images, layouts, layout(sum(counts)))
    features, z, student = (split_views(x, sum(counts)) for x in outputs)  # [V, b, ...]
    outputs, target_stats = apply(net, target, images[:1], [layout(2)], layout(2))
    _, target_z, teacher = (split_views(x) for x in outputs)  # [2, b, ...]
    temperature = teacher_temperature(state.step)
    terms = losses.dino_loss(student, teacher, state.centre, student_temperature, temperature)
    mean, usage = context.mean((teacher.mean((0, 1)), terms.usage))
    metrics = {"teacher_entropy": terms.entropy, "teacher_uniform_kl": losses.uniform_kl(usage)}
    metrics |= {"student_kl": terms.student_kl, "teacher_temperature": temperature}
    rows = Outputs(features[:2], projection=z[:2], prediction=z[:2], target=target_z)
    return Loss(terms.loss, rows, stats, target_stats, metrics, carried=mean[None, None])


def carry(
    state: DINOState, means: jax.Array, after: jax.Array, *, centre_momentum: float
) -> DINOState:
    """Equation 4: renews the centre; `means` `[1, M, K]` of microbatches, over all devices."""
    mean, rate = means.mean((0, 1)), 1.0 - centre_momentum
    return state.replace(centre=optax.incremental_update(mean, state.centre, step_size=rate))


def start(rng: jax.Array, net: DINO, *, image_shape: tuple[int, ...]) -> DINOState:
    """The initial state: student and teacher are equal, the centre is 0."""
    state = start_with_copy(rng, net, image_shape=image_shape, target_parts=TEACHER_PARTS)
    return DINOState(**vars(state), centre=jnp.zeros(net.prototypes.count, jnp.float32))


def build(config: Any, num_classes: int | None, total_steps: int, warmup_steps: int) -> Method:
    """Builds DINO from `configs/dino.py`; raises `UserError` for an invalid field."""
    settings.check(config)
    views = {"global": 2, "local": None}
    parts = parts_from_config(config, num_classes, total_steps, warmup_steps, views)
    prototypes = Prototypes(config.prototypes, config.unit_prototypes, parts.projector.dtype)
    of_config = {
        "network": DINO(parts.encoder, parts.projector, prototypes, parts.classifier),
        "loss": functools.partial(loss, **settings.of_loss(config)),
        "start": functools.partial(start, image_shape=parts.image_shape),
        "carry": functools.partial(carry, centre_momentum=config.centre_momentum),
        "signs": settings.signs(config),
        "notes": settings.notes(config),
    }
    return Method(**(parts.shared | of_config))
