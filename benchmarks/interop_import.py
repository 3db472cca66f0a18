"""Seconds and memory of importing a checkpoint of another project.

    python -m benchmarks.interop_import SOURCE

Prints the time from the first look at the file to the written import, and the peak of the process's
memory, of which what Python and its libraries take before is told apart.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time

from selfsup_jax.interop import importing


def peak_megabytes() -> float:
    """Of this process, resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    source = parser.parse_args().source
    size = os.path.getsize(source) / 1e6
    before, started = peak_megabytes(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        importing.save(*importing.read(source), os.path.join(folder, "import"))
    seconds, after = time.perf_counter() - started, peak_megabytes()
    print(
        f"{os.path.basename(source)}: {size:,.0f} MB, {seconds:.1f} s, peak {after:,.0f} MB, "
        f"{after - before:,.0f} MB above the libraries' {before:,.0f}: "
        f"{(after - before) / size:.1f} times the file"
    )


if __name__ == "__main__":
    main()
