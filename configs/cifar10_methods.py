"""Eight methods on CIFAR-10 with one narrow encoder and one budget: docs/comparisons.md.

    python run_experiment.py --config=configs/cifar10_methods.py --workdir=runs/cifar10_methods
    python run_experiment.py --config=configs/cifar10_methods.py:tune --workdir=runs/cifar10_tuning

(`:table,data.dir=TFDS_DIR` if TFDS's data is elsewhere, `,data.download=True` to download it.)

Every run: ResNet-18 with a 3x3 stem, a quarter as wide, the same initialisation for all; 24 px
crops; batch 64; 3 epochs of the 50,000 training images (150,000 images, 2,343 steps); SGD with
momentum 0.9. The methods differ in what defines them (loss, heads, target network, queue, v1's
augmentation and schedule) and in the tuned values. MoCo v1 and v2 have 2 batch-norm groups, so
that a group has 32 images, as in the paper.

- `table` (the default): 3 seeds, 24 runs; probes of the last step's encoder on the 10,000 test
  images (linear probe and kNN with 20,000 labelled training images), and of the untrained encoder
  for comparison.
- `tune`: the learning rate of each method and, if it has them, tau, temperature or the weight in
  the loss: four tries per method, each 1 epoch on train[:45000], compared by the linear probe on
  the 5,000 held-out images train[45000:]. The table uses the best try of each method; the results
  of all tries are in `benchmarks/results/cifar10_tuning/` (MoCo v3's: docs/moco_v3.md).

Finished runs are not repeated: the same command continues an interrupted sweep.
"""

from __future__ import annotations

import itertools
from typing import Any

from ml_collections import ConfigDict

from configs import barlow_twins, byol, common, datasets, moco, parsing, simclr, simsiam, vicreg

_NAMES = {
    "moco_v1": "MoCo_v1",
    "moco_v2": "MoCo_v2",
    "moco_v3": "MoCo_v3",
    "simclr": "SimCLR",
    "byol": "BYOL",
    "simsiam": "SimSiam",
    "barlow_twins": "Barlow_Twins",
    "vicreg": "VICReg",
}
_PRESETS = {  # of CIFAR-10
    "moco_v1": (moco, "cifar10"),
    "moco_v2": (moco, "cifar10"),
    "moco_v3": (moco, "v3_cifar10"),
    "simclr": (simclr, "cifar10_lars"),  # for the authors' head
    "byol": (byol, "cifar10"),
    "simsiam": (simsiam, "cifar10"),
    "barlow_twins": (barlow_twins, "cifar10"),
    "vicreg": (vicreg, "cifar10"),
}


def _tries(**values: Any) -> tuple[dict[str, Any], ...]:
    """Four tries; a field has one value for all of them, or four; `__` stands for a dot."""
    columns = (v if isinstance(v, tuple) else (v,) * 4 for v in values.values())
    fields = [name.replace("__", ".") for name in values]
    return tuple(dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True))


# Learning rates are for batch 256; the runs, with batch 64, use a quarter of them.
_TRIES = {
    "moco_v1": _tries(
        optimizer__learning_rate=(0.2, 0.2, 0.5, 0.5),
        tau_base=(0.99, 0.995, 0.99, 0.995),
        temperature=(0.07, 0.15, 0.15, 0.07),
    ),
    "moco_v2": _tries(
        optimizer__learning_rate=(0.2, 0.2, 0.5, 0.5),
        tau_base=(0.99, 0.995, 0.99, 0.995),
        temperature=(0.1, 0.2, 0.2, 0.1),
    ),
    "moco_v3": _tries(
        optimizer__learning_rate=(0.4, 0.4, 1.0, 1.0), tau_base=(0.97, 0.99, 0.97, 0.99)
    ),
    "simclr": _tries(
        optimizer__learning_rate=(0.2, 0.2, 0.5, 0.5), temperature=(0.2, 0.5, 0.2, 0.5)
    ),
    "byol": _tries(
        optimizer__learning_rate=(0.3, 0.3, 0.8, 0.8), tau_base=(0.97, 0.99, 0.97, 0.99)
    ),
    "simsiam": _tries(optimizer__learning_rate=(0.1, 0.2, 0.4, 0.8)),
    "barlow_twins": _tries(
        optimizer__learning_rate=(0.1, 0.1, 0.4, 0.4),
        off_diagonal_weight=(0.0051, 0.02, 0.0051, 0.02),
    ),
    "vicreg": _tries(optimizer__learning_rate=(0.03, 0.1, 0.2, 0.4)),
}

