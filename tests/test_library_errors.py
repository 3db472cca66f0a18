"""What libraries print about errors that they also raise."""

from __future__ import annotations

import logging
import sys
import types

import pytest
from absl import logging as absl_logging

from selfsup_jax.run import library_errors


@pytest.fixture
def others(monkeypatch):
    """What reaches the hook that was there before."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    return seen


def unraisable(error: BaseException) -> None:
    sys.unraisablehook(types.SimpleNamespace(exc_value=error, exc_type=type(error)))


def test_tracebacks_of_closed_event_loops_go_to_a_file_each_once(tmp_path, others, capfd):
    library_errors.catch(str(tmp_path))
    library_errors.catch(str(tmp_path))
    for _ in range(300):
        unraisable(RuntimeError("Event loop is closed"))
    unraisable(ValueError("a bug of ours"))
    assert len(others) == 1 and isinstance(others[0].exc_value, ValueError)
    written = (tmp_path / library_errors.FILE).read_text()
    assert written.count("RuntimeError: Event loop is closed") <= 1
    assert capfd.readouterr().err == ""


def test_errors_that_orbax_logs_go_to_a_file(tmp_path, caplog):
    library_errors.catch(str(tmp_path))
    logger = absl_logging.get_absl_logger()
    for path, level in (("orbax/a.py", logging.ERROR), ("orbax/a.py", 30), ("ours.py", 40)):
        logger.handle(logger.makeRecord("absl", level, path, 1, f"{path} {level}", (), None))
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    assert (tmp_path / library_errors.FILE).read_text() == (
        "orbax/a.py 40\nTask exception was never retrieved\n"
    )


def test_without_room_in_the_workdir_they_go_to_the_temporary_files(tmp_path, others, monkeypatch):
    monkeypatch.setattr(library_errors.tempfile, "gettempdir", lambda: str(tmp_path))
    library_errors.catch("/dev/full/no/folder")
    unraisable(RuntimeError("Event loop is closed: elsewhere"))
    (path,) = tmp_path.iterdir()
    assert "Event loop is closed: elsewhere" in path.read_text()
