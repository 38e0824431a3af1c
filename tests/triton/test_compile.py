"""The kernels compile for Hopper on a machine without a GPU, at the configurations of the table and within its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_sm90.py")


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        ("delta rule", {"prepare_scalar", "forward_sweep", "backward_sweep", "gradients_scalar", "value_gradients"}),
        ("delta rule, one head and token", {"prepare_scalar", "forward_sweep", "backward_sweep", "gradients_scalar"}),
        pytest.param("delta rule, odd sizes", {"prepare_scalar", "gradients_scalar"}, marks=pytest.mark.slow),
        pytest.param("delta rule, per channel", {"prepare_vector", "gradients_vector"}, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_compile_for_sm_90(call, kernels, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(SCRIPT), call], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert kernels <= {json.loads(line)["kernel"] for line in done.stdout.splitlines()}
