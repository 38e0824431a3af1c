"""Delta-rule mixers against their formulas, token by token in fp64, and what the delta rule computes in closed form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formula_cases import input_fixture, perturbed
from torch import Tensor

from linnet.mixers import Context, build_mixer

T, D, H = 11, 16, 2
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make(name: str, **options):
    return perturbed(name, D, H, **options)


x = input_fixture(T, D)


def unit(y: Tensor) -> Tensor:
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolved(m, x: Tensor, *names: str) -> list[Tensor]:
    """SiLU of the causal convolution of each projection [T, channels]."""
    y = torch.cat([getattr(m, name)(x) for name in names], -1)
    padded = torch.cat((torch.zeros(3, y.shape[1], dtype=x.dtype), y))
    y = F.silu(sum(padded[w : w + T] * m.conv.weight[:, w] for w in range(4)))
    return y.split([getattr(m, name).out_features for name in names], -1)


def heads(y: Tensor, count: int = H) -> Tensor:
    """[T, heads * channels] -> [T, heads, channels]"""
    return y.unflatten(-1, (count, -1))


def gated(m, x: Tensor, o_THV: Tensor, activation=F.silu) -> Tensor:
    o = o_THV / (o_THV.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.o_norm.weight
    return m.o_proj((o * activation(heads(m.g_proj(x), o.shape[1]))).flatten(1))


def head_decay(projection, A_log: Tensor, dt_bias: Tensor, x: Tensor) -> Tensor:
    """alpha [T, H] = exp(-A softplus(x W + dt))"""
    return torch.exp(-A_log.exp() * F.softplus(projection(x) + dt_bias))


def channel_decay(m, x: Tensor) -> Tensor:
    """alpha [T, H, K] of kda's softplus gate."""
    return torch.exp(-m.A_log.exp()[:, None] * F.softplus(heads(m.f_proj(x), m.A_log.shape[0]) + m.dt_bias))


def recur(transition_THKK: Tensor, k_THK: Tensor, u_THV: Tensor, q_THK: Tensor) -> Tensor:
    """S_t = M_t S_{t-1} + k_t u_t^T;  o_t = S_t^T q_t / sqrt(K), one matrix per head and token."""
    S, out = torch.zeros(*k_THK.shape[1:], u_THV.shape[2], dtype=k_THK.dtype), []
    for M, k, u, q in zip(transition_THKK, k_THK, u_THV, q_THK, strict=True):
        S = M @ S + k[:, :, None] * u[:, None, :]
        out.append(torch.einsum("hk,hkv->hv", q, S) / math.sqrt(q.shape[-1]))
    return torch.stack(out)


def outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def eye_like(k_THK: Tensor) -> Tensor:
    return torch.eye(k_THK.shape[-1], dtype=k_THK.dtype)


