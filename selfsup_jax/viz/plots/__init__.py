"""The pictures of a run: PNG files, drawn from plain arrays.

Each picture is a figure of its own on an Agg canvas, so that the training process can draw as often
as it likes: pyplot would keep every figure and might look for a screen. matplotlib and scikit-learn
are imported where they are used: a run without pictures doesn't wait for them.
"""

from selfsup_jax.viz.plots.bars import Panel, comparison
from selfsup_jax.viz.plots.confusion import confusion_matrix
from selfsup_jax.viz.plots.curves import History, ReferenceBand, learning_curves
from selfsup_jax.viz.plots.images import nearest_neighbours, view_pairs
from selfsup_jax.viz.plots.maps import map_points, representation_map

__all__ = [
    "History",
    "Panel",
    "ReferenceBand",
    "comparison",
    "confusion_matrix",
    "learning_curves",
    "map_points",
    "nearest_neighbours",
    "representation_map",
    "view_pairs",
]
