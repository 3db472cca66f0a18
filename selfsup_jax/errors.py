"""Errors that a user can mend: one clear line, exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Something in the config, the data or the workdir is not as it must be.

    `run_experiment.py` prints the message as one line and exits with status 2. Anything else that
    is raised is a bug and shows its traceback.
    """


class NoData(UserError):
    """A data set that is not there."""


class NotFinite(UserError):
    """A loss or a gradient that is no number: the same run would come to the same end again."""


def bad_field(field: str, value: Any, valid: str) -> UserError:
    """A `UserError` in the house's form: the field, its value, and what would be valid."""
    return UserError(f"config.{field}={value!r}: {valid}")


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """The choices most like `name`, for "did you mean": close ones first, else all of them."""
    choices = list(dict.fromkeys(choices))  # TFDS names some data sets twice
    close = difflib.get_close_matches(name, choices, n=count, cutoff=0.5)
    return ", ".join(close or sorted(choices))


class Stopped(Exception):
    """The run was told to stop, and did so in good order.

    Attributes:
        status: the process's exit status, 128 plus the signal's number.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
