"""Recurrent mixers against plain loops written from their papers' formulas, and the tools of dynamical systems, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.evals import dynamics
from linnet.mixers import Context, build_mixer

T, D = 30, 8


def make(name: str, **options):
    """Away from its initialisation, so that no part of it is silent."""
    torch.manual_seed(0)
    mixer = build_mixer(name, D, 2, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return mixer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def causal_conv(x: Tensor, conv) -> Tensor:
    return F.conv1d(F.pad(x.mT, (conv.width - 1, 0)), conv.weight[:, None], conv.bias, groups=x.shape[1]).mT


def head_norm(h: Tensor, eps: float) -> Tensor:
    """LayerNorm of every head of [H, V] without weights, flat."""
    return ((h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + eps).sqrt()).flatten()


# ---- almost-linear RNN ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units,relu_units", [(None, None), (12, 3), (5, 0), (5, 5)])
def test_al_rnn_is_its_recurrence(x, units, relu_units):
    m = make("al_rnn", units=units, relu_units=relu_units)
    M, P = m.config.M, m.config.P
    z, rows = torch.zeros(M, dtype=x.dtype), []
    for t in range(T):
        phi = torch.stack([z[i] if i < M - P else z[i].clamp_min(0) for i in range(M)])
        z = m.A * z + m.W @ phi + m.in_proj.weight @ x[t] + m.in_proj.bias
        rows.append(m.o_proj.weight @ z)
    assert_same(m(x[None])[0][0], torch.stack(rows))


def test_al_rnn_is_linear_within_a_word_of_its_code(x):
    """dz_t / dz_{t-1} = diag(A) + W diag(1, .., 1, [z > 0])."""
    m = make("al_rnn", units=6, relu_units=3)
    z = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    _, (new,) = m(x[None, :1], (z,), context=Context(return_state=True))
    jacobian = torch.stack([torch.autograd.grad(new[0, i], z, retain_graph=True)[0][0] for i in range(6)])
    gates = torch.cat((torch.ones(3, dtype=z.dtype), (z[0, 3:] > 0).double()))
    assert_same(jacobian, torch.diag(m.A) + m.W * gates)


def test_al_rnn_starts_stable():
    m = build_mixer("al_rnn", 64).double()
    assert bool((m.A > 0).all()) and bool((m.A < 1).all())
    spectrum = torch.linalg.eigvals(torch.diag(m.A) + m.W).abs().detach()
    assert float(spectrum.max()) < 1


# ---- RG-LRU --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_token", ["scaled", "unit"])
def test_rg_lru_is_its_recurrence(x, first_token):
    m = make("rg_lru", first_token=first_token, expand=1.5, c=5.0)
    u = causal_conv(m.x_proj(x), m.conv)
    h, rows = torch.zeros(12, dtype=x.dtype), []
    for t in range(T):
        blocks = u[t].view(2, 6)
        r, i = (
            torch.stack([torch.sigmoid(blocks[k] @ W[k] + b[k]) for k in range(2)]).flatten()
            for W, b in ((m.W_r, m.b_r), (m.W_i, m.b_i))
        )
        a = torch.sigmoid(-m.Lambda) ** (5.0 * r)  # sigmoid(-L) = exp(-softplus(L))
        enter = 1 if first_token == "unit" and t == 0 else (1 - a**2).sqrt()
        h = a * h + enter * (i * u[t])
        rows.append(m.o_proj(h * F.gelu(m.y_proj(x[t]), approximate="tanh")))
    assert_same(m(x[None])[0][0], torch.stack(rows))


def test_rg_lru_counts_first_tokens_per_document(x):
    """A first token is one where nothing of its document was seen: not the first of a continued call."""
    m = make("rg_lru", first_token="unit")
    whole = m(x[None])[0]
    offsets = torch.tensor([0, 10, 10, T], dtype=torch.int32)
    y, state = m(x[None], context=Context(return_state=True, cu_seqlens=offsets))
    assert_same(y[:, :10], whole[:, :10])
    assert_same(y[:, 10:], m(x[None, 10:])[0])
    assert state[-1].tolist() == [10, 0, 20]
    first, state = m(x[None, :7], context=Context(return_state=True))
    assert_same(m(x[None, 7:], state)[0], whole[:, 7:])


@pytest.mark.parametrize("start,power", [("a^c", 8.0), ("a", 1.0)])
def test_rg_lru_starts_on_its_ring(start, power):
    a = torch.sigmoid(-build_mixer("rg_lru", 512, start=start, radius=(0.8, 0.99)).Lambda.double()) ** power
    assert 0.79999 < float(a.min()) < 0.81 and 0.985 < float(a.max()) < 0.99001
    assert abs(float((a**2).mean()) - (0.8**2 + 0.99**2) / 2) < 0.02


def test_rg_lru_survives_decays_that_round_to_one():
    m = build_mixer("rg_lru", D, 2)
    with torch.no_grad():
        m.Lambda.fill_(-120.0)  # softplus underflows: a = 1, and the slope of the root is infinite
    x = torch.randn(1, 9, D, requires_grad=True)
    m(x)[0].square().sum().backward()
    assert bool(x.grad.isfinite().all()) and all(bool(p.grad.isfinite().all()) for p in m.parameters())


# ---- xLSTM ---------------------------------------------------------------------------------------------------------------


def test_slstm_is_its_stabilised_recurrence(x):
    """With the running maximum of the paper, from a state in the middle of a sequence, and its final state."""
    m = make("slstm")
    conv = F.silu(causal_conv(x, m.conv))
    h, C, n, top = (torch.zeros(2, 4, dtype=x.dtype) for _ in range(4))
    rows = []
    for t in range(T):
        inputs = (conv[t], conv[t], x[t], x[t])
        i, f, z, o = (
            torch.stack([inputs[g].view(2, 4)[k] @ m.W[k, :, g] + h[k] @ m.R[k, :, g] + m.bias[k, g] for k in range(2)])
            for g in range(4)
        )
        new = torch.maximum(F.logsigmoid(f) + top, i) if t else i
        enter, keep = (i - new).exp(), (F.logsigmoid(f) + top - new).exp() if t else 0
        C, n, top = keep * C + enter * z.tanh(), keep * n + enter, new
        h = o.sigmoid() * C / n
        rows.append(head_norm(h, 1e-5) * m.norm_weight)
    _, state = m(x[None, :11], context=Context(return_state=True))
    y, state = m(x[None, 11:], state, context=Context(return_state=True))
    assert_same(y[0], torch.stack(rows)[11:])
    for actual, expected in zip(state[1:], (h, C, n, top), strict=True):
        assert_same(actual[0], expected)


def memory(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor) -> Tensor:
    """The unstabilised matrix memory of one head, [T, K], [T, V], [T] -> [T, V]."""
    C, n, rows = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), torch.zeros(q.shape[1], dtype=q.dtype), []
    for t in range(q.shape[0]):
        C = log_f[t].exp() * C + i[t].exp() * torch.outer(k[t], v[t])
        n = log_f[t].exp() * n + i[t].exp() * k[t]
        query = q[t] / math.sqrt(q.shape[1])
        rows.append(C.mT @ query / (n @ query).abs().clamp_min(1))
    return torch.stack(rows)


@pytest.mark.parametrize("input_gate", ["exp", "sigmoid"])
def test_mlstm_block_is_the_block_of_the_first_paper(x, input_gate):
    m = make("mlstm_block", input_gate=input_gate)
    u, z = m.up_proj(x).split(16, 1)
    c = F.silu(causal_conv(u, m.conv))
    q, k, v = (
        torch.cat([y[:, 4 * b : 4 * b + 4] @ m.qkv[g, b].mT for b in range(4)], 1) for g, y in enumerate((c, c, u))
    )  # fmt: skip
    gates = torch.cat((q, k, v), 1)
    i, f = m.i_proj(gates), m.f_proj(gates)
    i = i if input_gate == "exp" else F.logsigmoid(i)
    cut = lambda y, h: y[:, 8 * h : 8 * h + 8]
    heads = [memory(cut(q, h), cut(k, h), cut(v, h), i[:, h], F.logsigmoid(f[:, h])) for h in range(2)]
    normed = torch.stack([head_norm(row, 1e-5) for row in torch.stack(heads, 1)]) * m.o_norm.weight
    assert_same(m(x[None])[0][0], m.down_proj((normed + m.skip * c) * F.silu(z)))


# ---- dynamical systems ---------------------------------------------------------------------------------------------------


def test_runge_kutta_has_order_four():
    """x' = (x_2, -x_1) is a rotation; halving the step divides the error by 16."""
    errors = []
    for steps in (50, 100):
        end = dynamics.integrate(lambda s: (s[1], -s[0]), (1.0, 0.0), steps, 5.0 / steps)[-1]
        errors.append(float((end - torch.tensor([math.cos(5.0), -math.sin(5.0)], dtype=torch.float64)).norm()))
    assert 15 < errors[0] / errors[1] < 17


