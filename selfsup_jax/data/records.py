"""The records of TFRecord files, read at any place: where each and its image lie, and the bytes.

A TFRecord file has no index. One is made by hopping from the head of a record to the next, and for
large splits kept in `$XDG_CACHE_HOME/selfsup_jax`, by default `~/.cache/selfsup_jax`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from selfsup_jax import paths
from selfsup_jax.errors import UserError

# A record: the bytes' count, its checksum, the bytes, their checksum.
_COUNT, _HEAD, _AROUND = 8, 12, 16
# Of a record, or of a part of it: its file, the record's number in it, and the bytes there.
PLACE = np.dtype([("file", "i4"), ("number", "i4"), ("start", "i8"), ("length", "i8")])
_THREADS = 32  # they wait for the disk
_BEGIN = 64  # bytes of an image, which are looked for first


@dataclasses.dataclass(frozen=True)
class Files:
    """Reads records, or parts of them, by their places.

    Every process of a host reads the same files, so the host's memory (its page cache) has each
    record once, however many processes there are.

    Attributes:
        paths: of the files that `PLACE` counts.
    """

    paths: tuple[str, ...]

    def __call__(self, places: np.ndarray) -> list[bytes]:
        """The bytes of each record; fewer or none of one that cannot be read any more."""
        names = [self.paths[file] for file in places["file"]]
        starts, ends = places["start"], places["start"] + places["length"]
        if any(map(paths.is_bucket, names)):
            return paths.read_ranges(names, starts.tolist(), ends.tolist())
        return [_read(*row) for row in zip(names, starts, places["length"], strict=True)]


def _read(path: str, start: int, length: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)
    except OSError:
        return b""  # counts as an image that cannot be decoded


def places(files: Sequence[str], counts: Sequence[int], keep: bool) -> np.ndarray:
    """Where the records of some TFRecord files lie.

    Args:
        files: their paths.
        counts: how many records each has.
        keep: whether the index is kept on the disk, and mapped into memory from there.

    Returns:
        `[sum of counts]` of `PLACE`, in the order of the files.

    Raises:
        UserError: a file is missing, cut off, or has another number of records.
    """
    kept = _kept_at(files, counts) if keep else ""
    with contextlib.suppress(OSError, ValueError):  # there is none yet, or it is damaged
        if kept and len(index := np.load(kept, mmap_mode="r")) == sum(counts):
            return index
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        parts = list(threads.map(_places_in, files, counts))
    for number, part in enumerate(parts):
        part["file"] = number
    index = np.concatenate(parts)
    if kept:
        with contextlib.suppress(OSError):  # without a place to write it is made at each start
            os.makedirs(os.path.dirname(kept), exist_ok=True)
            partial = f"{kept}.{os.getpid()}.npy"
            np.save(partial, index)
            os.replace(partial, kept)
    return index


def inside(places: np.ndarray, records: Sequence[bytes], parts: Sequence[bytes]) -> np.ndarray:
    """Where parts of records lie, so that `Files` reads them without what is around them.

    Args:
        places: `[b]` of `PLACE`, of the records.
        records: their bytes.
        parts: of each record some bytes that are in it, such as its image.

    Returns:
        `[b]` of `PLACE`.

    Raises:
        ValueError: a part is not in its record.
    """
    inner = places.copy()
    for i, (record, part) in enumerate(zip(records, parts, strict=True)):
        at = record.index(part[:_BEGIN])  # to look for all of it takes a hundred times as long
        while not record.startswith(part, at):
            at = record.index(part[:_BEGIN], at + 1)
        inner["start"][i] += at
        inner["length"][i] = len(part)
    return inner


def interleaved(
    starts: Sequence[int], counts: Sequence[int], files_at_once: int, block: int = 16
) -> np.ndarray:
    """The order in which tf.data's `interleave` reads ranges of rows, as TFDS uses it.

    It takes up to `block` rows of each of `files_at_once` ranges in turn; the next range takes the
    place of one that has ended.
    """
    waiting = list(zip(starts, counts, strict=True))[::-1]
    open_: list[tuple[int, int] | None] = [None] * files_at_once
    blocks, turn = [np.arange(0)], 0
    while waiting or any(open_):
        if open_[turn] is None and waiting:
            open_[turn] = waiting.pop()
        if (current := open_[turn]) is not None:
            start, count = current
            blocks.append(np.arange(start, start + min(block, count)))
            # Of a range that ends with a full block this is seen at the next turn.
            open_[turn] = (start + block, count - block) if count >= block else None
        turn = (turn + 1) % files_at_once
    return np.concatenate(blocks)


def check_files(files: Sequence[str]) -> None:
    """Raises `UserError` if a file is missing."""
    there = {folder: set(paths.listdir(folder)) for folder in {os.path.dirname(f) for f in files}}
    missing = [f for f in files if os.path.basename(f) not in there[os.path.dirname(f)]]
    if missing:
        more = f", nor are {len(missing) - 1:,} more" * (len(missing) > 1)
        raise UserError(f"config.data.dir: {missing[0]} is not there{more}; prepare the data anew")


def kept_in() -> str:
    """The folder of the indices that are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "selfsup_jax")


def _kept_at(files: Sequence[str], counts: Sequence[int]) -> str:
    """The index's path, which is another one if a file was changed."""
    facts = [(paths.absolute(f), paths.getsize(f), paths.getmtime(f)) for f in files]
    name = hashlib.sha256(repr((facts, list(counts))).encode()).hexdigest()[:24]
    return os.path.join(kept_in(), f"records_{name}.npy")


def _places_in(path: str, count: int) -> np.ndarray:
    places = np.zeros(count, PLACE)
    places["number"] = np.arange(count)
    position = number = 0
    with paths.open(path, "rb", buffering=0) as file:  # of a bucket's object: all of it
        size = file.seek(0, os.SEEK_END)
        while position < size and number < count:
            file.seek(position)
            length = int.from_bytes(file.read(_COUNT), "little")
            if position + length + _AROUND > size:
                break
            places["start"][number], places["length"][number] = position + _HEAD, length
            position, number = position + length + _AROUND, number + 1
    if number < count or position != size:
        has = f"{number:,} whole records" + " and more" * (number == count)
        raise UserError(
            f"config.data.dir: {path} has {has}, must have {count:,}; prepare the data anew"
        )
    return places
