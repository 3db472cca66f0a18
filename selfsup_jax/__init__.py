"""Code that all methods share: data, encoders, optimizers, devices, the training loop."""

import os
import time

# Set before TensorFlow is imported: no start-up banners, and no oneDNN, which has nothing to speed
# up because TensorFlow only reads images here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# When the process started: a run logs the time from here to the end of its first step.
STARTED = time.perf_counter()

__version__ = "0.3.0"
