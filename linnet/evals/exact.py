"""Tier 0: what the operators and generators must do exactly, shown without training.

A check yields measures: a number, and the limit it must not exceed (or, for what must be impossible, stay above).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from linnet import ops
from linnet.evals.tasks import get_task
from linnet.evals.tasks import lra as L
from linnet.evals.tasks import regression as R
from linnet.evals.tasks._base import IGNORE, stream
from linnet.evals.tasks.selectivbench import grammar
from linnet.evals.tasks.state_tracking import group

F64 = torch.float64


class Measure(NamedTuple):
    """value must be at most `limit`, or at least, where `above`."""

    what: str
    value: float
    limit: float
    above: bool = False

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.above else self.value <= self.limit


CHECKS: dict[str, tuple[str, Callable[[], Iterator[Measure]]]] = {}


def check(name: str, claim: str):
    """Register a generator of measures under a short name."""

    def register(function: Callable[[], Iterator[Measure]]) -> Callable[[], Iterator[Measure]]:
        CHECKS[name] = (claim, function)
        return function

    return register


def run_tier0(names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Rows (check, claim, what, value, limit, above, ok, seconds), one per measure."""
    unknown = sorted(set(names or ()) - set(CHECKS))
    if unknown:
        raise ValueError(f"check must be one of {', '.join(CHECKS)}; got {unknown[0]!r}")
    rows = []
    for name in names or CHECKS:
        claim, function = CHECKS[name]
        began = time.perf_counter()
        for measure in function():
            row = {"check": name, "claim": claim, **measure._asdict(), "ok": measure.ok}
            rows.append(row | {"seconds": time.perf_counter() - began})
            began = time.perf_counter()
    return rows


def off(actual: Tensor, expected: Tensor) -> float:
    """The largest difference."""
    return float((actual - expected).abs().max())


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def follow(k: Tensor, beta: Tensor, S: Tensor, steps: int = 1) -> Tensor:
    """S_1 .. S_T [T, K, V] of the delta rule without writes, keys [T*n, K], beta [T*n], from S; read by K queries at once."""
    K, V = S.shape
    length, zero = k.shape[0] // steps, torch.zeros(1, k.shape[0], 1, V, dtype=S.dtype)
    q = torch.eye(K, dtype=S.dtype)[None, None].expand(1, length, K, K)
    o, _ = ops.delta_rule(
        q, k[None, :, None], zero, erase=beta[None, :, None], steps_per_token=steps, scale=1.0, initial_state=S[None, None]
    )
    return o[0]


# ---- state tracking ------------------------------------------------------------------------------------------------------


@check("parity", "a constant key with beta = 2 on a one flips the sign of the state")
def parity() -> Iterator[Measure]:
    for dtype, limit in ((F64, 1e-12), (torch.float32, 1e-5)):
        bits = torch.tensor(list(itertools.product((0, 1), repeat=10)), dtype=dtype)
        k = torch.full((len(bits), 10, 1, 4), 0.5, dtype=dtype)
        start = torch.full((len(bits), 1, 4, 1), 0.5, dtype=dtype)
        o, _ = ops.delta_rule(k, k, torch.zeros_like(k[..., :1]), erase=2 * bits[..., None], scale=1.0, initial_state=start)
        yield Measure(f"every string of ten bits, {dtype}", off(o[..., 0, 0], 1 - 2 * (bits.cumsum(1) % 2)), limit)
    bits = torch.randint(2, (4096,), generator=torch.Generator().manual_seed(0)).float()
    sign = follow(torch.full((4096, 4), 0.5), 2 * bits, torch.full((4, 1), 0.5))[:, :, 0].sum(-1) * 0.5
    yield Measure("drift over 4096 tokens in fp32", off(sign, 1 - 2 * (bits.cumsum(0) % 2)), 1e-4)


