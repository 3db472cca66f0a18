"""Benchmarks for a machine with one accelerator and without network and TensorFlow."""
