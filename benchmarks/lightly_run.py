"""Pretrains BYOL on CIFAR-10 as lightly's benchmark does, with lightly's own parts, in PyTorch.

    python -m benchmarks.lightly_run --data=cifar10.npz --width=0.25 --epochs=6 --json=lightly.json

It needs PyTorch, torchvision and lightly, and no JAX. Beside it, the same recipe by us:

    python run_experiment.py --config=configs/byol.py:cifar10 --config.data.name=arrays \
        --config.data.dir=cifar10.npz --config.encoder.width=0.25 --config.epochs=6 --workdir=DIR

The network, heads, loss, transforms and the kNN are lightly's; the recipe (learning rate, momentum,
decay, tau, cosine schedule by epochs) is that of its `cifar10_benchmark.py` for a batch of 128.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from lightly import loss, models, transforms
from lightly.models import utils
from lightly.models.modules import heads
from lightly.transforms.utils import IMAGENET_NORMALIZE
from lightly.utils.benchmarking.knn import knn_predict
from PIL import Image
from torch import nn
from torchvision import transforms as T


class Views(torch.utils.data.Dataset):
    """Images through a transform; it gives one view, or a list of them."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Any]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.transform(Image.fromarray(self.images[i]))


class BYOL(nn.Module):
    """Encoder, projector and predictor; the target network is a copy of the first two."""

    def __init__(self, width: float):
        super().__init__()
        resnet = models.ResNetGenerator("resnet-18", width=width)
        layers = [*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.encoder = nn.Sequential(*layers)
        self.projector = heads.BYOLProjectionHead(resnet.linear.in_features, 1024, 256)
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.target_projector = copy.deepcopy(self.projector)

    def averaged(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(online, target) of what the target network averages."""
        yield self.encoder, self.target_encoder
        yield self.projector, self.target_projector

    def forward(self, view_1: torch.Tensor, view_2: torch.Tensor) -> torch.Tensor:
        """The loss."""
        criterion = loss.NegativeCosineSimilarity()
        predictions, targets = [], []
        for view in (view_1, view_2):
            predictions.append(self.predictor(self.projector(self.encoder(view))))
            with torch.no_grad():
                targets.append(self.target_projector(self.target_encoder(view)))
        return 0.5 * (criterion(predictions[0], targets[1]) + criterion(predictions[1], targets[0]))


def knn(encoder: nn.Module, bank: Any, bank_labels: Any, test: Any, test_labels: Any) -> float:
    """Share of the test images that lightly's kNN (k 200, temperature 0.1) names rightly."""

    def features(images: np.ndarray) -> torch.Tensor:
        normalized = T.Compose([T.ToTensor(), T.Normalize(**IMAGENET_NORMALIZE)])
        loader = torch.utils.data.DataLoader(Views(images, normalized), 512)
        rows = torch.cat([encoder(x.contiguous(memory_format=torch.channels_last)) for x in loader])
        return nn.functional.normalize(rows, dim=1)

    encoder.eval()
    with torch.no_grad():
        rows, labels = features(bank).T.contiguous(), torch.as_tensor(bank_labels).long()
        answers = [knn_predict(x, rows, labels, 10, 200, 0.1) for x in features(test).split(500)]
    encoder.train()
    return float((torch.cat(answers)[:, 0].numpy() == test_labels).mean())


def main() -> None:
    """Trains, and prints the loss and kNN after each epoch."""
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--data", required=True, help="CIFAR-10 as .npz, from selfsup_jax.data.pack")
    p.add_argument("--width", type=float, default=1.0, help="of ResNet-18's layers")
    p.add_argument("--epochs", type=int, default=200)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2, help="processes of the loader")
    p.add_argument("--json", help="write the epochs' numbers here")
    args = p.parse_args()
    if not pathlib.Path(args.data).is_file():
        p.error(f"--data={args.data}: there is no such file")
    torch.manual_seed(args.seed)
    arrays = np.load(args.data)
    names = ("train_images", "train_labels", "test_images", "test_labels")
    data = [np.ascontiguousarray(arrays[name]) for name in names]

    view = {"input_size": 32, "gaussian_blur": 0.0}
    two_views = transforms.BYOLTransform(
        transforms.BYOLView1Transform(**view), transforms.BYOLView2Transform(**view)
    )
    loader = torch.utils.data.DataLoader(
        Views(data[0], two_views),
        args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
    )
    model = BYOL(args.width).to(memory_format=torch.channels_last)
    trained = [p for m in (model.encoder, model.projector, model.predictor) for p in m.parameters()]
    rate = 0.06 * args.batch / 128
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    rows, start = [], time.perf_counter()
    for epoch in range(1, args.epochs + 1):
        losses = []
        for views in loader:
            for online, target in model.averaged():
                utils.update_momentum(online, target, m=0.99)
            value = model(*(x.contiguous(memory_format=torch.channels_last) for x in views))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
        schedule.step()
        top1 = knn(model.encoder, *data)
        seconds = time.perf_counter() - start
        rows.append({"epoch": epoch, "loss": np.mean(losses), "knn_top1": top1, "seconds": seconds})
        print(" ".join(f"{name} {x:.6g}" for name, x in rows[-1].items()), flush=True)
        if args.json:
            with open(args.json, "w") as f:
                json.dump({"width": args.width, "seed": args.seed, "epochs": rows}, f, indent=1)


if __name__ == "__main__":
    main()
