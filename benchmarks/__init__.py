"""Benchmarks. Run one module, such as `python -m benchmarks.step`; it prints a table."""

import selfsup_jax  # noqa: F401 - before jax is imported, as it sets what XLA logs
