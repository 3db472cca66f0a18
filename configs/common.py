"""All fields of pretraining with their defaults, by section."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict


def pretrain_defaults() -> ConfigDict:
    """The fields of every pretraining config, for all methods."""
    config = ConfigDict()
    config.job = "pretrain"
    config.seed = 0

    # Length: the first of steps, examples and epochs that is given is used.
    config.steps = config_dict.placeholder(int)
    config.examples = config_dict.placeholder(int)
    config.epochs = 1000.0
    # An epoch has images // batch_size steps, as with PyTorch's `drop_last`. False: the run has
    # epochs x images // batch_size steps in all (BYOL's and SimCLR's code), and so has the warm-up.
    config.whole_epochs = True

    config.batch_size = 4096  # global: over all devices of all hosts
    config.accumulate_steps = 1  # microbatches per update
    config.bn_groups = 1  # batch-norm groups of the global batch; 1 is global batch norm
    # Of convolutions and matmuls: bfloat16, float32, or `auto`: bfloat16 on TPUs and recent GPUs.
    config.compute_dtype = "auto"

    config.data = data_access()
    config.data.name = "imagenet2012"  # a TFDS name, `folder`, `arrays`, or `digits`
    config.data.dir = ""  # TFDS's data_dir (its own default if empty), or the folder of images
    config.data.train_split = ""  # TFDS split syntax; empty: chosen from the data set's splits
    config.data.test_split = ""  # held-out images for the evaluation at the end
    # Images of more than 8 bits per channel, such as microscopes' and radiology's, become 8 bits:
    # `LOW,HIGH`, the values that are black and white in every image, such as 0,4095; `auto`: the
    # range of 99.8 % of the training images' values, or `full` without such images; `per_image`:
    # that range of each image; `full`: the higher byte of 16 bits.
    config.data.intensity = "auto"
    config.data.exif_orientation = True  # turn a folder's photographs as their EXIF data say
    config.data.image_size = 224  # pixels, of the crops and of the test images
    config.data.test_resize = 256  # shorter side before the test's centre crop
    config.data.resize_method = "bicubic"

    config.online_probe = online_probe()

    # Weights to start from: a run, one of its checkpoints, an exported or an imported encoder
    # (`python -m selfsup_jax.interop import`); empty: random ones.
    config.init_from = ""

    # Steps that a device does in a loop of its own, to the next log line at most; 0: 50 with data
    # on an accelerator, else one step without a loop. On the CPU, XLA's loops are slow.
    config.steps_per_call = 0
    # Intervals. -1 fits the length of the run: see `selfsup_jax/durations.py:Intervals`.
    config.log_every_steps = 50
    config.checkpoint_every_steps = 1000
    config.keep_checkpoints = 2  # the newest
    config.keep_every_steps = 0  # checkpoints at multiples of it are never deleted; 0: none

    config.monitor = monitor()
    config.wandb = ConfigDict()  # Weights & Biases, beside TensorBoard; needs the package wandb
    config.wandb.project = ""  # empty: nothing is sent
    config.wandb.entity = ""  # user or team; empty: the default of the login

    config.profile = ConfigDict()  # a trace for TensorBoard's profiler or Perfetto
    config.profile.first_step = 0  # 0: none
    config.profile.num_steps = 5
    config.eval = evaluation()
    return config


def monitor() -> ConfigDict:
    """Monitoring during training; an interval of 0: never."""
    config = ConfigDict()
    config.diagnostics_every_steps = 500  # spread, rank, alignment, uniformity
    config.knn_every_steps = 5000  # kNN on held-out images, if eval.enabled
    config.plots_every_steps = 5000
    config.max_rows = 512  # examples of a batch that the diagnostics use
    config.knn_train_images = 5000
    config.knn_test_images = 1000
    config.map_images = 1000  # held-out images on the map
    config.view_pairs = 12
    config.collapse_std = 0.1  # below it the projections count as collapsed (1 is healthy)
    config.collapse_rank = 1.5  # below it the representations count as collapsed
    config.reference = ""  # a curve in `selfsup_jax/training/references/` to compare with
    return config


def evaluation() -> ConfigDict:
    """The evaluation of the last step's encoder."""
    config = ConfigDict()
    config.enabled = True
    config.network = "online"  # whose encoder is evaluated and exported; or `target`
    config.batch_size = 256
    config.max_train_images = 20000  # labelled images for the probes
    config.max_test_images = 50000
    config.knn_k = 200
    config.knn_temperature = 0.1
    config.linear = linear_probe()
    config.fewshot_labels = 10  # per class
    config.fewshot_draws = 10
    config.random_init = True  # the same probes on an untrained encoder
    config.pixels = False  # the same probes on raw pixels
    return config


