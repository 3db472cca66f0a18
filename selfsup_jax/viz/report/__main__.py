"""The command line of this package's docstring."""

from __future__ import annotations

import argparse
import sys

from selfsup_jax.errors import UserError
from selfsup_jax.viz.report.page import write


def main() -> int:
    """Writes the page. Returns 0 or, after one line on stderr about a user's mistake, 2."""
    parser = argparse.ArgumentParser(
        prog="python -m selfsup_jax.viz.report",
        description="Writes one HTML page on pretraining runs, evaluation jobs and studies.",
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="or a folder of workdirs")
    parser.add_argument("--output", default="report.html", help="the page (%(default)s)")
    parser.add_argument("--title", help="of the page; by default the methods and the data")
    args = parser.parse_args()
    try:
        print(write(args.workdirs, args.output, args.title))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
