"""Time-invariant and state-space mixers against their papers' formulas, closed forms and scipy.signal, in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import signal
from torch import Tensor

from linnet.mixers import Context, _ssm, build_mixer

T, D = 100, 6


def make(name: str, **options):
    torch.manual_seed(0)
    return build_mixer(name, D, 2, **options).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-10) -> None:
    expected = torch.tensor(expected) if isinstance(expected, np.ndarray) else expected.detach()
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance)


def test_hippo_legs_matrix():
    A, B = _ssm.hippo_legs(3)
    expected = [[-1, 0, 0], [-math.sqrt(3), -2, 0], [-math.sqrt(5), -math.sqrt(15), -3]]
    assert_same(A, torch.tensor(expected, dtype=torch.float64), 1e-15)
    assert_same(B, torch.tensor([1, math.sqrt(3), math.sqrt(5)], dtype=torch.float64), 1e-15)


def test_hippo_legs_keeps_the_legendre_coefficients_of_the_past():
    """For x' = (A x + B u) / t the state is the projection of u on the Legendre polynomials of [0, t] (Gu et al. 2020)."""
    A, B = (m.numpy() for m in _ssm.hippo_legs(6))
    powers = np.array([0.3, -1.0, 2.0])  # u(s) = 0.3 - s + 2 s^2

    def projection(t):
        nodes, weights = np.polynomial.legendre.leggauss(20)
        u = np.polynomial.polynomial.polyval((nodes + 1) * t / 2, powers)
        return np.array(
            [math.sqrt(2 * n + 1) * (weights * u * np.polynomial.legendre.legval(nodes, np.eye(6)[n])).sum() / 2 for n in range(6)]
        )

    t, h = 2.0, 1e-5
    slope = (projection(t + h) - projection(t - h)) / (2 * h)
    u = np.polynomial.polynomial.polyval(t, powers)
    np.testing.assert_allclose(slope, (A @ projection(t) + B * u) / t, rtol=1e-8, atol=1e-8)


def test_legs_frequencies_are_the_eigenvalues_of_the_normal_part():
    A, _ = _ssm.hippo_legs(8)
    P = (torch.arange(8, dtype=torch.float64) + 0.5).sqrt()
    values = torch.linalg.eigvals(A + P[:, None] * P)
    assert_same(values.real, torch.full((8,), -0.5, dtype=torch.float64))
    assert_same(_ssm.legs_frequencies(4), values.imag.sort().values[4:])


@pytest.mark.parametrize("method,name", [("bilinear", "bilinear"), ("backward", "backward_diff"), ("zoh", "zoh")])
def test_dense_discretisation_is_scipy_s(method, name):
    A, B = _ssm.hippo_legs(8)
    delta = torch.tensor([0.01, 0.2], dtype=torch.float64)
    Abar, Bbar = _ssm.discretize_dense(A, B, delta, method)
    for d, dt in enumerate(delta.tolist()):
        expected = signal.cont2discrete((A.numpy(), B[:, None].numpy(), np.zeros((1, 8)), 0), dt, method=name)
        assert_same(Abar[d], expected[0])
        assert_same(Bbar[d], expected[1])


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_diagonal_discretisation_is_scipy_s(method):
    A = torch.tensor([-0.5 + 3j, -1 - 1j], dtype=torch.complex128)
    log_a, gain = _ssm.discretize(A, torch.tensor(0.2, dtype=torch.float64), method)
    expected = signal.cont2discrete((np.diag(A.numpy()), np.ones((2, 1)), np.zeros((1, 2)), 0), 0.2, method=method)
    assert_same(log_a.exp(), np.diag(expected[0]))
    assert_same(gain, expected[1][:, 0])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("lags", [1, 2, 17, 100])
def test_exponential_kernel(shared, lags):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.complex128, generator=rng)
    log_a = torch.complex(-torch.rand(3, 4, generator=rng), torch.randn(3, 4, generator=rng)).to(torch.complex128)
    log_a = log_a[:1] if shared else log_a
    expected = (weight[..., None] * (log_a[..., None] * torch.arange(lags)).exp()).sum(1).real
    assert_same(_ssm.exponential_kernel(weight, log_a, lags), expected, 1e-12)


