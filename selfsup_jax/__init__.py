"""Machinery that the methods share: data, encoders, optimizers, devices, the loop."""

import os
import time

# Before anything imports TensorFlow: its start-up banners are no news to the reader of a run. It
# only feeds images here, so that oneDNN has nothing to speed up.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# What "the start" is where a run says how long its first step took to come.
STARTED = time.perf_counter()

__version__ = "0.1.0"
