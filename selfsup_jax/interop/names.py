"""What the layers of a ResNet are called, here and in other projects.

Here a convolution is `stem`, `stage1_block1_conv1`, ... or `stage1_block1_shortcut`, and the batch
norm after it has the same name and `_bn`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from selfsup_jax.models.resnet import STAGES

_OURS = re.compile(r"stage(\d)_block(\d+)_(?:conv(\d)|(shortcut))")
# Parts of a batch norm: here -> (collection, PyTorch's, TensorFlow's).
NORM = {
    "scale": ("params", "weight", "gamma"),
    "bias": ("params", "bias", "beta"),
    "mean": ("batch_stats", "running_mean", "moving_mean"),
    "var": ("batch_stats", "running_var", "moving_variance"),
}


def convolutions(encoder: Mapping[str, Any]) -> Iterator[str]:
    """Our names in the order of TensorFlow's code: a block's shortcut comes first."""
    blocks, bottleneck = STAGES[encoder["depth"]]
    yield "stem"
    for stage, count in enumerate(blocks, start=1):
        for block in range(1, count + 1):
            name = f"stage{stage}_block{block}"
            if block == 1 and (bottleneck or stage > 1 or encoder["stage1_projection"]):
                yield f"{name}_shortcut"
            yield from (f"{name}_conv{i}" for i in range(1, 4 if bottleneck else 3))


def depth_of(counts: Mapping[int, int], bottleneck: bool) -> int:
    """The depth with so many blocks in stages 1 to 4.

    Raises:
        ValueError: no ResNet has these; the message names those that are known.
    """
    blocks = tuple(counts.get(stage, 0) for stage in range(1, 5))
    for depth, known in STAGES.items():
        if known == (blocks, bottleneck):
            return depth
    kind = "bottlenecks" if bottleneck else "basic blocks"
    depths = ", ".join(map(str, STAGES))
    raise ValueError(f"has {blocks} {kind}, which is none of ResNet-{depths}")


def of_torch(conv: str) -> tuple[str, str]:
    """(Convolution, batch norm) in torchvision and timm: `layer1.0.conv1`, `layer1.0.bn1`."""
    if conv == "stem":
        return "conv1", "bn1"
    stage, block, index = _parts(conv)
    root = f"layer{stage}.{block - 1}"
    if index == 0:
        return f"{root}.downsample.0", f"{root}.downsample.1"
    return f"{root}.conv{index}", f"{root}.bn{index}"


def of_detectron2(conv: str) -> tuple[str, str]:
    """As `of_torch`, in Detectron2: `res2.0.conv1`, `res2.0.conv1.norm`."""
    if conv == "stem":
        return "stem.conv1", "stem.conv1.norm"
    stage, block, index = _parts(conv)
    name = f"res{stage + 1}.{block - 1}.{f'conv{index}' if index else 'shortcut'}"
    return name, f"{name}.norm"


def of_haiku(conv: str, root: str) -> tuple[str, str]:
    """As `of_torch`, in the BYOL authors' Haiku module `root`, such as `res_net50`."""
    if conv == "stem":
        return f"{root}/~/initial_conv", f"{root}/~/initial_batchnorm"
    stage, block, index = _parts(conv)
    root = f"{root}/~/block_group_{stage - 1}/~/block_{block - 1}/~"
    if index == 0:
        return f"{root}/shortcut_conv", f"{root}/shortcut_batchnorm"
    return f"{root}/conv_{index - 1}", f"{root}/batchnorm_{index - 1}"


def of_simclr_tf1(index: int) -> tuple[str, str]:
    """The n-th of `convolutions` in SimCLR's code for TensorFlow 1."""
    number = f"_{index}" if index else ""
    return f"base_model/conv2d{number}", f"base_model/batch_normalization{number}"


def of_simclr_tf2(conv: str, bottleneck: bool) -> tuple[str, str]:
    """As `of_torch`, in SimCLR's code for TensorFlow 2, below `resnet_model/`."""
    if conv == "stem":
        root = "initial_conv_relu_max_pool"
        return f"{root}/0/conv2d", f"{root}/2/bn"
    stage, block, index = _parts(conv)
    root = f"block_groups/{stage - 1}/layers/{block - 1}"
    if index == 0:
        root += "/projection_layers" if bottleneck else "/shortcut_layers"
        return f"{root}/0/conv2d", f"{root}/1/bn"
    # Between two convolutions of a bottleneck there are a norm and a dropping layer.
    root += "/conv_relu_dropblock_layers" if bottleneck else "/conv2d_bn_layers"
    at = (index - 1) * (3 if bottleneck else 2)
    return f"{root}/{at}/conv2d", f"{root}/{at + 1}/bn"


def norm_in_torch(norm: str) -> dict[str, str]:
    """Part of a batch norm here -> its tensor in PyTorch, of the module `norm`."""
    return {part: f"{norm}.{theirs}" for part, (_, theirs, _) in NORM.items()}


def norm_in_tensorflow(norm: str) -> dict[str, str]:
    """As `norm_in_torch`, in TensorFlow."""
    return {part: f"{norm}/{theirs}" for part, (_, _, theirs) in NORM.items()}


def norm_in_haiku(norm: str, network: str) -> dict[str, str]:
    """As `norm_in_torch`, in a checkpoint of BYOL's authors: of its parameters and its state."""
    params, state = f"{network}_params:{norm}", f"{network}_state:{norm}/~"
    own = {"scale": f"{params}:scale", "bias": f"{params}:offset"}
    return own | {"mean": f"{state}/mean_ema:average", "var": f"{state}/var_ema:average"}


def counts_in(names: Collection[str], pattern: str) -> dict[int, int]:
    """Stage -> number of blocks, from a pattern with the stage's and the block's number."""
    blocks_of: dict[int, set[int]] = {}
    for name in names:
        if match := re.search(pattern, name):
            blocks_of.setdefault(int(match[1]), set()).add(int(match[2]))
    return {stage: len(blocks) for stage, blocks in blocks_of.items()}


def _parts(conv: str) -> tuple[int, int, int]:
    """(Stage, block, number of the convolution or 0 for the shortcut), from 1."""
    match = _OURS.fullmatch(conv)
    assert match, conv
    return int(match[1]), int(match[2]), int(match[3] or 0)
