"""The same training steps in tuned PyTorch.

Channels last, bf16 autocast, cuDNN's benchmark mode, fused SGD, EMA by one foreach call; with
(`compile`) and without (`eager`) torch.compile of the networks.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50

from benchmarks.gpu import step_shared
from benchmarks.gpu.step_shared import MEAN, STD, Case

RESNETS = {18: resnet18, 34: resnet34, 50: resnet50}


def head(case: Case, inputs: int) -> nn.Module:
    """The projector or predictor of a method, as in its own code."""
    hidden, output = case.heads
    if case.method == "byol":
        norm, last = [nn.BatchNorm1d(hidden)], [nn.Linear(hidden, output, bias=False)]
    elif case.method == "moco":
        norm, last = [], [nn.Linear(hidden, output)]
    else:
        norm = [nn.BatchNorm1d(hidden)]
        last = [nn.Linear(hidden, output, bias=False), nn.BatchNorm1d(output)]
    return nn.Sequential(nn.Linear(inputs, hidden), *norm, nn.ReLU(inplace=True), *last)


def network(case: Case) -> nn.Sequential:
    """Encoder and projector."""
    encoder, narrowest = RESNETS[case.depth](), round(64 * case.width)
    if case.width != 1:
        encoder.inplanes = narrowest
        encoder.conv1 = nn.Conv2d(3, narrowest, 7, stride=2, padding=3, bias=False)
        encoder.bn1 = nn.BatchNorm2d(narrowest)
        for stage in range(4):
            name = f"layer{stage + 1}"
            block, count = type(getattr(encoder, name)[0]), len(getattr(encoder, name))
            made = encoder._make_layer(block, narrowest * 2**stage, count, 2 if stage else 1)
            setattr(encoder, name, made)
    if case.stem == "cifar":
        encoder.conv1 = nn.Conv2d(3, narrowest, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    features, encoder.fc = round(encoder.fc.in_features * case.width), nn.Identity()
    return nn.Sequential(encoder, head(case, features))


def cosine_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """BYOL's loss for one direction."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=1)).mean()


class Step:
    """A full training step of a method; `step(i)` takes batch i."""

    def __init__(self, args: argparse.Namespace, case: Case, compiled: bool, device: torch.device):
        torch.manual_seed(0)
        self.case, self.device = case, device
        self.autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"
        )
        self.online = network(case).to(device, memory_format=torch.channels_last)
        self.target = (
            None if case.method == "simclr" else copy.deepcopy(self.online).requires_grad_(False)
        )
        self.predictor = (
            head(case, case.heads[1]).to(device) if case.method == "byol" else nn.Identity()
        )
        self.averaged = (
            list(self.online.parameters()),
            list(self.target.parameters()) if self.target else [],
        )
        trained = [*self.online.parameters(), *self.predictor.parameters()]
        fast = {"fused": True} if device.type == "cuda" else {"foreach": True}
        self.optimizer = torch.optim.SGD(trained, lr=0.03, momentum=0.9, weight_decay=1e-4, **fast)
        self.tau = 0.996 if case.method == "byol" else 0.999
        self.queue = F.normalize(torch.randn(case.queue, case.heads[1], device=device), dim=1)
        self.place = 0
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
        shape = (2, 2, case.batch, case.px, case.px, 3)  # batches, views
        self.batches = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.apply_online, self.apply_target = self.online, self.target
        if compiled:
            self.apply_online = torch.compile(self.online)
            self.apply_target = torch.compile(self.target) if self.target else None

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """uint8 `[B, H, W, 3]` to normalised float32, channels last."""
        return (x.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    @torch.no_grad()
    def average(self) -> None:
        """EMA update of the target network."""
        online, target = self.averaged
        torch._foreach_lerp_(target, online, 1 - self.tau)

    def byol(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        """BYOL's loss."""
        with self.autocast:
            p1, p2 = (self.predictor(self.apply_online(x)) for x in (x1, x2))
            with torch.no_grad():
                z1, z2 = (self.apply_target(x) for x in (x1, x2))
        return cosine_loss(p1, z2) + cosine_loss(p2, z1)

    def moco(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        """MoCo's loss."""
        self.average()
        with self.autocast:
            q = self.apply_online(x1)
            with torch.no_grad():
                k = self.apply_target(x2)
        q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.T], dim=1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))
        self.keys = k
        return loss

    def simclr(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        """SimCLR's loss."""
        with self.autocast:
            z = self.apply_online(torch.cat([x1, x2]))
        z = F.normalize(z.float(), dim=1)
        similarity = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
        other = torch.arange(len(z), device=z.device).roll(len(x1))
        return 2 * F.cross_entropy(similarity, other)

    def __call__(self, i: int) -> None:
        """One update on batch i."""
        self.update(*(self.images(view) for view in self.batches[i % 2]))

    def update(self, x1: torch.Tensor, x2: torch.Tensor) -> None:
        """One update on two views, normalised float32 `[B, 3, H, W]`."""
        loss = getattr(self, self.case.method)(x1, x2)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.case.method == "byol":
            self.average()
        if self.case.method == "moco":
            # After the backward pass, which reads the old queue.
            self.queue[self.place : self.place + len(self.keys)] = self.keys
            self.place = (self.place + len(self.keys)) % self.case.queue
        self.loss = loss.detach()


def ceiling(device: torch.device, sync: Callable[[], None]) -> dict[str, Any]:
    """Rates of a large bf16 matmul and a large copy (bytes read plus written), on random data."""
    cuda = device.type == "cuda"
    n = 8192 if cuda else 512
    x = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    big = torch.randn(2**30 if cuda else 2**22, device=device, dtype=torch.bfloat16)
    into = torch.empty_like(big)

    def timed(fn: Callable[[], Any]) -> float:
        return step_shared.measure(lambda _: fn(), sync, 10)["in_a_row_ms"] / 1e3

    rates = {"matmul_tflops": 2 * n**3 / timed(lambda: x @ x) / 1e12}
    rates["copy_tb_s"] = 2 * big.nbytes / timed(lambda: into.copy_(big)) / 1e12
    return rates | {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "version": torch.__version__,
    }


def main(args: argparse.Namespace) -> None:
    """Times all cases."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cudnn.benchmark = True

    def sync() -> None:
        if cuda:
            torch.cuda.synchronize()

    def one(case: Case, variant: str) -> dict[str, Any]:
        torch.compiler.reset()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = Step(args, case, variant == "compile", device)
        sync()
        start = time.perf_counter()
        step(0)
        sync()
        row: dict[str, Any] = {"compile_s": time.perf_counter() - start}
        row |= step_shared.measure(step, sync, args.repeats)
        if cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return row | {"loss": float(step.loss)}

    step_shared.run_cases(args, "torch", args.torch, one, ceiling(device, sync))
