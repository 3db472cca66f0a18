"""`config.data.reader=grain`: threads or processes of Grain's fill the batches, in place of ours.

Grain is given the parts of all batches by their number, so that any step is read at once and no
batch depends on how many threads or processes there are.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from selfsup_jax.checks import one_of
from selfsup_jax.data import parts, workers
from selfsup_jax.data.batches import Order
from selfsup_jax.errors import UserError

READERS = ("builtin", "grain")


def rule(value: Any) -> str:
    """The config field's: see `selfsup_jax/checks.py`."""
    # A folder `grain` is no package of that name.
    if value == "grain" and not getattr(importlib.util.find_spec("grain"), "origin", None):
        return "needs the package grain, which is not installed: pip install grain"
    return one_of(READERS)(value)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of all batches, as a source of Grain's; it is sent to its processes.

    Attributes:
        work: what is done with a part.
        layout: of a batch.
        order: which examples the batches have.
        images: see `Source.images`.
        first_step: the step of the first batch.
    """

    work: parts.Decode
    layout: workers.Layout
    order: Order
    images: Any
    first_step: int

    @property
    def slices(self) -> list[slice]:
        """The rows of the parts of each batch."""
        return parts.slices(len(self.order.positions))

    def __len__(self) -> int:
        return len(self.slices) * np.iinfo(np.int32).max  # as many steps as there can be

    def __getitem__(self, number: int) -> tuple[workers.Arrays, parts.Answer]:
        step, part = divmod(number, len(self.slices))
        rows, step = self.slices[part], step + self.first_step
        index = self.order.positions[rows]
        images = self.images[self.order.rows(step)[rows]]
        layout = {
            name: ((parts.IMAGES_AT_ONCE, *shape[1:]), kind)
            for name, (shape, kind) in self.layout.items()
        }
        made = workers.arrays_in(_memories(workers.size_of(layout)).take(layout)[0], layout)
        made = {name: x[: len(index)] for name, x in made.items()}
        return made, self.work(made, step, index, images)


@functools.cache
def _memories(size: int) -> workers.Memories:
    """This process's memory for parts of so many bytes."""
    del size
    return workers.Memories(workers.Memory)


def filled(
    batches: Iterable[Any], source: Parts, processes: int
) -> Iterator[tuple[Any, workers.Arrays, list[tuple[slice, parts.Answer]]]]:
    """Yields each batch, its arrays and what is known of its parts.

    Args:
        batches: what each batch is besides its arrays.
        source: the parts, from the first of these batches on.
        processes: that decode; 0: threads.

    Raises:
        UserError: a process has been killed.
    """
    import grain

    if not flags.FLAGS.is_parsed():  # as in a notebook; Grain looks for its own
        flags.FLAGS.mark_as_parsed()
    ahead = workers.BATCHES_AHEAD * len(source.slices)
    options = grain.ReadOptions(*((1, 1) if processes else (os.cpu_count(), ahead)))
    dataset = grain.MapDataset.source(source).to_iter_dataset(options)
    if processes:
        each = math.ceil(ahead / processes)
        spread = grain.MultiprocessingOptions(processes, per_worker_buffer_size=each)
        dataset = dataset.mp_prefetch(spread, worker_init_fn=_begin)
    memories = workers.Memories(workers.Memory)
    stream = iter(dataset)
    try:
        for batch in batches:
            made = workers.arrays_in(memories.take(source.layout)[0], source.layout)
            answers = []
            for rows in source.slices:
                part, answer = next(stream)
                for name, x in part.items():
                    made[name][rows] = x
                answers.append((rows, answer))
            del part, x  # memory that can be used again
            yield batch, made, answers
            del made
    except RuntimeError as e:
        if "terminated unexpectedly" not in str(e):
            raise
        raise UserError(
            f"config.data.processes={processes}: a process of Grain's, which decodes images, has "
            f"ended ({e}); the same command goes on from the last checkpoint"
        ) from e
    finally:
        stream.close()


def _begin(index: int, count: int) -> None:
    """What each of Grain's processes does first."""
    del index, count
    for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides
        signal.signal(number, signal.SIG_IGN)
    # It draws boxes, on the CPU; another process may have the accelerator to itself.
    jax.config.update("jax_platforms", "cpu")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Grain's processes would outlive one that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
