"""Schedules, parameter masks and optimizers, built from optax as in the authors' code."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from selfsup_jax import checks
from selfsup_jax.errors import bad_field

_RULES: checks.Table = {
    "name": checks.one_of(("sgd", "lars", "adamw", "lamb")),
    "scaling": checks.one_of(("linear", "sqrt", "none")),
    "schedule": checks.one_of(("cosine", "step", "constant")),
    "learning_rate": checks.not_negative,
    "weight_decay": checks.not_negative,
    "weight_decay_end": checks.optional(checks.not_negative),
    "trust_coefficient": checks.not_negative,
    "excluded_rate": checks.not_negative,
    "clip_norm": checks.not_negative,
    "momentum": checks.share,
    "beta_2": checks.share,
    "end_fraction": checks.share,
    "drop_factor": checks.share,
    "drops": checks.each(
        checks.number(0, 1, above=True),
        "fractions of the run, above 0 and below 1, in ascending order",
        lambda drops: 1 not in drops and list(drops) == sorted(set(drops)),
    ),
    "adam_epsilon": checks.positive,
    "exclude": checks.patterns,
    "constant_rate": checks.patterns,
    "freeze": checks.patterns,
    "freeze_steps": checks.optional(checks.whole(0)),
    "freeze_examples": checks.optional(checks.whole(0)),
    "freeze_epochs": checks.optional(checks.not_negative),
    "clip_each": checks.flag,
    "nesterov": checks.flag,
    "rate_inside_momentum": checks.flag,
    "warmup_steps": checks.optional(checks.whole(0)),
    "warmup_examples": checks.optional(checks.whole(0)),
    "warmup_epochs": checks.optional(checks.not_negative),
}
FIELDS = {f"optimizer.{name}": rule for name, rule in _RULES.items()}
FIELDS["tau_schedule"] = checks.one_of(("cosine", "constant"))


def scaled_learning_rate(base: float, batch_size: int, scaling: str) -> float:
    """The peak learning rate: `linear`: base * B / 256, `sqrt`: base * sqrt(B), `none`: base."""
    return base * {"linear": batch_size / 256, "sqrt": batch_size**0.5, "none": 1.0}[scaling]


def learning_rate_schedule(
    kind: str,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    drops: Sequence[float] = (),
    drop_factor: float = 0.1,
    end_fraction: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to `end_fraction` of the peak, steps, or a constant.

    Update k, counted from 0, uses the value at k: the first update of a warm-up has rate 0.
    """
    after = max(1, total_steps - warmup_steps)
    if kind == "cosine":
        main = optax.cosine_decay_schedule(peak, after, alpha=end_fraction)
    elif kind == "step":
        boundaries: dict[int, float] = {}
        for d in drops:  # of a short run, several may fall on one step
            at = round(d * total_steps) - warmup_steps
            boundaries[at] = boundaries.get(at, 1.0) * drop_factor
        main = optax.piecewise_constant_schedule(peak, boundaries)
    else:
        main = optax.constant_schedule(peak)
    if not warmup_steps:
        return main
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, main], [warmup_steps])


def cosine_between(start: float, end: float, total_steps: int) -> optax.Schedule:
    """Half a cosine from `start` to `end`, then constant, as DINO's weight decay."""

    def value(step: jax.Array) -> jax.Array:
        progress = jnp.minimum(step / total_steps, 1.0)
        return end + (start - end) * (1.0 + jnp.cos(jnp.pi * progress)) / 2.0

    return value


def cosine_tau(step: jax.Array, total_steps: int, tau_base: float) -> jax.Array:
    """BYOL section 3.1: tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2, from tau_base to 1."""
    progress = jnp.minimum(step / total_steps, 1.0)
    return 1.0 - (1.0 - tau_base) * (jnp.cos(jnp.pi * progress) + 1.0) / 2.0


