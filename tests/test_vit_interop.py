"""Vision Transformers of timm, DINO and MoCo v3, in and out."""

from __future__ import annotations

import json
from collections import OrderedDict

import foreign
import jax
import numpy as np
import pytest
import safetensors.numpy
from test_interop import accounted, refused, write

from configs import common, moco
from moco_jax import method
from selfsup_jax import Encoder, export
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.interop import exporting, importing, torch_files
from selfsup_jax.models import encoders, positions

WIDTH, DEPTH, PATCH = 24, 2, 4
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)


def vit(**changes):
    return foreign.vit_state(WIDTH, DEPTH, PATCH, **changes)


def check_features(frozen, state, heads) -> None:
    """Equal to the forward pass in NumPy with so many heads, and to no other."""
    represent = jax.jit(encoder.module(frozen.config, "float32").apply)
    found = np.asarray(represent(frozen.variables, IMAGES))
    for other in (1, 12):
        expected = foreign.vit_forward(state, IMAGES, other)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert (error < 1e-4) == (other == heads), (other, error)


@pytest.fixture
def timm_file(tmp_path):
    """timm's weights with a classifier, and its `config.json`."""
    state = vit() | {"head.weight": np.ones((5, WIDTH), np.float32), "head.bias": np.ones(5, "f4")}
    path = write(tmp_path / "model.safetensors", safetensors.numpy.save(state))
    images = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 8, 8], "crop_pct": 0.8}
    images |= {"interpolation": "bicubic"}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": images}))
    return path, state


def test_timm(timm_file):
    path, state = timm_file
    frozen, weights = importing.read(path)
    check_features(frozen, vit(), heads=1)
    accounted(state, weights)
    assert set(weights.left_out) == {"head.weight", "head.bias"}
    assert frozen.normalization == ((0.5,) * 3, (0.5,) * 3)
    data = frozen.config["data"]
    assert (data["image_size"], data["test_resize"], data["resize_method"]) == (8, 10, "bicubic")
    maps = Encoder(frozen).apply(frozen.variables, IMAGES, dense=True)
    assert maps.shape == (2, 2, 2, WIDTH)


def test_dino(tmp_path):
    """The encoder alone; and in a file of the training, the teacher's."""
    path = write(tmp_path / "pretrain.pth", foreign.torch_bytes(vit()))
    frozen, weights = importing.read(path)
    check_features(frozen, vit(), heads=1)
    accounted(vit(), weights)
    head = {"mlp.0.weight": np.ones((3, WIDTH), np.float32)}
    head |= {"last_layer.weight_g": np.ones((4, 1), np.float32)}
    tree = {
        network: OrderedDict(
            vit(prefix=f"{root}backbone.", seed=seed)
            | {f"{root}head.{k}": v for k, v in head.items()}
        )
        for network, root, seed in (("student", "module.", 0), ("teacher", "", 1))
    }
    tree |= {"optimizer": {"state": {0: {"exp_avg": np.ones(3, np.float32)}}}, "epoch": 3}
    tree |= {"dino_loss": {"center": np.zeros((1, 4), np.float32)}}
    path = write(tmp_path / "checkpoint.pth", foreign.torch_bytes(tree))
    frozen, weights = importing.read(path)
    check_features(frozen, vit(seed=1), heads=1)
    accounted(torch_files.names_of(tree), weights)
    assert frozen.origin.startswith("DINO, ")
    assert sum("student" in why for why in weights.left_out.values()) == len(tree["student"])


def moco_file():
    roots = ("module.base_encoder", "module.momentum_encoder")
    state = OrderedDict()
    for seed, root in enumerate(roots):
        state |= vit(prefix=f"{root}.", seed=seed)
        state |= foreign.mlp_state(f"{root}.head", (WIDTH, 8, 8, 4), seed)
    state |= foreign.mlp_state("module.predictor", (4, 8, 4), seed=2)
    return {"epoch": 300, "arch": "vit_small", "state_dict": state}


def test_moco_v3(tmp_path):
    """Both networks and the predictor, by the names that a run of MoCo v3 has."""
    tree = moco_file()
    path = write(tmp_path / "vit.pth.tar", foreign.torch_bytes(tree))
    frozen, weights = importing.read(path)
    check_features(frozen, vit(), heads=12)
    accounted(torch_files.names_of(tree), weights)
    assert all("num_batches" in name for name in weights.left_out)
    small = {f"encoder.vit.{k}": v for k, v in frozen.config["encoder"]["vit"].items()}
    small |= {"data.image_size": 8, "data.test_resize": 8, "projector.hidden_sizes": (8, 8)}
    small |= {"predictor.hidden_sizes": (8,)}
    small |= {f"{head}.output_size": 4 for head in ("projector", "predictor")}
    config = moco.get_config("v3_vit")
    config.update_from_flattened_dict(small)
    made = method.build(config, None, 10, 0)
    state = jax.eval_shape(made.init_state, jax.random.PRNGKey(0))
    networks = ("online_params", "online_stats", "target_params", "target_stats")
    expected = {
        "/".join([name, *(key.key for key in path)]): leaf.shape
        for name in networks
        for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(state, name))[0]
    }
    assert {name: x.shape for name, x in weights.arrays.items()} == expected


