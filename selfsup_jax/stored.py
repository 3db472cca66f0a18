"""Reads arrays and JSON that somebody else may have made.

What a file says of itself is checked before memory is taken for it, and nothing in it is executed.
Every function raises `ValueError` or `OSError`, with one line, for a file that is not as it should.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tokenize
import zipfile
from collections.abc import Iterable, Mapping
from typing import IO, Any, NamedTuple

import numpy as np

from selfsup_jax.errors import first_line

_LARGEST_JSON = 2**24  # bytes


class Header(NamedTuple):
    """What a stored array says of itself."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object of at most 16 MiB."""
    _check_regular(path)
    if os.path.getsize(path) > _LARGEST_JSON:
        raise ValueError(f"{os.path.basename(path)} has more than {_LARGEST_JSON:,} bytes")
    with open(path, encoding="utf-8") as f:
        try:
            tree = json.load(f)
        except RecursionError as e:
            raise ValueError(f"{os.path.basename(path)} is nested too deeply") from e
    if not isinstance(tree, dict):
        raise ValueError(f"{os.path.basename(path)} holds no JSON object")
    return tree


def npz_headers(path: str) -> dict[str, Header]:
    """The headers of the arrays in a `.npz` file; other files in it are passed over."""
    _check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            headers = {}
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in headers:
                    raise ValueError(f"{name} is there twice")
                if entry.flag_bits & 1:
                    raise ValueError(f"{name} is encrypted")
                with archive.open(entry) as f:
                    headers[name] = _header(name, f, entry.file_size)
    except (OSError, ValueError):
        raise
    except Exception as e:
        raise _damaged(path, e) from e
    return headers


def read_npz(path: str, names: Iterable[str], headers: Mapping[str, Header]) -> dict[str, Any]:
    """The named arrays of a `.npz` file.

    Args:
        path: of the file.
        names: of the arrays.
        headers: of `npz_headers`, for the memory that the arrays need.
    """
    names = list(names)
    needed = sum(math.prod(headers[name].shape) * headers[name].dtype.itemsize for name in names)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        sizes = f"{needed / 2**30:,.1f} GiB, this machine's memory has {memory / 2**30:,.1f}"
        raise ValueError(f"its arrays need {sizes}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except OSError:
        raise
    except Exception as e:
        raise _damaged(path, e) from e


def map_npy(path: str) -> np.ndarray:
    """The array of a `.npy` file, mapped into memory: it is read where it is used."""
    _check_regular(path)
    name = os.path.basename(path)
    with open(path, "rb") as f:
        _header(name, f, os.path.getsize(path))
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _header(name: str, f: IO[bytes], size: int) -> Header:
    """Reads and checks the header of an array that has `size` bytes with its header."""
    try:
        version = np.lib.format.read_magic(f)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"is of the unknown version {version}")
        shape, _, dtype = readers[version](f)
    # NumPy tokenizes a header, whose errors differ from version to version of Python.
    except (
        ValueError,
        TypeError,
        SyntaxError,
        tokenize.TokenError,
        RecursionError,
        MemoryError,
    ) as e:
        reason = first_line(e) if str(e) else "its header is nested too deeply"
        raise ValueError(f"{name} is no array: {reason[:100]}") from e
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not read: they could be programs")
    told = math.prod(shape) * dtype.itemsize
    there = size - f.tell()
    if min(shape, default=0) < 0 or told != there:
        raise ValueError(
            f"{name} should be {dtype} {list(shape)}, {told:,} bytes, but has {there:,}"
        )
    return Header(shape, dtype)


def _damaged(path: str, error: Exception) -> ValueError:
    """In place of the many types that zlib, zipfile and NumPy raise."""
    return ValueError(f"{os.path.basename(path)}: {first_line(error)[:100]}")


def _check_regular(path: str) -> None:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{os.path.basename(path)} is not a file")
