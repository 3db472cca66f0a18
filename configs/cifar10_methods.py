"""Four methods on CIFAR-10, one narrow encoder, one budget: the README's table of results.

    python run_experiment.py --config=configs/cifar10_methods.py --workdir=runs/cifar10_methods
    python run_experiment.py --config=configs/cifar10_methods.py:tune --workdir=runs/cifar10_tuning

(`:table,data.dir=TFDS_DIR` where TFDS's data lies elsewhere, `,data.download=True` to fetch it.)

Every run: ResNet-18 with a 3x3 stem, a quarter as wide, the same initialisation for all; 24 px
crops; batch 64; 3 epochs of the 50,000 training images (150,000 images, 2,343 steps); SGD with
momentum 0.9. Between the methods differ what makes them what they are (loss, heads, target network,
queue, v1's augmentation and schedule) and the three values that were tuned. MoCo has 2 batch-norm
groups, so that a group has 32 images, as in the paper.

- `table` (the default): 3 seeds, 12 runs; probes of the last step's encoder on the 10,000 test
  images (linear probe and kNN with 20,000 labelled training images), beside the encoder as it was
  before training.
- `tune`: learning rate, tau and temperature of each method, four tries for each, of 1 epoch on
  train[:45000], judged by its linear probe on the 5,000 held-out images train[45000:]. The best of
  each is the table's; what the tries gave is in `benchmarks/results/cifar10_tuning/`.

A run that is done is not repeated: the same command goes on where it stopped.
"""

from __future__ import annotations

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import byol, common, moco, simclr


class Tuned(NamedTuple):
    """What was tried for each method."""

    learning_rate: float  # at batch 256; a step has a quarter of it
    tau: float | None
    temperature: float | None


_METHODS = ("moco_v1", "moco_v2", "simclr", "byol")

_TRIES = {
    "moco_v1": (
        Tuned(0.2, 0.99, 0.07),
        Tuned(0.2, 0.995, 0.15),
        Tuned(0.5, 0.99, 0.15),
        Tuned(0.5, 0.995, 0.07),
    ),
    "moco_v2": (
        Tuned(0.2, 0.99, 0.1),
        Tuned(0.2, 0.995, 0.2),
        Tuned(0.5, 0.99, 0.2),
        Tuned(0.5, 0.995, 0.1),
    ),
    "simclr": (
        Tuned(0.2, None, 0.2),
        Tuned(0.2, None, 0.5),
        Tuned(0.5, None, 0.2),
        Tuned(0.5, None, 0.5),
    ),
    "byol": (
        Tuned(0.3, 0.97, None),
        Tuned(0.3, 0.99, None),
        Tuned(0.8, 0.97, None),
        Tuned(0.8, 0.99, None),
    ),
}

# The try with the best linear probe on train[45000:].
_TUNED = {
    "moco_v1": _TRIES["moco_v1"][3],
    "moco_v2": _TRIES["moco_v2"][3],
    "simclr": _TRIES["simclr"][0],
    "byol": _TRIES["byol"][3],
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return common.parse(arg, {"table": table, "tune": tune}, default="table")


def table() -> ConfigDict:
    """The four methods with their tuned values, three seeds."""
    names = {"moco_v1": "MoCo_v1", "moco_v2": "MoCo_v2", "simclr": "SimCLR", "byol": "BYOL"}
    variants = {names[method]: _run(method, _TUNED[method]) for method in _METHODS}
    study = common.study("CIFAR-10, ResNet-18 x 0.25", variants, seeds=(0, 1, 2))
    study.show = ("epochs",)
    return study


def tune() -> ConfigDict:
    """Four tries of each method on a part of the training set, judged on the rest of it."""
    variants = {}
    for number in range(len(_TRIES["byol"])):
        for name in _METHODS:
            config = _run(name, _TRIES[name][number])
            config.epochs = 1.0
            config.data.train_split = "train[:45000]"
            config.data.test_split = "train[45000:]"
            config.eval.random_init = False
            config.eval.max_train_images = 10000
            variants[f"{name}_try_{number + 1}"] = config
    study = common.study("Tries on CIFAR-10's train[:45000]", variants, seeds=(0,))
    study.show = ("optimizer.learning_rate", "tau_base", "temperature")
    study.measures = ("linear_probe_top1", "knn_top1")
    return study


def _run(name: str, tuned: Tuned) -> ConfigDict:
    """A run of one method: its own CIFAR-10 preset with what is the same for all."""
    config = {"byol": byol, "simclr": simclr}.get(name, moco).get_config("cifar10")
    config.epochs = 3.0
    config.batch_size = 64
    config.encoder = common.encoder(depth=18, width=0.25, stem="cifar")
    config.projector.hidden_sizes = (256,)
    config.projector.output_size = 64
    config.optimizer = common.optimizer(
        name="sgd",
        learning_rate=tuned.learning_rate,
        weight_decay=5e-4,
        warmup_epochs=0.1,
        exclude=(),
    )
    config.data.train_split = "train"
    config.data.test_split = "test"
    config.data.image_size = 24
    config.data.test_resize = 28
    config.data.crop_area = (0.2, 1.0)
    config.data.resize_method = "bilinear"
    # torchvision's jitter at half of SimCLR's strength, no blur.
    view = common.view(saturation=0.4, jitter_style="torchvision", blur_prob=0.0)
    config.augment.view_1 = view
    config.augment.view_2 = view.copy_and_resolve_references()
    config.augment.mean = (0.4914, 0.4822, 0.4465)
    config.augment.std = (0.247, 0.2435, 0.2616)
    config.eval.max_train_images = 20000
    config.monitor.knn_every_steps = 0
    config.monitor.plots_every_steps = 0
    config.checkpoint_every_steps = 400
    if config.method == "byol":
        config.predictor.hidden_sizes = (256,)
        config.predictor.output_size = 64
    if config.method == "moco":
        config.queue_size = 4096
        config.symmetric = False
        config.bn_groups = 2
    if name == "moco_v1":
        config = moco.as_v1(config)
    if tuned.tau is not None:
        config.tau_base = tuned.tau
    if tuned.temperature is not None:
        config.temperature = tuned.temperature
    return config
