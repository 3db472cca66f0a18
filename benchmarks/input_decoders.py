"""Measures JPEG decoders side by side: those that this Python has, on the same images, in turn.

python -m benchmarks.input_decoders --images=FOLDER

FOLDER has JPEGs. The numbers are CPU time an image in one thread, to pixels in RGB; `scaled`: to
at most 512 pixels where the image is larger. It needs NumPy only, so that it runs beside any
decoder's library: `PYTHON benchmarks/input_decoders.py --images=FOLDER`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Decoder = Callable[[bytes], Any]
LARGEST = 512


def decoders() -> dict[str, Decoder]:
    """Name -> function from a file's content to pixels."""
    named: dict[str, Decoder] = {}
    with contextlib.suppress(ImportError):
        import simplejpeg

        named["simplejpeg"] = simplejpeg.decode_jpeg
        named["simplejpeg, fast DCT and upsampling"] = lambda x: simplejpeg.decode_jpeg(
            x, fastdct=True, fastupsample=True
        )

        def scaled(x: bytes) -> Any:
            height, width, *_ = simplejpeg.decode_jpeg_header(x)
            eighths = min(8, max(8 * LARGEST // max(height, width), 1))
            low = [-(-side * eighths // 8) for side in (height, width)]
            return simplejpeg.decode_jpeg(x, min_height=low[0], min_width=low[1])

        named["simplejpeg, scaled"] = scaled
    with contextlib.suppress(ImportError):
        from PIL import Image

        named["Pillow"] = lambda x: np.asarray(Image.open(io.BytesIO(x)).convert("RGB"))
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        named["OpenCV"] = lambda x: cv2.imdecode(np.frombuffer(x, np.uint8), cv2.IMREAD_COLOR_RGB)
    with contextlib.suppress(ImportError):
        import tensorflow as tf

        named["tf.image"] = lambda x: tf.image.decode_jpeg(x, channels=3).numpy()
        named["tf.image, accurate DCT"] = lambda x: tf.image.decode_jpeg(
            x, channels=3, dct_method="INTEGER_ACCURATE"
        ).numpy()
    with contextlib.suppress(ImportError):
        import torch
        import torchvision

        torch.set_num_threads(1)
        mode = torchvision.io.ImageReadMode.RGB
        named["torchvision"] = lambda x: torchvision.io.decode_jpeg(
            torch.frombuffer(bytearray(x), dtype=torch.uint8), mode
        )
    return named


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", required=True, help="a folder with JPEGs")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    files = sorted(pathlib.Path(args.images).rglob("*.[jJ][pP]*[gG]"))[:200]
    encoded = [path.read_bytes() for path in files]
    taken: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, decode in decoders().items():
            start = time.process_time()
            for image in encoded:
                decode(image)
            used = 1e6 * (time.process_time() - start) / len(encoded)
            taken.setdefault(name, []).append(used)
    kilobytes = sum(map(len, encoded)) / len(encoded) / 1000
    print(f"{len(encoded)} JPEGs of {kilobytes:.0f} kB, medians of {args.rounds} rounds")
    for name, each in taken.items():
        print(f"  {name:40} {statistics.median(each):7.0f} us")


if __name__ == "__main__":
    main()
