"""Plots made of images: view pairs, nearest neighbours, attention."""

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


def view_pairs(
    path: str,
    view_1: np.ndarray,
    view_2: np.ndarray,
    local: np.ndarray | None = None,
    *,
    step: int,
) -> None:
    """Draws augmented pairs, the network's input, four pairs in a row.

    Args:
        path: of the PNG file.
        view_1, view_2: `[N, H, W, 3]` in [0, 1].
        local: `[V, N, h, w, 3]` in [0, 1], further views, drawn below the pairs; or None.
        step: of the title.
    """
    left, right = _tiles(view_1), _tiles(view_2)
    line = np.empty_like(left[:, :, :2])
    line[:] = FRAME
    pairs = np.concatenate([left, line, right], axis=2)  # [N, H, 2W + 2, 3]
    note = "each frame: two augmented views of one image, as they go into the network"
    if local is not None and len(local):
        pairs = np.concatenate([pairs, _rows_of(local, pairs.shape[2])], axis=1)
        note += "; below, its small crops"
    columns, gap = min(4, len(pairs)), 14
    pitch_y, pitch_x = pairs.shape[1] + gap, pairs.shape[2] + gap
    width = 2 * MARGIN + columns * pitch_x - gap
    height = TOP + math.ceil(len(pairs) / columns) * pitch_y - gap + MARGIN
    with open_page(path, width, height, f"View pairs at step {step:,}", note) as page:
        for i, pair in enumerate(pairs):
            row, column = divmod(i, columns)
            page.paste(MARGIN + column * pitch_x, TOP + row * pitch_y, pair, FRAME, border=2)


def _rows_of(views: np.ndarray, width: int, columns: int = 4) -> np.ndarray:
    """`[V, N, h, w, 3]` to `[N, H, width, 3]`: the views of each image in rows, at one scale."""
    side = width // min(columns, len(views)) - 2
    whole = max(1, side // views.shape[-2]) * views.shape[-2]
    tiles = _tiles(views, low=whole, high=max(side, 1))
    height = tiles.shape[2] + 2
    rows = math.ceil(len(tiles) / columns)
    page = np.empty((tiles.shape[1], rows * height, width, 3), np.uint8)
    page[:] = FRAME
    for i, view in enumerate(tiles):
        row, column = divmod(i, columns)
        y, x = row * height + 2, column * (side + 2)
        page[:, y : y + view.shape[1], x : x + view.shape[2]] = view
    return page


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


_HEADS = 16  # of each image, at most


def attention_maps(path: str, images: np.ndarray, maps: np.ndarray, *, step: int) -> None:
    """Draws a row per image: the image, then what each head of the class token attends to.

    Args:
        path: of the PNG file.
        images: `[N, H, W, 3]` uint8.
        maps: `[N, heads, h, w]`, the attention to the patches; each map is scaled to its maximum.
        step: of the encoder.
    """
    from matplotlib import colormaps

    tiles, maps = _tiles(images), maps[:, :_HEADS]
    height, width = tiles.shape[1:3]
    rows, columns = (
        np.arange(n) * m // n for n, m in zip((height, width), maps.shape[2:], strict=True)
    )
    scaled = maps / np.maximum(maps.max(axis=(2, 3), keepdims=True), 1e-12)
    drawn = np.round(255 * colormaps["viridis"](scaled)[..., :3]).astype(np.uint8)
    drawn = drawn[:, :, rows][:, :, :, columns]
    pitch_x, pitch_y, first, top = width + 8, height + 8, MARGIN + width + 24, TOP + 20
    title = f"What the class token attends to in the last block, step {step:,}"
    note = "bright: attended to most; each map by itself"
    size = (first + maps.shape[1] * pitch_x - 8 + MARGIN, top + len(tiles) * pitch_y - 8 + MARGIN)
    with open_page(path, *size, title, note) as page:
        for head in range(maps.shape[1]):
            x = first + head * pitch_x + width / 2
            page.write(x, TOP - 3, f"head {head + 1}", width, color=GREY)
        for i, tile in enumerate(tiles):
            y = top + i * pitch_y
            page.paste(MARGIN, y, tile, FRAME, border=2)
            for head, image in enumerate(drawn[i]):
                page.paste(first + head * pitch_x, y, image, FRAME, border=1)
