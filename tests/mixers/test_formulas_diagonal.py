"""Mixers with a diagonal transition against their papers' formulas, written out here as one matrix or token by token, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formula_cases import heads_first, input_fixture, merged, perturbed, rms
from torch import Tensor

from linnet.feature_maps import hedgehog_features, quadratic_features, taylor_features
from linnet.mixers import build_mixer
from linnet.mixers.performer import orthogonal_features

T, D, H = 11, 16, 2
K = D // H


def make(name: str, layer_index: int = 0, num_layers: int = 1, **options):
    return perturbed(name, D, H, layer_index=layer_index, num_layers=num_layers, **options)


x = input_fixture(T, D)


def heads(y: Tensor, count: int = H) -> Tensor:
    return heads_first(y, count)


def centred(y: Tensor, eps: float) -> Tensor:
    return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + eps).sqrt()


def projections(m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(heads(p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))


def weighted_mean(A: Tensor, v: Tensor, eps: float = 0.0) -> Tensor:
    """Rows of the causal weights A [H, T, T] over their sum, times v."""
    A = A.tril()
    return merged(A @ v / (A.sum(-1, keepdim=True) + eps))


def shifted(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros(1, D, dtype=x.dtype), x[:-1]))


def assert_same(mixer, x: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(mixer(x[None])[0][0], expected, rtol=tolerance, atol=tolerance)


# ---- kernels -------------------------------------------------------------------------------------------------------------


def head_map(part, y: Tensor) -> Tensor:
    return torch.stack([y[h] @ part.weight[h] + part.bias[h] for h in range(H)])


@pytest.mark.parametrize("kind", ["exp", "softmax", "softmax_halves", "exp_max"])
def test_hedgehog(x, kind):
    m = make("hedgehog", feature_map=kind)
    q, k, v = projections(m, x)
    maps = {
        "exp": lambda u: torch.cat((u.exp(), (-u).exp()), -1),
        "softmax": lambda u: torch.cat((2 * u, -2 * u), -1).exp() / (2 * torch.cosh(2 * u)).sum(-1, keepdim=True),
        "softmax_halves": lambda u: torch.cat([(s * u).exp() / (s * u).exp().sum(-1, keepdim=True) for s in (1, -1)], -1),
        "exp_max": lambda u: torch.cat(((u - u.max(-1, True)[0]).exp(), (u.min(-1, True)[0] - u).exp()), -1),
    }
    phi_q, phi_k = maps[kind](head_map(m.q_map, q)), maps[kind](head_map(m.k_map, k))
    if kind == "exp":  # the eps stands beside queries whose largest feature is 1
        phi_q = phi_q / phi_q.amax(-1, keepdim=True)
    assert_same(m, x, m.o_proj(weighted_mean(phi_q @ phi_k.mT, v, 1e-6)))


@torch.no_grad()
def test_hedgehog_starts_with_the_identity():
    m = build_mixer("hedgehog", D, H).double()
    y = torch.randn(1, 3, H, K, dtype=torch.float64)
    torch.testing.assert_close(m.q_map(y), y, rtol=0, atol=0)


def test_hedgehog_of_the_paper_takes_inputs_of_any_size():
    m = make("hedgehog", feature_map="exp").float()
    y = m(1e3 * torch.randn(2, 9, D))[0]
    assert bool(y.isfinite().all())


def test_t2r(x):
    m = make("t2r", feature_size=5)
    q, k, v = projections(m, x)
    A = F.relu(head_map(m.q_map, q)) @ F.relu(head_map(m.k_map, k)).mT
    assert_same(m, x, m.o_proj(weighted_mean(A, v, 1e-6)))


def random_features(m, y: Tensor) -> tuple[Tensor, Tensor]:
    y = y * K**-0.25
    u = torch.stack([torch.tensor([[float(w @ t - t @ t / 2) for w in m.omega_FK] for t in head], dtype=y.dtype) for head in y])
    return u, u.amax(-1, keepdim=True)


@torch.no_grad()
def test_performer(x):
    m = make("performer")
    q, k, v = projections(m, x)
    (u_q, top_q), (u_k, top_k) = random_features(m, q), random_features(m, k)
    A = ((u_q - top_q).exp() + 1e-4) @ (u_k.exp() + 1e-4 * top_k.exp()).mT
    assert_same(m, x, m.o_proj(weighted_mean(A, v)))


def test_performer_relu(x):
    m = make("performer", kernel="relu", feature_eps=1e-3)
    q, k, v = projections(m, x)
    phi = lambda y: F.relu(y @ m.omega_FK.T * K**-0.25) + 1e-3  # noqa: E731
    assert_same(m, x, m.o_proj(weighted_mean(phi(q) @ phi(k).mT, v)))


def test_performer_features_are_unbiased():
    """E[phi(q).phi(k)] = exp(q.k / sqrt(K)), over independent draws of w."""
    q, k = (0.7 * torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    draws = []
    for seed in range(300):
        w = orthogonal_features(4 * K, K, seed)
        phi = [(w @ (y * K**-0.25) - (y * K**-0.25).square().sum() / 2).exp() for y in (q, k)]
        draws.append(float(phi[0] @ phi[1]) / len(w))
    mean, error = torch.tensor(draws).mean(), torch.tensor(draws).std() / len(draws) ** 0.5
    assert abs(float(mean) - math.exp(float(q @ k) / math.sqrt(K))) < 4 * float(error) < 0.1


@pytest.mark.parametrize("row_norms", ["chi", "sqrt"])
def test_performer_rows_are_orthogonal_in_blocks(row_norms):
    w = orthogonal_features(2 * K + 3, K, 7, row_norms)
    for start in (0, K, 2 * K):
        block = w[start : start + K]
        gram = block @ block.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-12)
    if row_norms == "sqrt":
        torch.testing.assert_close(w.norm(dim=1), torch.full((len(w),), math.sqrt(K), dtype=w.dtype))
    assert not torch.equal(w, orthogonal_features(2 * K + 3, K, 8, row_norms))
    layers = [build_mixer("performer", D, H, layer_index=i, num_layers=2).omega_FK for i in (0, 0, 1)]
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], layers[2])


def test_based(x):
    m = make("based", feature_size=4)
    q, k, v = projections(m, x)
    s = q @ k.mT / math.sqrt(4)
    assert_same(m, x, m.o_proj(weighted_mean(1 + s + s.square() / 2, v, 1e-12)))


@pytest.mark.parametrize("tied", [False, True])
def test_rebased(x, tied):
    m = make("rebased", feature_size=4, tied=tied)
    q, k, v = projections(m, x)
    q = centred(q, 1e-5) * m.q_norm.weight + m.q_norm.bias
    norm = m.q_norm if tied else m.k_norm
    k = centred(k, 1e-5) * norm.weight + norm.bias
    assert_same(m, x, m.o_proj(weighted_mean((q @ k.mT).square() / 4, v, 1e-5)))


def test_features_of_products_are_as_few_as_can_be():
    q, k = torch.randn(2, 5, 16, dtype=torch.float64)
    s = (q * k).sum(-1)
    torch.testing.assert_close((taylor_features(q) * taylor_features(k)).sum(-1), 1 + s / 4 + s.square() / 32)
    torch.testing.assert_close((quadratic_features(q) * quadratic_features(k)).sum(-1), s.square() / 16)
    assert taylor_features(q).shape[-1] == 153 and quadratic_features(q).shape[-1] == 136
    with pytest.raises(ValueError, match="kind must be 'softmax'"):
        hedgehog_features(q, "exp")


def test_cosformer(x):
    m = make("cosformer", max_length=20)
    q, k, v = projections(m, x)
    age = torch.arange(T, dtype=x.dtype)[:, None] - torch.arange(T, dtype=x.dtype)
    A = F.relu(q) @ F.relu(k).mT * torch.cos(math.pi / 2 * age / 20)
    assert_same(m, x, m.o_proj(weighted_mean(A, v, 1e-6)))


# ---- constant decay ------------------------------------------------------------------------------------------------------


def decayed(q: Tensor, k: Tensor, v: Tensor, log_decay_H: Tensor, scale: float = 1.0) -> Tensor:
    age = torch.arange(T, dtype=q.dtype)[:, None] - torch.arange(T, dtype=q.dtype)
    return merged(scale * (q @ k.mT * torch.exp(age * log_decay_H[:, None, None])).tril() @ v)


def test_lightning_turns_its_first_layer_by_learned_angles(x):
    m = make("lightning", 0, 4, noise=0.1)
    q, k, v = projections(m, x)
    turn = torch.polar(torch.ones(1, 1, 1, dtype=x.dtype), m.angle.view(H, 1, -1) * torch.arange(T, dtype=x.dtype)[:, None])
    q, k = (torch.complex(*F.silu(y).chunk(2, -1)) * turn for y in (q, k))
    age = torch.arange(T)[:, None] - torch.arange(T)
    decay = torch.exp(-(8 / H) * torch.arange(H, dtype=x.dtype)[:, None, None] * age)
    o = merged(((q @ k.conj().mT).real * decay).tril() @ v)
    assert_same(m, x, m.o_proj(rms(o, eps=1e-6) * m.g_proj(x)))


def test_lightning_of_the_authors_code(x):
    m = make("lightning", 1, 4, decay="alibi_interleaved", norm="layer", gate="low_rank", value_activation=True)
    q, k, v = (F.silu(y) for y in projections(m, x))
    slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=x.dtype) * (1 - 1 / (3 + 1e-5) + 1e-5)
    o = centred(decayed(q, k, v, -slopes), 1e-6) * m.o_norm.weight + m.o_norm.bias
    gate = torch.sigmoid(x @ m.g_proj.down.weight.T @ m.g_proj.up.weight.T)
    assert_same(m, x, m.o_proj(o * gate))


@pytest.mark.parametrize(
    "decay,count,expected",
    [
        ("tnl", 4, [0, 2, 4, 6]),
        ("alibi", 6, [2 ** -(8 * (h + 1) / 6) for h in range(6)]),
        ("alibi_interleaved", 8, [2.0 ** -(h + 1) for h in range(8)]),
        ("alibi_interleaved", 6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]),
    ],
)
def test_lightning_slopes_of_the_first_layer(decay, count, expected):
    m = build_mixer("lightning", 48, count, decay=decay, num_layers=12)
    decays = m.log_decays(torch.zeros(1, dtype=torch.float64))
    factor = 1 if decay == "tnl" else 1 + 1e-5
    assert decays.tolist() == pytest.approx([-factor * y for y in expected], rel=1e-12)
    assert float(decays.min()) >= m.log_decay_min


@pytest.mark.parametrize("size", [4, 64])
def test_transnormer_blocks(x, size):
    m = make("transnormer", attention="diag", block_size=size)
    q, k, v = projections(m, x)
    block = torch.arange(T) // size
    hidden = (block[:, None] != block) | ~torch.ones(T, T, dtype=torch.bool).tril()
    p = (q @ k.mT / math.sqrt(K)).masked_fill(hidden, -torch.inf).softmax(-1)
    assert_same(m, x, m.o_proj(merged(p @ v)))


def test_transnormer_norm_attention_and_the_order_of_its_layers(x):
    m = make("transnormer", 2, 4)
    q, k, v = projections(m, x)
    o = merged(((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril() @ v)
    assert_same(m, x, m.o_proj(rms(o, m.o_norm.weight)))
    assert [build_mixer("transnormer", D, H, layer_index=i, num_layers=4).diag for i in range(4)] == [True, True, False, False]


# ---- data-dependent decay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("official", [False, True])
def test_hgrn2(x, official):
    options = {"q_activation": "sigmoid", "v_activation": "silu", "norm": "layer", "bias": True, "scale": 1.0} if official else {}
    m = make("hgrn2", 2, 4, **options)
    lower = 1 / 4 + (1 - 1 / 4) * torch.sigmoid(m.bound_logit)
    f = heads(lower + (1 - lower) * torch.sigmoid(m.f_proj(x)))
    q, v = (heads(p(x)) for p in (m.q_proj, m.v_proj))
    q, v = (torch.sigmoid(q), F.silu(v)) if official else (F.silu(q) / math.sqrt(K), v)
    S, o = torch.zeros(H, K, K, dtype=x.dtype), []
    for t in range(T):
        S = f[:, t, :, None] * S + (1 - f[:, t, :, None]) * v[:, t, None, :]
        o.append(torch.einsum("hk,hkv->hv", q[:, t], S))
    o = merged(torch.stack(o, 1))
    o = centred(o, 1e-5) * m.o_norm.weight + m.o_norm.bias if official else rms(o, m.o_norm.weight)
    assert_same(m, x, m.o_proj(o))


def test_gsa(x):
    m = make("gsa", slots=5, scale=0.7)
    q, k, v = (F.silu(y) for y in projections(m, x))
    alpha = torch.sigmoid(heads(m.f_proj(x))) ** (1 / 8)
    R, U, o = torch.zeros(H, 5, K, dtype=x.dtype), torch.zeros(H, 5, K, dtype=x.dtype), []
    for t in range(T):
        a = alpha[:, t, :, None]
        R, U = a * R + (1 - a) * k[:, t, None, :], a * U + (1 - a) * v[:, t, None, :]
        p = torch.einsum("hmk,hk->hm", R, 0.7 * q[:, t]).softmax(-1)
        o.append(torch.einsum("hmv,hm->hv", U, p))
    assert_same(m, x, m.o_proj(rms(F.silu(merged(torch.stack(o, 1))), m.o_norm.weight)))


def test_rwkv6(x):
    m = make("rwkv6", 1, 3, shift_rank=3, decay_rank=4)
    delta = shifted(x) - x
    low = torch.tanh((x + delta * m.mu["x"]) @ m.shift_down.weight.T).view(T, 5, 3)
    xs = {name: x + delta * (m.mu[name] + low[:, i] @ m.shift_up[i]) for i, name in enumerate("wkvrg")}
    w = torch.exp(-torch.exp(m.w_lora.up.bias + torch.tanh(xs["w"] @ m.w_lora.down.weight.T) @ m.w_lora.up.weight.T))
    r, k, v, w = (heads(y) for y in (m.r_proj(xs["r"]), m.k_proj(xs["k"]), m.v_proj(xs["v"]), w))
    u, S, o = m.u.view(H, K, 1), torch.zeros(H, K, K, dtype=x.dtype), []
    for t in range(T):
        kv = k[:, t, :, None] * v[:, t, None, :]
        o.append(torch.einsum("hk,hkv->hv", r[:, t], S + u * kv))
        S = w[:, t, :, None] * S + kv
    o = merged(centred(torch.stack(o, 1), 6.4e-4)) * m.norm.weight + m.norm.bias
    assert_same(m, x, m.o_proj(o * F.silu(m.g_proj(xs["g"]))))


def test_rwkv4(x):
    m = make("rwkv4", 1, 3, expand=1.5)
    xk, xv, xr = (m.mu[name] * x + (1 - m.mu[name]) * shifted(x) for name in "kvr")
    k, v, w = m.k_proj(xk), m.v_proj(xv), m.decay.exp()
    out = []
    for t in range(T):
        weight = torch.stack([torch.exp(-(t - 1 - s) * w + k[s]) for s in range(t)] + [torch.exp(m.u + k[t])])
        out.append((weight * v[: t + 1]).sum(0) / weight.sum(0))
    assert_same(m, x, m.o_proj(torch.sigmoid(m.r_proj(xr)) * torch.stack(out)))


def test_lightnet_is_a_softmax_over_time(x):
    m = make("lightnet")
    q, k, v = projections(m, x)
    o = [torch.einsum("hk,hsk,hsv->hv", F.silu(q[:, t]), k[:, : t + 1].softmax(1), v[:, : t + 1]) for t in range(T)]
    o = merged(torch.stack(o, 1)) / math.sqrt(K)
    assert_same(m, x, m.o_proj(rms(o, m.o_norm.weight) * F.silu(m.g_proj(x))))


@pytest.mark.parametrize("gate", ["exp", "sigmoid", "sigmoid-plain"])
def test_mlstm(x, gate):
    options = {} if gate == "exp" else {"input_gate": "sigmoid", "normalizer": "floor" if gate == "sigmoid" else None}
    m = make("mlstm", input_bias=1.0, **options)
    q, k, v = projections(m, x)
    i, f = (15 * torch.tanh(p(x) / 15).T[..., None] for p in (m.i_proj, m.f_proj))
    i, f = (i.exp() if gate == "exp" else torch.sigmoid(i)), torch.sigmoid(f)
    C, n, h = torch.zeros(H, K // 2, K, dtype=x.dtype), torch.zeros(H, K // 2, dtype=x.dtype), []
    for t in range(T):
        C = f[:, t, None] * C + i[:, t, None] * k[:, t, :, None] * v[:, t, None, :]
        n = f[:, t] * n + i[:, t] * k[:, t]
        q_t = q[:, t] / math.sqrt(K // 2)
        floor = (n * q_t).sum(-1).abs().clamp_min(1) if m.config.normalizer else torch.ones(H, dtype=x.dtype)
        h.append(torch.einsum("hk,hkv->hv", q_t, C) / floor[:, None])
    y = merged(centred(torch.stack(h, 1), 1e-6)) * m.o_norm.weight
    assert_same(m, x, m.o_proj(torch.sigmoid(m.g_proj(x)) * y))


def test_gla_with_negative_eigenvalues(x):
    m = make("gla", allow_neg_eigval=True, temperature=1.0)
    q, k, v = projections(m, x)
    a = 2 * heads(torch.sigmoid(m.gk_proj.up(m.gk_proj.down(x)))) - 1
    assert 0.2 < float((a < 0).double().mean()) < 0.8
    S, o = torch.zeros(H, q.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(T):
        S = a[:, t, :, None] * S + k[:, t, :, None] * v[:, t, None, :]
        o.append(torch.einsum("hk,hkv->hv", q[:, t], S) / math.sqrt(q.shape[-1]))
    y = merged(rms(torch.stack(o, 1), m.o_norm.weight))
    assert_same(m, x, m.o_proj(y * F.silu(m.g_proj(x))))


# ---- initialisation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_initial_values_are_the_authors():
    torch.manual_seed(0)
    rwkv6 = build_mixer("rwkv6", 64, 4, layer_index=1, num_layers=3)
    assert float(rwkv6.o_proj.weight.abs().max()) == float(rwkv6.shift_down.weight.abs().max()) == 0
    assert float(rwkv6.w_lora.up.bias[0]) == -6 and float(rwkv6.w_lora.up.bias[-1]) == pytest.approx(-1)
    torch.testing.assert_close(rwkv6.k_proj.weight @ rwkv6.k_proj.weight.T, 0.01 * torch.eye(64), rtol=1e-4, atol=1e-6)
    assert rwkv6.u[:3].tolist() == pytest.approx([0.5, 0.5 * 62 / 63 + 0.1, 0.5 * 61 / 63 - 0.1])
    rwkv4 = build_mixer("rwkv4", 64, layer_index=1, num_layers=3)
    assert float(rwkv4.decay[0]) == -5 and float(rwkv4.decay[-1]) == pytest.approx(3)
    assert rwkv4.u[:3].tolist() == pytest.approx([math.log(0.3), math.log(0.3) + 0.5, math.log(0.3) - 0.5])
    assert float(rwkv4.mu["k"][32]) == pytest.approx(0.5 ** (2 / 3))
    mlstm = build_mixer("mlstm", 64, 4)
    assert mlstm.f_proj.bias.tolist() == [3, 4, 5, 6] and mlstm.i_proj.bias.tolist() == [-10] * 4
    assert float(mlstm.f_proj.weight.abs().max()) == 0
