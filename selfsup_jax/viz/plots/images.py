"""Plots made of images: view pairs, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from selfsup_jax.viz.plots.page import FRAME, GREY, MARGIN, OTHER, SAME, TOP, open_page


def _tiles(images: np.ndarray, low: int = 90, high: int = 160) -> np.ndarray:
    """`[..., H, W, 3]` as uint8, pixels repeated or averaged to a side of about `low` to `high`."""
    images = np.asarray(images)
    if images.dtype != np.uint8:
        images = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    side = max(images.shape[-3:-1])
    if side <= high:
        factor = max(1, round(low / side))
        return images.repeat(factor, axis=-3).repeat(factor, axis=-2)
    factor = math.ceil(side / high)
    height, width = (max(1, n // factor) for n in images.shape[-3:-1])
    images = images[..., : height * factor, : width * factor, :]
    blocks = images.reshape(*images.shape[:-3], height, factor, width, factor, 3)
    return np.round(blocks.mean(axis=(-4, -2))).astype(np.uint8)


def view_pairs(path: str, view_1: np.ndarray, view_2: np.ndarray, *, step: int) -> None:
    """Draws augmented pairs `[N, H, W, 3]` in [0, 1], the network's input, four pairs in a row."""
    left, right = _tiles(view_1), _tiles(view_2)
    line = np.empty_like(left[:, :, :2])
    line[:] = FRAME
    pairs = np.concatenate([left, line, right], axis=2)  # [N, H, 2W + 2, 3]
    columns, gap = min(4, len(pairs)), 14
    pitch_y, pitch_x = pairs.shape[1] + gap, pairs.shape[2] + gap
    width = 2 * MARGIN + columns * pitch_x - gap
    height = TOP + math.ceil(len(pairs) / columns) * pitch_y - gap + MARGIN
    note = "each frame: two augmented views of one image, as they go into the network"
    with open_page(path, width, height, f"View pairs at step {step:,}", note) as page:
        for i, pair in enumerate(pairs):
            row, column = divmod(i, columns)
            page.paste(MARGIN + column * pitch_x, TOP + row * pitch_y, pair, FRAME, border=2)


class Neighbours(NamedTuple):
    """The nearest neighbours of Q queries, the nearest first.

    Attributes:
        images: `[Q, K, H, W, 3]` uint8.
        similarities: `[Q, K]`, cosine similarity.
        names: `[Q, K]` classes or files, or None.
    """

    images: np.ndarray
    similarities: np.ndarray
    names: Sequence[Sequence[str]] | None


def nearest_neighbours(
    path: str,
    queries: np.ndarray,
    neighbours: np.ndarray,
    similarities: np.ndarray,
    *,
    query_names: Sequence[str] | None = None,
    neighbour_names: Sequence[Sequence[str]] | None = None,
    files: bool = False,
    untrained: Neighbours | None = None,
    title: str,
) -> None:
    """Draws a row per query: its image, then its nearest neighbours with frames by class.

    Args:
        path: of the PNG file.
        queries: `[Q, H, W, 3]` uint8.
        neighbours: `[Q, K, H, W, 3]` uint8.
        similarities: `[Q, K]`, cosine similarity.
        query_names: `[Q]` classes, or files.
        neighbour_names: `[Q, K]` classes, or files.
        files: the names are of files. Otherwise frames are green or red if both names are given.
        untrained: the neighbours by an encoder that was never trained, drawn beside the others.
        title: of the figure.
    """
    left = _tiles(queries)
    blocks = [Neighbours(neighbours, similarities, neighbour_names)]
    blocks += [untrained] if untrained else []
    shown = [_tiles(block.images) for block in blocks]
    tile_height, tile = left.shape[1:3]
    pitch_x, pitch_y = tile + 16, tile_height + (33 if neighbour_names is None else 46)
    first, top = MARGIN + tile + 40, TOP + 20
    starts = [first, first + shown[0].shape[1] * pitch_x + 24][: len(blocks)]
    width = starts[-1] + shown[-1].shape[1] * pitch_x - 16 + MARGIN
    judged = query_names is not None and neighbour_names is not None and not files
    note = "green: of the query's class; red: of another" if judged else ""
    with open_page(path, width, top + len(left) * pitch_y, title, note) as page:
        page.write(MARGIN, TOP - 3, "query", tile, ha="left")
        heads = ("nearest first, with cosine", "by the encoder before training")
        for x, head in zip(starts, heads, strict=False):
            page.write(x, TOP - 3, head, page.width - x, ha="left")
        for i, query in enumerate(left):
            y = top + i * pitch_y
            query_name = "" if query_names is None else query_names[i]
            page.paste(MARGIN, y, query, FRAME, border=2)
            page.write(MARGIN + tile / 2, y + tile_height + 6, query_name, tile + 8)
            for start, block, images in zip(starts, blocks, shown, strict=True):
                names = [""] * len(images[i]) if block.names is None else block.names[i]
                for j, (image, name) in enumerate(zip(images[i], names, strict=True)):
                    x, below = start + j * pitch_x, y + tile_height + 6
                    frame = FRAME if not judged else SAME if name == query_name else OTHER
                    page.paste(x, y, image, frame, border=4 if judged else 2)
                    cosine = f"{float(block.similarities[i][j]):z.2f}"
                    page.write(x + tile / 2, below, cosine, tile, color=GREY)
                    page.write(x + tile / 2, below + 13, name, tile + 8)
