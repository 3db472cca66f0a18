"""PyTorch's files, read and written without PyTorch: nothing in them is run.

Since version 1.6 a file is a zip of a pickle and the raw numbers ("storages"); before, it was a
row of pickles and the numbers after them. The numbers are mapped into memory, not copied.
"""

from __future__ import annotations

import collections
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from selfsup_jax.interop import unpickle

_DTYPES: dict[str, Any] = {
    **{"Float": np.float32, "Double": np.float64, "Half": np.float16},
    **{"BFloat16": ml_dtypes.bfloat16, "Bool": np.bool_, "Byte": np.uint8, "Char": np.int8},
    **{"Short": np.int16, "Int": np.int32, "Long": np.int64},
}
_LARGEST_PICKLE = 2**28  # bytes; the numbers are not in it
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Storage(NamedTuple):
    """Numbers of a file, which a tensor is a view of."""

    key: str
    dtype: np.dtype[Any]
    size: int


class Tensor(NamedTuple):
    """A tensor before its numbers are read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """The tensor as a view of its storage's numbers."""
        count = unpickle.size_of(self.shape)
        unpickle.size_of(self.stride)
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if type(self.offset) is not int or self.offset < 0:
            raise ValueError(f"a tensor begins at {self.offset!r:.40}")
        if count > len(numbers) or (count and self.offset + last >= len(numbers)):
            raise ValueError(f"a tensor of shape {list(self.shape)} lies outside its storage")
        strides = tuple(step * numbers.itemsize for step in self.stride)
        view = numbers[self.offset :] if count else numbers[:0]
        return np.lib.stride_tricks.as_strided(view, self.shape, strides, writeable=False)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise unpickle.Refused("has a tensor of something that is no storage")
    return Tensor(storage, offset, tuple(shape), tuple(stride))


def _first(value: Any, *_: Any) -> Any:
    return value


_TABLE: unpickle.Table = {
    **unpickle.PLAIN,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch", "Size"): _first,
    ("torch", "device"): lambda *_: None,
    **{("torch", f"{name}Storage"): np.dtype(dtype) for name, dtype in _DTYPES.items()},
}


