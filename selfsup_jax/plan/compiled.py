"""Compiles a training step for chips that are not attached, and reads what it needs."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from selfsup_jax.build import Build
from selfsup_jax.data import inputs, resident
from selfsup_jax.devices import parallel, tpu_flags
from selfsup_jax.errors import UserError
from selfsup_jax.models import encoders
from selfsup_jax.plan import hlo
from selfsup_jax.plan.chips import Pod
from selfsup_jax.plan.estimate import Program


def program(config: Any, build: Build, classes: int | None, pod: Pod) -> Program:
    """The step of a resolved config on a pod; a GPU's is counted before it is compiled."""
    if pod.is_tpu:
        _set_environment()  # first: JAX may load the compiler to look for devices
    config = config.copy_and_resolve_references()
    config.encoder.update(encoders.for_platform(config.encoder, pod.is_tpu))
    method = build(config, classes, 1000, 10)
    state = jax.eval_shape(method.init_state, jax.random.PRNGKey(0))
    batch, crop = _batch(config, classes), None
    if config.data.crop_on == "device":
        crop = functools.partial(
            resident.crop_batch, specs=inputs.crop_specs(config), seed=config.seed
        )

    def step(state: Any, batch: Any, *, axis_name: str | None) -> Any:
        if crop is not None:
            batch = crop(None, state.step, batch)
        return method.train_step(state, batch, axis_name=axis_name)

    if pod.is_tpu:
        return _on_tpu(step, state, batch, pod)
    return _on_gpu(step, state, batch, pod)


def _batch(config: Any, classes: int | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch: uint8 views or whole images, and each example's place in it."""
    size = config.batch_size

    def pixels(side: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8)

    index = jax.ShapeDtypeStruct((size,), jnp.int32)
    labels = {"label": index} if classes else {}
    if config.data.crop_on == "device":
        sizes = jax.ShapeDtypeStruct((size, 2), jnp.int32)
        image = {"image": pixels(config.data.canvas), "size": sizes, "drawn": index}
        return {"index": index} | image | labels
    sides = [spec.size for spec in inputs.crop_specs(config)]
    views = {f"view_{number}": pixels(side) for number, side in enumerate(sides, 1)}
    return {"index": index} | views | labels


def bytes_of(tree: Any) -> float:
    """Bytes of the arrays of a tree of shapes."""
    return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _on_tpu(train_step: Any, state: Any, batch: Any, pod: Pod) -> Program:
    devices = _devices(pod)

    def on_each(x: Any, parts: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(devices), x.shape[0] // parts, *x.shape[1:]), x.dtype)

    state_on_each = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype), state
    )
    batch_on_each = jax.tree.map(lambda x: on_each(x, len(devices)), batch)
    step: Any = parallel.step_over_devices(train_step, "pmap", devices)
    start = time.perf_counter()
    try:
        compiled = step.lower(state_on_each, batch_on_each).compile()
    except jax.errors.JaxRuntimeError as e:
        needed = re.search(r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm", str(e))
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        message = str(e).splitlines()[0] if needed is None else needed[0]
        nothing = hlo.Collectives({}, 0.0)
        arguments = bytes_of(state) + bytes_of(batch) / pod.chips
        seconds = time.perf_counter() - start
        return Program(0.0, None, 0.0, arguments, None, nothing, seconds, shortage=message)
    seconds = time.perf_counter() - start
    cost, memory, text = compiled.cost_analysis(), compiled.memory_analysis(), compiled.as_text()
    return Program(
        flops=cost["flops"],
        moved=cost["bytes accessed"],
        arrays=float(sum(kernel.moved for kernel in hlo.kernels(text))),
        arguments=memory.argument_size_in_bytes,
        # The new state takes the old one's place, except for what is not donated.
        temporaries=memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes,
        collectives=hlo.collectives(text, pod.chips),
        seconds=seconds,
        text=text,
    )


def _set_environment() -> None:
    """What the TPU's compiler reads when it is loaded."""
    # Without these it asks Google's servers about the machine that it runs on.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    tpu_flags.set_flags()


def _devices(pod: Pod) -> Any:
    """Descriptions of the pod's chips, from the TPU's compiler.

    Raises:
        UserError: it is not installed, or knows no such pod.
    """
    options = {"chip_config_name": "megacore"} if pod.kind == "v4" else {}
    with _one_line(pod):
        topology = topologies.get_topology_desc(platform="tpu", topology_name=pod.name, **options)
    return topology.devices


@contextlib.contextmanager
def _one_line(pod: Pod) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        text = " ".join(str(e).split())
        if "libtpu" in text or isinstance(e, ImportError):
            text = "needs the TPU's compiler: pip install libtpu"
        raise UserError(f"--plan={pod.name}: {text[:300]}") from e


def _on_gpu(train_step: Any, state: Any, batch: Any, pod: Pod) -> Program:
    def part(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0] // pod.chips, *x.shape[1:]), x.dtype)

    batch = jax.tree.map(part, batch)
    start = time.perf_counter()
    traced = jax.jit(lambda s, b: train_step(s, b, axis_name=None)).trace(state, batch)
    lowered = traced.lower(lowering_platforms=("cuda",))
    seconds = time.perf_counter() - start
    share = (pod.chips - 1) / pod.chips
    gradients = bytes_of(state.online_params)
    return Program(
        flops=lowered.cost_analysis()["flops"],
        moved=None,
        arrays=_moved_by_products(lowered.as_text()),
        arguments=bytes_of(state) + bytes_of(batch),
        temporaries=None,
        collectives=hlo.Collectives({}, 2 * share * gradients),
        seconds=seconds,
    )


def _moved_by_products(text: str) -> float:
    """Bytes of the operands and results of each convolution and matmul of a program."""
    total = 0
    for line in text.splitlines():
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line:
            for shape in re.findall(r"tensor<([^>]*)>", line.rpartition(" : ")[2]):
                *dims, kind = shape.split("x")
                total += hlo.size_of(f"{kind.replace('i1', 'pred')}[{','.join(dims)}]")
    return float(total)
