"""Machinery that the methods share: data, encoders, optimizers, devices, the loop."""

import os

# Before anything imports TensorFlow: its start-up banner is no news to the reader of a run.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

__version__ = "0.1.0"
