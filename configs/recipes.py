"""What several recipes have in common, made of the sections in `common.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common

# What differs in a view where the authors' code has torchvision's augmentation.
TORCHVISION: dict[str, Any] = {"jitter_style": "torchvision", "blur_padding": "reflect"}


def torchvision_encoder(**changes) -> ConfigDict:
    """The encoder of the methods whose code has torchvision's ResNet."""
    fields = {
        "padding": "torch",
        "stage1_projection": False,
        "zero_init_basic": True,
        "kernel_init": "kaiming_fan_out",
        "bn_unbiased_average": True,
    }
    return common.encoder(**(fields | changes))


def with_torchvision_encoder(config: ConfigDict) -> ConfigDict:
    """A recipe with a ResNet whose weights torchvision, timm and Detectron2 can hold.

    The layers of the recipe's own encoder, but for what these libraries lack: TensorFlow's padding,
    and the projection in stage 1 of ResNet-18 and 34. See docs/weights.md.
    """
    config.encoder.update(padding="torch", stage1_projection=False)
    return config


def wide_head(size: int) -> ConfigDict:
    """Three layers of one size: Barlow Twins' projector, VICReg's expander."""
    return common.head(
        hidden_sizes=(size, size), output_size=size, linear_init="torch", hidden_bias=False
    )


def adamw(learning_rate: float = 1e-3, warmup_epochs: float = 10.0) -> ConfigDict:
    """AdamW for small batches, where LARS is slow: our choice, not from a paper."""
    return common.optimizer(
        name="adamw",
        learning_rate=learning_rate,
        scaling="none",
        weight_decay=1e-2,
        warmup_epochs=warmup_epochs,
    )


def byol_views(config: ConfigDict, area: tuple[float, ...] = (0.08, 1.0), **changes) -> ConfigDict:
    """BYOL's two views: the first is always blurred, the second rarely, and sometimes solarised."""
    view_1 = common.view(blur_prob=1.0, solarize_prob=0.0, **changes)
    view_2 = common.view(blur_prob=0.1, solarize_prob=0.2, **changes)
    return common.views(config, view_1, view_2, area=area)


def moco_views(config: ConfigDict) -> ConfigDict:
    """MoCo v2's two views, which are augmented alike; SimSiam has them too."""
    return common.views(
        config, common.view(saturation=0.4, blur_prob=0.5, **TORCHVISION), area=(0.2, 1.0)
    )


def local_views(
    config: ConfigDict, view: ConfigDict, *, count: int, size: int, area: tuple[float, ...]
) -> None:
    """Adds the group `local` to a config's views: multi-crop (SwAV, arXiv 2006.09882, section 3.2).

    Args:
        config: it has views.
        view: the augmentation of each.
        count: of the small crops of an image; 0: none.
        size: in pixels.
        area: as a share of the image's area.
    """
    group = ConfigDict({"view_1": view})
    group.update(count=count, size=size, area=area, aspect=(3 / 4, 4 / 3))
    config.views.local = group


def sections_of_views(config: ConfigDict) -> list[ConfigDict]:
    """The augmentation of each view that has its own section."""
    groups = [group for group in config.views.values() if isinstance(group, ConfigDict)]
    return [group[key] for group in groups for key in group if key.startswith("view_")]


def by_length(values: Mapping[int, tuple[float, ...]], epochs: float) -> tuple[float, ...]:
    """The values for so many epochs; for a length without values those of the next shorter one."""
    return values[max((length for length in values if length <= epochs), default=min(values))]