# Index of the try with the best linear probe on train[45000:].
_BEST = {
    "moco_v1": 3,
    "moco_v2": 3,
    "moco_v3": 2,
    "simclr": 0,
    "byol": 3,
    "simsiam": 3,
    "barlow_twins": 0,
    "vicreg": 2,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, table, tune)


def table() -> ConfigDict:
    """The methods with their tuned values, three seeds."""
    variants = {name: _run(key, _TRIES[key][_BEST[key]]) for key, name in _NAMES.items()}
    sweep = common.sweep("CIFAR-10, ResNet-18 x 0.25", variants, seeds=(0, 1, 2))
    sweep.columns = ("epochs",)
    return sweep


def tune() -> ConfigDict:
    """Four tries of each method on a part of the training set, evaluated on the rest."""
    variants = {}
    for index, key in itertools.product(range(4), _NAMES):
        config = _run(key, _TRIES[key][index])
        config.epochs = 1.0
        config.data.train_split = "train[:45000]"
        config.data.test_split = "train[45000:]"
        config.eval.random_init = False
        config.eval.max_train_images = 10000
        variants[f"{key}_try_{index + 1}"] = config
    sweep = common.sweep("Tries on CIFAR-10's train[:45000]", variants, seeds=(0,))
    sweep.columns = ("optimizer.learning_rate", "tau_base", "temperature", "off_diagonal_weight")
    sweep.metrics = ("linear_probe_top1", "knn_top1")
    return sweep


def _run(name: str, tuned: dict[str, Any]) -> ConfigDict:
    """A run of one method: its own CIFAR-10 preset, with the settings that all methods share."""
    module, preset = _PRESETS[name]
    config = module.get_config(preset)
    config.epochs = 3.0
    config.batch_size = 64
    config.encoder = common.encoder(depth=18, width=0.25, stem="cifar")
    config.optimizer = common.optimizer(
        name="sgd", weight_decay=5e-4, warmup_epochs=0.1, exclude=()
    )
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.image_size = 24
    config.data.test_resize = 28
    config.data.resize_method = "bilinear"
    # torchvision's jitter at half of SimCLR's strength, no blur.
    view = common.view(saturation=0.4, jitter_style="torchvision", blur_prob=0.0)
    config.views = common.views(config, view, area=(0.2, 1.0))
    config.views.mean = (0.4914, 0.4822, 0.4465)
    config.views.std = (0.247, 0.2435, 0.2616)
    config.eval.max_train_images = 20000
    config.monitor.knn_every_steps = 0
    config.monitor.plots_every_steps = 0
    config.checkpoint_every_steps = 400
    config = datasets.our_recipe(_small_heads(name, config))
    for field, value in tuned.items():
        parsing.set_field(config, field, value)
    return config


def _small_heads(name: str, config: ConfigDict) -> ConfigDict:
    """Heads, queue and batch-norm groups for a small encoder and a small batch."""
    if name in ("barlow_twins", "vicreg"):
        config.projector = common.wide_head(256)
    elif name == "simsiam":
        config.projector.hidden_sizes = (256, 256)
        config.projector.output_size = config.predictor.output_size = 256
        config.predictor.hidden_sizes = (64,)
    elif name == "byol":
        config.projector = common.head(hidden_sizes=(256,), output_size=64)
        config.predictor = common.head(hidden_sizes=(256,), output_size=64)
        config.tau_schedule = "cosine"
    elif name == "moco_v3":
        for head in (config.projector, config.predictor):
            head.update(hidden_sizes=(256,), output_size=64)
    else:
        config.projector.hidden_sizes = (256,)
        config.projector.output_size = 64
    if "queue_size" in config:
        config.queue_size = 4096
        config.symmetric = False
        config.bn_groups = 2
    return moco.as_v1(config) if name == "moco_v1" else config
