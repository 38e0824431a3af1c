"""Layers of transformers, computed by their own PyTorch path, against the mixers with the same weights.

Each `*_weights` function maps the parameters of a transformers layer to those of the mixer. Compared in fp32: the output, the
gradient of the input, and the output of prefill and token-by-token decode.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from linnet.mixers import Context, build_mixer

RECENT = ("bailing_hybrid",)  # absent from transformers 5.17
B, T, D = 2, 70, 32  # T crosses the chunk of 64 that transformers uses


def layer_of(module: str, name: str, config: str, index: int | None = 0, **options):
    """A transformers layer with random weights, norms away from 1, in evaluation mode."""
    if module in RECENT and importlib.util.find_spec(f"transformers.models.{module}") is None:
        pytest.skip(f"this transformers has no {module}")
    models = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    settings = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), config)(**options)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = getattr(models, name)(settings, *([] if index is None else [index])).eval()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if "norm" in key:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif "A_log" in key:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 4).log())
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return layer, settings, models


def linear(source: dict[str, Tensor], target: str, name: str) -> dict[str, Tensor]:
    """Parameters of the Linear `name` under a new name, with the bias where there is one."""
    return {f"{target}.{part}": source[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in source}


def conv(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Conv1d [C, 1, W] -> [C, W]."""
    return {
        key.replace("conv1d", "conv"): x.squeeze(1) if x.ndim == 3 else x for key, x in source.items() if key.startswith("conv1d")
    }


def check(theirs, mixer: nn.Module, weights: dict[str, Tensor], tolerance: float = 1e-4, dtype=torch.float32) -> None:
    """`theirs(x)` == the mixer with `weights`, relative to the largest output, and likewise for the input's gradient."""
    mixer.to(dtype).load_state_dict(weights, strict=True)
    x = torch.randn(B, T, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    probe = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for layer in (theirs, lambda leaf: mixer(leaf)[0]):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * probe).sum().backward()
        results.append((y.detach(), leaf.grad))
    with torch.no_grad():
        y, state = mixer(x[:, : T - 6], context=Context(return_state=True))
        parts = [y]
        for t in range(T - 6, T):
            y, state = mixer(x[:, t : t + 1], state, context=Context(return_state=True))
            parts.append(y)
    for name, ours, expected in (
        ("output", results[1][0], results[0][0]),
        ("input gradient", results[1][1], results[0][1]),
        ("decoded output", torch.cat(parts, 1), results[0][0]),
    ):
        error = float((ours - expected).abs().max() / expected.abs().max())
        assert error < tolerance, f"{name}: relative error {error:.2e}"


# ---- state-space models --------------------------------------------------------------------------------------------------


def mamba_weights(source: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    return conv(source) | {key: x for key, x in source.items() if key.split(".")[0] in (*names, "A_log", "D")}


@pytest.mark.parametrize("bias", [False, True])
def test_mamba(bias):
    layer, _, _ = layer_of(
        "mamba", "MambaMixer", "MambaConfig", hidden_size=D, state_size=8, num_hidden_layers=2, use_bias=bias, time_step_rank=3
    )
    check(layer, build_mixer("mamba", D, d_state=8, bias=bias, dt_rank=3), mamba_weights(layer.state_dict()))


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups):
    layer, _, _ = layer_of(
        "mamba2", "Mamba2Mixer", "Mamba2Config", hidden_size=D, num_heads=4, head_dim=16, state_size=8, n_groups=groups,
        num_hidden_layers=2, chunk_size=16, use_bias=True, time_step_limit=(0.0, 2.0), vocab_size=8,
    )  # fmt: skip
    blocks = 2 * D // getattr(layer.norm, "group_size", 2 * D)  # transformers 5.17 has one block for any number of groups
    mixer = build_mixer("mamba2", D, 4, d_state=8, groups=groups, norm_groups=blocks, bias=True, dt_limit=(0.0, 2.0))
    source = layer.state_dict()
    check(layer, mixer, conv(source) | {key: x for key, x in source.items() if not key.startswith("conv1d")})


def test_falcon_mamba():
    layer, settings, _ = layer_of(
        "falcon_mamba", "FalconMambaBlock", "FalconMambaConfig", hidden_size=D, state_size=8, num_hidden_layers=2,
        time_step_rank=3, vocab_size=8,
    )  # fmt: skip
    mixer = build_mixer("mamba", D, d_state=8, dt_rank=3, norm_eps=settings.mixer_rms_eps)
    check(layer.mixer, mixer, mamba_weights(layer.mixer.state_dict()))
    with pytest.raises(AssertionError, match="relative error"):  # without its norms it is another layer
        check(layer.mixer, build_mixer("mamba", D, d_state=8, dt_rank=3), mamba_weights(layer.mixer.state_dict()))


# ---- delta rule ----------------------------------------------------------------------------------------------------------