@pytest.mark.parametrize("mode", ["auto", "recurrent"])
@pytest.mark.parametrize("options", [{}, {"discretization": "bilinear", "init": "legs"}, {"init": "real"}])
def test_s4d_is_a_sum_of_first_order_filters(x, mode, options):
    m = make("s4d", d_state=8, mode=mode, **options)
    real = options.get("init") == "real"
    A = -m.log_A_real.exp() + (0 if real else 1j * m.A_imag)
    C = m.C if real else 2 * torch.view_as_complex(m.C)
    delta, y = m.log_dt.exp(), torch.empty_like(x)
    for d in range(D):
        system = (torch.diag(A[d]).detach().numpy(), np.ones((A.shape[1], 1)), C[d, None].detach().numpy(), 0)
        a, b, *_ = signal.cont2discrete(system, delta[d].item(), method=options.get("discretization", "zoh"))
        parts = [signal.lfilter([system[2][0, n] * b[n, 0]], [1, -a[n, n]], x[:, d].numpy()) for n in range(A.shape[1])]
        y[:, d] = torch.as_tensor(sum(parts).real) + m.D[d].detach() * x[:, d]
    assert_same(m(x[None])[0][0], F.glu(m.out_proj(F.gelu(y))))


def test_s4d_initial_eigenvalues():
    n = torch.arange(4, dtype=torch.float64)
    assert_same(make("s4d", d_state=8).A_imag[0], math.pi * n, 1e-6)
    assert_same(make("s4d", d_state=8, init="inv").A_imag[0], 8 / math.pi * (8 / (2 * n + 1) - 1), 1e-6)
    assert_same(make("s4d", d_state=4, init="real").log_A_real[0].exp(), n + 1, 1e-6)
    delta = make("s4d").log_dt.detach().exp()
    assert 1e-3 <= float(delta.min()) and float(delta.max()) <= 0.1


@pytest.mark.parametrize("mode", ["auto", "recurrent"])
def test_dlr_with_roots_of_unity_shifts_by_any_number_of_tokens(x, mode):
    """Lambda_n = e^(2 pi i n / N), W_n = e^(-2 pi i n s / N) / N: K_l = 1 where l = s modulo N, else 0."""
    N, shifts = 128, torch.tensor([0, 1, 7, 64, 99, 127])
    m = make("dlr", d_state=N, mode=mode)
    n = torch.arange(N, dtype=torch.float64)
    with torch.no_grad():
        m.rho.zero_(), m.D.zero_()
        m.omega.copy_(2 * math.pi * n / N)
        m.W[0].copy_(torch.view_as_real(torch.polar(torch.ones(D, N).double() / N, -m.omega * shifts[:, None])))
    shifted = torch.stack([F.pad(x[:, d], (int(s), 0))[:T] for d, s in enumerate(shifts)], 1)
    assert_same(m(x[None])[0][0], m.out_proj(F.gelu(shifted)))


