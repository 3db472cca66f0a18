"""Errors that libraries print although they also raise them go to a file: one line tells the user.

On a full disk TensorStore's threads print hundreds of tracebacks, and Orbax's some more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import traceback
from typing import Any

from absl import logging as absl_logging

from selfsup_jax import paths

FILE = "library_errors.log"


class _Catcher(logging.Filter):
    """Writes such errors, each once, to the first folder that can be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.workdirs: list[str] = []
        self._seen: set[str] = set()
        self._other_hook = sys.unraisablehook

    def install(self) -> None:
        if sys.unraisablehook != self._unraisable:
            self._other_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
            logger.addFilter(self)  # no effect the second time

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message is shown: not if it is an error of Orbax or of its event loop."""
        theirs = record.name == "asyncio" or "orbax" in record.pathname
        if not theirs or record.levelno < logging.ERROR:
            return True
        self._write(logging.Formatter().format(record))
        return False

    def _unraisable(self, error: Any) -> None:
        # TensorStore's callbacks, for an event loop that Orbax has closed after the first error.
        if isinstance(error.exc_value, RuntimeError) and "Event loop" in str(error.exc_value):
            self._write("".join(traceback.format_exception(error.exc_value)))
        else:
            self._other_hook(error)

    def _write(self, text: str) -> None:
        if text in self._seen:
            return
        self._seen.add(text)
        own = os.path.join(tempfile.gettempdir(), f"selfsup_jax_{os.getpid()}_{FILE}")
        for path in [*(os.path.join(folder, FILE) for folder in self.workdirs), own]:
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as f:
                f.write(text.rstrip() + "\n")
                f.flush()
                return


_CATCHER = _Catcher()


def catch(workdir: str | None = None) -> None:
    """From now on such errors go to `library_errors.log` in the workdir.

    Without a workdir, or if it is full or in a bucket, they go to the folder of temporary files.
    """
    if workdir is not None:
        _CATCHER.workdirs = [] if paths.is_bucket(workdir) else [workdir]
    _CATCHER.install()
