"""The laws that every registered mixer obeys, in fp64 on tiny shapes, through the operators' default backends."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import linnet
from linnet.mixers import Context, build_mixer, get_mixer, list_mixers, mixer_config

D, HEADS = 16, 2
SMALL = {
    "mamba2": {"d_state": 6},
    "mamba": {"d_state": 4},
    "mesa": {"cg_steps": 4},
    "rls": {"cg_steps": 4},
    "rwkv7": {r: 4 for r in ("decay_rank", "a_rank", "value_rank", "gate_rank")},
    "based": {"feature_size": 4},
    "rebased": {"feature_size": 4},
    "cosformer": {"max_length": 128},
    "gsa": {"slots": 5},
    "transnormer": {"block_size": 4},
    "rwkv6": {"shift_rank": 3, "decay_rank": 4},
    "s4d": {"d_state": 6},
    "dlr": {"d_state": 5},
    "mamba3": {"d_state": 8},
    "lssl": {"d_state": 4},
    "fsmn": {"lookback": 3},
    "lightnet": {"gate_rank": 4},
    "softmax_rnn": {"feature_size": 4},
    "rpe_kernel": {"max_distance": 24, "num_features": 5},
    "monarch_mixer": {"max_length": 24, "filter_size": 6},
    "ttt_linear": {"mini_batch": 4},
    "ttt_mlp": {"mini_batch": 4, "expand": 2},
    "titans": {"window": 4, "mini_batch": 4},
    "superlinear": {"window_stripes": 1, "search_dim": 3},
    "sea": {"cells": 8, "top_keys": 4, "num_features": 6, "position_size": 4},
    "wersa": {"levels": 2, "num_features": 5, "conv_size": 5, "filter_size": 4},
    "music_relative": {"max_distance": 6},
}
VARIANTS = {
    "attention-window": ("attention", {"window": 4, "kv_heads": 1, "qk_norm": True, "gate": True, "bias": True}),
    "attention-window-2": ("attention", {"window": 2}),
    "attention-nope": ("attention", {"position": "none", "window": 3}),
    "linear_transformer-plain": (
        "linear_transformer",
        {"normalizer": None, "output_norm": True, "feature_map": "relu", "kv_heads": 1},
    ),
    "retnet-lightning": (
        "retnet",
        {
            "decay": "alibi",
            "position": "none",
            "activation": "silu",
            "norm": "full",
            "norm_affine": True,
            "gate": "sigmoid",
            "scale": 1.0,
        },
    ),
    "retnet-rope": ("retnet", {"position": "rope", "decay": "tnl", "gate": None}),
    "gla-conv": ("gla", {"conv_size": 3, "kv_heads": 1, "feature_map": "relu", "decay_min": -0.03}),
    "gla-signed": ("gla", {"allow_neg_eigval": True, "temperature": 1.0, "kv_heads": 1}),
    "mamba2-groups": ("mamba2", {"groups": 2, "norm_groups": 1, "norm_before_gate": True, "dt_limit": (0.01, 0.5), "bias": True}),
    "hgrn-complex": ("hgrn", {"complex": True}),
    "hgrn-conv": ("hgrn", {"conv_size": 4, "expand": 2, "output": "gate_norm", "lower_bound": "fixed"}),
    "deltanet-plain": ("deltanet", {"conv_size": None, "feature_map": "elu+1", "qk_norm": "sum", "gate": True, "beta": False}),
    "gated_deltanet-grouped": ("gated_deltanet", {"value_heads": 4, "gate": False, "conv_size": None, "allow_neg_eigval": True}),
    "kda-safe": ("kda", {"decay_gate": "safe", "value_heads": 4, "gate_rank": 0, "gate": "silu", "gate_bias": False}),
    "gated_deltanet2-safe": ("gated_deltanet2", {"decay_gate": "safe", "value_heads": 4, "allow_neg_eigval": True}),
    "kaczmarz-grouped": ("kaczmarz", {"value_heads": 4, "gate": False, "conv_size": None, "allow_neg_eigval": True}),
    "comba-grouped": ("comba", {"value_heads": 4, "gate": False}),
    "comba-open": ("comba", {"output_feedback": False, "conv_size": None}),
    "gated_deltaproduct-3": ("gated_deltaproduct", {"value_heads": 4, "householder_steps": 3, "conv_size": None}),
    "osdn-decay": ("osdn", {"decay": "head", "forgetting": "none", "value_heads": 4, "precondition_max": None, "gate": True}),
    "osdn-head": ("osdn", {"forgetting": "head", "rate": 0.5, "conv_size": None}),
    "osdn-constant": ("osdn", {"forgetting": "constant", "keep": 0.9}),
    "preconditioned_deltanet-grouped": ("preconditioned_deltanet", {"value_heads": 4, "conv_size": None}),
    "mesa-plain": ("mesa", {"gate": True, "conv_size": None, "cg_steps": 5, "expand_v": 2}),
    "rls-forgetting": ("rls", {"gate": True, "conv_size": None, "keep": 0.95}),
    "dplr-free": ("dplr", {"tied": False, "value_heads": 4, "decay_gate": "safe"}),
    "hedgehog-exp": ("hedgehog", {"feature_map": "exp", "kv_heads": 1, "bias": True, "head_dim": 6}),
    "hedgehog-softmax": ("hedgehog", {"feature_map": "softmax", "tied": True, "map_bias": False}),
    "hedgehog-exp_max": ("hedgehog", {"feature_map": "exp_max"}),
    "t2r-tied": ("t2r", {"feature_size": 5, "tied": True, "map_bias": False}),
    "performer-relu": ("performer", {"kernel": "relu", "num_features": 7, "row_norms": "sqrt", "kv_heads": 1}),
    "lightning-code": (
        "lightning",
        {"decay": "alibi_interleaved", "norm": "layer", "gate": "low_rank", "position": "none", "value_activation": True},
    ),
    "lightning-minimax": ("lightning", {"decay": "alibi", "norm": "rms", "gate": "sigmoid", "head_dim": 6}),
    "lightning-plain": ("lightning", {"decay": "none", "gate": None}),
    "gsa-wide": ("gsa", {"expand_k": 0.5, "expand_v": 2, "feature_map": "relu", "temperature": 1.0}),
    "hgrn2-official": (
        "hgrn2",
        {"q_activation": "sigmoid", "v_activation": "silu", "norm": "layer", "bias": True, "scale": 1.0, "lower_bound": "fixed"},
    ),
    "rwkv4-wide": ("rwkv4", {"expand": 1.5}),
    "lightnet-sigmoid": ("lightnet", {"gate": "sigmoid", "expand_k": 0.5, "scale": 1.0}),
    "mlstm-sigmoid": ("mlstm", {"input_gate": "sigmoid", "bias": True, "soft_cap": None}),
    "mlstm-sigmoid-plain": ("mlstm", {"input_gate": "sigmoid", "normalizer": None, "expand_v": 1.5}),
    "transnormer-norm": ("transnormer", {"attention": "norm", "feature_map": "elu", "norm": "layer", "bias": True}),
    "transnormer-pairs": ("transnormer", {"attention": "diag", "block_size": 2}),
    "rebased-tied": ("rebased", {"tied": True, "kv_heads": 1}),
    "mamba-negative": ("mamba", {"allow_neg_eigval": True}),
    "slstm-plain": ("slstm", {"conv_size": None}),
    "al_rnn-wide": ("al_rnn", {"units": 20, "relu_units": 7}),
    "rg_lru-code": ("rg_lru", {"first_token": "unit", "start": "a", "expand": 1.5, "c": 4.0}),
    "mlstm_block-sigmoid": (
        "mlstm_block",
        {"input_gate": "sigmoid", "normalizer": None, "bias": True, "soft_cap": 10.0, "expand": 1, "block_size": 2},
    ),
    "mamba-falcon": ("mamba", {"norm_eps": 1e-5}),
    "s4d-recurrent": ("s4d", {"init": "legs", "discretization": "bilinear", "output": "linear", "mode": "recurrent"}),
    "s4d-real": ("s4d", {"init": "real"}),
    "s4d-inv": ("s4d", {"init": "inv", "discretization": "bilinear"}),
    "lssl-zoh": ("lssl", {"discretization": "zoh", "channels": 2, "mode": "recurrent"}),
    "lssl-backward": ("lssl", {"discretization": "backward"}),
    "mamba3-mimo": ("mamba3", {"rank": 2, "groups": 2, "decay": "softplus", "output_norm": True}),
    "mamba3-half": ("mamba3", {"pairing": "half", "rope_fraction": 1.0}),
    "dlr-recurrent": ("dlr", {"kernel": "sum", "mode": "recurrent"}),
    "lru-plain": ("lru", {"d_state": 5, "gamma": False, "output": "none", "radius": (0.5, 0.99)}),
    "mom-shared_projections": (
        "mom",
        {"top_k": 1, "renormalize": False, "own_projections": False, "recurrence": "retnet", "conv_size": None},
    ),
    "mom-gla": ("mom", {"shared_memory": False, "recurrence": "gla", "memories": 3, "gate_rank": 4, "expand_v": 2}),
    "sse-gated_deltanet": ("sse", {"recurrence": "gated_deltanet", "top_k": 2, "conv_size": 3}),
    "sse-deltanet": ("sse", {"recurrence": "deltanet", "gate": "write", "gated_erase": False, "partitions": 3, "expand_v": 0.5}),
    "sse-linear_attention": ("sse", {"recurrence": "linear_attention", "gate": "read", "key_rows": 3}),
    "sse_hybrid-second": ("sse_hybrid", {"attention_every": 2, "attention_heads": 4, "kv_heads": 2, "window": 5}),
    "superlinear-wide": (
        "superlinear",
        {"spans": 3, "forward": 0.5, "search_power": 0.6, "span_power": 0.4, "kv_heads": 1, "position": "none", "bias": True},
    ),
    "sea-grouped": ("sea", {"cells": 4, "top_keys": 40, "kv_heads": 1, "position": "none"}),
    "lssa-power": ("lssa", {"power": 2.0, "offset": 0.5, "kv_heads": 1, "position": "none"}),
    "music_relative-shared": ("music_relative", {"shared": True, "beyond": "zero", "kv_heads": 1, "bias": True}),
    "wersa-shared": ("wersa", {"shared_features": True, "levels": 3}),
    "softmax_rnn-third": (
        "softmax_rnn",
        {"order": 3, "denominator": None, "norm": "rms", "gate": "both", "position": "none", "kv_heads": 1},
    ),
    "softmax_rnn-linear": ("softmax_rnn", {"order": 1, "lowest": 1, "denominator": "length", "norm": "l2", "gate": "input"}),
    "softmax_rnn-detached": ("softmax_rnn", {"denominator": "detached", "norm": "layer", "gate": "output"}),
    "softmax_rnn-floor": ("softmax_rnn", {"denominator": "floor", "order": 1, "position": "none"}),
    "rpe_kernel-elu": ("rpe_kernel", {"normalize": False, "feature_map": "elu+1", "max_distance": 9}),
    "rpe_kernel-prf": ("rpe_kernel", {"normalize": False, "max_distance": 100}),
    "monarch_mixer-plain": ("monarch_mixer", {"residual": False, "conv_size": None, "bands": 1}),
    "lightnet-grid": ("lightnet", {"lrpe": "cosine", "tpe": True, "grid": (2, 2, 3), "expand_k": 0.75}),
    "lightnet-rotate": ("lightnet", {"lrpe": "rotate", "tpe": True}),
    "fsmn-stride": ("fsmn", {"lookback_stride": 2, "coefficients": "scalar"}),
    "ttt_linear-transformer": ("ttt_linear", {"share_qk": False, "conv_size": None, "gate": False, "rope_theta": None}),
    "ttt_linear-plain": ("ttt_linear", {"inner_norm": False, "residual": False, "mini_batch": 3}),
    "ttt_linear-token": ("ttt_linear", {"inner_norm": False, "bias": False, "position_scale": False, "mini_batch": 1}),
    "ttt_mlp-plain": ("ttt_mlp", {"position_scale": False, "bias": False, "mini_batch": 1}),
    "titans-context": ("titans", {"variant": "context", "depth": 1, "bias": True, "memory_norm": False}),
    "titans-layer": ("titans", {"variant": "layer", "mini_batch": 3, "memory_norm": False, "forget": False, "persistent": 0}),
    "titans-memory": ("titans", {"variant": "memory", "mini_batch": 5, "activation": "silu", "depth": 3, "expand": 1}),
    "titans-linear": ("titans", {"variant": "memory", "mini_batch": 4, "depth": 1, "conv_size": None, "memory_norm": False}),
    "titans-delta": (
        "titans",
        {"variant": "memory", "mini_batch": 1, "depth": 1, "momentum": False, "forget": False, "memory_norm": False},
    ),
}
GROWING = ("attention", "superlinear", "sea", "lssa", "lssar", "music_relative")  # keep every token's keys and values
BIDIRECTIONAL = {  # tokens see later ones: no state
    "dlr-bidirectional": ("dlr", {"bidirectional": True}),
    "fsmn-lookahead": ("fsmn", {"lookahead": 2, "lookahead_stride": 2}),
    "performer-bidirectional": ("performer", {"bidirectional": True, "kv_heads": 1}),
    "performer-bidirectional-relu": ("performer", {"bidirectional": True, "kernel": "relu"}),
    "rpe_kernel-bidirectional": ("rpe_kernel", {"bidirectional": True, "max_distance": 5}),
    "monarch_mixer-bidirectional": ("monarch_mixer", {"bidirectional": True}),
    "monarch_mixer-bidirectional-plain": ("monarch_mixer", {"bidirectional": True, "residual": False, "max_length": 4}),
    "lightnet-bidirectional": ("lightnet", {"bidirectional": True}),
    "lightnet-bidirectional-grid": ("lightnet", {"bidirectional": True, "lrpe": "rotate", "tpe": True, "grid": (2, 3)}),
}
CASES = {name: (name, {}) for name in list_mixers()} | VARIANTS | BIDIRECTIONAL
every_mixer = pytest.mark.parametrize("case", CASES)
every_causal_mixer = pytest.mark.parametrize("case", [case for case in CASES if case not in BIDIRECTIONAL])
every_bidirectional_mixer = pytest.mark.parametrize("case", BIDIRECTIONAL)


def make(case: str, layer_index: int = 0, num_layers: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A mixer away from its initialisation, so that no part of it is silent (zero projections, unit norms)."""
    name, options = CASES[case]
    torch.manual_seed(0)
    mixer = build_mixer(name, D, HEADS, layer_index=layer_index, num_layers=num_layers, **SMALL.get(name, {}) | options).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def inputs(batch: int, tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(mixer: nn.Module, x: Tensor, state=None, **context):
    """(y, state); None for the state of a mixer that has none."""
    return mixer(x, state, context=Context(return_state=mixer.causal, **context))


def in_parts(mixer: nn.Module, x: Tensor, cuts: list[int], state=None):
    parts = []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        y, state = run(mixer, x[:, start:end], state)
        parts.append(y)
    return torch.cat(parts, 1), state


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_states_agree(actual, expected) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)


