"""Shared by both frameworks: arguments, cases, the minimum of work, timing, JSON lines."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

WARMUPS = 5
CLASSES = 1000
# Hidden and output size of each method's heads: the papers' for ImageNet, lightly's for CIFAR-10.
HEADS = {"byol": (4096, 256), "moco": (2048, 128), "simclr": (2048, 128)}
SMALL_HEADS = {"byol": (1024, 256), "moco": (512, 128), "simclr": (512, 128)}
BLOCKS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Case(NamedTuple):
    """One row of the table: a method at a batch size (images per step, with two views each)."""

    method: str
    batch: int
    depth: int
    px: int
    width: float = 1.0

    @property
    def stem(self) -> str:
        """`cifar` for small images."""
        return "cifar" if self.px <= 64 else "imagenet"

    @property
    def heads(self) -> tuple[int, int]:
        """Hidden and output size of the heads."""
        return (SMALL_HEADS if self.stem == "cifar" else HEADS)[self.method]

    @property
    def queue(self) -> int:
        """The number of MoCo's keys."""
        return 4096 if self.stem == "cifar" else 65536

    def work(self) -> tuple[float, float]:
        """(FLOPs of convolutions and heads, two per multiply-add; bytes of bf16 activations).

        The weight gradient and the input gradient of a convolution each cost as much as its
        forward pass; the first layer needs no input gradient. The bytes assume separate convolution
        and normalisation kernels, with I input and O output elements per convolution: forward
        I + 4 O (convolve, statistics, normalise), backward 2 I + 7 O.
        """
        layers = list(convolutions(self.depth, self.px, self.stem, self.width))
        features = round((2048 if BLOCKS[self.depth][1] else 512) * self.width)
        hidden, output = self.heads
        macs = sum(layer[2] for layer in layers) + features * hidden + hidden * output
        reads, writes = sum(layer[0] for layer in layers), sum(layer[1] for layer in layers)
        online, target = {"byol": (2, 2), "moco": (1, 1), "simclr": (2, 0)}[self.method]
        predictor = 2 * output * hidden if self.method == "byol" else 0
        flops = 2 * (online * (3 * (macs + predictor) - layers[0][2]) + target * macs)
        moved = 2 * (online * (3 * reads + 11 * writes) + target * (reads + 4 * writes))
        return float(self.batch * flops), float(self.batch * moved)