@pytest.mark.parametrize("kernel", ["real", "imag", "sum"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dlr_kernels(x, kernel, bidirectional):
    m = make("dlr", d_state=5, kernel=kernel, bidirectional=bidirectional)
    powers = ((-m.rho.square() + 1j * m.omega)[:, None] * torch.arange(T)).exp()
    K = torch.view_as_complex(m.W) @ powers  # [1 or 2, D, T]
    K = {"real": K.real, "imag": K.imag, "sum": K.real + K.imag}[kernel]
    lag = torch.arange(T)[:, None] - torch.arange(T)
    M = torch.where(lag >= 0, K[0][:, lag.clamp_min(0)], 0)
    if bidirectional:
        M = M + torch.where(lag < 0, K[1][:, (-lag - 1).clamp_min(0)], 0)
    y = torch.einsum("dts,sd->td", M, x) + m.D * x
    assert_same(m(x[None])[0][0], m.out_proj(F.gelu(y)))
    if bidirectional:
        assert not m.causal
        with pytest.raises(ValueError, match="dlr: option 'bidirectional' must be False where a state"):
            m(x[None], context=Context(return_state=True))


def test_lru_is_its_recurrence(x):
    m = make("lru", d_state=4, radius=(0.5, 0.99))
    lam = (-m.nu_log.exp() + 1j * m.theta_log.exp()).exp()
    B, C = torch.complex(*m.B.weight.chunk(2, 0)), torch.complex(*m.C.weight.chunk(2, 1))
    h, rows = torch.zeros(4, dtype=torch.complex128), []
    for u in x:
        h = lam * h + m.gamma_log.exp() * (B @ u.to(h.dtype))
        rows.append((C @ h).real + m.D * u)
    assert_same(m(x[None])[0][0], F.glu(m.out_proj(F.gelu(torch.stack(rows)))))


def test_lru_starts_on_the_ring_with_unit_gain():
    m = make("lru", d_state=500, radius=(0.8, 0.95))
    modulus = (-m.nu_log.detach().exp()).exp()
    assert 0.8 - 1e-6 <= float(modulus.min()) and float(modulus.max()) <= 0.95 + 1e-6
    assert_same(m.gamma_log.exp().square() + modulus.square(), torch.ones(500, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("mode", ["auto", "recurrent"])
@pytest.mark.parametrize("options", [{}, {"discretization": "zoh", "channels": 2}])
def test_lssl_is_scipy_s_simulation(x, mode, options):
    m = make("lssl", d_state=8, mode=mode, **options)
    A, B = (p.numpy() for p in _ssm.hippo_legs(8))
    parts = []
    for d in range(D):
        dt = m.log_dt[d].exp().item()
        c, e = m.C[d].detach().numpy(), m.D[d, :, None].detach().numpy()
        a, b, *_ = signal.cont2discrete((A, B[:, None], c, e), dt, method=options.get("discretization", "bilinear"))
        # The papers keep C and D; scipy reads the state before the step, the layer after it: y_t = C (A x + B u_t) + D u_t
        parts.append(signal.dlsim((a, b, c @ a, c @ b + e, 1.0), x[:, d].numpy())[1])
    y = torch.as_tensor(np.concatenate(parts, 1))
    assert_same(m(x[None])[0][0], m.out_proj(F.gelu(y)))


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("coefficients", ["vector", "scalar"])
def test_fsmn_is_its_formula(x, lookahead, coefficients):
    m = make("fsmn", lookback=3, lookback_stride=2, lookahead=lookahead, lookahead_stride=3, coefficients=coefficients)
    p = m.down(F.relu(m.up(x)))
    at = lambda t: p[t] if 0 <= t < T else torch.zeros_like(p[0])
    rows = []
    for t in range(T):
        y = p[t] + sum(m.past[:, i] * at(t - 2 * i) for i in range(4))
        rows.append(y + sum(m.future[:, j - 1] * at(t + 3 * j) for j in range(1, lookahead + 1)))
    assert_same(m(x[None])[0][0], torch.stack(rows))
    assert m.causal == (lookahead == 0)
    if lookahead:
        with pytest.raises(ValueError, match="fsmn: option 'lookahead' must be 0 where a state"):
            m(x[None], context=Context(return_state=True))


@pytest.mark.parametrize("name,options", [("s4d", {"d_state": 8}), ("dlr", {"d_state": 8}), ("lssl", {"d_state": 8})])
@pytest.mark.parametrize("packed", [False, True])
def test_the_convolution_is_the_recurrence_with_its_gradients(x, name, options, packed, monkeypatch):
    monkeypatch.setattr(_ssm, "SCAN_ELEMENTS", D * 8 * 30)  # several blocks of time
    cu = torch.tensor([0, 3, 3, 80, T], dtype=torch.int32) if packed else None
    weight, results = torch.randn_like(x), []
    for mode in ("auto", "recurrent"):
        m, leaf = make(name, mode=mode, **options), x[None].clone().requires_grad_()
        y, _ = m(leaf, context=Context(cu_seqlens=cu))
        results.append([y, *torch.autograd.grad((y * weight).sum(), [leaf, *m.parameters()])])
    for convolution, recurrence in zip(*results, strict=True):
        assert_same(convolution, recurrence, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name,options", [("s4d", {}), ("dlr", {}), ("lru", {}), ("lssl", {}), ("fsmn", {})])
@torch.no_grad()
def test_64k_tokens_in_fp32_stay_near_double(name, options):
    m, x = make(name, **options), torch.randn(1, 65536, D)
    exact = m(x.double())[0]
    y = m.float()(x)[0].double()
    at = torch.linspace(0, 65535, 16).long()
    assert bool(y.isfinite().all())
    assert float((y - exact)[:, at].norm() / exact[:, at].norm()) < 1e-3


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("decay", ["heavy_tail", "softplus"])
def test_mamba3_is_the_trapezoidal_recurrence(x, rank, decay):
    """Token by token, with complex keys in place of rotations (SISO) and all angles summed from the start."""
    m, x = make("mamba3", d_state=8, rank=rank, decay=decay), x[:20]
    H, K, V, A = 2, 8, D, 2
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    z, v, B, C, dt, a, trap, theta = m.in_proj(x).split(m.widths, -1)
    delta, lam = F.softplus(dt + m.dt_bias), torch.sigmoid(trap)
    f = F.softplus(a) if decay == "softplus" else torch.where(a >= 0, 1 + a, 1 / (1 - a))
    alpha = (-f.clamp_min(1e-4) * delta).exp()
    phi = (math.pi * torch.tanh(theta)[:, None] * delta[..., None]).cumsum(0)  # [T, H, A]

    def keys(p, weight, bias):  # [T, H, R, K]
        p = p.unflatten(-1, (rank, K))
        p = (weight * p / (p.square().mean(-1, keepdim=True) + 1e-5).sqrt())[:, None] + bias
        turn = torch.cat((torch.exp(1j * phi), torch.ones(20, H, K // 2 - A)), -1)[:, :, None]
        if rank == 1:
            return torch.view_as_real(torch.view_as_complex(p.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
        p = torch.complex(p[..., : K // 2].contiguous(), p[..., K // 2 :].contiguous()) * turn
        return torch.cat((p.real, p.imag), -1)

    k, q = keys(B, m.B_norm.weight, m.B_bias), keys(C, m.C_norm.weight, m.C_bias)
    M_x, M_z, M_o = (m.M_x, m.M_z, m.M_o) if rank > 1 else (torch.ones(H, 1, V).double(),) * 3
    v, z = (p.unflatten(-1, (H, 1, V)) for p in (v, z))
    v, z = v * M_x, z * M_z
    S, rows = torch.zeros(H, K, V).double(), []
    for t in range(20):
        S = alpha[t][:, None, None] * S
        if t:
            S = S + ((1 - lam[t]) * delta[t] * alpha[t])[:, None, None] * (k[t - 1].mT @ v[t - 1])
        S = S + (lam[t] * delta[t])[:, None, None] * (k[t].mT @ v[t])
        y = (q[t] @ S + m.D[:, None, None] * v[t]) * F.silu(z[t])
        rows.append((M_o * y).sum(1).flatten())
    assert_same(m(x[None])[0][0], m.out_proj(torch.stack(rows)))


def test_mamba_with_negative_eigenvalues(x):
    m, x = make("mamba", d_state=4, allow_neg_eigval=True), x[:20]
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.5 * torch.randn_like(p))
        m.dt_proj.bias.add_(3)
    u, z = m.in_proj(x).chunk(2, -1)
    u = F.silu(F.conv1d(F.pad(u.mT, (3, 0)), m.conv.weight[:, None], m.conv.bias, groups=12).mT)
    dt, B, C = m.x_proj(u).split((1, 4, 4), -1)
    delta, A = F.softplus(m.dt_proj(dt)), -m.A_log.exp()
    h, rows = torch.zeros_like(A), []
    for t in range(20):
        factor = 2 * (delta[t, :, None] * A).exp() - 1
        h = factor * h + (delta[t] * u[t])[:, None] * B[t]
        rows.append((h * C[t]).sum(-1) + m.D * u[t])
    assert bool((factor < -0.2).any())
    assert_same(m(x[None])[0][0], m.out_proj(torch.stack(rows) * F.silu(z)))


def test_slstm_is_the_unstabilised_recurrence(x):
    """Exponential gates without the running maximum: exp(i), sigmoid(f), the same ratio C / n."""
    m, x = make("slstm"), x[:20]
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.5 * torch.randn_like(p))
    conv = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), m.conv.weight[:, None], m.conv.bias, groups=D).mT)
    h = C = n = torch.zeros(2, 3, dtype=torch.float64)
    rows = []
    for t in range(20):
        inputs = (conv[t], conv[t], x[t], x[t])
        parts = [
            torch.einsum("hk,hkl->hl", y.unflatten(0, (2, 3)), m.W[:, :, g])
            + torch.einsum("hk,hkl->hl", h, m.R[:, :, g])
            + m.bias[:, g]
            for g, y in enumerate(inputs)
        ]
        C = torch.sigmoid(parts[1]) * C + parts[0].exp() * torch.tanh(parts[2])
        n = torch.sigmoid(parts[1]) * n + parts[0].exp()
        h = torch.sigmoid(parts[3]) * C / n
        rows.append(((h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()).flatten())
    assert_same(m(x[None])[0][0], torch.stack(rows) * m.norm_weight)
