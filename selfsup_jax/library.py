"""Pretraining from Python, with one's own loop: `load_config`, `build_method`, `make_views`.

    config = selfsup_jax.load_config("byol:demo", steps=500)
    method = selfsup_jax.build_method(config, num_images=len(images))
    state = jax.jit(method.init_state)(jax.random.PRNGKey(config.seed))
    step = jax.jit(method.train_step, donate_argnums=0)
    views = selfsup_jax.make_views(config)
    for i, batch in enumerate(batches):  # uint8 [batch_size, H, W, 3]
        state, metrics = step(state, views(i, batch))
    features = selfsup_jax.Encoder.of_state(config, state).transform(images)

`run_job(config, workdir)` does the same on all devices, as `selfsup --config=... --workdir=...`,
and keeps checkpoints, metrics and pictures; its encoder is `selfsup_jax.Encoder.load(workdir)`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from selfsup_jax import durations
from selfsup_jax.build import find
from selfsup_jax.config import check_fields, check_patterns, validate
from selfsup_jax.data import inputs, resident
from selfsup_jax.devices import process
from selfsup_jax.errors import UserError
from selfsup_jax.method import Method
from selfsup_jax.state import Batch


def build_method(config: ConfigDict, num_images: int, num_classes: int | None = None) -> Method:
    """The method of a pretraining config: its network, loss, optimizer and augmentation.

    Args:
        config: see `load_config`. It is left as it is.
        num_images: that are trained on: they turn epochs into steps.
        num_classes: of the labels `[B]` int32 that `make_views` is given; None without labels.

    Returns:
        A record of pure functions. `method.init_state(rng)` is the first state;
        `method.train_step(state, batch)` returns the next one and metrics, under `jax.jit` or not.

    Raises:
        UserError: a field is invalid.
    """
    config = _resolved(config)
    build = find(config.method)
    validate(config, build)
    check_patterns(config, build)
    total, warmup = durations.total_and_warmup(config, num_images)
    return build(config, num_classes, total, warmup)


def make_views(config: ConfigDict) -> Callable[..., Batch]:
    """Random crops of images, as a run with this config draws them.

    Returns:
        `views(step, images, labels=None) -> batch` for `Method.train_step`: `images` `[B, H, W, 3]`
        uint8, all of one size; `labels` `[B]` int32. The crops depend on the config's seed, the
        step and the place in the batch. Flips, colours and blur are part of the training step.

    Raises:
        UserError: a field is invalid; or, when it is called, the images are not uint8 or not of
            the config's batch size.
    """
    config = _resolved(config)
    specs = tuple(inputs.crop_specs(config))
    crop = jax.jit(functools.partial(resident.crop_batch, None, specs=specs, seed=config.seed))

    def views(step: int, images: jax.Array, labels: jax.Array | None = None) -> Batch:
        shape = (config.batch_size, *images.shape[1:3], 3)
        if images.dtype != jnp.uint8 or images.shape != shape:
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}; must be uint8 "
                f"[{config.batch_size}, H, W, 3], as config.batch_size is {config.batch_size}"
            )
        index = jnp.arange(len(images), dtype=jnp.int32)
        batch = {"image": images, "index": index, "drawn": index}
        if labels is not None:
            batch["label"] = jnp.asarray(labels, jnp.int32)
        return crop(jnp.int32(step), batch)

    return views


def run_job(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Runs a config in this process: pretraining, a sweep, or an evaluation of an encoder.

    The same as `selfsup --config=... --workdir=...`, on all devices that JAX has. Where it was
    stopped it goes on; no step is repeated.

    Args:
        config: see `load_config`. It is left as it is.
        workdir: where everything of this run is written.

    Returns:
        The content of `results.json`.

    Raises:
        UserError: an error in the config, the data or the workdir, a loss that is not finite, or a
            full disk.
        Stopped: after SIGTERM or Ctrl-C, once the current step is saved.
    """
    from selfsup_jax import jobs
    from selfsup_jax.training import pretrain, sweep

    check_fields(config)
    runners: dict[str, Callable[[ConfigDict, str], dict[str, Any]]]
    runners = {"pretrain": pretrain.pretrain, "sweep": sweep.run}
    return runners.get(config.job, jobs.run)(config, os.path.expanduser(workdir))


def _resolved(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.compute_dtype = process.compute_dtype(config.compute_dtype)
    check_fields(config)
    if config.job != "pretrain":
        raise UserError(f"config.job={config.job!r}: must be pretrain, to build a method")
    return config
