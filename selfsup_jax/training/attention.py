"""A picture of what a Vision Transformer's class token attends to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from selfsup_jax.data import inputs
from selfsup_jax.data.augment import normalize
from selfsup_jax.data.sources import Source
from selfsup_jax.devices import parallel
from selfsup_jax.method import Method
from selfsup_jax.state import TrainState, encoder_variables
from selfsup_jax.viz import plots

_IMAGES = 8  # rows of the picture


class AttentionMaps:
    """Draws the last block's attention of the class token, of each head, on a few images.

    Args:
        method: of the run, whose encoder is drawn.
        config: of the run.
        source: the images, of which some are taken, evenly spread.
    """

    def __init__(self, method: Method, config: ConfigDict, source: Source):
        self._config, self._source = config, source
        self._images: np.ndarray | None = None
        module: Any = getattr(getattr(method, "network", None), "encoder", None)
        self._there = hasattr(module, "attention")  # ResNets have none

        @jax.jit
        def attention(variables: Any, images: jax.Array) -> jax.Array:
            scaled = images.astype(jnp.float32) / 255.0
            normalized = normalize(scaled, config.views.mean, config.views.std)
            return module.apply(variables, normalized, method="attention")

        self._attention, self._network = attention, config.eval.network

    def draw(self, path: str, step: int, state: TrainState) -> None:
        """Writes the picture, on one host, of its own images; nothing for a ResNet."""
        if not self._there:
            return
        variables = parallel.unreplicate(encoder_variables(state, self._network))
        images = self._some_images()
        maps = np.asarray(self._attention(variables, images))
        plots.attention_maps(path, images, maps, step=step)

    def _some_images(self) -> np.ndarray:
        if self._images is None:
            limit = _IMAGES * jax.process_count()
            batches = inputs.eval_batches(self._config.data, self._source, _IMAGES, limit)()
            self._images = np.concatenate([batch["image"] for batch in batches])
        return self._images
