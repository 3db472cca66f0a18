"""One self-contained HTML page on runs and what was found out about them.

    python -m selfsup_jax.viz.report WORKDIR... [--output=report.html] [--title=TITLE]

Each WORKDIR is that of a pretraining run, an evaluation job or a study, or a folder of these. The
page needs no network and no other file.
"""

from selfsup_jax.viz.report.page import write

__all__ = ["write"]
