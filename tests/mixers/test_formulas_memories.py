"""Mixtures of memories and sparse state expansion against loops over tokens; routing, gates and the balance loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from formula_cases import perturbed
from torch import Tensor
from torch._subclasses import FakeTensorMode

from linnet.mixers import Context, build_mixer
from linnet.mixers._memories import RECURRENCES, balance_loss
from linnet.models import LinnetConfig, LinnetForCausalLM
from linnet.ops.routing import Routes

D, H, W = 16, 2, 3
DOCUMENTS = (9, 1, 0, 13, 2)


def make(name: str, spread: float = 0.3, **options):
    return perturbed(name, D, H, noise=spread, **options)


def inputs(tokens: int, seed: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def offsets(lengths=DOCUMENTS) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- the formulas, one token and one head at a time --------------------------------------------------------------------


def step(recurrence: str, S: Tensor, q: Tensor, k: Tensor, v: Tensor, gates, y: Tensor, head: int, write=1.0, erase=1.0):
    """(S_t, o_t) of one head: S [K, V], q, k [K], v [V]; y the projected gates of the token."""
    K = q.shape[0]
    if recurrence in ("deltanet", "gated_deltanet"):
        q, k = q / (q.square().sum() + 1e-6).sqrt(), k / (k.square().sum() + 1e-6).sqrt()
        beta = torch.sigmoid(y[head])
        if recurrence == "gated_deltanet":
            S = S * torch.exp(-gates.A_log[head].exp() * F.softplus(y[H + head] + gates.dt_bias[head]))
        S = S - erase * beta * torch.outer(k, S.T @ k) + write * beta * torch.outer(k, v)
    else:
        if recurrence == "gla":
            alpha = torch.sigmoid(gates.up.weight @ y + gates.up.bias) ** (1 / 16)
            S = alpha[head * K : head * K + K, None] * S
        elif recurrence == "retnet":
            S = (1 - 2.0 ** (-5 - head)) * S
        S = S + write * torch.outer(k, v)
    return S, S.T @ q / K**0.5


def gated_norm(o: Tensor, gate: Tensor, norm) -> Tensor:
    return o / (o.square().mean() + norm.eps).sqrt() * norm.weight * F.silu(gate)


def mom_loop(mixer, x_TD: Tensor) -> Tensor:
    """One document. Memory -1 is the shared one; the last W-1 inputs of a memory's convolution are kept as a list."""
    c = mixer.config
    K, V = c.key_size, c.value_size
    states, past, rows = {}, {}, []
    for x in x_TD:
        p = torch.softmax(mixer.router.weight @ x, 0)
        chosen = sorted(range(c.memories), key=lambda m: -p[m].item())[: c.top_k]
        total = sum(p[m] for m in chosen) if c.renormalize else 1.0
        weights = ({-1: 1.0} if c.shared_memory else {}) | {m: p[m] / total for m in chosen}
        o = [torch.zeros(V, dtype=x.dtype) for _ in range(H)]
        for m, weight in weights.items():
            matrix = mixer.kv_weight[m + c.shared_memory if c.own_projections else 0]
            kvg = matrix @ x
            qkv = torch.cat((mixer.q_proj.weight @ x, kvg[: H * (K + V)]))
            if mixer.conv is not None:
                seen = [*past.get(m, []), qkv]
                past[m] = seen[-(W - 1) :]
                qkv = sum(mixer.conv.weight[:, W - 1 - j] * seen[-1 - j] for j in range(min(W, len(seen))))
            qkv = F.silu(qkv)
            q, k, v = qkv[: H * K].split(K), qkv[H * K : 2 * H * K].split(K), qkv[2 * H * K :].split(V)
            for h in range(H):
                S = states.get((m, h), torch.zeros(K, V, dtype=x.dtype))
                states[m, h], read = step(c.recurrence, S, q[h], k[h], v[h], mixer.gates, kvg[H * (K + V) :], h)
                o[h] = o[h] + weight * read
        gate = (mixer.g_proj.weight @ x).split(V)
        rows.append(mixer.o_proj.weight @ torch.cat([gated_norm(o[h], gate[h], mixer.o_norm) for h in range(H)]))
    return torch.stack(rows)


