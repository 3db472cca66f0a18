"""The variables of a TensorFlow checkpoint, of versions 1 and 2."""

from __future__ import annotations

import numpy as np

from selfsup_jax.data.host_tensorflow import tf
from selfsup_jax.errors import first_line


def read(prefix: str) -> dict[str, np.ndarray]:
    """Name -> array of all numeric variables.

    Args:
        prefix: the path of the checkpoint's files without `.index` and `.data-00000-of-00001`.

    Raises:
        ValueError: the files are damaged.
    """
    try:
        reader = tf.train.load_checkpoint(prefix)
        dtypes = reader.get_variable_to_dtype_map()
        numeric = [name for name, dtype in dtypes.items() if dtype.is_floating or dtype.is_integer]
        return {name: reader.get_tensor(name) for name in sorted(numeric)}
    except Exception as e:  # TensorFlow raises many types
        raise ValueError(f"is truncated or damaged: {first_line(e)[:100]}") from e
