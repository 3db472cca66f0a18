"""Names in a run's records: TensorBoard and Weights & Biases show scalars as `GROUP/NAME`."""

from __future__ import annotations

# Of a line of `metrics.jsonl`: when it was written, in seconds since 1970. Nothing else in a line
# differs when a run is repeated.
WALL_TIME = "wall_time"

_GROUPS = {
    "representation": (
        *("projection_std", "effective_rank", "prediction_target_cosine"),
        *("alignment", "uniformity", "target_distance"),
    ),
    "optimizer": (
        *("learning_rate", "learning_rate_factor", "tau", "weight_decay"),
        *("grad_norm", "update_norm"),
    ),
    "speed": ("images_per_second", "input_wait"),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_SCORES = ("top1", "top5", "_mean_per_class", "_accuracy", "_map", "_auc")
_ALL = {"train", "accuracy", *_GROUPS}


def grouped(name: str) -> str:
    """`tau` -> `optimizer/tau`; what has a group already is returned unchanged.

    Quantities that only one method has are in `train`, beside the loss.
    """
    stem = name.partition("/")[0]
    if stem in _ALL:
        return name
    if stem.endswith(_SCORES):
        return f"accuracy/{name}"
    if stem.startswith("device_memory"):
        return f"speed/{name}"
    return f"{_GROUP_OF.get(stem, 'train')}/{name}"
