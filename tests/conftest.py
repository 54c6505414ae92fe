"""Run torch on one thread, because results are bit-identical only for a fixed number of threads; mark slow tests."""

import gc
import shutil

import pytest
import torch

from tests.slow import SECONDS

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/") in SECONDS:
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    gc.freeze()  # garbage collection during the tests then skips the imported modules


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if item.get_closest_marker("cuda_build"):
        if torch.version.cuda is None or torch.cuda.is_available() or not shutil.which("cc"):
            pytest.skip("needs the CUDA build of torch, a C compiler and no GPU: see benchmarks/README.md")
