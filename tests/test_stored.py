"""Files from strangers: what they say of themselves is checked before they are read."""

from __future__ import annotations

import io
import json
import os
import pathlib
import resource
import shutil
import zipfile
from collections.abc import Callable

import jax
import numpy as np
import pytest
from conftest import assert_same

from selfsup_jax import stored
from selfsup_jax.data import arrays
from selfsup_jax.errors import UserError
from selfsup_jax.evaluation import encoder
from selfsup_jax.viz.report import files as report_files

CONFIG = {
    "encoder": {
        **{"depth": 18, "width": 0.004, "stem": "cifar", "stage1_projection": False},
        **{"zero_init_gamma": False, "zero_init_basic": True},
    },
    "data": {"name": "folder", "image_size": 8},
    "views": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]},
}
KERNEL = "params/stem/kernel"
LARGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (110000000000000,), }"


class Explodes:
    """An object whose unpickling is noticed."""

    def __reduce__(self):
        return (os.mkdir, ("was_executed",))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode()


def rewrite(path: pathlib.Path, name: str, content: bytes, **options) -> None:
    """The same archive, but for one of its arrays."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for entry, data in (entries | {f"{name}.npy": content}).items():
            archive.writestr(entry, data)


def mark_encrypted(path: pathlib.Path) -> None:
    """Sets the flag of the first entry in the list at the archive's end."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(content))


