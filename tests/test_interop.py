"""Other projects' checkpoints: features, the account of tensors, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import re
import zipfile

import foreign
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from conftest import flatten
from flax.traverse_util import flatten_dict
from PIL import Image

from configs import byol, moco, simclr
from selfsup_jax import Encoder, export
from selfsup_jax.build import find
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.interop import __main__ as interop
from selfsup_jax.interop import exporting, importing, names, torch_files, unpickle
from selfsup_jax.models import resnet

FLIPS = int(os.environ.get("FLIPS", "10"))  # damaged files of each kind
BASIC, DEEP = ((1, 1, 0, 0), False), ((1, 1, 0, 0), True)
IMAGES = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_resnets(monkeypatch):
    """Depths with few blocks, which compile at once."""
    monkeypatch.setitem(resnet.STAGES, 2, BASIC)
    monkeypatch.setitem(resnet.STAGES, 3, DEEP)


def write(path: pathlib.Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def features(frozen) -> np.ndarray:
    return np.asarray(
        jax.jit(encoder.module(frozen.config, "float32").apply)(frozen.variables, IMAGES)
    )


def check_features(frozen, layers, padding) -> None:
    """Equal to the forward pass in NumPy, and to that of no other padding."""
    found = features(frozen)
    for other in ("torch", "same", "fixed"):
        expected = foreign.forward(layers, IMAGES, other)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert (error < 1e-4) == (other == padding), (other, error)


def refused(source, **options) -> str:
    with pytest.raises(UserError) as e:
        importing.read(str(source), **options)
    line = str(e.value)
    assert str(source) in line and len(line.splitlines()) == 1 and len(line) < 400
    return line


def accounted(names, weights, ours=0) -> None:
    """Every tensor is among the arrays, or named as left out."""
    assert len(names) == len(weights.arrays) - ours + len(weights.left_out)
    assert set(weights.left_out) <= set(names) and all(weights.left_out.values())


# ----------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("legacy", [False, True])
def test_torchvision(tmp_path, legacy):
    """Of a file that a stranger to our writer made; also from before PyTorch 1.6."""
    layers = foreign.make_resnet(*DEEP)
    state = foreign.torch_state(layers)
    state |= {"fc.weight": np.ones((5, 16), np.float32), "fc.bias": np.ones(5, np.float32)}
    path = write(tmp_path / "model.pth", foreign.torch_bytes(state, legacy))
    frozen, weights = importing.read(path)
    check_features(frozen, layers, "torch")
    accounted(state, weights)
    assert {"fc.weight", "fc.bias", "bn1.num_batches_tracked"} < set(weights.left_out)
    assert frozen.config["encoder"]["depth"] == 3 and frozen.config["encoder"]["width"] == 2 / 64
    assert frozen.config["data"]["test_resize"] == 256
    assert frozen.config["data"]["resize_method"] == "bilinear"
    assert frozen.normalization[0] == (0.485, 0.456, 0.406)


def test_a_basic_resnet_with_a_small_stem(tmp_path):
    layers = foreign.make_resnet(*BASIC, stem=3)
    path = write(
        tmp_path / "model.pth", foreign.torch_bytes(foreign.torch_state(layers, "module."))
    )
    frozen, _ = importing.read(path)
    assert frozen.config["encoder"]["stem"] == "cifar"
    expected = foreign.forward(layers, IMAGES, "torch")
    np.testing.assert_allclose(features(frozen), expected, rtol=1e-4)


def test_moco(tmp_path):
    """Both encoders, both heads and the queue; the optimizer is named as left out."""
    query, key = (foreign.make_resnet(*DEEP, seed=seed) for seed in (0, 1))
    tree = foreign.moco_file(query, key, features=16)
    path = write(tmp_path / "moco.pth.tar", foreign.torch_bytes(tree))
    frozen, weights = importing.read(path)
    check_features(frozen, query, "torch")
    theirs, state = weights.arrays, tree["state_dict"]
    np.testing.assert_array_equal(theirs["queue"], state["module.queue"].T)
    assert theirs["queue_index"] == 8 and theirs["queue_index"].dtype == np.int32
    for network, name in (("online", "encoder_q"), ("target", "encoder_k")):
        head = f"{network}_params/projector"
        for ours, index in (("hidden", 0), ("output", 2)):
            kernel = state[f"module.{name}.fc.{index}.weight"].T
            np.testing.assert_array_equal(theirs[f"{head}/{ours}/kernel"], kernel)
    accounted(torch_files.names_of(tree), weights, ours=1)  # queue_ptr is kept under another name
    buffers = [x["momentum_buffer"] for x in tree["optimizer"]["state"].values()]
    np.testing.assert_array_equal(
        theirs["sgd_momentum_params/encoder/stem/kernel"], buffers[0].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(theirs["sgd_momentum_params/projector/output/bias"], buffers[-1])
    assert len([name for name in theirs if "_momentum_" in name]) == len(buffers)
    buffers[3] = buffers[3][:1]  # of another network: it is left out
    tree["optimizer"]["state"] = {i: {"momentum_buffer": x} for i, x in enumerate(buffers)}
    _, weights = importing.read(write(tmp_path / "other.pth.tar", foreign.torch_bytes(tree)))
    assert weights.left_out["optimizer.state.0.momentum_buffer"] == "state of the optimizer"
    assert frozen.config["views"]["global"]["area"] == [0.2, 1.0]


def test_moco_v1_and_v3_and_dino(tmp_path):
    """A linear head; heads with norms; the teacher in place of the student."""
    first, second = (foreign.make_resnet(*BASIC, seed=seed) for seed in (0, 1))
    tree = foreign.moco_file(first, second, features=4, mlp=False)
    _, weights = importing.read(write(tmp_path / "v1.pth.tar", foreign.torch_bytes(tree)))
    assert weights.arrays["online_params/projector/output/kernel"].shape == (4, 4)
    assert "online_params/projector/hidden/kernel" not in weights.arrays

    state = foreign.torch_state(first, "module.base_encoder.")
    state |= foreign.torch_state(second, "module.momentum_encoder.")
    rng = np.random.default_rng(0)
    for root in ("base_encoder.fc", "momentum_encoder.fc", "predictor"):
        for i, shape in ((0, (8, 4)), (3, (4, 8))):
            state[f"module.{root}.{i}.weight"] = rng.normal(size=shape).astype(np.float32)
            # In its code a ResNet's predictor has no norm after the last layer.
            parts = ("weight", "bias", "running_mean", "running_var")[2 * (i == 3) :]
            parts = () if (root, i) == ("predictor", 3) else parts
            state |= {f"module.{root}.{i + 1}.{p}": np.ones(shape[0], np.float32) for p in parts}
    path = write(tmp_path / "v3.pth.tar", foreign.torch_bytes({"state_dict": state}))
    frozen, weights = importing.read(path)
    check_features(frozen, first, "torch")
    heads = {n for n in weights.arrays if "/projector/" in n or "/predictor/" in n}
    assert heads == heads_of(moco.get_config("v3"))
    accounted(torch_files.names_of({"state_dict": state}), weights)

    tree = {
        "student": foreign.torch_state(first, "module.backbone."),
        "teacher": foreign.torch_state(second, "module.backbone."),  # for its SyncBatchNorm
    }
    frozen, weights = importing.read(write(tmp_path / "dino.pth", foreign.torch_bytes(tree)))
    check_features(frozen, second, "torch")
    assert sum(name.startswith("student.") for name in weights.left_out) == len(tree["student"])


def heads_of(config) -> set[str]:
    """The paths of all parameters and statistics of the projectors and the predictor."""
    state = jax.eval_shape(find("moco")(config, None, 10, 0).init_state, jax.random.PRNGKey(0))
    return {
        "/".join([collection, *(key.key for key in path)])
        for collection in ("online_params", "online_stats", "target_params", "target_stats")
        for path, _ in jax.tree_util.tree_flatten_with_path(getattr(state, collection))[0]
        if path[0].key in ("projector", "predictor")
    }


def test_several_encoders_are_chosen_from(tmp_path):
    state = foreign.torch_state(foreign.make_resnet(*BASIC, seed=3), "a.")
    state |= foreign.torch_state(foreign.make_resnet(*BASIC, seed=4), "b.")
    path = write(tmp_path / "two.pth", foreign.torch_bytes(state))
    assert "--prefix: a., b." in refused(path)
    frozen, _ = importing.read(path, prefix="b.")
    check_features(frozen, foreign.make_resnet(*BASIC, seed=4), "torch")


def test_what_is_no_plain_resnet_is_refused(tmp_path):
    """A file that loads almost right is worse than one that does not load."""
    layers = foreign.make_resnet(*DEEP)
    good = foreign.torch_state(layers)
    cases = {
        "layer1.0.se.fc1.weight": good | {"layer1.0.se.fc1.weight": np.ones((1, 1), np.float32)},
        "layer2.0.bn2.running_var": {
            k: v for k, v in good.items() if k != "layer2.0.bn2.running_var"
        },
        "stage1_block1_conv2": good | {"layer1.0.conv2.weight": np.ones((2, 2, 5, 5), np.float32)},
        "not finite": good | {"bn1.weight": np.full(2, np.nan, np.float32)},
        "2 bottlenecks": good | foreign.torch_state(foreign.make_resnet((1, 2, 0, 0), True)),
        "no ResNet": {"blocks.0.attn.qkv.weight": np.ones((2, 2), np.float32)},
        "ResNet": {},
    }
    for i, (named, state) in enumerate(cases.items()):
        named = "(1, 2, 0, 0) bottlenecks" if named == "2 bottlenecks" else named
        assert named in refused(write(tmp_path / f"{i}.pth", foreign.torch_bytes(state)))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_halves_in_safetensors(tmp_path, kind):
    """Each is the float32 number that it is."""
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[kind]
    state = {k: v for k, v in foreign.torch_state(foreign.make_resnet(*BASIC)).items() if v.ndim}
    halves = {name: array.astype(dtype) for name, array in state.items()}
    frozen, _ = importing.read(write(tmp_path / "a.safetensors", foreign.safetensors_bytes(halves)))
    stem = frozen.variables["params"]["stem"]["kernel"]
    expected = halves["conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(stem, expected)
    assert stem.dtype == np.float32 and not np.array_equal(
        expected, state["conv1.weight"].transpose(2, 3, 1, 0)
    )


# ----------------------------------------------------------------------- BYOL and SimCLR


def test_byol_of_the_authors(tmp_path):
    """Both networks, with the averages of batch norm that are debiased."""
    online, target = (foreign.make_resnet(*DEEP, seed=seed) for seed in (0, 1))
    networks = [foreign.haiku_network(x, 16, seed) for seed, x in enumerate((online, target))]
    path = tmp_path / "pretrain.pkl"
    write(path, foreign.byol_bytes(*networks))
    frozen, weights = importing.read(str(path))
    check_features(frozen, online, "same")
    arrays, (params, state) = weights.arrays, networks[1]
    linear = params["projector/linear"]
    np.testing.assert_array_equal(arrays["target_params/projector/hidden/kernel"], linear["w"])
    np.testing.assert_array_equal(arrays["target_params/projector/hidden/bias"], linear["b"])
    average = state["projector/batch_norm/~/var_ema"]["average"].reshape(-1)
    np.testing.assert_array_equal(arrays["target_stats/projector/bn/var"], average)
    online_params = networks[0][0]
    momentum = arrays["lars_momentum_params/predictor/output/kernel"]
    np.testing.assert_array_equal(momentum, 0.01 * online_params["predictor/linear_1"]["w"][::-1])
    assert "lars_momentum_params/classifier/output/bias" in arrays
    trees = [online_params, *(tree for network in networks for tree in network)]
    count = sum(len(v) for tree in trees for v in tree.values())
    accounted([*weights.left_out, *range(count - len(weights.left_out))], weights)
    assert frozen.config["encoder"]["padding"] == "same"
    assert frozen.config["data"]["resize_method"] == "bicubic"
    # As some versions of Haiku name the stem, and a class of another name.
    for network in networks:
        for tree in network:
            for name in [name for name in tree if "/initial_" in name]:
                tree[re.sub(r"(initial_\w+?)(/|$)", r"\1_1\2", name)] = tree.pop(name)
    write(path, foreign.byol_bytes(*networks, name="BYOLState"))
    again, _ = importing.read(str(path))
    assert "res_net50/~/initial_batchnorm_1/~/mean_ema" in networks[0][1]
    check_features(again, online, "same")


@pytest.mark.parametrize(("keras", "kind"), [(False, BASIC), (True, DEEP)])
def test_simclr_of_the_authors(tmp_path, keras, kind):
    """Files that TensorFlow writes, of both versions of the code; images are not normalised."""
    tf = pytest.importorskip("tensorflow")
    size = 16 if kind[1] else 4
    layers = foreign.make_resnet(*kind, project_first=True)
    variables = foreign.simclr_variables(layers, size, keras)
    path = str(tmp_path / "model.ckpt-9")
    tf.raw_ops.SaveV2(
        prefix=path,
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=list(variables.values()),
    )
    frozen, weights = importing.read(path)
    check_features(frozen, layers, "fixed")
    accounted([name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE") for name in variables], weights)
    assert frozen.normalization == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert weights.arrays["online_params/projector/output_bn/scale"].shape == (4,)
    assert "online_params/projector/output_bn/bias" not in weights.arrays
    data = tmp_path / "model.ckpt-9.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    assert "truncated or damaged" in refused(path)


# ---------------------------------------------------------------------------- safety


class Evil:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def reconstruct_trick() -> bytes:
    """An array of Python objects, which NumPy would unpickle by itself."""
    inner = pickle.dumps(Evil(os.system, "touch ran"))
    scalar = b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00O8I0\nI1\ntR"
    return b"\x80\x02" + scalar + b"B" + len(inner).to_bytes(4, "little") + inner + b"tR."


@pytest.mark.parametrize("kind", ["pkl", "zip", "legacy"])
def test_nothing_in_a_file_is_run(tmp_path, monkeypatch, kind):
    """Whatever it names is refused by its name, and nothing was called."""
    monkeypatch.chdir(tmp_path)
    touch = "touch ran"
    attacks = {
        "posix.system": pickle.dumps(Evil(os.system, touch), 2),
        "eval": pickle.dumps(Evil(eval, "open('ran', 'w')"), 2),
        "subprocess": b"\x80\x02csubprocess\ncall\n(X\x05\x00\x00\x00touchX\x03\x00\x00\x00rantR.",
        "not of numbers": reconstruct_trick(),
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cnumpy\nndarray\nX\x06\x00\x00\x00dumps_tR.",
        "no array": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\ntR.",
        "without fields": b"\x80\x02cdill._dill\n_create_namedtuple\n"
        b"(X\x05\x00\x00\x00TupleK\x01tR.",
        "Dtype": b"\x80\x02cnumpy\ndtype\n(N}X\x05\x00\x00\x00dtypeK\x01stb.",  # sets an attribute
    }
    for named, content in attacks.items():
        if kind == "zip":
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:
                archive.writestr("archive/data.pkl", content)
            content = packed.getvalue()
        elif kind == "legacy":
            heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
            content = b"".join(pickle.dumps(head, 2) for head in heads) + content
        if kind == "pkl" or named != "without fields":  # dill's names are BYOL's alone
            assert named in refused(write(tmp_path / "evil", content)), named
        assert os.listdir(tmp_path) == ["evil"]


def test_the_attack_would_work(tmp_path, monkeypatch):
    """So that the test above is none of files that are merely broken."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil(os.system, "touch ran"), 2))
    assert os.listdir(tmp_path) == ["ran"]


