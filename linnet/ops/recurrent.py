"""The three matrix-state operators: linear attention, the delta rule, and diagonal plus low rank (DPLR).

Shape legend: B batch, T tokens, n steps per token, H heads, K key channels, V value channels, N rows of the state (the batch,
or the packed segments). The head count of every operand divides H, the largest one; output head h uses operand head
h // (H / H_operand). The state has as many heads as the largest operand but q.
"""

from __future__ import annotations

from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

State = tuple[Tensor, ...]


def _common(op: str, q: Tensor, k: Tensor, v: Tensor, steps: int) -> None:
    """Ranks, batch, time, key channels and dtypes of q, k, v."""
    if not isinstance(steps, int) or steps < 1:
        check.refuse(op, "steps_per_token", "an integer >= 1", repr(steps))
    check.tensor(op, "q", q, "[B, T, H, K]", 4)
    if q.shape[1] < 1:
        check.refuse(op, "q", "of at least one token", check.describe(q))
    for name, x, shape in (("k", k, "[B, T*steps_per_token, H, K]"), ("v", v, "[B, T*steps_per_token, H, V]")):
        check.tensor(op, name, x, shape, 4, q)
        check.sizes(op, name, x, {0: ("batch", q.shape[0]), 1: ("time", q.shape[1] * steps)})
    check.sizes(op, "k", k, {3: ("key channels", q.shape[3])})
    check.same_dtype(op, {"q": q, "k": k, "v": v})


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _delta_gates(
    op: str, k: Tensor, v: Tensor, erase: Tensor, write: Tensor | None, write_key: Tensor | None
) -> dict[str, int]:  # fmt: skip
    """Check the gates and the write key of the delta rule beside k and v; their head counts."""
    gates = {"erase": (erase, k.shape[3], "K"), "write": (write, v.shape[3], "V"), "write_key": (write_key, k.shape[3], "K")}
    counts = {}
    for name, (x, channels, letter) in gates.items():
        if x is None and name != "erase":
            continue
        ndim = 4 if name == "write_key" else (3, 4)
        shape = f"[B, T*n, H, {letter}]" if name == "write_key" else f"[B, T*n, H] or [B, T*n, H, {letter}]"
        check.tensor(op, name, x, shape, ndim, k)
        check.sizes(op, name, x, {0: ("batch", k.shape[0]), 1: ("time", k.shape[1])})
        if x.ndim == 4:
            check.sizes(op, name, x, {3: (f"{letter} channels", channels)})
        counts[name] = x.shape[2]
    if write is None and erase.ndim == 4:
        check.refuse(op, "write", "given when erase is channel-wise", "None")
    return counts


