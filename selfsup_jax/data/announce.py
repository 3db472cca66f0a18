"""What is said about a data set at the start: what was taken from it, as what, and what was not."""

from __future__ import annotations

from ml_collections import ConfigDict

from selfsup_jax.data import pixels
from selfsup_jax.data.source import Source
from selfsup_jax.run.progress import log

_SEVERAL = (".tif", ".tiff", ".gif", ".webp")
_said: set[str] = set()


def once(about: str, line: str) -> None:
    """Logs a line, unless this process has logged one about the same; an empty one is none."""
    if line and about not in _said:
        _said.add(about)
        log(line)


def of_folder(data: ConfigDict, source: Source, chosen: bool) -> str:
    """One line about a folder of images; empty for other data.

    Args:
        data: the config's section.
        source: its split, as loaded from the files.
        chosen: whether the names of the splits were chosen, not given.
    """
    if data.name != "folder":
        return ""
    parts = [f"{source.num_examples:,} images"]
    if source.class_names:
        shown = ", ".join(source.class_names[:4]) + ", ..." * (len(source.class_names) > 4)
        parts.append(f"with the {len(source.class_names)} sub-folders {shown} as classes")
        if chosen and data.test_split.endswith("[90%:]"):
            parts.append("and 10 % of the images held out")
        parts.append("(--config.data.labels=none: no classes)")
    line = f"{source.name}: {' '.join(parts)}"
    return f"{line}; not taken: {source.left_out}" if source.left_out else line


def of_pages(source: Source) -> str:
    """One line about files with several images; empty if none of 64 that may be such is one."""
    paths = source.files(_SEVERAL)
    some = paths[:: max(1, len(paths) // 64)][:64]
    several = sum(pixels.frames(path) > 1 for path in some)
    if not several:
        return ""
    looked = f"{several} of the {len(some)} TIFF, GIF and WebP files looked at"
    return f"{source.name}: {looked} have several pages or frames: the first of each is taken"


def of_range(name: str, limits: str) -> str:
    """One line about the range that `data.intensity=auto` found."""
    low, high = limits.split(",")
    return (
        f"{name}: images of more than 8 bits, in which {low} is black and {high} white "
        f"(99.8 % of the values are between; --config.data.intensity=LOW,HIGH for another range)"
    )
