"""Command lines: a mistake is one line, `error: ...`, with exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import functools
import glob
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from selfsup_jax.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, and that misses dashes."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse's; a word `name=value` without the dashes of an option is an error."""
        for word in sys.argv[1:] if args is None else args:
            name, equals, _ = word.partition("=")
            if equals and f"--{name}" in self._option_string_actions and not os.path.exists(word):
                self.error(f"{word!r}: did you mean --{word}?")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints the message in one line; exit status 2."""
        self.exit(2, f"error: {message}\n")


def returns_status(main: Callable[..., int | None]) -> Callable[..., int]:
    """A command's `main` that returns its exit status: 2 after a `UserError`, told in one line."""

    @functools.wraps(main)
    def run(*args: Any) -> int:
        try:
            return main(*args) or 0
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2

    return run


def with_brackets(arg: str) -> str:
    """`--config.views.global.area=...` -> `--config.views["global"].area=...`."""
    name, equals, value = arg.partition("=")
    if name.lstrip("-").startswith("config."):
        name = re.sub(r"\.global(?=\.|$)", '["global"]', name)
    return name + equals + value


def values(argv: Sequence[str], name: str) -> list[str]:
    """All values of a flag, as `--NAME=VALUE` or `--NAME VALUE`, before the flags are parsed."""
    given = []
    for arg, after in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = arg.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            given.append(value if equals else after)
    return given


def value_of(argv: Sequence[str], name: str, kind: Callable[[str], Any]) -> Any:
    """The last value of a flag; None if it is not given, or not of that kind."""
    with contextlib.suppress(IndexError, ValueError):
        return kind(values(argv, name)[-1])
    return None


def refuse_words(argv: Sequence[str], words: Sequence[str], names: Iterable[str]) -> None:
    """Raises `UserError` if words without dashes are left after parsing the flags.

    Args:
        argv: the whole command line.
        words: those that belong to no flag.
        names: of all flags, and of the config's fields: `workdir`, `config.steps`.
    """
    if words:
        raise UserError(f"{words[0]!r}: is no flag; did you mean {meant(argv, words[0], names)}?")


def meant(argv: Sequence[str], word: str, names: Iterable[str]) -> str:
    """The flag that was probably meant by a word without dashes."""
    before = argv[max(0, list(argv).index(word) - 1)]
    if before.startswith("--") and "=" not in before and before != "--":
        return f"{before}={word}"  # of a flag that is true or false
    name, equals, value = word.lstrip("-\u2010\u2011\u2012\u2013\u2014").partition("=")
    if not equals and name.partition(":")[0].endswith(".py"):
        return f"--config={name}"
    choices = list(names)
    if not any(choice.startswith("config.") for choice in choices):
        choices += [name] * name.startswith("config.")  # the fields are not known
    for known in (name, f"config.{name}"):
        if known in choices:
            return f"--{known}={value}"
    leaf = next((c for c in choices if c.endswith(f".{name}")), "")
    # Thousands of fields of variants are too many to compare with.
    choices = [c for c in choices if not c.startswith("config.variants.")]
    near = leaf or nearest(name if "." in name else f"config.{name}", choices, count=1)
    return f"--{near.partition(',')[0]}={value}"


def unknown(name: str, argument: str, fields: Sequence[str]) -> str:
    """What is told of a flag that doesn't exist: it may be a field of the config."""
    value = argument.partition("=")[2] or "VALUE"
    field = next((f for f in fields if f == name or f.endswith(f".{name}")), "NAME")
    hint = f"did you mean --config.{field}={value}?"
    if field == "NAME":
        hint = "the fields of the config are given as --config.NAME=VALUE"
    return f"unknown flag --{name}; {hint}"


# What absl says of a value -> what it must be.
_PLAIN = {
    "invalid literal for int()": "must be a whole number",
    "could not convert string to float": "must be a number",
    "('Non-boolean argument to boolean flag'": "must be True or False",
    "Error while parsing string": "must be a tuple, such as '(1,2)' or \"('a','b')\"",
}


def in_plain_words(error: BaseException) -> str:
    """The last line of absl's error, with what would be valid in place of Python's words."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    line = line.removeprefix("ValueError: ")
    for said, plain in _PLAIN.items():
        before, separator, _ = line.partition(said)
        if separator:
            return before + plain
    return line


def no_config(config: str, known: Sequence[str]) -> str:
    """Why a config file cannot be read; there are the `known` ones, and those that lie here."""
    shared = {f"configs/{name}.py" for name in SHARED_CONFIGS}
    there = sorted({*glob.glob("configs/[a-z]*.py"), *known} - shared)
    path = config.partition(":")[0]
    path = path if path.endswith(".py") else f"configs/{path}.py"
    near = nearest(path, there, count=1)
    what = "there are" if near.count(",") else "did you mean"
    return f"--config={config}: cannot be read; {what} {near}" + "?" * (what == "did you mean")


# Modules in `configs/` that are no configs but parts of them.
SHARED_CONFIGS = ("common", "datasets", "evaluation", "parsing", "recipes")


def load(path: str) -> types.ModuleType:
    """Runs a Python file as a module; no bytecode is kept, which may be that of an earlier text."""
    module = types.ModuleType("config_file")
    module.__file__ = path
    sys.modules[module.__name__] = module
    with open(path, "rb") as f:
        exec(compile(f.read(), path, "exec"), module.__dict__)
    return module


def raised_by(path: str, error: BaseException) -> str:
    """`FILE:LINE: ERROR`: the line of the file that an error comes from, if one does."""
    kind, said = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, SyntaxError) and _same(error.filename, path):
        return f"{path}:{error.lineno}: {kind}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f":{frame.lineno}" for frame in frames if _same(frame.filename, path)]
    what = "exits, with status" if isinstance(error, SystemExit) else f"{kind}:"
    return f"{path}{lines[-1] if lines else ''}: {what} {said}".rstrip(": ")


def _same(filename: str | None, path: str) -> bool:
    return bool(filename) and os.path.realpath(str(filename)) == os.path.realpath(path)