def make_a_pipe(path: pathlib.Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


HOSTILE_ARRAYS: dict[str, Callable[[pathlib.Path, str], None]] = {
    "440,000,000,000,000 bytes, but has 0": lambda p, n: rewrite(p, n, header(LARGE)),
    "Python objects": lambda p, n: rewrite(p, n, npy(np.asarray([Explodes()], object))),
    "is no array: ": lambda p, n: rewrite(p, n, header("(" * 5000 + ")" * 5000)),
    "unknown version": lambda p, n: rewrite(p, n, header(LARGE, b"\x07\x00")),
    "is no array": lambda p, n: rewrite(p, n, b"import os"),
    "is encrypted": lambda p, n: mark_encrypted(p),
    "not a zip file": lambda p, n: p.write_bytes(npy(np.zeros(3))),
    "is not a file": lambda p, n: make_a_pipe(p),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("original")
    shapes = jax.eval_shape(lambda: encoder.untrained(CONFIG, 0))
    variables = jax.tree.map(
        lambda x: np.random.default_rng(0).normal(size=x.shape).astype("f4"), shapes
    )
    encoder.export(encoder.FrozenEncoder(variables, CONFIG, "", None, 7), str(folder))
    assert_same(encoder.load(str(folder)).variables, variables)
    return folder


@pytest.fixture
def export(original, tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(tmp_path)
    return pathlib.Path(shutil.copytree(original, tmp_path / "export"))


def refused(read: Callable[[], object], named: pathlib.Path) -> str:
    """The one line that is said; nothing was executed, and little memory taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB
    assert not pathlib.Path("was_executed").exists()
    line = str(error.value)
    assert str(named) in line and len(line.splitlines()) == 1 and len(line) < 500
    return line


@pytest.mark.parametrize("hint", HOSTILE_ARRAYS)
def test_the_arrays_of_an_export_from_a_stranger(export, hint):
    HOSTILE_ARRAYS[hint](export / "encoder.npz", KERNEL)
    assert hint in refused(lambda: encoder.load(str(export)), export)


def test_an_export_of_another_kind_or_size_of_arrays(export):
    path = export / "encoder.npz"
    rewrite(path, KERNEL, npy(np.asarray(["a" * 9])))
    assert f"{KERNEL} is <U9, not floating-point" in refused(
        lambda: encoder.load(str(export)), export
    )
    # Packed to a thousandth: the shape is refused by its header, before 256 MB are unpacked.
    zeros = npy(np.zeros((8000, 8000), np.float32))
    rewrite(path, KERNEL, zeros, compression=zipfile.ZIP_DEFLATED)
    assert f"{KERNEL} has the shape (8000, 8000)" in refused(
        lambda: encoder.load(str(export)), export
    )


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"views": [1, 2]}, "'views' is no section"),
        ({"views": {"mean": [0, 0, 0], "std": [1, 0, 1]}}, "views.std is not three"),
        ({"views": {"mean": [0, 0, "os"], "std": [1, 1, 1]}}, "views.mean is not three"),
        ({"eval": "__import__('os').mkdir('was_executed')"}, "'eval' is no section"),
        ({"encoder": {"depth": [18], "width": {}}}, ""),
        ({"encoder": CONFIG["encoder"] | {"width": 1e300}}, ""),
        ({"data": {"name": "folder", "image_size": "8"}}, ""),
    ],
)
def test_the_description_of_an_export_from_a_stranger(export, changes, hint):
    about = json.loads((export / "encoder.json").read_text())
    about["config"] |= changes
    (export / "encoder.json").write_text(json.dumps(about))
    assert hint in refused(lambda: encoder.load(str(export)), export)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b'{"config":' * 10**5, "is nested too deeply"),
        (b'{"config": ' + b'{"a":' * 700 + b"1" + b"}" * 701, ""),
        (b" " * (2**24 + 1), "more than 16,777,216 bytes"),
        (b"\xff\xfe", ""),
        (b'{"config": {}, "step": 1e999}', ""),
        (b"[1]", "no JSON object"),
    ],
)
def test_a_description_that_is_none(export, content, hint):
    (export / "encoder.json").write_bytes(content)
    assert hint in refused(lambda: encoder.load(str(export)), export)


def test_a_pipe_in_place_of_the_description_is_not_waited_for(export):
    make_a_pipe(export / "encoder.json")
    assert "is not a file" in refused(lambda: encoder.load(str(export)), export)


# ------------------------------------------------------------------------- data in arrays


@pytest.mark.parametrize("hint", HOSTILE_ARRAYS)
@pytest.mark.parametrize("name", ["train_images", "train_labels", "class_names"])
def test_a_data_set_from_a_stranger(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.npz"
    np.savez(path, train_images=np.ones((4, 2, 2, 3), np.uint8), train_labels=np.arange(4))
    HOSTILE_ARRAYS[hint](path, name)
    arrays._open.cache_clear()
    assert hint in refused(lambda: arrays.load(str(path), "train", "split"), path)


def test_a_folder_of_arrays_from_a_stranger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "train_images.npy"
    for content, hint in (
        (header(LARGE), "440,000,000,000,000 bytes, but has 0"),
        (npy(np.asarray([Explodes()], object)), "Python objects"),
        (None, "is not a file"),
    ):
        images.write_bytes(content) if content else make_a_pipe(images)
        arrays._open.cache_clear()
        assert hint in refused(lambda: arrays.load(str(tmp_path), "train", "split"), tmp_path)


def test_names_of_classes_that_are_none(tmp_path):
    path = tmp_path / "data.npz"
    for names in (np.asarray("a"), np.asarray([["a", "b"]]), np.zeros(2, "<f4,<f4")):
        images = np.ones((2, 2, 2, 3), np.uint8)
        np.savez(path, train_images=images, train_labels=np.arange(2), class_names=names)
        arrays._open.cache_clear()
        assert "class_names is" in refused(lambda: arrays.load(str(path), "train", "s"), path)


def test_what_does_not_fit_into_memory_is_not_read(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=np.zeros(2**20))
    headers = stored.npz_headers(str(tmp_path / "a.npz"))
    monkeypatch.setattr(os, "sysconf", lambda name: 2**11)  # a machine of 4 MiB
    with pytest.raises(ValueError, match=r"need 0\.0 GiB, this machine's memory has 0\.0"):
        stored.read_npz(str(tmp_path / "a.npz"), ["x"], headers)


def test_a_confusion_matrix_from_a_stranger_is_left_out_of_the_report(tmp_path):
    path = tmp_path / "confusion.npz"
    np.savez(path, matrix=np.eye(2, dtype=int))
    assert report_files.read_confusion(str(path), []).matrix.shape == (2, 2)
    rewrite(path, "matrix", header(LARGE))
    notes: list[str] = []
    assert report_files.read_confusion(str(path), notes) is None
    assert len(notes) == 1 and "440,000,000,000,000 bytes" in notes[0]
