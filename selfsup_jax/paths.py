"""Files and folders on a disk or in a bucket: `os` for a path, gcsfs for an address `gs://...`.

A bucket has objects, which are put and read as a whole, and no folders: a folder is there as long
as an object's name begins with its own. gcsfs is imported at the first address, not before, and
its errors become `BucketError`. (etils' paths, which Orbax uses, lack what a lock needs: to create
an object only if there is none. Both use gcsfs.)
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import glob as local_glob
import importlib.util
import io
import logging
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from selfsup_jax.errors import UserError

_SCHEME = "gs://"
_T = TypeVar("_T")


class BucketError(OSError):
    """A bucket cannot be reached, read or written to; `strerror` says why, in one line."""


def is_bucket(path: str) -> bool:
    """Whether a path is an address such as `gs://bucket/run`."""
    return "://" in path


def check(path: str, name: str) -> None:
    """Checks that a path can be used, if it is the address of a folder in a bucket.

    Args:
        path: such as `gs://bucket/run`; one on a disk is not looked at.
        name: the flag or field that has it, for messages: `--workdir`.

    Raises:
        UserError: it is another kind of address, gcsfs is missing, the bucket does not exist, or
            access is denied.
    """
    if not is_bucket(path):
        return
    bucket, _, folder = path.removeprefix(_SCHEME).partition("/")
    if not path.startswith(_SCHEME) or not bucket or not folder.strip("/"):
        raise UserError(f"{name}={path}: must be a path, or gs://BUCKET/FOLDER")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name}={path}: to use a bucket, pip install gcsfs")
    try:
        if not exists(_SCHEME + bucket):
            raise UserError(f"{name}={path}: there is no bucket {bucket}")
    except BucketError as e:
        raise UserError(f"{name}={path}: {e.strerror}") from e


def reason(error: BaseException) -> str:
    """Why a library could not use a bucket: one line, with what to do if access is denied."""
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if re.search(r"\b40[13]\b|Forbidden|Anonymous|[Cc]redentials|PERMISSION_DENIED", text):
        remedy = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS=FILE"
        return f"access is denied ({text}); {remedy}"
    return text


@functools.cache
def _gcsfs() -> Any:
    import fsspec
    import fsspec.config

    # Other processes and TensorStore write there too, so no listing is remembered; nor by etils'
    # own instance, which takes this default.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it raises what it logs
    return fsspec.filesystem("gcs")


@contextlib.contextmanager
def _bucket(address: str) -> Iterator[tuple[Any, str]]:
    """(gcsfs, `bucket/name` of an address); turns errors into an `OSError` with the address."""
    try:
        yield _gcsfs(), absolute(address).removeprefix(_SCHEME)
    except FileNotFoundError as e:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address) from e
    except FileExistsError as e:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), address) from e
    except Exception as e:  # of gcsfs, aiohttp, requests, google.auth
        raise BucketError(errno.EIO, reason(e), address) from e


def _at(path: str, local: Callable[[str], _T], in_bucket: Callable[[Any, str], _T]) -> _T:
    """`local(path)`; or, of an address, `in_bucket(gcsfs, name)`."""
    if not is_bucket(path):
        return local(path)
    with _bucket(path) as (files, name):
        return in_bucket(files, name)


# ----------------------------------------------------------------------------------- names


def absolute(path: str) -> str:
    """The absolute path; of an address the one spelling that names of objects have."""
    if is_bucket(path):
        scheme, _, name = path.partition("://")
        return f"{scheme}://{posixpath.normpath(name)}"
    return os.path.abspath(path)


def real(path: str) -> str:
    """`absolute`, with links followed."""
    return absolute(path) if is_bucket(path) else os.path.realpath(path)


# ----------------------------------------------------------------------------------- looking


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    return _at(path, os.path.exists, lambda files, name: bool(files.exists(name)))


def isdir(path: str) -> bool:
    """Whether there is a folder."""
    return _at(path, os.path.isdir, lambda files, name: bool(files.isdir(name)))


def listdir(path: str) -> list[str]:
    """The names in a folder; raises `FileNotFoundError`."""
    if not is_bucket(path):
        return os.listdir(path)
    with _bucket(path) as (files, name):
        return [posixpath.basename(entry) for entry in files.ls(name, detail=False)]


def glob(folder: str, pattern: str) -> list[str]:
    """The paths in a folder that match a pattern such as `plots/*.png`."""
    if not is_bucket(folder):
        return local_glob.glob(os.path.join(local_glob.escape(folder), pattern))
    with _bucket(folder) as (files, name):
        return [_SCHEME + found.lstrip("/") for found in files.glob(posixpath.join(name, pattern))]


def walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields (folder, names of folders, names of files) as `os.walk` does, from the top down."""
    if not is_bucket(top):
        yield from os.walk(top)
        return
    try:
        with _bucket(top) as (files, name):
            entries = files.ls(name, detail=True)
    except FileNotFoundError:
        return
    names: dict[bool, list[str]] = {True: [], False: []}
    for entry in entries:
        names[entry["type"] == "directory"].append(posixpath.basename(entry["name"]))
    yield top, names[True], names[False]
    for folder in names[True]:
        yield from walk(posixpath.join(top, folder))


