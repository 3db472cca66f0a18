"""The plots of a run: PNG files, drawn from plain arrays.

Each plot has its own figure on an Agg canvas, so that a training process can draw any number of
plots: pyplot would keep every figure in memory and might need a display. matplotlib and
scikit-learn are imported only where they are used, because their import is slow.
"""

from selfsup_jax.viz.plots.bars import Panel, comparison
from selfsup_jax.viz.plots.confusion import confusion_matrix
from selfsup_jax.viz.plots.curves import History, ReferenceBand, learning_curves
from selfsup_jax.viz.plots.images import (
    Neighbours,
    attention_maps,
    nearest_neighbours,
    view_pairs,
)
from selfsup_jax.viz.plots.maps import map_points, representation_map

__all__ = [
    "History",
    "Neighbours",
    "Panel",
    "ReferenceBand",
    "attention_maps",
    "comparison",
    "confusion_matrix",
    "learning_curves",
    "map_points",
    "nearest_neighbours",
    "representation_map",
    "view_pairs",
]
