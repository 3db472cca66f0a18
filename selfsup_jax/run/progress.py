"""The terminal output of a run: the live progress line, and single messages."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TextIO

import jax
import numpy as np

from selfsup_jax.devices import hosts


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`; at most two units."""
    whole = round(seconds)
    days, rest = divmod(whole, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class _Line:
    """One line that is updated in place on a terminal, else plain lines; only one host prints."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream or sys.stderr
        self.live = self._stream.isatty()
        self.quiet = not hosts.is_writer()
        self._width = 0

    def show(self, text: str) -> None:
        """Shows the text in place of the last one."""
        if self.quiet:
            return
        self._stream.write("\r" + text.ljust(self._width) if self.live else text + "\n")
        self._stream.flush()
        self._width = len(text)

    def end(self) -> None:
        """The next output begins on a new line."""
        if self.live and self._width and not self.quiet:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0


class Progress:
    """The line about a training, its rates and its messages.

    Args:
        total: steps of the whole run.
        first_step: steps done before this process began.
        images_per_step: global batch size.
        knn_k: neighbours of the kNN accuracy, if there is one.
        stream: where to write; stderr by default.
    """

    def __init__(
        self,
        total: int,
        first_step: int,
        images_per_step: int,
        knn_k: int | None = None,
        stream: TextIO | None = None,
    ):
        self._shown = {"top1": "top-1", "probe_top1": "probe"}
        self._shown["knn_top1"] = f"kNN (k {knn_k})" if knn_k else "kNN"
        self._total = total
        self._images_per_step = images_per_step
        self._line = _Line(stream)
        self._last = self._start = (time.perf_counter(), first_step)
        self._counted_steps = 0
        self._counted_seconds = 0.0
        self._advised = False

    @property
    def images_per_second(self) -> float:
        """The mean over all intervals shown so far, without pauses; 0 before the first."""
        if not self._counted_seconds:
            return 0.0
        return self._counted_steps * self._images_per_step / self._counted_seconds

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent in this block from the measured rates."""
        start = time.perf_counter()
        yield
        paused = time.perf_counter() - start
        self._last = (self._last[0] + paused, self._last[1])
        self._start = (self._start[0] + paused, self._start[1])

    def restart(self, step: int) -> None:
        """Restarts the measurement at `step`: after the first step, which includes compilation."""
        self._last = self._start = (time.perf_counter(), step)

    def expectation(self, step: int) -> str:
        """A message with the rate since the last restart, and the remaining time at this rate."""
        seconds, steps = time.perf_counter() - self._start[0], step - self._start[1]
        rate = steps * self._images_per_step / max(seconds, 1e-9)
        left = (self._total - step) * seconds / max(steps, 1)
        return (
            f"{rate:,.0f} images/s: about {format_seconds(left)} ({left / 3600:.2g} hours) to go, "
            "evaluation not counted"
        )

    def show(
        self, step: int, metrics: Mapping[str, float], waited: float | None = None
    ) -> dict[str, float]:
        """Shows step, rate, ETA, loss, accuracies, and whether the devices wait for images.

        Args:
            step: the current step.
            metrics: of this step.
            waited: seconds since the last line in which the devices had no batch, if known.

        Returns:
            `images_per_second` since the last line, and `input_wait`, the share of that time in
            which the devices had no batch; empty without a step since.
        """
        now = time.perf_counter()
        seconds, steps = now - self._last[0], step - self._last[1]
        self._last = (now, step)
        timings: dict[str, float] = {}
        if steps > 0:
            self._counted_seconds += seconds
            self._counted_steps += steps
            rate = steps * self._images_per_step / max(seconds, 1e-9)
            timings = {"images_per_second": rate}
            if waited is not None:
                timings["input_wait"] = min(waited / max(seconds, 1e-9), 1.0)
        parts = [f"step {step}/{self._total} ({100 * step // max(1, self._total)}%)"]
        if self._counted_steps:
            left = (self._total - step) * self._counted_seconds / self._counted_steps
            rate = timings.get("images_per_second", 0.0)
            parts += [f"{rate:,.0f} images/s", f"ETA {format_seconds(left)}"]
        parts.append(f"loss {metrics['loss']:.4f}")
        for name, shown in self._shown.items():
            if name in metrics:
                parts.append(f"{shown} {100 * metrics[name]:.1f}%")
        if timings.get("input_wait", 0.0) > 0.05:
            parts.append(f"waits for images {timings['input_wait']:.0%} of the time")
            if self._counted_seconds > 10 and not self._advised:  # not because of a slow start
                self._advised = True
                self.announce(
                    "the devices wait for images: with --config.data.crop_on=device the host has "
                    "half the work; else it needs more cores (of more than 8, "
                    "--config.data.processes makes use), or smaller files"
                )
        self._line.show("  ".join(parts))
        return timings

    def announce(self, message: str) -> None:
        """Prints a message on its own line; the live line continues below it."""
        self.close()
        log(message)

    def close(self) -> None:
        """Ends the live line, so that the next output begins on a new line."""
        self._line.end()


def counted(
    batches: Iterable[dict[str, np.ndarray]],
    total: int,
    what: str,
    every: float = 10.0,
    stream: TextIO | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the same batches, and shows how many of the examples have been yielded.

    Args:
        batches: those of this host; each has "label".
        total: number of examples, over all hosts.
        what: a name for the examples in the output.
        every: seconds between lines if there is no terminal; on a terminal, one line is updated.
        stream: where to write; stderr by default.
    """
    line = _Line(stream)
    start = shown = time.perf_counter()
    count = 0
    for batch in batches:
        yield batch
        count += len(batch["label"]) * jax.process_count()  # hosts have equal parts
        now = time.perf_counter()
        if now - shown < (0.2 if line.live else every):
            continue
        shown = now
        rate = count / (now - start)
        left = format_seconds(max(0, total - count) / rate)
        line.show(f"{what}: {count:,}/{total:,}  {rate:,.0f} images/s  ETA {left}")
    line.show(f"{what}: {total:,} images in {format_seconds(time.perf_counter() - start)}")
    line.end()


def log(message: str) -> None:
    """Prints a line to stderr, from one host only."""
    if hosts.is_writer():
        print(message, file=sys.stderr, flush=True)