def is_zip(path: str) -> bool:
    """Whether it is a zip of PyTorch's, and not another zip."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def is_legacy(path: str) -> bool:
    """Whether it is a file of PyTorch before 1.6."""
    with open(path, "rb") as f:
        return _LEGACY_MAGIC.to_bytes(10, "little") in f.read(32)


def read(path: str) -> Any:
    """What `torch.save` was given: dictionaries, lists, texts, numbers, and arrays.

    Arrays are read-only views of the file; bfloat16 is that of `ml_dtypes`.

    Raises:
        ValueError: the file is truncated or damaged, or names a class that is not read.
        OSError: it cannot be opened.
    """
    return _read_zip(path) if is_zip(path) else _read_legacy(path)


def _read_zip(path: str) -> Any:
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        names = archive.namelist()
        root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("data.pkl")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        if archive.getinfo(f"{root}data.pkl").file_size > _LARGEST_PICKLE:
            raise ValueError(f"has a pickle of more than {_LARGEST_PICKLE:,} bytes")
        with archive.open(f"{root}data.pkl") as f:
            tree = unpickle.load(f, _TABLE, _storage)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        def numbers(storage: Storage) -> np.ndarray:
            dtype = storage.dtype.newbyteorder("<" if order == b"little" else ">")
            entry = archive.getinfo(f"{root}data/{storage.key}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("is compressed, which no file of PyTorch's is")
            # The local header repeats the name, and may have another extra field.
            lengths = struct.unpack_from("<HH", mapped, entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(lengths)
            array = np.frombuffer(mapped, dtype, storage.size, start)
            if (
                array.nbytes != entry.file_size
                or zlib.crc32(array.view(np.uint8).data) != entry.CRC
            ):
                raise ValueError(f"storage {storage.key} does not match its checksum")
            return array

        try:
            return _filled(tree, numbers)
        except KeyError as e:
            raise ValueError(f"is truncated or damaged: {e.args[0]}") from e


def _read_legacy(path: str) -> Any:
    with open(path, "rb") as f:
        magic, _, system = (unpickle.load(f, {}) for _ in range(3))
        if magic != _LEGACY_MAGIC or not isinstance(system, dict):
            raise ValueError("is no file of PyTorch's")
        storages: dict[str, Storage] = {}

        def first_of(pid: Any) -> Storage:
            storage = _storage(pid)
            return storages.setdefault(storage.key, storage)

        tree = unpickle.load(f, _TABLE, first_of)
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {}
        for key in unpickle.load(f, {}):
            size = int.from_bytes(f.read(8), "little")
            storage = storages.get(key)
            start = f.tell()
            if storage is None or size != storage.size:
                raise ValueError(f"storage {key!r:.40} is damaged")
            if start + size * storage.dtype.itemsize > len(mapped):
                raise ValueError(f"is truncated: storage {key!r:.40} is not all there")
            dtype = storage.dtype.newbyteorder("<" if system.get("little_endian", True) else ">")
            arrays[key] = np.frombuffer(mapped, dtype, size, start)
            f.seek(start + size * storage.dtype.itemsize)
    missing = sorted(storages.keys() - arrays.keys())
    if missing:
        raise ValueError(f"is truncated: storage {missing[0]!r:.40} is not there")
    return _filled(tree, lambda storage: arrays[storage.key])


def _storage(pid: Any) -> Storage:
    kind, dtype, key, _, size, *view = pid
    if kind != "storage" or not isinstance(dtype, np.dtype) or any(v is not None for v in view):
        raise unpickle.Refused("refers to something that is no storage")
    unpickle.size_of((size,))
    return Storage(str(key), dtype, size)


def _filled(tree: Any, numbers: Callable[[Storage], np.ndarray]) -> Any:
    """The tree with arrays in place of `Tensor`s; each storage is checked once."""
    cache: dict[str, np.ndarray] = {}

    def fill(node: Any) -> Any:
        if isinstance(node, Tensor):
            key = node.storage.key
            if key not in cache:
                cache[key] = numbers(node.storage)
            return node.of(cache[key])
        if isinstance(node, dict):
            return {k: fill(v) for k, v in node.items()}
        if isinstance(node, list | tuple):
            return [fill(v) for v in node]
        if isinstance(node, unpickle.Record):
            return fill(node.named)
        return node.array if isinstance(node, unpickle.Array) else node

    try:
        return fill(tree)
    except RecursionError as e:
        raise ValueError("is nested too deeply") from e


# ------------------------------------------------------------------------------ writing


def write(
    file: IO[bytes], arrays: Mapping[str, np.ndarray], under: str = "", **others: Any
) -> None:
    """Writes a state dictionary as `torch.save` does; `torch.load(weights_only=True)` reads it.

    Args:
        file: to write to.
        arrays: name -> float32 or int64 array.
        under: a key that holds the arrays, as `model`; empty: the dictionary is the file.
        others: further texts or booleans beside that key.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    pickled = b"".join(_pickled(arrays, under, others))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for i, array in enumerate(arrays.values()):
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            archive.writestr(f"archive/data/{i}", little.tobytes())
        archive.writestr("archive/version", "3\n")


def _pickled(
    arrays: Mapping[str, np.ndarray], under: str, others: Mapping[str, Any]
) -> Iterator[bytes]:
    """The opcodes of pickle's protocol 2: its own pickler would import PyTorch."""
    names = {np.dtype(dtype): f"{name}Storage" for name, dtype in _DTYPES.items()}
    ordered = b"ccollections\nOrderedDict\n)R"
    yield b"\x80\x02"
    if under:
        yield b"}(" + _text(under)
    yield ordered + b"("
    for i, (name, array) in enumerate(arrays.items()):
        yield _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield _text("storage") + f"ctorch\n{names[array.dtype]}\n".encode() + _text(str(i))
        yield _text("cpu") + _whole(array.size) + b"tQ" + _whole(0)
        strides = [step // array.itemsize for step in array.strides]
        for values in (array.shape, strides):
            yield b"(" + b"".join(map(_whole, values)) + b"t"
        yield b"\x89" + ordered + b"tR"  # False: no gradient; no hooks
    yield b"u"
    if under:
        for name, value in others.items():
            yield _text(name) + (_text(value) if isinstance(value, str) else _flag(value))
        yield b"u"
    yield b"."


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _whole(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _flag(value: bool) -> bytes:
    return b"\x88" if value else b"\x89"


def names_of(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Every array in nested dictionaries and lists, by its dotted name."""
    tensors: dict[str, np.ndarray] = collections.OrderedDict()
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, np.ndarray):
            tensors[name] = value
        elif isinstance(value, Mapping | list | tuple):
            tensors |= names_of(value, f"{name}.")  # type: ignore[arg-type]
    return tensors
