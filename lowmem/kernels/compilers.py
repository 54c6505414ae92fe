"""Which compilers this machine has."""

import os
import shutil
from importlib.util import find_spec


def has_triton() -> bool:
    """Return whether Triton is installed, and the C compiler that it needs to launch kernels."""
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("clang")
    return compiler is not None and find_spec("triton") is not None
