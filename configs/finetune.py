"""Fine-tuning of the encoder with a classifier on top: semi-supervised, or with all labels.

    python run_experiment.py --config=configs/finetune.py:10pct --config.checkpoint=RUN \\
        --workdir=DIR

Presets by the share of labels. Epochs and learning rates of the first two are SimCLR's (appendix
B.5: Nesterov momentum, no weight decay, no warm-up; the batch of 1024 is BYOL's). Encoder and head
have separate learning rates. Published top-1 is from BYOL's paper, table 2:

- `1pct`: 1 % of the labels, 60 epochs; 48.3 % for SimCLR's ResNet-50, 53.2 % for BYOL's.
- `10pct` (the default): 10 %, 30 epochs; 65.6 % and 68.8 %.
- `100pct`: 100 %, 30 epochs.
- `vit`: 100 %, for Vision Transformers: AdamW, 100 epochs, and a learning rate that is smaller for
  the first blocks, as in MAE (arXiv 2111.06377, appendix A.2, the code's values for ViT-B), but
  without its mixed images, random augmentation, label smoothing and drop path.

The labelled images are drawn with the seed, the same number for each class. TFDS has the lists that
SimCLR published: `--config.data.name=imagenet2012_subset/1pct` with `--config.label_share=1.0`. Any
other list of file names, one per line, can be given as `--config.label_list=FILE`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, evaluation, parsing


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    presets = {"10pct": ten_percent, "1pct": one_percent, "100pct": all_labels, "vit": vit}
    return parsing.parse(arg, **presets)


def one_percent() -> ConfigDict:
    """1 % of the labels."""
    return _finetune(label_share=0.01, epochs=60.0)


def ten_percent() -> ConfigDict:
    """10 % of the labels."""
    return _finetune(label_share=0.1, epochs=30.0)


def all_labels() -> ConfigDict:
    """All labels."""
    return _finetune(label_share=1.0, epochs=30.0)


def vit() -> ConfigDict:
    """All labels, for Vision Transformers."""
    config = _finetune(label_share=1.0, epochs=100.0)
    config.optimizer = common.optimizer(
        name="adamw",
        learning_rate=5e-4,
        weight_decay=0.05,
        warmup_epochs=5.0,
        exclude=("bias$", "scale$", "class_token$", "positions$"),
    )
    config.head_learning_rate = 5e-4
    config.layer_decay = 0.65
    return config


def _finetune(label_share: float, epochs: float) -> ConfigDict:
    config = evaluation.training(
        evaluation.job_defaults("finetune"), epochs=epochs, batch_size=1024
    )
    config.label_share = label_share
    config.label_list = ""  # a file with file names, one per line, instead of a share
    config.bn_groups = 1
    config.train_batch_norm = True  # False: only the batch statistics are frozen
    plain = {"name": "sgd", "weight_decay": 0.0, "nesterov": True, "exclude": ()}
    config.optimizer = common.optimizer(warmup_epochs=0.0, learning_rate=0.05, **plain)
    config.head_learning_rate = 0.05  # scaled and scheduled like the encoder's
    # The learning rate of a layer (a stage of a ResNet, a block of a ViT) is that of the next one
    # times this, of the last one the optimizer's times this; 1: all have the optimizer's.
    config.layer_decay = 1.0
    config.random_init = False  # also fine-tune an untrained encoder
    return config