def tau_schedule(kind: str, tau_base: float, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """step -> EMA decay of the target: `cosine` (BYOL's, from tau_base to 1) or `constant`."""
    if kind == "constant":
        return lambda step: jnp.asarray(tau_base, jnp.float32)
    return functools.partial(cosine_tau, total_steps=total_steps, tau_base=tau_base)


def path_mask(params: Any, exclude: Sequence[str], field: str = "exclude") -> Any:
    """True where no pattern in `exclude` matches the parameter's path, such as `a/b/kernel`.

    Raises:
        UserError: a pattern matches no parameter: it is misspelt, or the model has changed.
    """
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = ["/".join(str(key.key) for key in path) for path, _ in paths]
    for pattern in exclude:
        if not any(re.search(pattern, name) for name in names):
            why = f"matches no parameter; the first are {', '.join(names[:3])}"
            raise bad_field(f"optimizer.{field}", pattern, why)
    kept = [not any(re.search(pattern, name) for pattern in exclude) for name in names]
    return jax.tree.unflatten(jax.tree.structure(params), kept)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float | optax.Schedule,
    exclude: Sequence[str],
    trust_coefficient: float | None = None,
    no_ratio: Sequence[str] = (),
    rate_inside_momentum: bool = False,
    nesterov: bool = False,
    adam: tuple[float, float] | None = None,
    clip_norm: float = 0.0,
    clip_each: bool = False,
    freeze: Sequence[str] = (),
    freeze_steps: int = 0,
    excluded_rate: float = 1.0,
    constant_rate: Sequence[str] = (),
    peak: float = 0.0,
) -> optax.GradientTransformation:
    """SGD (PyTorch's form) and AdamW or, with a trust coefficient, LARS and LAMB.

    SGD and LARS: the weight decay is added to the gradient, LARS's ratio scales the sum, then the
    momentum is applied. The learning rate multiplies the momentum's output (BYOL's code, PyTorch's
    SGD) or its input (SimCLR's code, `optax.lars`). AdamW and LAMB: the weight decay is added to
    Adam's output, and LAMB's ratio scales the sum.

    Args:
        schedule: step -> learning rate.
        momentum: decay of the momentum trace; Adam's first beta.
        weight_decay: the coefficient of the weight decay, or a schedule step -> coefficient.
        exclude: path patterns of parameters without weight decay and without the LARS ratio.
        trust_coefficient: LARS's eta (LAMB's is 1); None for SGD or AdamW.
        no_ratio: path patterns of further parameters without the ratio; their decay stays.
        rate_inside_momentum: the learning rate multiplies the momentum's input.
        nesterov: Nesterov momentum.
        adam: (second beta, epsilon) of AdamW and LAMB; None for SGD or LARS.
        clip_norm: maximum norm of the whole gradient; a larger one is scaled down. 0: no clipping.
        clip_each: it is the maximum of each tensor's norm.
        freeze: path patterns of parameters that stay as they are for the first `freeze_steps`
            steps, as if they had no gradient: Adam's moments and their debiasing start after them.
        excluded_rate: factor on the learning rate of the parameters in `exclude`.
        constant_rate: path patterns of parameters whose learning rate is always `peak`.
        peak: the peak learning rate of the schedule.
    """

    mask = functools.partial(path_mask, exclude=exclude)
    after = functools.partial(_after_steps, patterns=freeze, steps=freeze_steps)
    clip = clip_each_by_norm if clip_each else optax.clip_by_global_norm
    parts = [clip(clip_norm)] if clip_norm else []
    if adam is not None:
        parts.append(after(optax.scale_by_adam(b1=momentum, b2=adam[0], eps=adam[1])))
    parts.append(optax.masked(optax.add_decayed_weights(weight_decay), mask))
    if trust_coefficient is not None:
        ratio = optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient)
        adapted = functools.partial(path_mask, exclude=(*exclude, *no_ratio))
        parts.append(optax.masked(ratio, adapted))
    if freeze:
        parts.append(after(optax.identity()))
    rates = _rates(schedule, exclude, excluded_rate, constant_rate, peak)
    if adam is not None:
        return optax.chain(*parts, *rates)
    trace = optax.trace(decay=momentum, nesterov=nesterov)
    return optax.chain(*parts, *((*rates, trace) if rate_inside_momentum else (trace, *rates)))


def clip_each_by_norm(limit: float) -> optax.GradientTransformation:
    """Scales each tensor down whose norm is above `limit`, as DINO's code (`clip_gradients`)."""
    return optax.stateless_with_tree_map(
        lambda g, _: g * jnp.minimum(1.0, limit / (jnp.linalg.norm(g) + 1e-6))
    )


def _after_steps(
    transform: optax.GradientTransformation, patterns: Sequence[str], steps: int
) -> optax.GradientTransformation:
    """The transform; for the parameters of `patterns` it starts after `steps` steps of zeros."""
    if not patterns:
        return transform
    others = functools.partial(path_mask, exclude=patterns, field="freeze")
    late = optax.conditionally_mask(transform, lambda step: step >= steps)
    return optax.chain(optax.masked(transform, others), optax.masked(late, _opposite(others)))


