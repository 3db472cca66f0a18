"""Benchmarks. Run one module, such as `python -m benchmarks.step`; it prints a table."""