def qwen3_next_weights(source: dict[str, Tensor], key_heads: int, value_heads: int, K: int, V: int) -> dict[str, Tensor]:
    """Qwen3-Next stores q, k, v, z (and b, a) interleaved per key head."""
    each = value_heads // key_heads
    q, k, v, z = source["in_proj_qkvz.weight"].unflatten(0, (key_heads, -1)).split((K, K, each * V, each * V), 1)
    b, a = source["in_proj_ba.weight"].unflatten(0, (key_heads, -1)).split((each, each), 1)
    flat = {"q_proj": q, "k_proj": k, "v_proj": v, "g_proj": z, "b_proj": b, "a_proj": a}
    return (
        {f"{name}.weight": x.flatten(0, 1) for name, x in flat.items()}
        | conv(source)
        | {"A_log": source["A_log"], "dt_bias": source["dt_bias"], "o_norm.weight": source["norm.weight"]}
        | linear(source, "o_proj", "out_proj")
    )


@pytest.mark.parametrize("value_heads", [2, 4])
def test_qwen3_next_gated_deltanet(value_heads):
    layer, settings, _ = layer_of(
        "qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextConfig", hidden_size=D, linear_num_key_heads=2, num_hidden_layers=4,
        linear_num_value_heads=value_heads, linear_key_head_dim=8, linear_value_head_dim=12,
    )  # fmt: skip
    mixer = build_mixer("gated_deltanet", D, 2, value_heads=value_heads, head_dim=8, value_dim=12, norm_eps=settings.rms_norm_eps)
    check(layer, mixer, qwen3_next_weights(layer.state_dict(), 2, value_heads, 8, 12))


def qwen3_5_weights(source: dict[str, Tensor], keys: int, values: int) -> dict[str, Tensor]:
    """Qwen3.5 stores q, k, v in one projection, each whole; z, b, a have their own."""
    q, k, v = source["in_proj_qkv.weight"].split((keys, keys, values))
    weights = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_norm.weight": source["norm.weight"]}
    for ours, theirs in {"g_proj": "in_proj_z", "b_proj": "in_proj_b", "a_proj": "in_proj_a", "o_proj": "out_proj"}.items():
        weights |= linear(source, ours, theirs)
    return weights | conv(source) | {"A_log": source["A_log"], "dt_bias": source["dt_bias"]}


