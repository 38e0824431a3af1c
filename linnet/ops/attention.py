"""Softmax attention: the layer that hybrids keep, with a state (the key-value cache) like every other operator.

Shape legend: B batch, T tokens, H query heads, K key channels, V value channels, N rows of the state (the batch, or the packed
segments), S slots of the cache. Head h of q uses head h // (H / H_operand) of k and of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

State = tuple[Tensor, ...]


def _cache(op: str, value: object, rows: int, k: Tensor, v: Tensor) -> State | None:
    """Check a key-value cache (k [N, S, Hk, K], v [N, S, Hv, V], length [N])."""
    if value is None:
        return None
    (_, _, k_heads, key_size), (_, _, v_heads, value_size) = k.shape, v.shape
    layout = f"a tuple (k [{rows}, S, {k_heads}, {key_size}], v [{rows}, S, {v_heads}, {value_size}], length [{rows}] int64)"
    if not isinstance(value, (tuple, list)) or len(value) != 3 or not all(isinstance(x, Tensor) for x in value):
        came = f"{len(value)} entries" if isinstance(value, (tuple, list)) else check.describe(value)
        check.refuse(op, "initial_state", layout, came)
    keys, values, length = value
    if keys.ndim != 4 or tuple(keys.shape) != (rows, keys.shape[1], *k.shape[2:]):
        check.refuse(op, "initial_state", layout, f"{check.describe(keys)} for k")
    if tuple(values.shape) != (rows, keys.shape[1], *v.shape[2:]):
        check.refuse(op, "initial_state", layout, f"{check.describe(values)} for v")
    if tuple(length.shape) != (rows,) or length.dtype not in (torch.int64, torch.int32):
        check.refuse(op, "initial_state", layout, f"{check.describe(length)} for length")
    for x in value:
        if x.device != k.device:
            check.refuse(op, "initial_state", f"on {k.device} like the other operands", f"a tensor on {x.device}")
    if check.debugging() and bool(((length < 0) | (length > keys.shape[1])).any()):
        check.refuse(op, "initial_state", f"of lengths between 0 and the {keys.shape[1]} slots", length.tolist())
    return keys, values, length.to(torch.int64)


def softmax_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    return_lse: bool = False,
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Softmax attention, full or in a sliding window.

        o_t = sum_s p_ts v_s,   p_ts = exp(scale q_t.k_s - lse_t),   lse_t = log sum_s exp(scale q_t.k_s)

    s runs over the tokens that t sees: all of its row or segment (causal=False), those up to t (causal), or the last `window`
    of these including t itself.

    Args:
        q_BTHK: [B, T, H, K]. k_BTHK: [B, T, Hk, K]. v_BTHV: [B, T, Hv, V]; Hk and Hv divide H.
        window: the number of visible tokens, >= 1; causal only. None means all.
        return_lse: also return lse [B, T, H] (natural logarithm, at least fp32), so that branches can be merged.
        scale: None means K^-1/2.
        initial_state: the cache (k [N, S, Hk, K], v [N, S, Hv, V], length [N] int64): row n is valid in its first length[n]
            slots, later slots are padding; rows may differ in length. Its tokens come before those of k and v.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1); empty segments are allowed.

    Returns:
        (o [B, T, H, V], state), with `return_lse` (o, state, lse). The state is the new cache, in the dtypes of k and v, None
        unless `return_state`; with a window it holds the last window-1 tokens only, so that its size is constant.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Vaswani et al. 2017 (arXiv 1706.03762).
    """
    op = "softmax_attention"
    check.tensor(op, "q_BTHK", q_BTHK, "[B, T, H, K]", 4)
    batch, tokens, heads, key_size = q_BTHK.shape
    if tokens < 1:
        check.refuse(op, "q_BTHK", "of at least one token", check.describe(q_BTHK))
    for name, x, shape in (("k_BTHK", k_BTHK, "[B, T, H, K]"), ("v_BTHV", v_BTHV, "[B, T, H, V]")):
        check.tensor(op, name, x, shape, 4, q_BTHK)
        check.sizes(op, name, x, {0: ("batch", batch), 1: ("time", tokens)})
        if x.shape[2] < 1 or heads % x.shape[2]:
            check.refuse(op, name, f"of a head count that divides the {heads} heads of 'q_BTHK'", f"{x.shape[2]} heads")
    check.sizes(op, "k_BTHK", k_BTHK, {3: ("key channels", key_size)})
    check.same_dtype(op, {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV})
    if q_BTHK.is_complex():
        check.refuse(op, "q_BTHK", "real", check.describe(q_BTHK))
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            check.refuse(op, "window", "an integer >= 1 or None", repr(window))
        if not causal:
            check.refuse(op, "window", "None when causal=False", repr(window))
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q_BTHK.device)
    return call(
        op, backend, q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, causal=bool(causal), window=window, return_lse=return_lse,
        scale=key_size**-0.5 if scale is None else float(scale), initial_state=_cache(op, initial_state, rows, k_BTHK, v_BTHV),
        return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
