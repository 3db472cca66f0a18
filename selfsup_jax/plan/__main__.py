"""Where a planned step spends its bytes: `python -m selfsup_jax.plan DIR`.

DIR is the workdir of `run_experiment.py --plan=...`, or a file with a compiled program's text.
"""

from __future__ import annotations

import argparse
import os

from selfsup_jax import paths
from selfsup_jax.command_line import Parser
from selfsup_jax.plan import hlo


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("selfsup_jax.plan", None, __doc__, formatter_class=raw)
    parser.add_argument("program", metavar="DIR")
    parser.add_argument("--lines", type=int, default=30, help="of the table; 0 for all")
    args = parser.parse_args(argv)
    path = args.program
    path = os.path.join(path, "plan.hlo") if paths.isdir(path) else path
    try:
        with paths.open(path, encoding="utf-8") as f:
            text = f.read()
        rows = hlo.bytes_by_line(text)
    except (OSError, ValueError) as e:
        parser.error(f"{path}: no compiled program: {e}")
    total = sum(size for _, size, _ in rows)
    print(f"{total / 2**30:8.2f} GiB  {sum(n for _, _, n in rows):5} kernels  in all")
    for line, size, kernels in rows[: args.lines or None]:
        print(f"{size / 2**30:8.2f} GiB  {kernels:5} kernels  {line}")


if __name__ == "__main__":
    main()
