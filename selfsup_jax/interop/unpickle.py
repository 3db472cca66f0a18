"""Reads pickles that hold plain data, without running anything that they name.

A pickle may name any function of any installed package and have it called. Here each name is looked
up in a short table, whose entries are stand-ins of this file: no class or function of a library is
called, not even NumPy's, which would unpickle again what lies in arrays of Python objects.
"""

from __future__ import annotations

import argparse
import collections
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from selfsup_jax.errors import first_line

Table = Mapping[tuple[str, str], Any]  # (module, name) -> stand-in

_KINDS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}


class Refused(ValueError):
    """A pickle names something that is not in the table."""


class _Closed(type):
    """A pickle can set attributes of what it names, but not of these classes."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise Refused(f"changes {cls.__name__}.{name}")


class Dtype(metaclass=_Closed):
    """In place of `numpy.dtype`: numbers only."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or code not in _KINDS:
            raise Refused(f"holds an array of {code!r:.40}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or state[1] not in ("<", ">", "|", "="):
            raise Refused("holds a structured array")
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(metaclass=_Closed):
    """In place of `numpy.ndarray`: filled from bytes, whose number must be that of the shape."""

    __slots__ = ("array",)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _from_bytes(raw, dtype).reshape(shape, order="F" if fortran else "C")


class Record(metaclass=_Closed):
    """In place of a named tuple, or of a namespace: its values, by position or by name.

    `fields` are the names of a named tuple's values, where they are known.
    """

    __slots__ = ("named", "values")
    fields: tuple[str, ...] = ()
    values: tuple[Any, ...]
    named: dict[str, Any]

    def __new__(cls, *values: Any) -> Record:  # noqa: D102 - pickle calls it
        self = super().__new__(cls)
        self.values, self.named = values, {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.named = dict(state)


def named_tuple(name: Any, fields: Any, *_: Any) -> type:
    """What dill calls to make a class of named tuples, wherever it was defined."""
    if not isinstance(fields, tuple | list) or not all(isinstance(f, str) for f in fields):
        raise Refused(f"has a named tuple {name!r:.40} without fields")
    return _Closed("Record", (Record,), {"__slots__": (), "fields": tuple(fields)})


def _from_bytes(raw: Any, dtype: Any) -> np.ndarray:
    if not isinstance(dtype, Dtype) or not isinstance(raw, bytes):
        raise Refused("holds an array that is not of numbers")
    return np.frombuffer(raw, dtype.dtype)


def _reconstruct(kind: Any, *_: Any) -> Array:
    if kind is not Array:
        raise Refused("reconstructs something that is no array")
    return Array()


def _scalar(dtype: Any, raw: Any) -> Any:
    array = _from_bytes(raw, dtype)
    return array[0].item() if array.size == 1 else array


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise Refused(f"encodes text as {encoding!r:.40}")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """What empty bytes are pickled as, in protocol 2."""
    return b""


def array(function: Any, arguments: Any, state: Any, *_: Any) -> Array:
    """What JAX, and dill, pickle an array as: the parts of NumPy's pickle."""
    if function is not _reconstruct:
        raise Refused("reconstructs something that is no array")
    made = _reconstruct(*arguments)
    made.__setstate__(state)
    return made


_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
PLAIN: Table = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    (argparse.__name__, "Namespace"): Record,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    **{(module, "_reconstruct"): _reconstruct for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
    ("jax._src.array", "_reconstruct_array"): array,
    ("jax._src.device_array", "reconstruct_device_array"): array,
}


def load(file: IO[bytes], table: Table, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Reads one pickle, which may be followed by other data.

    Args:
        file: at the pickle's first byte.
        table: the names that the pickle may have, see `PLAIN`.
        persistent: what a persistent id stands for; None if there must be none.

    Raises:
        ValueError: the pickle is damaged, or (`Refused`) names something else. Nothing was called.
    """
    try:
        _check_memo(file)
        return _Unpickler(file, table, persistent).load()
    except Refused:
        raise
    except Exception as e:  # a damaged pickle may raise anything
        raise ValueError(f"is truncated or damaged: {first_line(e)[:100]}") from e


def _check_memo(file: IO[bytes]) -> None:
    """Python takes memory for as many objects as a pickle says: a wrong number would take all."""
    start, count = file.tell(), 0
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.endswith("PUT"):
            count += 1
            if int(argument or 0) > count:
                raise ValueError(f"stores object {argument} before {count} others")
    file.seek(start)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], table: Table, persistent: Callable[[Any], Any] | None):
        super().__init__(file, encoding="latin1")  # of texts of Python 2
        self._table, self._persistent = table, persistent

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._table[module, name]
        except KeyError:
            raise Refused(
                f"names {module}.{name}, which is not read: it could be a program"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise Refused("refers to data outside of itself")
        return self._persistent(pid)


def size_of(shape: Any) -> int:
    """The number of values of a shape from a file, which is checked."""
    if not isinstance(shape, tuple | list) or not all(
        type(n) is int and 0 <= n < 2**40 for n in shape
    ):
        raise ValueError(f"{shape!r:.60} is no shape")
    return math.prod(shape)
