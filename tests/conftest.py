"""Simulated devices, tiny networks and tiny batches that the tests share.

Compiling dominates the time of a test on the CPU. So the networks here are as small as they can be
while still having everything that a rule applies to (convolution, batch norm, biases, a probe), and
whatever is compiled is shared through fixtures.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import math
import os
import pathlib
import re
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

# Before JAX is imported: eight devices on the CPU, whatever the machine has. Level 0 compiles
# several times faster. Processes that a test starts have an environment of `process_env`.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The emitters that newer versions have no more compile these programs in a quarter of the time.
    # The tests on the newest versions run with the others.
    os.environ["XLA_FLAGS"] += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # it is not installed: TensorFlow comes without any Keras
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Most of what tests compile, others compile too. The first process makes the folder and removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="selfsup_tests_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the entry point, configs

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from byol_jax import method as byol
from selfsup_jax import optim
from selfsup_jax.data import records
from selfsup_jax.data.augment import Augmentation, ViewAugmentation
from selfsup_jax.method import Context, Method
from selfsup_jax.method import total_loss as total
from selfsup_jax.models.heads import LinearClassifier, MLPHead
from selfsup_jax.models.network import SiameseWithPredictor
from selfsup_jax.models.norm import BatchNorm
from selfsup_jax.models.resnet import Conv
from selfsup_jax.state import Sign

# Tracing makes hundreds of thousands of objects beside the libraries' own, which stay: looking
# through them as often as by default takes a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Nothing is changed but the type: what a step computes can then be restated by hand.
NO_AUGMENTATION = ViewAugmentation(
    flip_prob=0.0, jitter_prob=0.0, grayscale_prob=0.0, blur_prob=0.0, solarize_prob=0.0
)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN_VIEWS = Augmentation({"global": (NO_AUGMENTATION, NO_AUGMENTATION)}, MEAN, STD)
IMAGE_SHAPE = (4, 4, 3)
NUM_CLASSES = 3

# What every method's preset of lightly's CIFAR-10 benchmark has.
LIGHTLY = {
    "epochs": 200,
    "batch_size": 128,
    "data.resize_method": "bilinear",
    "views.global.area": (0.08, 1.0),
    "views.mean": (0.485, 0.456, 0.406),
    "views.std": (0.229, 0.224, 0.225),
    "encoder.kernel_init": "torch",
    "encoder.zero_init_gamma": False,
    "encoder.bn_unbiased_average": True,
    "projector.linear_init": "torch",
    "optimizer.exclude": (),
}


class TinyEncoder(nn.Module):
    """One convolution with batch norm, then the mean over the map; the fields as ResNet's."""

    num_features: int = 4
    dtype: Any = np.float32

    @nn.compact
    def __call__(self, x, layout=None):
        x = Conv(self.num_features, 3, name="conv")(x)
        x = BatchNorm(name="bn")(x, layout)
        return nn.relu(x).mean((1, 2))


def tiny_networks(classes: int | None = NUM_CLASSES) -> SiameseWithPredictor:
    """BYOL's networks with a few hundred parameters in all."""
    head = functools.partial(MLPHead, hidden_sizes=(12,), output_size=3, linear_init="lecun")
    return SiameseWithPredictor(
        encoder=TinyEncoder(),
        projector=head(),
        predictor=head(),
        classifier=LinearClassifier(classes) if classes else None,
    )


def random_batch(size: int, seed: int, labels: bool = True) -> dict[str, np.ndarray]:
    """A global batch in the pipeline's form: each image a colour of its own, under noise."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(0, 200, (size, 1, 1, 3))
    batch = {
        f"view_{i}": (colors + rng.integers(0, 56, (size, *IMAGE_SHAPE))).astype(np.uint8)
        for i in (1, 2)
    }
    batch["index"] = np.arange(size, dtype=np.int32)
    if labels:
        batch["label"] = rng.integers(0, NUM_CLASSES, size).astype(np.int32)
    return batch


def flatten(tree, prefix: str = "") -> dict[str, np.ndarray]:
    """`{"a/b": leaf}` of nested dictionaries, as NumPy arrays."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        prefix + "/".join(str(getattr(k, "key", k)) for k in path): np.asarray(leaf)
        for path, leaf in paths
    }