def assert_mixer(m, x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(m(x[None])[0][0], expected, **EXACT)


# ---- formulas ------------------------------------------------------------------------------------------------------------


def test_gated_deltanet2(x):
    m = make("gated_deltanet2")
    q, k, v = (heads(y) for y in convolved(m, x, "q_proj", "k_proj", "v_proj"))
    q, k, b, w = unit(q), unit(k), heads(torch.sigmoid(m.b_proj(x))), heads(torch.sigmoid(m.w_proj(x)))
    M = (eye_like(k) - outer(k, b * k)) @ torch.diag_embed(channel_decay(m, x))
    assert_mixer(m, x, gated(m, x, recur(M, k, w * v, q), torch.sigmoid))


def test_gated_deltanet2_with_one_gate_per_head_is_kda(x):
    kda, m = make("kda"), make("gated_deltanet2")
    shared = {name: value for name, value in kda.state_dict().items() if name != "b_proj.weight"}
    m.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for projection in (m.b_proj, m.w_proj):
            projection.weight.copy_(kda.b_proj.weight.repeat_interleave(D // H, 0))
    assert_mixer(m, x, kda(x[None])[0][0])


def test_kaczmarz(x):
    m = make("kaczmarz")
    q, k, v = (heads(y) for y in convolved(m, x, "q_proj", "k_proj", "v_proj"))
    beta = (torch.sigmoid(m.b_proj(x)) / (k.square().sum(-1) + 1e-4))[..., None]
    alpha = head_decay(m.a_proj, m.A_log, m.dt_bias, x)[..., None, None]
    M = alpha * (eye_like(k) - outer(beta * k, k))
    assert_mixer(m, x, gated(m, x, recur(M, k, beta * v, unit(q))))


@pytest.mark.parametrize("feedback", [True, False])
def test_comba(x, feedback):
    m = make("comba", output_feedback=feedback)
    q, k, v = (heads(y) for y in convolved(m, x, "q_proj", "k_proj", "v_proj"))
    q, k, beta = unit(q), unit(k), torch.sigmoid(m.b_proj(x))[..., None]
    p = torch.sigmoid(m.delta)[:, None] * k
    M = head_decay(m.a_proj, m.A_log, m.dt_bias, x)[..., None, None] * eye_like(k) - outer(beta * k, p)
    q = q - m.D[:, None] * p if feedback else q
    assert_mixer(m, x, gated(m, x, recur(M, k, beta * v, q), torch.sigmoid))


def test_the_inner_decay_of_comba_does_not_cancel(x):
    m = make("comba", output_feedback=False)
    m(x[None])[0].square().sum().backward()
    assert bool((m.delta.grad.abs() > 1e-6).all())


@pytest.mark.parametrize("name", ["deltaproduct", "gated_deltaproduct"])
def test_deltaproduct_is_a_product_of_householder_steps(x, name):
    m, n = make(name, householder_steps=3), 3
    q, k, v = convolved(m, x, "q_proj", "k_proj", "v_proj")
    q = unit(heads(q))
    k, v = unit(k.unflatten(-1, (n, H, -1))), v.unflatten(-1, (n, H, -1))
    beta = 2 * torch.sigmoid(m.b_proj(x)).unflatten(-1, (n, H))[..., None]
    alpha = head_decay(m.a_proj, m.A_log, m.dt_bias, x)[..., None] if name == "gated_deltaproduct" else torch.ones(T, H, 1)
    S, o = torch.zeros(H, *(y.shape[-1] for y in (k, v)), dtype=x.dtype), []
    for t in range(T):
        S = alpha[t, :, :, None] * S
        for j in range(n):
            S = (eye_like(k) - outer(beta[t, j] * k[t, j], k[t, j])) @ S + outer(beta[t, j] * k[t, j], v[t, j])
        o.append(torch.einsum("hk,hkv->hv", q[t], S) / math.sqrt(q.shape[-1]))
    assert_mixer(m, x, gated(m, x, torch.stack(o)))


@pytest.mark.parametrize("forgetting", ["none", "constant", "head", "token"])
@pytest.mark.parametrize("decay,bound", [("none", None), ("head", 2.0)])
def test_osdn(x, forgetting, decay, bound):
    m = make("osdn", forgetting=forgetting, decay=decay, precondition_max=bound, gate=True, rate=0.7)
    q, k, v = (heads(y) for y in convolved(m, x, "q_proj", "k_proj", "v_proj"))
    q, k, beta = unit(q), unit(k), torch.sigmoid(m.b_proj(x))[..., None]
    gamma = {"none": lambda: torch.ones(T, H), "constant": lambda: torch.full((T, H), 0.999, dtype=x.dtype)}
    gamma |= {"head": lambda: torch.sigmoid(m.keep_logit).expand(T, H), "token": lambda: torch.sigmoid(m.keep_proj(x))}
    d, used = m.d_init, []
    for t, keep in enumerate(gamma[forgetting]()):
        used.append(d.clamp(0, bound))
        d = keep[:, None] * d + 0.7 * (1 - (d * k[t] ** 2).sum(-1, keepdim=True)) * k[t] ** 2
    p = torch.stack(used) * k
    alpha = head_decay(m.a_proj, m.A_log, m.dt_bias, x) if decay == "head" else torch.ones(T, H, dtype=x.dtype)
    M = alpha[..., None, None] * (eye_like(k) - outer(beta * p, k))
    assert_mixer(m, x, gated(m, x, recur(M, p, beta * v, q)))
    state = m(x[None], context=Context(return_state=True))[1]
    torch.testing.assert_close(state[m.state_spec().names.index("d")][0], d, **EXACT)


def test_the_preconditioner_of_osdn_descends_to_ones():
    """Without forgetting |d - 1| never grows, because unit keys have sum(k^2) = 1."""
    m = build_mixer("osdn", D, H, forgetting="none").double()
    k = F.normalize(torch.randn(1, 200, H, D // H, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
    with torch.no_grad():
        d, last = m.preconditioner(torch.zeros(1, 200, D, dtype=torch.float64), k, None, Context(return_state=True))
    distance = torch.cat((d[0], last)).sub(1).norm(dim=-1)
    assert bool((distance.diff(dim=0) <= 1e-12).all()) and bool((distance[-1] < 0.5 * distance[0]).all())
    assert float(d[0, 0].abs().max()) == 0


def test_preconditioned_deltanet(x):
    m = make("preconditioned_deltanet")
    q, k, v = (heads(y) for y in convolved(m, x, "q_proj", "k_proj", "v_proj"))
    q, k, beta = unit(q), unit(k), torch.sigmoid(m.b_proj(x))[..., None]
    a, c = head_decay(m.use_a_proj, m.use_A_log, m.use_dt_bias, x), torch.sigmoid(m.use_b_proj(x))
    A, use = torch.zeros(H, k.shape[-1], dtype=x.dtype), []
    for t in range(T):
        A = a[t, :, None] * A + c[t, :, None] * k[t] ** 2
        use.append(A)
    r = torch.log(torch.stack(use) + 1e-6) - m.center[:, None]
    scale = 1.5 ** (-r / (1 + r.abs()))
    assert bool((scale > 1 / 1.5).all() and (scale < 1.5).all() and (scale < 1).any() and (scale > 1).any())
    alpha = head_decay(m.a_proj, m.A_log, m.dt_bias, x)[..., None, None]
    p = scale * k
    assert_mixer(m, x, gated(m, x, recur(alpha * (eye_like(k) - outer(beta * p, k)), p, beta * v, q)))


@pytest.mark.parametrize("tied", [True, False])
def test_dplr(x, tied):
    m = make("dplr", tied=tied)
    q, k, v, *addresses = (heads(y) for y in convolved(m, x, *m.inputs))
    q, k, (e, f) = unit(q), unit(k), (unit(addresses[0]), unit(addresses[-1]))
    beta, w = (torch.sigmoid(p(x))[..., None] for p in (m.b_proj, m.w_proj))
    M = (eye_like(k) - outer(beta * f, e)) @ torch.diag_embed(channel_decay(m, x))
    assert_mixer(m, x, gated(m, x, recur(M, k, w * v, q), torch.sigmoid))


@pytest.mark.parametrize("name", ["gated_deltanet", "comba", "kaczmarz"])
def test_value_heads_share_their_key_head(x, name):
    """A grouped layer equals one with every key head repeated."""
    grouped, full = make(name, value_heads=2 * H, head_dim=4), build_mixer(name, D, 2 * H, head_dim=4).double()
    state = grouped.state_dict()
    for key in ("q_proj.weight", "k_proj.weight"):
        state[key] = state[key].unflatten(0, (H, -1)).repeat_interleave(2, 0).flatten(0, 1)
    q, k, v = state["conv.weight"].split([H * 4, H * 4, 2 * H * 8])
    q, k = (y.unflatten(0, (H, -1)).repeat_interleave(2, 0).flatten(0, 1) for y in (q, k))
    full.load_state_dict(state | {"conv.weight": torch.cat((q, k, v))})
    assert_mixer(grouped, x, full(x[None])[0][0])


def regression(m, x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, beta, lambda of a layer that solves for its memory."""
    q, k = (unit(heads(y)) for y in convolved(m, x, "q_proj", "k_proj"))
    return q, k, heads(m.v_proj(x)), torch.sigmoid(m.b_proj(x)), 0.25 + F.softplus(m.ridge)


def normed(m, o_THV: Tensor) -> Tensor:
    return m.o_proj((o_THV / (o_THV.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.o_norm.weight).flatten(1))


def mesa_formula(m, x: Tensor) -> Tensor:
    (q, k, v, beta, ridge), gamma, o = regression(m, x), torch.sigmoid(m.a_proj(x)), []
    Gram, Z = torch.zeros(H, 8, 8, dtype=x.dtype), torch.zeros(H, 8, 8, dtype=x.dtype)
    for t in range(T):
        Gram = gamma[t, :, None, None] * Gram + outer(beta[t, :, None] * k[t], k[t])
        Z = gamma[t, :, None, None] * Z + outer(beta[t, :, None] * k[t], v[t])
        o.append(torch.einsum("hkv,hk->hv", Z, torch.linalg.solve(Gram + torch.diag_embed(ridge), q[t])))
    return normed(m, torch.stack(o))


def test_mesa(x):
    m = make("mesa", cg_steps=30)
    assert_mixer(m, x, mesa_formula(m, x))


def test_conjugate_gradients_end_after_as_many_steps_as_key_channels(x):
    error = []
    for steps in (1, 2, 4, 8):
        m = make("mesa", cg_steps=steps)
        exact = mesa_formula(m, x)
        error.append(float(((m(x[None])[0][0] - exact).norm() / exact.norm()).detach()))
    assert error == sorted(error, reverse=True) and error[2] > 1e-6 and error[3] < 1e-12


def test_the_implicit_gradients_of_mesa_are_those_of_the_dense_solve(x):
    m, weight = make("mesa", cg_steps=30), torch.randn(T, D, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *m.parameters()]
    actual = torch.autograd.grad((m(leaf[None])[0][0] * weight).sum(), wanted)
    expected = torch.autograd.grad((mesa_formula(m, leaf) * weight).sum(), wanted)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_rls_is_ridge_regression_at_every_token(x, keep):
    """S_t minimises sum_i keep^{t-i} beta_i |S^T k_i - v_i|^2 + keep^t S^T Diag(lambda) S."""
    m = make("rls", cg_steps=40, keep=keep)
    q, k, v, beta, ridge = regression(m, x)
    o = []
    for t in range(T):
        w = (beta[: t + 1] * keep ** (t - torch.arange(t + 1.0, dtype=x.dtype))[:, None]).T[..., None]  # [H, t+1, 1]
        K, V = k[: t + 1].transpose(0, 1), v[: t + 1].transpose(0, 1)
        S = torch.linalg.solve(K.mT @ (w * K) + keep ** (t + 1) * torch.diag_embed(ridge), K.mT @ (w * V))
        o.append(torch.einsum("hk,hkv->hv", q[t], S) / math.sqrt(8))
    assert_mixer(m, x, normed(m, torch.stack(o)))
    state = m(x[None], context=Context(return_state=True))[1]
    torch.testing.assert_close(state[m.state_spec().names.index("S")][0], S, **EXACT)


def test_rls_and_mesa_without_forgetting_read_the_same(x):
    rls, mesa = make("rls", cg_steps=40), make("mesa", cg_steps=40)
    mesa.load_state_dict(rls.state_dict(), strict=False)
    with torch.no_grad():
        mesa.a_proj.weight.zero_()
        mesa.a_proj.bias.fill_(60.0)
    mesa.o_norm.eps, rls.o_norm.eps = 1e-5, 1e-5 / 8  # the norm divides out the scale of the read but for its eps
    assert_mixer(rls, x, mesa(x[None])[0][0])


# ---- closed forms; those of the operators are in linnet/evals/exact.py ---------------------------------------------------


def test_the_kaczmarz_mixer_recalls_what_it_was_told():
    m = build_mixer("kaczmarz", D, H, conv_size=None, gate=False, key_eps=1e-12).double()
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 9, H, size, dtype=torch.float64, generator=generator) for size in (8, 16))
    m.gates = lambda x: {"erase": torch.ones(1, 9, H, dtype=torch.float64)}  # eta = 1, no decay
    o, (S,) = m.mix(torch.zeros(1, 9, D), k, k, v, [None], Context(return_state=True))
    torch.testing.assert_close(o * 8**0.5, v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.einsum("bhk,bhkv->bhv", k[:, -1], S), v[:, -1], rtol=1e-9, atol=1e-9)
