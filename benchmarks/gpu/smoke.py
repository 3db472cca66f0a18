"""One float32 step of each method, compared with the same step on another machine.

In the project's root:

    JAX_PLATFORMS=cpu python -m benchmarks.gpu.smoke save smoke.npz    # the reference
    python -m benchmarks.gpu.smoke check smoke.npz --steps=20          # on the accelerator

The step is that of the `cifar10` preset (ResNet-18, 32 px, augmentation on the device, online
probe) at batch 16, with matmuls in full precision and fixed seeds. `save` writes the loss and, for
every updated array, its norm, the norm of its change, and some of its values and changes. `check`
compares them and then runs some bfloat16 steps. It exits with status 1 if a difference is above its
bound or a loss is not finite.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from typing import Any

import jax
import numpy as np

BATCH, SIZE, SAMPLE = 16, 32, 64
# Relative differences allowed for rounding: backends sum in different orders, and a change is a
# small difference of large numbers, because batch norm removes the mean of its gradient.
BOUNDS = {"loss": 1e-4, "norms": 1e-3, "values": 1e-3, "changes": 2e-2}


def build(name: str, width: float, dtype: str) -> Any:
    """Builds a method. All residual branches have gradients; MoCo has two batch-norm groups."""
    config = importlib.import_module(f"configs.{name}").get_config("cifar10")
    config.batch_size, config.compute_dtype, config.encoder.width = BATCH, dtype, width
    config.encoder.zero_init_gamma = False
    config.bn_groups = 2 if name == "moco" else 1
    return importlib.import_module(f"{name}_jax.method").build(
        config.copy_and_resolve_references(), 10, 1000, 0
    )


def batch() -> dict[str, np.ndarray]:
    """Smooth random images with labels, in the format of the training loop."""
    rng = np.random.default_rng(0)
    made = {}
    for i in (1, 2):
        coarse = rng.integers(0, 256, (BATCH, SIZE // 8, SIZE // 8, 3))
        noise = rng.integers(-20, 21, (BATCH, SIZE, SIZE, 3))
        made[f"view_{i}"] = np.clip(coarse.repeat(8, 1).repeat(8, 2) + noise, 0, 255).astype(
            np.uint8
        )
    return made | {
        "index": np.arange(BATCH, dtype=np.int32),
        "label": rng.integers(0, 10, BATCH).astype(np.int32),
    }


def compiled_step(method: Any) -> tuple[Any, Any, float]:
    """(state, compiled step, seconds of compilation)."""
    state = jax.jit(method.init_state)(jax.random.PRNGKey(0))

    def step(state, batch):
        state, metrics = method.train_step(state, batch, axis_name=None)
        return state, metrics["loss"]

    start = time.perf_counter()
    compiled = jax.jit(step).lower(state, batch()).compile()
    return state, compiled, time.perf_counter() - start


def arrays(state: Any) -> dict[str, np.ndarray]:
    """Path -> float32 array of a state, as float64."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
    named = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return {name: x.astype(np.float64) for name, x in named.items() if x.dtype == np.float32}


def record(name: str, width: float) -> dict[str, np.ndarray]:
    """The saved values of a method's first step: one array per kind, all leaves concatenated."""
    state, step, seconds = compiled_step(build(name, width, "float32"))
    start = time.perf_counter()
    after, loss = step(state, batch())
    before, after = arrays(state), arrays(after)
    times = f"compiled in {seconds:.1f} s, first run {time.perf_counter() - start:.2f} s"
    print(f"{name}: float32 step {times}, loss {float(loss):.6f}", flush=True)

    def sample(x: np.ndarray) -> np.ndarray:
        flat = x.ravel()
        return flat[np.linspace(0, flat.size - 1, min(SAMPLE, flat.size)).astype(int)]

    change = {key: after[key] - before[key] for key in after}
    norms = [[np.linalg.norm(after[key]), np.linalg.norm(change[key])] for key in after]
    return {
        f"{name}/loss": np.asarray(float(loss)),
        f"{name}/norms": np.asarray(norms),
        f"{name}/starts": np.concatenate([sample(x) for x in before.values()]),
        f"{name}/values": np.concatenate([sample(x) for x in after.values()]),
        f"{name}/changes": np.concatenate([sample(x) for x in change.values()]),
    }


def difference(got: np.ndarray, reference: np.ndarray) -> float:
    """The norm of the difference, relative to the reference."""
    return float(np.linalg.norm(got - reference) / np.linalg.norm(reference))


def compare(name: str, got: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> bool:
    """Prints the relative differences of a method; returns whether all are within their bounds."""
    pairs = {
        kind: (got[f"{name}/{kind}"], reference[f"{name}/{kind}"]) for kind in (*BOUNDS, "starts")
    }
    if difference(*pairs["starts"]) > 1e-5:
        print(f"{name}: the initial states differ by {difference(*pairs['starts']):.1e}: stopped")
        return False
    fine = True
    for kind, bound in BOUNDS.items():
        error = difference(*pairs[kind])
        good = error <= bound  # False for NaN
        fine &= good
        verdict = "" if good else "  TOO LARGE"
        print(f"{name}: {kind:8s} relative difference {error:.2e} (bound {bound:.0e}){verdict}")
    norms, expected = pairs["norms"]
    worst = np.abs(norms - expected) / np.maximum(np.abs(expected), 1e-6 * np.abs(expected).max(0))
    of_norm, of_change = worst.max(axis=0)
    print(f"{name}: worst array: norm {of_norm:.2e}, norm of its change {of_change:.2e}")
    return fine


def run_steps(name: str, width: float, steps: int, dtype: str) -> bool:
    """Runs some steps on one batch; returns whether every loss is finite."""
    state, step, seconds = compiled_step(build(name, width, dtype))
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        state, loss = step(state, batch())
        losses.append(float(loss))
    spent = time.perf_counter() - start
    finite = bool(np.isfinite(losses).all())
    print(
        f"{name}: {dtype} compiled in {seconds:.1f} s, {steps} steps in {spent:.2f} s, "
        f"loss {losses[0]:.4f} -> {losses[-1]:.4f}{'' if finite else '  NOT FINITE'}",
        flush=True,
    )
    return finite


def main() -> None:
    """Saves the reference, or checks against it."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("command", choices=("save", "check"))
    parser.add_argument("reference", help=".npz file")
    parser.add_argument("--methods", nargs="+", default=["byol", "moco", "simclr"])
    parser.add_argument(
        "--width", type=float, default=1.0, help="of the ResNet-18; the same in both commands"
    )
    parser.add_argument("--steps", type=int, default=20, help="after the comparison")
    parser.add_argument("--dtype", default="bfloat16", help="of those steps")
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}", flush=True)
    with jax.default_matmul_precision("highest"):
        records = [record(name, args.width) for name in args.methods]
    if args.command == "save":
        np.savez_compressed(
            args.reference, **{key: value for part in records for key, value in part.items()}
        )
        return
    with np.load(args.reference) as file:
        reference = dict(file)
    fine = [compare(name, got, reference) for name, got in zip(args.methods, records, strict=True)]
    fine += [
        run_steps(name, args.width, args.steps, args.dtype) for name in args.methods if args.steps
    ]
    print("smoke: all good" if all(fine) else "smoke: FAILED")
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
