"""Fields that the configs of all evaluation jobs share."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from configs import common


def job_defaults(job: str) -> ConfigDict:
    """A job that evaluates the encoder in `config.checkpoint`.

    Empty fields in `data` are taken from the run that trained the encoder.
    """
    config = ConfigDict()
    config.job = job
    # A run's workdir (its newest checkpoint), WORKDIR/checkpoints/STEP, or an exported encoder.
    config.checkpoint = ""
    config.init_from = ""  # the same by the name that pretraining has for it; one of the two
    config.seed = 0
    config.compute_dtype = ""  # of convolutions and matmuls; empty: the run's
    config.feature_batch_size = 256  # images per batch and host, for frozen encoders
    # Of a frozen Vision Transformer: `last4`, the class tokens of its last 4 blocks, or
    # `class_mean`, the last block's class token and its patches' mean: DINO's linear evaluation of
    # ViT-S and of ViT-B. Empty: the encoder's own representation.
    config.features = ""

    config.follow = False  # evaluate every checkpoint of an unfinished run, each once
    config.follow_poll_seconds = 30.0
    config.follow_patience_hours = 24.0  # stop after so long without a new checkpoint

    config.data = common.data_access()
    of_run = ("name", "dir", "train_split", "test_split", "intensity", "resize_method")
    config.data.update(dict.fromkeys(of_run, ""))
    config.data.update(image_size=0, test_resize=0)
    config.data.exif_orientation = config_dict.placeholder(bool)
    config.data.max_train_images = 0  # maximum, evenly spread over the split; 0: all
    config.data.allow_unseen_classes = False  # in the test split; True: they count as wrong
    return config


def with_baseline(config: ConfigDict) -> ConfigDict:
    """Also evaluates an untrained encoder, as a baseline."""
    config.random_init = True
    return config


def training(config: ConfigDict, *, epochs: float, batch_size: int) -> ConfigDict:
    """Adds the fields of a job that trains on crops and flips of the training images."""
    config.steps = config_dict.placeholder(int)  # the first of these that is given is used
    config.examples = config_dict.placeholder(int)
    config.epochs = epochs
    config.whole_epochs = False  # as BYOL's and SimCLR's code; see `common.pretrain_defaults`
    config.batch_size = batch_size  # global: over all devices of all hosts
    config.accumulate_steps = 1
    view = common.view(jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0)
    view["flip_prob"] = config_dict.placeholder(float)  # empty: as the run's first view
    config.views = common.views(config, view, area=())  # share of the image; empty: the run's
    config.views["global"].count = 1
    config.views["global"].aspect = ()  # empty: the run's
    del config.views.mean, config.views.std  # the run's
    config.log_every_steps = 50
    config.checkpoint_every_steps = 500
    config.keep_checkpoints = 1
    config.keep_every_steps = 0
    return config
