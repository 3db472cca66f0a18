"""Reads the text of a compiled XLA program: bytes by line of the source, and collectives."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_KERNELS = (
    *("fusion", "custom-call", "copy", "copy-start", "slice-start", "sort", "while"),
    *("convolution", "dot", "reduce"),
)
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*?)\)(?:,|$)")


class Instruction(NamedTuple):
    """One instruction of a program's entry computation.

    Attributes:
        name: such as `fusion.12`.
        operation: such as `fusion`, `custom-call`, `all-reduce`.
        operands: names of the instructions whose results it takes.
        moved: bytes that it reads from, and writes to, the device's main memory.
        line: the whole text.
    """

    name: str
    operation: str
    operands: list[str]
    moved: int
    line: str


def instructions(hlo: str) -> Iterator[Instruction]:
    """Yields the instructions of the entry computation, parameters and constants too."""
    sizes: dict[str, int] = {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, shape, operation, operands = match.groups()
        if operation == "custom-call":
            shape = re.sub(r"u8\[\d+\]", "", shape)  # without its scratch space
        names = re.findall(r"%([\w.\-]+)", operands)
        sizes[name] = size_of(shape, on_chip=False)
        moved = sizes[name] + sum(sizes.get(operand, 0) for operand in names)
        if operation == "copy-start":  # its result lists both sides
            moved = sizes[name]
        elif operation == "slice-start":  # ((whole array), slice, ...)
            moved = size_of(shape.partition("), ")[2])
        yield Instruction(name, operation, names, moved, line)


def kernels(hlo: str) -> Iterator[Instruction]:
    """Yields the instructions that read and write memory."""
    return (i for i in instructions(hlo) if i.operation in _KERNELS)


def size_of(shape: str, on_chip: bool = True) -> int:
    """Bytes of `bf16[2,64]{1,0:T(8,128)}` or of a tuple of such.

    Args:
        shape: as in the program's text.
        on_chip: also count arrays outside the main memory, `S(1)` and others in their layout.
    """
    return sum(
        _BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims, layout in _ARRAY.findall(shape)
        if on_chip or "S(" not in layout
    )


def bytes_by_line(hlo: str, within: str = "_jax/") -> list[tuple[str, int, int]]:
    """Bytes that kernels read and write, by the line of our source that asked for them.

    An array counts once for each kernel that reads or writes it. A fused kernel counts for the
    line of its last operation, a copy for the kernel that takes it. Of the frames of an operation's
    traceback the innermost one counts whose path contains `within`.

    Returns:
        (file:line, bytes, kernels), most bytes first.
    """
    frames = _stack_frames(hlo, within)
    users: dict[str, Instruction] = {}
    for instruction in instructions(hlo):
        for operand in instruction.operands:
            users.setdefault(operand, instruction)

    def line_of(instruction: Instruction) -> str:
        for _ in range(8):  # a copy's start, its end, a bitcast, ...
            if match := re.search(r"stack_frame_id=(\d+)", instruction.line):
                return frames.get(int(match[1]), "elsewhere")
            if match := re.search(r'source_file="([^"]+)" source_line=(\d+)', instruction.line):
                return f"{_short(match[1])}:{match[2]}"
            if instruction.name not in users:
                break
            instruction = users[instruction.name]
        return "elsewhere"

    moved: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for kernel in kernels(hlo):
        line = line_of(kernel)
        moved[line] += kernel.moved
        count[line] += 1
    return [(line, size, count[line]) for line, size in moved.most_common()]


def _short(path: str) -> str:
    """The path from the package on: `/any/where/selfsup_jax/method.py` -> `selfsup_jax/...`."""
    parts = path.split("/")
    starts = [i for i, part in enumerate(parts) if part.endswith("_jax")]
    return "/".join(parts[starts[-1] :]) if starts else path


def _stack_frames(hlo: str, within: str) -> dict[int, str]:
    """From the tables at a program's start: frame -> `file:line` of its innermost frame of ours."""
    tables: dict[str, dict[int, str]] = {}
    for name in ("FileNames", "FileLocations", "StackFrames"):
        match = re.search(rf"^{name}\n((?:\d+ .*\n)+)", hlo, re.M)
        rows = match[1].splitlines() if match else []
        tables[name] = {int(row.split(" ", 1)[0]): row.split(" ", 1)[1] for row in rows}

    def field(row: str, name: str) -> int:
        match = re.search(rf"{name}=(\d+)", row)
        return int(match[1]) if match else 0

    # Some versions write a parent as one more than its number.
    more = field(tables["StackFrames"].get(1, ""), "parent_frame_id")
    lines: dict[int, str] = {}
    for frame in sorted(tables["StackFrames"]):
        at = frame
        while at in tables["StackFrames"]:
            row = tables["StackFrames"][at]
            location = tables["FileLocations"].get(field(row, "file_location_id"), "")
            path = tables["FileNames"].get(field(location, "file_name_id"), '""').strip('"')
            if within in path:
                lines[frame] = f"{_short(path)}:{field(location, 'line')}"
                break
            at = field(row, "parent_frame_id") - more
    return lines


class Collectives(NamedTuple):
    """What a step says to other chips.

    Attributes:
        counts: operation -> number.
        sent: bytes that each chip sends, at least, by the best known algorithms.
    """

    counts: dict[str, int]
    sent: float


def collectives(hlo: str, devices: int) -> Collectives:
    """Counts a program's collectives; an asynchronous one counts once, at its start."""
    counts: collections.Counter[str] = collections.Counter()
    sent = 0.0
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        operation = match[3].removesuffix("-start") if match else ""
        if not match or operation not in _COLLECTIVES:
            continue
        counts[operation] += 1
        among = _group_size(line, devices)
        # The result of a start has operands and results.
        size = size_of(match[2]) / (2 if match[3].endswith("-start") else 1)
        share = (among - 1) / among
        times = {"all-reduce": 2 * share, "reduce-scatter": among * share, "collective-permute": 1}
        sent += size * times.get(operation, share)
    return Collectives(dict(counts), sent)


def _group_size(line: str, devices: int) -> int:
    """Of `replica_groups={{0,1},{2,3}}` or `replica_groups=[2,2]<=[4]`."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    return devices