def sse_loop(mixer, x_TD: Tensor) -> Tensor:
    """One document. Partition -1 is the one that every token uses."""
    c = mixer.config
    K, V = c.key_size, c.value_size
    low = lambda part, x: part.up.weight @ (part.down.weight @ x)
    states, rows = {}, []
    for x in x_TD:
        e = torch.softmax(mixer.router.weight @ x, 0)
        chosen = sorted(range(c.partitions), key=lambda i: -e[i].item())[: c.top_k]
        v = F.silu(mixer.v_proj.weight @ x).split(V)
        y = torch.empty(0) if mixer.gate_proj is None else mixer.gate_proj.weight @ x
        o = [torch.zeros(V, dtype=x.dtype) for _ in range(H)]
        for i in (-1, *chosen):
            q, k = mixer.q_proj.weight @ x, mixer.k_proj.weight @ x
            if i >= 0:
                q, k = q + low(mixer.q_sparse, x), k + low(mixer.k_sparse, x)
            q, k = F.silu(q).split(K), k.split(K)
            write = e[i] if i >= 0 and "write" in c.gate else 1.0
            read_gate = e[i] if i >= 0 and "read" in c.gate else 1.0
            half = y.numel() // 2
            own, gates = (y[half:], mixer.gates) if i >= 0 else (y[:half], mixer.shared_gates)
            for h in range(H):
                key = F.silu(k[h])
                if c.key_function == "softmax":
                    least = k[h].sort(descending=True).values[(c.key_rows or K) - 1]
                    key = torch.where(k[h] >= least, k[h].exp(), 0)
                    key = key / key.sum()
                S = states.get((i, h), torch.zeros(K, V, dtype=x.dtype))
                erase = write if c.gated_erase else 1.0
                states[i, h], read = step(c.recurrence, S, q[h], key, v[h], gates, own, h, write, erase)
                o[h] = o[h] + read_gate * read
        gate = low(mixer.g_proj, x).split(V)
        rows.append(mixer.o_proj.weight @ torch.cat([gated_norm(o[h], gate[h], mixer.o_norm) for h in range(H)]))
    return torch.stack(rows)


def check_against(loop, mixer) -> None:
    """Packed documents, values and gradients of the input and of every parameter."""
    x, weight, cu = inputs(sum(DOCUMENTS)), inputs(sum(DOCUMENTS), seed=2), offsets()
    results = []
    for packed in (True, False):
        leaf = x.clone().requires_grad_()
        mixer.zero_grad()
        if packed:
            y = mixer(leaf, context=Context(cu_seqlens=cu))[0]
        else:
            y = torch.cat([loop(mixer, d) for d in leaf[0].split(DOCUMENTS) if d.shape[0]])[None]
        (y * weight).sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad for p in mixer.parameters())))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_mom_is_the_loop_over_tokens_and_memories(recurrence):
    check_against(mom_loop, make("mom", recurrence=recurrence, conv_size=W, gate_rank=3))


@pytest.mark.parametrize(
    "options",
    [
        {"shared_memory": False, "memories": 5, "top_k": 3},
        {"own_projections": False, "top_k": 1, "renormalize": False},
        {"conv_size": None, "expand_v": 0.5, "head_dim": 6, "renormalize": False},
    ],
)
def test_options_of_mom(options):
    check_against(mom_loop, make("mom", **{"conv_size": W} | options))


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_sse_is_the_loop_over_tokens_and_partitions(recurrence):
    check_against(sse_loop, make("sse", recurrence=recurrence, gate_rank=3, top_k=2))


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "write", "partitions": 6, "key_rows": 3},
        {"gate": "read", "key_map": "silu"},
        {"recurrence": "gated_deltanet", "gated_erase": False, "expand_v": 0.5},
        {"recurrence": "deltanet", "key_map": "softmax", "rank": 3},
    ],
)
def test_options_of_sse(options):
    check_against(sse_loop, make("sse", gate_rank=3, **options))


