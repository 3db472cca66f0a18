"""BYOL (Grill et al. 2020, arXiv 2006.07733): pretraining with probes at the end.

    python run_experiment.py --config=configs/byol.py --workdir=DIR          # the paper's recipe
    python run_experiment.py --config=configs/byol.py:imagenet,epochs=300 --workdir=DIR
    python run_experiment.py --config=configs/byol.py:PRESET --config.batch_size=256 --workdir=DIR

Presets, their cost, and what to expect (published numbers are the papers' linear evaluation on all
of the training set; a run's own `linear_probe_top1` uses `config.eval.max_train_images` of it):

- `imagenet` (the default): ResNet-50, 224 px, batch 4096, 1000 epochs; 74.3 %, and 72.5 % after
  300 epochs (the paper, table 1 and section 4). About 8 hours on 512 TPU v3 cores (section 3.3).
  `epochs=` 40, 100, 300 and 1000 have the learning rate, weight decay and tau of the authors' code
  for that length; other lengths have those of the next shorter one.
- `cifar10`: ResNet-18 with a 3x3 stem, 32 px, batch 128, 200 epochs, as in lightly's benchmark:
  86.9 % kNN, the best epoch on the test set (lightly's table). Not run by us in this form.
- `cifar10_fast`: the most accuracy in ten minutes on one large GPU (350 epochs at batch 512, at
  31,900 images/s): the same with a target that gets slower. Lightly's table has 86.8 % after 200
  epochs and 91.0 % after 800 at this batch size. Not run yet.
- `imagenette`: ResNet-18, 128 px crops, batch 256, 1000 epochs; 92.3 % online linear
  (the authors' README).
- `demo`: 5,000 embedded handwritten digits, 1 to 2 minutes on two CPU cores; 95.5 %, and
  89.8 % with 10 labels per class (three seeds).
- `folder`: your own images: `--config.data.dir=/path/to/images`, with or without class sub-folders.
- `imagenet_torch`, `folder_torch`: `imagenet` and `folder` with PyTorch's padding, for encoders to
  export to torchvision, timm and Detectron2 (docs/weights.md). Not run by us.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, datasets, parsing, recipes

# epochs -> (base learning rate, weight decay, tau_base): the authors' code.
_BY_LENGTH = {
    40: (0.45, 1e-6, 0.97),
    100: (0.45, 1e-6, 0.99),
    300: (0.3, 1e-6, 0.99),
    1000: (0.2, 1.5e-6, 0.996),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    presets = (imagenet, cifar10, cifar10_fast, imagenette, demo, folder)
    return parsing.parse(arg, *presets, imagenet_torch, folder_torch)


def imagenet(epochs: float = 1000) -> ConfigDict:
    """ImageNet as in the paper."""
    return datasets.on_imagenet(_paper(epochs))


def _paper(epochs: float = 1000) -> ConfigDict:
    """The paper's recipe for any data, with the code's values for its length."""
    learning_rate, weight_decay, tau_base = recipes.by_length(_BY_LENGTH, epochs)

    config = common.pretrain_defaults()
    config.method = "byol"
    config.epochs = float(epochs)
    config.whole_epochs = False
    config.tau_base = tau_base
    config.tau_schedule = "cosine"  # from tau_base to 1; or `constant`

    # The choices of BYOL (section 5, table 5b); `configs/byol_to_simclr.py` runs the others too.
    config.use_predictor = True  # without it the encoder collapses
    config.use_target_network = True  # False: the online projection is also the target
    config.negatives_weight = 0.0  # beta; SimCLR has 1
    config.temperature = 0.3  # alpha, of the negatives

    config.encoder = common.encoder()
    config.projector = common.head()
    config.predictor = common.head()
    config.online_probe.kernel_init = "haiku"
    config.optimizer = common.optimizer(learning_rate=learning_rate, weight_decay=weight_decay)
    config.views = recipes.byol_views(config)
    return config


def cifar10() -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark, whose loss is 1/4 of ours."""
    config = datasets.like_lightly(_paper(), loss_scale=4.0)
    config.tau_base = 0.99
    config.tau_schedule = "constant"
    for head in (config.projector, config.predictor):
        head.update(hidden_sizes=(1024,), hidden_bias=False, output_bias=True)
    return datasets.byol_augmentation(config)


def cifar10_fast() -> ConfigDict:
    """CIFAR-10 in about ten minutes on one large GPU."""
    config = cifar10()
    config.batch_size = 512
    config.epochs = 350.0
    config.tau_schedule = "cosine"
    config.optimizer.warmup_epochs = 10.0
    return config


def imagenette() -> ConfigDict:
    """Imagenette as in the authors' README."""
    config = datasets.on_imagenette(_paper())
    config.optimizer.update(learning_rate=2.0, weight_decay=1e-6)
    return config


def folder() -> ConfigDict:
    """Your own images: the 300-epoch recipe with a small batch for one device."""
    config = datasets.on_folder(_paper(epochs=300))
    config.tau_base = 0.99
    for head in (config.projector, config.predictor):
        head.hidden_sizes = (1024,)
    return config


def imagenet_torch(epochs: float = 1000) -> ConfigDict:
    """ImageNet, for an encoder that can be exported to PyTorch."""
    return recipes.with_torchvision_encoder(imagenet(epochs))


def folder_torch() -> ConfigDict:
    """Your own images, for an encoder that can be exported to PyTorch."""
    return recipes.with_torchvision_encoder(folder())


def demo() -> ConfigDict:
    """Embedded digits on two CPU cores in one or two minutes."""
    config = datasets.on_digits(_paper())
    config.epochs = 36.0
    config.tau_base = 0.98
    for head in (config.projector, config.predictor):
        head.update(hidden_sizes=(512,), output_size=128)
    config.optimizer.update(name="sgd", learning_rate=0.3, weight_decay=4e-4, warmup_epochs=2.0)
    config.monitor.reference = "byol_demo"
    return config
