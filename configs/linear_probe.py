"""Linear evaluation of a frozen encoder: fast, or with the papers' protocols.

    python run_experiment.py --config=configs/linear_probe.py --config.checkpoint=RUN --workdir=DIR
    python run_experiment.py --config=configs/linear_probe.py:PRESET --config.checkpoint=RUN \\
        --workdir=DIR

Presets:

- `fast` (the default): computes features once, without augmentation; logistic regression for all
  L2 strengths in `C` at once; the best is chosen on held-out training images, then fitted to all.
  12 seconds for 50,000 x 512 features on two CPU cores, after the features are computed.
- `byol`: Grill et al. 2020, appendix C.1: 80 epochs of SGD with Nesterov momentum, batch 1024,
  crops and flips; five learning rates, chosen on held-out training images. 74.3 % for ResNet-50
  after 1000 epochs on ImageNet (their table 1).
- `moco`: He et al. 2019, section 4.1: 100 epochs of SGD, learning rate 30, divided by 10 at
  epochs 60 and 80, batch 256. 60.6 % for MoCo v1, 67.7 % for v2 (200 epochs).
- `moco_v3`: the code of Chen et al. 2021 (arXiv 2104.02057): 90 epochs of SGD, batch 1024, learning
  rate 0.1 for ResNets, `--config.learning_rates='(3.0,)'` for ViTs, times 4 at this batch; cosine.
- `dino`: the code of Caron et al. 2021 (arXiv 2104.14294): 100 epochs of SGD, batch 1024, learning
  rate 0.001 times 4, cosine, on the class tokens of the last 4 blocks of a ViT-S (77.0 % after 800
  epochs); `--config.features=class_mean` for ViT-B (78.2 % after 400).

By default the crops' `views.global.area` is that of the run's pretraining (as in BYOL's paper). The
test set is evaluated once, with the chosen value and the last step's classifier. All but `fast`
train the classifiers of all learning rates in one pass through the encoder.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, evaluation, parsing


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, fast, byol, moco, moco_v3, dino)


def _probe(protocol: str) -> ConfigDict:
    config = evaluation.job_defaults("linear_probe")
    config.protocol = protocol
    # Training images for choosing the strength or the learning rate; at most a fifth of them.
    config.held_out_images = 10009  # for ImageNet: BYOL's paper, appendix C.1
    return config


def fast() -> ConfigDict:
    """Logistic regression on features that are computed once."""
    config = evaluation.with_baseline(_probe("fast"))
    config.update(common.linear_probe())
    return config


def byol() -> ConfigDict:
    """The protocol of BYOL's paper, appendix C.1."""
    config = evaluation.training(_probe("sgd"), epochs=80.0, batch_size=1024)
    config.learning_rates = (0.4, 0.3, 0.2, 0.1, 0.05)
    config.optimizer = _optimizer(nesterov=True, schedule="cosine", scaling="linear")
    return config


def moco() -> ConfigDict:
    """The protocol of MoCo's paper, section 4.1."""
    config = evaluation.training(_probe("sgd"), epochs=100.0, batch_size=256)
    config.whole_epochs = True  # as PyTorch's code
    config.held_out_images = 0  # one learning rate: nothing to choose
    config.learning_rates = (30.0,)
    config.optimizer = _optimizer(schedule="step", drops=(0.6, 0.8), scaling="none")
    config.views["global"].area = (0.08, 1.0)  # MoCo's pretraining has (0.2, 1)
    return config


def moco_v3() -> ConfigDict:
    """The protocol of MoCo v3's code, for ResNets."""
    return _cosine(epochs=90.0, learning_rate=0.1)


def dino() -> ConfigDict:
    """The protocol of DINO's code, for ViT-S."""
    config = _cosine(epochs=100.0, learning_rate=0.001)
    config.features = "last4"
    return config


def _cosine(epochs: float, learning_rate: float) -> ConfigDict:
    config = evaluation.training(_probe("sgd"), epochs=epochs, batch_size=1024)
    config.whole_epochs = True  # as PyTorch's code
    config.held_out_images = 0  # one learning rate: nothing to choose
    config.learning_rates = (learning_rate,)
    config.optimizer = _optimizer(schedule="cosine", scaling="linear")
    config.views["global"].area = (0.08, 1.0)
    return config


def _optimizer(**changes) -> ConfigDict:
    # Its learning rate is a factor on each of `learning_rates`.
    plain = {"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "exclude": ()}
    return common.optimizer(warmup_epochs=0.0, **(plain | changes))
