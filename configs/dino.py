"""DINO (Caron et al. 2021, arXiv 2104.14294): pretraining with probes at the end.

    python run_experiment.py --config=configs/dino.py --workdir=DIR      # ViT-S/16, the code's best
    python run_experiment.py --config=configs/dino.py:imagenet,epochs=800 --workdir=DIR
    python run_experiment.py --config=configs/dino.py:PRESET --config.encoder.name=vit_b16 ...

Presets, their cost, and what to expect (published numbers are of all of the training set; a run's
own `linear_probe_top1` uses `config.eval.max_train_images` of it):

- `imagenet` (the default): ViT-S/16, 2 crops of 224 px and 8 of 96 px, batch 1024, 300 epochs;
  76.0 % linear and 73.3 % kNN, in 2.6 days on 16 GPUs (the authors' README, "boosting"). After 800
  epochs 77.0 and 74.5 % (the paper, table 2).
- `imagenet_resnet50`: the ResNet-50 command of the same README: SGD, batch 512, 100 epochs. It has
  no number there; the paper's 75.3 % linear and 67.5 % kNN (table 2) are of 800 epochs with LARS.
- `cifar10`: ViT-Ti/4, 2 crops of 32 px and 4 of 16 px, batch 256, 400 epochs. Neither published
  nor run by us.
- `cifar10_resnet18`: with a 3x3 stem, batch 128, 200 epochs, as in lightly's benchmark: 84.0 % kNN,
  the best epoch on the test set (lightly's table). Not run by us.
- `imagenette`: ResNet-18, crops of 128 and 64 px, batch 256, 800 epochs. lightly's table has 88.8 %
  kNN with another recipe. Not run by us.
- `demo`: 5,000 embedded handwritten digits, 2 crops of 16 px and 2 of 10 px, 2 min 35 s on two CPU
  cores; 94.8 %, and 87.2 % with 10 labels per class (one seed), where pixels have 90.0 and 73.8 %.
- `folder`: your own images: `--config.data.dir=/path/to/images`, with or without class sub-folders.

`--config.views.local.count=0` is DINO without small crops. docs/dino.md says what a run shows, how
it collapses, and what differs from the authors' code.
"""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from configs import common, datasets, parsing, recipes


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(
        arg, imagenet, imagenet_resnet50, cifar10, cifar10_resnet18, imagenette, folder, demo
    )


def imagenet() -> ConfigDict:
    """ViT-S/16 on ImageNet: the authors' "boosted" command."""
    return datasets.on_imagenet(_paper())


def imagenet_resnet50() -> ConfigDict:
    """ResNet-50 on ImageNet: the command of the authors' README."""
    config = datasets.on_imagenet(as_resnet(_paper()))
    config.epochs = 100.0
    config.batch_size = 512
    config.optimizer.end_fraction = 1.7e-5  # to 1e-6
    return config


def _paper() -> ConfigDict:
    """The paper's recipe for ViTs and any data: section 3.2, and the authors' code."""
    config = common.pretrain_defaults()
    config.method = "dino"
    config.epochs = 300.0
    config.batch_size = 1024
    config.tau_base = 0.996  # the paper's lambda
    config.tau_schedule = "cosine"  # from tau_base to 1; or `constant`

    # The views of a size have one set of batch statistics; False: each view has its own.
    config.views_share_norm = True
    config.prototypes = 65536  # K, outputs of the head
    # Weight normalisation without a gain. True is safer, False better with a small ViT.
    config.unit_prototypes = False
    config.centre_momentum = 0.9  # m; 1 is no centring, and collapses
    config.student_temperature = 0.1
    config.teacher_temperature = 0.07
    # It starts at this and goes to `teacher_temperature` on a line, over the warm-up: the first of
    # these that is given; 0: no warm-up.
    config.teacher_first_temperature = 0.04
    config.teacher_warmup_steps = config_dict.placeholder(int)
    config.teacher_warmup_examples = config_dict.placeholder(int)
    config.teacher_warmup_epochs = 30.0

    config.encoder = common.encoder(name="vit_s16", vit=common.vit(drop_path=0.1))
    config.projector = common.head(
        hidden_sizes=(2048, 2048),
        output_size=256,  # the bottleneck
        linear_init="timm",
        hidden_norm=False,
        activation="gelu",
        output_bias=True,
    )
    config.optimizer = common.optimizer(
        name="adamw",
        learning_rate=5e-4,  # x batch / 256
        end_fraction=5e-4,  # to 1e-6 at batch 1024
        weight_decay=0.04,
        weight_decay_end=0.4,
        clip_norm=3.0,
        clip_each=True,
        freeze=("^prototypes/",),
        freeze_epochs=1.0,
    )
    config.views = recipes.byol_views(config, area=(0.4, 1.0), **recipes.TORCHVISION)
    recipes.local_views(config, _view(blur_prob=0.5), count=8, size=96, area=(0.05, 0.4))
    # Above these shares of log K, the largest value, the teacher's output counts as collapsed.
    config.monitor.collapse_entropy = 0.995  # `teacher_entropy`: uniform for every image
    config.monitor.collapse_uniform_kl = 0.9  # `teacher_uniform_kl`: one prototype has all images
    config.eval.network = "target"  # the teacher, as in the paper
    config.eval.knn_k = 20
    config.eval.knn_temperature = 0.07
    return config


