"""Checks the checkpoints of runs: can they be read, and are they what was saved?

    python -m selfsup_jax.verify WORKDIR...

A WORKDIR belongs to a pretraining run, a job or a sweep, or is a folder of these. The command
prints a line for each checkpoint below it, and changes nothing. Exit status: 0 if all are whole,
1 if one is damaged, 2 if a WORKDIR has no checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from selfsup_jax import paths
from selfsup_jax.command_line import Parser, returns_status
from selfsup_jax.errors import UserError
from selfsup_jax.run import checkpoint_files


def verify(workdir: str) -> Iterator[tuple[bool, str]]:
    """Yields whether a checkpoint is whole, and a line about it, for each one below a folder.

    Raises:
        UserError: there is none.
    """
    found = False
    paths.check(workdir, "WORKDIR")
    for folder, names, _ in paths.walk(workdir):
        names.sort()
        for step in checkpoint_files.steps(folder) if "checkpoints" in names else ():
            found = True
            yield _line(os.path.join(folder, "checkpoints", str(step)))
        names[:] = [name for name in names if name != "checkpoints"]
    if not found:
        raise UserError(f"{workdir}: holds no checkpoint")


def _line(path: str) -> tuple[bool, str]:
    try:
        meta, arrays = checkpoint_files.read(path)
    except checkpoint_files.Damaged as e:
        return False, str(e)
    size = f"{len(arrays):,} arrays, {sum(x.nbytes for x in arrays.values()) / 1e6:,.1f} MB"
    if checkpoint_files.has_checksums(meta):
        return True, f"{path}: whole: {size}"
    return True, f"{path}: readable: {size}; an earlier version wrote it, without checksums"


@returns_status
def main() -> int:
    """Runs the command in this file's docstring; returns the exit status."""
    parser = Parser(
        prog="python -m selfsup_jax.verify", description="Checks the checkpoints of runs."
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="or a folder of workdirs")
    whole = True
    for workdir in parser.parse_args().workdirs:
        for good, line in verify(workdir):
            print(line, flush=True)
            whole &= good
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
