"""What another padding changes in an encoder's features, on real images."""

from __future__ import annotations

import os

import numpy as np

from selfsup_jax.data import scan
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.interop.api import Encoder

_IMAGES = 200  # at most


def padding(frozen: FrozenEncoder, folder: str) -> str:
    """Features with the encoder's own padding beside those with PyTorch's, in one line.

    Args:
        frozen: the encoder.
        folder: images, also in sub-folders; up to 200 of them are used, evenly spread.

    Raises:
        UserError: there are no images, or one cannot be decoded.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--measure={folder}: is not a directory")
    files, _ = scan.images({"": folder})[""]
    paths = [os.path.join(folder, path) for path in sorted(files)]
    if not paths:
        raise UserError(f"--measure={folder}: holds no images")
    rows = np.unique(np.linspace(0, len(paths) - 1, _IMAGES).astype(int))
    fields = frozen.config["encoder"]
    padded = frozen.config | {"encoder": fields | {"padding": "torch"}}
    own, theirs = (
        Encoder(frozen._replace(config=config)).transform([paths[i] for i in rows])
        for config in (frozen.config, padded)
    )
    norms = [np.linalg.norm(x, axis=1) for x in (own, theirs)]
    cosine = (own * theirs).sum(1) / np.maximum(norms[0] * norms[1], 1e-12)
    distance = np.linalg.norm(own - theirs, axis=1) / np.maximum(norms[0], 1e-12)
    return (
        f"padding {fields['padding']!r} replaced by PyTorch's, which this encoder was not trained "
        f"with: on {len(rows)} images its features differ by {100 * distance.mean():.1f} % of "
        f"their length (at most {100 * distance.max():.1f} %), cosine {cosine.mean():.4f} (at "
        f"least {cosine.min():.4f})"
    )
