"""What is installed, what runs here, and why: `linnet.info()`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
from typing import Any

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "datasets",
    "safetensors",
    "peft",
    "triton",
    "matplotlib",
    "tensorboard",
)


def info() -> dict[str, Any]:
    """Versions, devices, mixers, and for every operator the backend that a typical call would run on, with reasons.

    Returns a dict with the keys `versions`, `devices`, `mixers` and `operators`; the latter maps a name to
    {"runs": {device: backend}, "backends": {backend: {device: None, or why it cannot run there}}}.
    """
    return {"versions": _versions(), "devices": _devices(), "mixers": _mixers(), "operators": _operators()}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "linnet": importlib.import_module("linnet").__version__,
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return devices


def _mixers() -> dict[str, str]:
    """Name -> first line of the docstring of the mixer's file, which says what it is."""
    import sys

    from linnet.mixers import get_mixer, list_mixers

    documented = {name: sys.modules[get_mixer(name).__module__].__doc__ or "" for name in list_mixers()}
    return {name: text.strip().partition("\n")[0] for name, text in documented.items()}


class _Recorded(Exception):
    """Carries the checked arguments of an operator call out of the handler, before anything is computed."""


def _typical_arguments(device: Any) -> dict[str, dict[str, Any]]:
    """The arguments that each operator receives in a typical training call on `device`, after checks and defaults."""
    import torch

    from linnet import ops

    B, T, H, K, V, D, N, W = 1, 4, 2, 16, 16, 16, 4, 4
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    x = lambda *shape, dtype=dtype: torch.zeros(shape, device=device, dtype=dtype)
    q_BTHK, v_BTHV, g_BTH = x(B, T, H, K), x(B, T, H, V), x(B, T, H, dtype=torch.float32)
    g_BTHK = x(B, T, H, K, dtype=torch.float32)
    calls = {
        "linear_attention": lambda: ops.linear_attention(q_BTHK, q_BTHK, v_BTHV, g_BTH),
        "delta_rule": lambda: ops.delta_rule(q_BTHK, q_BTHK, v_BTHV, erase=x(B, T, H), log_decay=g_BTH),
        "dplr": lambda: ops.dplr(q_BTHK, q_BTHK, v_BTHV, q_BTHK, q_BTHK, g_BTHK),
        "scan": lambda: ops.scan(x(B, T, D), log_a=x(B, T, D, dtype=torch.float32)),
        "selective_scan": lambda: ops.selective_scan(x(B, T, D), x(B, T, D), x(D, N, dtype=torch.float32), x(B, T, N), x(B, T, N)),
        "short_conv": lambda: ops.short_conv(x(B, T, D), x(D, W)),
        "token_shift": lambda: ops.token_shift(x(B, T, D)),
        "cumulative_logsumexp": lambda: ops.cumulative_logsumexp(x(B, T, D)),
        "neural_memory": lambda: ops.neural_memory(q_BTHK, q_BTHK, v_BTHV, (x(H, K, V),), rate=x(B, T, H, dtype=torch.float32)),
        "gated_rms_norm": lambda: ops.gated_rms_norm(v_BTHV, v_BTHV, x(V, dtype=torch.float32)),
        "softmax_cross_entropy": lambda: ops.softmax_cross_entropy(x(T, V), torch.zeros(T, dtype=torch.long, device=device)),
        "gated_linear_unit": lambda: ops.gated_linear_unit(v_BTHV, v_BTHV),
        "l2_norm": lambda: ops.l2_norm(q_BTHK),
        "long_conv": lambda: ops.long_conv(x(B, T, D), x(D, T)),
        "softmax_attention": lambda: ops.softmax_attention(q_BTHK, q_BTHK, v_BTHV),
        "almost_linear_rnn": lambda: ops.almost_linear_rnn(x(B, T, D), x(D), x(D, D), 2),
        "slstm": lambda: ops.slstm(x(B, T, H, 4, K), x(H, K, 4, K)),
        "bidirectional_attention": lambda: ops.bidirectional_attention(q_BTHK, q_BTHK, v_BTHV),
        "relative_attention": lambda: ops.relative_attention(q_BTHK, q_BTHK, v_BTHV, x(T, H, K)),
        "softplus_attention": lambda: ops.softplus_attention(q_BTHK, q_BTHK, v_BTHV),
        "cell_attention": lambda: ops.cell_attention(q_BTHK, q_BTHK, v_BTHV, x(B, T, H, N), top_keys=2),
        "span_attention": lambda: ops.span_attention(q_BTHK, q_BTHK, v_BTHV, q_BTHK, q_BTHK),
        "block_mean": lambda: ops.block_mean(x(B, T, D), 2),
    }
    S_BHKV, h_BDN, c_BDW = x(B, H, K, V, dtype=torch.float32), x(B, D, N, dtype=torch.float32), x(B, D, W - 1, dtype=torch.float32)
    cache = (x(B, D, H, K), x(B, D, H, V), torch.zeros(B, dtype=torch.int64, device=device))
    step = ops.decode
    calls |= {
        "decode.linear_attention": lambda: step.linear_attention(q_BTHK, q_BTHK, v_BTHV, g_BTH, state=S_BHKV),
        "decode.delta_rule": lambda: step.delta_rule(q_BTHK, q_BTHK, v_BTHV, erase=x(B, T, H), log_decay=g_BTH, state=S_BHKV),
        "decode.dplr": lambda: step.dplr(q_BTHK, q_BTHK, v_BTHV, q_BTHK, q_BTHK, g_BTHK, state=S_BHKV),
        "decode.scan": lambda: step.scan(x(B, T, D), log_a=x(B, T, D, dtype=torch.float32), state=h_BDN[..., 0]),
        "decode.selective_scan": lambda: step.selective_scan(
            x(B, T, D), x(B, T, D), x(D, N, dtype=torch.float32), x(B, T, N), x(B, T, N), state=h_BDN
        ),
        "decode.short_conv": lambda: step.short_conv(x(B, T, D), x(D, W), state=c_BDW),
        "decode.softmax_attention": lambda: step.softmax_attention(q_BTHK, q_BTHK, v_BTHV, state=cache),
    }
    recorded: dict[str, dict[str, Any]] = {}

    def record(op: str, backend: str | None, arguments: dict[str, Any]):
        raise _Recorded(op, arguments)

    with ops.use_handler(record):
        for call in calls.values():
            try:
                call()
            except _Recorded as stop:
                recorded[stop.args[0]] = stop.args[1]
    return recorded


def _operators() -> dict[str, dict[str, Any]]:
    import torch

    from linnet import ops
    from linnet.ops._dispatch import BACKENDS, refusal

    with contextlib.suppress(ImportError):  # its operators register themselves where Triton is installed
        importlib.import_module("linnet.ops.triton")
    result: dict[str, dict[str, Any]] = {op: {"runs": {}, "backends": {b: {} for b in BACKENDS}} for op in ops.operators()}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        arguments = _typical_arguments(device)
        for op, entry in result.items():
            known = arguments.get(op)
            entry["runs"][device] = ops.choose(op, known) if known is not None else (ops.backends_of(op) or ["reference"])[0]
            for backend in BACKENDS:
                if backend not in ops.backends_of(op):
                    entry["backends"][backend][device] = "not implemented in this installation"
                else:
                    entry["backends"][backend][device] = refusal(op, backend, known) if known is not None else None
    return result
