"""A run and its directory: checkpoints, metrics, progress, files, signals."""
