"""SimSiam (Chen and He 2020, arXiv 2011.10566): pretraining with probes at the end.

    python run_experiment.py --config=configs/simsiam.py --workdir=DIR  # the paper's recipe
    python run_experiment.py --config=configs/simsiam.py:imagenet,epochs=800 --workdir=DIR

Presets, their cost, and what to expect (published numbers are the paper's linear evaluation on all
of the training set; a run's own `linear_probe_top1` uses `config.eval.max_train_images` of it):

- `imagenet` (the default): ResNet-50, 224 px, batch 256, 100 epochs; 68.1 %, and 70.0, 70.8, 71.3 %
  after 200, 400, 800 epochs (table 4).
- `cifar10`: ResNet-18 with a 3x3 stem, 32 px, batch 128, 200 epochs, as in lightly's
  benchmark: 81.9 % kNN, the best epoch on the test set (lightly's table). Not run by us.
- `imagenette`: ResNet-18, 128 px crops, batch 256, 800 epochs. lightly's table has 87.2 % kNN with
  another recipe. Not run by us.
- `demo`: 5,000 embedded handwritten digits, 1 to 2 minutes on two cores; 95.8 %, and 90.9 % with
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
    """The paper's recipe for any data: section 3, and the authors' code."""
    config = common.pretrain_defaults()
    config.method = "simsiam"
    config.epochs = 100.0
    config.batch_size = 256

    config.encoder = recipes.torchvision_encoder()
    config.projector = common.head(
        hidden_sizes=(2048, 2048),
        output_size=2048,
        linear_init="torch",
        hidden_bias=False,
        output_norm="plain",
    )
    config.predictor = common.head(
        hidden_sizes=(512,),
        output_size=2048,
        linear_init="torch",
        hidden_bias=False,
        output_bias=True,
    )
    config.optimizer = common.optimizer(
        name="sgd",
        learning_rate=0.05,  # x batch / 256
        weight_decay=1e-4,
        warmup_epochs=0.0,
        exclude=(),  # weight decay for all parameters
        constant_rate=("^predictor/",),  # its learning rate is constant (section 4.2)
    )
    config.views = recipes.moco_views(config)
    config.data.resize_method = "bilinear"
    return config


def _heads(config: ConfigDict, hidden: tuple[int, ...], output: int, predictor: int) -> None:
    config.projector.hidden_sizes = hidden
    config.projector.output_size = config.predictor.output_size = output
    config.predictor.hidden_sizes = (predictor,)


def cifar10() -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark: SGD, the predictor's rate follows the schedule too."""
    config = datasets.like_lightly(_paper())
    config.projector.update(hidden_sizes=(2048,), output_norm="affine")
    config.views["global"].area = (0.2, 1.0)
    return config


def imagenette() -> ConfigDict:
    """Imagenette: the paper's recipe with more epochs."""
    config = datasets.on_imagenette(_paper())
    config.epochs = 800.0
    return config


def folder() -> ConfigDict:
    """Your own images: smaller heads, a batch for one device."""
    config = datasets.on_folder(_paper())
    config.epochs = 300.0
    _heads(config, hidden=(1024,), output=1024, predictor=256)
    return config


def demo() -> ConfigDict:
    """Embedded digits on two CPU cores in one or two minutes."""
    config = datasets.on_digits(_paper())
    config.epochs = 36.0
    _heads(config, hidden=(256,), output=256, predictor=64)
    config.optimizer.update(learning_rate=0.3, weight_decay=4e-4, warmup_epochs=2.0)
    return config