@every_causal_mixer
@pytest.mark.parametrize("token", [0, 5, 18])
def test_perturbing_a_token_changes_nothing_before_it(case, token):
    mixer, x = make(case), inputs(2, 19)
    other = x.clone()
    other[:, token] += torch.randn(D, dtype=x.dtype)
    with torch.no_grad():
        y, z = mixer(x)[0], mixer(other)[0]
    assert torch.equal(y[:, :token], z[:, :token])
    assert not torch.equal(y[:, token:], z[:, token:])


@every_causal_mixer
@torch.no_grad()
def test_prefill_and_token_by_token_decode_equal_the_full_pass(case):
    mixer, x = make(case), inputs(2, 12)
    y, state = run(mixer, x)
    z, other = in_parts(mixer, x, list(range(7, 12)))
    assert_close(z, y)
    assert_states_agree(other, state)
    assert_close(mixer(x)[0], y)
    assert mixer(x)[1] is None


@every_causal_mixer
@settings(max_examples=4, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, 19), min_size=1, max_size=3, unique=True).map(sorted))
@torch.no_grad()
def test_any_split_equals_the_full_pass(case, cuts):
    mixer, x = make(case), inputs(1, 20)
    y, state = run(mixer, x)
    z, other = in_parts(mixer, x, cuts)
    assert_close(z, y)
    assert_states_agree(other, state)