def transpositions(permutation: list[int]) -> list[tuple[int, int]]:
    """At most n - 1 swaps which, applied in order to 0 .. n-1, give the permuted list."""
    row, swaps = list(range(len(permutation))), []
    for i, wanted in enumerate(permutation):
        j = row.index(wanted)
        if j != i:
            swaps.append((i, j))
            row[i], row[j] = row[j], row[i]
    return swaps


@check("permutations", "a swap is the Householder step along (e_i - e_j) / sqrt 2; n - 1 of them per token track S_n")
def permutations(length: int = 1000) -> Iterator[Measure]:
    for n in (3, 4, 5):
        generator = torch.Generator().manual_seed(n)
        k, beta = torch.zeros(length, n - 1, n, dtype=F64), torch.zeros(length, n - 1, dtype=F64)
        start = row = torch.arange(1.0, n + 1, dtype=F64)
        expected = []
        for t in range(length):
            permutation = torch.randperm(n, generator=generator).tolist()
            for step, (i, j) in enumerate(transpositions(permutation)):
                k[t, step, i], k[t, step, j], beta[t, step] = 0.5**0.5, -(0.5**0.5), 2
            row = row[permutation]
            expected.append(row)
        for steps in (n - 1, n - 2):
            S = follow(k[:, :steps].flatten(0, 1), beta[:, :steps].flatten(), start[:, None], steps)
            error = off(S[:, :, 0], torch.stack(expected))
            yield Measure(f"S{n}, {steps} steps per token", error, *((1e-9,) if steps == n - 1 else (0.1, True)))


@check("counting", "counting modulo m: two reflections per token, or one after a layer that counts tokens modulo 2")
def counting() -> Iterator[Measure]:
    for m in (3, 5, 7):
        w = torch.randint(m, (500,), generator=torch.Generator().manual_seed(m))
        total = 2 * math.pi / m * w.cumsum(0).to(F64)
        start, along = torch.tensor([[1.0], [0.0]], dtype=F64), lambda a: torch.stack((a.cos(), a.sin()), -1)
        angle = math.pi / m * w.to(F64)
        k = torch.stack((along(0 * angle), along(angle)), 1).flatten(0, 1)
        S = follow(k, torch.full((1000,), 2.0, dtype=F64), start, 2)[:, :, 0]
        yield Measure(f"Z{m}, one layer, two steps", off(S, along(total)), 1e-9)
        # the reflection in the line at angle a / 2 is I - 2 k k^T with k at right angles to that line
        odd = follow(torch.ones(500, 1, dtype=F64), torch.full((500,), 2.0, dtype=F64), torch.ones(1, 1, dtype=F64))[:, 0, 0] < 0
        line = torch.where(odd, 1 - 2 * w, 1 + 2 * w).to(F64) * math.pi / m
        S = follow(along(line / 2 + math.pi / 2), torch.full((500,), 2.0, dtype=F64), start)[:, :, 0]
        yield Measure(f"Z{m}, two layers, one step", off(S, along(torch.where(odd, math.pi / m - total, total))), 1e-9)


# ---- memory --------------------------------------------------------------------------------------------------------------


@check("capacity", "orthonormal keys are recalled exactly; random unit keys disturb each other by (D - 1) / K")
def capacity() -> Iterator[Measure]:
    K = 64
    keys, v = torch.linalg.qr(randn(0, K, K))[0][None, :, None], randn(1, 1, K, 1, 3)
    one = torch.ones(1, K, 1, dtype=F64)
    _, (added,) = ops.linear_attention(keys, keys, v, return_state=True)
    _, (replaced,) = ops.delta_rule(keys, keys, v, erase=one, return_state=True)
    for name, S in (("additive", added), ("delta rule", replaced)):
        yield Measure(f"{name}, {K} orthonormal keys in {K} channels", off(keys[0, :, 0] @ S[0, 0], v[0, :, 0]), 1e-12)
    rows, D = 200, 33
    k = torch.nn.functional.normalize(randn(2, rows, D, 1, K), dim=-1)
    v = randn(3, rows, D, 1, 8)
    _, (S,) = ops.linear_attention(k, k, v, return_state=True)
    noise = (torch.einsum("btk,bkv->btv", k[:, :, 0], S[:, 0]) - v[:, :, 0]).square().mean()
    yield Measure("crosstalk of 33 random keys against (D - 1) / K", abs(float(noise) / ((D - 1) / K) - 1), 0.1)


