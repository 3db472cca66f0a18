"""Nine methods on CIFAR-10 with one narrow encoder and one budget: docs/comparisons.md.

    python run_experiment.py --config=configs/cifar10_methods.py --workdir=runs/cifar10_methods
    python run_experiment.py --config=configs/cifar10_methods.py:tune --workdir=runs/cifar10_tuning

(`:table,data.dir=TFDS_DIR` if TFDS's data is elsewhere, `,data.download=True` to download it.)

Every run: ResNet-18 with a 3x3 stem, a quarter as wide, the same initialisation for all; 24 px
crops; batch 64; 3 epochs of the 50,000 training images (150,000 images, 2,343 steps); SGD with
momentum 0.9. The methods differ in what defines them (loss, heads, target network, queue, v1's
augmentation and schedule) and in the tuned values. MoCo v1 and v2 have 2 batch-norm groups, so
that a group has 32 images, as in the paper.

- `table` (the default): 3 seeds, 27 runs; probes of the last step's encoder on the 10,000 test
  images (linear probe and kNN with 20,000 labelled training images), and of the untrained encoder
  for comparison.
- `tune`: the learning rate of each method and, if it has them, tau, temperature or the weight in
  the loss: four tries per method, each 1 epoch on train[:45000], compared by the linear probe on
  the 5,000 held-out images train[45000:]. The table uses the best try of each method; the results
  of all tries are in `benchmarks/results/cifar10_tuning/` (all of MoCo v3: docs/moco_v3.md).

Finished runs are not repeated: the same command continues an interrupted sweep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import (
    barlow_twins,
    byol,
    common,
    datasets,
    dino,
    moco,
    parsing,
    recipes,
    simclr,
    simsiam,
    vicreg,
)

_RATE = "optimizer.learning_rate"


class _Method(NamedTuple):
    """A method of the table.

    Attributes:
        title: in the table.
        preset: makes its config of CIFAR-10.
        best: index of the try with the best linear probe on train[45000:].
        tries: field -> its value in each of the four tries. Learning rates are for batch 256; the
            runs, with batch 64, use a quarter of them.
    """

    title: str
    preset: Callable[[], ConfigDict]
    best: int
    tries: Mapping[str, tuple[float, ...]]


_OF_QUEUE = {_RATE: (0.2, 0.2, 0.5, 0.5), "tau_base": (0.99, 0.995, 0.99, 0.995)}
_TAUS = (0.97, 0.99, 0.97, 0.99)
_WEIGHTS = (0.0051, 0.02, 0.0051, 0.02)
_METHODS = {
    "moco_v1": _Method(
        "MoCo_v1", moco.cifar10, 3, _OF_QUEUE | {"temperature": (0.07, 0.15, 0.15, 0.07)}
    ),
    "moco_v2": _Method(
        "MoCo_v2", moco.cifar10, 3, _OF_QUEUE | {"temperature": (0.1, 0.2, 0.2, 0.1)}
    ),
    "moco_v3": _Method(
        "MoCo_v3", moco.v3_cifar10, 2, {_RATE: (0.4, 0.4, 1.0, 1.0), "tau_base": _TAUS}
    ),
    "simclr": _Method(  # its preset with the authors' head
        *("SimCLR", simclr.cifar10_lars, 0),
        {_RATE: (0.2, 0.2, 0.5, 0.5), "temperature": (0.2, 0.5, 0.2, 0.5)},
    ),
    "byol": _Method("BYOL", byol.cifar10, 3, {_RATE: (0.3, 0.3, 0.8, 0.8), "tau_base": _TAUS}),
    "simsiam": _Method("SimSiam", simsiam.cifar10, 3, {_RATE: (0.1, 0.2, 0.4, 0.8)}),
    "barlow_twins": _Method(
        *("Barlow_Twins", barlow_twins.cifar10, 0),
        {_RATE: (0.1, 0.1, 0.4, 0.4), "off_diagonal_weight": _WEIGHTS},
    ),
    "vicreg": _Method("VICReg", vicreg.cifar10, 2, {_RATE: (0.03, 0.1, 0.2, 0.4)}),
    "dino": _Method(
        *("DINO", dino.cifar10_resnet18, 2),
        {_RATE: (0.3, 0.3, 1.0, 1.0), "teacher_temperature": (0.02, 0.04, 0.02, 0.04)},
    ),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, table, tune)


def table() -> ConfigDict:
    """The methods with their tuned values, three seeds."""
    variants = {method.title: _run(name, method.best) for name, method in _METHODS.items()}
    sweep = common.sweep("CIFAR-10, ResNet-18 x 0.25", variants, seeds=(0, 1, 2))
    sweep.columns = ("epochs",)
    return sweep


def tune() -> ConfigDict:
    """Four tries of each method on a part of the training set, evaluated on the rest."""
    variants = {}
    for index, name in itertools.product(range(4), _METHODS):
        config = _run(name, index)
        config.epochs = 1.0
        config.data.update(train_split="train[:45000]", test_split="train[45000:]")
        config.eval.random_init = False
        config.eval.max_train_images = 10000
        variants[f"{name}_try_{index + 1}"] = config
    sweep = common.sweep("Tries on CIFAR-10's train[:45000]", variants, seeds=(0,))
    sweep.columns = ("optimizer.learning_rate", "tau_base", "temperature", "off_diagonal_weight")
    sweep.columns += ("teacher_temperature",)
    sweep.metrics = ("linear_probe_top1", "knn_top1")
    return sweep


def _run(name: str, index: int) -> ConfigDict:
    """A method's try: its own CIFAR-10 preset, with the settings that all methods share."""
    config = _METHODS[name].preset()
    config.epochs = 3.0
    config.batch_size = 64
    config.encoder = common.encoder(depth=18, width=0.25, stem="cifar")
    config.optimizer = common.optimizer(
        name="sgd", weight_decay=5e-4, warmup_epochs=0.1, exclude=()
    )
    config.data.update(train_split="train", test_split="test")
    config.data.update(image_size=24, test_resize=28, resize_method="bilinear")
    # torchvision's jitter at half of SimCLR's strength, no blur.
    view = common.view(saturation=0.4, jitter_style="torchvision", blur_prob=0.0)
    config.views = common.views(config, view, area=(0.2, 1.0))
    config.views.update(datasets.CIFAR10_PIXELS)
    config.eval.max_train_images = 20000
    config.monitor.update(knn_every_steps=0, plots_every_steps=0)
    config.checkpoint_every_steps = 400
    config = datasets.our_recipe(_small_heads(name, config))
    for field, values in _METHODS[name].tries.items():
        parsing.set_field(config, field, values[index])
    return config


