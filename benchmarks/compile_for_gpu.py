"""Compiles a training step for an NVIDIA H100, without one, and counts the bytes it moves.

    python -m benchmarks.compile_for_gpu --config=configs/byol.py --config.batch_size=256
    python -m benchmarks.compile_for_gpu --config=configs/byol.py:cifar10 --gpus=2 --hlo=step.txt

Needs `jax[cuda13]` (or only its plugin: `jax-cuda13-plugin`, `jax-cuda13-pjrt`), but no GPU and no
driver. Kernels are not autotuned, so the output has no timings: it lists the kernels and the bytes
that each kind reads and writes, which limit a ResNet's step. An array is counted once for each
kernel that reads or writes it; with caches the real traffic may be lower.
"""

from __future__ import annotations

import collections
import os
import re
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import functools

import jax
from absl import app, flags
from jax.experimental import topologies
from ml_collections import config_flags

from benchmarks import report
from selfsup_jax.build import find
from selfsup_jax.plan import hlo

_CONFIG = config_flags.DEFINE_config_file("config", "configs/byol.py")
_JSON = flags.DEFINE_string("json", "", "where to write the same as flat JSON")
_HLO = flags.DEFINE_string("hlo", "", "where to write the compiled program")
_GPUS = flags.DEFINE_integer("gpus", 1, "of one machine; the global batch is spread over them")
_CLASSES = flags.DEFINE_integer("classes", 1000, "of the online probe")

# The device description that XLA needs to compile for an H100.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main(argv: list[str]) -> None:
    """Prints the table."""
    report.refuse_words(argv)
    config, gpus = _CONFIG.value, _GPUS.value
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=_H100, topology=f"1x1x{gpus}"
    )
    method = find(config.method)(config, _CLASSES.value, 1000, 10)
    step = jax.pmap(
        functools.partial(method.train_step, axis_name="devices"),
        axis_name="devices",
        donate_argnums=(0,),
        devices=topology.devices,
    )

    def on_each(x, *, cut: int) -> jax.ShapeDtypeStruct:
        shape = (gpus, x.shape[0] // gpus, *x.shape[1:]) if cut else (gpus, *x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    state = jax.eval_shape(method.init_state, jax.random.PRNGKey(0))
    batch = report.fake_batch(config.batch_size, report.sides(config))
    start = time.perf_counter()
    compiled = step.lower(
        jax.tree.map(functools.partial(on_each, cut=False), state),
        jax.tree.map(functools.partial(on_each, cut=True), batch),
    ).compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if _HLO.value:
        with open(_HLO.value, "w") as f:
            f.write(text)

    moved: collections.Counter = collections.Counter()
    count = 0
    for kernel in hlo.kernels(text):
        moved[re.sub(r"[.\d]+$", "", kernel.name)] += kernel.moved
        count += 1
    rows: list[report.Row] = [
        ("compile, untuned", seconds, "s"),
        ("kernels", count, ""),
        ("bytes moved", moved.total() / 1e9, "GB"),
        ("state, renewed in place", memory.alias_size_in_bytes / 2**30, "GiB"),
        ("temporaries", memory.temp_size_in_bytes / 2**30, "GiB"),
    ]
    rows += [(kind, size / 1e9, "GB") for kind, size in moved.most_common(12)]
    report.show(f"{config.method}, batch {config.batch_size}, for {gpus} x H100", rows, _JSON.value)


if __name__ == "__main__":
    app.run(main)
