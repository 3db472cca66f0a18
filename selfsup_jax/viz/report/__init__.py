"""One self-contained HTML page about runs and evaluation jobs; it needs no network."""

from selfsup_jax.viz.report.page import write

__all__ = ["write"]
