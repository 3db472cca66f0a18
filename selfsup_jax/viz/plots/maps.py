"""The two-dimensional map of a representation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selfsup_jax.viz.plots.page import CURVES, MARGIN, PALE, SMALL, TOP, Page, open_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLASSES = (  # Paul Tol's muted colours, which are safe for colour-blind readers, and an orange
    *("#332288", "#E69F00", "#117733", "#CC6677", "#44AA99"),
    *("#882255", "#88CCEE", "#999933", "#AA4499", "#DDCC77"),
)


def map_points(features: np.ndarray, *, seed: int) -> np.ndarray:
    """Maps features `[N, D]` to the plane, `[N, 2]`; similar ones (by cosine) are near each other.

    PCA, then t-SNE. If the features don't vary (a collapsed encoder), all points are at the origin.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits

    if len(features) < 3:
        return np.zeros((len(features), 2), np.float32)
    x = normalize(np.asarray(features, np.float64))
    x = x - x.mean(axis=0)
    spread = np.sqrt(np.sum(x**2) / len(x))
    if spread < 1e-6:  # all differences are rounding errors
        return np.zeros((len(x), 2), np.float32)
    x = np.pad(x / spread, ((0, 0), (0, max(0, 2 - x.shape[1]))))
    # One thread: t-SNE's steps are short, so that several threads mostly wait for each other when
    # an input pipeline keeps the cores busy. Also, the map is the same on any number of cores.
    with threadpool_limits(1):
        x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
        perplexity = min(30.0, max(1.0, (len(x) - 1) / 3))
        tsne = TSNE(init="pca", perplexity=perplexity, max_iter=500, random_state=seed)
        return tsne.fit_transform(x)


def representation_map(
    path: str,
    points: np.ndarray,
    labels: np.ndarray | None,
    class_names: Sequence[str] | None,
    *,
    title: str,
    images: np.ndarray | None = None,
) -> None:
    """Draws points coloured by class, with a legend (up to 20 classes) or names on the largest.

    Without classes, small images in place of points, as many as have room.

    Args:
        path: of the PNG file.
        points: `[N, 2]`.
        labels: `[N]`, -1 for unlabelled, or None.
        class_names: of all classes, so that colours are the same in every plot; None: no labels.
        title: of the figure.
        images: `[N, H, W, 3]` uint8, of the points.
    """
    from matplotlib.lines import Line2D

    points, class_names = np.asarray(points), class_names or ()
    labels = np.asarray(labels if labels is not None and class_names else [-1] * len(points))
    colors, half = _class_colors(len(class_names)), len(_CLASSES)
    few = len(class_names) <= 2 * half
    present = np.unique(labels[labels >= 0])
    listed = list(present) if few else []
    rest = PALE if len(present) else CURVES[0]
    size = np.clip(12000 / max(1, len(points)), 6, 40)
    style = {"s": size, "linewidth": 0, "alpha": 0.85}
    if images is not None and not len(present):
        return _image_map(path, points, images, title)
    with open_page(path, 680 + 170 * bool(listed), 700, title) as page:
        axes = page.axes(MARGIN + 4, 44, 640, 640)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(xticks=[], yticks=[])  # the axes of t-SNE have no meaning
        axes.spines[:].set_color(PALE)
        axes.scatter(*points[labels < 0].T, color=rest, **style)
        again = few & (labels >= half)  # colours are reused with another marker
        for marker, part in (("o", (labels >= 0) & ~again), ("^", again)):
            axes.scatter(*points[part].T, color=colors[labels[part]], marker=marker, **style)
        dots = [(colors[i], "o^"[i // half], page.cut(class_names[i], 130)) for i in listed]
        if listed and np.any(labels < 0):
            dots.append((rest, "o", "unlabelled"))
        entries = [(Line2D([], [], color=c, marker=m, linestyle=""), name) for c, m, name in dots]
        page.legend(680, 44, entries)
        if not few:
            _name_classes(page, axes, points, labels, class_names)


def _image_map(path: str, points: np.ndarray, images: np.ndarray, title: str) -> None:
    """Draws the images at their points; those that would cover another are left out."""
    from PIL import Image

    side, tile = 860, 46  # of the map and of an image, in pixels
    low, spans = points.min(axis=0), np.ptp(points, axis=0)
    # Both directions fill the map: the axes of t-SNE have no meaning.
    places = (side - tile) * (points - low) / np.maximum(spans, 1e-6)
    kept: list[int] = []
    for i, place in enumerate(places):
        if not kept or np.abs(places[kept] - place).max(axis=1).min() >= tile:
            kept.append(i)
    note = f"similar images are near each other; those that have room, {len(kept):,}"
    height, width = (max(1, tile * n // max(images.shape[1:3])) for n in images.shape[1:3])
    with open_page(path, side + 2 * MARGIN, TOP + side + MARGIN, title, note) as page:
        for i in kept:
            x, y = (int(v) for v in places[i])
            small = np.asarray(Image.fromarray(images[i]).resize((width, height)))
            page.paste(MARGIN + x, TOP + side - tile - y, small, (), border=0)


def _class_colors(count: int) -> np.ndarray:
    """RGB, `[20, 3]` for up to 20 classes: ten fixed colours, twice; else `[count, 3]` hues."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    if count <= 2 * len(_CLASSES):
        return np.asarray([to_rgb(color) for color in 2 * _CLASSES])
    hues = np.arange(count) * 0.618034 % 1  # golden ratio: consecutive classes differ
    return hsv_to_rgb(np.stack([hues, np.full(count, 0.75), np.full(count, 0.8)], axis=1))


def _name_classes(
    page: Page, axes: Axes, points: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> None:
    """Writes the names of the 30 largest classes at their medians; skips those that overlap."""
    from matplotlib.patheffects import withStroke

    axes.apply_aspect()  # now, because the text extents below depend on it
    colors = _class_colors(len(class_names))
    boxes: list[Any] = []
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    for label in present[np.argsort(-counts, kind="stable")][:30]:
        x, y = np.median(points[labels == label], axis=0)
        name = page.cut(class_names[label], 110, weight="bold")
        style = {"size": SMALL, "weight": "bold", "color": 0.6 * colors[label]}
        style |= {"path_effects": [withStroke(linewidth=2.5, foreground="white")]}
        text = axes.text(x, y, name, ha="center", va="center", parse_math=False, **style)
        box = text.get_window_extent()
        if any(box.overlaps(other) for other in boxes):
            text.remove()
        else:
            boxes.append(box)
