"""Bidirectional mixers, long convolutions with learned kernels and the order-n exponential against their formulas, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formula_cases import input_fixture, perturbed
from torch import Tensor

from linnet.feature_maps import taylor_features, taylor_size
from linnet.mixers import Context, _grid, build_mixer, rpe_kernel

T, D, H = 12, 8, 2


def make(name: str, **options):
    return perturbed(name, D, H, **options)


x = input_fixture(T, D)


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def heads(x: Tensor, count: int = H) -> Tensor:
    return x.unflatten(-1, (count, -1))


def visible(causal: bool) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)


# ---- Performer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_bidirectional_performer(x, kernel):
    mixer = make("performer", kernel=kernel, bidirectional=True, num_features=6)
    q, k, v = (heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    w, eps = mixer.omega_FK, mixer.config.feature_eps

    def phi(y):
        y = y * y.shape[-1] ** -0.25
        u = y @ w.T
        if kernel == "relu":
            return F.relu(u) + eps
        u = u - y.square().sum(-1, keepdim=True) / 2
        return u.exp() + eps * u.amax(-1, keepdim=True).exp()  # eps stands beside the largest feature of a token

    A = torch.einsum("thf,shf->hts", phi(q), phi(k))
    o = torch.einsum("hts,shv->thv", A / A.sum(-1, keepdim=True), v)
    assert_same(mixer(x[None])[0][0], mixer.o_proj(o.flatten(1)))


# ---- softmax as a recurrent network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order,lowest", [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (4, 2), (7, 3)])
def test_taylor_features_are_the_polynomial(order, lowest):
    q, k = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = (q * k).sum(-1) / math.sqrt(3)
    expected = sum(s**n / math.factorial(n) for n in range(lowest, order + 1))
    a, b = taylor_features(q, order, lowest), taylor_features(k, order, lowest)
    assert a.shape[-1] == taylor_size(3, order, lowest) == sum(math.comb(n + 2, 2) for n in range(lowest, order + 1))
    assert_same((a * b).sum(-1), expected, 1e-13)


def softmax_rnn_loop(mixer, x: Tensor) -> Tensor:
    """The sum over past tokens, term by term."""
    c = mixer.config
    q, k, v = heads(mixer.q_proj(x)), heads(mixer.k_proj(x), c.groups), heads(mixer.v_proj(x), c.groups)
    if c.position == "rope":
        angle = torch.arange(T).double()[:, None] * c.rope_theta ** -(torch.arange(0, c.key_size, 2).double() / c.key_size)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]

        def rope(y):
            half = c.key_size // 2
            z = torch.complex(y[..., :half], y[..., half:]) * turn
            return torch.cat((z.real, z.imag), -1)

        q, k = rope(q), rope(k)
    if mixer.v_gate is not None:
        v = v * torch.sigmoid(mixer.v_gate(x))[..., None]
    rows = []
    for t in range(T):
        for h in range(c.heads):
            g = h // (c.heads // c.groups)
            num, den = torch.zeros_like(v[0, 0]), torch.zeros((), dtype=torch.float64)
            for s in range(t + 1):
                score = (q[t, h] @ k[s, g]) / math.sqrt(c.key_size)
                a = sum(score**n / math.factorial(n) for n in range(c.lowest, c.order + 1))
                num, den = num + a * v[s, g], den + a
            den = {"sum": den, "detached": den.detach(), "floor": den.abs().clamp_min(1), "length": t + 1, None: 1}[c.denominator]
            o = num / den
            if mixer.o_gate is not None:
                o = o * torch.sigmoid(mixer.o_gate(x[t]))[h]
            rows.append(o)
    o = torch.stack(rows).view(T, c.heads, -1)
    if c.norm == "l2":
        o = o / (o.square().sum(-1, keepdim=True) + c.norm_eps).sqrt()
    if c.norm == "rms":
        o = o / (o.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * mixer.o_norm.weight
    if c.norm == "layer":
        o = F.layer_norm(o, o.shape[-1:], mixer.o_norm.weight, mixer.o_norm.bias, c.norm_eps)
    return mixer.o_proj(o.flatten(1))


@pytest.mark.parametrize(
    "options",
    [
        {"order": 1, "lowest": 1, "denominator": None},
        {"order": 2},
        {"order": 2, "denominator": "detached", "position": "none", "gate": "output"},
        {"order": 1, "denominator": "floor", "norm": "rms"},
        {"order": 3, "denominator": "length", "gate": "both", "norm": "layer", "kv_heads": 1},
        {"order": 4, "denominator": None, "gate": "input", "norm": "l2", "position": "none"},
    ],
)
def test_softmax_rnn_is_its_sum_with_its_gradients(x, options):
    mixer, results = make("softmax_rnn", feature_size=4, **options), []
    for f in (lambda z: mixer(z[None])[0][0], lambda z: softmax_rnn_loop(mixer, z)):
        z = x.clone().requires_grad_()
        y = f(z)
        grads = torch.autograd.grad((y * x).sum(), (z, *mixer.parameters()))
        results.append((y, *grads))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_softmax_rnn_converges_to_softmax_attention(x):
    """Until only rounding is left."""
    errors = []
    for order in (1, 2, 4, 8, 16, 24):
        mixer = make("softmax_rnn", feature_size=2, order=order, position="none")
        q, k, v = (heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(2)
        o = torch.einsum("hts,shv->thv", scores.masked_fill(~visible(True), -torch.inf).softmax(-1), v)
        errors.append(float((mixer(x[None])[0][0] - mixer.o_proj(o.flatten(1))).detach().abs().max()))
    even = errors[1:]
    assert all(b < a for a, b in zip(even, even[1:], strict=False)) and errors[-1] < 1e-10, errors


# ---- kernel attention with relative positions ----------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 3.0, "num_features": 7}, {"normalize": False}, {"feature_map": "elu+1", "max_distance": 4}],
)
def test_rpe_kernel_is_the_weighted_sum(x, bidirectional, options):
    mixer = make("rpe_kernel", bidirectional=bidirectional, **{"max_distance": 20} | options)
    c, reach = mixer.config, mixer.config.max_distance
    q, k, v = (heads(p(x)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))

    def phi(y):
        if c.normalize:
            y = y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        if c.feature_map == "elu+1":
            return F.elu(y) + 1
        y = y * (math.sqrt(c.temperature) if c.normalize else c.head_size**-0.25)
        w = mixer.omega_FK
        return (y @ w.T - y.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(w.shape[0])

    A = torch.einsum("thf,shf->hts", phi(q), phi(k))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    index = distance + (reach - 1) * bidirectional
    inside = (index >= 0) & (index < mixer.rpe.shape[1])
    A = A * torch.where(inside, mixer.rpe.exp()[:, index.clamp(0, mixer.rpe.shape[1] - 1)], 0)
    o = torch.einsum("hts,shv->thv", A / (A.sum(-1, keepdim=True) + c.normalizer_eps), v)
    assert_same(mixer(x[None])[0][0], mixer.o_proj(o.flatten(1)))
    assert mixer.rpe.shape == (H, 2 * reach - 1 if bidirectional else reach)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_blocks_of_features_change_nothing(x, bidirectional, monkeypatch):
    mixer, results = make("rpe_kernel", bidirectional=bidirectional, max_distance=9), []
    for workspace in (rpe_kernel.WORKSPACE, 1, 2 * T * D * 2):
        monkeypatch.setattr(rpe_kernel, "WORKSPACE", workspace)
        z = x.clone().requires_grad_()
        y = mixer(z[None])[0][0]
        results.append((y, *torch.autograd.grad((y * x).sum(), (z, *mixer.parameters()))))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same(a, b, 1e-12)


def test_random_features_of_unit_vectors_estimate_the_softmax_kernel():
    torch.manual_seed(0)
    mixer = build_mixer("rpe_kernel", 16, 2, num_features=20000, temperature=2.0).double()
    q, k = F.normalize(torch.randn(2, 1, 5, 2, 8, dtype=torch.float64), dim=-1)
    estimate = (mixer.phi(3 * q) * mixer.phi(5 * k)).sum(-1)
    assert float((estimate / (2 * (q * k).sum(-1)).exp() - 1).abs().max()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rpe_kernel_at_64k_tokens_in_fp32_is_near_double_in_bounded_memory(bidirectional):
    """T K V numbers would be 1 GiB for each of k v^T, its convolution and its spectra."""
    import resource

    torch.manual_seed(0)
    size, length = 64, 1 << 16
    mixer = build_mixer("rpe_kernel", size, 1, max_distance=4096, bidirectional=bidirectional)
    x = torch.randn(1, length, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        y = mixer(x)[0][0]
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 512  # MiB
    mixer, x = mixer.double(), x.double()
    k, v = mixer.phi(mixer.k_proj(x)[0, :, None])[:, 0], mixer.v_proj(x)[0]
    for t in range(0, length, 4999):
        low, high = max(0, t - 4095), min(length, t + 4096) if bidirectional else t + 1
        weight = k[low:high] @ mixer.phi(mixer.q_proj(x)[0, t, None, None])[0, 0]
        index = t - torch.arange(low, high) + 4095 * bidirectional
        weight = weight * mixer.rpe[0, index].exp()
        want = mixer.o_proj(weight @ v[low:high] / (weight.sum() + mixer.config.normalizer_eps))
        assert float((y[t] - want.detach()).abs().max() / want.detach().abs().max()) < 1e-3


# ---- Monarch Mixer -------------------------------------------------------------------------------------------------------


def implicit_filter(part, lag: int) -> Tensor:
    """h(lag) [D], from the formula."""
    c = part.config
    angle = 2 * math.pi * lag / c.max_length
    bands = [1e-4 + (c.bands - 1 - 1e-4) * i / max(1, c.bands - 1) for i in range(c.bands)]
    z = [lag / (c.max_length - 1), *(math.cos(f * angle) for f in bands), *(-math.sin(f * angle) for f in bands)]
    z = torch.tensor(z, dtype=torch.float64)
    for layer in part.layers:
        z = torch.sin(part.frequency * layer(z))
    slow, fast = 1 / 1.5, 1 / 0.3
    rate = torch.tensor([slow + (fast - slow) * d / (part.channels - 1) for d in range(part.channels)], dtype=torch.float64)
    return part.out(z) * 0.01 ** (rate * lag / (c.max_length - 1))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("options", [{}, {"residual": False, "conv_size": None, "bands": 3}, {"max_length": 5}])
def test_monarch_mixer_is_its_gated_convolution(x, bidirectional, options):
    mixer = make("monarch_mixer", bidirectional=bidirectional, **{"max_length": 20, "filter_size": 6} | options)
    c, u = mixer.config, mixer.in_proj(x)
    if c.conv_size:
        padded = F.pad(u.T[None], (c.conv_size - 1, 0))
        u = F.conv1d(padded, mixer.conv.weight[:, None], mixer.conv.bias, groups=3 * D)[0].T
    x1, x2, v = u.chunk(3, -1)
    branches = 1 + c.residual

    def convolve(w: Tensor, branch: int) -> Tensor:
        y = mixer.skip[branch] * w
        past = [implicit_filter(mixer.filters[branch], lag) for lag in range(min(T, c.max_length))]
        rows = [y[t] + sum(past[lag] * w[t - lag] for lag in range(min(t + 1, len(past)))) for t in range(T)]
        if bidirectional:
            future = [implicit_filter(mixer.filters[branches + branch], lag - 1) for lag in range(1, min(T, c.max_length))]
            rows = [y + sum(h * w[t + 1 + i] for i, h in enumerate(future) if t + 1 + i < T) for t, y in enumerate(rows)]
        return torch.stack(rows)

    y = x2 * convolve(x1 * v, 0)
    if c.residual:
        y = y + convolve(x, 1)
    assert_same(mixer(x[None])[0][0], mixer.out_proj(y))


def test_a_fourier_transform_is_a_product_of_monarch_matrices():
    """Order 2, N = m^2: permutation, blocks, permutation with twiddles, blocks, permutation."""
    m = 5
    w = lambda n, e: torch.exp(-2j * math.pi * torch.as_tensor(e, dtype=torch.float64) / n)
    small = w(m, torch.arange(m)[:, None] * torch.arange(m))
    swap = torch.arange(m * m).view(m, m).T.flatten()
    P = torch.eye(m * m, dtype=torch.complex128)[swap]
    blocks = torch.block_diag(*[small] * m)
    twiddle = torch.diag(w(m * m, (torch.arange(m)[:, None] * torch.arange(m)).flatten()))
    u = torch.randn(m * m, dtype=torch.complex128)
    assert_same(torch.view_as_real(P @ blocks @ P @ twiddle @ blocks @ P @ u), torch.view_as_real(torch.fft.fft(u)))


# ---- LightNet ------------------------------------------------------------------------------------------------------------


def lightnet_output(mixer, x: Tensor, o: Tensor) -> Tensor:
    c = mixer.config
    o = o / (o.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * mixer.o_norm.weight
    return mixer.o_proj(o * F.silu(mixer.g_proj.up(mixer.g_proj.down(x))))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("grid", [None, (3, 4), (2, 3, 2)])
def test_lightnet_with_cosine_positions_weighs_by_distances_on_the_grid(x, bidirectional, grid):
    """A_ts = sum_c silu(q_tc) e^{k_sc - z_tc} cos(n_tc - n_sc), n_c index on the axis of channel c times its angle."""
    mixer = make("lightnet", gate_rank=3, bidirectional=bidirectional, lrpe="cosine", grid=grid, expand_k=1.5, theta=50.0)
    q, k, v = F.silu(heads(mixer.q_proj(x))), heads(mixer.k_proj(x)), heads(mixer.v_proj(x))
    K, axes = q.shape[-1], len(grid or (1,))
    places = [(t,) if grid is None else tuple(int(n) for n in torch.unravel_index(torch.tensor(t), grid)) for t in range(T)]
    share = K // axes
    angle = [[places[t][c // share] * 50.0 ** -((c % share) / share) for c in range(K)] for t in range(T)]
    angle = torch.tensor(angle, dtype=torch.float64)
    see = visible(not bidirectional)
    z = k[None].expand(T, -1, -1, -1).masked_fill(~see[..., None, None], -torch.inf).logsumexp(1)
    A = torch.zeros(H, T, T, dtype=torch.float64)
    for t in range(T):
        for s in range(T):
            if see[t, s]:
                A[:, t, s] = (q[t] * (k[s] - z[t]).exp() * (angle[t] - angle[s]).cos()).sum(-1) / math.sqrt(K)
    o = torch.einsum("hts,shv->thv", A, v).flatten(1)
    assert_same(mixer(x[None])[0][0], lightnet_output(mixer, x, o))


@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_bidirectional_lightnet_with_turned_pairs_is_relative(x, grid):
    """Only where no decay tells the channels of a pair apart does the product depend on differences alone."""
    mixer = make("lightnet", gate_rank=3, bidirectional=True, lrpe="rotate", grid=grid)
    q, k, v = F.silu(heads(mixer.q_proj(x))), heads(mixer.k_proj(x)).softmax(0), heads(mixer.v_proj(x))
    half, axes = q.shape[-1] // 2, len(grid or (1,))
    share = half // axes
    places = torch.stack(torch.unravel_index(torch.arange(T), grid), -1) if grid else torch.arange(T)[:, None]
    frequency = torch.tensor([10000.0 ** -((c % share) / share) for c in range(half)], dtype=torch.float64)
    angle = places.double()[:, [c // share for c in range(half)]] * frequency
    pair = lambda y: torch.complex(y[..., :half], y[..., half:])
    turned = torch.polar(torch.ones(T, T, half).double(), angle[:, None] - angle)
    A = torch.einsum("thc,shc,tsc->hts", pair(q), pair(k).conj(), turned).real / math.sqrt(2 * half)
    o = torch.einsum("hts,shv->thv", A, v).flatten(1)
    assert_same(mixer(x[None])[0][0], lightnet_output(mixer, x, o))


@pytest.mark.parametrize("grid", [None, (3, 4), (2, 3, 2), (1, 12), (12, 1)])
def test_md_tpe_is_a_scan_along_every_axis(x, grid):
    torch.manual_seed(0)
    tpe = _grid.MDTPE(D, H, grid, 1e-5).double()
    tpe.reset_parameters()
    cells, total = x.view(*(grid or (T,)), D), 0
    for axis in range(cells.ndim - 1):
        lines = cells.movedim(axis, 0)
        decay = torch.sigmoid(tpe.decay[axis]).repeat_interleave(D // H)
        state, rows = torch.zeros_like(lines[0]), []
        for row in lines:
            state = decay * state + row
            rows.append(state)
        gain = (tpe.q[axis] * tpe.k[axis]).sum(-1).repeat_interleave(D // H)
        o = heads(gain * torch.stack(rows).movedim(0, axis).reshape(T, D))
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        total = total + tpe.projections[axis](o.flatten(1) * tpe.norms[axis].weight)
    got, _ = tpe(x[None], torch.arange(T)[None], [None] * (cells.ndim - 1), Context())
    assert_same(got[0], total)


def test_lightnet_adds_md_tpe_to_its_input(x):
    with_tpe, plain = make("lightnet", gate_rank=3, tpe=True, grid=(3, 4)), make("lightnet", gate_rank=3)
    plain.load_state_dict({n: p for n, p in with_tpe.state_dict().items() if not n.startswith("tpe.")})
    average, _ = with_tpe.tpe(x[None], torch.arange(T)[None], [None, None], Context())
    assert_same(with_tpe(x[None])[0], plain(x[None] + average)[0])
