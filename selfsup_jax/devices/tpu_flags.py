"""Options of the TPU's compiler, which it reads from the environment when it is loaded."""

from __future__ import annotations

import importlib.util
import mmap
import os

_VARIABLE = "LIBTPU_INIT_ARGS"
# Arrays are copied into the fast memory where that saves several reads of them. By default those
# that are read once are copied too; they leave less room for results that the next kernel takes
# from there, so that more goes through the main memory (docs/tpu_pods.md).
_FLAGS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": "4.0"}


def set_flags() -> None:
    """Sets the options that this version of the compiler has and that the user has not set.

    Must be called before JAX looks for devices. Without `libtpu` it does nothing.
    """
    given = os.environ.get(_VARIABLE, "")
    new = {flag: value for flag, value in _FLAGS.items() if flag not in given}
    known = _known(tuple(new)) if new else ()
    added = [f"--{flag}={value}" for flag, value in new.items() if flag in known]
    if added:
        os.environ[_VARIABLE] = " ".join([given, *added]).strip()


def _known(flags: tuple[str, ...]) -> list[str]:
    """Those that the installed compiler has: one that it does not know would end the process."""
    spec = importlib.util.find_spec("libtpu")
    path = os.path.join(os.path.dirname(spec.origin), "libtpu.so") if spec and spec.origin else ""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as library:
        return [flag for flag in flags if library.find(flag.encode()) >= 0]
