"""A folder of images as a data set."""

from __future__ import annotations

import hashlib
import os
from collections import Counter

import numpy as np
from absl import logging

from selfsup_jax import paths
from selfsup_jax.data import scan
from selfsup_jax.data.source import Source, split_indices
from selfsup_jax.errors import NoData, bad_field


def load(directory: str, split: str, field: str) -> Source:
    """A directory of images, with class sub-folders or without (then there are no labels).

    If there is a sub-folder `train`, the splits are `train` and, optionally, `test`, `val` and
    `validation`; else all images are in `train`. The order of the files depends only on their
    relative paths and mixes the classes, so slices such as `train[90%:]` can be used. A file that
    several links lead to counts once; `Source.left_out` counts what is not taken.

    Raises:
        UserError: there is no such directory or split, or it holds no images.
    """
    splits = _splits(directory)
    files: dict[str, list[str]] = {}
    left_out: Counter[str] = Counter()
    for name, (images, skipped) in scan.images(splits).items():
        files[name] = sorted(images, key=lambda path: hashlib.md5(os.fsencode(path)).digest())
        left_out += skipped
    if not any(files.values()):
        hint = f"holds no images ({', '.join(scan.ENDINGS)})"
        hint += f"; it holds {scan.listed(left_out)}" if left_out else ""
        raise bad_field("data.dir", directory, hint)
    parts = split_indices(split, {k: len(v) for k, v in files.items()}, field)
    chosen, whole = [], []
    for name, indices in parts:
        chosen += (part := [files[name][i] for i in indices.tolist()])
        root = os.path.join(splits[name], "")
        whole += [root + path for path in part]

    all_files = [path for members in files.values() for path in members]
    class_names: tuple[str, ...] | None = None
    loose = [path for path in all_files if os.sep not in path]
    if loose and len(loose) < len(all_files):
        logging.warning("%s lies outside the class folders: no labels are used", loose[0])
    if not loose:
        class_names = tuple(sorted({path.partition(os.sep)[0] for path in all_files}))
    if class_names and len(class_names) < 2:
        logging.info("%s has a single class, %s: no labels are used", directory, class_names[0])
        class_names = None
    labels = None
    if class_names:
        class_index = {name: i for i, name in enumerate(class_names)}
        of_chosen = [class_index[path.partition(os.sep)[0]] for path in chosen]
        labels = np.asarray(of_chosen, np.int32)
    return Source(
        name=f"{directory} {split}",
        num_examples=len(whole),
        class_names=tuple(map(_printable, class_names)) if class_names else None,
        kind="path",
        images=np.asarray(whole),
        labels=labels,
        describe=lambda i: whole[i],
        left_out=scan.listed(left_out),
    )


def _printable(name: str) -> str:
    """A name that is not UTF-8 can be neither drawn nor written to a page."""
    return os.fsencode(name).decode(errors="replace")


def split_names(directory: str) -> list[str]:
    """The splits of a directory of images; see `load`."""
    return list(_splits(directory))


def _splits(directory: str) -> dict[str, str]:
    if not directory:
        raise NoData(str(bad_field("data.dir", directory, "must name the folder of images")))
    if paths.is_bucket(directory):
        hint = (
            "a folder of images must be on a disk: copy it there with gcloud storage cp -r, or "
            "pack it with python -m selfsup_jax.data.pack and put the arrays into the bucket"
        )
        raise NoData(str(bad_field("data.dir", directory, hint)))
    if not os.path.isdir(directory):
        raise NoData(str(bad_field("data.dir", directory, "is not a directory")))
    subfolders = {entry.name: entry.path for entry in os.scandir(directory) if entry.is_dir()}
    if "train" not in subfolders:
        return {"train": directory}
    return {s: subfolders[s] for s in ("train", "test", "val", "validation") if s in subfolders}