def data_access() -> ConfigDict:
    """How the images of a run or a job are read, wherever they come from."""
    config = ConfigDict()
    config.download = False  # let TFDS download and prepare data that is not in `dir`
    config.labels = "auto"  # a folder's are its sub-folders; `none`: as if there were none
    # A TFDS split up to this size is read once at the start, so that its labels are known and it
    # may go to the devices; images of a larger one are only read when they are needed.
    config.cache_gib = 4.0
    # Where the images are during training: decoded in the memory of each `device`, which also crops
    # them; on the `host`, which decodes and crops them for each step; `auto`: `device` if they fit.
    config.placement = "auto"
    config.device_share = 0.25  # of a device's memory, for a split
    # Who crops images that the host decodes for each step: the `host`; or the `device`, which gets
    # them whole, in a square of `canvas` pixels (larger images are made smaller). The host then has
    # about half the work.
    config.crop_on = "host"
    config.canvas = 512
    # Processes that decode, for hosts of many cores: such as one a core; 0: threads.
    config.processes = 0
    config.reader = "builtin"  # whose threads or processes: ours, or those of the package `grain`
    config.max_undecodable = 0.01  # share of images that may be broken before it stops
    return config


def linear_probe() -> ConfigDict:
    """Logistic regression on frozen features, at the end of a run and in the job `linear_probe`."""
    config = ConfigDict()
    # Inverse strengths of the L2 penalty (scikit-learn's C); the best is chosen on held-out images.
    config.C = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    config.held_out_images = 10009  # of the training images, at most a fifth: BYOL, appendix C.1
    config.standardize = True  # features to zero mean and unit deviation
    config.max_iterations = 200  # of L-BFGS
    config.tolerance = 1e-3  # a fit ends when its largest gradient is below it
    return config


def sweep(title: str, variants: dict[str, ConfigDict], seeds: tuple[int, ...]) -> ConfigDict:
    """A sweep: every variant is pretrained with every seed; one table has the results."""
    config = ConfigDict()
    config.job = "sweep"
    config.title = title
    config.seeds = seeds
    config.variants = ConfigDict(variants)  # name -> the config of a run; its seed is replaced
    config.only = tuple(variants)  # the variants to run, in this order
    # The table shows `columns` (fields of the variants' configs) and `metrics` (of their results).
    config.columns = ()
    config.metrics = (
        "linear_probe_top1",
        "knn_top1",
        "random_init_linear_probe_top1",
        "random_init_knn_top1",
    )
    config.published = ConfigDict()  # variant -> published top-1, for comparison
    config.published_title = "published"
    config.publish_dir = ""  # table and record are also written here after all runs
    return config


def encoder(**changes) -> ConfigDict:
    """The encoder; the defaults are BYOL's (`selfsup_jax/models/resnet.py:ResNet`)."""
    fields = {
        # Or `vit_ti16`, `vit_s16`, `vit_b16`, also with patches of 8 and (ti, s) 4 pixels: a Vision
        # Transformer has the fields in `vit` and `remat`, and a ResNet the others.
        "name": "resnet",
        "vit": vit(),
        "depth": 50,
        "width": 1.0,  # multiplies every stage's channels
        "stem": "imagenet",  # or `cifar`
        "padding": "same",  # BYOL's code; `torch`: MoCo's; `fixed`: SimCLR's
        "stage1_projection": True,  # BYOL's and SimCLR's code, at depth 18 and 34; torchvision: not
        "zero_init_gamma": True,  # the last norm of each residual branch starts at 0
        "zero_init_basic": False,  # also at depth 18 and 34: SimCLR's code and torchvision
        "kernel_init": "haiku",  # BYOL's; `lecun`: SimCLR's; `kaiming_fan_out`: MoCo's; or `torch`
        "bn_decay": 0.9,
        "bn_epsilon": 1e-5,
        "bn_unbiased_average": False,  # running variance times n / (n - 1), as PyTorch's
        # How it is computed; the results differ by rounding only (docs/tpu_pods.md has the costs).
        "remat": "none",  # the backward pass computes `blocks` or `stages` again, to save memory
        "pool_first": "auto",  # the stem's norm comes after its max-pooling: `yes` on TPUs, or `no`
        # The first stages whose bottlenecks end in a norm that does not store its input; -1: 2 on
        # TPUs, where both save memory traffic, and 0 elsewhere.
        "product_norm_stages": -1,
    }
    return _changed("an encoder", fields, changes)


def vit(**changes) -> ConfigDict:
    """What only Vision Transformers have; the defaults are DINO's, without its drop path of 0.1.

    `selfsup_jax/models/vit.py:ViT` documents the fields.
    """
    fields = {
        "width": 0,  # 0: as the encoder's name says, here and in the next three
        "depth": 0,
        "heads": 0,
        "patch": 0,  # pixels
        "mlp_ratio": 4,
        "positions": "learnt",  # or `sincos`, which are fixed: MoCo v3
        "frozen_patches": False,  # the patches' projection stays as it is drawn: MoCo v3
        "drop_path": 0.0,  # probability at the last block, linear over the depth
        "features": "class",  # the class token is the representation; or `mean`, of the patches
        "layer_norm_epsilon": 1e-6,
        "init": "normal",  # or `xavier`: MoCo v3
        # How it is computed: `auto` is cuDNN's flash attention on GPUs that have it, else `xla`.
        "attention_kernel": "auto",
    }
    return _changed("a Vision Transformer", fields, changes)


