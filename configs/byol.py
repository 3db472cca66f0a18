"""BYOL (Grill et al. 2020, arXiv 2006.07733), from images to a probed representation.

    python run_experiment.py --config=configs/byol.py --workdir=DIR          # the paper's recipe
    python run_experiment.py --config=configs/byol.py:imagenet,epochs=300 --workdir=DIR
    python run_experiment.py --config=configs/byol.py:PRESET --config.batch_size=256 --workdir=DIR

Presets, their cost, and what to expect (published numbers are the papers' linear evaluation on all
of the training set; a run's own `linear_probe_top1` fits `config.eval.max_train_images` of it):

- `imagenet` (the default): ResNet-50, 224 px, batch 4096, 1000 epochs; 74.3 %, and 72.5 % after
  300 epochs (the paper, table 1 and section 4). About 8 hours on 512 TPU v3 cores (section 3.3).
  `epochs=` 40, 100, 300 and 1000 take the learning rate, decay and tau of the authors' code for
  that length; another length takes those of the next shorter one.
- `cifar10`: ResNet-18 with a 3x3 stem, 32 px, batch 128, 200 epochs, after lightly's benchmark:
  86.9 % kNN, the best epoch on the test set (peers' table; ours are in the README).
- `imagenette`: ResNet-18, 128 px crops, batch 256, 1000 epochs; 92.3 % online linear
  (the authors' README).
- `demo`: 5,000 embedded handwritten digits, under 4 minutes on two CPU cores; at least 95 %, and
  85 % with 10 labels per class.
- `folder`: your own images: `--config.data.dir=/path/to/images`, with class sub-folders or none.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common

# epochs -> (base learning rate, weight decay, tau_base): the authors' code.
_BY_LENGTH = {
    40: (0.45, 1e-6, 0.97),
    100: (0.45, 1e-6, 0.99),
    300: (0.3, 1e-6, 0.99),
    1000: (0.2, 1.5e-6, 0.996),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    presets = {
        "imagenet": imagenet,
        "cifar10": cifar10,
        "imagenette": imagenette,
        "demo": demo,
        "folder": folder,
    }
    return common.parse(arg, presets, default="imagenet")


def imagenet(epochs: float = 1000) -> ConfigDict:
    """ImageNet as in the paper; its test split has no public labels, so validation is held out."""
    config = _paper(epochs)
    config.data.train_split = "train"
    config.data.test_split = "validation"
    return config


def _paper(epochs: float = 1000) -> ConfigDict:
    """The paper's recipe for any data, with the code's values for its length."""
    lengths = [length for length in _BY_LENGTH if length <= epochs] or [min(_BY_LENGTH)]
    learning_rate, weight_decay, tau_base = _BY_LENGTH[max(lengths)]

    config = common.pretrain_defaults()
    config.method = "byol"
    config.epochs = float(epochs)
    config.tau_base = tau_base
    config.tau_schedule = "cosine"  # from tau_base to 1; or `constant`
    config.use_predictor = True  # without one it collapses (section 5, table 5b)

    config.encoder = ConfigDict(
        {
            "depth": 50,
            "width": 1.0,  # multiplies every stage's channels
            "stem": "imagenet",  # or `cifar`
            "padding": "same",  # TensorFlow's, as in the authors' code; or `torch`
            "zero_init_gamma": True,  # as in the code; the paper starts it at 1
            "kernel_init": "lecun",
            "bn_decay": 0.9,
            "bn_epsilon": 1e-5,
        }
    )
    config.projector = ConfigDict({"hidden_size": 4096, "output_size": 256})
    config.predictor = ConfigDict({"hidden_size": 4096, "output_size": 256})

    config.optimizer = ConfigDict(
        {
            "name": "lars",  # or `sgd`
            "learning_rate": learning_rate,
            "scaling": "linear",  # x batch_size / 256; or `sqrt`, `none`
            "schedule": "cosine",  # or `step`, `constant`
            "drops": (),  # of the step schedule, as fractions of the run
            "drop_factor": 0.1,
            **common.warmup(epochs=10.0),
            "momentum": 0.9,
            "nesterov": False,
            "rate_inside_momentum": False,  # outside, as in the authors' code
            "weight_decay": weight_decay,
            "trust_coefficient": 1e-3,  # LARS's eta
            "exclude": ("bias$", "scale$"),  # biases and norms: no decay, no LARS ratio
        }
    )

    config.augment = ConfigDict()
    config.augment.view_1 = common.view(blur_prob=1.0, solarize_prob=0.0)
    config.augment.view_2 = common.view(blur_prob=0.1, solarize_prob=0.2)
    config.augment.mean = (0.485, 0.456, 0.406)
    config.augment.std = (0.229, 0.224, 0.225)
    return config


def cifar10() -> ConfigDict:
    """CIFAR-10 on one accelerator: lightly's benchmark recipe, with SGD and no blur."""
    config = _paper()
    config.epochs = 200.0
    config.batch_size = 128
    config.compute_dtype = "float32"
    config.tau_base = 0.99
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.test_resize = 32
    config.encoder.depth = 18
    config.encoder.stem = "cifar"
    config.encoder.padding = "torch"
    config.projector.hidden_size = 1024
    config.predictor.hidden_size = 1024
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.12  # 0.06 x B / 128
    config.optimizer.weight_decay = 5e-4
    config.optimizer.warmup_epochs = 0.0
    for view in (config.augment.view_1, config.augment.view_2):
        view.update(jitter_style="torchvision", blur_prob=0.0, solarize_prob=0.0)
    config.augment.mean = (0.4914, 0.4822, 0.4465)
    config.augment.std = (0.247, 0.2435, 0.2616)
    config.checkpoint_every_steps = 2000
    config.eval.max_train_images = 50000
    return config


