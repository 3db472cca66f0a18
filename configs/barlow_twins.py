"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): pretraining with probes at the end.

    python run_experiment.py --config=configs/barlow_twins.py --workdir=DIR  # the paper's recipe

Presets, their cost, and what to expect (published numbers are the paper's linear evaluation on all
of the training set; a run's own `linear_probe_top1` uses `config.eval.max_train_images` of it):

- `imagenet` (the default): ResNet-50, 224 px, batch 2048, 1000 epochs; 73.2 % (table 1). About 124
  hours on 32 V100 GPUs (section 2.2).
- `cifar10`: ResNet-18 with a 3x3 stem, 32 px, batch 128, 200 epochs, as in lightly's
  benchmark: 84.2 % kNN, the best epoch on the test set (lightly's table). Not run by us.
- `imagenette`: ResNet-18, 128 px crops, batch 256, 800 epochs. lightly's table has 85.2 % kNN with
  another recipe. Not run by us.
- `demo`: 5,000 embedded handwritten digits, 1 to 2 minutes on two cores; 95.8 %, and 90.8 % with
  10 labels per class (one seed).
- `folder`: your own images: `--config.data.dir=/path/to/images`, with or without class sub-folders.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, datasets, parsing, recipes


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, imagenet, cifar10, imagenette, demo, folder)


def imagenet() -> ConfigDict:
    """ImageNet as in the paper."""
    return datasets.on_imagenet(_paper())


def _paper() -> ConfigDict:
    """The paper's recipe for any data: section 2, and the authors' code."""
    config = common.pretrain_defaults()
    config.method = "barlow_twins"
    config.epochs = 1000.0
    config.batch_size = 2048
    config.off_diagonal_weight = 0.0051  # lambda

    config.encoder = recipes.torchvision_encoder()
    config.projector = recipes.wide_head(8192)
    config.optimizer = common.optimizer(
        learning_rate=0.2,  # x batch / 256
        weight_decay=1e-6,
        end_fraction=1e-3,
        excluded_rate=0.0048 / 0.2,  # biases and norms: 0.0048 x batch / 256
    )
    config.views = recipes.byol_views(config, **recipes.TORCHVISION)
    return config


def cifar10() -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark: SGD, projections of 2,048."""
    config = datasets.byol_augmentation(datasets.like_lightly(_paper()))
    config.off_diagonal_weight = 0.005
    config.projector.update(hidden_sizes=(2048,), output_size=2048, output_bias=True)
    return config


def imagenette() -> ConfigDict:
    """Imagenette: the paper's recipe with smaller heads."""
    config = datasets.on_imagenette(_paper())
    config.epochs = 800.0
    config.projector = recipes.wide_head(2048)
    return config


def folder() -> ConfigDict:
    """Your own images: smaller heads, AdamW, a batch for one device."""
    config = datasets.on_folder(_paper())
    config.epochs = 300.0
    config.projector = recipes.wide_head(1024)
    config.optimizer = recipes.adamw()
    return config


def demo() -> ConfigDict:
    """Embedded digits on two CPU cores in one or two minutes."""
    config = datasets.on_digits(_paper())
    config.epochs = 36.0
    config.projector = recipes.wide_head(256)
    config.optimizer = recipes.adamw(warmup_epochs=2.0)
    return config
