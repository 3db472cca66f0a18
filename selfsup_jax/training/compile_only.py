"""`--compile_only`: compiles what a run needs on the attached devices, and trains nothing."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from selfsup_jax.data import inputs
from selfsup_jax.devices import compiled, parallel
from selfsup_jax.evaluation.features import Extractor
from selfsup_jax.method import Method
from selfsup_jax.run.progress import log
from selfsup_jax.state import encoder_variables
from selfsup_jax.training import calls

_STEP = "training step"


class Compiled(NamedTuple):
    """A line of the table.

    Attributes:
        name: what was compiled.
        timed: see `compiled.Timed`.
        memory: of the program, in bytes a device; None if it is not told.
    """

    name: str
    timed: compiled.Timed
    memory: Any = None


def compile_all(
    config: ConfigDict,
    data: inputs.Data,
    feed: inputs.Feed,
    method: Method,
    extract: Extractor,
) -> list[Compiled]:
    """Compiles the first state, the training step and the features; logs the time of each.

    Each program is the one that the run will ask for, so that it is found where it was kept.
    """
    init = jax.jit(method.init_state)
    state, timed = compiled.timed(lambda: jax.device_get(init(jax.random.PRNGKey(config.seed))))
    rows = [Compiled("first state", timed)]
    variables = encoder_variables(state, config.eval.network)
    on_devices, timed = compiled.timed(lambda: parallel.replicate(lambda s: s, state))
    rows.append(Compiled("state on the devices", timed))

    most = calls.steps_per_call(config, feed)
    first = next(inputs.train_batches(config, data, 0))
    del first["name"]
    call = calls.Call(method.train_step, feed, most)
    program, timed = compiled.timed(lambda: call.compile(on_devices, [first]))
    rows.append(Compiled(_STEP, timed, program.memory_analysis()))
    if data.test is not None:
        settings = config.eval
        one = itertools.islice(
            inputs.eval_batches(config.data, data.test, settings.batch_size)(), 1
        )
        _, timed = compiled.timed(lambda: [x for x, _ in extract.stream(variables, one)])
        rows.append(Compiled("features", timed))
    _announce(rows)
    return rows


def _announce(rows: list[Compiled]) -> None:
    folder = jax.config.values["jax_compilation_cache_dir"]
    log(f"compiled for {jax.device_count()} x {jax.devices()[0].device_kind}; nothing is trained")
    for row in rows:
        line = f"  {row.name:<22}{row.timed.seconds:>8.1f} s"
        if row.timed.found and not row.timed.kept:
            line += "  found"
        if row.memory is not None:
            sizes = [row.memory.argument_size_in_bytes, row.memory.temp_size_in_bytes]
            arguments, temporaries = (size / 2**30 for size in sizes)
            line += f"  arguments {arguments:.2f} + temporaries {temporaries:.2f} GiB a device"
        log(line)
    step = next(row.timed for row in rows if row.name == _STEP)
    if not folder:
        log("not kept: --compilation_cache is empty")
    elif step.found + step.kept:
        log(f"kept in {folder}")
    else:
        log(f"the {_STEP} is not kept: it compiled at once, or is a large one on the CPU, whose")
        log("programs cannot be kept; each start compiles it")
