"""Data sets by name: TFDS sets, folders of images, arrays, embedded digits.

TensorFlow is imported only when a TFDS set is opened.
"""

from __future__ import annotations

from typing import Any

from selfsup_jax.data import arrays, folder
from selfsup_jax.data.source import Source, split_indices, subset

__all__ = ["OWN", "Source", "choose_splits", "load", "split_indices", "split_names", "subset"]

OWN = ("digits", "arrays", "folder")  # the others are TFDS's


def load(name: str, directory: str, split: str, field: str, **options: Any) -> Source:
    """One split of a data set.

    Args:
        name: `digits`, `arrays`, `folder`, or a TFDS name.
        directory: the folder of images, the arrays' file or folder, or TFDS's data_dir.
        split: in TFDS's syntax, such as `train[:90%]`.
        field: the config field that `split` came from, for messages.
        **options: further arguments of `tfds.load`.

    Raises:
        UserError: the name or the split is unknown, or there is no such data in the directory.
    """
    if name == "digits":
        return arrays.load_digits(split, field)
    if name == "arrays":
        return arrays.load(directory, split, field)
    if name == "folder":
        return folder.load(directory, split, field)
    from selfsup_jax.data import tfds

    return tfds.load(name, directory, split, field, **options)


def choose_splits(name: str, directory: str, download: bool = False) -> tuple[str, str]:
    """Default train and test splits: those of the data set, or train divided 90:10."""
    names = split_names(name, directory, download)
    train = next((s for s in ("train", "training") if s in names), names[0])
    for test in ("test", "validation", "val"):
        if test in names:
            return train, test
    return f"{train}[:90%]", f"{train}[90%:]"


def split_names(name: str, directory: str, download: bool = False) -> list[str]:
    """The splits that a data set has."""
    if name == "digits":
        return ["train", "test"]
    if name == "arrays":
        return arrays.split_names(directory)
    if name == "folder":
        return folder.split_names(directory)
    from selfsup_jax.data import tfds

    return tfds.split_names(name, directory, download)
