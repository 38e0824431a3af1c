"""TTT and Titans against plain loops: the paper's inner loss, differentiated by autograd token by token, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from formula_cases import input_fixture, perturbed
from torch import Tensor

from linnet import ops
from linnet.mixers import Context, build_mixer

T, D, H, K = 11, 16, 2, 8
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def make(name: str, **options):
    return perturbed(name, D, H, **options)


x = input_fixture(T, D)


def heads(y: Tensor) -> Tensor:
    """[T, H * K] -> [T, H, K]"""
    return y.unflatten(-1, (H, K))


def unit(y: Tensor) -> Tensor:
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(norm, y: Tensor) -> Tensor:
    return y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def convolve(conv, y: Tensor) -> Tensor:
    """The causal convolution of [T, channels], without its activation."""
    padded = torch.cat((torch.zeros(3, y.shape[1], dtype=y.dtype), y))
    z = sum(padded[w : w + len(y)] * conv.weight[:, w] for w in range(4))
    return z if conv.bias is None else z + conv.bias


def turn(y: Tensor, places: Tensor, theta: float = 10000.0, interleaved: bool = False) -> Tensor:
    """Rotary positions as a complex multiplication; y [T, H, K]."""
    angle = places[:, None].double() * theta ** -(torch.arange(0, K, 2, dtype=torch.float64) / K)
    pairs = y.unflatten(-1, (K // 2, 2)) if interleaved else torch.stack(y.chunk(2, -1), -1)
    z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)[:, None]
    out = torch.view_as_real(z)
    return out.flatten(-2) if interleaved else torch.cat(out.unbind(-1), -1)


def learn(f, start, q, k, v, *, mini_batch, rate, keep=None, momentum=None, scale=None, half=0.5):
    """The inner loop of one head: f(z, weights), the weights to start from, q, k, v [T, K], the gates [T]; outputs [T, K]."""
    weights = anchor = list(start)
    surprise, out = [torch.zeros_like(w) for w in start], []
    for t in range(len(q)):
        loss = half * (f(k[t], anchor) - v[t]).square().sum()
        grads = torch.autograd.grad(loss, anchor, create_graph=True)
        surprise = [(0 if momentum is None else momentum[t]) * s - rate[t] * g for s, g in zip(surprise, grads, strict=True)]
        weights = [(1 if keep is None else keep[t]) * w + s for w, s in zip(weights, surprise, strict=True)]
        read = weights if scale is None else [a + scale[t] * (w - a) for a, w in zip(anchor, weights, strict=True)]
        out.append(f(q[t], read))
        if (t + 1) % mini_batch == 0:
            weights = anchor = read
    return torch.stack(out)


def network(net, head: int):
    """f(z, weights) of one head and the weights it starts from, from the formula."""
    W = [w[head] for w in net.weights]
    start = W + ([] if net.biases is None else [b[head] for b in net.biases])
    act = {"gelu": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}[net.options["activation"]]

    def f(z, weights):
        y = z
        for layer in range(len(W)):
            y = (act(y) if layer else y) @ weights[layer] + (weights[len(W) + layer] if net.biases is not None else 0)
        if net.norm_weight is not None:
            y = (y - y.mean()) / (y.var(unbiased=False) + net.options["norm_eps"]).sqrt() * net.norm_weight[head] + net.norm_bias[
                head
            ]
        return z + y if net.options["residual"] else y

    return f, start


def ttt(m, x: Tensor) -> Tensor:
    c, places = m.config, torch.arange(len(x)) % m.config.mini_batch
    q = m.q_proj(x)
    qk = torch.cat((q, q if c.share_qk else m.k_proj(x)), -1)
    qk = convolve(m.conv, qk) if c.conv_size else qk
    q, k = (heads(y) for y in qk.chunk(2, -1))
    if c.rope_theta:
        q, k = (turn(y, places, c.rope_theta, interleaved=True) for y in (q, k))
    v, rate = heads(m.v_proj(x)), c.base_lr * torch.sigmoid(m.lr_proj(x)) / K
    scale = (1 / (places + 1.0) + m.position_scale[places]).clamp_min(0) if c.position_scale else None
    out = []
    for h in range(H):
        f, start = network(m.inner, h)
        out.append(learn(f, start, q[:, h], k[:, h], v[:, h], mini_batch=c.mini_batch, rate=rate[:, h], scale=scale))
    o = F.layer_norm(torch.stack(out, 1).flatten(1), (D,), m.post_norm.weight, m.post_norm.bias, c.norm_eps)
    return m.o_proj(o * F.gelu(m.g_proj(x), approximate="tanh") if c.gate else o)


TTT = {
    "linear": ("ttt_linear", {"mini_batch": 4}),
    "linear-transformer": ("ttt_linear", {"mini_batch": 3, "share_qk": False, "conv_size": None, "gate": False}),
    "linear-plain": ("ttt_linear", {"mini_batch": 4, "inner_norm": False, "residual": False, "rope_theta": None}),
    "linear-token": ("ttt_linear", {"mini_batch": 1, "inner_norm": False}),
    "linear-unscaled": ("ttt_linear", {"mini_batch": 16, "inner_norm": False, "position_scale": False, "bias": False}),
    "mlp": ("ttt_mlp", {"mini_batch": 4, "expand": 2}),
    "mlp-plain": ("ttt_mlp", {"mini_batch": 2, "bias": False, "residual": False, "position_scale": False}),
}


def memory(m, x: Tensor) -> Tensor:
    """m_t of the long-term memory alone [T, H, K]."""
    y = torch.cat([p(x) for p in (m.q_proj, m.k_proj, m.v_proj)], -1)
    y = F.silu(y if m.conv is None else convolve(m.conv, y))
    q, k, v = (heads(part) for part in y.chunk(3, -1))
    gates = {"rate": m.rate_max * torch.sigmoid(m.rate_proj(x))}
    gates |= {} if m.momentum_proj is None else {"momentum": torch.sigmoid(m.momentum_proj(x))}
    gates |= {} if m.forget_proj is None else {"keep": 1 - torch.sigmoid(m.forget_proj(x))}
    out = []
    for h in range(H):
        f, start = network(m.net, h)
        own = {name: gate[:, h] for name, gate in gates.items()}
        out.append(learn(f, start, unit(q[:, h]), unit(k[:, h]), v[:, h], mini_batch=m.mini_batch, half=1.0, **own))
    return torch.stack(out, 1)


def attend(m, x: Tensor, sees, tokens: Tensor | None = None, token_places: Tensor | None = None) -> Tensor:
    """Attention of every token t to the persistent tokens and to the s-th of `tokens` wherever sees(t, s)."""
    tokens = x if tokens is None else tokens
    places = torch.arange(len(x))
    token_places = places if token_places is None else token_places
    q, k, v = heads(m.q_proj(x)), turn(heads(m.k_proj(tokens)), token_places), heads(m.v_proj(tokens))
    turned, out = turn(q, places), []
    for t in range(len(x)):
        seen = [s for s in range(len(tokens)) if sees(t, s)]
        score, value = torch.einsum("hk,shk->hs", turned[t], k[seen]), v[seen]
        if m.persistent is not None:
            score = torch.cat((torch.einsum("hk,shk->hs", q[t], heads(m.k_proj(m.persistent))), score), 1)
            value = torch.cat((heads(m.v_proj(m.persistent)), value))
        out.append(torch.einsum("hs,shk->hk", (score / math.sqrt(K)).softmax(-1), value))
    return torch.stack(out)


def recalled(m, x: Tensor, answers: list[Tensor], segment: int) -> Tensor:
    """h of the tokens of one segment: the memory after the answers of all earlier segments, read and not written."""
    q = unit(heads(F.silu(m.q_proj(x))))
    y = torch.cat([p(torch.cat(answers)) for p in (m.q_proj, m.k_proj, m.v_proj)], -1) if answers else None
    out = []
    for h in range(H):
        f, weights = network(m.net, h)
        if answers:
            a, z = torch.cat(answers), F.silu(convolve(m.conv, y))
            _, k, v = (heads(part)[:, h] for part in z.chunk(3, -1))
            k, surprise, anchor = unit(k), [torch.zeros_like(w) for w in weights], weights
            gate = lambda p, h=h, a=a: torch.sigmoid(p(a))[:, h]
            rate, eta, alpha = m.rate_max * gate(m.rate_proj), gate(m.momentum_proj), gate(m.forget_proj)
            for t in range(len(a)):
                if t % segment == 0:
                    anchor = weights
                grads = torch.autograd.grad((f(k[t], anchor) - v[t]).square().sum(), anchor, create_graph=True)
                surprise = [eta[t] * s - rate[t] * g for s, g in zip(surprise, grads, strict=True)]
                weights = [(1 - alpha[t]) * w + s for w, s in zip(weights, surprise, strict=True)]
        out.append(torch.stack([f(z, weights) for z in q[:, h]]))
    return torch.stack(out, 1)


def titans(m, x: Tensor) -> Tensor:
    c = m.config
    window = lambda t, s: t - c.window < s <= t
    gated = lambda a, b: rms(m.o_norm, a) * torch.sigmoid(rms(m.m_norm, b))
    if c.variant == "memory":
        o = rms(m.o_norm, memory(m.memory, x)) * F.silu(heads(m.g_proj(x)))
    elif c.variant == "gate":
        o = gated(attend(m.attention, x, window), memory(m.memory, x))
    elif c.variant == "layer":
        o = attend(m.attention, rms(m.h_norm, memory(m.memory, x)).flatten(1), window)
    else:
        answers, recall = [], []
        for start in range(0, len(x), c.window):
            end = min(start + c.window, len(x))
            recall.append(rms(m.h_norm, recalled(m.memory, x[start:end], answers, c.window)).flatten(1))
            # every token of the segment, and of what was recalled for it, up to t: first all of h, then all of x
            tokens, places = torch.cat((torch.cat(recall), x[:end])), torch.arange(end).repeat(2)
            sees = lambda t, s, start=start, end=end: t < start or start <= s % end <= t
            answers.append(attend(m.attention, x[:end], sees, tokens, places)[start:].flatten(1))
        a = torch.cat(answers)
        o = gated(heads(a), memory(m.memory, a))
    return m.o_proj(o.flatten(1))


TITANS = {
    "memory": ("titans", {"variant": "memory", "mini_batch": 4}),
    "memory-linear": ("titans", {"variant": "memory", "mini_batch": 4, "depth": 1, "bias": True, "memory_norm": False}),
    "memory-fresh": ("titans", {"variant": "memory", "mini_batch": 1, "depth": 1, "conv_size": None, "memory_norm": False}),
    "memory-deep": (
        "titans",
        {"variant": "memory", "mini_batch": 3, "depth": 3, "activation": "silu", "momentum": False, "memory_norm": False},
    ),
    "memory-norm": ("titans", {"variant": "memory", "mini_batch": 5, "bias": True, "forget": False, "rate_max": 0.1}),
    "gate": ("titans", {"window": 4, "mini_batch": 4}),
    "gate-plain": ("titans", {"window": 3, "mini_batch": 2, "persistent": 0, "memory_norm": False}),
    "layer": ("titans", {"variant": "layer", "window": 4, "mini_batch": 4}),
    "context": ("titans", {"variant": "context", "window": 4}),
    "context-linear": ("titans", {"variant": "context", "window": 5, "depth": 1, "persistent": 0, "memory_norm": False}),
}
CASES = {f"ttt-{n}": (*case, ttt) for n, case in TTT.items()} | {f"titans-{n}": (*case, titans) for n, case in TITANS.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_mixer_is_its_inner_loop_differentiated_by_autograd(case, x):
    """Outputs, and the outer gradients through the inner ones."""
    name, options, formula = CASES[case]
    mixer, weight = make(name, **options), torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for run in (lambda z: mixer(z[None])[0][0], lambda z: formula(mixer, z)):
        z = x.clone().requires_grad_()
        y = run(z)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [z, *mixer.parameters()], allow_unused=True)])
    for name, got, want in zip(["y", "x", *dict(mixer.named_parameters())], *results, strict=True):
        torch.testing.assert_close(got, want, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_ttt_linear_with_single_tokens_and_no_norm_is_the_delta_rule(x):
    """S_t = S_{t-1} - lr_t k_t (S_{t-1}^T k_t - v_t)^T, with the residual the target is v - k."""
    for residual in (False, True):
        m = make("ttt_linear", mini_batch=1, inner_norm=False, bias=False, position_scale=False, residual=residual, conv_size=None,
                 share_qk=False, gate=False)  # fmt: skip
        q, k, v = (heads(p(x))[None] for p in (m.q_proj, m.k_proj, m.v_proj))
        lr = torch.sigmoid(m.lr_proj(x))[None] / K
        o, _ = ops.delta_rule(
            q, k, v - k if residual else v, erase=lr, scale=1.0, initial_state=m.inner.weights[0][None], return_state=False
        )
        want = m.o_proj(m.post_norm((q + o if residual else o).flatten(2)))
        torch.testing.assert_close(m(x[None])[0], want, **EXACT)


def test_titans_with_a_linear_memory_and_no_momentum_is_the_gated_delta_rule(x):
    """W_t = (1 - alpha_t) W_{t-1} - 2 theta_t k_t (W_{t-1}^T k_t - v_t)^T: the erased value is read before the decay."""
    m = make("titans", variant="memory", mini_batch=1, depth=1, momentum=False, memory_norm=False)
    parts = torch.cat([p(x) for p in (m.memory.q_proj, m.memory.k_proj, m.memory.v_proj)], -1)
    q, k, v = (heads(y)[None] for y in F.silu(convolve(m.memory.conv, parts)).chunk(3, -1))
    beta = 2 * m.memory.rate_max * torch.sigmoid(m.memory.rate_proj(x))[None]
    o, _ = ops.delta_rule(
        unit(q), unit(k), v, erase=beta, log_decay=F.logsigmoid(-m.memory.forget_proj(x))[None], erase_read="before_decay",
        scale=1.0, initial_state=m.memory.net.weights[0][None],
    )  # fmt: skip
    want = m.o_proj((rms(m.o_norm, o[0]) * F.silu(heads(m.g_proj(x)))).flatten(1))
    torch.testing.assert_close(m(x[None])[0][0], want, **EXACT)


@pytest.mark.parametrize("case", ["ttt-linear", "ttt-mlp", "titans-gate", "titans-context", "titans-memory-linear"])
@torch.no_grad()
def test_rows_that_stand_at_different_places_of_their_mini_batches_go_on_together(case, x):
    name, options, _ = CASES[case]
    mixer, more = make(name, **options), x.flip(0)[:6]
    states = [mixer(x[None, :length], context=Context(return_state=True))[1] for length in (1, 6, 8)]
    slots = [torch.cat(parts) for parts in zip(*states, strict=True)]
    y, _ = mixer(more.expand(3, -1, -1), tuple(slots), context=Context(return_state=True))
    for row, length in enumerate((1, 6, 8)):
        torch.testing.assert_close(y[row], mixer(torch.cat((x[:length], more))[None])[0][0, length:], **EXACT)


@torch.no_grad()
def test_a_learnt_association_is_recalled():
    """A repeated key brings back the value written for it; the more often it was written, the nearer."""
    q = k = torch.zeros(1, 8, 1, 4, dtype=torch.float64)
    k[..., 0] = 1
    v = torch.ones(1, 8, 1, 4, dtype=torch.float64)
    empty, rate = torch.zeros(1, 4, 4, dtype=torch.float64), torch.full((1, 8, 1), 0.5, dtype=torch.float64)
    o, _ = ops.neural_memory(q, k, v, (empty,), rate=rate, mini_batch=1)
    torch.testing.assert_close(o[0, :, 0, 0], 1 - 0.5 ** torch.arange(1, 9, dtype=torch.float64))


@torch.no_grad()
def test_a_deep_memory_that_forgets_lives_on_with_its_norm_and_dies_without():
    """Zero is a saddle of the loss of two layers; a LayerNorm behind them makes the gradient grow as the weights shrink."""
    size = {}
    for norm in (True, False):
        torch.manual_seed(0)
        mixer = build_mixer("titans", D, H, variant="memory", memory_norm=norm)
        state = mixer(torch.randn(1, 2048, D), context=Context(return_state=True))[1]
        size[norm] = float(state[2].square().mean().sqrt())
    assert size[True] > 1e-2 and size[False] < 1e-6