def imagenette() -> ConfigDict:
    """Imagenette as in the authors' README: ResNet-18, 128 px crops of the 160 px set."""
    config = _paper()
    config.batch_size = 256
    config.data.name = "imagenette/160px-v2"
    config.data.image_size = 128
    config.data.test_resize = 146
    config.encoder.depth = 18
    config.optimizer.learning_rate = 2.0
    config.optimizer.weight_decay = 1e-6
    for view in (config.augment.view_1, config.augment.view_2):
        view.blur_kernel = 13  # a tenth of the image, as 23 is of 224
    return config


def folder() -> ConfigDict:
    """Your own images, on whatever is at hand: the 300-epoch recipe with a batch for one device."""
    config = _paper(epochs=300)
    config.batch_size = 64
    config.tau_base = 0.99
    config.compute_dtype = "float32"
    config.data.name = "folder"
    config.data.image_size = 96
    config.data.test_resize = 110
    config.encoder.depth = 18
    config.projector.hidden_size = 1024
    config.predictor.hidden_size = 1024
    for view in (config.augment.view_1, config.augment.view_2):
        view.blur_kernel = 9
    return config


def demo() -> ConfigDict:
    """Embedded digits on two CPU cores in under four minutes."""
    config = _paper()
    config.epochs = 46.0
    config.batch_size = 64
    config.compute_dtype = "float32"
    config.tau_base = 0.98
    config.data.name = "digits"
    config.data.image_size = 16
    config.data.test_resize = 20  # a digit fills 20 of its 28 pixels: the margins go
    config.data.crop_area = (0.4, 1.0)
    config.data.resize_method = "area"  # 28 to 16 pixels: bicubic without antialiasing skips lines
    config.encoder.depth = 18
    config.encoder.width = 0.25
    config.encoder.stem = "cifar"
    config.projector.hidden_size = 512
    config.projector.output_size = 128
    config.predictor.hidden_size = 512
    config.predictor.output_size = 128
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.3
    config.optimizer.weight_decay = 4e-4
    config.optimizer.warmup_epochs = 2.0
    for view in (config.augment.view_1, config.augment.view_2):
        view.update(
            flip_prob=0.0,
            saturation=0.0,
            hue=0.0,
            grayscale_prob=0.0,
            blur_kernel=5,
            blur_prob=0.5,
            solarize_prob=0.0,
        )
    config.augment.mean = (0.13, 0.13, 0.13)
    config.augment.std = (0.31, 0.31, 0.31)
    config.log_every_steps = 62  # an epoch
    config.checkpoint_every_steps = 310
    config.monitor.diagnostics_every_steps = 62
    config.monitor.knn_every_steps = 620
    config.monitor.plots_every_steps = 1240
    config.monitor.map_images = 500
    config.monitor.reference = "byol_demo"
    config.eval.knn_k = 20  # of 400 images per class
    config.eval.pixels = True
    return config
