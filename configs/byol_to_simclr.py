"""The path between SimCLR and BYOL: the eight variants of BYOL's section 5 in one table.

    python run_experiment.py --config=configs/byol_to_simclr.py --workdir=DIR  # the digits
    python run_experiment.py "--config=configs/byol_to_simclr.py:cifar10,seeds=(1,)" --workdir=DIR

A variant has the predictor or not, the target network or not, and negatives (beta = 1) or not:
BYOL is (yes, yes, 0), SimCLR (no, no, 1). Without a target network the online projection is also
the target, and gradients flow through both sides, as in SimCLR. The negatives' temperature is 0.3
with a target network and SimCLR's 0.1 without; everything else is BYOL's recipe for the data set.

Published (table 5b; ResNet-50, ImageNet, 300 epochs, linear top-1): without negatives only BYOL
learns, and the other three collapse to 0.1-0.3 %; with negatives all four learn.

Presets; any field after the comma is set in each variant:

- `demo` (the default): embedded digits, 16 epochs per run, about 15 minutes on two CPU cores. Our
  results are in the README.
- `cifar10`, `imagenet` (300 epochs): as in `configs/byol.py`. Not run by us.

Finished runs are not repeated: the same command continues an interrupted sweep.
"""

from __future__ import annotations

import copy
import itertools

from ml_collections import ConfigDict

from configs import byol, common, parsing

# (predictor, target network, beta) -> the paper's top-1, %
_PUBLISHED = {
    (True, True, 0): 72.5,
    (True, True, 1): 70.9,
    (False, True, 1): 70.7,
    (False, False, 1): 69.4,
    (True, False, 1): 69.1,
    (True, False, 0): 0.3,
    (False, True, 0): 0.2,
    (False, False, 0): 0.1,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The config of `preset,field=value,...`."""
    return parsing.parse(arg, demo, cifar10, imagenet)


def demo() -> ConfigDict:
    """Embedded digits: BYOL's demo with ResNet-18, which begins as the identity, for 16 epochs."""
    base = byol.get_config("demo")
    base.epochs = 16.0
    base.encoder.depth = 18
    base.encoder.zero_init_gamma = True
    base.monitor.reference = ""  # the reference curve has another length
    base.monitor.update(knn_every_steps=0, plots_every_steps=0)
    return _variants(base, "the embedded digits")


def cifar10() -> ConfigDict:
    """CIFAR-10 with the BYOL preset's recipe."""
    return _variants(byol.get_config("cifar10"), "CIFAR-10")


def imagenet() -> ConfigDict:
    """ImageNet, 300 epochs, as in the paper."""
    return _variants(byol.get_config("imagenet,epochs=300"), "ImageNet")


def _variants(base: ConfigDict, data: str) -> ConfigDict:
    variants, published = {}, {}
    for predictor, target, beta in itertools.product((True, False), (True, False), (0, 1)):
        name = f"{_word('predictor', predictor)}_{_word('target', target)}_beta_{beta}"
        config = copy.deepcopy(base)
        config.use_predictor = predictor
        config.use_target_network = target
        config.negatives_weight = float(beta)
        config.temperature = 0.3 if target else 0.1
        variants[name] = config
        published[name] = _PUBLISHED[predictor, target, beta]
    sweep = common.sweep(f"From BYOL to SimCLR on {data}", variants, seeds=(0,))
    sweep.columns = ("use_predictor", "use_target_network", "negatives_weight")
    sweep.metrics = ("linear_probe_top1", "knn_top1", "projection_std", "effective_rank")
    sweep.published = ConfigDict(published)
    sweep.published_title = "paper, ImageNet"
    return sweep


def _word(name: str, present: bool) -> str:
    return name if present else f"no_{name}"
