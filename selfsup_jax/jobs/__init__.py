"""Evaluation jobs: each evaluates the representation of a checkpoint and writes results."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from selfsup_jax.errors import bad_field


def run(config: ConfigDict, directory: str) -> dict[str, Any]:
    """Runs the evaluation job `config.job`; see `runner.run` and, for `config.follow`, `follow`."""
    from selfsup_jax.jobs import (
        embed,
        finetune,
        follow,
        frozen_features,
        linear_probe,
        runner,
        transfer,
    )

    prepare = {
        "linear_probe": linear_probe.prepare,
        "knn": frozen_features.nearest_neighbours,
        "finetune": finetune.prepare,
        "transfer": transfer.prepare,
        "fewshot": frozen_features.fewshot,
        "embed": embed.prepare,
    }[config.job]
    run_or_follow = follow.follow if config.follow else runner.run
    return run_or_follow(with_checkpoint(config), directory, prepare)


def with_checkpoint(config: ConfigDict) -> ConfigDict:
    """The config with the encoder's path in `checkpoint`, also if `init_from` gave it.

    Raises:
        UserError: both are given.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        given = config.get("init_from", "")
        if given and config.checkpoint:
            raise bad_field("init_from", given, "is another name of config.checkpoint: give one")
        config.checkpoint = config.checkpoint or given
        if "init_from" in config:
            del config["init_from"]
    return config
