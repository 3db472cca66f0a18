"""What the configs of all evaluation jobs have in common."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def job_defaults(job: str) -> ConfigDict:
    """A job that evaluates the encoder in `config.checkpoint`.

    What is left empty in `data` is taken from the run that made the encoder.
    """
    config = ConfigDict()
    config.job = job
    # A run's workdir (its newest checkpoint), WORKDIR/checkpoints/STEP, or an exported encoder.
    config.checkpoint = ""
    config.seed = 0
    config.compute_dtype = ""  # of convolutions and matmuls; empty: the run's
    config.feature_batch_size = 256  # images at once, of each host, where nothing is trained

    config.watch = False  # evaluates every checkpoint of a run that is going on, each once
    config.watch_poll_seconds = 30.0
    config.watch_patience_hours = 24.0  # without a new checkpoint

    config.data = ConfigDict()
    config.data.name = ""
    config.data.dir = ""
    config.data.download = False
    config.data.train_split = ""
    config.data.test_split = ""
    config.data.image_size = 0
    config.data.test_resize = 0
    config.data.resize_method = ""
    config.data.cache_gib = 4.0  # a TFDS split up to this size is held in memory, else streamed
    config.data.shuffle_buffer = 16384  # images, for streamed splits
    config.data.max_undecodable = 0.01  # share of images that may be broken before the job stops
    config.data.max_train_images = 0  # of more an evenly spread part is taken; 0: all
    config.data.allow_unseen_classes = False  # test images of classes that no training image has
    return config


def with_baseline(config: ConfigDict) -> ConfigDict:
    """The same measured on an encoder that was never trained, too."""
    config.random_init = True
    return config


def training(config: ConfigDict, *, epochs: float, batch_size: int) -> ConfigDict:
    """What a job needs that trains something on crops and flips of the training images."""
    config.steps = config_dict.placeholder(int)  # the first of these that is given counts
    config.examples = config_dict.placeholder(int)
    config.epochs = epochs
    config.batch_size = batch_size  # global: over all devices of all hosts
    config.accumulate_steps = 1
    config.flip_prob = config_dict.placeholder(float)  # empty: the run's first view's
    config.data.crop_area = ()  # share of the image's area; empty: the run's
    config.data.crop_aspect = ()
    config.log_every_steps = 50
    config.checkpoint_every_steps = 500
    config.keep_checkpoints = 1
    config.keep_every_steps = 0
    return config
