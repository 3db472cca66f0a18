"""The page of a plot: positions of its parts in pixels, and writing it to a file."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selfsup_jax import paths
from selfsup_jax.run.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 100
MARGIN, TOP = 16, 58  # pixels: page margin; top of the drawing area
SMALL = 8  # points
INK, GREY, PALE, RED = "#222222", "#777777", "#c4c4c4", "#d61e28"
FRAME, SAME, OTHER = (170, 170, 170), (0, 150, 70), (214, 30, 40)
CURVES = ("#1f6fb4", "#d95f02", "#2a9d5c", "#8e4ec6", "#8c6d31", "#444444")


class Page:
    """A white figure with a title. Positions are in pixels from its top left corner."""

    def __init__(self, width: int, height: int, title: str, note: str):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = max(width, 480), height
        size = (self.width / DPI, height / DPI)
        self.figure = Figure(figsize=size, dpi=DPI, facecolor="white")
        self._renderer = FigureCanvasAgg(self.figure).get_renderer()
        self.sheet = np.full((self.height, self.width, 3), 255, np.uint8)
        room = self.width - 2 * MARGIN
        self.write(MARGIN, 12, title, room, size=11, weight="bold", ha="left")
        self.write(MARGIN, 34, note, room, color=GREY, ha="left")

    def cut(self, text: str, room: float, size: float = SMALL, weight: str = "normal") -> str:
        """`text`, shortened with an ellipsis if it is wider than `room` pixels."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        text = kept = " ".join(text.split())
        while kept:
            width = self._renderer.get_text_width_height_descent(text, font, False)[0]
            if width <= room:
                break
            # Letters differ in width, so that the first estimate may be too long.
            kept = kept[: min(len(kept) - 1, int(len(text) * room / width))]
            text = kept.rstrip(" ,") + "…"
        return text

    def write(self, x: float, y: float, text: str, room: float, **style: Any) -> None:
        """Writes one line of text below (x, y), shortened to `room` pixels."""
        text = self.cut(text, room, style.get("size", SMALL), style.get("weight", "normal"))
        style = {"size": SMALL, "color": INK, "ha": "center", "va": "top", **style}
        artist = self.figure.text(x / self.width, 1 - y / self.height, text, **style)
        artist.set_parse_math(False)  # `$` is a plain character

    def paste(self, x: int, y: int, image: np.ndarray, frame: Sequence[int], border: int) -> None:
        """Copies an image `[H, W, 3]` uint8 without resampling, with a frame around it."""
        height, width = image.shape[:2]
        if border:
            self.sheet[y - border : y + height + border, x - border : x + width + border] = frame
        self.sheet[y : y + height, x : x + width] = image

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Adds axes; their inner area has this size and its top left corner at (x, y)."""
        bottom = 1 - (y + height) / self.height
        box = (x / self.width, bottom, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def legend(self, x: float, y: float, entries: list[tuple[Any, str]], columns: int = 1) -> None:
        """Adds a legend of (handle, name) with its top left corner at (x, y)."""
        legend = self.figure.legend(
            [handle for handle, _ in entries],
            [name for _, name in entries],
            ncols=columns,
            loc="upper left",
            bbox_to_anchor=(x / self.width, 1 - y / self.height),
            fontsize=SMALL,
            labelcolor=INK,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


@contextlib.contextmanager
def open_page(path: str, width: int, height: int, title: str, note: str = "") -> Iterator[Page]:
    """Opens a page and writes it to `path`, atomically, when the block ends without an error."""
    with warnings.catch_warnings():
        # The font lacks some scripts: characters of such class names are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        page = Page(width, height, title, note)
        yield page
        page.figure.figimage(page.sheet, origin="upper", zorder=-1)
        paths.makedirs(os.path.dirname(path) or ".")
        with whole_file(path, "wb") as f:
            page.figure.savefig(f, format="png", dpi=DPI)