@check("rewriting", "a key written again: the delta rule keeps the last value, an additive memory the sum")
def rewriting() -> Iterator[Measure]:
    K, chosen = 6, torch.randint(6, (40,), generator=torch.Generator().manual_seed(0))
    keys, v, one = torch.linalg.qr(randn(0, K, K))[0], randn(1, 1, 40, 1, 3), torch.ones(1, 40, 1, dtype=F64)
    k = keys[chosen][None, :, None]
    _, (last,) = ops.delta_rule(k, k, v, erase=one, return_state=True)
    _, (summed,) = ops.linear_attention(k, k, v, return_state=True)
    written = [v[0, chosen == i, 0] for i in range(K)]
    yield Measure("delta rule: the last value", off(keys @ last[0, 0], torch.stack([w[-1] for w in written])), 1e-10)
    yield Measure("additive: the sum", off(keys @ summed[0, 0], torch.stack([w.sum(0) for w in written])), 1e-10)


@check("kaczmarz", "S_t^T k = (1 - eta) S_{t-1}^T k + eta v for keys of any length; the length of a key does not matter")
def kaczmarz() -> Iterator[Measure]:
    k, v, length = randn(0, 1, 30, 1, 5), randn(1, 1, 30, 1, 3), torch.exp(2 * randn(2, 1, 30, 1, 1))
    for eta in (1.0, 0.3, 1.7):

        def read(k: Tensor, v: Tensor, mode: str, eta: float = eta) -> Tensor:
            s = k.norm(dim=-1, keepdim=True)
            step = torch.full((1, 30, 1), eta, dtype=F64)
            return ops.delta_rule(k, k / s, v / s, erase=step, read=mode, scale=1.0)[0]

        for name, key in (("unit", k / k.norm(dim=-1, keepdim=True)), ("any", length * k)):
            expected = (1 - eta) * read(key, v, "before") + eta * v
            yield Measure(f"projection, eta {eta:g}, keys of {name} length", off(read(key, v, "after"), expected), 1e-10)
        scaled = read(length * k, length * v, "after") / length
        yield Measure(f"scaled keys and values, eta {eta:g}", off(scaled, read(k, v, "after")), 1e-10)


@check("shift", "a diagonal complex recurrence with as many modes as tokens is an exact delay (arXiv 2212.00768)")
def shift(N: int = 64, s: int = 23) -> Iterator[Measure]:
    x, n = randn(0, 1, N, 1), torch.arange(N, dtype=F64)
    pole = torch.polar(torch.ones(N, dtype=F64), 2 * math.pi * n / N)
    weight = torch.polar(torch.full((N,), 1 / N, dtype=F64), -2 * math.pi * n * s / N)
    h, _ = ops.scan(x.to(pole.dtype).expand(1, N, N).contiguous(), a=pole.expand(1, N, N).contiguous())
    delayed = torch.cat((torch.zeros(1, s, 1, dtype=F64), x[:, :-s]), 1)
    yield Measure("complex recurrence", off((h * weight).sum(-1, keepdim=True).real, delayed), 1e-10)
    kernel = torch.cos(2 * math.pi * n[:, None] * (torch.arange(N, dtype=F64) - s) / N).mean(0)
    yield Measure("its kernel as a sum of cosines", off(kernel, torch.eye(N, dtype=F64)[s]), 1e-10)


# ---- regression in context -----------------------------------------------------------------------------------------------


