"""Files that are written whole or not at all, and errors of a full or broken disk in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

from selfsup_jax.errors import Stopped, UserError

_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_OF_A_FILE = (errno.EACCES, errno.EPERM, errno.ENOENT)  # such as of a workdir that was removed


@contextlib.contextmanager
def disk_errors(workdir: str, latest_step: Callable[[], int | None]) -> Iterator[None]:
    """Turns what a full or broken disk raises into one line that says what is still there."""
    try:
        yield
    except (UserError, Stopped):
        raise
    except Exception as e:
        reason = _disk_reason(e, workdir)
        if reason is None:
            raise
        saved = latest_step()
        there = f"the last good checkpoint is of step {saved}" if saved else "no checkpoint yet"
        raise UserError(f"--workdir={workdir}: cannot be written to: {reason}; {there}") from e


@contextlib.contextmanager
def writing_to(folder: str) -> Iterator[None]:
    """Turns what the system says of a folder that takes no files into one line."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{folder}: cannot be written to: {e.strerror}") from e


def _disk_reason(e: BaseException, workdir: str) -> str | None:
    """The system's words for what the workdir's disk did, where that is what went wrong."""
    root = os.path.abspath(workdir)
    if isinstance(e, OSError) and e.errno in (*_FULL_OR_BROKEN, *_OF_A_FILE):
        if isinstance(e.filename, str):
            inside = os.path.commonpath([root, os.path.abspath(e.filename)]) == root
            return os.strerror(e.errno) if inside else None
        if e.errno in _FULL_OR_BROKEN:  # of a file that was open: a run writes nowhere else
            return os.strerror(e.errno)
    # TensorStore and TensorFlow wrap the system's error in their own, the file's name with it.
    for number in _FULL_OR_BROKEN:
        if os.strerror(number) in str(e) and (root in str(e) or workdir in str(e)):
            return os.strerror(number)
    return _disk_reason(e.__cause__, workdir) if e.__cause__ is not None else None


@contextlib.contextmanager
def whole_file(path: str, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """`open(path, mode)` to write: the file is there whole when the block ends, or as it was."""
    with open(path + ".partial", mode, **options) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".partial", path)


def write_json(path: str, tree: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with whole_file(path) as f:
        json.dump(tree, f, indent=2, sort_keys=True)
        f.write("\n")
