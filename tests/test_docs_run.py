"""Each command of the README and the documents is run by a test, or says what it needs.

A line that no test runs has a comment with `needs`: data, a device or time that tests have not.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
import test_docs
from conftest import REPOSITORY, process_env
from PIL import Image

import selfsup_jax

# What a command runs -> the test that runs it, with smaller networks and data; or CI itself.
RUN_BY = {
    "make demo": "tests/test_library.py::test_a_wheel_has_all_that_a_run_needs",  # its preset
    "make test": ".ci/run",
    "selfsup list": "tests/test_library.py::test_the_list_has_a_line_for_each",
    "selfsup demo": "tests/test_library.py::test_a_wheel_has_all_that_a_run_needs",
    "linear_probe": "tests/test_jobs.py::test_results_are_flat_and_say_where_they_come_from",
    "byol:folder": "tests/test_docs_run.py::test_ones_own_images",
    "selfsup_jax.report": "tests/test_report.py::test_the_command_line",
    "selfsup_jax.export": "tests/test_interop.py::test_the_commands",
    "selfsup_jax.interop": "tests/test_interop.py::test_the_commands",
    "selfsup export": "tests/test_interop.py::test_the_commands",
    "selfsup_jax.data.pack": "tests/test_pack.py::test_the_command_line",
    "selfsup_jax.plan": "tests/test_plan.py::test_a_plan_is_printed_and_written",
    "selfsup_jax.training.reference": (
        "tests/test_reference.py::test_the_command_line_makes_a_file_that_loads"
    ),
    "selfsup verify": "tests/test_checkpoint_files.py::test_verify_has_a_line_for_each_checkpoint",
    "selfsup_jax.verify": (
        "tests/test_checkpoint_files.py::test_verify_has_a_line_for_each_checkpoint"
    ),
}


def commands() -> list[tuple[str, str, str]]:
    """(page, command, comment) of the README's and the documents' blocks.

    Without comments also what is named in a sentence of the library's own commands.
    """
    pages = {REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")}
    found = [(page.name, *rest) for page, *rest in test_docs.commands() if page in pages]
    own = r"`((?:python -m selfsup_jax|selfsup (?!--)|make demo)[^`]*)`"
    for page in sorted(pages):
        found += [(page.name, command, "") for command in re.findall(own, page.read_text())]
    return found


def what_it_runs(command: str) -> str:
    """`make demo`, `selfsup list`, a module, or a config and its preset: `byol:folder`."""
    if config := re.search(r"--config=(?:configs/)?(\w+)(?:\.py)?(?::(\w+))?", command):
        return ":".join(filter(None, config.groups()))
    words = command.split()
    return words[2] if words[1] == "-m" else " ".join(words[:2])


def needs(comment: str) -> bool:
    return bool(re.search(r"\bneeds\b", comment))


def test_each_command_is_run_or_says_what_it_needs():
    unknown = [
        f"{page}: {command}"
        for page, command, comment in commands()
        if what_it_runs(command) not in RUN_BY and not needs(comment)
    ]
    assert not unknown


def test_each_claim_is_one_of_a_command_and_a_test():
    unmarked = {what_it_runs(command) for _, command, comment in commands() if not needs(comment)}
    assert RUN_BY.keys() <= unmarked
    for what, test in RUN_BY.items():
        path, _, name = test.partition("::")
        text = (REPOSITORY / path).read_text()
        if name:
            assert name in {getattr(node, "name", "") for node in ast.parse(text).body}, test
        else:
            assert what in text


@pytest.mark.slow
def test_ones_own_images(tmp_path):
    """The README's lines for a folder of images: `byol:folder`, then an encoder to keep."""
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3)).astype(np.uint8)
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    small = {"steps": 2, "batch_size": 4, "bn_groups": 1, "eval.enabled": False}
    small |= {"encoder.width": 0.1, "data.image_size": 32, "data.test_resize": 36}
    run = ["run_experiment.py", "--config=configs/byol.py:folder", f"--workdir={tmp_path}/mine"]
    run += [f"--config.data.dir={tmp_path}/images", "--compilation_cache="]
    run += [f"--config.{field}={value}" for field, value in small.items()]
    export = ["-m", "selfsup_jax.export", f"{tmp_path}/mine", f"{tmp_path}/my_encoder"]
    for words in (run, export):
        done = subprocess.run(
            [sys.executable, *words],
            **{"cwd": REPOSITORY, "env": process_env(), "timeout": 300},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    encoder = selfsup_jax.Encoder.load(str(tmp_path / "my_encoder"))
    features = encoder.transform([str(tmp_path / "images" / "a" / "0.png")])
    assert features.shape[0] == 1 and np.isfinite(features).all()
