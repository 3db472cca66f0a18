"""MoCo v1, v2 and v3 (arXiv 1911.05722, He et al. 2019; 2003.04297, 2104.02057, Chen et al.).

    python run_experiment.py --config=configs/moco.py --workdir=DIR         # v2, as in its paper
    python run_experiment.py --config=configs/moco.py:imagenet,epochs=800 --workdir=DIR
    python run_experiment.py --config=configs/moco.py:v1 --workdir=DIR
    python run_experiment.py --config=configs/moco.py:v3,epochs=1000 --workdir=DIR

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

v3 has no queue, a predictor, and the other images of a large batch as negatives:

- `v3`: ResNet-50, 224 px, batch 4096, 300 epochs, LARS; 72.8 %, and with `epochs=100` 68.9 %, with
  `epochs=1000` 74.6 % (the authors' code, whose values for that length these are). 16 V100 GPUs.
- `v3_vit`: ViT-S/16, 300 epochs of AdamW, the projection of the patches stays as it is drawn;
  73.2 %, and with `--config.encoder.name=vit_b16` 76.7 % (the authors' code). ViT-S: 32 V100 GPUs.
- `v3_cifar10`: as `cifar10`, with v3's heads and augmentation. solo-learn reports 93.1 % of an
  online linear classifier after 1000 epochs at batch 256 with LARS. Not run by us.
- `v3_imagenette`: ResNet-18, 128 px crops, batch 256, 1000 epochs. Neither published nor run by us.
- `v3_demo`: the digits of `demo`, 2 to 3 minutes on two cores; 96.2 %, and 89.8 % with 10 labels
  per class (three seeds).
- `v3_folder`: your own images, as `folder`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, datasets, parsing, recipes

# epochs -> (base learning rate, weight decay, tau_base) of v3: the authors' code.
_V3_BY_LENGTH = {100: (0.6, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.3, 1.5e-6, 0.996)}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    of_v3 = (v3, v3_vit, v3_cifar10, v3_imagenette, v3_demo, v3_folder)
    return parsing.parse(arg, imagenet, v1, cifar10, imagenette, demo, folder, *of_v3)


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

    config.encoder = recipes.torchvision_encoder(zero_init_gamma=False)
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
    config.views = recipes.moco_views(config)
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
    for view in recipes.sections_of_views(config):
        view.update(jitter_prob=1.0, hue=0.4, blur_prob=0.0)
    return config


def cifar10() -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark, whose loss is a mean of two directions, ours a sum.

    In lightly's, the second direction has the keys of the first already in its queue, each image's
    own among them; here both have the queue of earlier steps, as in the authors' notebook.
    """
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
    config.projector.update(hidden_sizes=(128,), output_size=64)
    config.optimizer.update(learning_rate=0.24, weight_decay=4e-4, warmup_epochs=2.0)
    return config


# ------------------------------------------------------------------------------------ MoCo v3


def v3(epochs: float = 300) -> ConfigDict:
    """MoCo v3 on ImageNet with ResNet-50, as in its code.

    There a ResNet's predictor has no norm after its last layer; in the paper all layers have one,
    as in the other presets.
    """
    config = datasets.on_imagenet(_v3(epochs))
    config.predictor.output_norm = "none"
    return config


def _v3(epochs: float) -> ConfigDict:
    """The recipe of v3 for ResNets and any data, with the code's values for its length."""
    learning_rate, weight_decay, tau_base = recipes.by_length(_V3_BY_LENGTH, epochs)

    config = common.pretrain_defaults()
    config.method = "moco"  # without a `queue_size`: v3
    config.epochs = float(epochs)
    config.tau_base = tau_base
    config.tau_schedule = "cosine"  # from tau_base to 1; or `constant`
    config.temperature = 1.0
    config.encoder = recipes.torchvision_encoder()
    config.projector = _v3_head()
    config.predictor = _v3_head()
    config.optimizer = common.optimizer(learning_rate=learning_rate, weight_decay=weight_decay)
    config.views = recipes.byol_views(config, area=(0.2, 1.0), **recipes.TORCHVISION)
    config.data.resize_method = "bilinear"
    return config


def v3_vit() -> ConfigDict:
    """MoCo v3 on ImageNet with a Vision Transformer."""
    config = datasets.on_imagenet(_v3(300))
    config.encoder.name = "vit_s16"
    config.encoder.vit.update(heads=12, positions="sincos", frozen_patches=True, init="xavier")
    config.temperature = 0.2
    config.projector.hidden_sizes = (4096, 4096)
    config.optimizer = common.optimizer(
        name="adamw", learning_rate=1.5e-4, weight_decay=0.1, warmup_epochs=40.0, exclude=()
    )
    config.views["global"].area = (0.08, 1.0)
    return config


def _v3_head() -> ConfigDict:
    """Two layers, both with batch norm, the last one without scale and offset."""
    return common.head(linear_init="torch", hidden_bias=False, output_norm="plain")


def v3_cifar10() -> ConfigDict:
    """CIFAR-10 in lightly's recipe; lightly's contrastive loss would be 5/4 of ours at 0.2."""
    config = datasets.like_lightly(_v3(300), loss_scale=0.8)
    config.tau_base = 0.99
    config.temperature = 0.2
    return datasets.byol_augmentation(config)


def v3_imagenette() -> ConfigDict:
    """Imagenette with the learning rate of BYOL's authors for it."""
    config = datasets.on_imagenette(_v3(1000))
    config.optimizer.learning_rate = 2.0
    config.temperature = 0.2
    return config


def v3_folder() -> ConfigDict:
    """Your own images: small heads and a batch for one device."""
    config = datasets.on_folder(_v3(300))
    config.temperature = 0.2
    for head in (config.projector, config.predictor):
        head.hidden_sizes = (1024,)
    return config


def v3_demo() -> ConfigDict:
    """Embedded digits on two CPU cores."""
    config = datasets.on_digits(_v3(300))
    config.epochs = 36.0
    config.tau_base = 0.98
    config.temperature = 0.2
    for head in (config.projector, config.predictor):
        head.update(hidden_sizes=(512,), output_size=128)
    config.optimizer.update(name="sgd", learning_rate=0.6, weight_decay=4e-4, warmup_epochs=2.0)
    return config