def _view(**changes) -> ConfigDict:
    return common.view(**recipes.TORCHVISION, **changes)


def as_resnet(config: ConfigDict) -> ConfigDict:
    """The authors' command for ResNets: SGD, a constant decay, other crops, the code's defaults."""
    config.encoder = recipes.torchvision_encoder(zero_init_gamma=False)
    config.optimizer.update(name="sgd", learning_rate=0.03, weight_decay=1e-4)
    config.optimizer.weight_decay_end = None
    config.views["global"].area = (0.14, 1.0)
    config.views.local.area = (0.05, 0.14)
    config.unit_prototypes = True
    config.teacher_temperature = 0.04
    config.teacher_warmup_epochs = 0.0
    return config


def _smaller(config: ConfigDict, hidden: int, output: int, prototypes: int) -> None:
    """A smaller head, with unit prototypes, for a small set."""
    config.projector.hidden_sizes = (hidden, hidden)
    config.projector.output_size = output
    config.prototypes = prototypes
    config.unit_prototypes = True


def cifar10() -> ConfigDict:
    """CIFAR-10: ViT-Ti/4, two crops of 32 px and four of 16 px."""
    config = datasets.on_cifar10(_paper())
    config.encoder.name = "vit_ti4"
    config.epochs = 400.0
    config.batch_size = 256
    config.optimizer.end_fraction = 2e-3  # to 1e-6
    config.tau_base = 0.9995  # the authors' advice for this batch size
    config.views.local.update(count=4, size=16)
    _smaller(config, hidden=1024, output=256, prototypes=4096)
    return config


def cifar10_resnet18() -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark: no small crops, batch norm in the head, SGD.

    lightly's teacher has prototypes and a head of its own at the start; ours is a copy.
    """
    config = datasets.byol_augmentation(datasets.like_lightly(as_resnet(_paper())))
    config.data.resize_method = "bicubic"
    config.views["global"].area = (0.4, 1.0)
    config.views.local.count = 0
    config.tau_base = 0.99
    config.tau_schedule = "constant"
    config.views_share_norm = False
    config.prototypes = 2048
    config.projector.update(hidden_sizes=(2048,), hidden_norm=True, hidden_bias=False)
    config.eval.update(network="online", knn_k=200, knn_temperature=0.1)
    return config


def imagenette() -> ConfigDict:
    """Imagenette: ResNet-18, with the authors' advice for the teacher of small batches."""
    config = datasets.on_imagenette(as_resnet(_paper()))
    config.epochs = 800.0
    config.tau_base = 0.9995
    config.views.local.update(count=6, size=64)
    _smaller(config, hidden=2048, output=256, prototypes=8192)
    return config


def folder() -> ConfigDict:
    """Your own images."""
    config = datasets.on_folder(as_resnet(_paper()))
    config.epochs = 300.0
    config.views.local.update(count=6, size=48)
    _smaller(config, hidden=1024, output=256, prototypes=4096)
    return config


def demo() -> ConfigDict:
    """Embedded digits on two CPU cores, with two small crops."""
    config = datasets.on_digits(as_resnet(_paper()))
    config.epochs = 30.0
    config.tau_base = 0.98
    config.views.local.update(count=2, size=10, area=(0.3, 0.6))
    _smaller(config, hidden=256, output=64, prototypes=256)
    config.projector.hidden_norm = True
    config.optimizer.update(
        name="adamw", learning_rate=2e-3, scaling="none", end_fraction=0.0, weight_decay=1e-2
    )
    config.optimizer.warmup_epochs = 2.0
    # With few images and steps a sharp teacher learns faster: see the tries in docs/dino.md.
    config.teacher_temperature = 0.02
    return config
