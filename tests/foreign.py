"""Checkpoints as other projects write them, small; and a ResNet in NumPy to compare with.

The names and the structure are those of the authors' code, written down here once more: nothing of
`selfsup_jax.interop` is used.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import special

# -------------------------------------------------------------- a ResNet, layer by layer


class Layer:
    """A convolution `[k, k, C, D]` with its norm: gamma, beta, mean, variance `[D]`."""

    def __init__(self, rng: np.random.Generator, size: int, inputs: int, outputs: int):
        scale = (2.0 / (size * size * inputs)) ** 0.5
        self.kernel = rng.normal(0, scale, (size, size, inputs, outputs)).astype(np.float32)
        draw = lambda low, high: rng.uniform(low, high, outputs).astype(np.float32)  # noqa: E731
        self.norm = (draw(0.5, 1.5), draw(-0.5, 0.5), draw(-0.3, 0.3), draw(0.5, 2.0))


def make_resnet(
    blocks: tuple[int, ...],
    bottleneck: bool,
    *,
    channels: int = 2,
    stem: int = 7,
    project_first: bool = False,
    seed: int = 0,
) -> OrderedDict[tuple[int, int, str], Layer]:
    """(Stage, block, `shortcut` or `conv1`, ...) -> layer, in TensorFlow's order."""
    rng = np.random.default_rng(seed)
    layers = OrderedDict({(0, 0, "stem"): Layer(rng, stem, 3, channels)})
    inputs = channels
    for stage, count in enumerate(blocks):
        inner = channels * 2**stage
        outer = 4 * inner if bottleneck else inner
        for block in range(count):
            sizes = [(1, inner), (3, inner), (1, outer)] if bottleneck else [(3, inner), (3, outer)]
            if block == 0 and (bottleneck or stage > 0 or project_first):
                layers[stage, block, "shortcut"] = Layer(rng, 1, inputs, outer)
            for i, (size, outputs) in enumerate(sizes, start=1):
                layers[stage, block, f"conv{i}"] = Layer(rng, size, inputs, outputs)
                inputs = outputs
    return layers


def forward(layers: Any, images: np.ndarray, padding: str) -> np.ndarray:
    """`[N, H, W, 3]` to the mean of the last maps `[N, D]`, float64.

    `padding`: `torch` (symmetric), `same` (TensorFlow's) or `fixed` (SimCLR's).
    """
    stem = layers[0, 0, "stem"]
    imagenet = len(stem.kernel) == 7
    x = _layer(images.astype(np.float64), stem, 2 if imagenet else 1, padding)
    x = np.maximum(x, 0)
    if imagenet:
        before, after = _margins(x.shape[1], 3, 2, "torch" if padding == "torch" else "same")
        x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)), constant_values=-np.inf)
        x = _windows(x, 3, 2).max(axis=(3, 4))
    places = OrderedDict.fromkeys((s, b) for s, b, name in layers if name != "stem")
    for stage, block in places:
        stride = 2 if stage > 0 and block == 0 else 1
        convs = [n for n in ("conv1", "conv2", "conv3") if (stage, block, n) in layers]
        shortcut = x
        if (stage, block, "shortcut") in layers:
            shortcut = _layer(x, layers[stage, block, "shortcut"], stride, padding)
        for name in convs:
            at = "conv2" if len(convs) == 3 else "conv1"  # the stride is in the 3x3 convolution
            x = _layer(x, layers[stage, block, name], stride if name == at else 1, padding)
            x = np.maximum(x, 0) if name != convs[-1] else x
        x = np.maximum(x + shortcut, 0)
    return x.mean((1, 2))