def _dplr_directions(op: str, q: Tensor, a: Tensor, b: Tensor) -> dict[str, int]:
    """Check the two directions of the low-rank term beside q; their head counts."""
    for name, x in (("a", a), ("b", b)):
        check.tensor(op, name, x, "[B, T, H, K]", 4, q)
        check.sizes(op, name, x, {0: ("batch", q.shape[0]), 1: ("time", q.shape[1]), 3: ("key channels", q.shape[3])})
    return {"a": a.shape[2], "b": b.shape[2]}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_gain: Tensor | None = None,
    bonus: Tensor | None = None,
    read: str = "after",
    normalizer: str | None = None,
    normalizer_eps: float = 1e-6,
    return_normalizer: bool = False,
    steps_per_token: int = 1,
    scale: float | None = None,
    log_decay_min: float | None = None,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Linear attention with optional decay, gain, bonus and normaliser.

        S_t = Diag(e^{g_t}) S_{t-1} + e^{i_t} k_t v_t^T,      z_t = e^{g_t} * z_{t-1} + e^{i_t} k_t
        read="after":   o_t = scale S_t^T q_t
        read="before":  o_t = scale (S_{t-1} + e^{i_t} Diag(bonus) k_t v_t^T)^T q_t     (S_{t-1} undecayed)

    Args:
        q: [B, T, H, K]. k: [B, T*n, H, K]. v: [B, T*n, H, V], with n = `steps_per_token` (token-major).
        log_decay: g, natural logarithm, <= 0, down to -inf: None | [H] | [H, K] | [B, T, H] | [B, T, H, K].
        log_gain: i, natural logarithm, [B, T*n, H]. Needs a normaliser, or i <= 0. Kept in range by the running maximum
            m_t = max(m_{t-1} + max_K g_t, i_t), which changes no result.
        bonus: [H, K], only with read="before" (RWKV-6; zero if None).
        read: whether the query reads the state after or before the token's own update.
        normalizer: None | "sum": o_t / (scale q_t.z_t + eps) | "floor": o_t / max(|scale q_t.z_t|, 1), of the true values.
            With read="before" the sum includes the bonus.
        return_normalizer: also return (d [B, T, H], m [B, T, H]): the divisor is d e^m.
        steps_per_token: writes per token; the decay acts before the first one, the query reads after the last one
            (read="before": before the first).
        scale: None means K^-1/2.
        log_decay_min: a declared lower bound of `log_decay` per token; selects faster code, changes no result.
        initial_state: (S [N, H, K, V], then z [N, H, K] with a normaliser, then m [N, H] with a log_gain; true S = e^m S).
        cu_seqlens: [N+1] token offsets of packed segments (B = 1); empty segments are allowed.

    Returns:
        (o [B, T, H, V], state), state None unless `return_state`; with `return_normalizer` (o, state, (d, m)).

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Sources: Katharopoulos et al. 2020 (arXiv 2006.16236); gated form Yang et al. 2023 (2312.06635); log_gain and "floor"
    Beck et al. 2024 (2405.04517); bonus Peng et al. 2024 (2404.05892).
    """
    op = "linear_attention"
    _common(op, q, k, v, steps_per_token)
    batch, tokens, _, key_size = q.shape
    check.choice(op, "read", read, ("after", "before"))
    check.choice(op, "normalizer", normalizer, (None, "sum", "floor"))
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q.device)
    counts = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    counts["log_decay"] = check.log_decay(op, log_decay, q, tokens, key_size, log_decay_min)
    if log_gain is not None:
        check.tensor(op, "log_gain", log_gain, "[B, T*steps_per_token, H]", 3, q)
        check.sizes(op, "log_gain", log_gain, {0: ("batch", batch), 1: ("time", k.shape[1])})
        counts["log_gain"] = log_gain.shape[2]
        if normalizer is None and check.debugging() and bool((log_gain > 0).any()):
            check.refuse(op, "log_gain", "<= 0 when there is no normalizer", f"a largest value of {float(log_gain.max())}")
    if bonus is not None:
        if read != "before":
            check.refuse(op, "bonus", "None unless read='before'", check.describe(bonus))
        check.tensor(op, "bonus", bonus, "[H, K]", 2, q)
        check.sizes(op, "bonus", bonus, {1: ("key channels", key_size)})
        counts["bonus"] = bonus.shape[0]
    if return_normalizer and normalizer is None:
        check.refuse(op, "return_normalizer", "False without a normalizer", "True")
    check.heads(op, counts)
    state_heads = max(count for name, count in counts.items() if name != "q")
    shapes = {"S": (rows, state_heads, key_size, v.shape[3])}
    if normalizer is not None:
        shapes["z"] = (rows, state_heads, key_size)
    if log_gain is not None:
        shapes["m"] = (rows, state_heads)
    return call(
        op, backend, q=q, k=k, v=v, log_decay=log_decay, log_gain=log_gain, bonus=bonus, read=read, normalizer=normalizer,
        normalizer_eps=float(normalizer_eps), return_normalizer=return_normalizer, steps_per_token=steps_per_token,
        scale=_scale(scale, q), log_decay_min=log_decay_min,
        initial_state=check.state(op, initial_state, shapes, q.device), return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    erase: Tensor,
    write: Tensor | None = None,
    write_key: Tensor | None = None,
    log_decay: Tensor | None = None,
    erase_read: str = "after_decay",
    read: str = "after",
    steps_per_token: int = 1,
    scale: float | None = None,
    log_decay_min: float | None = None,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""The delta rule with decay, channel-wise gates and several steps per token.

        e = erase * k,   p = write_key (k if None),   u = write * v
        r_t = (e^{rho g_t} * e_t)^T S_{t-1}             rho = 1: erase_read="after_decay", 0: "before_decay"
        S_t = Diag(e^{g_t}) S_{t-1} + p_t (u_t - r_t)^T
        o_t = scale S_t^T q_t                           read="after"; read="before" reads S_{t-1}

    Args:
        q: [B, T, H, K]. k: [B, T*n, H, K]. v: [B, T*n, H, V], with n = `steps_per_token` (token-major).
        erase: [B, T*n, H] or channel-wise [B, T*n, H, K].
        write: [B, T*n, H] or channel-wise [B, T*n, H, V]; None means `erase`, which then must be [B, T*n, H].
        write_key: [B, T*n, H, K]; None means k.
        log_decay: g, natural logarithm, <= 0: None | [H] | [H, K] | [B, T, H] | [B, T, H, K]; acts before a token's first step.
        log_decay_min: a declared lower bound of `log_decay` per token; selects faster code, changes no result.
        initial_state: (S [N, H, K, V],). cu_seqlens: [N+1] token offsets of packed segments (B = 1).

    Returns:
        (o [B, T, H, V], state), state None unless `return_state`.

    The recurrence does not grow for erase * |k|^2 <= 2 (scalar) or erase in [0, 1] (channel-wise, |k| = 1); outside that it
    diverges by itself.

    Sources: DeltaNet, Yang et al. 2024 (arXiv 2406.06484); Gated DeltaNet (2412.06464); KDA (2510.26692); Gated DeltaNet-2
    (2605.22791); Comba (2506.02475); DeltaProduct (2502.10297).
    """
    op = "delta_rule"
    _common(op, q, k, v, steps_per_token)
    batch, tokens, _, key_size = q.shape
    check.choice(op, "erase_read", erase_read, ("after_decay", "before_decay"))
    check.choice(op, "read", read, ("after", "before"))
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q.device)
    counts = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    counts["log_decay"] = check.log_decay(op, log_decay, q, tokens, key_size, log_decay_min)
    counts |= _delta_gates(op, k, v, erase, write, write_key)
    check.heads(op, counts)
    state_heads = max(count for name, count in counts.items() if name != "q")
    shapes = {"S": (rows, state_heads, key_size, v.shape[3])}
    return call(
        op, backend, q=q, k=k, v=v, erase=erase, write=write, write_key=write_key, log_decay=log_decay, erase_read=erase_read,
        read=read, steps_per_token=steps_per_token, scale=_scale(scale, q), log_decay_min=log_decay_min,
        initial_state=check.state(op, initial_state, shapes, q.device), return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    log_decay_min: float | None = None,
    initial_state: State | Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Diagonal-plus-low-rank transition.

        S_t = Diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,     o_t = scale S_t^T q_t

    a reads the undecayed state. RWKV-7: a = -kappa, b = kappa * gate, scale = 1.

    Args:
        q, k, a, b: [B, T, H, K]. v: [B, T, H, V].
        log_decay: g, natural logarithm, <= 0: None | [H] | [H, K] | [B, T, H] | [B, T, H, K].
        log_decay_min: a declared lower bound of `log_decay` per token; selects faster code, changes no result.
        initial_state: (S [N, H, K, V],). cu_seqlens: [N+1] token offsets of packed segments (B = 1).

    Returns:
        (o [B, T, H, V], state), state None unless `return_state`.

    Source: Peng et al. 2025, RWKV-7 (arXiv 2503.14456).
    """
    op = "dplr"
    _common(op, q, k, v, 1)
    batch, tokens, _, key_size = q.shape
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q.device)
    counts = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]} | _dplr_directions(op, q, a, b)
    counts["log_decay"] = check.log_decay(op, log_decay, q, tokens, key_size, log_decay_min)
    check.heads(op, counts)
    state_heads = max(count for name, count in counts.items() if name != "q")
    shapes = {"S": (rows, state_heads, key_size, v.shape[3])}
    return call(
        op, backend, q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, scale=_scale(scale, q), log_decay_min=log_decay_min,
        initial_state=check.state(op, initial_state, shapes, q.device), return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip
