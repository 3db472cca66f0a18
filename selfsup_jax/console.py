"""The command `selfsup`: what it does besides running a config.

selfsup --config=byol:demo --workdir=DIR     a run or a job; the flags are `run_experiment.py`'s
selfsup list                                 methods, presets and jobs, a line each
selfsup demo [METHOD]                        pretrains on embedded digits, in runs/demo
selfsup report WORKDIR...                    one HTML page about runs and jobs
selfsup export CHECKPOINT FOLDER             an encoder for torchvision, timm, ONNX, ...
selfsup import SOURCE --out=DIR              another project's checkpoint
selfsup pack --name=NAME --out=FILE.npz      a small data set as arrays
selfsup verify WORKDIR...                    are all checkpoints whole?
"""

from __future__ import annotations

import importlib
import os
import sys
import textwrap

from selfsup_jax import presets
from selfsup_jax.errors import UserError, nearest

# Words -> modules whose `main` reads the rest of the command line.
_MODULES = {
    "report": "selfsup_jax.report",
    "export": "selfsup_jax.export",
    "import": "selfsup_jax.interop.__main__",
    "pack": "selfsup_jax.data.pack",
    "verify": "selfsup_jax.verify",
}
_TITLES = {"pretrain": "methods", "sweep": "comparisons of several runs"}


def run(argv: list[str]) -> int | None:
    """Runs `selfsup WORD ...`.

    Args:
        argv: the whole command line.

    Returns:
        The exit status; None if the command line has flags for `run_experiment.py`. `demo` becomes
        such flags, in `argv`.
    """
    word, *rest = argv[1:] or ["--help"]
    if word in ("-h", "--help"):
        print(__doc__.strip())
    elif word == "list" and not rest:
        print("\n".join(_list()))
    elif word == "demo":
        named = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
        flags = {
            "--config": f"{named[0]}:demo" if named else "byol:demo",
            "--workdir": os.path.join("runs", "_".join(["demo", *named])),
        }
        given = {arg.partition("=")[0] for arg in rest}
        argv[1:] = [f"{k}={v}" for k, v in flags.items() if k not in given] + rest
        return None
    elif word in _MODULES:
        sys.argv = [f"selfsup {word}", *([word] if word == "import" else []), *rest]
        return importlib.import_module(_MODULES[word]).main() or 0  # `export` returns nothing
    elif word.startswith("-"):
        return None
    else:
        near = nearest(word, ("list", "demo", *_MODULES), count=1)
        what = "did you mean" if "," not in near else "there are"
        raise UserError(f"selfsup {word}: is no command; {what} {near}; selfsup --help has all")
    return 0


def _list() -> list[str]:
    lines = []
    kinds: dict[str, list[presets.Listed]] = {}
    for config in presets.listed():
        kinds.setdefault(_TITLES.get(config.job, "jobs on a trained encoder"), []).append(config)
    for title in dict.fromkeys((*_TITLES.values(), *kinds)):
        lines += [f"{title}:", ""]
        for config in kinds[title]:
            lines.append(f"  {config.name:17}{config.title}")
            if len(config.presets) > 1:
                wide = max(map(len, config.presets)) + 2
                for name, line in config.presets.items():
                    text = f"{' ' * 19}:{name:{wide}}{line}"
                    lines += textwrap.wrap(text, 110, subsequent_indent=" " * (20 + wide))
        lines.append("")
    return [*lines, "The first preset is the default: selfsup --config=NAME:PRESET --workdir=DIR"]
