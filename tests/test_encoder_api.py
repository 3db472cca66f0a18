"""`selfsup_jax.Encoder`, in other people's programs."""

from __future__ import annotations

import functools
import pathlib
import re
import warnings

import foreign
import jax
import numpy as np
import pytest
import tiny_jobs
from conftest import REPOSITORY
from PIL import Image

import selfsup_jax
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import features
from selfsup_jax.interop import importing, measuring
from selfsup_jax.models import resnet

BASIC = ((1, 0, 0, 1), False)


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """An import, and the file that it is of."""
    monkeypatch.setitem(resnet.STAGES, 2, BASIC)
    state = foreign.torch_state(foreign.make_resnet(*BASIC, stem=3))
    path = tmp_path / "model.pth"
    path.write_bytes(foreign.torch_bytes(state))
    frozen, weights = importing.read(str(path), image_size=8, test_resize=10)
    importing.save(frozen, weights, str(tmp_path / "imported"))
    return tmp_path / "imported"


@pytest.fixture
def images(tmp_path):
    """Photographs of different sizes, as files."""
    rng = np.random.default_rng(0)
    paths = []
    for i, shape in enumerate([(20, 31, 3), (12, 12, 3), (40, 17, 3)]):
        path = tmp_path / f"image_{i + 1}.png"
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def test_it_is_saved_as_it_is(imported, tmp_path):
    encoder = selfsup_jax.Encoder.load(imported)
    encoder.save(tmp_path / "saved")
    again = selfsup_jax.Encoder.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, again.variables, encoder.variables)
    assert again.origin == encoder.origin and again.image_size == encoder.image_size == 8
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has a config\.json that is not of an export"):
        encoder.save(tmp_path / "other")


@pytest.mark.slow
def test_features_are_those_of_the_jobs(imported, tmp_path):
    """Of an import that a job takes like a run: the same decoding, resizing and normalisation."""
    data = tiny_jobs.write_data(tmp_path / "data")
    changes = {"data__name": "folder", "data__dir": str(data), "split": "test"}
    with pytest.raises(UserError, match=r"config\.data\.name='': must be given"):
        tiny_jobs.run_job("embed", imported, tmp_path / "none")
    results = tiny_jobs.run_job("embed", imported, tmp_path / "job", **changes)
    assert results["origin"] == "ResNet-2 (model.pth)" and results["run"] is None
    with np.load(tmp_path / "job" / "features.npz") as table:
        found = selfsup_jax.Encoder.load(imported).transform(table["names"].tolist(), batch_size=5)
        np.testing.assert_allclose(found, table["features"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_paths_pictures_and_arrays_are_the_same(imported, images, recwarn):
    encoder = selfsup_jax.Encoder.load(imported)
    assert (encoder.num_features, encoder.image_size) == (16, 8)
    of_paths = encoder.transform(images, batch_size=2)
    assert of_paths.shape == (3, 16) and of_paths.dtype == np.float32
    pictures = [Image.open(path) for path in images]
    np.testing.assert_array_equal(encoder.transform(pictures, batch_size=2), of_paths)
    arrays = (np.asarray(picture) for picture in pictures)  # any iterable
    np.testing.assert_array_equal(encoder.transform(arrays, batch_size=2), of_paths)
    one = encoder.transform(str(images[0]))
    np.testing.assert_allclose(one, of_paths[:1], rtol=1e-5)
    # The maps' mean over the pixels is the representation; `apply` is the same network.
    maps = encoder.transform(images, dense=True)
    assert maps.shape == (3, 4, 4, 16)
    np.testing.assert_allclose(maps.mean((1, 2)), of_paths, rtol=1e-4, atol=1e-6)
    views = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 3)).astype(np.uint8)
    normalized = encoder.normalize(views[:, 1:9, 1:9])  # the shorter side is as recorded
    applied = jax.jit(encoder.apply)(encoder.variables, normalized)
    np.testing.assert_allclose(applied, encoder.transform(views), rtol=1e-4, atol=1e-6)
    assert not recwarn.list