@pytest.mark.parametrize("name,loop", [("mom", mom_loop), ("sse", sse_loop)])
def test_strong_decays_are_exact(name, loop):
    options = {"recurrence": "gated_deltanet"} | ({"conv_size": W} if name == "mom" else {})
    mixer = make(name, **options)
    with torch.no_grad():
        for part, value in mixer.named_parameters():
            if part.endswith("dt_bias"):
                value.fill_(20.0)  # a log-decay near -20 A per token, with A = 1 in the first head
            if part.endswith("A_log"):
                value.copy_(torch.tensor([0.0, -5.0]))
    check_against(loop, mixer)


# ---- routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("memories,top_k", [(2, 1), (5, 3), (4, 4)])
def test_no_token_is_dropped_and_segments_keep_time_order(shared, memories, top_k):
    T, cu = sum(DOCUMENTS), offsets()
    choice = torch.rand(1, T, memories, generator=torch.Generator().manual_seed(3)).argsort(-1)[..., :top_k]
    choice[:, :11] = torch.arange(top_k)  # skewed: a capacity would overflow
    routes = Routes(choice, memories, cu, shared=shared)
    time, document = torch.arange(T), torch.searchsorted(cu[1:].long(), torch.arange(T), right=True)
    slots = routes.take(time[None])[0]
    segments = [slots[a:b].tolist() for a, b in zip(routes.cu_seqlens[:-1], routes.cu_seqlens[1:], strict=True)]
    expected = [
        [t for t in range(T) if document[t] == n and (m < 0 or m in choice[0, t])]
        for m in range(-1 if shared else 0, memories)
        for n in range(len(DOCUMENTS))
    ]
    assert segments == expected
    weight = torch.rand(1, T, top_k, dtype=torch.float64)
    x = inputs(T)
    assert_close(routes.put(routes.take(x), weight), x * (weight.sum(-1, keepdim=True) + shared))


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_grouped_linear_is_a_matrix_per_memory(rows):
    memories, T = 3, 1 if rows == 40 else 23
    choice = torch.rand(rows, T, memories, generator=torch.Generator().manual_seed(3)).argsort(-1)[..., :2]
    routes = Routes(choice, memories, shared=True)
    x = inputs(T, batch=rows).requires_grad_()
    weight = torch.randn(memories + 1, 5, D, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(rows, T, 2, dtype=torch.float64)
    y = routes.put(routes.linear(routes.take(x), weight), gate)
    z = x @ weight[0].T + (torch.einsum("btd,btjed->btje", x, weight[1:][choice]) * gate[..., None]).sum(2)
    assert_close(y, z)
    seed = torch.randn_like(y)
    for actual, expected in zip(*(torch.autograd.grad((o * seed).sum(), (x, weight)) for o in (y, z)), strict=True):
        assert_close(actual, expected)


ROUTED = [
    ("mom", {}),
    ("mom", {"shared_memory": False, "recurrence": "gla"}),
    ("sse", {"top_k": 2}),
    ("sse", {"recurrence": "gated_deltanet", "conv_size": W}),
]
routed = pytest.mark.parametrize("name,options", ROUTED)


@routed
def test_no_document_reaches_another_through_routing(name, options):
    """Bit for bit: a document is what it is whatever the others are; the gradient to the others is exactly zero."""
    mixer, lengths = make(name, **options), (30, 41, 25)
    x, other = inputs(96), inputs(96, seed=7)
    other[:, 30:71] = x[:, 30:71]
    context = lambda: Context(cu_seqlens=offsets(lengths), return_state=True)
    leaf = x.clone().requires_grad_()
    (y, state), (z, again) = mixer(leaf, context=context()), mixer(other, context=context())
    assert torch.equal(y[:, 30:71], z[:, 30:71]) and not torch.equal(y, z)
    for a, b in zip(state, again, strict=True):
        assert torch.equal(a[1], b[1])
    gradients = []
    for value in (x, other):
        leaf = value.clone().requires_grad_()
        y, state = mixer(leaf, context=context())
        (y[:, 30:71].square().sum() + sum(part[1].square().sum() for part in state)).backward()
        gradients.append(leaf.grad)
        assert not leaf.grad[:, :30].any() and not leaf.grad[:, 71:].any()
    assert torch.equal(*gradients)


@routed
@torch.no_grad()
def test_causal_bit_for_bit_beyond_one_chunk(name, options):
    mixer, x = make(name, **options), inputs(400, batch=2)
    other = x.clone()
    other[:, 300:] = inputs(100, seed=5, batch=2)
    y, z = mixer(x)[0], mixer(other)[0]
    assert torch.equal(y[:, :300], z[:, :300]) and not torch.equal(y[:, 300:], z[:, 300:])


@routed
@torch.no_grad()
def test_a_memory_that_is_not_chosen_stays_as_it_is(name, options):
    mixer, x = make(name, **options), inputs(12, batch=2)
    _, before = mixer(x, context=Context(return_state=True))
    for tokens in (1, 3):  # decoding, and a piece of prefill
        step = inputs(tokens, seed=4, batch=2)
        _, after = mixer(step, before, context=Context(return_state=True))
        shared = mixer.config.__dict__.get("shared_memory", True)
        chosen = mixer.router(step)[2] + shared
        for row in range(2):
            used = {0} | set(chosen[row].flatten().tolist()) if shared else set(chosen[row].flatten().tolist())
            for memory in range(before[-1].shape[1]):
                assert torch.equal(after[-1][row, memory], before[-1][row, memory]) == (memory not in used)


@routed
def test_nothing_is_read_on_the_host(name, options):
    """With fake tensors there is no value to read: a host synchronisation or a data-dependent shape would raise."""
    with FakeTensorMode():
        mixer = build_mixer(name, D, H, **options)
        x, cu = torch.randn(1, 24, D), torch.zeros(4, dtype=torch.int32)
        with torch.no_grad():
            y, state = mixer(x, context=Context(cu_seqlens=cu, return_state=True))
            assert y.shape == x.shape
            assert mixer(torch.randn(3, 1, D), state, context=Context(return_state=True))[0].shape == (3, 1, D)
        routes = Routes(mixer.router(x)[2], 4, cu)
        weight = torch.randn(4, 6, D, requires_grad=True)
        routes.put(routes.linear(routes.take(x), weight), mixer.router(x)[1]).sum().backward()
        assert weight.grad.shape == weight.shape


@pytest.mark.slow
@routed
def test_one_graph_serves_every_choice(name, options):
    """fullgraph, packed, with gradients; other tokens and other offsets do not recompile."""
    mixer = make(name, **options)
    torch._dynamo.reset()
    run = torch.compile(lambda x, cu: mixer(x, context=Context(cu_seqlens=cu))[0], fullgraph=True, backend="aot_eager")
    for seed, lengths in ((1, (9, 1, 0, 15)), (2, (0, 3, 20, 2))):
        with torch.compiler.set_stance("default" if seed == 1 else "fail_on_recompile"):
            x, cu = inputs(25, seed=seed), offsets(lengths)
            grads = []
            for call in (run, lambda x, cu: mixer(x, context=Context(cu_seqlens=cu))[0]):
                mixer.zero_grad()
                y = call(x, cu)
                y.square().sum().backward()
                grads.append([y.detach(), *(p.grad for p in mixer.parameters())])
            for actual, expected in zip(*grads, strict=True):
                assert_close(actual, expected)


# ---- the router and its losses -----------------------------------------------------------------------------------------


def language_model(layers: str, **options) -> LinnetForCausalLM:
    torch.manual_seed(0)
    config = LinnetConfig(vocab_size=31, d_model=D, heads=H, d_ff=24, layers=layers, initializer_range=0.3, **options)
    model = LinnetForCausalLM(config).double()
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mixer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "layer",
    [
        "mom(balance=0)",
        "mom(balance=0, top_k=1, renormalize=false)",
        "sse(balance=0)",
        'sse(balance=0, recurrence="gated_deltanet")',
        'sse(balance=0, recurrence="gated_deltanet", gate="write")',
        'sse(balance=0, recurrence="deltanet", gate="write", gated_erase=false)',
        'sse(balance=0, gate="write")',
        'sse(balance=0, gate="read", recurrence="gated_deltanet")',
    ],
)
def test_the_router_learns_from_the_language_model_loss(layer):
    """Its gradient is that of finite differences, and not small: no norm between the gate and the output cancels it."""
    model, x = language_model(layer).train(), ids(2, 16)
    output = model(x, labels=x)
    assert output.aux_loss is None
    output.loss.backward()
    weight = model.model.layers[0].mixer.router.weight
    grad, scale = weight.grad, max(float(p.grad.norm()) for p in model.model.layers[0].mixer.parameters())
    assert float(grad.norm()) > 1e-3 * scale
    direction, eps = grad / grad.norm(), 1e-6
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(sign * eps * direction)
            values.append(model(x, labels=x).loss)
            weight.sub_(sign * eps * direction)
    slope = (values[0] - values[1]) / (2 * eps)
    assert abs(slope - grad.norm()) < 1e-6 * grad.norm()