def test_moco_v3s_positions_tell_its_heads(tmp_path):
    """Of its encoder alone, as its `convert_to_deit.py` writes it."""
    state = vit() | {"pos_embed": positions.sincos(2, 2, WIDTH)[None]}
    path = write(tmp_path / "deit.pth", foreign.torch_bytes({"model": state}))
    frozen, _ = importing.read(path)
    check_features(frozen, state, heads=12)
    assert frozen.config["encoder"]["vit"]["positions"] == "sincos"


def test_what_is_no_plain_vit_is_refused(tmp_path):
    good, ones = vit(), lambda *shape: np.ones(shape, np.float32)
    cases = {
        "blocks.0.ls1.gamma": good | {"blocks.0.ls1.gamma": ones(WIDTH)},
        "fc_norm.weight": good | {"fc_norm.weight": ones(WIDTH)},
        "blocks.1.attn.qkv.bias": {k: v for k, v in good.items() if k != "blocks.1.attn.qkv.bias"},
        "pos_embed": good | {"pos_embed": ones(1, 1 + 6, WIDTH)},
        "patch_embed.proj.weight": good | {"patch_embed.proj.weight": ones(WIDTH, 1, 4, 4)},
        "class_token has the shape": good | {"cls_token": ones(WIDTH)},
        "not finite": good | {"norm.bias": np.full(WIDTH, np.nan, np.float32)},
        "a.b., c.": vit(prefix="a.b.") | vit(prefix="c."),
    }
    for i, (named, state) in enumerate(cases.items()):
        assert named in refused(write(tmp_path / f"{i}.pth", foreign.torch_bytes(dict(state))))
    frozen, _ = importing.read(str(tmp_path / "7.pth"), prefix="c.")
    check_features(frozen, vit(), heads=1)


def exported(frozen, folder, to):
    exporting.check(frozen.config, to, measured=False)
    exporting.export(frozen, str(folder), to, {})
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_out_and_in_again_are_the_same_bits(timm_file, tmp_path):
    frozen, _ = importing.read(timm_file[0])
    arrays = exported(frozen, tmp_path / "timm", "timm")
    original = vit()
    assert arrays.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    about = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert about["model_args"] == {
        **{"img_size": 8, "patch_size": 4, "embed_dim": WIDTH, "depth": 2},
        **{"num_heads": 1, "mlp_ratio": 4},
    }
    assert about["pretrained_cfg"]["first_conv"] == "patch_embed.proj"
    card = (tmp_path / "timm" / "README.md").read_text()
    assert '"vit_small_patch16_224", img_size=8, patch_size=4, embed_dim=24' in card

    exported(frozen, tmp_path / "ours", "safetensors")
    for folder in ("timm", "ours"):
        again, _ = importing.read(str(tmp_path / folder))
        jax.tree.map(np.testing.assert_array_equal, again.variables, frozen.variables)
        assert again.normalization == frozen.normalization


def test_what_a_library_lacks_is_refused(timm_file, tmp_path, capsys, monkeypatch):
    frozen, weights = importing.read(timm_file[0])
    importing.save(frozen, weights, str(tmp_path / "imported"))
    for to in ("torchvision", "detectron2"):
        command = ["export", str(tmp_path / "imported"), str(tmp_path / "out"), f"--to={to}"]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as stopped:
            export.main()
        message = f"error: --to={to}: holds ResNets; npz, safetensors, timm can hold vit_s16"
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith(message)
    frozen.config["encoder"]["vit"]["layer_norm_epsilon"] = 1e-5
    with pytest.raises(UserError, match="--to=timm: it has norms of epsilon 1e-06, not 1e-05"):
        exporting.check(frozen.config, "timm", measured=False)


def test_a_run_starts_from_the_sizes_that_its_encoders_name_stands_for():
    """An import says what a name means; a config has 0 there."""
    named = common.encoder(name="vit_s16", vit=common.vit(heads=12)).to_dict()
    sizes = {"width": 384, "depth": 12, "heads": 12, "patch": 16}
    imported = {"name": "vit_s16", "vit": named["vit"] | sizes}
    assert encoders.function(named) == encoders.function(imported)
    other = named | {"vit": named["vit"] | {"heads": 6}}
    assert encoders.function(named) != encoders.function(other)
