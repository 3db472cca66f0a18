"""Data sets by name, batches of `uint8` crops, and their augmentation on the device."""
