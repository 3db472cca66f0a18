"""What things cost: each module runs alone, `python -m benchmarks.step`, and prints a table."""
