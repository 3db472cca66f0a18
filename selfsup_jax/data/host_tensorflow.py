"""TensorFlow, set up to read images on the CPU; imported only by modules that read data."""

from __future__ import annotations

import logging

import tensorflow as tf

# tf.data runs on the CPU; the accelerators and their memory are for JAX.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")
# TFDS uses deprecated parts of TensorFlow; users can't change that, so the warnings are hidden.
tf.get_logger().setLevel(logging.ERROR)

__all__ = ["tf"]
