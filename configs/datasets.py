"""Settings for each data set, which the presets of all methods share."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common, recipes

CIFAR10_PIXELS = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}


def our_recipe(config: ConfigDict) -> ConfigDict:
    """Details in which BYOL's and SimCLR's code differ, alike for all methods.

    Our own presets were measured with these: torchvision's residual blocks, the truncated normal
    corrected for the truncation, epochs of whole batches, one online probe.
    """
    config.whole_epochs = True
    config.encoder.update(stage1_projection=False, zero_init_basic=True)
    if config.encoder.kernel_init == "haiku":
        config.encoder.kernel_init = "lecun"
    for head in ("projector", "predictor"):
        if head in config and config[head].linear_init == "haiku":
            config[head].linear_init = "lecun"
    config.online_probe = common.online_probe()
    return config


def on_imagenet(config: ConfigDict) -> ConfigDict:
    """ImageNet at 224 px; its test labels are not public, so `validation` is the test split."""
    config.data.update(train_split="train", test_split="validation")
    return config


def on_cifar10(config: ConfigDict) -> ConfigDict:
    """CIFAR-10 for one accelerator: ResNet-18 with a 3x3 stem; no blur, as is usual for it."""
    config.data.update(name="cifar10", image_size=32, test_resize=32)
    config.encoder.update(depth=18, stem="cifar")
    for view in recipes.sections_of_views(config):
        view.update(blur_prob=0.0, solarize_prob=0.0)
    config.views.update(CIFAR10_PIXELS)
    config.checkpoint_every_steps = 2000
    config.eval.max_train_images = 50000
    return config


def like_lightly(config: ConfigDict, loss_scale: float = 1.0) -> ConfigDict:
    """CIFAR-10 as in lightly's benchmark: SGD, decay of all parameters, PyTorch's initialisation.

    From the same weights and views, steps agree with lightly's but for these differences: lightly's
    benchmark has no ReLU after the first batch norm (it builds the encoder from the layers of a
    network that applies this ReLU in a function call); its learning rate changes once an epoch,
    ours each step; it computes in float32; its augmentation rounds to 8 bits after each operation.
    lightly's BYOL target starts as a copy of the online network; ours has its own random draw.
    MoCo's and DINO's presets name one difference more.

    Args:
        config: a method's recipe for any data.
        loss_scale: our loss divided by lightly's. The rate is divided by it and the decay
            multiplied, so that the updates are the same.
    """
    config = our_recipe(on_cifar10(config))
    config.epochs = 200.0
    config.batch_size = 128
    config.data.resize_method = "bilinear"
    config.views["global"].area = (0.08, 1.0)
    config.views.update(common.IMAGENET_PIXELS)
    for view in recipes.sections_of_views(config):
        view.update(
            jitter_style="torchvision", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
        )
    config.encoder.update(padding="torch", kernel_init="torch", zero_init_gamma=False)
    config.encoder.bn_unbiased_average = True
    for head in ("projector", "predictor"):
        if head in config:
            config[head].linear_init = "torch"
    config.optimizer = common.optimizer(
        name="sgd",
        learning_rate=0.12 / loss_scale,  # 0.06 x B / 128
        weight_decay=5e-4 * loss_scale,
        warmup_epochs=0.0,
        exclude=(),
    )
    return config


def byol_augmentation(config: ConfigDict) -> ConfigDict:
    """`like_lightly` with BYOL's augmentation: less saturation, and view 2 is solarised."""
    for view in recipes.sections_of_views(config):
        view.saturation = 0.2
    config.views["global"].view_2.solarize_prob = 0.2
    return config


def on_imagenette(config: ConfigDict) -> ConfigDict:
    """Imagenette: ResNet-18 on 128 px crops of the 160 px set, batch 256."""
    config.batch_size = 256
    config.data.update(name="imagenette/160px-v2", image_size=128, test_resize=146)
    config.encoder.depth = 18
    for view in recipes.sections_of_views(config):
        view.blur_kernel = 13  # a tenth of the image, as 23 is of 224
    return config


def on_folder(config: ConfigDict) -> ConfigDict:
    """Your own images at 96 px, for any machine: a small encoder, a batch of 64."""
    config = our_recipe(config)
    config.log_every_steps = -1  # any number of images: the length is not known here
    config.monitor.update(diagnostics_every_steps=-1, knn_every_steps=-1, plots_every_steps=-1)
    config.batch_size = 64
    config.data.update(name="folder", image_size=96, test_resize=110)
    config.encoder.depth = 18
    for view in recipes.sections_of_views(config):
        view.blur_kernel = 9
    return config


def on_digits(config: ConfigDict) -> ConfigDict:
    """The demo: 5,000 embedded digits at 16 px, ResNet-10 a quarter as wide, batch 64.

    ResNet-10 takes half the time of ResNet-18 here. With blocks that start as they are drawn, and
    not as the identity, a network this small learns more in the same number of steps (BYOL, 46
    epochs, one seed: 95.7 % and 92.4 % with 10 labels, against 94.1 % and 82.7 %).
    """
    config = our_recipe(config)
    config.batch_size = 64
    config.data.name = "digits"
    config.data.image_size = 16
    config.data.test_resize = 20  # a digit fills 20 of 28 pixels: this removes the margins
    config.views["global"].area = (0.4, 1.0)
    config.data.resize_method = "area"  # bicubic without antialiasing skips lines (28 to 16 px)
    config.encoder.update(depth=10, width=0.25, stem="cifar", zero_init_gamma=False)
    for view in recipes.sections_of_views(config):
        view.update(
            flip_prob=0.0,
            saturation=0.0,
            hue=0.0,
            grayscale_prob=0.0,
            blur_kernel=5,
            blur_prob=0.5,
            solarize_prob=0.0,
        )
    config.views.update(mean=(0.13, 0.13, 0.13), std=(0.31, 0.31, 0.31))
    config.log_every_steps = 62  # an epoch
    config.checkpoint_every_steps = 310
    config.monitor.diagnostics_every_steps = 62
    config.monitor.knn_every_steps = 620
    config.monitor.plots_every_steps = 1240
    config.monitor.map_images = 500
    config.eval.knn_k = 20  # of 400 images per class
    config.eval.pixels = True
    return config
