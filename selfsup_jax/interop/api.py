"""A trained encoder in other programs: `selfsup_jax.Encoder`."""

from __future__ import annotations

import functools
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from selfsup_jax.data import pixels, resident
from selfsup_jax.data.augment import normalize
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.interop import importing
from selfsup_jax.state import TrainState, encoder_variables

# A path, a PIL image, or `[H, W, 3]` uint8.
ImageLike = str | os.PathLike | Image.Image | np.ndarray

_BLOCK = 128  # images are padded to multiples of it: few sizes are compiled


class Encoder:
    """An encoder with its weights, and images prepared for it as its training recorded.

    Attributes:
        variables: `{"params", "batch_stats"}`, float32 host arrays.
        config: of the run that trained it, or of the import.
        origin: where it comes from, in words.
        image_size: pixels of the images that the network is given.
        num_features: D.
    """

    def __init__(self, frozen: FrozenEncoder):
        self._frozen = frozen
        self.variables, self.config = frozen.variables, frozen.config
        self.origin = frozen.described
        self.image_size: int = frozen.config["data"]["image_size"]
        self._mean, self._std = frozen.normalization
        self._module: Any = encoder.module(frozen.config)
        self.num_features: int = self._module.num_features

        @functools.partial(jax.jit, static_argnames="dense")
        def of_pixels(variables: Any, images: jax.Array, dense: bool) -> jax.Array:
            return self.apply(variables, self.normalize(images), dense=dense)

        self._of_pixels = of_pixels

    @classmethod
    def load(cls, path: str | os.PathLike, step: int | None = None) -> Encoder:
        """Loads an encoder; nothing in the files is run.

        Args:
            path: a run's workdir, a checkpoint in one, an exported or imported encoder, or a file
                or a folder of another project (see `selfsup_jax.interop.importing.read`).
            step: of a workdir's checkpoint; None for the newest.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        path = os.path.expanduser(os.fspath(path))
        if os.path.isfile(path) or os.path.isfile(f"{path}.index"):
            return cls(importing.read(path)[0])
        ours = (os.path.join(path, name) for name in (encoder.ABOUT, "checkpoints"))
        if importing.file_in(path) and not any(map(os.path.exists, ours)):
            return cls(importing.read(path)[0])
        return cls(encoder.load(path, step))

    @classmethod
    def of_state(cls, config: ConfigDict, state: TrainState) -> Encoder:
        """The encoder of a training state, of a run with this config."""
        host = jax.tree.map(np.asarray, encoder_variables(state, config.eval.network))
        resolved = json.loads(config.copy_and_resolve_references().to_json())
        step = int(state.step)
        about = f"step {step} of {config.method}"
        return cls(FrozenEncoder(host, resolved, about, None, step, about))

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the encoder alone to a folder, for `load` and for a job's `config.checkpoint`.

        Args:
            folder: is created; an encoder that it holds is replaced.

        Raises:
            UserError: the folder cannot be written to, or has files that are not of an encoder.
        """
        folder = os.path.expanduser(os.fspath(folder))
        encoder.export(self._frozen._replace(variables=self.variables), folder)

    def normalize(self, images: jax.Array) -> jax.Array:
        """`[..., 3]` uint8 to the float32 input of `apply`; raises `TypeError` for others."""
        if images.dtype != jnp.uint8:
            raise TypeError(f"normalize: images are {images.dtype}; must be uint8, from 0 to 255")
        return normalize(images.astype(jnp.float32) / 255.0, self._mean, self._std)

    def apply(self, variables: Any, images: jax.Array, *, dense: bool = False) -> jax.Array:
        """Representations of normalised images; a pure function, for `jax.jit` and `jax.grad`.

        Args:
            variables: as `self.variables`.
            images: `[N, H, W, 3]` float32, see `normalize`.
            dense: the maps before the pooling, `[N, h, w, D]`, in place of `[N, D]`.

        Returns:
            float32.

        Raises:
            TypeError: the images are whole numbers, or have another shape.
            ValueError: they are of a size that normalised images don't have, as pixels from 0 to
                255 are; not inside of `jax.jit`, where values are not known.
        """
        _check_normalized(images)
        features: jax.Array = self._module.apply(variables, images, pooled=not dense)
        return features

    def transform(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 64,
        dense: bool = False,
    ) -> np.ndarray:
        """Decodes, resizes, crops and normalises images as the evaluation does; encodes them.

        Args:
            images: any number of paths, PIL images or uint8 arrays, of any sizes.
            batch_size: images at once.
            dense: see `apply`.

        Returns:
            `[N, D]` float32, in the order of the images; `dense`: `[N, h, w, D]`.

        Raises:
            UserError: there is no image, or one cannot be decoded or is of another type.
        """
        if batch_size < 1:
            raise UserError(f"transform: batch_size={batch_size}: must be at least 1")
        if isinstance(images, str | os.PathLike | Image.Image):
            images = [images]
        elif isinstance(images, np.ndarray) and images.ndim <= 3:
            images = images[None]
        parts = [
            np.asarray(self._of_pixels(self.variables, views, dense))[:count]
            for views, count in self._views(images, batch_size)
        ]
        if not parts:
            raise UserError("transform: there are no images")
        return np.concatenate(parts)

    def _views(
        self, images: Iterable[ImageLike], batch_size: int
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yields (test views `[batch, S, S, 3]` uint8, number of images among them)."""
        data = self.config["data"]
        given = iter(images)
        first, small = 0, 0
        while some := list(itertools.islice(given, batch_size)):
            batch = [self._decoded(image, first + i) for i, image in enumerate(some)]
            small += sum(2 * min(image.shape[:2]) < self.image_size for image in batch)
            first, count = first + len(batch), len(batch)
            if first > count:  # of the size of the first batch, which is compiled already
                batch += batch[-1:] * (batch_size - count)
            options = {"resize": data["test_resize"], "method": data["resize_method"]}
            yield resident.test_views(*_stacked(batch), size=self.image_size, **options), count
        if small:
            warnings.warn(
                f"{small} of {first} images are less than half as large as the {self.image_size} "
                "px that the encoder is used to: their features may be poor",
                stacklevel=4,
            )

    def _decoded(self, image: Any, index: int) -> np.ndarray:
        """`[H, W, 3]` uint8."""
        data = self.config["data"]
        reading = pixels.Reading(
            data.get("intensity", "auto"), data.get("exif_orientation") is not False
        )
        if isinstance(image, Image.Image):
            return np.asarray(image.convert("RGB"))
        if isinstance(image, str | os.PathLike):
            array = pixels.decoded(os.fspath(image), reading)
            if array is None:
                raise UserError(f"transform: {os.fspath(image)}: cannot be decoded")
            return array
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            raise UserError(
                f"transform: image {index} is {array.dtype} {list(array.shape)}; must be a path, a "
                "PIL image or uint8 [H, W, 3]"
            )
        return array


def _check_normalized(images: jax.Array) -> None:
    hint = "; `normalize` makes the input of uint8 images, `transform` does all"
    if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        what = f"{images.dtype} {list(images.shape)}"
        raise TypeError(f"apply: images are {what}; must be normalised floats [N, H, W, 3]{hint}")
    if isinstance(images, jax.core.Tracer) or not images.size:
        return
    largest = float(jnp.max(jnp.abs(images)))
    if largest > 50:  # ImageNet's white is 2.6, and with the demo's deviation of 0.31 it is 2.8
        why = "as if not normalised" if largest < 300 else "out of range"
        raise ValueError(f"apply: images have values up to {largest:.3g}, {why}{hint}")


def _stacked(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`[b, H, W, 3]`, padded; and the images' sizes `[b, 2]`."""
    sizes = np.asarray([image.shape[:2] for image in images], np.int32)
    height, width = -(-sizes.max(axis=0) // _BLOCK) * _BLOCK
    stacked = np.zeros((len(images), height, width, 3), np.uint8)
    for row, image in zip(stacked, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return stacked, sizes
