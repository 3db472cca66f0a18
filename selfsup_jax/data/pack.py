"""Packs a small data set into arrays, for `config.data.name=arrays`: they need no TensorFlow.

    python -m selfsup_jax.data.pack --name=cifar10 --dir=TFDS_DIR --out=cifar10.npz
    python -m selfsup_jax.data.pack --name=folder --dir=IMAGES --size=96 --out=images/

`--out=FILE.npz` is one file; any other name is a folder of `.npy` files, which are memory-mapped.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys

import numpy as np

from selfsup_jax import paths
from selfsup_jax.command_line import Parser, returns_status
from selfsup_jax.data import announce, decode, intensity, pixels, resident, sources
from selfsup_jax.data.batches import Undecodable
from selfsup_jax.data.source import Source
from selfsup_jax.errors import UserError
from selfsup_jax.run import files
from selfsup_jax.run.progress import log


@returns_status
def main(argv: list[str] | None = None) -> None:
    """Runs the command in this file's docstring."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="a TFDS name, folder, or digits")
    parser.add_argument("--dir", default="", help="TFDS's data_dir, or the folder of images")
    parser.add_argument("--out", required=True, help="FILE.npz, or a new folder")
    parser.add_argument("--splits", default="", help="such as train,test; all by default")
    parser.add_argument("--size", type=int, default=0, help="resize and crop to squares, in pixels")
    parser.add_argument(
        "--intensity", default="auto", help="of more than 8 bits: as config.data.intensity"
    )
    parser.add_argument("--download", action="store_true", help="let TFDS prepare the data first")
    args = parser.parse_args(argv)
    args.out = args.out.rstrip(os.sep)
    if paths.is_bucket(args.out):
        hint = "must be a path; copy it to the bucket afterwards, with gcloud storage cp -r"
        raise UserError(f"--out={args.out}: {hint}")
    if os.path.exists(args.out):
        raise UserError(f"--out={args.out}: exists already")
    if args.size < 0:
        raise UserError(f"--size={args.size}: must not be negative; 0 keeps the images' size")
    if valid := intensity.rule(args.intensity):
        raise UserError(f"--intensity={args.intensity!r}: {valid}")
    names = sources.split_names(args.name, args.dir, args.download)
    chosen = args.splits.split(",") if args.splits else names
    if not set(chosen) <= set(names):  # nor slices: an array's name could not be a split's
        raise UserError(f"--splits={args.splits}: must be some of {','.join(names)}")
    packed: dict[str, np.ndarray] = {}
    for split in chosen:
        source = sources.load(args.name, args.dir, split, "splits", cache_gib=np.inf)
        if args.intensity == "auto":  # one range for all splits
            args.intensity = intensity.of_data(source) or "auto"
            if args.intensity != "auto":
                log(announce.of_range(source.name, args.intensity))
        if source.left_out:
            announce.once(args.dir, f"{args.dir}: not taken: {source.left_out}")
        source = dataclasses.replace(
            source, reading=pixels.Reading(args.intensity, args.name == "folder")
        )
        packed |= arrays_of_split(split, decode.into_array(source), args.size)
    with files.writing_to(args.out):
        write(args.out, packed)
    for name, array in packed.items():
        log(f"{name}: {array.dtype} {list(array.shape)}")
    log(f"wrote {args.out}; use --config.data.name=arrays --config.data.dir={args.out}")


def arrays_of_split(split: str, source: Source, size: int) -> dict[str, np.ndarray]:
    """`{split}_images` and, with labels, `{split}_labels` and `class_names`.

    Args:
        split: its name in the arrays.
        source: the split, in one array.
        size: the images are resized and cropped to squares of this size; 0: they stay as they are.

    Raises:
        UserError: the images differ in size and `size` is 0, or none can be decoded.
    """
    kept = np.setdiff1d(np.arange(source.num_examples), source.broken)
    for i in source.broken:
        log(f"cannot be decoded, left out: {source.describe(i)}")
    if not len(kept):
        raise UserError(f"{source.name}: no image can be decoded")
    if size:
        batches = resident.eval_batches(
            source,
            resize=size,
            size=size,
            method="bicubic",
            batch_size=256,
            limit=source.num_examples,
            undecodable=Undecodable(source.num_examples, limit=1.0),
        )
        images = np.concatenate([batch["image"] for batch in batches])
    else:
        sizes = set() if source.sizes is None else set(map(tuple, source.sizes[kept].tolist()))
        if len(sizes) > 1:
            raise UserError(f"{source.name}: its images differ in size; give --size, such as 96")
        height, width = sizes.pop() if sizes else source.images.shape[1:3]
        images = source.images[kept, :height, :width]
    packed = {f"{split}_images": images}
    if source.labels is not None and source.class_names:
        packed[f"{split}_labels"] = source.labels[kept]
        packed["class_names"] = np.asarray(source.class_names)
    return packed


def write(path: str, packed: dict[str, np.ndarray]) -> None:
    """Writes a `.npz` file, or a folder of `.npy` files; a reader never sees a part of it."""
    partial = f"{path}.partial"
    if path.endswith(".npz"):
        with files.whole_file(path, "wb") as f:
            np.savez(f, **packed)  # type: ignore[arg-type]
        return
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    os.makedirs(partial)
    for name, array in packed.items():
        np.save(os.path.join(partial, f"{name}.npy"), array)
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