def test_what_is_not_normalised_is_refused(imported):
    encoder = selfsup_jax.Encoder.load(imported)
    pixels = np.full((2, 8, 8, 3), 200, np.uint8)
    apply = functools.partial(encoder.apply, encoder.variables)
    for images in (pixels, pixels.astype(np.int32), encoder.normalize(pixels)[0]):
        for run in (apply, jax.jit(apply)):
            with pytest.raises(TypeError, match=r"^apply: images are .*`normalize` makes"):
                run(images)
    with pytest.raises(ValueError, match=r"values up to 200, as if not normalised"):
        apply(pixels.astype(np.float32))
    with pytest.raises(TypeError, match="float32; must be uint8"):
        encoder.normalize(np.zeros((1, 8, 8, 3), np.float32))
    assert np.isfinite(apply(encoder.normalize(pixels))).all()
    extract = features.Extractor(lambda variables, x: x.mean((1, 2)), (0.5,) * 3, (0.5,) * 3)
    batch = {"image": pixels.astype(np.float32) / 255, "label": np.zeros(2, np.int32)}
    with pytest.raises(TypeError, match="float32; must be uint8"):
        extract({}, [batch])


def test_what_is_no_image_is_told(imported, tmp_path):
    encoder = selfsup_jax.Encoder.load(imported)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for given, named in (
        ([tmp_path / "broken.jpg"], "broken.jpg: cannot be decoded"),
        ([], "no images"),
        ([np.zeros((8, 8, 3))], r"image 0 is float64 \[8, 8, 3\]"),
        (np.zeros((2, 8, 8), np.uint8), r"uint8 \[2, 8, 8\]|image 0 is uint8"),
        (np.zeros((9, 8), np.uint8), r"image 0 is uint8 \[9, 8\]"),
    ):
        with pytest.raises(UserError, match=named):
            encoder.transform(given)
    with pytest.raises(UserError, match="batch_size=0"):
        encoder.transform(np.zeros((9, 8, 3), np.uint8), batch_size=0)
    with pytest.warns(UserWarning, match="1 of 2 images"):
        encoder.transform([np.zeros((3, 9, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)])


@pytest.mark.slow
def test_the_lines_of_the_documentation_run(imported, images, monkeypatch, tmp_path):
    """Of `README.md` and `docs/weights.md`, with a checkpoint and images of the names there."""
    monkeypatch.chdir(tmp_path)
    imported.rename("my_encoder")
    pathlib.Path("model.pth").rename("CHECKPOINT")  # a file of another project will do too
    with Image.open(images[0]) as image:
        image.resize((24, 24)).save("image_1.jpg")
    for name in ("README.md", "docs/weights.md"):
        blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / name).read_text(), re.DOTALL)
        (code,) = [block for block in blocks if "Encoder.load" in block]
        scope: dict = {}
        with warnings.catch_warnings():  # the file's name does not tell how small its images are
            warnings.filterwarnings("ignore", message=".*less than half")
            exec(code, scope)
        assert scope["features"].shape == (2, 16)
    assert scope["maps"].ndim == 4
    normalized = scope["encoder"].normalize(np.zeros((1, 8, 8, 3), np.uint8))
    assert scope["represent"](scope["encoder"].variables, normalized).shape == (1, 16)


@pytest.mark.slow
def test_another_padding_is_measured_on_images(imported, images, tmp_path):
    """None for an encoder that pads so already; some for one with TensorFlow's padding."""
    frozen = selfsup_jax.evaluation.encoder.load(str(imported))
    (tmp_path / "folder").mkdir()
    for path in images:
        path.rename(tmp_path / "folder" / path.name)
    line = measuring.padding(frozen, str(tmp_path / "folder"))
    assert "on 3 images" in line and "differ by 0.0 %" in line and "cosine 1.0000" in line
    fields = frozen.config["encoder"] | {"padding": "same"}
    same = frozen._replace(config=frozen.config | {"encoder": fields})
    line = measuring.padding(same, str(tmp_path / "folder"))
    share = float(re.search(r"differ by ([\d.]+) %", line)[1])
    assert 1 < share < 200 and "cosine 1.0000" not in line
    (tmp_path / "empty").mkdir()
    for folder, named in (("empty", "no images"), ("missing", "not a directory")):
        with pytest.raises(UserError, match=named):
            measuring.padding(same, str(tmp_path / folder))
