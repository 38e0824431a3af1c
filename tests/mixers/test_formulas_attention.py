"""Mixers with other attention weights against their formulas, one token and one head at a time in fp64, and their cost."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formula_cases import heads_first, input_fixture, perturbed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from linnet import ops
from linnet.mixers import Context, build_mixer

T, D, H, K = 23, 16, 2, 8
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def make(name: str, **options):
    return perturbed(name, D, H, **options)


x = input_fixture(T, D)


def heads(y: Tensor, count: int = H) -> Tensor:
    return heads_first(y, count)


def turned(y: Tensor) -> Tensor:
    """Rotary positions on [heads, T, K]: channels (i, i + K/2) turned by t 10000^(-2i/K)."""
    out = torch.empty_like(y)
    for t in range(y.shape[1]):
        for i in range(K // 2):
            angle = t * 10000 ** (-2 * i / K)
            a, b = y[:, t, i], y[:, t, i + K // 2]
            out[:, t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, t, i + K // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def qkv(m, x: Tensor, rotary: bool = True) -> list[Tensor]:
    q, k, v = (heads(p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))
    return [turned(q), turned(k), v] if rotary else [q, k, v]


def joined(m, rows: list[list[Tensor]]) -> Tensor:
    """W_o of outputs [heads][T] of K channels."""
    return m.o_proj(torch.cat([torch.stack(row) for row in rows], -1))


def unit(y: Tensor) -> Tensor:
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


# ---- softplus rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name,power", [("lssa", None), ("lssar", 3.0), ("lssar", 15.0), ("lssa", 1.5)])
def test_lssa(x, name, power):
    m = make(name, power=power)
    q, k, v = qkv(m, x)
    q, k, rows = unit(q), unit(k), []
    for h in range(H):
        rows.append([])
        for t in range(T):
            n = t + 1
            A = [math.log(1 + math.exp(math.log(K) * math.log(n) * (q[h, t] @ k[h, s]).item())) for s in range(n)]
            w = [a / sum(A) for a in A]
            if power is not None:
                w = [max(n * a - (1 if n >= 3 else 0), 0) ** power for a in w]
                w = [a / sum(w) for a in w]
            rows[-1].append(sum(a * v[h, s] for s, a in enumerate(w)))
    torch.testing.assert_close(m(x[None])[0][0], joined(m, rows), **EXACT)


def test_reweighting_drops_what_lies_below_the_average(x):
    """R > 0 only where a weight exceeds 1 / n: values of the other keys change nothing."""
    q = unit(torch.randn(1, 9, 1, 4, dtype=torch.float64))
    v = torch.randn(1, 9, 1, 4, dtype=torch.float64)
    A = torch.tensor([math.log(1 + math.exp(math.log(4) * math.log(9) * float(q[0, 8, 0] @ q[0, s, 0]))) for s in range(9)])
    below = A / A.sum() < 1 / 9
    other = v + 7 * below[None, :, None, None]
    a, b = (ops.softplus_attention(q, q, y, power=3.0)[0][0, 8] for y in (v, other))
    assert bool(below.any()) and torch.equal(a, b)


def test_a_flat_row_keeps_its_weights():
    ones, v = torch.ones(1, 5, 1, 4), torch.randn(1, 5, 1, 4)
    o, _ = ops.softplus_attention(ones, ones, v, power=15.0)
    torch.testing.assert_close(o[0, 4, 0], v[0, :, 0].mean(0))


# ---- relative positions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beyond", ["clip", "zero"])
@pytest.mark.parametrize("shared", [False, True])
def test_music_relative(x, beyond, shared):
    m, R = make("music_relative", max_distance=9, beyond=beyond, shared=shared), 9
    (q, k, v), rows = qkv(m, x, rotary=False), []
    for h in range(H):
        rows.append([])
        for t in range(T):
            logits = []
            for s in range(t + 1):
                e = m.distance[min(t - s, R - 1), 0 if shared else h]
                known = t - s < R or beyond == "clip"
                logits.append((q[h, t] @ k[h, s] + (q[h, t] @ e if known else 0)) / math.sqrt(K))
            rows[-1].append(torch.stack(logits).softmax(0) @ v[h, : t + 1])
    torch.testing.assert_close(m(x[None])[0][0], joined(m, rows), **EXACT)


# ---- spans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [0.0, 0.6])
def test_superlinear(x, forward):
    m = make("superlinear", window_stripes=1, spans=2, forward=forward, search_dim=3)
    (q, k, v), rows = qkv(m, x), []
    search_q, step = heads(m.search_q_proj(x)), heads(m.search_k_proj(x))
    dt = F.softplus(m.dt_proj(x) + m.dt_bias)
    a = torch.zeros(H, T, 3, dtype=torch.float64)
    for h in range(H):
        for t in range(T):
            a[h, t] = torch.exp(-m.A_log[h].exp() * dt[t, h]) * (a[h, t - 1] if t else 0) + dt[t, h] * step[h, t]
    for h in range(H):
        rows.append([])
        for t in range(T):
            n, window = t + 1, list(range(max(0, t - 2), t + 1))  # (1 + 1)^2 - 1 = 3 tokens
            anchors = [n - j * j for j in range(2, n + 1) if j * j <= n]
            scores = sorted((((search_q[h, t] @ a[h, i]).item() / math.sqrt(3), i) for i in anchors), reverse=True)[:2]
            total = sum(math.exp(s) for s, _ in scores)
            o = torch.zeros(K, dtype=torch.float64)
            for weight, i in [(math.exp(s) / total, i) for s, i in scores] or [(1.0, None)]:
                keys = window
                if i is not None:
                    root = math.sqrt(n)
                    first, last = max(0, i - math.ceil(2 * root)), min(i + math.ceil(forward * root), window[0] - 1)
                    keys = [*range(first, last + 1), *window]
                logits = torch.stack([q[h, t] @ k[h, s] for s in keys]) / math.sqrt(K)
                o = o + weight * (logits.softmax(0) @ v[h, keys])
            rows[-1].append(o)
    torch.testing.assert_close(m(x[None])[0][0], joined(m, rows), **EXACT)


def test_superlinear_with_a_wide_window_is_softmax_attention(x):
    m, plain = make("superlinear", window_stripes=4), make("attention")
    plain.load_state_dict({key: value for key, value in m.state_dict().items() if key in plain.state_dict()})
    torch.testing.assert_close(m(x[None])[0], plain(x[None])[0], **EXACT)  # 5^2 - 1 = 24 tokens


def test_the_search_of_superlinear_learns_where_to_read():
    """A key marked once, far outside the window, is found by gradient descent through the gate of the search alone."""
    torch.manual_seed(0)
    tokens, where = 40, torch.randint(0, 30, (64,))
    k = torch.zeros(64, tokens, 1, 4)
    v = torch.zeros(64, tokens, 1, 1)
    mark = torch.nn.functional.one_hot(where, tokens).float()
    v[:, :, 0, 0] = mark
    seen = mark[:, :, None, None] + 0.9 * mark.roll(1, 1)[:, :, None, None]  # what a search key near the mark can know of it
    weight = torch.zeros(1, requires_grad=True)
    q = torch.zeros_like(k)

    def found():
        search = weight * torch.ones(64, tokens, 1, 1)
        o, _ = ops.span_attention(q, k, v, search, seen.cumsum(1), window_stripes=1, spans=2, backward=2.0)
        return o[:, -1].sum()

    optimizer, before = torch.optim.SGD([weight], lr=0.05), found().item()
    for _ in range(20):
        optimizer.zero_grad()
        (-found()).backward()
        optimizer.step()
    assert weight.item() > 0 and found().item() > 1.5 * before


@pytest.mark.slow
def test_the_operations_of_superlinear_grow_as_the_power_three_halves():
    counts = []
    for tokens in (4096, 16384, 65536):
        operands = [torch.randn(1, tokens, 1, 8) for _ in range(5)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            ops.span_attention(*operands)
        counts.append(counter.get_total_flops())
    growth = [math.log(b / a, 4) for a, b in zip(counts, counts[1:], strict=False)]
    assert 1.3 < growth[0] < growth[1] < 1.5, growth  # from below: the share of the window is linear


# ---- estimated cells -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [True, False])
def test_sea(x, prior):
    C, P, top, Fe = 8, 4, 3, 6
    m = make("sea", cells=C, top_keys=top, num_features=Fe, position_size=P, prior=prior)
    q, k, v = qkv(m, x)
    omega, freq = m.omega_FK.double(), [10000 ** (-2 * i / P) for i in range(P // 2)]
    pos = [[*(math.cos(t * f) for f in freq), *(math.sin(t * f) for f in freq)] for t in range(T)]
    pos = torch.tensor(pos, dtype=torch.float64)
    phi = lambda y: F.relu(omega @ (y / K**0.25)) + 1e-3  # noqa: E731
    low, gates, rows = torch.zeros(T, H, C // 4, dtype=torch.float64), {}, []
    for t in range(T):
        for h in range(H):
            w = torch.stack([phi(q[h, t]) @ phi(k[h, s]) for s in range(t + 1)])
            read = (w / (w.sum() + 1e-6)) @ torch.cat((v[h, : t + 1], pos[: t + 1]), -1)
            hidden = m.mlp(torch.cat((read, v[h, t], pos[t])))
            low[t, h], gates[t, h] = m.cell_proj(hidden), torch.sigmoid(m.mix_proj(hidden))
    for h in range(H):
        rows.append([])
        for t in range(T):
            past = [low[t - i] if t >= i else torch.zeros_like(low[0]) for i in range(3)]  # [H, C / 4] each
            image = F.gelu(F.conv1d(torch.cat(past)[None], m.conv.weight, m.conv.bias, padding=1))
            image = torch.stack([image[:, c % 4 :: 4, c // 4] for c in range(C)], -1)
            logits = F.conv1d(image, m.out_conv.weight, m.out_conv.bias, padding=1)[0, h]
            n = t + 1
            cell = [s * C // n for s in range(n)]
            used = sorted(set(cell))
            p = dict(zip(used, logits[used].softmax(0), strict=True))
            count = math.ceil(top * min(C, n) / n) if n > top else len(used)
            best = sorted(used, key=lambda c: -float(p[c]))[:count]
            keys = [s for s in range(n) if cell[s] in best]
            scores = [q[h, t] @ k[h, s] / math.sqrt(K) + (p[cell[s]].log() if prior else 0) for s in keys]
            share, mix = gates[t, h]
            rows[-1].append(mix * share * (torch.stack(scores).softmax(0) @ v[h, keys]) + (1 - mix) * v[h, :n].mean(0))
    torch.testing.assert_close(m(x[None])[0][0], joined(m, rows), **EXACT)


def test_the_estimated_attention_of_sea_learns_a_teacher():
    m = build_mixer("sea", D, H, cells=8, top_keys=4, num_features=8, position_size=4)
    y = torch.randn(4, T, D, generator=torch.Generator().manual_seed(0))
    age = torch.arange(T)[:, None] - torch.arange(T)
    teacher = (-0.5 * age).masked_fill(age < 0, -torch.inf).softmax(-1).expand(4, H, T, T)  # looks at what is near
    estimate = m.estimated_attention(y)
    assert estimate.shape == (4, H, T, T) and not estimate.triu(1).any()
    torch.testing.assert_close(estimate.sum(-1), torch.ones(4, H, T))
    optimizer, losses = torch.optim.Adam(m.parameters(), lr=0.02), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(m.estimate_loss(y, teacher))
        losses[-1].backward()
        optimizer.step()
    assert float(losses[-1]) < 0.5 * float(losses[0])


# ---- wavelets ------------------------------------------------------------------------------------------------------------


def haar(a: Tensor, levels: int, length: int) -> list[Tensor]:
    """a_0 .. a_L of a document [T, C] by the pyramid of pairwise means of the padded signal, every level spread over its tokens."""
    size = 2**levels
    padded = torch.cat((a, torch.zeros(-length % size, a.shape[1], dtype=a.dtype)))
    out, pyramid = [a], padded
    for level in range(1, levels + 1):
        pyramid = torch.stack([(pyramid[2 * i] + pyramid[2 * i + 1]) / 2 for i in range(len(pyramid) // 2)])
        out.append(torch.stack([pyramid[t // 2**level] for t in range(length)]))
    return out


def trous(a: Tensor, levels: int) -> list[Tensor]:
    out = [a]
    for level in range(1, levels + 1):
        lag = 2 ** (level - 1)
        out.append(torch.stack([(out[-1][t] + (out[-1][t - lag] if t >= lag else 0)) / 2 for t in range(len(a))]))
    return out


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_wersa(x, bidirectional, shared):
    levels, R, W = 3, 12, 5
    m = make(
        "wersa", levels=levels, num_features=R, conv_size=W, filter_size=4, bidirectional=bidirectional, shared_features=shared
    )
    assert m.causal is not bidirectional
    omega, rows = m.omega if not shared else m.omega.expand(2, -1, -1), []
    first = W // 2 if bidirectional else W - 1
    conv = torch.zeros_like(x)
    for t in range(T):
        for w in range(W):
            if 0 <= t - first + w < T:
                conv[t] += m.conv.weight[:, w] * x[t - first + w]
    mask = m.scales * torch.sigmoid(m.filters(conv))
    mixed = []
    for projection in (m.q_proj, m.k_proj):
        a = F.gelu(projection(x))
        smooth = haar(a, levels, T) if bidirectional else trous(a, levels)
        y = mask[:, levels:] * smooth[-1]
        for level in range(levels):
            y = y + mask[:, level : level + 1] * (smooth[level] - smooth[level + 1])
        mixed.append(heads(y))
    v = heads(m.v_proj(x))
    for h in range(H):
        rows.append([])
        width = math.log(1 + math.exp(float(m.bandwidth[h]))) + 0.1
        q, k = (F.relu(y[h] @ omega[i].T / width) / math.sqrt(R) for i, y in enumerate(mixed))
        for t in range(T):
            w = q[t] @ k[: T if bidirectional else t + 1].T
            rows[-1].append(w @ v[h, : len(w)] / (w.sum() + 1e-6))
    expected = m.o_proj(m.o_norm(torch.cat([torch.stack(row) for row in rows], -1)))
    torch.testing.assert_close(m(x[None])[0][0], expected, **EXACT)


def test_bidirectional_wersa_keeps_documents_apart_and_refuses_a_state(x):
    m = make("wersa", bidirectional=True, levels=2, num_features=6, conv_size=5)
    offsets = torch.tensor([0, 5, 5, 14, T], dtype=torch.int32)
    packed = m(x[None], context=Context(cu_seqlens=offsets))[0][0]
    apart = [m(x[None, a:b])[0][0] for a, b in ((0, 5), (5, 14), (14, T))]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-12, atol=1e-12)
    other = x.clone()
    other[T - 1] += 1
    assert bool((m(other[None])[0][0] - m(x[None])[0][0]).abs().amax(-1).min() > 0)  # every token sees the last one
    with pytest.raises(ValueError, match="wersa: option 'bidirectional' must be False where a state is given or wanted; got True"):
        m(x[None], context=Context(return_state=True))


def test_both_transforms_of_wersa_sum_to_the_signal(x):
    a = x[None]
    for width in (2, 4):
        total = (a - ops.block_mean(a, width)) + ops.block_mean(a, width)
        torch.testing.assert_close(total, a, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(ops.block_mean(ops.block_mean(a, width), width)[:, :20], ops.block_mean(a, width)[:, :20])
    smooth = trous(x, 3)
    torch.testing.assert_close(sum(smooth[i] - smooth[i + 1] for i in range(3)) + smooth[3], x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("width", [1, 2, 4, 7, 40])
@pytest.mark.parametrize("cu", [None, [0, 3, 3, 12, 23]])
def test_block_mean_backends_agree(x, width, cu):
    results, cu = [], None if cu is None else torch.tensor(cu, dtype=torch.int32)
    for backend in ("torch", "reference"):
        leaf = x[None].clone().requires_grad_()
        y = ops.block_mean(leaf, width, cu_seqlens=cu, backend=backend)
        (y * x.flip(0)).sum().backward()
        results.append((y.detach(), leaf.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
