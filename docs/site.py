"""A hook of mkdocs: the site's pages lie as in the repository, so that one link serves both.

Only what belongs to the site is copied: Markdown, pictures, records, notebooks.
"""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = ("README.md", "CONTRIBUTING.md", "LICENSE", "docs", "benchmarks", "notebooks")
KINDS = ("*.md", "*.png", "*.json", "*.ipynb", "LICENSE")


def on_config(config: Any) -> Any:
    """Copies the pages to a temporary folder, and reads them there."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="site_"))
    for part in PARTS:
        for kind in KINDS:
            paths = (ROOT / part).rglob(kind) if (ROOT / part).is_dir() else (ROOT / part,)
            for path in paths:
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    config["docs_dir"] = str(folder)
    return config


def on_post_build(config: Any) -> None:
    """Removes the copies."""
    shutil.rmtree(config["docs_dir"])