def getsize(path: str) -> int:
    """The bytes of a file."""
    return _at(path, os.path.getsize, lambda files, name: int(files.size(name)))


def getmtime(path: str) -> float:
    """When a file was written, in seconds since 1970."""
    return _at(path, os.path.getmtime, lambda files, name: float(files.modified(name).timestamp()))


# ----------------------------------------------------------------------------------- reading


def open(path: str, mode: str = "r", **options: Any) -> IO[Any]:
    """Opens a file to read it, as `open` does; an object is read at once."""
    if not is_bucket(path):
        return builtins.open(path, mode, **options)
    with _bucket(path) as (files, name):
        content = io.BytesIO(files.cat_file(name))
    return content if "b" in mode else io.TextIOWrapper(content, **options)


def read_ranges(addresses: list[str], starts: list[int], ends: list[int]) -> list[bytes]:
    """The bytes from `start` to before `end` of each object in a bucket, all fetched at once."""
    with _bucket(addresses[0]) as (files, _):
        names = [absolute(address).removeprefix(_SCHEME) for address in addresses]
        return [bytes(x) for x in files.cat_ranges(names, starts, ends, on_error="raise")]


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """The path of a file or folder on the disk: its own, or that of a copy which is then removed.

    For libraries that need a path. What is mapped into memory stays readable after the removal.
    """
    if not is_bucket(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="selfsup_jax_") as folder:
        copy = os.path.join(folder, posixpath.basename(absolute(path)))
        with _bucket(path) as (files, name):
            files.get(name, copy, recursive=files.isdir(name))
        yield copy


# ----------------------------------------------------------------------------------- writing


def makedirs(path: str) -> None:
    """Creates a folder and those above it, if they are not there; a bucket needs none."""
    if not is_bucket(path):
        os.makedirs(path, exist_ok=True)


def put(address: str, content: bytes, *, new: bool = False) -> None:
    """Writes an object, as a whole or not at all.

    Args:
        address: in a bucket.
        content: of the object.
        new: only if there is none: of several processes one succeeds, others get
            `FileExistsError`. (Google's `ifGenerationMatch=0`.)
    """
    with _bucket(address) as (files, name):
        files.pipe_file(name, content, mode="create" if new else "overwrite")


def remove(path: str) -> None:
    """Removes a file."""
    _at(path, os.remove, lambda files, name: files.rm_file(name))


def rmtree(path: str) -> None:
    """Removes a folder and all in it."""
    _at(path, shutil.rmtree, lambda files, name: files.rm(name, recursive=True))


def move(path: str, target: str) -> None:
    """Renames a file or folder; in a bucket it is copied, then removed."""
    if not is_bucket(path):
        os.replace(path, target)
        return
    with _bucket(path) as (files, name), _bucket(target) as (_, other):
        files.mv(name, other, recursive=files.isdir(name))