def convolutions(
    depth: int, px: int, stem: str, width: float = 1.0
) -> Iterator[tuple[int, int, int]]:
    """Yields (inputs, outputs, multiply-adds) per image of each convolution; stride in the 3x3."""
    counts, bottleneck = BLOCKS[depth]

    def conv(
        side: int, inputs: int, outputs: int, kernel: int, stride: int
    ) -> tuple[int, int, int]:
        out = -(-side // stride)
        return (
            side * side * inputs,
            out * out * outputs,
            out * out * outputs * inputs * kernel * kernel,
        )

    imagenet, narrowest = stem == "imagenet", round(64 * width)
    yield conv(px, 3, narrowest, 7 if imagenet else 3, 2 if imagenet else 1)
    side, channels = (-(-px // 4) if imagenet else px), narrowest
    for stage, count in enumerate(counts):
        inner = narrowest * 2**stage
        out = 4 * inner if bottleneck else inner
        for index in range(count):
            stride = 2 if stage and not index else 1
            if channels != out or stride > 1:
                yield conv(side, channels, out, 1, stride)
            if bottleneck:
                yield conv(side, channels, inner, 1, 1)
                yield conv(side, inner, inner, 3, stride)
                side = -(-side // stride)
                yield conv(side, inner, out, 1, 1)
            else:
                yield conv(side, channels, inner, 3, stride)
                side = -(-side // stride)
                yield conv(side, inner, inner, 3, 1)
            channels = out


def parser() -> argparse.ArgumentParser:
    """The command-line arguments of both frameworks."""
    p = argparse.ArgumentParser(add_help=False)
    p.add_argument("--cases", nargs="+", default=["byol:64", "byol:128"], metavar="METHOD:BATCH")
    p.add_argument("--depth", type=int, default=50, choices=sorted(BLOCKS))
    p.add_argument("--px", type=int, default=224, help="up to 64 the net has the 3x3 stem of CIFAR")
    p.add_argument("--width", type=float, default=1.0, help="of the encoder: 0.25 for a quarter")
    p.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    p.add_argument("--repeats", type=int, default=20)
    p.add_argument("--ours", nargs="+", default=["plain", "full"], choices=("plain", "full"))
    p.add_argument("--torch", nargs="+", default=["eager", "compile"], choices=("eager", "compile"))
    p.add_argument(
        "--cache",
        default=os.path.expanduser("~/gpu-kit/xla-cache"),
        help="of compiled JAX programs; '' for none",
    )
    p.add_argument(
        "--until", type=float, default=float("inf"), help="Unix time after which no row is begun"
    )
    p.add_argument("--rows", default="", help="a file that the rows are appended to")
    return p


def cases(args: argparse.Namespace) -> list[Case]:
    """The cases to measure."""
    pairs = [text.split(":") for text in args.cases]
    return [Case(method, int(batch), args.depth, args.px, args.width) for method, batch in pairs]


def emit(args: argparse.Namespace, row: dict[str, Any]) -> None:
    """Prints a row as a JSON line, and appends it to the file of rows."""
    row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(row), flush=True)
    if args.rows:
        with open(args.rows, "a") as f:
            f.write(json.dumps(row) + "\n")


def measure(step: Callable[[int], Any], sync: Callable[[], None], repeats: int) -> dict[str, float]:
    """Times synchronised calls of `step(i)` (median, minimum), then calls with one final wait."""
    for i in range(WARMUPS):
        step(i)
    sync()
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        step(i)
        sync()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()
    for i in range(repeats):
        step(i)
    sync()
    in_a_row = (time.perf_counter() - start) / repeats
    return {
        "step_ms": 1e3 * statistics.median(times),
        "min_ms": 1e3 * min(times),
        "in_a_row_ms": 1e3 * in_a_row,
    }


def run_cases(
    args: argparse.Namespace,
    framework: str,
    variants: list[str],
    one: Callable[[Case, str], dict[str, Any]],
    ceiling: dict[str, float],
) -> None:
    """Emits a row per case and variant, also for failures (`oom`, `error`) and skipped cases."""
    emit(args, {"framework": framework} | ceiling)
    for case in cases(args):
        flops, moved = case.work()
        floor = max(flops / ceiling["matmul_tflops"] / 1e12, moved / ceiling["copy_tb_s"] / 1e12)
        for variant in variants:
            model = f"resnet{case.depth}" + (f"x{case.width:g}" if case.width != 1 else "")
            row = {
                "framework": framework,
                "variant": variant,
                "method": case.method,
                "model": model,
                "px": case.px,
            }
            row |= {"batch": case.batch, "dtype": args.dtype, "aug": variant == "full"}
            if time.time() > args.until:
                emit(args, row | {"skipped": "out of time"})
                continue
            try:
                row |= one(case, variant)
                seconds = row["step_ms"] / 1e3
                row |= {
                    "images_per_s": case.batch / seconds,
                    "tflop": flops / 1e12,
                    "activation_gb": moved / 1e9,
                }
                row |= {"mfu": flops / seconds / ceiling["matmul_tflops"] / 1e12}
                row |= {"floor_ms": 1e3 * floor, "over_floor": seconds / floor}
            except Exception as e:  # continue with the next row
                text = f"{type(e).__name__}: {e}"
                memory = ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory")
                row |= {
                    "oom": any(word in text for word in memory),
                    "error": text.splitlines()[0][:300],
                }
            gc.collect()
            emit(args, row)
