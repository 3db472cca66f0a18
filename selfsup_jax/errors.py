"""Errors that a user can fix: printed as one clear line, with exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

# The exit status if another process of the job is lost: EX_TEMPFAIL of sysexits.h. The same command
# goes on from the last checkpoint, so schedulers should restart it.
LOST = 75


class UserError(ValueError):
    """Something in the config, the data or the workdir is invalid.

    `run_experiment.py` prints the message as one line and exits with status 2. Any other
    exception is a bug and shows its traceback.
    """

    def __init__(self, message: object):
        super().__init__(" ".join(str(message).splitlines()))  # what is quoted may have more


class NoData(UserError):
    """A data set is unknown, missing or not prepared."""


class HostsDiffer(UserError):
    """The hosts of a job have different configs, code or data; each of them raises it."""


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite; running again would give the same result."""


def bad_field(field: str, value: Any, valid: str) -> UserError:
    """A `UserError` whose message has the field, its value, and what would be valid."""
    return UserError(f"config.{field}={value!r}: {valid}")


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """The choices that are close to `name`, for "did you mean".

    If none is: all of them, or of more than 20 the three that are the least far away.
    """
    choices = list(dict.fromkeys(choices))  # TFDS names some data sets twice
    close = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    if not close and len(choices) > 20:
        close = difflib.get_close_matches(name, choices, n=3, cutoff=0.0)
    return ", ".join(close or sorted(choices))


def some_of(names: Sequence[object], most: int = 3) -> str:
    """`a, b, c and 4 more`: the first names of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def first_line(error: BaseException) -> str:
    """The first line of a library's message, or the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Stopped(Exception):
    """A signal stopped the run, which saved its state first.

    Attributes:
        status: the process's exit status, 128 plus the signal's number.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