def _rates(
    schedule: optax.Schedule,
    exclude: Sequence[str],
    excluded_rate: float,
    constant_rate: Sequence[str],
    peak: float,
) -> list[optax.GradientTransformation]:
    """The learning rate, and the different ones of `constant_rate` and `exclude`."""
    rates = [optax.scale_by_learning_rate(schedule)]
    if constant_rate:
        scheduled = functools.partial(path_mask, exclude=constant_rate, field="constant_rate")
        constant = optax.masked(optax.scale_by_learning_rate(peak), _opposite(scheduled))
        rates = [optax.masked(rates[0], scheduled), constant]
    if excluded_rate != 1.0:
        excluded = _opposite(functools.partial(path_mask, exclude=exclude))
        rates.append(optax.masked(optax.scale(excluded_rate), excluded))
    return rates


def _opposite(mask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda params: jax.tree.map(lambda kept: not kept, mask(params))


def describe(config: Any, batch_size: int, total_steps: int, warmup_steps: int) -> str:
    """Describes the learning rate and its scaling rule, for the log."""
    base = config.learning_rate
    peak = scaled_learning_rate(base, batch_size, config.scaling)
    rule = {
        "linear": f" = {base:g} x {batch_size} / 256 (linear scaling)",
        "sqrt": f" = {base:g} x sqrt({batch_size}) (square-root scaling)",
        "none": " (not scaled by the batch)",
    }[config.scaling]
    after = f"{total_steps - warmup_steps:,} steps"
    course = {
        "cosine": f"cosine to {peak * config.end_fraction:.3g} over {after}",
        "step": f"x {config.drop_factor:g} at steps "
        + ", ".join(f"{round(d * total_steps):,}" for d in config.drops),
        "constant": "constant",
    }[config.schedule]
    warmup = f"{warmup_steps:,} steps of warm-up, then " if warmup_steps else ""
    return f"learning rate {peak:.4g}{rule}; {warmup}{course}; {config.name.upper()}"


def from_config(
    config: Any,
    batch_size: int,
    total_steps: int,
    warmup_steps: int,
    no_ratio: Sequence[str] = (),
    frozen: Sequence[str] = (),
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The schedule and the optimizer of a section `config.optimizer` (see `configs/common.py`).

    `no_ratio`: see `make_optimizer`. `frozen`: path patterns of parameters without gradient, which
    stay as they are: nothing else would change them but weight decay.
    """
    peak = scaled_learning_rate(config.learning_rate, batch_size, config.scaling)
    schedule = learning_rate_schedule(
        config.schedule,
        peak,
        total_steps,
        warmup_steps,
        drops=config.drops,
        drop_factor=config.drop_factor,
        end_fraction=config.end_fraction,
    )
    weight_decay = config.weight_decay
    if config.weight_decay_end is not None:
        weight_decay = cosine_between(weight_decay, config.weight_decay_end, total_steps)
    trust = {"lars": config.trust_coefficient, "lamb": 1.0}
    optimizer = make_optimizer(
        schedule,
        momentum=config.momentum,
        weight_decay=weight_decay,
        exclude=(*config.exclude, *frozen),
        trust_coefficient=trust.get(config.name),
        no_ratio=no_ratio,
        rate_inside_momentum=config.rate_inside_momentum,
        nesterov=config.nesterov,
        adam=(config.beta_2, config.adam_epsilon) if config.name in ("adamw", "lamb") else None,
        clip_norm=config.clip_norm,
        clip_each=config.clip_each,
        freeze=config.freeze,
        freeze_steps=config.freeze_steps or 0,
        excluded_rate=config.excluded_rate,
        constant_rate=config.constant_rate,
        peak=peak,
    )
    return schedule, optimizer


def check(config: Any) -> None:
    """Checks what fields of the section `optimizer` are together; raises `UserError`."""
    schedule, drops = config.optimizer.schedule, tuple(config.optimizer.drops)
    if schedule == "step" and not drops:
        raise bad_field("optimizer.drops", drops, "must be fractions of the run, as '(0.6,0.8)'")
    if schedule != "step" and drops:
        valid = f"have no effect with optimizer.schedule={schedule!r}; give '()', or 'step' there"
        raise bad_field("optimizer.drops", drops, valid)


def norms(grads: dict[str, Any], updates: Any) -> dict[str, jax.Array]:
    """`grad_norm/PART` of each part of the online network, and `update_norm`; float32 scalars."""
    by_part = {f"grad_norm/{part}": optax.tree.norm(tree) for part, tree in grads.items()}
    return {**by_part, "update_norm": optax.tree.norm(updates)}
