"""Which files of a folder are images: each once, whatever else lies there."""

from __future__ import annotations

import os
import pathlib
import socket

import pytest
import tiny_runs
from PIL import Image

from selfsup_jax.data import announce, inputs, scan, sources
from selfsup_jax.errors import UserError

FIELD = "data.train_split"


def write(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path)


def found(root: pathlib.Path, **splits: str) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The sorted files of each split, and all that is left out."""
    roots = {name: str(root / folder) for name, folder in (splits or {"train": "."}).items()}
    result = scan.images(roots)
    left_out: dict[str, int] = {}
    for _, skipped in result.values():
        left_out |= skipped
    return {name: sorted(paths) for name, (paths, _) in result.items()}, left_out


def test_loops_of_links_do_not_multiply_the_images(tmp_path):
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(6)]
    for name in names:
        write(tmp_path / name)
    for link, target in (("a/up", ".."), ("b/a", "../a"), ("b/self", "."), ("c", "a")):
        (tmp_path / link).symlink_to(target, target_is_directory=True)
    files, left_out = found(tmp_path)
    assert files == {"train": sorted(names)}
    assert left_out == {"links to folders that are taken already": 4}


def test_a_linked_folder_elsewhere_is_taken_once(tmp_path):
    write(tmp_path / "elsewhere" / "deep" / "1.png")
    root = tmp_path / "images"
    write(root / "a" / "0.png")
    for link in ("b", "c"):
        (root / link).symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../images")
    files, left_out = found(root)
    assert files == {"train": ["a/0.png", "b/deep/1.png"]}
    assert left_out == {"links to folders that are taken already": 2}


def test_a_file_counts_once_under_its_own_name(tmp_path):
    write(tmp_path / "z" / "0.png")
    write(tmp_path / "z" / "1.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "soft.png").symlink_to("../z/0.png")
    os.link(tmp_path / "z" / "1.png", tmp_path / "z" / "hard.png")
    write(tmp_path / "outside.txt.png")
    files, left_out = found(tmp_path / "z")
    assert files == {"train": ["1.png", "0.png"][::-1]} and sum(left_out.values()) == 1
    files, left_out = found(tmp_path)
    assert files == {"train": ["outside.txt.png", "z/0.png", "z/1.png"]}
    assert left_out == {"links to images that are taken already": 2}


def test_links_carry_no_training_image_into_the_test_split(tmp_path):
    for i in range(4):
        write(tmp_path / "train" / f"{i}.png")
    write(tmp_path / "test" / "own.png")
    (tmp_path / "test" / "train").symlink_to("../train")
    (tmp_path / "test" / "one.png").symlink_to("../train/1.png")
    (tmp_path / "test" / "all").symlink_to("..")
    (tmp_path / "train" / "all").symlink_to("..")
    os.link(tmp_path / "train" / "2.png", tmp_path / "test" / "two.png")
    (tmp_path / "val").symlink_to("test")  # another name of the same split
    files, _ = found(tmp_path, train="train", test="test", val="val")
    assert files["train"] == [f"{i}.png" for i in range(4)]
    assert files["test"] == files["val"] == ["own.png"]
    source = sources.load("folder", str(tmp_path), "train+test", FIELD)
    assert source.num_examples == 5 and "links to images" in source.left_out


def test_a_test_folder_that_is_the_training_folder_is_empty(tmp_path):
    write(tmp_path / "train" / "0.png")
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(UserError, match="holds no images"):
        sources.load("folder", str(tmp_path), "test", FIELD)


def test_pipes_sockets_and_broken_links_are_counted_not_read(tmp_path, monkeypatch):
    write(tmp_path / "0.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        (tmp_path / "null.png").symlink_to("/dev/null")
        (tmp_path / "nowhere.png").symlink_to("gone.png")
        (tmp_path / "self.png").symlink_to("self.png")
        files, left_out = found(tmp_path)
    assert files == {"train": ["0.png"]}
    assert left_out == {"pipes, sockets or devices": 3, "broken links": 2}


def test_what_is_no_image_is_named_by_its_kind(tmp_path):
    for name in ("0.png", "1.WEBP", "2.Tiff", "3.tif"):
        write(tmp_path / name)
    for name in ("a.heic", "b.HEIC", "c.dcm", "README", ".hidden", "d.heic"):
        (tmp_path / name).write_text("no image")
    files, left_out = found(tmp_path)
    assert files == {"train": ["0.png", "1.WEBP", "2.Tiff", "3.tif"]}
    assert scan.listed(left_out) == "3 .heic, 1 .dcm, 1 files without an ending"
    many = {f".{i:02}": 1 for i in range(11)} | {".txt": 1234}
    assert scan.listed(many).startswith("1,234 .txt, 1 .00, ")
    assert scan.listed(many).endswith(", 4 others")


def test_a_folder_of_other_files_is_told_what_it_holds(tmp_path):
    (tmp_path / "a.heic").write_text("")
    with pytest.raises(UserError, match=r"holds no images \(\.jpg.*; it holds 1 \.heic$"):
        sources.load("folder", str(tmp_path), "train", FIELD)


def test_a_file_system_that_lists_the_same_inode_for_all(tmp_path, monkeypatch):
    """As FUSE does for file systems without inodes."""
    for i in range(5):
        write(tmp_path / f"{i}.png")
    os.link(tmp_path / "1.png", tmp_path / "hard.png")

    class Entry:
        def __init__(self, entry):
            self.is_symlink, self.is_dir, self.is_file = (
                *(entry.is_symlink, entry.is_dir),
                entry.is_file,
            )
            self.name, self.stat, self.inode = entry.name, entry.stat, lambda: 2**32 - 1

    class Listing(list):
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Listing(map(Entry, real(path))))
    files, left_out = found(tmp_path)
    assert files == {"train": [f"{i}.png" for i in range(5)]}
    assert left_out == {"links to images that are taken already": 1}


def test_a_name_that_is_not_utf_8_is_a_name(tmp_path):
    write(tmp_path / "0.png")
    os.rename(tmp_path / "0.png", os.fsencode(str(tmp_path)) + b"/\xff\xe9.png")
    source = sources.load("folder", str(tmp_path), "train", FIELD)
    assert os.fsencode(source.describe(0)).endswith(b"/\xff\xe9.png")


# ----------------------------------------------------------------------------- what is said


def loaded(root: pathlib.Path, capsys, **changes) -> tuple[inputs.Data, str, object]:
    announce._said.clear()
    config = tiny_runs.tiny_config(root, **changes)
    config.data.train_split = config.data.test_split = ""
    data = inputs.load_data(config)
    return data, capsys.readouterr().err, config


def test_the_classes_are_said_and_can_be_switched_off(tmp_path, capsys):
    for i in range(40):
        write(tmp_path / f"2026-11-{i % 5:02}" / f"{i}.png")
    (tmp_path / "notes.txt").write_text("")
    data, said, config = loaded(tmp_path, capsys, eval__enabled=True)
    assert said == (
        f"{tmp_path} train[:90%]: 36 images with the 5 sub-folders 2026-11-00, 2026-11-01, "
        "2026-11-02, 2026-11-03, ... as classes and 10 % of the images held out "
        "(--config.data.labels=none: no classes); not taken: 1 .txt\n"
    )
    assert data.train.num_classes == 5 and data.test is not None
    data, said, config = loaded(tmp_path, capsys, eval__enabled=True, data__labels="none")
    assert said == f"{tmp_path} train: 40 images; not taken: 1 .txt\n"
    assert data.train.num_classes is None and data.train.labels is None and data.test is None
    assert (config.data.train_split, config.data.test_split) == ("train", "train[:0]")
    batch = next(inputs.train_batches(config, data, 0))
    assert "label" not in batch


def test_without_labels_a_run_is_that_of_the_images_without_folders(tmp_path, capsys):
    """The steps, not the order: that is of the relative paths."""
    tiny_runs.write_images(tmp_path / "classes", 3, 20)
    labelled, _, _ = loaded(tmp_path / "classes", capsys, data__labels="none")
    tiny_runs.write_images(tmp_path / "flat", 0, 20)
    flat, _, _ = loaded(tmp_path / "flat", capsys)
    for field in ("num_examples", "class_names", "labels", "shape", "kind"):
        assert getattr(labelled.train, field) == getattr(flat.train, field)
