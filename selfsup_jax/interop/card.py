"""The model card of an export: what the encoder is, how to load it, what it was measured to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfsup_jax import __version__
from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.interop import vit_timm
from selfsup_jax.models import encoders
from selfsup_jax.models.resnet import STAGES
from selfsup_jax.viz.titles import measures

# How an export is loaded: Python, with the depth and the blocks of a stage.
_LOADING = {
    "npz": """import selfsup_jax
encoder = selfsup_jax.Encoder.load("THIS_FOLDER")
features = encoder.transform(["image.jpg"])  # [N, D]""",
    "safetensors": """import selfsup_jax  # the arrays alone: safetensors.numpy.load_file
encoder = selfsup_jax.Encoder.load("{file}")
features = encoder.transform(["image.jpg"])  # [N, D]""",
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("{file}")
features, maps = session.run(None, {{"images": images}})  # images [N, 3, H, W] float32""",
    "torchvision": """import torch, torchvision
model = torchvision.models.ResNet(torchvision.models.resnet.{block}, {blocks})
model.fc = torch.nn.Identity(){stem}
model.load_state_dict(torch.load("{file}", weights_only=True), strict=True)
features = model.eval()(images)  # images [N, 3, H, W] float32; features [N, D]""",
    "timm": """import timm
overlay = {{"file": "{file}", "num_classes": 0}}
model = timm.create_model(
    "resnet{depth}", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
){stem}
features = model.eval()(images)  # images [N, 3, H, W] float32; features [N, D]""",
    "timm_vit": """import timm
overlay = {{"file": "{file}", "num_classes": 0}}
model = timm.create_model(
    {call},
    pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay,
)
features = model.eval()(images)  # images [N, 3, H, W] float32; features [N, D]""",
    "detectron2": """# tools/train_net.py of Detectron2, see docs/detection.md
MODEL.WEIGHTS {file} INPUT.FORMAT RGB MODEL.RESNETS.STRIDE_IN_1X1 False
MODEL.PIXEL_MEAN {pixel_mean} MODEL.PIXEL_STD {pixel_std}""",
}
_CIFAR_STEM = {
    "torchvision": """
model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
model.maxpool = torch.nn.Identity()""",
    "timm": """
# its conv1 must be Conv2d(3, 64, 3, 1, 1, bias=False) and its maxpool Identity() before that""",
}


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """How an image becomes the input of the encoder: in words, and in numbers."""
    data, views = config["data"], config["views"]
    size, resize, how = (data[k] for k in ("image_size", "test_resize", "resize_method"))
    return {
        "image_size": size,
        "test_resize": resize,
        "resize_method": how,
        "mean": [float(x) for x in views["mean"]],
        "std": [float(x) for x in views["std"]],
        "channels": "RGB",
        "steps": [
            f"resize the shorter side to {resize} px ({how}, with antialiasing)",
            f"cut out the centre, {size} x {size} px",
            "divide by 255, subtract the mean, divide by the standard deviation, per channel",
        ],
    }


def text(
    frozen: FrozenEncoder, to: str, file: str, results: Mapping[str, Any], measured: str
) -> str:
    """The card, in Markdown with the header that the Hugging Face hub reads."""
    config = frozen.config
    fields, images = config["encoder"], preprocessing(config)
    architecture = encoders.used(fields).items()
    library = {"timm": "timm", "onnx": "onnx"}.get(to, "")
    header = ["tags:", "- image-feature-extraction", "- self-supervised"]
    header += [f"library_name: {library}"] if library else []
    method = f", {config['method']}" if config.get("method") else ""
    data = config["data"].get("name") or "unknown"
    started = config.get("data_info", {}).get("init_from")
    lines = ["---", *header, "---", "", f"# {encoders.describe(fields)}{method}", ""]
    lines += [
        f"- from: {frozen.described}; {frozen.step:,} steps",
        *([f"- started from: {started['origin']}"] if started else []),
        f"- training data: {data}",
        *_recipe(config),
        f"- architecture: {', '.join(f'{k} {v}' for k, v in sorted(architecture))}",
        f"- written by selfsup-jax {__version__}, `--to={to}`",
        *([f"- {measured}"] if measured else []),
        "",
        "## Images",
        "",
        *(f"{i}. {step}" for i, step in enumerate(images["steps"], start=1)),
        "",
        f"Mean {images['mean']}, standard deviation {images['std']}, channels in the order RGB.",
        "The same in `preprocessing.json`.",
        "",
        "## Loading",
        "",
        "```" if to == "detectron2" else "```python",
        _loading(to, file, frozen),
        "```",
    ]
    scores = measures(results)
    if scores:
        lines += ["", "## Results", "", "| measure | |", "|---|---|"]
        lines += [f"| {name} | {100 * results[name]:.2f} % |" for name in scores]
    return "\n".join(lines) + "\n"


def _recipe(config: Mapping[str, Any]) -> list[str]:
    """How it was trained, if the config is a run's."""
    if "optimizer" not in config or "batch_size" not in config:
        return []
    fields = {k: v for k, v in config["optimizer"].items() if k in ("name", "learning_rate")}
    fields |= {"batch size": config["batch_size"], "seed": config.get("seed", 0)}
    fields |= {f"views.{k}": config["views"]["global"][k] for k in ("size", "area")}
    return [f"- recipe: {', '.join(f'{k} {v}' for k, v in fields.items())}"]


def _loading(to: str, file: str, frozen: FrozenEncoder) -> str:
    config, fields = frozen.config, frozen.config["encoder"]
    if encoders.is_vit(fields):
        call = vit_timm.call(frozen) if to == "timm" else ""
        return _LOADING["timm_vit" if call else to].format(file=file, call=call)
    blocks, bottleneck = STAGES[fields["depth"]]
    scaled = {k: [round(255 * x, 3) for x in config["views"][k]] for k in ("mean", "std")}
    return _LOADING[to].format(
        file=file,
        depth=fields["depth"],
        blocks=list(blocks),
        block="Bottleneck" if bottleneck else "BasicBlock",
        stem=_CIFAR_STEM.get(to, "") if fields["stem"] == "cifar" else "",
        pixel_mean=str(scaled["mean"]).replace(" ", ""),
        pixel_std=str(scaled["std"]).replace(" ", ""),
    )