def test_lorenz63_is_deterministic_and_on_its_attractor():
    x = dynamics.lorenz63(4000)
    assert x.shape == (4000, 3) and torch.equal(x, dynamics.lorenz63(4000))
    assert not torch.equal(x, dynamics.lorenz63(4000, seed=1))
    half = dynamics.integrate(  # half the step, the same flow
        lambda s: (10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]), tuple(x[99].tolist()), 200, 0.005
    )
    assert_same(half[1::2], x[100:200], 1e-4)
    assert bool((x[:, 2] > 0).all()) and float(x[:, 2].max()) < 50 and float(x[:, 0].amin()) < -10 and float(x[:, 0].amax()) > 10
    scaled = dynamics.standardize(x)
    assert_same(scaled.mean(0), torch.zeros(3, dtype=x.dtype))
    assert_same(scaled.std(0), torch.ones(3, dtype=x.dtype))


def test_state_space_divergence_is_the_kl_of_histograms():
    true = torch.tensor([[0.0], [0.0], [0.0], [1.0]], dtype=torch.float64)
    generated = torch.tensor([[0.1], [0.9], [0.9], [5.0]], dtype=torch.float64)  # 5 is outside, NaN likewise
    alpha = 0.5
    p, q = [(3 + alpha) / (4 + 2 * alpha), (1 + alpha) / (4 + 2 * alpha)], [(1 + alpha) / 5, (2 + alpha) / 5]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert dynamics.state_space_divergence(true, generated, bins=2, alpha=alpha) == pytest.approx(expected, rel=1e-12)
    generated[3] = math.nan
    assert dynamics.state_space_divergence(true, generated, bins=2, alpha=alpha) == pytest.approx(expected, rel=1e-12)
    x = dynamics.lorenz63(3000)
    assert dynamics.state_space_divergence(x, x) == 0
    assert dynamics.state_space_divergence(x, x.flip(0)) == pytest.approx(0, abs=1e-12)  # blind to time
    assert dynamics.state_space_divergence(x, x[:1].expand(3000, -1)) > 5


