"""MoCo v2 and v1 (Chen et al. 2020, arXiv 2003.04297; He et al. 2019, arXiv 1911.05722).

    python run_experiment.py --config=configs/moco.py --workdir=DIR         # v2, as in its paper
    python run_experiment.py --config=configs/moco.py:imagenet,epochs=800 --workdir=DIR
    python run_experiment.py --config=configs/moco.py:v1 --workdir=DIR

Presets, their cost, and what to expect (published numbers are the papers' linear evaluation on all
of the training set; a run's own `linear_probe_top1` uses `config.eval.max_train_images` of it):

- `imagenet` (the default): v2. ResNet-50, 224 px, batch 256, 200 epochs; 67.5 +- 0.1 % (the
  authors' code), and 71.1 % after 800 epochs (v2, table 2). About 53 hours on 8 V100 GPUs (v2,
  table 3).
- `v1`: linear head, temperature 0.07, step schedule, v1's augmentation; 60.6 % (v1, section 4.1).
- `cifar10`: ResNet-18 with a 3x3 stem, 32 px, batch 128, 200 epochs, symmetric loss, as in
  lightly's benchmark: 83.8 % kNN, the best epoch on the test set (lightly's table). Not run by us.
- `imagenette`: ResNet-18, 128 px crops, batch 256, 800 epochs. Neither published nor run by us.
- `demo`: 5,000 embedded handwritten digits, 1 to 2 minutes on two cores; 96.3 %, and 90.0 % with
  10 labels per class (three seeds).
- `folder`: your own images: `--config.data.dir=/path/to/images`, with or without class sub-folders.

`view_1` gives the queries and `view_2` the keys; with `symmetric` each view gives both. The batch
size must be a multiple of `bn_groups` times the devices, so that the keys' images can be shuffled
evenly; the queue size must be a multiple of the number of keys per step.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, datasets, parsing


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, imagenet, v1, cifar10, imagenette, demo, folder)


def imagenet() -> ConfigDict:
    """MoCo v2 on ImageNet as in its paper."""
    return datasets.on_imagenet(_v2())


def v1() -> ConfigDict:
    """MoCo v1 on ImageNet as in its paper, section 3.3."""
    return datasets.on_imagenet(as_v1(_v2()))


def _v2() -> ConfigDict:
    """The recipe of v2 for any data."""
    config = common.pretrain_defaults()
    config.method = "moco"
    config.epochs = 200.0
    config.batch_size = 256
    config.bn_groups = 8  # the paper's 8 GPUs; here on any number of devices
    config.tau_base = 0.999  # the paper's m
    config.tau_schedule = "constant"  # or `cosine`, from tau_base to 1
    config.queue_size = 65536
    config.temperature = 0.2
    config.symmetric = False

    config.encoder = common.torchvision_encoder(zero_init_gamma=False)
    config.projector = common.head(
        hidden_sizes=(2048,),
        output_size=128,
        linear_init="torch",
        hidden_norm=False,
        output_bias=True,
    )
    config.optimizer = common.optimizer(
        name="sgd",
        learning_rate=0.03,  # at batch 256
        weight_decay=1e-4,
        warmup_epochs=0.0,
        exclude=(),  # weight decay for all parameters
    )
    view = {"hue": 0.1, "saturation": 0.4, "jitter_style": "torchvision", "blur_prob": 0.5}
    view |= {"blur_padding": "reflect"}
    config.views = common.views(config, common.view(**view), area=(0.2, 1.0))
    config.data.resize_method = "bilinear"
    return config


def as_v1(config: ConfigDict) -> ConfigDict:
    """The differences of v1 from v2: head, temperature, schedule, augmentation.

    The authors apply grayscale before the jitter; here it comes after, which differs only in the
    effect of the hue.
    """
    config.projector.hidden_sizes = ()  # linear
    config.temperature = 0.07
    config.optimizer.schedule = "step"
    config.optimizer.drops = (0.6, 0.8)  # epochs 120 and 160 of 200
    for view in common.sections_of_views(config):
        view.update(jitter_prob=1.0, hue=0.4, blur_prob=0.0)
    return config


def cifar10() -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark, whose loss is a mean of two directions, ours a sum."""
    config = datasets.like_lightly(_v2(), loss_scale=2.0)
    config.tau_base = 0.99
    config.queue_size = 4096
    config.temperature = 0.1
    config.symmetric = True
    config.projector.hidden_sizes = (512,)
    return config


def imagenette() -> ConfigDict:
    """Imagenette: v2 with a queue of less than half of its 9,469 images, and a smaller tau."""
    config = datasets.on_imagenette(_v2())
    config.epochs = 800.0
    config.tau_base = 0.99
    config.queue_size = 4096
    config.projector.hidden_sizes = (512,)
    return config


def folder() -> ConfigDict:
    """Your own images: v2 with a small queue and a batch for one device."""
    config = datasets.on_folder(_v2())
    config.bn_groups = 2  # of 32 images, as in the paper
    config.epochs = 300.0
    config.tau_base = 0.99
    config.queue_size = 4096
    config.projector.hidden_sizes = (512,)
    return config


def demo() -> ConfigDict:
    """Embedded digits on two CPU cores in one or two minutes."""
    config = datasets.on_digits(_v2())
    config.epochs = 50.0
    config.bn_groups = 2  # of 32 images, as in the paper; smaller ones are too noisy
    config.tau_base = 0.99
    config.queue_size = 1024  # a quarter of the images
    config.projector.hidden_sizes = (128,)
    config.projector.output_size = 64
    config.optimizer.learning_rate = 0.24
    config.optimizer.weight_decay = 4e-4
    config.optimizer.warmup_epochs = 2.0
    return config
