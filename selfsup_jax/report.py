"""Writes one self-contained HTML page about runs and their results.

    python -m selfsup_jax.report WORKDIR... [--output=report.html] [--title=TITLE]

A WORKDIR belongs to a pretraining run, an evaluation job or a sweep, or is a folder of these.
"""

from __future__ import annotations

import sys

from selfsup_jax.command_line import Parser, returns_status
from selfsup_jax.viz.report.page import write


@returns_status
def main() -> None:
    """Runs the command in this file's docstring."""
    parser = Parser(
        prog="python -m selfsup_jax.report",
        description="Writes one HTML page on pretraining runs, evaluation jobs and studies.",
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="or a folder of workdirs")
    parser.add_argument("--output", default="report.html", help="the page (%(default)s)")
    parser.add_argument("--title", help="of the page; by default the methods and the data")
    args = parser.parse_args()
    print(write(args.workdirs, args.output, args.title))


if __name__ == "__main__":
    sys.exit(main())