def test_files_that_are_not_what_they_seem(tmp_path):
    """Truncated anywhere, of another kind, or not there: one line, and no traceback."""
    layers = foreign.make_resnet(*BASIC)
    network = foreign.haiku_network(layers, 4, 0)
    state = foreign.torch_state(layers)
    files = {
        "a.pth": foreign.torch_bytes(state),
        "b.pth": foreign.torch_bytes(state, legacy=True),
        "c.pkl": foreign.byol_bytes(network, network),
    }
    for name, content in files.items():
        for size in (0, 1, 9, 40, len(content) // 2, len(content) - 9):
            refused(write(tmp_path / name, content[:size]))
    flipped = bytearray(files["a.pth"])
    flipped[files["a.pth"].index(state["bn1.bias"].tobytes())] ^= 1
    assert "checksum" in refused(write(tmp_path / "a.pth", bytes(flipped)))
    assert "no such file" in refused(tmp_path / "missing.pth")
    assert "*.index" in refused(tmp_path)
    assert "is a pickle" in refused(write(tmp_path / "d.pkl", pickle.dumps([1, 2])))
    assert "no dictionary" in refused(write(tmp_path / "e.pth", foreign.torch_bytes([1, 2])))
    # A memory of 2^31 objects, or one number repeated 2^38 times.
    memo = b"\x80\x02}r" + (2**31).to_bytes(4, "little") + b"."
    assert "stores object" in refused(write(tmp_path / "d.pkl", memo))
    storage = torch_files.Storage("0", np.dtype("f4"), 2)
    for offset, shape in ((-1, (2,)), (0, (-2,)), (1, (2,)), (0, (2**50,)), (0, (2**38,))):
        stride = (0,) if shape[0] == 2**38 else (1,)
        tensor = torch_files.Tensor(storage, offset, shape, stride)
        with pytest.raises(ValueError):
            tensor.of(np.zeros(2, np.float32))


def test_the_line_says_what_is_wrong(tmp_path):
    """With a file, a folder, or an option about the images."""
    content = foreign.torch_bytes(foreign.torch_state(foreign.make_resnet(*BASIC)))
    path = write(tmp_path / "a.pth", content)
    assert refused(write(tmp_path / "b.pth", b"")).endswith("is empty")
    assert refused(write(tmp_path / "b.pth", content[: len(content) // 2])).endswith("is truncated")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", b"")
    assert "none of PyTorch's" in refused(tmp_path / "b.npz")
    assert "copy it to this machine" in refused("https://example.com/a.pth")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "use it as config.checkpoint" in refused(tmp_path / "run")
    assert "'foo'; there is ''" in refused(path, prefix="foo")
    for name, value in (
        ("image_size", 0),
        ("image_size", 10**9),
        ("test_resize", -1),
        ("mean", (np.nan, 0, 0)),
        ("std", (0, 1, 1)),
    ):
        with pytest.raises(UserError, match=f"^--{name.removeprefix('test_')}=.*: must be"):
            importing.read(path, **{name: value})


@pytest.mark.parametrize("kind", ["zip", "legacy", "byol", "safetensors"])
def test_damaged_bytes_are_one_line(tmp_path, kind):
    """Or do no harm: a number in the middle of an array may be any."""
    layers = foreign.make_resnet(*BASIC)
    state, network = foreign.torch_state(layers), foreign.haiku_network(layers, 4, 0)
    content = {
        "zip": lambda: foreign.torch_bytes(state),
        "legacy": lambda: foreign.torch_bytes(state, legacy=True),
        "byol": lambda: foreign.byol_bytes(network, network),
        "safetensors": lambda: safetensors.numpy.save(state),
    }[kind]()
    rng = np.random.default_rng(0)
    for _ in range(FLIPS):
        damaged = bytearray(content)
        for at in rng.integers(0, len(content), 3):
            damaged[at] = rng.integers(0, 256)
        try:
            importing.read(write(tmp_path / "damaged", bytes(damaged)))
        except UserError as e:
            assert len(str(e).splitlines()) == 1 and len(str(e)) < 500


def test_only_numbers_are_unpickled():
    """The stand-ins give back NumPy's arrays, of any order and size of number."""
    arrays = [
        np.arange(6, dtype=">f4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.asarray(3, np.int64),
        np.zeros((0, 2), np.float16),
    ]
    for protocol in (2, 3, 4):
        for array in arrays:
            found = unpickle.load(io.BytesIO(pickle.dumps(array, protocol)), unpickle.PLAIN).array
            assert found.dtype == array.dtype
            np.testing.assert_array_equal(found, array)
    scalar = pickle.dumps(np.float32(2.5), 2)
    assert unpickle.load(io.BytesIO(scalar), unpickle.PLAIN) == 2.5


# ----------------------------------------------------------------------------- and out


def imported(tmp_path, **changes):
    layers = foreign.make_resnet(*DEEP)
    path = write(tmp_path / "model.pth", foreign.torch_bytes(foreign.torch_state(layers)))
    frozen, weights = importing.read(path)
    fields = frozen.config["encoder"] | {"width": 1.0} | changes  # as if it were as wide
    return frozen._replace(config=frozen.config | {"encoder": fields}), weights, layers


@pytest.mark.parametrize(("recipe", "depth"), [(byol, 50), (simclr, 18)])
def test_presets_to_export_from(recipe, depth):
    """Their encoders are torchvision's, array by array; those of the recipes are not."""
    preset = {50: "imagenet", 18: "folder"}[depth]
    config, plain = (recipe.get_config(f"{preset}{end}").to_dict() for end in ("_torch", ""))
    for to in ("torchvision", "timm", *["detectron2"] * (depth == 50)):
        exporting.check(config, to, measured=False)
        with pytest.raises(UserError, match=f"--to={to}"):
            exporting.check(plain, to, measured=False)
    differ = {k for k, v in config["encoder"].items() if v != plain["encoder"][k]}
    assert {"padding"} <= differ <= {"padding", "stage1_projection"}
    shapes = jax.eval_shape(lambda: encoder.untrained(config, 0))
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    frozen = encoder.FrozenEncoder(zeros, config, "", None, 0)
    found = exporting.torch_arrays(frozen, names.of_torch)
    kind = {50: ((3, 4, 6, 3), True), 18: ((2, 2, 2, 2), False)}[depth]
    expected = foreign.torch_state(foreign.make_resnet(*kind, channels=64))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("to", ["torchvision", "safetensors", "timm", "npz"])
def test_out_and_in_again_is_the_same(tmp_path, monkeypatch, to):
    """Bit by bit; with the images prepared as before."""
    monkeypatch.setattr(exporting, "TARGETS", dict(exporting.TARGETS))
    monkeypatch.setitem(exporting.TARGETS, "timm", exporting.Target("model.safetensors"))
    frozen, _, _ = imported(tmp_path)
    width = {"encoder": frozen.config["encoder"] | {"width": 2 / 64}}
    data = {"data": frozen.config["data"] | {"image_size": 40, "test_resize": 47}}
    frozen = frozen._replace(config=frozen.config | width | data)
    folder = tmp_path / "out"
    exporting.export(frozen, str(folder), to, {})
    again = encoder.load(str(folder)) if to == "npz" else importing.read(str(folder))[0]
    assert flatten(again.variables).keys() == flatten(frozen.variables).keys()
    for name, array in flatten(frozen.variables).items():
        np.testing.assert_array_equal(flatten(again.variables)[name], array)
    assert again.normalization == frozen.normalization
    for field in ("image_size", "test_resize", "resize_method"):
        assert again.config["data"][field] == frozen.config["data"][field]
    exporting.export(frozen, str(folder), to, {})  # again
    other = "safetensors" if to == "npz" else "npz"
    with pytest.raises(UserError, match="of another export; choose another folder"):
        exporting.export(frozen, str(folder), other, {})
    assert Encoder.load(folder).config["data"]["test_resize"] == 47
    text = (folder / "README.md").read_text()
    assert "shorter side to 47 px" in text and "ResNet-3" in text


def test_an_import_is_a_checkpoint(tmp_path):
    """It can be loaded, exported, and replaced; it says what it came from and what it left."""
    frozen, weights, layers = imported(tmp_path, width=2 / 64)
    importing.save(frozen, weights, str(tmp_path / "out"))
    again = encoder.load(str(tmp_path / "out"))
    check_features(again, layers, "torch")
    assert again.origin == again.about["origin"] == "ResNet-3 (model.pth)"
    about = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert about["left_out"] == weights.left_out
    assert "config.checkpoint" in refused(tmp_path / "out")
    lines = "\n".join(importing.described(frozen, weights))
    assert "padding torch" in lines and "online encoder (" in lines and "bn1.num_batches" in lines


def test_what_a_library_cannot_express_is_refused(tmp_path):
    frozen, _, _ = imported(tmp_path)
    exporting.check(frozen.config, "torchvision", measured=False)
    for changes, to, named in (
        ({"padding": "same"}, "torchvision", "--config.encoder.padding=torch"),
        ({"padding": "fixed"}, "detectron2", "ResNet-3"),
        ({"width": 2.0}, "torchvision", "2 times as wide"),
        ({}, "timm", "ResNet-3"),
        ({"depth": 50, "stem": "cifar"}, "detectron2", "encoder.stem"),
        ({"depth": 18, "stage1_projection": True}, "timm", "stage1_projection"),
        ({"bn_epsilon": 1e-3}, "torchvision", "epsilon"),
    ):
        fields = frozen.config["encoder"] | changes
        with pytest.raises(UserError, match=f"--to={to}") as e:
            exporting.check({"encoder": fields}, to, measured=False)
        assert named in str(e.value)
        exporting.check({"encoder": fields}, "safetensors", measured=False)
    fields = frozen.config["encoder"] | {"padding": "same"}
    exporting.check({"encoder": fields}, "torchvision", measured=True)


def run(monkeypatch, capsys, module, *arguments) -> tuple[int, str]:
    """(Exit status, what it printed) of a command."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    try:
        status = module.main() or 0
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out + err


@pytest.mark.slow
def test_the_commands(tmp_path, monkeypatch, capsys):
    """A mistake is one line and status 2; another padding is measured on images."""
    layers = foreign.make_resnet(*BASIC, channels=64)
    write(tmp_path / "model.pth", foreign.torch_bytes(foreign.torch_state(layers)))
    source, out = tmp_path / "model.pth", tmp_path / "out"
    size = ("--image_size=16", "--resize=20")
    status, text = run(monkeypatch, capsys, interop, "import", source, f"--out={out}", *size)
    assert status == 0 and "ResNet-2 (model.pth)" in text and "left out (6)" in text
    missing = tmp_path / "missing"
    status, text = run(monkeypatch, capsys, interop, "import", missing, f"--out={out}")
    assert (status, text) == (2, f"error: {missing}: there is no such file\n")
    command = (export, out, tmp_path / "exported", "--to=torchvision")
    assert run(monkeypatch, capsys, *command)[0] == 0
    again, _ = importing.read(str(tmp_path / "exported"))
    kernel = layers[1, 0, "conv2"].kernel
    np.testing.assert_array_equal(
        again.variables["params"]["stage2_block1_conv2"]["kernel"], kernel
    )
    # As if it had been trained with TensorFlow's padding.
    about = json.loads((out / "encoder.json").read_text())
    about["config"]["encoder"]["padding"] = "same"
    (out / "encoder.json").write_text(json.dumps(about))
    status, text = run(monkeypatch, capsys, *command)
    assert status == 2 and text.startswith("error: --to=torchvision: this encoder pads like 'same'")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "1.png")
    status, text = run(monkeypatch, capsys, *command, f"--measure={tmp_path / 'images'}")
    assert status == 0 and "padding 'same' replaced by PyTorch's" in text
    assert "on 1 images its features differ" in (tmp_path / "exported" / "README.md").read_text()


def test_detectron2_has_its_own_names(tmp_path):
    frozen, _, layers = imported(tmp_path)
    file = io.BytesIO()
    exporting._write_detectron2(file, frozen)
    tree = torch_files.read(write(tmp_path / "d2.pth", file.getvalue()))
    assert tree["matching_heuristics"] is True
    tensors = tree["model"]
    assert len(tensors) == 5 * len(layers)
    shortcut = layers[1, 0, "shortcut"]
    np.testing.assert_array_equal(tensors["res3.0.shortcut.norm.running_mean"], shortcut.norm[2])
    kernel = layers[0, 0, "conv3"].kernel.transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(tensors["res2.0.conv3.weight"], kernel)
    assert tensors["stem.conv1.norm.weight"].shape == (2,)


@pytest.mark.parametrize("padding", ["torch", "same", "fixed"])
def test_onnx(tmp_path, padding):
    """Any padding, batch and size of images; the maps too."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from selfsup_jax.interop import onnx_graph

    frozen, _, layers = imported(tmp_path, padding=padding)
    graph = onnx_graph.model(frozen).SerializeToString()
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for images in (IMAGES, IMAGES[:1, :17, :17]):
        found, maps = session.run(None, {"images": images.transpose(0, 3, 1, 2)})
        expected = foreign.forward(layers, images, padding)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(maps.mean((2, 3)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_torch_itself(tmp_path):
    """Reads what is written here, strictly; is read here, in all its forms."""
    torch = pytest.importorskip("torch")
    frozen, _, layers = imported(tmp_path)
    with open(tmp_path / "out.pth", "wb") as f:
        exporting._write_torchvision(f, frozen)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    expected = foreign.torch_state(layers)
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        if "tracked" not in name:
            np.testing.assert_array_equal(state[name].numpy(), array)
    tree = {
        "state_dict": state,
        "epoch": 3,
        "best": torch.tensor(2.0),
        "half": state["bn1.bias"].half(),
    }
    for legacy in (False, True):
        torch.save(tree, tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
        read = torch_files.names_of(torch_files.read(str(tmp_path / "in.pth")))
        np.testing.assert_array_equal(read["state_dict.bn1.bias"], expected["bn1.bias"])
        assert read["half"].dtype == np.float16 and read["best"] == 2.0
    transposed = {"w": state["conv1.weight"].permute(2, 3, 1, 0)}
    torch.save(transposed, tmp_path / "in.pth")
    kernel = torch_files.read(str(tmp_path / "in.pth"))["w"]
    np.testing.assert_array_equal(kernel, layers[0, 0, "stem"].kernel)


def test_every_layer_is_named_once():
    """Of the real depths, in every project's names."""
    for depth in (18, 50):
        fields = {"depth": depth, "stage1_projection": False}
        convolutions = list(names.convolutions(fields))
        module = resnet.ResNet(depth=depth, width=1 / 64)
        shapes = jax.eval_shape(module.init, jax.random.PRNGKey(0), np.zeros((1, 32, 32, 3)))
        kernels = {path[0] for path in flatten_dict(shapes["params"]) if path[1] == "kernel"}
        assert kernels == set(convolutions)
        deep = resnet.STAGES[depth][1]
        for name_of in (
            names.of_torch,
            names.of_detectron2,
            lambda conv: names.of_haiku(conv, "net"),
            lambda conv, deep=deep: names.of_simclr_tf2(conv, deep),
        ):
            assert len({x for conv in convolutions for x in name_of(conv)}) == 2 * len(convolutions)
