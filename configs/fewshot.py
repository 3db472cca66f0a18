"""Few-shot evaluation: logistic regression on frozen features with a few labels per class.

    python run_experiment.py --config=configs/fewshot.py --config.checkpoint=RUN --workdir=DIR

For each number of labels per class the labelled images are drawn several times; the result is the
mean over the draws with its 95 % confidence interval. Seconds to minutes after the features.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import evaluation, parsing


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `field=value,...`."""
    return parsing.parse(arg, fewshot)


def fewshot() -> ConfigDict:
    """1, 2, 5 and 10 labels per class, 20 draws of each."""
    config = evaluation.with_baseline(evaluation.job_defaults("fewshot"))
    config.labels_per_class = (1, 2, 5, 10)
    config.draws = 20
    config.C = 1.0  # scikit-learn's C; there are too few labels to choose it
    return config
