"""Laws of the GPU kernels: on a CUDA device as they are, elsewhere under Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported and a process that interprets would choose these kernels for every call, so this
folder runs in a process of its own: `pytest tests/triton` (`pytest -m gpu tests/triton` on a CUDA machine).
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def alone(config: pytest.Config) -> bool:
    """Whether this run was asked for tests of this folder only."""
    paths = [Path(str(arg).partition("::")[0]).resolve() for arg in config.args]
    return all(path == HERE or HERE in path.parents for path in paths)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config):
    if not alone(config):
        return True
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    return None


@pytest.fixture(scope="session", autouse=True)
def triton_is_installed():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install 'linnet[gpu]')")


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