def layer(Z: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """Z <- Z + P Z M (Z^T Q Z) / N: linear self-attention over the columns of Z; the last column, the query, is not a key."""
    key = Z.clone()
    key[:, -1] = 0
    return Z + P @ key @ (key.T @ Q @ Z) / (Z.shape[1] - 1)


def as_operator(x: Tensor, y: Tensor, A: Tensor) -> Tensor:
    """What a linear-attention layer with q = A x, k = x, v = y adds at every token; the last token is not a key."""
    N = len(x) - 1
    _, (S,) = ops.linear_attention(x[None, :N, None], x[None, :N, None], y[None, :N, None, None], return_state=True)
    zero = torch.zeros(1, N + 1, 1, 1, dtype=F64)
    return ops.linear_attention((x @ A)[None, :, None], x[None, :, None], zero, scale=1 / N, initial_state=(S,))[0][0, :, 0, 0]


@check("gradient descent", "linear-attention layers take (preconditioned) steps of gradient descent (arXiv 2212.07677)")
def descent(N: int = 12, d: int = 4, rate: float = 0.3, gamma: float = 0.2) -> Iterator[Measure]:
    x, w_true = randn(0, N + 1, d), randn(1, d)
    label = torch.cat((x[:N] @ w_true, torch.zeros(1, dtype=F64)))
    X, eye, corner = x[:N], torch.eye(d, dtype=F64), torch.zeros(d + 1, d + 1, dtype=F64)
    corner[d, d] = 1
    wide = lambda A: torch.block_diag(A, torch.zeros(1, 1, dtype=F64))
    spectrum = torch.linspace(0.2, 2, d, dtype=F64).diag()
    inverse = torch.from_numpy(R.optimal_preconditioner(spectrum.numpy(), N))
    for name, A in (("plain", rate * eye), ("preconditioned", inverse)):
        w, y, Z = torch.zeros(d, dtype=F64), label.clone(), torch.cat((x.T, label[None]))
        one = float(as_operator(x, y, A)[-1])
        yield Measure(f"{name}: one step", abs(one - float(x[-1] @ (A @ X.T @ label[:N] / N))), 1e-10)
        error = 0.0
        for _ in range(5):
            w = w - A @ (X.T @ (X @ w - label[:N])) / N
            y, Z = y - as_operator(x, y, A), layer(Z, -corner, wide(A))
            wanted = torch.cat((label[:N] - X @ w, (-x[-1] @ w)[None]))
            error = max(error, off(y, wanted), off(Z[d], wanted))
        yield Measure(f"{name}: five layers, labels become residuals", error, 1e-10)
        by_numpy = R.gradient_descent(X[None].numpy(), label[None, :N].numpy(), steps=5, rate=1.0, precondition=A.numpy())[0]
        yield Measure(f"{name}: the comparator", off(torch.from_numpy(by_numpy), w), 1e-10)
    P = -wide(gamma * eye)
    expected = x @ (eye - gamma * X.T @ X / N)
    yield Measure("GD++: inputs are contracted too", off(layer(torch.cat((x.T, label[None])), P, wide(eye))[:d].T, expected), 1e-10)


@check("one step", "the best single step is 1 / (n + d + 1 + noise^2) on the sum of y x, and Gamma^-1 is its general form")
def one_step(n: int = 20, d: int = 5, rows: int = 100_000) -> Iterator[Measure]:
    rng = stream("one step")
    for noise in (0.0, 0.7):
        x, w = rng.standard_normal((rows, n, d)), rng.standard_normal((rows, d))
        y = np.einsum("bnd,bd->bn", x, w) + noise * rng.standard_normal((rows, n))
        s = np.einsum("bn,bnd->bd", y, x)  # the query is integrated out: E (eta s.q - w.q)^2
        best, claimed = (s * w).sum() / np.square(s).sum(), 1 / (n + d + 1 + noise**2)
        yield Measure(f"step on {rows:,} prompts, noise {noise:g}", abs(best / claimed - 1), 0.02)
        matrix = R.optimal_preconditioner(np.eye(d), n, noise) / n
        yield Measure(f"isotropic Gamma, noise {noise:g}", float(np.abs(matrix - claimed * np.eye(d)).max()), 1e-12)


@check("least squares", "least squares errs by max(1 - n / d, 0); ridge is the Bayes posterior; Newton squares its residual")
def squares(d: int = 5) -> Iterator[Measure]:
    x, y = get_task("in_context_regression", length=2 * d + 1).examples(stream("squares"), 20_000)
    error = R.curve(R.least_squares, x, y)
    expected = np.maximum(1 - np.arange(2 * d + 1) / d, 0)
    yield Measure("minimum-norm least squares", float(np.abs(error - expected).max()), 0.02)
    x, y = x[:50, :8], y[:50, :8] + 0.5 * stream("noise").standard_normal((50, 8))
    gram = x @ x.transpose(0, 2, 1) + 0.25 * np.eye(8)
    posterior = np.einsum("bnd,bn->bd", x, np.linalg.solve(gram, y[..., None])[..., 0])
    yield Measure("ridge against the Gaussian process", float(np.abs(R.least_squares(x, y, 0.25) - posterior).max()), 1e-10)
    yield Measure("Newton after 40 steps", float(np.abs(R.newton(x, y, 40) - R.least_squares(x, y)).max()), 1e-8)
    M = [R.newton(x, np.eye(8)[:, None].repeat(50, 1)[i], k) for k in (3, 4) for i in range(8)]
    half = [np.eye(d) - np.einsum("bed,bef->bdf", np.stack(M[i : i + 8], 1), x) for i in (0, 8)]
    yield Measure("I - M S is squared by a step", float(np.abs(half[0] @ half[0] - half[1]).max()), 1e-10)


@check("two heads", "softmax heads at +-w become gradient descent about the mean as w goes to 0, the rest falls as w^2")
def two_heads(N: int = 16, d: int = 3) -> Iterator[Measure]:
    x, y, q = randn(0, N, d), randn(1, N), randn(2, d)
    limit, rest = 2 / N * ((x - x.mean(0)) @ q) @ y, []
    for w in (0.02, 0.01):
        # the query stands last and sees itself too; a first channel keeps it out
        keys = torch.cat((torch.cat((torch.zeros(N, 1, dtype=F64), x), 1), torch.tensor([[-1e4] + [0.0] * d], dtype=F64)))
        value = torch.cat((y, torch.zeros(1, dtype=F64)))[None, :, None, None]
        one = torch.ones(1, dtype=F64)
        read = [
            ops.softmax_attention(torch.cat((one, sign * w * q)).expand(1, N + 1, 1, d + 1), keys[None, :, None], value, scale=1.0)
            for sign in (1, -1)
        ]
        rest.append(abs(float((read[0][0] - read[1][0])[0, -1, 0, 0]) / w - float(limit)))
    yield Measure("error at w = 0.02 over error at 0.01, against 4", abs(rest[0] / rest[1] - 4), 0.05)
    yield Measure("error at w = 0.01", rest[1], 1e-2)


# ---- generators ----------------------------------------------------------------------------------------------------------


@check("recall data", "MQAR: distinct keys, every key asked once after the pairs, its value the target, slots from the power law")
def recall_data() -> Iterator[Measure]:
    task = get_task("mqar", length=128, vocabulary=512, pairs=8)
    x, y, _ = task.batch("test", 0, 4000)
    wrong = 0
    for row, target in zip(x[:500], y[:500], strict=True):
        pairs, asked = dict(zip(row[:16:2].tolist(), row[1:16:2].tolist(), strict=True)), np.flatnonzero(target != IGNORE)
        wrong += len(pairs) != 8 or asked.min() < 16 or sorted(row[asked]) != sorted(pairs)
        wrong += any(pairs[int(k)] != v for k, v in zip(row[asked], target[asked], strict=True)) or (row[16:] > 0).sum() != 8
    yield Measure("rows of 500 with a fault", wrong, 0)
    single = get_task("mqar", length=128, vocabulary=512, pairs=1).batch("test", 0, 20_000).targets
    count = np.bincount((np.nonzero(single != IGNORE)[1] - 2) // 2, minlength=63)
    p = np.arange(1.0, 64) ** (0.01 - 1)
    chi2 = float(((count - 20_000 * p / p.sum()) ** 2 / (20_000 * p / p.sum())).sum())
    yield Measure("chi^2 of the slots (62 degrees of freedom, 0.1 %)", chi2, 103.4)


@check("symbols", "brackets, ListOps, groups and grammars against independent evaluators")
def symbols() -> Iterator[Measure]:
    wrong = 0
    for name, alphabet, plus in (("modular_arithmetic", "_+-*=01234", 5), ("modular_arithmetic_brackets", "_+-*()=01234", 7)):
        for row, target in zip(*get_task(name, operators="+-*").batch("test", 0, 200)[:2], strict=True):
            text = "".join(alphabet[i] for i in row).strip("_")
            wrong += eval(text[:-1], {"__builtins__": {}}) % 5 != target.max() - plus  # digits, brackets and operators only
    yield Measure("arithmetic, expressions of 400 with another value", wrong, 0)
    tokens, values, _ = L.trees(stream("symbols"), 31, 96, depth=5, arguments=5)
    yield Measure("ListOps, trees with another value", sum(_listops(t) != v for t, v in zip(tokens, values, strict=True)), 0)
    for name in ("s4", "a5", "z7", "a4xz5"):
        table, _ = group(name)
        n = len(table)
        identity = (table[0] != np.arange(n)).sum() + (table[:, 0] != np.arange(n)).sum()
        yield Measure(f"{name}: associative, identity", float((table[table] != table[:, table]).sum() + identity), 0)
    g = grammar(6, 6, 7, 0)
    same = (g.letter[g.successor] != np.arange(7)) & (g.successor >= 0)
    yield Measure("grammar: edges to a state of another letter", float(same.sum()), 0)
    yield Measure("grammar: smallest probability to reach the end", float(g.ends[-1].min()), 1e-6, True)


def _listops(tokens: np.ndarray) -> int:
    operators, stack = {L.MIN: min, L.MAX: max, L.MED: lambda v: int(np.median(v)), L.SM: lambda v: sum(v) % 10}, [(None, [])]
    for t in tokens.tolist():
        if t in operators:
            stack.append((operators[t], []))
        elif t == L.CLOSE:
            operator, values = stack.pop()
            stack[-1][1].append(operator(values))
        elif t < 10:
            stack[-1][1].append(t)
    return stack[0][1][0]


# ---- measures ------------------------------------------------------------------------------------------------------------


@check("measures", "windows of perplexity score every token once; padding does not change a log-likelihood")
def measures() -> Iterator[Measure]:
    from linnet.evals.perplexity import windows

    faults = 0
    for tokens, context, stride in itertools.product((1, 2, 7, 33, 64), (2, 8, 33), (1, 5, 31)):
        if stride < context:
            scored = [t for start, end, first in windows(tokens, context, stride) for t in range(first, end)]
            faults += scored != list(range(1, tokens))
    yield Measure("windows: settings that miss or repeat a token", faults, 0)
    from linnet.mixers import list_mixers
    from linnet.models import LinnetConfig, LinnetForCausalLM

    worst, culprit = 0.0, ""
    ids = torch.randint(3, 32, (1, 9), generator=torch.Generator().manual_seed(0))
    pad = torch.zeros(1, 4, dtype=torch.long)
    for name in list_mixers():
        torch.manual_seed(0)
        model = LinnetForCausalLM(LinnetConfig(vocab_size=32, d_model=16, heads=2, layers=name, mlp="none")).double().eval()
        with torch.no_grad():
            alone = model(ids).logits
            for rows, cut in ((torch.cat((pad, ids), 1), slice(4, None)), (torch.cat((ids, pad), 1), slice(0, 9))):
                mask = torch.zeros_like(rows)
                mask[:, cut] = 1
                error = off(model(rows, attention_mask=mask).logits[:, cut], alone)
                if not error <= worst:
                    worst, culprit = error, name
    yield Measure(f"padding on the left and right, all mixers ({culprit or 'none differs'})", worst, 1e-9)
