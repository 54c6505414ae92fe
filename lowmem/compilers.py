"""Which compilers this machine has."""

import os
import shutil
from importlib.util import find_spec


def has_triton() -> bool:
    """Return whether Triton is installed, and the C compiler that it needs to launch kernels."""
    has_compiler = os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))
    return find_spec("triton") is not None and bool(has_compiler)
