"""From a data set's name to batches of `uint8` crops. TensorFlow lives here only."""

import logging

import tensorflow as tf

# tf.data runs on the CPU; the accelerators and their memory are JAX's.
tf.config.set_visible_devices([], "GPU")
tf.config.set_visible_devices([], "TPU")
# TFDS uses what TensorFlow calls deprecated; nobody who runs an experiment can mend that.
tf.get_logger().setLevel(logging.ERROR)