def test_the_balance_loss_counts_choices_and_probabilities():
    p = torch.rand(2, 7, 5, dtype=torch.float64).softmax(-1)
    choice = p.topk(2).indices
    shares = [(choice == m).any(-1).double().mean() for m in range(5)]
    expected = 5 / 2 * sum(f * p[..., m].mean() for m, f in enumerate(shares))
    assert_close(balance_loss(p, choice), expected)
    even = torch.full((1, 5, 5), 0.2, dtype=torch.float64)
    assert_close(balance_loss(even, torch.arange(5)[None, :, None]), torch.tensor(1.0, dtype=torch.float64))
    one = torch.eye(5, dtype=torch.float64)[[3] * 4][None]
    assert_close(balance_loss(one, one.argmax(-1, keepdim=True)), torch.tensor(5.0, dtype=torch.float64))


def test_the_balance_loss_reaches_the_loss_of_the_model_in_training_only():
    model, x = language_model("mom + gla + sse(balance=0.5)"), ids(2, 12)
    plain = model.eval()(x, labels=x)
    assert plain.aux_loss is None and model(x).aux_loss is None
    model.train()
    total = model(x, labels=x)
    seen = []
    for layer in (0, 2):
        model.model.layers[layer].mixer.register_forward_pre_hook(
            lambda module, args: seen.append(module.config.balance * balance(module, args[0]))
        )
    again = model(x, labels=x)
    assert_close(sum(seen), again.aux_loss)
    assert_close(total.loss, plain.loss + total.aux_loss)
    targets = 2 * 11
    assert_close(model(x, labels=x, num_items_in_batch=4 * targets).loss, total.loss / 4)


