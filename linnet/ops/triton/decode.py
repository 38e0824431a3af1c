"""Backend `triton` of the steps in place (`linnet.ops.decode`). Triton itself is imported at the first call."""

from __future__ import annotations

from torch import Tensor

from linnet.ops._dispatch import implements
from linnet.ops._shapes import decay_per_token
from linnet.ops.triton import _step
from linnet.ops.triton._support import refusal
from linnet.ops.triton.conv import MAX_TAPS
from linnet.ops.triton.selective_scan import MAX_STATE

MAX_KEYS = 1024


def _supports(arguments: dict, first: str) -> str | None:
    state, steps = arguments["state"], arguments.get("steps_per_token", 1)
    if not state[0].is_contiguous():
        return "an entry of the state must be contiguous"
    if steps > 4:
        return "more than 4 steps per token"
    tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.is_floating_point()]
    return refusal(arguments[first], *tensors)


def matrix_supports(arguments: dict) -> str | None:
    if arguments["q"].shape[3] > MAX_KEYS:
        return f"more than {MAX_KEYS} key channels do not fit the registers"
    return _supports(arguments, "q")


def conv_supports(arguments: dict) -> str | None:
    if arguments["weight_DW"].shape[1] > MAX_TAPS:
        return f"more than {MAX_TAPS} taps do not fit the registers"
    return _supports(arguments, "x_BTD")


def selective_supports(arguments: dict) -> str | None:
    if arguments["A_DN"].shape[1] > MAX_STATE:
        return f"more than {MAX_STATE} state channels do not fit the registers"
    return _supports(arguments, "x_BTD")


def _gate(x: Tensor | None) -> Tensor | None:
    """A gate [B, T, H] as [B, T, H, 1]."""
    return x.unsqueeze(-1) if x is not None and x.ndim == 3 else x


def _decay(g: Tensor | None, q: Tensor) -> Tensor | None:
    """A view [B, T, H, 1 or K]; a constant decay has steps of zero bytes."""
    return _gate(decay_per_token(g, *q.shape[:2]))


def _run(*arguments, output: bool) -> Tensor | None:
    o = _step.decode_op(*arguments, output)
    return o if output else None


@implements("decode.linear_attention", "triton", matrix_supports)
def linear_attention(q, k, v, log_decay, read, steps_per_token, scale, state, slots, counts, update, output):
    return _run(
        "linear", q, None, k, v, None, None, None, _decay(log_decay, q), state, slots, counts, scale, False, read == "before",
        steps_per_token, update, output=output,
    )  # fmt: skip


@implements("decode.delta_rule", "triton", matrix_supports)
def delta_rule(
    q, k, v, erase, write, write_key, log_decay, erase_read, read, steps_per_token, scale, state, slots, counts, update, output
):  # fmt: skip
    p, k = (k, None) if write_key is None else (write_key, k)
    return _run(
        "delta", q, k, p, v, None, _gate(erase), _gate(erase if write is None else write), _decay(log_decay, q), state, slots,
        counts, scale, erase_read == "before_decay", read == "before", steps_per_token, update, output=output,
    )  # fmt: skip


@implements("decode.dplr", "triton", matrix_supports)
def dplr(q, k, v, a, b, log_decay, scale, state, slots, counts, update, output):
    return _run(
        "dplr", q, a, k, v, b, None, None, _decay(log_decay, q), state, slots, counts, scale, True, False, 1, update, output=output
    )  # fmt: skip


@implements("decode.short_conv", "triton", conv_supports)
def short_conv(x_BTD, weight_DW, bias_D, activation, state, slots, counts, update, output):
    y = _step.conv_op(x_BTD, weight_DW.contiguous(), bias_D, state, slots, counts, activation == "silu", update, output)
    return y if output else None


@implements("decode.selective_scan", "triton", selective_supports)
def selective_scan(x_BTD, delta_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD, state, slots, counts, update, output):
    B, C = (x.unsqueeze(2) if x.ndim == 3 else x for x in (B_BTN, C_BTN))
    y = _step.selective_op(x_BTD, delta_BTD, A_DN.contiguous(), B, C, D_D, z_BTD, state, slots, counts, update, output)
    return y if output else None
