"""Mixers against their papers' formulas, written out here token by token or as one matrix, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formula_cases import heads_first, input_fixture, merged, perturbed, rms
from torch import Tensor

from linnet.feature_maps import FEATURE_MAPS, get_feature_map
from linnet.mixers import Context, build_mixer

T, D, H = 11, 16, 2


def make(name: str, layer_index: int = 0, num_layers: int = 1, **options):
    return perturbed(name, D, H, layer_index=layer_index, num_layers=num_layers, **options)


x = input_fixture(T, D)


def heads(y: Tensor, count: int = H) -> Tensor:
    return heads_first(y, count)


def assert_same(mixer, x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mixer(x[None])[0][0], expected, rtol=1e-10, atol=1e-10)


def test_linear_transformer(x):
    m = make("linear_transformer")
    q, k, v = (heads(p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))
    A = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    assert_same(m, x, m.o_proj(merged(A @ v / (A.sum(-1, keepdim=True) + 1e-6))))


def test_retnet_is_the_parallel_form_with_complex_angles(x):
    m = make("retnet")
    q, k, v = (heads(p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))
    K, time = q.shape[-1], torch.arange(T, dtype=torch.float64)
    theta = 10000.0 ** -torch.linspace(0, 1, K // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(T, K // 2, dtype=torch.float64), time[:, None] * theta)
    q, k = (torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn for y in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    decay = (gamma[:, None, None] ** (time[:, None] - time)).tril()
    o = ((q @ k.conj().mT).real * decay / math.sqrt(K)) @ v
    assert_same(m, x, m.o_proj(F.silu(m.g_proj(x)) * merged(rms(o))))


@pytest.mark.parametrize(
    "decay,index,expected",
    [
        ("retnet", 0, [math.log(1 - 2**-5), math.log(1 - 2**-6)]),
        ("tnl", 1, [0.0, -(8 / 2) * (1 - 1 / 4)]),
        ("alibi", 1, [-(2**-4) * (1 - 1 / (3 + 1e-5) + 1e-5), -(2**-8) * (1 - 1 / (3 + 1e-5) + 1e-5)]),
        ((-0.5, -0.25), 3, [-0.5, -0.25]),
    ],
)
def test_retnet_decays(decay, index, expected):
    mixer = make("retnet", index, 4, decay=decay)
    assert mixer.log_decays(torch.zeros(1, dtype=torch.float64)).tolist() == pytest.approx(expected, rel=1e-12)
    assert min(expected) >= mixer.log_decay_min >= 1.01 * min(expected)


def test_gla(x):
    m = make("gla")
    q, k, v = (heads(p(x)) for p in (m.q_proj, m.k_proj, m.v_proj))
    alpha = heads(torch.sigmoid(m.gk_proj.up(m.gk_proj.down(x))) ** (1 / 16))
    S, o = torch.zeros(H, q.shape[-1], v.shape[-1], dtype=x.dtype), []
    for t in range(T):
        S = alpha[:, t, :, None] * S + k[:, t, :, None] * v[:, t, None, :]
        o.append(torch.einsum("hk,hkv->hv", q[:, t], S) / math.sqrt(q.shape[-1]))
    y = merged(rms(torch.stack(o, 1), m.o_norm.weight))
    assert_same(m, x, m.o_proj(y * F.silu(m.g_proj(x))))


def test_hgrn(x):
    m = make("hgrn", 2, 4)
    lower = 1 / 4 + (1 - 1 / 4) * torch.sigmoid(m.bound_logit)  # alone, it takes the layer below at 1/4
    f = lower + (1 - lower) * torch.sigmoid(m.f_proj(x))
    h, out = torch.zeros(D, dtype=x.dtype), []
    for t in range(T):
        h = f[t] * h + (1 - f[t]) * F.silu(m.i_proj(x[t]))
        out.append(h)
    assert_same(m, x, m.o_proj(rms(torch.stack(out), m.o_norm.weight) * F.silu(m.g_proj(x))))


def test_hgrn_with_a_complex_state(x):
    m = make("hgrn", 0, 4, complex=True, output="gate_norm")
    f = torch.sigmoid(m.f_proj(x))
    real, imaginary = F.silu(m.i_proj(x)).chunk(2, -1)
    h, out = torch.zeros(D, dtype=torch.complex128), []
    for t in range(T):
        h = f[t] * torch.exp(1j * m.theta) * h + (1 - f[t]) * (real[t] + 1j * imaginary[t])
        out.append(torch.cat((h.real, h.imag)))
    y = torch.stack(out) * torch.sigmoid(m.g_proj(x))
    assert_same(m, x, m.o_proj(F.layer_norm(y, (2 * D,), m.o_norm.weight, m.o_norm.bias, 1e-5)))


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3], [0, 3], [2]])
def test_hgrn_lower_bounds_start_at_their_depth_in_any_hybrid(kept):
    context = Context()
    for index in kept:
        layer = build_mixer("hgrn", D, layer_index=index, num_layers=4).double()
        bound = torch.as_tensor(layer.bound(context), dtype=torch.float64)
        torch.testing.assert_close(bound, torch.full_like(bound, index / 4), rtol=1e-6, atol=1e-7)
        assert build_mixer("hgrn", D, layer_index=index, num_layers=4, lower_bound="fixed").bound(context) == index / 4


def test_hgrn_lower_bounds_rise_and_carry_gradients_downwards():
    context, layers = Context(), [make("hgrn", i, 3) for i in range(3)]
    bounds = [layer.bound(context) for layer in layers]
    assert bounds[0] == 0.0 and bool((bounds[1] > 0).all()) and bool((bounds[2] > bounds[1]).all()) and bool((bounds[2] < 1).all())
    bounds[2].sum().backward()
    assert bool((layers[1].bound_logit.grad > 0).all())


def test_deltanet(x):
    m = make("deltanet", allow_neg_eigval=True)
    qkv = torch.cat([p(x) for p in (m.q_proj, m.k_proj, m.v_proj)], -1)
    padded = torch.cat((torch.zeros(3, qkv.shape[1], dtype=x.dtype), qkv))
    qkv = F.silu(sum(padded[w : w + T] * m.conv.weight[:, w] for w in range(4)))
    q, k, v = (heads(y) for y in qkv.split(D, -1))
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = heads(2 * torch.sigmoid(m.b_proj(x)))[..., 0]
    S, o, eye = torch.zeros(H, D // H, D // H, dtype=x.dtype), [], torch.eye(D // H, dtype=x.dtype)
    for t in range(T):
        b, kt = beta[:, t, None, None], k[:, t, :, None]
        S = (eye - b * kt @ kt.mT) @ S + b * kt @ v[:, t, None, :]
        o.append((q[:, t, None, :] @ S)[:, 0] / math.sqrt(D // H))
    assert_same(m, x, m.o_proj(merged(rms(torch.stack(o, 1), m.o_norm.weight))))


def test_rwkv7(x):
    ranks = {name: 4 for name in ("decay_rank", "a_rank", "value_rank", "gate_rank")}
    m, first = make("rwkv7", 1, 3, **ranks), make("rwkv7", 0, 3, **ranks)
    past = torch.cat((torch.zeros(1, D, dtype=x.dtype), x[:-1]))
    xr, xw, xk, xv, xa, xg = (x + (past - x) * m.mu[name] for name in "rwkvag")
    v_first = first.v_proj(x + (past - x) * first.mu["v"])

    def low(lora, y, activation=lambda z: z):
        return activation(y @ lora.down.weight.T) @ lora.up.weight.T + (0 if lora.up.bias is None else lora.up.bias)

    w = torch.exp(-math.exp(-0.5) * torch.sigmoid(low(m.w_lora, xw, torch.tanh)))
    r, k, v, a = m.r_proj(xr), m.k_proj(xk), m.v_proj(xv), torch.sigmoid(low(m.a_lora, xa))
    v = v + (v_first - v) * torch.sigmoid(low(m.v_lora, xv))
    kappa = heads(k * m.k_k)
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    k = k * (1 + (a - 1) * m.k_a)
    r, w, k, v, a = (heads(y) for y in (r, w, k, v, a))
    S, o = torch.zeros(H, D // H, D // H, dtype=x.dtype), []
    for t in range(T):
        transition = torch.diag_embed(w[:, t]) - (kappa * a)[:, t, :, None] @ kappa[:, t, None, :]
        S = transition @ S + k[:, t, :, None] @ v[:, t, None, :]
        o.append((r[:, t, None, :] @ S)[:, 0])
    o = torch.stack(o, 1)
    eps = D // H * 1e-5
    o = (o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    o = merged(o) * m.norm.weight + m.norm.bias + merged((r * k * m.r_k[:, None]).sum(-1, keepdim=True) * v)
    expected = m.o_proj(o * low(m.g_lora, xg, torch.sigmoid))
    context = Context()
    first(x[None], context=context)
    torch.testing.assert_close(m(x[None], context=context)[0][0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name,options", [("attention", {}), ("attention", {"window": 3}), ("retnet", {}), ("retnet", {"position": "rope"})]
)
def test_positions_are_relative_and_may_be_given(name, options, x):
    mixer, positions = make(name, **options), torch.arange(T)[None]
    y = mixer(x[None])[0]
    torch.testing.assert_close(mixer(x[None], context=Context(positions=positions))[0], y, rtol=0, atol=0)
    torch.testing.assert_close(mixer(x[None], context=Context(positions=positions + 100))[0], y, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(mixer(x[None], context=Context(positions=positions * 2))[0], y, rtol=1e-3)


@torch.no_grad()
def test_initial_values_are_the_authors():
    torch.manual_seed(0)
    mamba = build_mixer("mamba", 64, num_layers=4)
    step = F.softplus(mamba.dt_proj.bias)
    assert float(step.min()) >= 0.99e-3 and float(step.max()) <= 0.101
    torch.testing.assert_close(mamba.A_log.exp()[5], torch.arange(1.0, 17))
    assert float(mamba.dt_proj.weight.abs().max()) <= 4**-0.5
    assert float(mamba.out_proj.weight.abs().max()) <= 128**-0.5 / 2
    for name in ("mamba2", "gated_deltanet", "kda"):
        mixer = build_mixer(name, 64, 4)
        assert 1 <= float(mixer.A_log.exp().min()) and float(mixer.A_log.exp().max()) <= 16.001
        step = F.softplus(mixer.dt_bias)
        assert float(step.min()) >= 0.99e-3 and float(step.max()) <= 0.101
    assert float(build_mixer("kda", 64, 4, decay_gate="safe").A_log.abs().max()) == 0
    rwkv = build_mixer("rwkv7", 64, 4, layer_index=1, num_layers=4)
    assert float(rwkv.o_proj.weight.abs().max()) == 0
    torch.testing.assert_close(rwkv.k_proj.weight @ rwkv.k_proj.weight.T, 0.01 * torch.eye(64), rtol=1e-4, atol=1e-6)
    gla = build_mixer("gla", 64, 4)
    decay = F.logsigmoid(gla.gk_proj(torch.randn(100, 64))) / 16
    assert float(decay.mean()) == pytest.approx(math.log(0.5) / 16, rel=0.05)


def test_feature_maps_by_name():
    x = torch.tensor([-2.0, 0.0, 3.0])
    torch.testing.assert_close(get_feature_map("elu+1")(x), torch.tensor([math.exp(-2), 1.0, 4.0]))
    assert set(FEATURE_MAPS) == {"elu+1", "relu", "silu", "identity"}
    with pytest.raises(ValueError, match="feature map must be one of 'elu\\+1'.*; got 'exp'"):
        get_feature_map("exp")
