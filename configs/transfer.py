"""Linear transfer: logistic regression on frozen features, over many data sets.

    python run_experiment.py --config=configs/transfer.py --config.checkpoint=RUN --workdir=DIR \\
        --config.data.dir=TFDS_DIR

The twelve sets of BYOL's paper (appendix D) and SimCLR's (appendix B.8), each with its metric. The
L2 strength is chosen on the validation split from 45 log-spaced values; the classifier is then
fitted to the training and validation images, and the test set is evaluated once. Sets that are not
prepared in `data.dir` are logged and left out (`--config.data.download=True` downloads them).
Birdsnap and Aircraft are not in TFDS: `--config.sets.aircraft.name=folder` and
`--config.sets.aircraft.dir=DIR` use a folder with sub-folders `train` and `test`. VOC's objects
marked as difficult count like the others; VOC's own scoring leaves them out.

Published for BYOL's ResNet-50: Food-101 75.3, CIFAR-10 91.3, CIFAR-100 78.4, Birdsnap 57.2,
SUN397 62.2, Cars 67.8, Aircraft 60.6, VOC2007 82.5, DTD 75.5, Pets 90.4, Caltech-101 94.2,
Flowers 96.1.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import evaluation, parsing

_FIELDS = ("name", "train_split", "validation_split", "test_split", "metric")
# Name -> (TFDS name, training, validation and test split, metric): BYOL's paper, appendix D. An
# empty validation split means a fifth of the training images, drawn with the seed.
SETS = {
    "food101": ("food101", "train", "", "validation", "top1"),
    "cifar10": ("cifar10", "train", "", "test", "top1"),
    "cifar100": ("cifar100", "train", "", "test", "top1"),
    "birdsnap": ("birdsnap", "train", "", "test", "top1"),
    "sun397": ("sun397/standard-part1-120k", "train", "", "test", "top1"),
    "cars": ("cars196", "train", "", "test", "top1"),
    "aircraft": ("fgvc_aircraft", "train", "", "test", "mean_per_class"),
    "voc2007": ("voc/2007", "train", "validation", "test", "voc_map"),
    "dtd": ("dtd", "train", "validation", "test", "top1"),
    "pets": ("oxford_iiit_pet", "train", "", "test", "mean_per_class"),
    "caltech101": ("caltech101", "train", "", "test", "mean_per_class"),
    "flowers": ("oxford_flowers102", "train", "validation", "test", "mean_per_class"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `field=value,...`."""
    return parsing.parse(arg, transfer)


def transfer() -> ConfigDict:
    """The papers' protocol."""
    config = evaluation.job_defaults("transfer")
    config.only = tuple(SETS)  # the sets to evaluate, in this order
    config.sets = ConfigDict(
        {name: {"dir": "", **dict(zip(_FIELDS, row, strict=True))} for name, row in SETS.items()}
    )
    # Penalties of the mean loss: scikit-learn's C is 1 / (penalty x number of images).
    config.penalties = tuple(float(f"{10 ** (-6 + 11 * i / 44):.6g}") for i in range(45))
    config.standardize = False
    config.max_iterations = 300  # of L-BFGS
    config.tolerance = 1e-3
    return config