def balance(mixer, x: Tensor) -> Tensor:
    p, _, choice = mixer.router(x)
    return balance_loss(p, choice)


def test_the_balance_loss_survives_gradient_checkpointing():
    model, x, grads = language_model("mom + sse_hybrid").train(), ids(2, 12), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(x, labels=x).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


def test_the_balance_loss_alone_evens_out_the_memories():
    mixer, x = make("mom", spread=0.0, memories=4, balance=1.0).train(), inputs(200)
    with torch.no_grad():
        mixer.router.weight[0] += 0.1 * torch.ones(D, dtype=torch.float64)
        x += 0.5  # memory 0 is everyone's choice
    optimizer = torch.optim.SGD(mixer.router.parameters(), lr=1.0)
    losses = []
    for _ in range(40):
        context = Context()
        mixer(x, context=context)
        (loss,) = context.losses.values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    counts = mixer.router(x)[2].flatten().bincount(minlength=4)
    assert losses[-1] < losses[0] - 0.01 and int(counts.min()) > 0.6 * 400 / 4


@torch.no_grad()
def test_sse_hybrid_is_a_pattern_of_layers():
    hybrid, pattern = language_model("sse_hybrid", num_layers=7).eval(), language_model("5*sse + attention", num_layers=7).eval()
    states = {name.replace("mixer.mixer.", "mixer."): value for name, value in hybrid.state_dict().items()}
    pattern.load_state_dict(states, strict=True)
    x = ids(2, 9)
    assert torch.equal(hybrid(x).logits, pattern(x).logits)
    assert hybrid.state_bytes(tokens=9) == pattern.state_bytes(tokens=9)
    assert torch.equal(
        hybrid.generate(x, max_new_tokens=4, do_sample=False), pattern.generate(x, max_new_tokens=4, do_sample=False)
    )