@every_causal_mixer
def test_gradients_flow_through_the_state(case):
    mixer, x, weight = make(case), inputs(2, 9), inputs(2, 9, seed=2)
    grads = []
    for cuts in ([], [4]):
        leaf = x.clone().requires_grad_()
        y, _ = in_parts(mixer, leaf, cuts)
        mixer.zero_grad()
        (y * weight).sum().backward()
        grads.append([leaf.grad] + [p.grad for p in mixer.parameters()])
    for whole, split in zip(*grads, strict=True):
        assert_close(split, whole, 1e-9)


@every_mixer
def test_packed_documents_equal_separate_documents(case):
    mixer, lengths = make(case), [5, 1, 0, 7, 2]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x, weight = inputs(1, sum(lengths)), inputs(1, sum(lengths), seed=2)
    y, state = run(mixer, x, cu_seqlens=offsets)
    (y * weight).sum().backward()
    packed = [p.grad for p in mixer.parameters()]
    mixer.zero_grad()
    for row, (start, length) in enumerate(zip(offsets.tolist(), lengths, strict=False)):
        if length == 0:
            continue
        z, alone = run(mixer, x[:, start : start + length])
        assert_close(y[:, start : start + length], z)
        for a, e in zip(state or (), alone or (), strict=True):
            assert_close(a[row, : e.shape[1]] if e.ndim == 4 and a.shape[1] != e.shape[1] else a[row], e[0])
        (z * weight[:, start : start + length]).sum().backward()
    for a, p in zip(packed, mixer.parameters(), strict=True):
        assert_close(a, p.grad, 1e-9)


