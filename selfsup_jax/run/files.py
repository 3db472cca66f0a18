"""Atomic file writes, files that grow, and one-line errors for a full or broken disk."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

from selfsup_jax import paths
from selfsup_jax.errors import Stopped, UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_FILE_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOENT)  # for example, the workdir was removed
_NAME_ERRORS = (errno.EISDIR, errno.ENOTDIR)


@contextlib.contextmanager
def disk_errors(workdir: str, latest_step: Callable[[], int | None]) -> Iterator[None]:
    """Turns the error of a full or broken disk into one line that names the last checkpoint."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as e:
        reason = _disk_reason(e, workdir)
        if reason is None:
            raise
        if reason == os.strerror(errno.ENOENT) and not os.path.exists(workdir):
            raise UserError(
                f"--workdir={workdir}: was moved or deleted while the run was going on; what was "
                "saved is where it was moved to"
            ) from e
        saved = latest_step()
        note = f"the last good checkpoint is of step {saved}" if saved else "no checkpoint yet"
        raise UserError(f"--workdir={workdir}: cannot be written to: {reason}; {note}") from e


@contextlib.contextmanager
def writing_to(where: str) -> Iterator[None]:
    """Turns an `OSError` into a `UserError` of one line, which begins with `where`."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{where}: cannot be written to: {e.strerror or e}") from e


def _disk_reason(e: BaseException, workdir: str) -> str | None:
    """The system's message if `e` is an error of the workdir's disk, else None."""
    if paths.is_bucket(workdir):
        return _bucket_reason(e, workdir)
    root = os.path.abspath(workdir)
    if isinstance(e, OSError) and e.errno in (*_DISK_ERRORS, *_FILE_ERRORS, *_NAME_ERRORS):
        if isinstance(e.filename, str):
            inside = os.path.commonpath([root, os.path.abspath(e.filename)]) == root
            target = e.filename2 or e.filename
            which = f": {os.fsdecode(target)}" if e.errno in _NAME_ERRORS else ""
            return os.strerror(e.errno) + which if inside else None
        if e.errno in _DISK_ERRORS:  # an open file; a run writes only to its workdir
            return os.strerror(e.errno)
    # TensorStore and TensorFlow put the system's message and the path in their own error.
    for number in _DISK_ERRORS:
        if os.strerror(number) in str(e) and (root in str(e) or workdir in str(e)):
            return os.strerror(number)
    return _disk_reason(e.__cause__, workdir) if e.__cause__ is not None else None


def _bucket_reason(e: BaseException, workdir: str) -> str | None:
    """As `_disk_reason`, of the libraries that write to a bucket: gcsfs, TensorStore, Google's."""
    if isinstance(e, OSError) and paths.is_bucket(str(e.filename)):
        return e.strerror
    bucket = paths.absolute(workdir).split("/")[2]
    theirs = type(e).__module__.split(".")[0] in ("gcsfs", "google", "aiohttp", "requests")
    if theirs or f"/b/{bucket}/o" in str(e) or f"gs://{bucket}" in str(e):
        return paths.reason(e)
    return _bucket_reason(e.__cause__, workdir) if e.__cause__ is not None else None


@contextlib.contextmanager
def whole_file(path: str, mode: str = "w", partial: str = "", **options: Any) -> Iterator[IO[Any]]:
    """`open(path, mode)` for an atomic write: if the block fails, the old file stays unchanged.

    Args:
        path: of the file; an object in a bucket is put when the block ends.
        mode: `w` or `wb`.
        partial: path of the incomplete file; by default `path` with `.partial` after it.
        **options: of `open`.
    """
    if paths.is_bucket(path):
        content = io.BytesIO()
        with contextlib.ExitStack() as stack:
            if "b" in mode:
                yield content
            else:
                text = io.TextIOWrapper(content, **options)
                stack.callback(text.detach)  # otherwise it closes `content`
                yield text
                text.flush()
        paths.put(path, content.getvalue())
        return
    partial = partial or path + ".partial"
    try:
        with open(partial, mode, **options) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


class _GrowingObject(io.BytesIO):
    """An object cannot grow: each flush puts the whole of it anew, if there is more."""

    def __init__(self, address: str, content: bytes):
        super().__init__()
        self.write(content)
        self._address = address
        self._size = -1

    def flush(self) -> None:
        size = self.getbuffer().nbytes
        if size != self._size:
            paths.put(self._address, self.getvalue())
            self._size = size

    def close(self) -> None:
        if not self.closed:
            self.flush()
        super().close()

    def __del__(self) -> None:
        """Puts nothing: another process may write there by now."""


def growing(path: str, content: bytes = b"") -> IO[bytes]:
    """A file that has `content`, to write more at its end; `sync` and `close` save it."""
    if paths.is_bucket(path):
        return _GrowingObject(path, content)
    with whole_file(path, "wb") as f:
        f.write(content)
    return open(path, "ab")


def sync(f: IO[bytes]) -> None:
    """Returns when all that was written to a file of `growing` is saved."""
    f.flush()
    if not isinstance(f, _GrowingObject):
        os.fsync(f.fileno())


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object; raises `UserError` if the file cannot be read or holds none."""
    try:
        with paths.open(path, encoding="utf-8") as f:
            tree = json.load(f)
        if not isinstance(tree, dict):
            raise ValueError("no JSON object")
        return tree
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: cannot be read: {e}; move it away to start again") from e


def write_json(path: str, tree: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    with whole_file(path) as f:
        json.dump(tree, f, indent=2, sort_keys=True)
        f.write("\n")