def assert_same(a, b) -> None:
    """Two trees are equal bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, x in flatten(a).items():
        np.testing.assert_array_equal(x, flatten(b)[path], err_msg=path)


def assert_close(a, b, relative: float = 1e-5, floor: float = 1e-6) -> None:
    """Each leaf of `a` is that of `b`, up to `relative` of the leaf's largest value.

    A leaf smaller than `floor` counts as one of that size, and a hidden layer's bias as 1: batch
    norm takes it out again, so that its gradient is zero but for rounding.
    """
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        smallest = 1.0 if path.endswith("hidden/bias") else floor
        error = np.max(np.abs(a[path] - b[path]), initial=0.0)
        allowed = relative * max(np.max(np.abs(b[path]), initial=0.0), smallest)
        assert error <= allowed, f"{path}: differs by {error}, above {allowed}"


def messages(lowered) -> dict[str, list[int]]:
    """How many numbers a device puts into each exchange with others, of a lowered function."""
    found: dict[str, list[int]] = {}
    kinds = r"stablehlo\.(all_\w+|collective_\w+|reduce_scatter)\""
    sent = re.findall(kinds + r".*?: \(tensor<([\dx]*)", lowered.as_text(), re.DOTALL)
    for name, size in sent:
        found.setdefault(name, []).append(math.prod(int(n) for n in size.split("x") if n))
    return found


def tiny_method(
    networks: SiameseWithPredictor, *, schedule=None, eta=0.2, decay=0.05, **changes
) -> Method:
    """BYOL with LARS, in large steps."""
    schedule = schedule or optax.constant_schedule(0.5)
    optimizer = optim.make_optimizer(
        schedule,
        momentum=0.9,
        weight_decay=decay,
        exclude=("bias$", "scale$"),
        trust_coefficient=eta,
    )
    start = functools.partial(byol.start, image_shape=IMAGE_SHAPE, target_parts=byol.TARGET_PARTS)
    arguments = {
        "network": networks,
        "loss": byol.loss,
        "start": start,
        "optimizer": optimizer,
        "schedule": schedule,
        "tau": lambda step: 0.9,
        "augment": PLAIN_VIEWS,
    }
    return Method(**(arguments | changes))


def tiny_step(networks: SiameseWithPredictor, **changes):
    """(the step of `tiny_method`, its optimizer)."""
    made = tiny_method(networks, **changes)
    return made.train_step, made.optimizer


def with_network(made: Method, **parts) -> Method:
    """The method with other parts in its network."""
    return dataclasses.replace(made, network=made.network.clone(**parts))


@dataclasses.dataclass
class StandIn:
    """What the loop needs of a method, for methods that are none."""

    init_state: Callable
    train_step: Callable
    represent: Callable = lambda variables, images: images
    augment: Augmentation = PLAIN_VIEWS
    pairs: tuple[tuple[int, int], ...] = ((0, 1), (1, 0))
    notes: tuple[str, ...] = ()
    signs: tuple[Sign, ...] = ()


def total_loss(made: Method, state, views, labels, **context):
    """`(online params, target params) -> (loss, Loss)` of normalised views `[2, B, ...]`."""
    given = {"rng": state.rng, "index": np.arange(views.shape[1]), "groups": 1, "axis_name": None}
    context = Context(**(given | context))

    def loss(online_params, target_params):
        online = {"params": online_params, "batch_stats": state.online_stats}
        target = {"params": target_params, "batch_stats": state.target_stats}
        return total(made, online, target, {"global": views}, labels, state, context)

    return loss


def replicated(tree, devices: int, axis_name: str):
    """A copy for each of the first `devices`, laid out as `pmap` over that axis leaves its results.

    With another layout a step would be compiled a second time at its second call.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (axis_name,))
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis_name))
    copies = jax.tree.map(lambda x: np.broadcast_to(x, (devices, *np.shape(x))), tree)
    return jax.device_put(copies, layout)


def process_env(devices: int = 1) -> dict[str, str]:
    """The environment of a process that a test starts: on the CPU, with so many devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return os.environ | {"XLA_FLAGS": flags}


# Where one test takes long: not at the end, when another process has nothing left to do.
FIRST = ("test_notebook", "test_accelerator", "test_without_tensorflow", "test_vit", "test_jobs")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in FIRST)  # stable: a file's tests stay together


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs before they have all the mappings that Linux gives to a process.

    Each has several, and the compiler crashes where there are no more (65,530 by default).
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def index_folder(tmp_path_factory):
    """No test leaves an index of its data in the user's own folder."""
    folder = tmp_path_factory.mktemp("indices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "kept_in", lambda: str(folder))
        yield


@pytest.fixture(scope="session")
def networks() -> SiameseWithPredictor:
    return tiny_networks()


@pytest.fixture(scope="session")
def initial_state(networks):
    """A state before its first update, its `opt_state` still empty."""
    start = tiny_method(networks).start
    return jax.device_get(jax.jit(lambda rng: start(rng, networks))(jax.random.PRNGKey(0)))


@pytest.fixture
def fake_wandb(monkeypatch):
    """The package wandb, as far as a run uses it; `fake_wandb.runs` has what it was given."""

    class Run:
        def __init__(self, given):
            self.given, self.logged, self.finished = given, [], False

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    module = types.SimpleNamespace(runs=[], Image=lambda image: image)

    def init(**given):
        module.runs.append(Run(given))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module