@every_causal_mixer
@torch.no_grad()
def test_packed_documents_continue_from_their_states(case):
    mixer = make(case)
    first, second = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 2, 3], dtype=torch.int32)
    a, b = inputs(1, 7), inputs(1, 3, seed=2)
    _, state = run(mixer, a, cu_seqlens=first)
    y, _ = run(mixer, b, state, cu_seqlens=second)
    one = mixer(torch.cat((a[:, :3], b[:, :2]), 1))[0][:, 3:]
    two = mixer(torch.cat((a[:, 3:], b[:, 2:]), 1))[0][:, 4:]
    assert_close(y, torch.cat((one, two), 1))


@every_causal_mixer
@torch.no_grad()
def test_states_can_be_reordered_saved_and_resumed(case):
    mixer, x, more = make(case), inputs(3, 6), inputs(3, 4, seed=2)
    rows = torch.tensor([2, 0])
    _, state = run(mixer, x)
    file = io.BytesIO()
    torch.save([part[rows] for part in state], file)
    file.seek(0)
    y, resumed = run(mixer, more[rows], tuple(torch.load(file)))
    z, uninterrupted = run(mixer, torch.cat((x, more), 1))
    assert_close(y, z[rows, 6:])
    assert_states_agree(resumed, [part[rows] for part in uninterrupted])


@every_causal_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@torch.no_grad()
def test_state_spec_describes_the_returned_state(case, dtype):
    mixer = make(case, dtype=dtype)
    _, state = run(mixer, inputs(2, 8).to(dtype))
    spec = mixer.state_spec()
    assert len(spec.names) == len(set(spec.names)) == len(state)
    for part, shape, kind in zip(state, spec.shapes, spec.dtypes, strict=True):
        assert part.shape == (2, *(8 if size is None else size for size in shape))
        assert part.dtype == kind
    assert spec.bytes_per_row(8) == sum(part[0].numel() * part.element_size() for part in state)


@every_causal_mixer
@torch.no_grad()
def test_the_state_of_decoding_has_a_constant_size(case):
    mixer, x = make(case), inputs(1, 1)
    if any(None in shape for shape in mixer.state_spec().shapes):
        assert CASES[case][0] in GROWING
        return
    _, state = run(mixer, inputs(1, 6))
    size = sum(part.numel() for part in state)
    for _ in range(8):
        _, state = run(mixer, x, state)
        assert sum(part.numel() for part in state) == size


@every_mixer
def test_gradients_reach_every_parameter_of_a_stack(case):
    layers = [make(case, layer_index=i, num_layers=3) for i in range(3)]
    context, y = Context(), inputs(2, 9)
    for layer in layers:
        y = y + layer(y, context=context)[0]
    (y * inputs(2, 9, seed=2)).sum().backward()
    for layer in layers:
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name


@every_mixer
def test_gradient_checkpointing_changes_nothing(case):
    """A layer that runs twice finds the values of the layers below it, not those that were left since."""
    layers, grads = [make(case, layer_index=i, num_layers=4) for i in range(4)], []
    for checkpointed in (False, True):
        context, y = Context(), inputs(2, 5)
        for layer in layers:
            layer.zero_grad()
            step = lambda z, layer=layer, context=context: z + layer(z, context=context)[0]
            y = checkpoint(step, y, use_reentrant=False) if checkpointed else step(y)
        (y * inputs(2, 5, seed=2)).sum().backward()
        grads.append([parameter.grad for layer in layers for parameter in layer.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@every_causal_mixer
@torch.no_grad()
def test_a_stack_decodes_as_it_prefills(case):
    layers, x = [make(case, layer_index=i, num_layers=3) for i in range(3)], inputs(2, 6)

    def stack(y, states):
        context, new = Context(return_state=True), []
        for layer, state in zip(layers, states, strict=True):
            z, state = layer(y, state, context=context)
            y, new = y + z, [*new, state]
        return y, new

    whole, _ = stack(x, [None] * 3)
    states, parts = [None] * 3, []
    for t in range(6):
        y, states = stack(x[:, t : t + 1], states)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole)


@every_mixer
@torch.no_grad()
def test_state_dict_restores_the_outputs(case):
    mixer, x = make(case), inputs(1, 5)
    name, options = CASES[case]
    torch.manual_seed(7)
    other = build_mixer(name, D, HEADS, **SMALL.get(name, {}) | options).double()
    assert not torch.equal(other(x)[0], mixer(x)[0])
    other.load_state_dict(mixer.state_dict(), strict=True)
    assert torch.equal(other(x)[0], mixer(x)[0])


@every_mixer
def test_reset_parameters_is_the_whole_initialisation(case):
    name, options = CASES[case]
    with torch.device("meta"):
        fresh = build_mixer(name, D, HEADS, **SMALL.get(name, {}) | options)
    fresh.to_empty(device="cpu")
    for parameter in fresh.parameters():
        parameter.data.fill_(float("nan"))
    fresh.reset_parameters()
    for key, value in fresh.named_parameters():
        assert bool(value.isfinite().all()), key
    assert not list(fresh.buffers())


@every_causal_mixer
@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17])
def test_any_length_is_a_prefix_of_a_longer_one(case, tokens):
    mixer, x = make(case), inputs(1, 65)
    assert_close(mixer(x[:, :tokens])[0], mixer(x)[0][:, :tokens])


