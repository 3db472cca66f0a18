"""Weighted nearest neighbours in a frozen encoder's features (Wu et al. 2018, section 3.4).

    python run_experiment.py --config=configs/knn.py --config.checkpoint=RUN --workdir=DIR
    python run_experiment.py --config=configs/knn.py --config.checkpoint=RUN --workdir=DIR \\
        --config.neighbours='(20,200)' --config.temperatures='(0.07,0.1)'
    python run_experiment.py --config=configs/knn.py:dino --config.checkpoint=RUN --workdir=DIR

Nothing is trained: seconds for CIFAR-10. By default k and temperature are those of the run's own
kNN; of several given ones, the best pair is chosen on held-out training images. The test set is
evaluated once. Each device of each host holds its part of the training features (ImageNet's 1.28 M
x 2048 float32: 10.5 GB over all of them) and about `query_rows x (bank_rows + 4 k devices)` further
numbers, for any size of the bank.

`dino` has k 20 and temperature 0.07, as Caron et al. 2021 (arXiv 2104.14294) report it: 74.5 % for
ViT-S/16 on ImageNet, 67.5 % for ResNet-50.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import evaluation, parsing


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `field=value,...`."""
    return parsing.parse(arg, knn, dino)


def knn() -> ConfigDict:
    """The run's own k and temperature."""
    config = evaluation.with_baseline(evaluation.job_defaults("knn"))
    config.neighbours = ()  # k; empty: the run's eval.knn_k
    config.temperatures = ()  # empty: the run's eval.knn_temperature
    config.held_out_images = 5000  # training images for choosing k and temperature
    config.bank_rows = 8192  # training features that a device compares at once
    config.query_rows = 1024
    return config


def dino() -> ConfigDict:
    """DINO's k and temperature."""
    config = knn()
    config.neighbours, config.temperatures = (20,), (0.07,)
    return config
