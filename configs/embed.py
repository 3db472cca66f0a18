"""Writes the features of a split or of a folder of images, for use in other projects.

    python run_experiment.py --config=configs/embed.py --config.checkpoint=RUN --workdir=DIR
    python run_experiment.py --config=configs/embed.py --config.checkpoint=RUN --workdir=DIR \\
        --config.data.name=folder --config.data.dir=/path/to/images

Writes `features.npz` (`features` [N, D] float32, `labels` [N] int32 with -1 for none, `names` [N],
`class_names`), or with `--config.format=npy` files of `rows_per_file` rows: `features-00000.npy`,
`labels-00000.npy`, `names-00000.npy`, for splits too large for memory.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import evaluation, parsing


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `field=value,...`."""
    return parsing.parse(arg, embed)


def embed() -> ConfigDict:
    """The run's test split, or all of another data set."""
    config = evaluation.job_defaults("embed")
    config.split = ""  # in TFDS's syntax; empty: the run's test split, or all of another data set
    config.format = "npz"  # or `npy`
    config.rows_per_file = 65536  # of `npy`
    return config
