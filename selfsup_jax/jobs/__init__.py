"""Jobs that ask what a representation is worth: from a config and a checkpoint to results."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

NAMES = ("linear_probe", "knn", "finetune", "transfer", "fewshot", "embed")


def run(config: ConfigDict, directory: str) -> dict[str, Any]:
    """Runs the evaluation job of that config; see `runner.run`."""
    from selfsup_jax.jobs import (
        embed,
        finetune,
        frozen_features,
        linear_probe,
        runner,
        transfer,
        watch,
    )

    prepare = {
        "linear_probe": linear_probe.prepare,
        "knn": frozen_features.nearest_neighbours,
        "finetune": finetune.prepare,
        "transfer": transfer.prepare,
        "fewshot": frozen_features.fewshot,
        "embed": embed.prepare,
    }[config.job]
    follow = watch.follow if config.watch else runner.run
    return follow(config, directory, prepare)
