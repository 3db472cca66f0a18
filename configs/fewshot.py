"""What a handful of labels per class is enough for: logistic regression on frozen features.

    python run_experiment.py --config=configs/fewshot.py --config.checkpoint=RUN --workdir=DIR

For each number of labels per class a new draw of images is labelled many times over; the mean over
the draws comes with its 95 % confidence interval. Seconds to minutes after the features are there.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, evaluation


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `field=value,...`."""
    return common.parse(arg, {"fewshot": fewshot}, default="fewshot")


def fewshot() -> ConfigDict:
    """1, 2, 5 and 10 labels per class, 20 draws of each."""
    config = evaluation.with_baseline(evaluation.job_defaults("fewshot"))
    config.labels_per_class = (1, 2, 5, 10)
    config.draws = 20
    config.inverse_penalty = 1.0  # scikit-learn's C; so few labels leave nothing to pick it on
    return config
