"""`run_experiment.py` with the networks of `tiny_runs` in place of BYOL's own.

Other methods have theirs; an encoder of depth 2 has one block.

For tests that start and stop real processes. `TINY_PAUSE` is how long to wait before each step, in
seconds: a signal then comes between the same few steps on any machine. `TINY_EXPIRE` is after how
many seconds the lock of a dead process in a bucket is taken over. The process of
`TINY_HANG=PROCESS:STEP` reads no further data after that step, and waits for ever.
"""

from __future__ import annotations

import os
import threading
import time

told = dict(os.environ)
import tiny_runs  # imports conftest, which makes eight devices  # noqa: E402

os.environ.update(told)

import jax  # noqa: E402
from absl import app  # noqa: E402

import byol_jax.method  # noqa: E402
import run_experiment  # noqa: E402
from selfsup_jax.data import inputs  # noqa: E402
from selfsup_jax.models import resnet  # noqa: E402
from selfsup_jax.run import lock  # noqa: E402

train_batches = inputs.train_batches


def paused(config, data, first_step):
    for step, batch in enumerate(train_batches(config, data, first_step), start=first_step):
        time.sleep(float(os.environ.get("TINY_PAUSE", "0")))
        if os.environ.get("TINY_HANG") == f"{jax.process_index()}:{step}":
            threading.Event().wait()
        yield batch


if __name__ == "__main__":
    inputs.train_batches = paused
    lock.Timing.expire = float(os.environ.get("TINY_EXPIRE", lock.Timing.expire))
    lock.Timing.renew = lock.Timing.expire / 6
    byol_jax.method.build = tiny_runs.build
    resnet.STAGES[2] = tiny_runs.ONE_BLOCK
    app.run(run_experiment.main, flags_parser=run_experiment.parse_flags)