def _margins(n: int, size: int, stride: int, padding: str) -> tuple[int, int]:
    if padding != "same":
        return (size - 1) // 2, (size - 1) // 2
    total = max((-(-n // stride) - 1) * stride + size - n, 0)
    return total // 2, total - total // 2


def _windows(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    """`[N, H', W', k, k, C]`"""
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return windows[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def _layer(x: np.ndarray, layer: Layer, stride: int, padding: str) -> np.ndarray:
    before, after = _margins(x.shape[1], len(layer.kernel), stride, padding)
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    x = np.einsum("nhwijc,ijcd->nhwd", _windows(x, len(layer.kernel), stride), layer.kernel)
    gamma, beta, mean, variance = layer.norm
    return (x - mean) / np.sqrt(variance + 1e-5) * gamma + beta


# ----------------------------------------------------------------------------- PyTorch


def torch_state(layers: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The state dictionary of torchvision's ResNet without its last layer."""
    state: dict[str, np.ndarray] = {}
    for (stage, block, name), layer in layers.items():
        conv, norm = "conv1", "bn1"
        if name != "stem":
            root = f"layer{stage + 1}.{block}."
            conv, norm = f"{root}{name}", f"{root}{name.replace('conv', 'bn')}"
            if name == "shortcut":
                conv, norm = f"{root}downsample.0", f"{root}downsample.1"
        state[f"{prefix}{conv}.weight"] = layer.kernel.transpose(3, 2, 0, 1).copy()
        parts = ("weight", "bias", "running_mean", "running_var")
        state |= {f"{prefix}{norm}.{p}": x for p, x in zip(parts, layer.norm, strict=True)}
        state[f"{prefix}{norm}.num_batches_tracked"] = np.asarray(7, np.int64)
    return state


def moco_file(layers: Any, keys: Any, *, features: int, mlp: bool = True, queue: int = 16) -> dict:
    """What MoCo's `main_moco.py` saves: both encoders with heads, the queue, the optimizer."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    state: dict[str, np.ndarray] = {
        "module.queue": draw(4, queue),
        "module.queue_ptr": np.asarray([8], np.int64),
    }
    for name, of in (("encoder_q", layers), ("encoder_k", keys)):
        root = f"module.{name}."
        state |= torch_state(of, root)
        if mlp:
            state |= {
                f"{root}fc.0.weight": draw(features, features),
                f"{root}fc.0.bias": draw(features),
            }
            state |= {f"{root}fc.2.weight": draw(4, features), f"{root}fc.2.bias": draw(4)}
        else:
            state |= {f"{root}fc.weight": draw(4, features), f"{root}fc.bias": draw(4)}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    params = [x for k, x in state.items() if "encoder_q" in k and not k.endswith(statistics)]
    buffers = {i: {"momentum_buffer": draw(*x.shape)} for i, x in enumerate(params)}
    optimizer = {"state": buffers, "param_groups": [{"lr": 0.03, "params": [*buffers]}]}
    return {
        "epoch": 200,
        "arch": "resnet",
        "state_dict": OrderedDict(state),
        "optimizer": optimizer,
    }


class _Typed:
    """A class of PyTorch's, which is pickled by its name alone."""


class _Tensors(pickle.Pickler):
    """Pickles arrays as `torch.save` does tensors; the storages are collected."""

    def __init__(self, file: Any, legacy: bool):
        super().__init__(file, protocol=2)
        self.storages: list[np.ndarray] = []
        self._legacy = legacy

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return NotImplemented
        self.storages.append(value)
        strides = tuple(step // value.itemsize for step in value.strides)
        stored = _Stored(len(self.storages) - 1, value)
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (stored, 0, value.shape, strides, False, OrderedDict())

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Stored):
            return None
        kinds = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}
        kind = getattr(sys.modules["torch"], kinds[value.array.dtype.name])
        key = ("storage", kind, str(value.index), "cuda:0", value.array.size)
        return (*key, None) if self._legacy else key


class _Stored:
    def __init__(self, index: int, array: np.ndarray):
        self.index, self.array = index, array


@contextlib.contextmanager
def modules(**contents: dict[str, Any]) -> Iterator[None]:
    """Modules that exist in this block, by their names with `__` for the dot."""
    made = {}
    for name, members in contents.items():
        path = name.replace("__", ".")
        made[path] = types.ModuleType(path)
        for member, value in members.items():
            setattr(made[path], member, value)
            if isinstance(value, type | types.FunctionType):
                value.__module__, value.__qualname__, value.__name__ = path, member, member
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def torch_bytes(value: Any, legacy: bool = False) -> bytes:
    """What `torch.save` writes, since version 1.6 or (legacy) before."""

    def rebuild(*_: Any) -> None: ...

    kinds = {f"{k}Storage": type(f"{k}Storage", (_Typed,), {}) for k in ("Float", "Long", "Half")}
    with modules(torch=kinds, torch___utils={"_rebuild_tensor_v2": rebuild}):
        file = io.BytesIO()
        if legacy:
            for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(head, file, protocol=2)
        pickler = _Tensors(file, legacy)
        pickler.dump(value)
    if legacy:
        pickle.dump([str(i) for i in range(len(pickler.storages))], file, protocol=2)
        for array in pickler.storages:
            file.write(struct.pack("<q", array.size) + array.tobytes())
        return file.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("checkpoint/data.pkl", file.getvalue())
        for i, array in enumerate(pickler.storages):
            archive.writestr(f"checkpoint/data/{i}", array.tobytes())
        archive.writestr("checkpoint/version", "3\n")
    return packed.getvalue()


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """The format as its description has it: a header in JSON, then the numbers."""
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        kind = kinds[array.dtype.name]
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values())


# ------------------------------------------------------------------ Vision Transformers


def vit_state(
    width: int, depth: int, patch: int = 4, side: int = 2, prefix: str = "", seed: int = 0
) -> OrderedDict[str, np.ndarray]:
    """The state dictionary of timm's ViT without its last layer, for `side` x `side` patches."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float32)  # noqa: E731
    state = OrderedDict({"cls_token": draw(1, 1, width), "pos_embed": draw(1, 1 + side**2, width)})
    state |= {"patch_embed.proj.weight": draw(width, 3, patch, patch)}
    state |= {"patch_embed.proj.bias": draw(width)}
    for i in range(depth):
        layers = {"norm1": 0, "attn.qkv": (3, 1), "attn.proj": (1, 1), "norm2": 0}
        layers |= {"mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, sizes in layers.items():
            shape = (sizes[0] * width, sizes[1] * width) if sizes else (width,)
            state[f"blocks.{i}.{name}.weight"] = draw(*shape) + (0 if sizes else 1)
            state[f"blocks.{i}.{name}.bias"] = draw(shape[0])
    state |= {"norm.weight": 1 + draw(width), "norm.bias": draw(width)}
    return OrderedDict((f"{prefix}{name}", array) for name, array in state.items())


def vit_forward(state: Any, images: np.ndarray, heads: int) -> np.ndarray:
    """`[N, H, W, 3]` to the class token after the last norm, `[N, D]` float64."""
    state = {name: array.astype(np.float64) for name, array in state.items()}
    kernel = state["patch_embed.proj.weight"]
    width, patch = kernel.shape[0], kernel.shape[2]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    rows = []
    for top in range(0, images.shape[1], patch):
        for left in range(0, images.shape[2], patch):
            cut = images[:, top : top + patch, left : left + patch]
            rows.append(np.einsum("nijc,dcij->nd", cut, kernel) + state["patch_embed.proj.bias"])
    token = np.broadcast_to(state["cls_token"][:, 0], (len(images), width))
    x = np.stack([token, *rows], axis=1) + state["pos_embed"]
    for i in range(sum(name.endswith(".norm1.weight") for name in state)):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(width / heads)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        y = shares / shares.sum(-1, keepdims=True) @ v  # [N, heads, T, d]
        x = x + linear(y.transpose(0, 2, 1, 3).reshape(x.shape), f"blocks.{i}.attn.proj")
        y = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(y * (1 + special.erf(y / np.sqrt(2))) / 2, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def mlp_state(root: str, sizes: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """A head of MoCo v3: linear layers without bias, batch norms, the last without scale."""
    rng, state = np.random.default_rng(seed), {}
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        state[f"{root}.{3 * i}.weight"] = rng.normal(size=(outputs, inputs)).astype(np.float32)
        last = i == len(sizes) - 2
        for part in ("weight", "bias", "running_mean", "running_var")[2 * last :]:
            state[f"{root}.{3 * i + 1}.{part}"] = rng.uniform(1, 2, outputs).astype(np.float32)
        state[f"{root}.{3 * i + 1}.num_batches_tracked"] = np.asarray(7, np.int64)
    return state


# -------------------------------------------------------------------------------- BYOL


def haiku_network(layers: Any, features: int, seed: int) -> tuple[dict, dict]:
    """Parameters and state of BYOL's authors: encoder, projector, predictor, classifier."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params: dict[str, dict] = {}
    state: dict[str, dict] = {}

    def norm(path: str, values: Any, axes: int) -> None:
        gamma, beta, mean, variance = (x.reshape(*[1] * axes, -1) for x in values)
        params[path] = {"scale": gamma, "offset": beta}
        for name, average in (("mean_ema", mean), ("var_ema", variance)):
            hidden = {"hidden": 0.5 * average, "counter": np.asarray(9, np.int32)}
            state[f"{path}/~/{name}"] = {"average": average} | hidden

    for (stage, block, name), layer in layers.items():
        root = f"res_net50/~/block_group_{stage}/~/block_{block}/~/"
        conv, bn = "res_net50/~/initial_conv", "res_net50/~/initial_batchnorm"
        if name == "shortcut":
            conv, bn = f"{root}shortcut_conv", f"{root}shortcut_batchnorm"
        elif name != "stem":
            index = int(name[-1]) - 1
            conv, bn = f"{root}conv_{index}", f"{root}batchnorm_{index}"
        params[conv] = {"w": layer.kernel}
        norm(bn, layer.norm, 3)
    for part, inputs in (("projector", features), ("predictor", 4)):
        params[f"{part}/linear"] = {"w": draw(inputs, 8), "b": draw(8)}
        norm(f"{part}/batch_norm", [draw(8), draw(8), draw(8), np.abs(draw(8)) + 0.5], 1)
        params[f"{part}/linear_1"] = {"w": draw(8, 4)}
    params["classifier"] = {"w": draw(features, 5), "b": draw(5)}
    return params, state


class _Dill(pickle.Pickler):
    """Pickles arrays and named tuples as dill does: by functions of its own."""

    def reducer_override(self, value: Any) -> Any:
        dill = sys.modules["dill._dill"]
        if isinstance(value, np.ndarray):
            return dill._create_array, (*value.__reduce__(), None)
        if isinstance(value, type) and hasattr(value, "_fields"):
            return dill._create_namedtuple, (value.__name__, value._fields, value.__module__)
        return NotImplemented


def byol_bytes(
    online: tuple[dict, dict], target: tuple[dict, dict], name: str = "_ByolExperimentState"
) -> bytes:
    """The file that BYOL's `Checkpointer` writes with dill: a pickle of protocol 2."""

    def create(*_: Any) -> None: ...

    def create_array(*_: Any) -> None: ...

    fields = ("online_params", "target_params", "online_state", "target_state", "opt_state")
    state_type = namedtuple(name, fields)
    lars = namedtuple("ScaleByLarsState", ("mu",))
    none = namedtuple("AddWeightDecayState", ())

    class FlatMapping(dict):
        def __reduce__(self) -> Any:
            return FlatMapping, (dict(self),)

    def flat(tree: dict) -> Any:
        return FlatMapping({k: flat(v) if isinstance(v, dict) else v for k, v in tree.items()})

    with modules(
        byol={},
        byol__byol_experiment={name: state_type},
        byol__utils={},
        byol__utils__optimizers={"ScaleByLarsState": lars, "AddWeightDecayState": none},
        dill={},
        dill___dill={"_create_namedtuple": create, "_create_array": create_array},
        haiku={},
        haiku___src={},
        haiku___src__data_structures={"FlatMapping": FlatMapping},
    ):
        networks = [flat(online[0]), flat(target[0]), flat(online[1]), flat(target[1])]
        momentum = {
            module: {name: 0.01 * x[::-1] for name, x in values.items()}
            for module, values in online[0].items()
        }
        optimizer = [none(), lars(flat(momentum)), none()]
        state = state_type(*networks, optimizer)
        rng = np.asarray([0, 1], np.uint32)
        file = io.BytesIO()
        _Dill(file, protocol=2).dump({"experiment_state": state, "step": 300, "rng": rng})
        return file.getvalue()


# ------------------------------------------------------------------------------ SimCLR


def simclr_variables(layers: Any, features: int, keras: bool = False) -> dict[str, np.ndarray]:
    """The variables of SimCLR's authors, by their code for TensorFlow 1 or (`keras`) 2."""
    rng = np.random.default_rng(6)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    variables: dict[str, np.ndarray] = {}
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    for i, ((stage, block, name), layer) in enumerate(layers.items()):
        number = f"_{i}" if i else ""
        conv, norm = f"base_model/conv2d{number}", f"base_model/batch_normalization{number}"
        if keras:
            root = "model/resnet_model/initial_conv_relu_max_pool"
            conv, norm = f"{root}/0/conv2d", f"{root}/2/bn"
            if name != "stem":
                deep = (stage, block, "conv3") in layers
                root = f"model/resnet_model/block_groups/{stage}/layers/{block}/"
                lists = ("projection_layers", "conv_relu_dropblock_layers")
                lists = lists if deep else ("shortcut_layers", "conv2d_bn_layers")
                at = 0 if name == "shortcut" else (int(name[-1]) - 1) * (3 if deep else 2)
                root += lists[name != "shortcut"]
                conv, norm = f"{root}/{at}/conv2d", f"{root}/{at + 1}/bn"
        variables[f"{conv}/kernel"] = layer.kernel
        variables |= {f"{norm}/{part}": x for part, x in zip(parts, layer.norm, strict=True)}
        if not keras:
            variables[f"{conv}/kernel/Momentum"] = layer.kernel
    for j, outputs in ((0, features), (1, 4)):
        root = f"head_contrastive/nl_{j}"
        dense, norm = f"{root}/dense", f"{root}/batch_normalization"
        if keras:
            root = f"model/_projection_head/linear_layers/{j}"
            dense, norm = f"{root}/dense", f"{root}/bn_relu/bn"
        variables[f"{dense}/kernel"] = draw(features, outputs)
        for part in parts:
            if part != "beta" or j == 0:
                variables[f"{norm}/{part}"] = np.abs(draw(outputs)) + 0.5
    supervised = (
        "model/supervised_head/linear_layer/dense"
        if keras
        else "head_supervised/linear_layer/dense"
    )
    variables |= {f"{supervised}/kernel": draw(features, 5), f"{supervised}/bias": draw(5)}
    if keras:
        return {f"{name}/.ATTRIBUTES/VARIABLE_VALUE": x for name, x in variables.items()}
    return variables | {"global_step": np.asarray(9, np.int64)}
