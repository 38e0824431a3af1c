"""The package from outside: importing it is cheap, and nothing optional is needed for the CPU path."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy():
    heavy = ("torch", "transformers", "triton", "numpy", "matplotlib", "typer")
    assert run(f"import linnet, sys; print([m for m in {heavy!r} if m in sys.modules])") == "[]"


def test_import_adds_less_than_a_second_to_torch():
    """Operators included: what a user of `linnet.ops` waits for beside torch itself."""
    code = "import torch, time; t = time.perf_counter(); import linnet, linnet.ops; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 1.0


def test_the_cpu_path_needs_no_triton():
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("a broken triton")
sys.meta_path.insert(0, Broken())
import torch, linnet
q = torch.randn(1, 20, 2, 8, requires_grad=True)
linnet.ops.linear_attention(q, q, q, -torch.rand(1, 20, 2))[0].sum().backward()
mixer = linnet.build_mixer("gated_deltanet", 32, 2)
mixer(torch.randn(1, 20, 32))[0].sum().backward()
print("triton" in sys.modules, "gated_deltanet" in linnet.list_mixers())
"""
    assert run(code) == "False True"


def test_every_public_name_resolves():
    assert run("import linnet; print([n for n in linnet.__all__ if getattr(linnet, n, None) is None])") == "[]"