def test_spectral_distance_is_a_hellinger_distance():
    t = torch.arange(4000, dtype=torch.float64)
    slow, fast = (torch.sin(2 * math.pi * f * t)[:, None] for f in (0.01, 0.2))
    assert dynamics.spectral_distance(slow, 3 * slow.roll(7, 0) + 2) < 0.01  # blind to phase, scale and offset
    assert dynamics.spectral_distance(slow, fast) > 0.999
    assert dynamics.spectral_distance(slow, torch.ones_like(slow)) == 1
    assert dynamics.spectral_distance(slow, slow / 0 * math.inf) == 1
    p = dynamics.power_spectrum(torch.randn(512, 2, generator=torch.Generator().manual_seed(0)), 3.0)
    assert_same(p.sum(0), torch.ones(2, dtype=p.dtype))


def lorenz_like() -> dynamics.DynamicsRNN:
    torch.manual_seed(0)
    model = dynamics.DynamicsRNN(3, 8, 2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("teacher", ["sparse", "generalized"])
def test_forcing_is_the_recipe_of_the_paper(teacher):
    model, x = lorenz_like(), torch.randn(2, 9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    strength = dynamics.forcing(teacher, 9, 4, 0.3).double()
    z, rows = torch.cat((x[:, 0], x[:, 0] @ model.L.mT), 1), []
    for t in range(9):
        if teacher == "sparse" and t % 4 == 0:
            z = torch.cat((x[:, t], z[:, 3:]), 1)
        elif teacher == "generalized":
            z = torch.cat((0.7 * z[:, :3] + 0.3 * x[:, t], z[:, 3:]), 1)
        z = z * model.A + torch.cat((z[:, :6], z[:, 6:].relu()), 1) @ model.W.mT + model.h
        rows.append(z[:, :3])
    assert_same(model(x, strength), torch.stack(rows, 1), 1e-6)  # the strength 0.3 is in fp32


def test_a_free_run_is_the_unforced_model_and_its_words_and_exponent():
    model = lorenz_like()
    with torch.no_grad():
        model.A.mul_(0.3), model.W.mul_(0.3)
    x = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)
    states = model.run(x, 12)
    assert_same(states[None, :, :3], model(x.expand(1, 12, 3), torch.zeros(12, dtype=x.dtype)))
    assert model.words(states).tolist() == [int(z[6] > 0) + 2 * int(z[7] > 0) for z in states]
    with torch.no_grad():  # linear and diagonal: the largest exponent is the logarithm of the largest factor
        model.W.zero_()
        model.A.copy_(torch.linspace(0.1, 0.9, 8))
    assert model.lyapunov(model.run(x, 400), skip=300) == pytest.approx(math.log(0.9), abs=1e-6)


def test_reconstruct_learns_is_deterministic_and_leaves_the_global_generator_alone():
    series = dynamics.standardize(dynamics.lorenz63(3000))
    options = dict(window=16, batch=8, epochs=10, batches=10, run=400, transient=50, units=8, rates=(2e-2, 1e-2))
    before = torch.get_rng_state()
    result, again = (dynamics.reconstruct(series, **options) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert result.losses == again.losses and result.measures == again.measures and torch.equal(result.states, again.states)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert result.generated.shape == (400, 3) and set(result.measures) >= {"D_stsp", "D_H", "lyapunov", "regions"}
    assert dynamics.reconstruct(series, **options, seed=1).losses != result.losses


@pytest.mark.parametrize(
    "changes,argument",
    [({"teacher": "full"}, "teacher"), ({"series_TN": torch.zeros(20, 3)}, "series_TN"), ({"relu_units": 19}, "relu_units")],
)
def test_bad_arguments_of_reconstruct_are_refused_by_name(changes, argument):
    with pytest.raises(ValueError, match=f"'{argument}'.*got"):
        dynamics.reconstruct(**({"series_TN": torch.zeros(300, 3)} | changes))
