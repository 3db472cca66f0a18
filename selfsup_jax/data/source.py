"""One split of a data set, in memory or as a stream; selecting examples; the splits' syntax."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from selfsup_jax.data.pixels import Encoded, Reading
from selfsup_jax.errors import bad_field

_BLOCK = 1024  # examples that are read at once


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set.

    Attributes:
        name: for messages.
        num_examples: number of images.
        class_names: names of the classes; None if there are no labels, or only one class.
        kind: what `images` contains: `array` (pixels), `path`, or `encoded` (TFDS).
        images: uint8 `[N, H, W, 3]`, or `[N]` paths, or `[N]` bytes of encoded images; or with
            `fetch` the places of `[N]` images, with `read` those of `[N]` examples.
        labels: `[N]` int32, or `[N, classes]` of zeros and ones if an image can have several
            labels; None if there are none, or if only `read` knows them.
        describe: index of an example -> its name for the log.
        shape: (height, width) if all images have the same.
        sizes: `[N, 2]` int32, height and width of each image in an array whose images are smaller
            than H x W; None if all fill it.
        broken: indices of the images in an array that could not be decoded.
        left_out: what lies beside the images and is not taken, in words; empty if nothing.
        reading: how encoded images become pixels.
        fetch: places of images -> their bytes, for images that stay in their files; picklable.
        read: places of examples -> (encoded images, labels, names), for examples that stay in
            their files; picklable. Labels are -1 without `class_names`.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...] | None
    kind: str
    images: Any = None
    labels: np.ndarray | None = None
    describe: Callable[[int], str] = str
    shape: tuple[int, int] | None = None
    sizes: np.ndarray | None = None
    broken: tuple[int, ...] = ()
    left_out: str = ""
    reading: Reading = dataclasses.field(default_factory=Reading)
    fetch: Callable[[np.ndarray], list[bytes]] | None = None
    read: Callable[[np.ndarray], tuple[list[bytes], np.ndarray, np.ndarray]] | None = None

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or None without labels."""
        return len(self.class_names) if self.class_names else None

    @property
    def scanned(self) -> bool:
        """Whether the labels and names of all examples are known."""
        return self.read is None or self.labels is not None or self.class_names is None

    def encoded(self, rows: np.ndarray) -> Sequence[Encoded]:
        """Some images, to be decoded."""
        if self.read is not None:
            return self.read(self.images[rows])[0]
        return self.images[rows] if self.fetch is None else self.fetch(self.images[rows])

    def files(self, endings: tuple[str, ...]) -> list[str]:
        """Of `[N]` paths, those with one of some endings, such as `.png`."""
        longest = max(map(len, endings))
        files = self.images.tolist()  # a million texts are taken from an array one by one in 1 s
        return [path for path in files if path[-longest:].lower().endswith(endings)]

    def columns(self, read: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> list[np.ndarray]:
        """What `read` gives of all examples, such as labels; it is called with many places."""
        starts = range(0, self.num_examples, _BLOCK)
        blocks = [read(self.images[start : start + _BLOCK]) for start in starts]
        return [np.concatenate(column) for column in zip(*blocks, strict=True)]

    def facts(self, directory: str) -> dict[str, Any]:
        """What tells this split from another: numbers, hashes, the first and the last example.

        Names are taken relative to `directory`, which may differ from host to host.
        """

        def digest(content: bytes) -> str:
            return hashlib.sha256(content).hexdigest()[:12]

        def name(i: int) -> str:
            return self.describe(i).removeprefix(directory).lstrip(os.sep)

        facts: dict[str, Any] = {"images": self.num_examples, "classes": self.num_classes}
        facts["names of the classes"] = digest(
            repr(self.class_names).encode("utf-8", "surrogateescape")
        )
        if self.labels is not None:
            facts["labels"] = digest(np.ascontiguousarray(self.labels).tobytes())
        if self.num_examples:
            # Evenly spread, because a million names take a second.
            some = np.linspace(0, self.num_examples - 1, min(1000, self.num_examples)).astype(int)
            facts |= {"first": name(0), "last": name(self.num_examples - 1)}
            facts["names"] = digest(os.fsencode("\0".join(name(i) for i in some)))
        if self.kind == "array":  # the names are positions, and say nothing
            facts["pixels"] = digest(self.images[:4].tobytes() + self.images[-4:].tobytes())
        return facts


def subset(source: Source, choose: Callable[[np.ndarray, list[str]], np.ndarray]) -> Source:
    """Selects examples of a split.

    Args:
        source: a split with labels. If only its files have them, it is read once.
        choose: `(labels, names) -> indices` of the examples to keep, in their new order.
    """
    if source.scanned and source.labels is not None:
        labels, names = source.labels, [source.describe(i) for i in range(source.num_examples)]
    else:
        read = source.read
        assert read is not None
        labels, ids = source.columns(lambda places: read(places)[1:])
        names = ids.tolist()
    indices = np.asarray(choose(labels, names), np.int64)
    broken = set(source.broken)
    return dataclasses.replace(
        source,
        num_examples=len(indices),
        images=source.images[indices],
        labels=labels[indices],
        describe=lambda i: names[indices[i]],
        sizes=None if source.sizes is None else source.sizes[indices],
        broken=tuple(i for i, row in enumerate(indices) if row in broken),
    )


_BOUND = r"-?\d+(?:\.\d+)?%?"
_PART = re.compile(rf"(?P<name>[\w-]+)(\[(?P<start>{_BOUND})?:(?P<stop>{_BOUND})?\])?")


def split_indices(split: str, lengths: dict[str, int], field: str) -> list[tuple[str, np.ndarray]]:
    """Parses the common part of TFDS's split syntax: `train`, `train[:90%]`, `train[100:]+test`.

    Args:
        split: parts joined by `+`; bounds may be negative or in percent.
        lengths: the number of examples of each split.
        field: the config field of `split`, for messages.

    Returns:
        (name of the split, indices of the examples) of each part.
    """
    indices = []
    for part in split.split("+"):
        match = _PART.fullmatch(part.strip())
        if not match or match["name"] not in lengths:
            why = "is not a split such as train[:90%]" if not match else "is unknown"
            raise bad_field(field, split, f"{part.strip()!r} {why}; splits: {', '.join(lengths)}")
        length = lengths[match["name"]]
        try:
            bounds = _bounds(match["start"], match["stop"], length)
        except ValueError as e:
            raise bad_field(
                field, split, f"{part.strip()!r} {e}; splits: {', '.join(lengths)}"
            ) from e
        indices.append((match["name"], np.arange(length)[bounds]))
    if not sum(len(part) for _, part in indices):
        raise bad_field(field, split, f"holds no images; splits: {', '.join(lengths)}")
    return indices


def _bounds(start: str | None, stop: str | None, length: int) -> slice:
    """As TFDS: one percentage makes both so; they are rounded to the closest example."""
    percent = any(text is not None and text.endswith("%") for text in (start, stop))

    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        value = float(text.removesuffix("%"))
        if not percent and not value.is_integer():
            raise ValueError(f"has {text}, which is not a whole number")
        if abs(value) > (100 if percent else length):
            raise ValueError(f"goes beyond the split's {length} examples")
        return round(value * length / 100) if percent else int(value)

    return slice(bound(start), bound(stop))