@every_mixer
@torch.no_grad()
def test_bfloat16_stays_near_double(case):
    mixer = make(case, dtype=torch.bfloat16)
    x = inputs(2, 17).bfloat16()
    y, state = run(mixer, x)
    z, _ = run(mixer, x[:, :1], state)
    assert y.dtype == z.dtype == torch.bfloat16 and bool(y.isfinite().all()) and bool(z.isfinite().all())
    exact = mixer.double()(x.double())[0]
    assert float((y.double() - exact).norm() / exact.norm()) < 0.1


@every_mixer
def test_autocast_trains(case):
    mixer, x = make(case, dtype=torch.float32), inputs(2, 9).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, state = run(mixer, x)
        y, state = run(mixer, y, state)
    y.float().square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@every_mixer
@torch.no_grad()
def test_declared_bounds_hold_for_large_inputs(case):
    mixer, x = make(case, dtype=torch.float32), 30 * inputs(2, 9).float()
    with linnet.debug():
        assert bool(mixer(x)[0].isfinite().all())


@every_mixer
@pytest.mark.slow
def test_compiles_as_one_graph(case):
    mixer, x = make(case, layer_index=1, num_layers=3), inputs(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, state: run(mixer, x, state), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        (y, state), (z, other) = compiled(x, None), run(mixer, x)
        assert_close(y, z)
        assert_close(compiled(x[:, :1], state)[0], run(mixer, x[:, :1], other)[0])
    leaf = x.clone().requires_grad_()
    compiled(leaf, None)[0].sum().backward()
    assert bool(leaf.grad.abs().max() > 0)


@every_mixer
def test_names_without_weight_decay_exist(case):
    names = {name for layer in (0, 1) for name, _ in make(case, layer_index=layer, num_layers=2).named_parameters()}
    name, options = CASES[case]
    optional = {"bound_logit"} if options.get("lower_bound") == "fixed" else set()
    optional |= {"tpe.decay"} if not options.get("tpe") else set()
    optional |= {"A_imag"} if options.get("init") == "real" else set()
    optional |= {"M_x", "M_z", "M_o"} if options.get("rank", 1) == 1 else set()
    modules = {name.rpartition(".")[0] for name in names}
    modules |= {module.rpartition(".")[0] for module in modules}
    assert set(get_mixer(name).no_weight_decay) - optional <= names | modules


@every_bidirectional_mixer
def test_a_mixer_that_sees_later_tokens_refuses_a_state(case):
    mixer, x = make(case), inputs(1, 9)
    later = x.clone()
    later[:, 4] += 1
    assert not mixer.causal and bool((mixer(later)[0] != mixer(x)[0])[:, :4].any())
    for state, wanted in (((x,), False), (None, True)):
        with pytest.raises(ValueError, match=f"{mixer.name}: option '{mixer.future_option}' must be .* where a state"):
            mixer(x, state, context=Context(return_state=wanted))


@every_bidirectional_mixer
@pytest.mark.parametrize("bad", [float("nan"), 100.0])
def test_a_document_never_sees_another(case, bad):
    """Outputs, and gradients where they are finite."""
    mixer, offsets, results = make(case), torch.tensor([0, 4, 4, 9, 12], dtype=torch.int32), []
    for spoiled in (False, True):
        x = inputs(1, 12)
        if spoiled:
            x[:, 4:9] = bad
        x.requires_grad_()
        y = mixer(x, context=Context(cu_seqlens=offsets))[0][:, [0, 1, 2, 3, 9, 10, 11]]
        dx = torch.autograd.grad(y.square().sum(), x)[0][:, [0, 1, 2, 3, 9, 10, 11]]
        results.append((y, dx))
    (y, dx), (z, dz) = results
    assert torch.equal(y, z) and (torch.equal(dx, dz) or bad != 100.0)


@every_causal_mixer
def test_a_state_of_another_layout_is_refused(case):
    with pytest.raises(ValueError, match="'state' must be a tuple .* got 7 tensors"):
        make(case)(inputs(1, 1), (inputs(1, 1),) * 7)


BAD = {
    "s4d": [
        ({"d_state": 5}, "d_state"), ({"init": "random"}, "init"), ({"discretization": "euler"}, "discretization"),
        ({"dt_max": 1e-4}, "dt_max"), ({"output": "relu"}, "output"), ({"mode": "fft"}, "mode"),
    ],
    "dlr": [
        ({"d_state": 0}, "d_state"), ({"kernel": "prod"}, "kernel"), ({"dt_min": 0}, "dt_min"),
        ({"bidirectional": True, "mode": "recurrent"}, "mode"),
    ],
    "lssl": [
        ({"d_state": 0}, "d_state"), ({"channels": 0}, "channels"), ({"discretization": "euler"}, "discretization"),
        ({"dt_max": 1e-4}, "dt_max"), ({"mode": "fft"}, "mode"),
    ],
    "mamba3": [
        ({"groups": 3}, "groups"), ({"heads": 5}, "heads"), ({"head_dim": 7}, "head_dim"), ({"rank": 0}, "rank"),
        ({"rope_fraction": 0.3}, "rope_fraction"), ({"rope_fraction": 1.5}, "rope_fraction"), ({"d_state": 7}, "d_state"),
        ({"pairing": "thirds"}, "pairing"), ({"decay": "exp"}, "decay"), ({"A_floor": 0}, "A_floor"),
    ],
    "al_rnn": [({"units": 0}, "units"), ({"relu_units": 17}, "relu_units"), ({"relu_units": -1}, "relu_units")],
    "rg_lru": [
        ({"heads": 3}, "heads"), ({"heads": 0}, "heads"), ({"expand": 1.03}, "expand"), ({"radius": (0.5, 1)}, "radius"),
        ({"c": 0}, "c"), ({"start": "c"}, "start"), ({"first_token": "one"}, "first_token"), ({"conv_size": 0}, "conv_size"),
    ],
    "mlstm_block": [
        ({"heads": 3}, "heads"), ({"heads": 0}, "heads"), ({"block_size": 5}, "block_size"), ({"normalizer": None}, "normalizer"),
        ({"input_gate": "relu"}, "input_gate"), ({"soft_cap": 0}, "soft_cap"), ({"expand": 0.3}, "expand"),
    ],
    "slstm": [({"heads": 3}, "heads"), ({"conv_size": 0}, "conv_size"), ({"norm_eps": 0}, "norm_eps")],
    "lru": [
        ({"radius": (0.5, 1.5)}, "radius"), ({"radius": 0.5}, "radius"),
        ({"d_state": 0}, "d_state"), ({"output": "relu"}, "output"),
    ],
    "fsmn": [
        ({"lookback": 0}, "lookback"), ({"lookahead": -1}, "lookahead"), ({"expand": 1.03}, "expand"),
        ({"coefficients": "matrix"}, "coefficients"), ({"lookback_stride": 0}, "lookback_stride"),
    ],
    "mom": [
        ({"memories": 1}, "memories"), ({"top_k": 5}, "top_k"), ({"top_k": 1}, "renormalize"),
        ({"recurrence": "lstm"}, "recurrence"),
        ({"balance": -1}, "balance"), ({"heads": 3}, "heads"), ({"expand_v": 0.3}, "expand_v"),
        ({"shared_memory": 1}, "shared_memory"),
    ],
    "sse": [
        ({"partitions": 1}, "partitions"), ({"top_k": 5}, "top_k"), ({"gate": "none"}, "gate"), ({"key_map": "relu"}, "key_map"),
        ({"key_rows": 9}, "key_rows"), ({"key_rows": 2, "recurrence": "deltanet"}, "key_rows"), ({"balance": -1}, "balance"),
        ({"heads": 3}, "heads"), ({"expand_v": 0.3}, "expand_v"),
    ],
    "sse_hybrid": [
        ({"attention_every": 1}, "attention_every"), ({"attention_heads": 3}, "attention_heads"), ({"kv_heads": 3}, "kv_heads"),
        ({"window": 0}, "window"), ({"position": "alibi"}, "position"), ({"partitions": 1}, "partitions"),
    ],
    "attention": [
        ({"heads": 3}, "heads"), ({"kv_heads": 3, "heads": 4}, "kv_heads"), ({"window": 0}, "window"),
        ({"position": "alibi"}, "position"), ({"rotary_dim": 3}, "rotary_dim"), ({"head_dim": 5}, "head_dim"),
        ({"rope_theta": -1.0}, "rope_theta"), ({"norm_eps": 0}, "norm_eps"),
    ],
    "linear_transformer": [
        ({"feature_map": "exp"}, "feature_map"), ({"normalizer": "floor"}, "normalizer"),
        ({"kv_heads": 3}, "kv_heads"), ({"expand_k": 0.3}, "expand_k"),
    ],
    "retnet": [
        ({"decay": "slow"}, "decay"), ({"decay": (-1.0,)}, "decay"), ({"decay": (0.1, -0.1)}, "decay"),
        ({"position": "xpos"}, "position"), ({"gate": "relu"}, "gate"), ({"expand_k": 0.375}, "expand_k"),
        ({"expand_v": 0.2}, "expand_v"), ({"norm": "layer"}, "norm"),
    ],
    "gla": [
        ({"expand_k": 0}, "expand_k"), ({"temperature": -1}, "temperature"), ({"decay_min": 1.0}, "decay_min"),
        ({"conv_size": 0}, "conv_size"), ({"gate_rank": 0}, "gate_rank"), ({"allow_neg_eigval": 1}, "allow_neg_eigval"),
    ],
    "mamba": [
        ({"d_state": 0}, "d_state"), ({"dt_max": 0.0001}, "dt_max"), ({"dt_init": "zero"}, "dt_init"),
        ({"expand": 1.03}, "expand"), ({"dt_rank": -1}, "dt_rank"), ({"allow_neg_eigval": 2}, "allow_neg_eigval"),
        ({"norm_eps": 0}, "norm_eps"),
    ],
    "mamba2": [
        ({"groups": 3}, "groups"), ({"heads": 5}, "heads"), ({"head_dim": 7}, "head_dim"),
        ({"dt_limit": (1.0, 0.5)}, "dt_limit"), ({"A_range": None}, "A_range"), ({"norm_groups": 3}, "norm_groups"),
    ],
    "hgrn": [
        ({"lower_bound": "high"}, "lower_bound"), ({"output": "plain"}, "output"), ({"expand": -1}, "expand"),
        ({"conv_size": 2.5}, "conv_size"),
        ({"complex": 1}, "complex"),
    ],
    "deltanet": [
        ({"qk_norm": "rms"}, "qk_norm"), ({"qk_norm": "sum"}, "feature_map"), ({"expand_v": 0.3}, "expand_v"),
        ({"heads": 3}, "expand_k"),
    ],
    "gated_deltanet": [
        ({"value_heads": 3}, "value_heads"), ({"head_dim": 0}, "head_dim"), ({"expand_v": 1.3}, "expand_v"),
        ({"A_range": (2, 1)}, "A_range"),
    ],
    "kda": [
        ({"decay_gate": "exp"}, "decay_gate"), ({"decay_min": 0.0}, "decay_min"), ({"gate": "relu"}, "gate"),
        ({"value_heads": 3}, "value_heads"), ({"heads": 3}, "heads"),
    ],
    "gated_deltanet2": [({"value_heads": 3}, "value_heads"), ({"decay_gate": "exp"}, "decay_gate")],
    "kaczmarz": [({"key_eps": 0}, "key_eps"), ({"value_heads": 3}, "value_heads")],
    "comba": [({"feedback_init": "one"}, "feedback_init"), ({"A_range": (2, 1)}, "A_range")],
    "gated_deltaproduct": [({"householder_steps": 0}, "householder_steps"), ({"head_dim": 0}, "head_dim")],
    "deltaproduct": [({"householder_steps": 1.5}, "householder_steps")],
    "osdn": [
        ({"forgetting": "slow"}, "forgetting"), ({"decay": "channel"}, "decay"), ({"keep": 1.0}, "keep"), ({"rate": 0}, "rate"),
        ({"precondition_max": -1}, "precondition_max"), ({"heads": 3}, "heads"),
    ],
    "preconditioned_deltanet": [({"precondition_max": 1.0}, "precondition_max"), ({"center_init": "zero"}, "center_init")],
    "mesa": [({"cg_steps": 0}, "cg_steps"), ({"ridge_init": 0.1}, "ridge_init"), ({"heads": 3}, "heads")],
    "rls": [({"keep": 1.5}, "keep"), ({"ridge_min": 0}, "ridge_min"), ({"expand_v": 0.3}, "expand_v")],
    "dplr": [({"tied": 1}, "tied"), ({"heads": 3}, "heads")],
    "rwkv7": [
        ({"heads": 3}, "heads"), ({"head_dim": 4}, "head_dim"), ({"gate_rank": 0}, "gate_rank"),
        ({"value_residual": 1}, "value_residual"),
    ],
    "hedgehog": [
        ({"feature_map": "elu+1"}, "feature_map"), ({"tied": True, "kv_heads": 1}, "tied"), ({"kv_heads": 3}, "kv_heads"),
        ({"normalizer_eps": -1.0}, "normalizer_eps"), ({"heads": 3}, "heads"), ({"map_bias": 2}, "map_bias"),
    ],
    "t2r": [({"feature_size": 0}, "feature_size"), ({"tied": True, "kv_heads": 1}, "tied"), ({"head_dim": 0}, "head_dim")],
    "performer": [
        ({"num_features": 0}, "num_features"), ({"kernel": "cos"}, "kernel"), ({"row_norms": "one"}, "row_norms"),
        ({"feature_eps": 0}, "feature_eps"), ({"seed": -1}, "seed"), ({"bidirectional": 1}, "bidirectional"),
    ],
    "based": [({"feature_size": 0}, "feature_size"), ({"bias": "no"}, "bias")],
    "rebased": [({"feature_size": 2.5}, "feature_size"), ({"tied": 1}, "tied"), ({"norm_eps": 0}, "norm_eps")],
    "cosformer": [({"max_length": 0}, "max_length")],
    "lightning": [
        ({"decay": "retnet"}, "decay"), ({"position": "rope"}, "position"), ({"head_dim": 3}, "position"),
        ({"norm": "head"}, "norm"), ({"heads": 3}, "heads"), ({"value_activation": None}, "value_activation"),
        ({"gate": "silu"}, "gate"),
    ],
    "gsa": [
        ({"slots": 0}, "slots"), ({"temperature": 0}, "temperature"), ({"feature_map": "exp"}, "feature_map"),
        ({"expand_k": 0.3}, "expand_k"), ({"heads": 3}, "expand_k"),
    ],
    "hgrn2": [
        ({"lower_bound": "high"}, "lower_bound"), ({"q_activation": "tanh"}, "q_activation"), ({"norm": "group"}, "norm"),
        ({"heads": 3}, "heads"), ({"scale": 0}, "scale"),
    ],
    "rwkv6": [
        ({"heads": 3}, "heads"), ({"head_dim": 4}, "head_dim"), ({"shift_rank": 0}, "shift_rank"), ({"norm_eps": 0}, "norm_eps"),
    ],
    "transnormer": [
        ({"attention": "both"}, "attention"), ({"block_size": 1}, "block_size"), ({"feature_map": "exp"}, "feature_map"),
        ({"norm": "group"}, "norm"), ({"heads": 3}, "heads"),
    ],
    "superlinear": [
        ({"heads": 3}, "heads"), ({"spans": 0}, "spans"), ({"window_stripes": 0}, "window_stripes"), ({"backward": -1}, "backward"),
        ({"search_power": 1.0}, "search_power"), ({"position": "alibi"}, "position"), ({"head_dim": 5}, "position"),
        ({"A_range": (2, 1)}, "A_range"),
    ],
    "sea": [
        ({"cells": 6}, "cells"), ({"top_keys": 0}, "top_keys"), ({"prior": 1}, "prior"), ({"position_size": 3}, "position_size"),
        ({"kv_heads": 3}, "kv_heads"), ({"seed": -1}, "seed"),
    ],
    "lssa": [({"power": 0.5}, "power"), ({"offset": -1}, "offset"), ({"heads": 3}, "heads")],
    "lssar": [({"power": 0}, "power"), ({"rope_theta": 0}, "rope_theta")],
    "music_relative": [({"max_distance": 0}, "max_distance"), ({"beyond": "wrap"}, "beyond"), ({"shared": 1}, "shared")],
    "wersa": [
        ({"heads": 3}, "heads"), ({"levels": 0}, "levels"), ({"bidirectional": True, "conv_size": 4}, "conv_size"),
        ({"normalizer_eps": 0}, "normalizer_eps"),
    ],
    "rwkv4": [({"expand": 0}, "expand"), ({"expand": 1.03}, "expand")],
    "lightnet": [
        ({"heads": 3}, "expand_k"), ({"gate": "relu"}, "gate"), ({"gate_rank": 0}, "gate_rank"), ({"lrpe": "sine"}, "lrpe"),
        ({"lrpe": "cosine", "grid": (2, 2, 2)}, "lrpe"), ({"grid": (3,)}, "grid"), ({"grid": (3, 0)}, "grid"), ({"tpe": 1}, "tpe"),
    ],
    "softmax_rnn": [
        ({"order": 0}, "order"), ({"lowest": 3}, "lowest"), ({"feature_size": 3}, "feature_size"),
        ({"denominator": "max"}, "denominator"), ({"gate": "cell"}, "gate"), ({"norm": "batch"}, "norm"),
        ({"position": "alibi"}, "position"), ({"kv_heads": 3}, "kv_heads"),
    ],
    "rpe_kernel": [
        ({"max_distance": 0}, "max_distance"), ({"feature_map": "exp"}, "feature_map"), ({"num_features": 0}, "num_features"),
        ({"temperature": 0}, "temperature"), ({"heads": 3}, "heads"), ({"bidirectional": 1}, "bidirectional"),
        ({"normalizer_eps": -1.0}, "normalizer_eps"),
    ],
    "monarch_mixer": [
        ({"max_length": 1}, "max_length"), ({"filter_size": 0}, "filter_size"), ({"bands": 0}, "bands"),
        ({"frequency": 0}, "frequency"), ({"conv_size": 0}, "conv_size"), ({"residual": None}, "residual"),
        ({"bidirectional": "both"}, "bidirectional"),
    ],
    "ttt_linear": [
        ({"heads": 3}, "heads"), ({"heads": 16}, "heads"), ({"mini_batch": 0}, "mini_batch"), ({"base_lr": 0}, "base_lr"),
        ({"conv_size": None}, "share_qk"), ({"gate": None}, "gate"), ({"rope_theta": -1.0}, "rope_theta"),
    ],
    "ttt_mlp": [({"expand": 0}, "expand"), ({"norm_eps": 0}, "norm_eps"), ({"inner_norm": 2}, "inner_norm")],
    "titans": [
        ({"variant": "branch"}, "variant"), ({"heads": 3}, "heads"), ({"heads": 16}, "heads"), ({"depth": 0}, "depth"),
        ({"variant": "context", "mini_batch": 3}, "mini_batch"), ({"window": 1}, "window"), ({"persistent": -1}, "persistent"),
        ({"rate_max": 0}, "rate_max"), ({"activation": "relu"}, "activation"), ({"momentum": 0.9}, "momentum"),
    ],
    "mlstm": [
        ({"input_gate": "relu"}, "input_gate"), ({"normalizer": None}, "normalizer"), ({"soft_cap": 0}, "soft_cap"),
        ({"expand_k": 0.3}, "expand_k"), ({"expand_v": 0.3}, "expand_v"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name,options,option", [(name, o, named) for name, rows in BAD.items() for o, named in rows])
def test_bad_options_are_refused_by_name(name, options, option):
    with pytest.raises(ValueError, match=f"{name}: option '{option}' must be .*; got "):
        mixer_config(name, D, **{"heads": HEADS} | options)


@pytest.mark.parametrize("name", list_mixers())
def test_bad_sizes_and_unknown_options_are_refused(name):
    assert name in BAD, "a new mixer lists its bad options here"
    with pytest.raises(ValueError, match=f"{name}: option 'd_model' must be an integer >= 1; got 0"):
        mixer_config(name, 0, HEADS)
    with pytest.raises(ValueError, match="option must be one of .*; got 'colour'"):
        mixer_config(name, D, HEADS, colour=1)


@every_mixer
def test_configs_survive_json(case):
    name, options = CASES[case]
    config = mixer_config(name, D, HEADS, **options)
    assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


NARROW = {"slstm": 1.9, "al_rnn": 2.9, "s4d": 2.2, "lssl": 1.1, "based": 2.2, "rebased": 2.2, "softmax_rnn": 2.2}  # narrow q, k
WIDE = {"mom": 13.2}  # a key and value projection per memory, of which a token uses top_k and the shared one


@pytest.mark.parametrize("name", list_mixers())
def test_default_sizes_are_near_the_published_ratio(name):
    """4 to 8 d^2 parameters in the published layers, at a width where the low ranks do not dominate."""
    count = sum(p.numel() for p in build_mixer(name, 512, 4).parameters())
    assert NARROW.get(name, 3.5) < count / 512**2 < WIDE.get(name, 8.5)