def _small_heads(name: str, config: ConfigDict) -> ConfigDict:
    """Heads, queue and batch-norm groups for a small encoder and a small batch."""
    if name in ("barlow_twins", "vicreg"):
        config.projector = recipes.wide_head(256)
    elif name == "simsiam":
        config.projector.hidden_sizes = (256, 256)
        config.projector.output_size = config.predictor.output_size = 256
        config.projector.output_norm = "plain"
        config.predictor.hidden_sizes = (64,)
    elif name == "byol":
        config.projector = common.head(hidden_sizes=(256,), output_size=64)
        config.predictor = common.head(hidden_sizes=(256,), output_size=64)
        config.tau_schedule = "cosine"
    elif name == "moco_v3":
        for head in (config.projector, config.predictor):
            head.update(hidden_sizes=(256,), output_size=64)
    elif name == "dino":
        config.projector.update(hidden_sizes=(256, 256), output_size=64, hidden_bias=True)
        config.prototypes = 1024
        config.views_share_norm = True
        config.optimizer.update(
            clip_norm=3.0, clip_each=True, freeze=("^prototypes/",), freeze_epochs=0.1
        )
        config.eval.network = "target"
    else:
        config.projector.hidden_sizes = (256,)
        config.projector.output_size = 64
    if "queue_size" in config:
        config.queue_size = 4096
        config.symmetric = False
        config.bn_groups = 2
    return moco.as_v1(config) if name == "moco_v1" else config
