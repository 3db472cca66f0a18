"""Pretraining: the training loop, its monitoring, and sweeps over several recipes."""
