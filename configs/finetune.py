"""The encoder trained on, with a classifier on top: semi-supervised, or with all labels.

    python run_experiment.py --config=configs/finetune.py:tenth --config.checkpoint=RUN \\
        --workdir=DIR

Presets by the share of labels; epochs and rates of the first two as in SimCLR's paper (appendix
B.5: Nesterov momentum, no decay, no warm-up; the batch of 1024 is BYOL's), the encoder's and the
head's apart; published top-1 as in BYOL's paper, table 2:

- `hundredth`: 1 % of the labels, 60 epochs; 48.3 % for SimCLR's ResNet-50, 53.2 % for BYOL's.
- `tenth` (the default): 10 %, 30 epochs; 65.6 % and 68.8 %.
- `all`: 100 %, 30 epochs.

The labelled images are drawn from the seed, the same number of each class; or take the lists that
were published with SimCLR: `--config.data.name=imagenet2012_subset/1pct` (TFDS has them) with
`--config.label_share=1.0`, or any list of file names, one a line, in `--config.label_list=FILE`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, evaluation


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    presets = {"hundredth": hundredth, "tenth": tenth, "all": all_labels}
    return common.parse(arg, presets, default="tenth")


def hundredth() -> ConfigDict:
    """1 % of the labels."""
    return _finetune(label_share=0.01, epochs=60.0)


def tenth() -> ConfigDict:
    """10 % of the labels."""
    return _finetune(label_share=0.1, epochs=30.0)


def all_labels() -> ConfigDict:
    """All labels."""
    return _finetune(label_share=1.0, epochs=30.0)


def _finetune(label_share: float, epochs: float) -> ConfigDict:
    config = evaluation.training(
        evaluation.job_defaults("finetune"), epochs=epochs, batch_size=1024
    )
    config.label_share = label_share
    config.label_list = ""  # a file of file names, one a line, in place of a share
    config.bn_groups = 1
    config.train_batch_norm = True  # else statistics stay as they were, and only they
    plain = {"name": "sgd", "weight_decay": 0.0, "nesterov": True, "exclude": ()}
    config.optimizer = common.optimizer(warmup_epochs=0.0, learning_rate=0.05, **plain)
    config.head_learning_rate = 0.05  # scaled and scheduled as the encoder's
    config.random_init = False  # the same from an encoder that was never trained
    return config
