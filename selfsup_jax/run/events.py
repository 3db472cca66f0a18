"""TensorBoard's event files, written and cut without TensorFlow.

An event file is a sequence of records: length (8 bytes), checksum (4), an `Event`, checksum (4).
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams import summary_v2 as hparams_summary
from tensorboard.plugins.text import summary_v2 as text_summary
from tensorboard.summary.writer.record_writer import RecordWriter

from selfsup_jax import paths
from selfsup_jax.run import files

PATTERN = "events.out.tfevents.*"


class EventWriter:
    """Writes to a new event file in `directory`.

    It has the methods of `clu.metric_writers.MetricWriter` that a run calls, and is no subclass,
    since importing `clu.metric_writers` imports TensorFlow.
    """

    def __init__(self, directory: str):
        now = time.time()
        self._file = _new_file(directory, f"{int(now):010d}.{socket.gethostname()}.{os.getpid()}")
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(wall_time=now, file_version="brain.Event:2"))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the values of a step."""
        summary = summary_pb2.Summary()
        for name, value in scalars.items():
            summary.value.add(tag=name, simple_value=value)
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, `[N, H, W, 3]` uint8 each; several of a name are numbered."""
        summary = summary_pb2.Summary()
        for name, rows in images.items():
            for i, image in enumerate(rows):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                value = summary.value.add(tag=f"{name}/{i}" if len(rows) > 1 else name)
                value.image.height, value.image.width, value.image.colorspace = image.shape
                value.image.encoded_image_string = png.getvalue()
        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts in Markdown."""
        for name, text in texts.items():
            summary = _parsed(text_summary.text_pb(name, text))
            self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the row of TensorBoard's table of runs: numbers, flags and texts by name."""
        summary = _parsed(hparams_summary.hparams_pb(dict(hparams)))
        self._write(event_pb2.Event(wall_time=time.time(), summary=summary))

    def _write(self, event: event_pb2.Event) -> None:
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Returns when all is handed to the operating system, or is in the bucket."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def _parsed(summary: Any) -> Any:
    """TensorBoard makes these with TensorFlow's class, if that is imported."""
    return summary_pb2.Summary.FromString(summary.SerializeToString())


def _new_file(directory: str, name: str) -> IO[bytes]:
    for number in itertools.count():  # several writers of a process may start in the same second
        path = os.path.join(directory, f"events.out.tfevents.{name}.{number}")
        with contextlib.suppress(FileExistsError):
            if paths.is_bucket(path):
                paths.put(path, b"", new=True)
                return files.growing(path)
            return open(path, "xb")
    raise AssertionError


def cut(path: str, last_step: int) -> bool:
    """Removes the events after a step from a file, and what is incomplete or damaged at its end.

    Returns whether it is damaged: more than a last record that was being written.
    """
    with paths.open(path, "rb") as f:
        content = f.read()
    records = list(_records(content))
    kept = [record for record, step in records if step <= last_step]
    if len(kept) <= 1:  # at most the record of the file's version
        paths.remove(path)
    elif sum(map(len, kept)) < len(content):
        _replace(path, b"".join(kept))
    return _is_damaged(content[sum(len(record) for record, _ in records) :])


def rename(path: str, new_name: Callable[[str], str]) -> None:
    """Gives the values in a whole file other names; a file in which none changes is not touched."""
    with paths.open(path, "rb") as f:
        content = f.read()
    renamed, changed = io.BytesIO(), False
    records = RecordWriter(renamed)
    for record, _ in _records(content):
        event = event_pb2.Event.FromString(record[12:-4])
        for value in event.summary.value:
            if not value.HasField("metadata") and new_name(value.tag) != value.tag:
                value.tag, changed = new_name(value.tag), True
        records.write(event.SerializeToString())
    if changed:
        _replace(path, renamed.getvalue())


def _replace(path: str, content: bytes) -> None:
    # After a kill, neither TensorBoard nor `cut` takes this name for an event file.
    partial = os.path.join(os.path.dirname(path), "cut.partial")
    with files.whole_file(path, "wb", partial) as f:
        f.write(content)


def _is_damaged(rest: bytes) -> bool:
    """Whether this is not the beginning of a record."""
    if len(rest) < 12:
        return False
    length, checksum = struct.unpack_from("<QI", rest)
    return checksum != masked_crc32c(rest[:8]) or len(rest) >= length + 16


def _records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields each whole record and its step, up to the first that is not whole."""
    start = 0
    while start + 8 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + 8 + 4 + length + 4
        if not length or end > len(content):  # the process or the machine stopped while it wrote
            return
        record = content[start:end]
        try:
            step = event_pb2.Event.FromString(record[12:-4]).step
        except DecodeError:
            return
        yield record, step
        start = end
