"""Imported encoders beside the framework that they come from: the largest difference of features.

    python -m benchmarks.interop_parity [--depths 18 34 50 101] [--vits vit_small_patch16_224] \
        [--size 224] [--images 2]

Needs PyTorch, torchvision and timm, which nothing else here needs. The weights are drawn as each
library draws them; the running statistics and the norms' parameters are drawn too, so that an error
in any of them is seen. The difference is relative to the largest feature, in float32.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import jax
import numpy as np
import safetensors.torch
import timm
import torch
import torchvision

from selfsup_jax.evaluation import encoder
from selfsup_jax.interop import importing


def stir(model: torch.nn.Module, structured: bool) -> torch.nn.Module:
    """Norms and statistics that are not those of a new network."""
    with torch.no_grad():
        for name, x in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith("running_mean"):
                x.normal_(0, 0.3)
            elif name.endswith("running_var"):
                x.uniform_(0.5, 1.5)
            elif x.ndim == 1:
                x.add_(0.2 * torch.randn_like(x))
            elif structured and x.ndim == 4:  # no two of its rows, columns and channels are alike
                for axis, n in enumerate(x.shape):
                    shape = [1] * 4
                    shape[axis] = n
                    x.mul_(torch.linspace(0.5, 1.5, n).reshape(shape))
    return model.eval()


def features(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """`[N, D]` of images `[N, H, W, 3]`, before the classifier."""
    model.fc = model.head = torch.nn.Identity()  # a ResNet's, a ViT's
    with torch.no_grad():
        return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--depths", type=int, nargs="+", default=[18, 34, 50, 101])
    parser.add_argument("--vits", nargs="*", default=["vit_small_patch16_224"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=2)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(args.images, args.size, args.size, 3)).astype(np.float32)
    print(f"{'model':<30}{'weights':<12}{'largest difference':>20}")
    resnets = [(f"resnet{d}", library) for d in args.depths for library in ("torchvision", "timm")]
    for name, library in [*resnets, *((name, "timm") for name in args.vits)]:
        for structured in (False, True):
            torch.manual_seed(0)
            made = getattr(torchvision.models, name)() if library == "torchvision" else None
            model = stir(made or timm.create_model(name), structured)
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "model.pth")
                if library == "timm":
                    path = os.path.join(folder, "model.safetensors")
                    safetensors.torch.save_file(model.state_dict(), path)
                else:
                    torch.save(model.state_dict(), path)
                frozen, _ = importing.read(path)
            ours = jax.jit(encoder.module(frozen.config).apply)(frozen.variables, images)
            theirs = features(model, images)
            error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
            kind = "structured" if structured else "random"
            print(f"{library + ' ' + name:<30}{kind:<12}{error:>20.1e}", flush=True)


if __name__ == "__main__":
    main()
