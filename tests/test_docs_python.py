"""The examples of `docs/python.md` run from top to bottom, and what it refers to is there."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types

import jax
import pytest
import tiny_runs
from conftest import REPOSITORY

from selfsup_jax.models import resnet

PAGE = (REPOSITORY / "docs" / "python.md").read_text()


def found(name):
    """What `a.b.c` names, whatever of it is a module."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def test_what_the_site_adds_is_documented():
    names = re.findall(r"^::: (\S+)$", PAGE, re.MULTILINE)
    assert len(names) > 15 and len(names) == len(set(names))
    for name in names:
        assert inspect.getdoc(found(name)), name


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch):
    """In an empty folder; with an encoder that compiles at once, on one device."""
    monkeypatch.chdir(tmp_path)
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda *_, **__: one)
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)
    monkeypatch.setattr(jax, "local_device_count", lambda *_: 1)
    monkeypatch.setitem(resnet.STAGES, 10, tiny_runs.ONE_BLOCK)
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for match in re.finditer(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        line = PAGE[: match.start(1)].count("\n")  # a traceback names the page's own line
        exec(compile("\n" * line + match[1], "docs/python.md", "exec"), page.__dict__)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert page.features.shape == (64, page.encoder.num_features)
