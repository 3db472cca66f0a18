"""VICReg (Bardes et al. 2021, arXiv 2105.04906): pretraining with probes at the end.

    python run_experiment.py --config=configs/vicreg.py --workdir=DIR  # the paper's recipe
    python run_experiment.py --config=configs/vicreg.py:imagenet,epochs=100 --workdir=DIR

Presets, their cost, and what to expect (published numbers are the paper's linear evaluation on all
of the training set; a run's own `linear_probe_top1` uses `config.eval.max_train_images` of it):

- `imagenet` (the default): ResNet-50, 224 px, batch 2048, 1000 epochs; 73.2 % (table 1), and 68.6 %
  after 100 epochs (its ablations). `epochs=100` uses the higher learning rate of short runs.
- `cifar10`: ResNet-18 with a 3x3 stem, 32 px, batch 256, 200 epochs. solo-learn's table has 92.1 %
  online linear after 1000 epochs with another recipe. Not run by us.
- `imagenette`: ResNet-18, 128 px crops, batch 256, 800 epochs. lightly's table has 84.5 % kNN with
  another recipe. Not run by us.
- `demo`: 5,000 embedded handwritten digits, 1 to 2 minutes on two cores; 96.4 %, and 94.3 % with
  10 labels per class (one seed).
- `folder`: your own images: `--config.data.dir=/path/to/images`, with or without class sub-folders.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, datasets, parsing, recipes


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, imagenet, cifar10, imagenette, demo, folder)


def imagenet(epochs: float = 1000) -> ConfigDict:
    """ImageNet as in the paper."""
    return datasets.on_imagenet(_paper(epochs))


def _paper(epochs: float = 1000) -> ConfigDict:
    """The paper's recipe for any data: section 4, and the authors' code."""
    config = common.pretrain_defaults()
    config.method = "vicreg"
    config.epochs = float(epochs)
    config.batch_size = 2048
    # lambda, mu and nu of equation 6. The paper's mu is 25; the authors' code halves that term.
    config.invariance_weight = 25.0
    config.variance_weight = 12.5
    config.covariance_weight = 1.0

    config.encoder = recipes.torchvision_encoder()
    config.projector = recipes.wide_head(8192)
    config.optimizer = common.optimizer(
        learning_rate=0.3 if epochs <= 100 else 0.2,  # x batch / 256
        weight_decay=1e-6,
        end_fraction=1e-3,
    )
    config.views = recipes.byol_views(config, **recipes.TORCHVISION)
    return config


def cifar10() -> ConfigDict:
    """CIFAR-10 on one accelerator: smaller heads, a smaller batch."""
    config = datasets.on_cifar10(_paper())
    config.epochs = 200.0
    config.batch_size = 256
    config.projector = recipes.wide_head(2048)
    config.optimizer.learning_rate = 0.3
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
