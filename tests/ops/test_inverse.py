"""The triangular inverses of a chunk: exact where they should be, unstable where the page says so, one choice for all operators."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from linnet import ops
from linnet.bench import inverse as bench
from linnet.ops import use_inverse
from linnet.ops.torch import _inverse
from linnet.ops.torch._inverse import INVERSES, residual, unit_lower_inverse

STABLE = ("recursive", "blocked", "forward_substitution", "solve", "newton_schulz")


def lower(rows: int, scale: float, *batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return scale * torch.randn(*batch, rows, rows, dtype=torch.float64, generator=generator).tril(-1)


@pytest.mark.parametrize("name", INVERSES)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 64])
def test_every_algorithm_inverts(name, rows):
    L = lower(rows, 0.1, 3, 2)
    given = L.clone()
    X = INVERSES[name](L)
    assert X.shape == L.shape and X.dtype == L.dtype and torch.equal(L, given)
    eye = torch.eye(rows, dtype=L.dtype)
    torch.testing.assert_close((eye + L) @ X, eye.expand_as(L), rtol=0, atol=1e-12)
    assert float(X.triu(1).abs().max()) <= 1e-15
    assert INVERSES[name](L.float()).dtype == torch.float32
    assert residual(L, X).shape == (3, 2) and float(residual(L, X).max()) < 1e-12


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize("case", list(bench.matrices(4, 4)))
def test_the_stable_algorithms_are_accurate_for_correlated_keys_and_strengths_up_to_two(name, case):
    L = bench.matrices()[case]
    assert bench.error(INVERSES[name], L, "fp64") < 1e-13
    assert bench.error(INVERSES[name], L, "fp32") < 1e-5
    assert bench.error(INVERSES[name], L, "bf16") < 3e-2


def test_the_power_series_is_not():
    case = bench.matrices()["cos 0.9, beta 2"]
    assert bench.error(INVERSES["neumann"], case, "fp32") > 1e3
    assert bench.error(INVERSES["recursive_neumann"], case, "bf16") > 1e3
    assert bench.error(INVERSES["neumann"], bench.matrices()["random keys"], "fp32") < 1e-6


def test_newton_schulz_from_the_identity_is_the_neumann_product():
    L = lower(16, 0.2)
    torch.testing.assert_close(_inverse.newton_schulz(L, start=1.0, iterations=4), _inverse.neumann(L), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(_inverse.newton_schulz(L, start=1.0, iterations=3), _inverse.neumann(L), atol=1e-9)


@pytest.mark.parametrize("name", INVERSES)
def test_operators_use_the_chosen_inverse(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, size, dtype=torch.float64, generator=generator) for size in (8, 8, 4))
    k, beta = (k / k.norm(dim=-1, keepdim=True)).requires_grad_(), torch.rand(1, 70, 2, dtype=torch.float64, generator=generator)

    def outcome():
        o, _ = ops.delta_rule(q, k, v, erase=beta, backend="torch")
        p, _ = ops.dplr(q, k, v, -k, 0.5 * k, backend="torch")
        return o, *torch.autograd.grad((o * p).sum(), k)

    expected, calls, algorithm = outcome(), [], INVERSES[name]
    monkeypatch.setitem(INVERSES, name, lambda L: calls.append(1) or algorithm(L))
    with use_inverse(name):
        for a, e in zip(outcome(), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    assert len(calls) >= 4
    monkeypatch.undo()
    assert _inverse._chosen == "recursive" and torch.equal(unit_lower_inverse(lower(8, 0.1)), _inverse.recursive(lower(8, 0.1)))


def test_an_unknown_inverse_is_refused():
    with pytest.raises(ValueError, match="argument 'name' must be one of recursive, .*; got 'magic'"), use_inverse("magic"):
        pass


def test_the_benchmark_prints_the_table_of_the_page(capsys, tmp_path):
    bench.main(["--rows", "16", "--batch", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "inverse.md").read_text()
    heads = re.findall(r"^\| (?:fp64|fp32|bf16) \|.*$", out, re.M)
    assert len(heads) == 3 and all(head in page for head in heads)
    for name in INVERSES:
        assert f"| `{name}`" in page and f"\n| {name.replace('_', ' ')} | " in page
    assert (tmp_path / "inverse.json").exists()
    with pytest.raises(ValueError, match="argument 'rows' must be a power of two"):
        bench.main(["--rows", "12"])
    with pytest.raises(ValueError, match="without inverse.json"):
        bench.main(["--out", str(tmp_path)])
