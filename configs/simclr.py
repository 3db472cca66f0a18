"""SimCLR (Chen et al. 2020, arXiv 2002.05709): pretraining with probes at the end.

    python run_experiment.py --config=configs/simclr.py --workdir=DIR         # the paper's recipe
    python run_experiment.py --config=configs/simclr.py:imagenet,scaling=sqrt --workdir=DIR

Presets, their cost, and what to expect (published numbers are the paper's linear evaluation on all
of the training set; a run's own `linear_probe_top1` uses `config.eval.max_train_images` of it):

- `imagenet` (the default): ResNet-50, 224 px, batch 4096, 1000 epochs; 69.3 %, and 64.5 % after 100
  epochs (the paper, table 6 and the authors' README). About 1.5 hours per 100 epochs on 128 TPU v3
  cores (section 2.2). `scaling=sqrt` uses the learning rate 0.075 x sqrt(B) instead of
  0.3 x B / 256: better for small batches and short runs (appendix B.1).
- `cifar10`: ResNet-18 with a 3x3 stem, 32 px, batch 128, 200 epochs, as in lightly's benchmark:
  84.7 % kNN, the best epoch on the test set (lightly's table). Not run by us.
- `cifar10_lars`: the same encoder, batch 512, 1000 epochs, LARS, as in the authors' README: about
  91 % linear. Not run by us.
- `imagenette`: ResNet-18, 128 px crops, batch 256, 800 epochs. Neither published nor run by us.
- `demo`: 5,000 embedded handwritten digits, 1 to 2 minutes on two cores; 96.2 %, and 90.5 % with
  10 labels per class (three seeds).
- `folder`: your own images: `--config.data.dir=/path/to/images`, with or without class sub-folders.
- `imagenet_torch`, `folder_torch`: `imagenet` and `folder` with PyTorch's padding, for encoders to
  export to torchvision, timm and Detectron2 (docs/weights.md). Not run by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, datasets, parsing, recipes

# Scaling of the learning rate with the batch -> base learning rate (appendix B.1).
_BASE_RATES = {"linear": 0.3, "sqrt": 0.075}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    presets = (imagenet, cifar10, cifar10_lars, imagenette, demo, folder)
    return parsing.parse(arg, *presets, imagenet_torch, folder_torch)


def imagenet(scaling: str = "linear") -> ConfigDict:
    """ImageNet as in the paper."""
    return datasets.on_imagenet(_paper(scaling))


def _paper(scaling: str = "linear") -> ConfigDict:
    """The paper's recipe for any data."""
    if scaling not in _BASE_RATES:
        raise parsing.ConfigError(f"scaling={scaling!r}: must be one of {', '.join(_BASE_RATES)}")
    config = common.pretrain_defaults()
    config.method = "simclr"
    config.epochs = 1000.0
    config.whole_epochs = False
    config.temperature = 0.1
    config.views_share_norm = True  # False: each view is normalised by its own batch statistics

    config.encoder = common.encoder(padding="fixed", zero_init_basic=True, kernel_init="lecun")
    config.projector = common.head(  # each linear layer is followed by a batch norm
        hidden_sizes=(2048,),
        output_size=128,
        linear_init="normal",
        hidden_bias=False,
        output_norm="scale",
    )
    config.online_probe = common.online_probe(
        kernel_init="normal", every_view=True, lars_ratio=False
    )
    config.optimizer = common.optimizer(
        learning_rate=_BASE_RATES[scaling],
        scaling=scaling,
        weight_decay=1e-6,
        rate_inside_momentum=True,
    )
    config.views = common.views(config, _view(strength=1.0))
    config.views.mean = (0.0, 0.0, 0.0)  # the authors' images stay in [0, 1]
    config.views.std = (1.0, 1.0, 1.0)
    return config


def _view(strength: float) -> ConfigDict:
    """The augmentation of appendix A, with a strength of the colour distortion."""
    return common.view(
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        blur_prob=0.5,
    )


def cifar10() -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark, whose loss is the mean of both views, ours the sum."""
    config = datasets.like_lightly(_paper(), loss_scale=2.0)
    config.temperature = 0.5
    config.views_share_norm = False
    config.projector.update(hidden_sizes=(512,), output_norm="affine")
    return config


def cifar10_lars() -> ConfigDict:
    """CIFAR-10 as in the authors' README: half the colour distortion, no blur, a head of 3 layers.

    The head is the released code's default; the paper's has 2 layers.
    """
    config = _paper()
    config.views["global"].view_1 = _view(strength=0.5)
    mean, std = config.views.mean, config.views.std
    config = datasets.on_cifar10(config)
    config.views.mean, config.views.std = mean, std
    config.batch_size = 512
    config.temperature = 0.5
    config.projector.hidden_sizes = (512, 512)
    config.optimizer.update(learning_rate=1.0, weight_decay=1e-4)
    return config


def imagenette() -> ConfigDict:
    """Imagenette: square-root scaling of the learning rate, because the batch is small."""
    config = datasets.on_imagenette(_paper(scaling="sqrt"))
    config.epochs = 800.0
    config.projector.hidden_sizes = (512,)
    return config


def folder() -> ConfigDict:
    """Your own images: square-root scaling and a temperature for a small batch."""
    config = datasets.on_folder(_paper(scaling="sqrt"))
    config.epochs = 300.0
    config.temperature = 0.2
    config.projector.hidden_sizes = (512,)
    return config


def imagenet_torch(scaling: str = "linear") -> ConfigDict:
    """ImageNet, for an encoder that can be exported to PyTorch."""
    return recipes.with_torchvision_encoder(imagenet(scaling))


def folder_torch() -> ConfigDict:
    """Your own images, for an encoder that can be exported to PyTorch."""
    return recipes.with_torchvision_encoder(folder())


def demo() -> ConfigDict:
    """Embedded digits on two CPU cores in one or two minutes."""
    config = datasets.on_digits(_paper())
    config.epochs = 34.0
    config.temperature = 0.2
    config.projector.update(hidden_sizes=(128,), output_size=64)
    config.optimizer.update(name="sgd", learning_rate=0.3, weight_decay=4e-4, warmup_epochs=2.0)
    return config