@pytest.mark.parametrize("value_heads", [2, 4])
def test_qwen3_5_gated_deltanet(value_heads):
    layer, settings, _ = layer_of(
        "qwen3_5", "Qwen3_5GatedDeltaNet", "Qwen3_5TextConfig", hidden_size=D, linear_num_key_heads=2, num_hidden_layers=4,
        linear_num_value_heads=value_heads, linear_key_head_dim=8, linear_value_head_dim=12,
    )  # fmt: skip
    mixer = build_mixer("gated_deltanet", D, 2, value_heads=value_heads, head_dim=8, value_dim=12, norm_eps=settings.rms_norm_eps)
    check(layer, mixer, qwen3_5_weights(layer.state_dict(), 2 * 8, value_heads * 12))


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("value_heads", [2, 4])
def test_olmo_hybrid_gated_deltanet(value_heads, negative):
    layer, _, _ = layer_of(
        "olmo_hybrid", "OlmoHybridGatedDeltaNet", "OlmoHybridConfig", hidden_size=D, num_attention_heads=2, num_hidden_layers=2,
        linear_num_key_heads=2, linear_num_value_heads=value_heads, linear_key_head_dim=8, linear_value_head_dim=16,
        linear_allow_neg_eigval=negative, layer_types=["linear_attention", "full_attention"], vocab_size=8, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    mixer = build_mixer("gated_deltanet", D, 2, value_heads=value_heads, head_dim=8, allow_neg_eigval=negative, norm_eps=1e-5)
    source = layer.state_dict()
    check(layer, mixer, conv(source) | {key: x for key, x in source.items() if not key.startswith("conv1d")})


def kimi_linear_weights(source: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    weights = conv(source) | {
        "A_log": source["forget_gate.A_log"].view(heads),
        "dt_bias": source["forget_gate.dt_bias"].view(heads, -1),
        "o_norm.weight": source["o_norm.weight"],
    }
    for name in ("q_proj", "k_proj", "v_proj", "b_proj", "o_proj"):
        weights |= linear(source, name, name)
    weights |= linear(source, "f_proj.down", "forget_gate.f_a_proj") | linear(source, "f_proj.up", "forget_gate.f_b_proj")
    return weights | linear(source, "g_proj.down", "g_a_proj") | linear(source, "g_proj.up", "g_b_proj")


def test_kimi_linear_delta_attention():
    layer, settings, _ = layer_of(
        "kimi_linear", "KimiLinearDeltaAttention", "KimiLinearConfig", hidden_size=D, linear_num_heads=4, linear_head_dim=8,
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], pad_token_id=0,
        bos_token_id=0, eos_token_id=0, vocab_size=8,
    )  # fmt: skip
    mixer = build_mixer("kda", D, 4, gate_bias=False, norm_eps=settings.rms_norm_eps)
    check(layer, mixer, kimi_linear_weights(layer.state_dict(), 4))


def bailing_hybrid_weights(source: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    weights = conv(source) | {
        "A_log": source["forget_gate.A_log"].view(heads),
        "dt_bias": source["forget_gate.dt_bias"].view(heads, -1),
        "o_norm.weight": source["o_norm.weight"],
    }
    for name in ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "o_proj"):
        weights |= linear(source, name, name)
    return weights | linear(source, "f_proj", "forget_gate.f_proj")


@pytest.mark.parametrize("safe", [True, False])
def test_bailing_hybrid_delta_attention(safe):
    layer, settings, _ = layer_of(
        "bailing_hybrid", "BailingHybridDeltaAttention", "BailingHybridConfig", hidden_size=D, linear_num_heads=4,
        linear_head_dim=8, num_hidden_layers=2, kda_safe_gate=safe, kda_lower_bound=-5.0, vocab_size=8,
        pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    mixer = build_mixer(
        "kda", D, 4, decay_gate="safe" if safe else "softplus", decay_min=-5.0, gate_rank=0, gate_bias=False,
        norm_eps=settings.rms_norm_eps,
    )  # fmt: skip
    check(layer, mixer, bailing_hybrid_weights(layer.state_dict(), 4))


# ---- constant decay ------------------------------------------------------------------------------------------------------


def minimax_weights(source: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """MiniMax stores q, k, v interleaved per head."""
    qkv = source["qkv_proj.weight"].unflatten(0, (heads, 3, -1)).unbind(1)
    weights = {f"{name}_proj.weight": x.flatten(0, 1) for name, x in zip("qkv", qkv, strict=True)}
    return (
        weights
        | linear(source, "g_proj", "output_gate")
        | linear(source, "o_proj", "out_proj")
        | {"o_norm.weight": source["norm.weight"]}
    )


@pytest.mark.parametrize("index", [0, 2])
def test_minimax_lightning_attention(index):
    layer, _, _ = layer_of(
        "minimax", "MiniMaxLightningAttention", "MiniMaxConfig", index, hidden_size=D, num_attention_heads=4, head_dim=8,
        num_hidden_layers=4, block_size=16, layer_types=["linear_attention"] * 4, num_key_value_heads=4, vocab_size=8,
    )  # fmt: skip
    mixer = build_mixer(
        "retnet", D, 4, layer_index=index, num_layers=4, expand_v=1, decay="alibi", position="none", activation="silu", scale=1.0,
        norm="full", norm_affine=True, norm_eps=1e-6, gate="sigmoid",
    )  # fmt: skip
    check(lambda x: layer(x, None, None)[0], mixer, minimax_weights(layer.state_dict(), 4))


@pytest.mark.parametrize("index", [0, 2])
def test_minimax_is_lightning(index):
    layer, _, _ = layer_of(
        "minimax", "MiniMaxLightningAttention", "MiniMaxConfig", index, hidden_size=D, num_attention_heads=4, head_dim=8,
        num_hidden_layers=4, block_size=16, layer_types=["linear_attention"] * 4, num_key_value_heads=4, vocab_size=8,
    )  # fmt: skip
    mixer = build_mixer(
        "lightning", D, 4, layer_index=index, num_layers=4, decay="alibi", position="none", value_activation=True, norm="rms",
        gate="sigmoid",
    )  # fmt: skip
    check(lambda x: layer(x, None, None)[0], mixer, minimax_weights(layer.state_dict(), 4))


# ---- gated recurrences ---------------------------------------------------------------------------------------------------


def rwkv_weights(source: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    weights = {f"mu.{name[0]}": source[f"time_mix_{name}"].flatten() for name in ("key", "value", "receptance")}
    weights |= {"decay": source["time_decay"], "u": source["time_first"]}
    return weights | {f"{ours}.weight": source[f"{theirs}.weight"] for ours, theirs in names.items()}


def test_rwkv4():
    layer, _, _ = layer_of(
        "rwkv", "RwkvSelfAttention", "RwkvConfig", hidden_size=D, attention_hidden_size=48, num_hidden_layers=2, context_length=T
    )
    check(lambda x: layer(x)[0], build_mixer("rwkv4", D, expand=1.5), rwkv_weights(layer.state_dict()))


def recurrent_gemma_weights(source: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = {"conv.weight": source["conv_1d.weight"].squeeze(1), "conv.bias": source["conv_1d.bias"]}
    for theirs, ours in (("linear_x", "x_proj"), ("linear_y", "y_proj"), ("linear_out", "o_proj")):
        weights |= linear(source, ours, theirs)
    for theirs, ours in (("input_gate", "i"), ("recurrent_gate", "r")):
        weights |= {f"W_{ours}": source[f"rg_lru.{theirs}_weight"], f"b_{ours}": source[f"rg_lru.{theirs}_bias"]}
    return weights | {"Lambda": source["rg_lru.recurrent_param"]}


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("width", [D, 48])
def test_recurrent_gemma(dtype, tolerance, width):
    layer, _, _ = layer_of(
        "recurrent_gemma", "RecurrentGemmaRecurrentBlock", "RecurrentGemmaConfig", hidden_size=D, lru_width=width,
        num_attention_heads=4, num_hidden_layers=2, vocab_size=8,
    )  # fmt: skip
    layer.to(dtype)
    layer.rg_lru._rnn_scan = partial(layer.rg_lru._rnn_scan, acc_dtype=dtype)
    positions = torch.arange(T).expand(B, -1)
    mixer = build_mixer("rg_lru", D, 4, expand=width / D, first_token="unit")
    weights = recurrent_gemma_weights(layer.state_dict())
    check(lambda x: layer(x, positions, None, use_cache=False)[0], mixer, weights, tolerance, dtype)


def xlstm_weights(source: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"q": "q", "k": "k", "v": "v", "ogate_preact": "g_proj", "igate_preact": "i_proj", "fgate_preact": "f_proj"}
    weights = {"o_norm.weight": source["multihead_norm.weight"]} | linear(source, "o_proj", "out_proj")
    for theirs, ours in names.items():
        weights |= linear(source, ours if ours.endswith("proj") else f"{ours}_proj", theirs)
    return weights


def test_xlstm():
    layer, settings, _ = layer_of(
        "xlstm", "xLSTMLayer", "xLSTMConfig", None, hidden_size=D, num_heads=2, num_hidden_layers=2, chunk_size=16, vocab_size=8,
        autocast_kernel_dtype="float32",
    )  # fmt: skip
    mixer = build_mixer("mlstm", D, 2, norm_eps=settings.norm_eps)
    check(lambda x: layer(x)[0], mixer, xlstm_weights(layer.state_dict()))


# ---- softmax attention ---------------------------------------------------------------------------------------------------


def attention_weights(source: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(source)


def qwen3_next_attention_weights(source: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Query and output gate share one projection, interleaved per head; norm weights are stored minus 1."""
    q, g = source["q_proj.weight"].unflatten(0, (heads, 2, -1)).unbind(1)
    norms = {f"{name}_norm.weight": 1 + source[f"{name}_norm.weight"] for name in "qk"}
    return source | {"q_proj.weight": q.flatten(0, 1), "g_proj.weight": g.flatten(0, 1)} | norms


@pytest.mark.parametrize(
    "module,prefix,theirs,ours",
    [
        ("llama", "Llama", {}, {}),
        ("llama", "Llama", {"attention_bias": True}, {"bias": True}),
        ("qwen2", "Qwen2", {}, {"bias": True, "out_bias": False}),
        ("qwen3", "Qwen3", {}, {"qk_norm": True}),
        (
            "qwen3",
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
            {"qk_norm": True, "window": 7},
        ),
        ("qwen3_next", "Qwen3Next", {"partial_rotary_factor": 0.25}, {"qk_norm": True, "gate": True, "rotary_dim": 2}),
    ],
    ids=["llama", "llama-bias", "qwen2", "qwen3", "qwen3-window", "qwen3_next"],
)
def test_softmax_attention(module, prefix, theirs, ours):
    rope = {"rope_type": "default", "rope_theta": 500.0} | {k: v for k, v in theirs.items() if k == "partial_rotary_factor"}
    layer, settings, models = layer_of(
        module, f"{prefix}Attention", f"{prefix}Config", hidden_size=D, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, rope_parameters=rope, vocab_size=8, **{k: v for k, v in theirs.items() if k not in rope},
    )  # fmt: skip
    rotary = getattr(models, f"{prefix}RotaryEmbedding")(settings)
    age = torch.arange(T)[:, None] - torch.arange(T)
    mask = torch.zeros(T, T).masked_fill((age < 0) | (age >= ours.get("window", T)), torch.finfo(torch.float32).min)

    def attention(x):
        positions = torch.arange(T).expand(B, -1)
        return layer(x, position_embeddings=rotary(x, positions), attention_mask=mask.expand(B, 1, -1, -1))[0]

    source = layer.state_dict()
    weights = qwen3_next_attention_weights(source, 4) if module == "qwen3_next" else attention_weights(source)
    check(attention, build_mixer("attention", D, 4, kv_heads=2, head_dim=8, rope_theta=500.0, **ours), weights)