def online_probe(**changes) -> ConfigDict:
    """The linear classifier that is trained with the encoder, on features without gradient."""
    fields = {
        "kernel_init": "lecun",  # BYOL's code: `haiku`; SimCLR's: `normal`
        "every_view": False,  # learns from the features of view 1 (BYOL), or of all views (SimCLR)
        "lars_ratio": True,  # LARS scales its update too (BYOL; SimCLR: not)
    }
    return _changed("the online probe", fields, changes)


def head(**changes) -> ConfigDict:
    """A projector or predictor; the defaults are BYOL's (`selfsup_jax/models/heads.py`)."""
    fields = {
        "hidden_sizes": (4096,),  # () is a linear head
        "output_size": 256,
        "linear_init": "haiku",  # BYOL's code; `torch`: MoCo's; `normal`: SimCLR's
        "hidden_bias": True,
        "hidden_norm": True,
        "activation": "relu",  # or `gelu`
        "output_bias": False,
        "output_norm": "none",  # or `affine`, `scale` (no offset), `plain` (neither)
    }
    return _changed("a head", fields, changes)


def optimizer(warmup_epochs: float = 10.0, **changes) -> ConfigDict:
    """The optimizer; the default is LARS as in BYOL's code."""
    fields = {
        "name": "lars",  # or `sgd`, `adamw`, `lamb`
        "learning_rate": 0.2,
        "scaling": "linear",  # x batch_size / 256; or `sqrt`, x sqrt(batch_size); or `none`
        "schedule": "cosine",  # or `step`, `constant`
        "end_fraction": 0.0,  # the cosine ends at this fraction of the peak
        "drops": (),  # of the step schedule, as fractions of the run
        "drop_factor": 0.1,
        "warmup_steps": config_dict.placeholder(int),  # the first of these that is given is used
        "warmup_examples": config_dict.placeholder(int),
        "warmup_epochs": warmup_epochs,
        "momentum": 0.9,
        "nesterov": False,
        "rate_inside_momentum": False,  # outside: BYOL's code and PyTorch; inside: SimCLR's
        "weight_decay": 1.5e-6,
        "weight_decay_end": config_dict.placeholder(float),  # end of a cosine; None: constant decay
        "trust_coefficient": 1e-3,  # LARS's eta
        "exclude": ("bias$", "scale$"),  # biases and norms: no decay, no LARS ratio
        "excluded_rate": 1.0,  # factor on the learning rate of these
        "constant_rate": (),  # patterns of parameters with a constant learning rate
        "clip_norm": 0.0,  # maximum norm of the gradient; 0: no clipping
        "clip_each": False,  # it is the maximum of each tensor's norm, as in DINO's code
        "freeze": (),  # patterns of parameters that do not change at first, for the first of these
        "freeze_steps": config_dict.placeholder(int),  # that is given
        "freeze_examples": config_dict.placeholder(int),
        "freeze_epochs": config_dict.placeholder(float),
        "beta_2": 0.999,  # of AdamW and LAMB; their first beta is `momentum`
        "adam_epsilon": 1e-8,
    }
    return _changed("an optimizer", fields, changes)


# Mean and deviation of ImageNet's pixels, per channel.
IMAGENET_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def view(**changes) -> ConfigDict:
    """One view's augmentation; the defaults are BYOL's view 1 (Grill et al., appendix B).

    `selfsup_jax/data/augment.py:ViewAugmentation` documents the fields.
    """
    fields = {
        "flip_prob": 0.5,
        "jitter_prob": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "jitter_style": "tensorflow",
        "grayscale_prob": 0.2,
        "blur_prob": 1.0,
        "blur_kernel": 23,
        "blur_sigma_min": 0.1,
        "blur_sigma_max": 2.0,
        "blur_padding": "zero",
        "solarize_prob": 0.0,
        "solarize_threshold": 0.5,
    }
    return _changed("a view", fields, changes)


def views(
    config: ConfigDict, *each: ConfigDict, area: tuple[float, ...] = (0.08, 1.0)
) -> ConfigDict:
    """Two views of each image, normalised with ImageNet's mean and standard deviation.

    The views of a group have the same crop size. The group is `global`; methods with more views
    also have `local` (`recipes.py:local_views`). The last `view_N` section of a group is used for
    all further views.

    Args:
        config: its `data.image_size` is the default size of the crops.
        each: the augmentation of each view, or one for both.
        area: of the crops, as a share of the image's area.
    """
    group = ConfigDict({f"view_{i}": view for i, view in enumerate(each, start=1)})
    group.count = 2
    group.size = config.data.get_oneway_ref("image_size")  # pixels
    group.area = area
    group.aspect = (3 / 4, 4 / 3)  # width / height, log-uniform
    section = ConfigDict()
    section["global"] = group
    section.update(IMAGENET_PIXELS)
    return section


def _changed(what: str, fields: dict, changes: dict) -> ConfigDict:
    unknown = set(changes) - set(fields)
    if unknown:
        raise KeyError(f"no such field of {what}: {sorted(unknown)}")
    return ConfigDict(fields | changes)
