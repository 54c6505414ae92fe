"""Compile the CPU kernels for each instruction set, if there is a compiler. setup.cfg has all else."""

from pathlib import Path
from zlib import crc32

from setuptools import Extension, setup

SOURCE = "lowmem/optim/kernels.cpp"
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wno-maybe-uninitialized"]  # gcc warns of its own avx512fintrin.h
FLAGS += [f"-DDIGEST={crc32(Path(SOURCE).read_bytes())}u"]  # so that kernels_cpu.py notices an outdated library
SETS = {"baseline": [], "avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4"]}

setup(
    ext_modules=[
        Extension(f"lowmem.optim._kernels_{name}", [SOURCE], extra_compile_args=FLAGS + flags, optional=True)
        for name, flags in SETS.items()
    ]
)
