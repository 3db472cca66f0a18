"""Weights & Biases as a place for a run's metrics, beside TensorBoard: `config.wandb`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfsup_jax import paths
from selfsup_jax.errors import bad_field, first_line
from selfsup_jax.run.files import read_json, write_json, writing_to

FILE = "wandb.json"  # in the workdir: which of the project's runs it is


def check(config: Any) -> None:
    """Checks that the package is there if the config has a project.

    Raises:
        UserError: it is not.
    """
    project = config.get("wandb", {}).get("project", "")
    if project and not hasattr(_package(), "init"):  # a folder `wandb` is no package of that name
        why = "needs the package wandb, which is not installed: pip install wandb"
        raise bad_field("wandb.project", project, why)


def _package() -> Any:
    try:
        import wandb
    except ImportError:
        return None
    return wandb


class WandbWriter:
    """Has the methods of `clu.metric_writers.MetricWriter` that a run calls.

    It is no subclass, since importing `clu.metric_writers` imports TensorFlow. A resumed run goes
    on in the same run of the project; Weights & Biases itself leaves out steps that it has.

    Args:
        settings: `config.wandb`, with a project.
        workdir: of the run; a local one also receives wandb's own files.
        config: the run's config, nested.

    Raises:
        UserError: Weights & Biases refuses, such as without a login.
    """

    def __init__(self, settings: Any, workdir: str, config: Mapping[str, Any]):
        self._wandb = _package()
        local = {} if paths.is_bucket(workdir) else {"dir": workdir}
        try:
            self._run = self._wandb.init(
                project=settings.project,
                entity=settings.entity or None,
                id=_run_id(settings.project, workdir),
                name=os.path.basename(os.path.normpath(workdir)),
                config=dict(config),
                resume="allow",
                **local,
            )
        except Exception as e:
            said = f"wandb says: {first_line(e)}"
            raise bad_field("wandb.project", settings.project, said) from e

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, `[N, H, W, 3]` uint8 each."""
        made = {k: [self._wandb.Image(image) for image in v] for k, v in images.items()}
        self._run.log(made, step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Nothing: the config is shown anyway."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Nothing: the config has them."""

    def flush(self) -> None:
        """Nothing: what was logged is sent in the background."""

    def close(self) -> None:
        """Returns when all is sent."""
        self._run.finish()


def _run_id(project: str, workdir: str) -> str:
    """The id of the workdir's run in the project; a new one is written to the workdir."""
    path = os.path.join(workdir, FILE)
    if paths.exists(path):
        saved = read_json(path)
        if saved.get("project") == project and isinstance(saved.get("id"), str):
            return saved["id"]
    made = {"project": project, "id": secrets.token_hex(6)}
    with writing_to(f"--workdir={workdir}"):
        write_json(path, made)
    return made["id"]
