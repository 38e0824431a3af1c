"""The kernels compile for Hopper on a machine without a GPU, at the configurations of the table and within its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton import knobs

SCRIPT = Path(__file__).with_name("compile_for_sm90.py")
LOST = "delta rule, per channel, rest of a chunk"  # ptxas 12.8 loses an address here if it is not helped


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        ("decode", {"step_kernel", "conv_kernel", "selective_kernel"}),
        ("decode, wide tiles and several tokens", {"step_kernel", "conv_kernel", "selective_kernel"}),
        ("delta rule", {"prepare_scalar", "forward_sweep", "backward_sweep", "gradients_scalar", "value_gradients"}),
        ("delta rule, one head and token", {"prepare_scalar", "forward_sweep", "backward_sweep", "gradients_scalar"}),
        pytest.param("delta rule, odd sizes", {"prepare_scalar", "gradients_scalar"}, marks=pytest.mark.slow),
        pytest.param("delta rule, wide", {"forward_sweep", "backward_sweep"}, marks=pytest.mark.slow),
        pytest.param("delta rule, wide odd sizes", {"forward_sweep", "gradients_vector"}, marks=pytest.mark.slow),
        pytest.param("delta rule, gates per channel", {"prepare_frame", "value_gradients"}, marks=pytest.mark.slow),
        pytest.param("delta rule, per channel", {"prepare_frame", "gradients_frame"}, marks=pytest.mark.slow),
        (LOST, {"prepare_frame", "gradients_frame"}),
        ("dplr", {"prepare", "fold", "sweep", "solved", "gradients"}),
        pytest.param("dplr, no bound", {"prepare", "sweep", "solved", "gradients"}, marks=pytest.mark.slow),
        pytest.param("dplr, odd sizes", {"prepare", "sweep", "solved", "gradients"}, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_compile_for_sm_90(call, kernels, tmp_path):
    done = compiled(call, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert kernels <= {json.loads(line)["kernel"] for line in done.stdout.splitlines()}


def test_a_lost_address_is_found(tmp_path):
    version = knobs.nvidia.ptxas.version
    if version != "12.8":
        pytest.skip(f"ptxas {version} does not lose addresses")
    done = compiled(LOST, tmp_path, "--as-triton-does")
    assert done.returncode != 0 and "an address of shared memory is lost" in done.stderr


def compiled(call: str, cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, str(SCRIPT), *options, call], env=environment, capture_output=True, text=True)
