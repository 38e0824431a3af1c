"""Attention whose weights are not one softmax over all keys: relative positions, softplus rows, selected cells, searched spans.

All are causal, keep a cache of what later tokens read, and work on blocks of queries, so that no [T, T] matrix exists in one
piece; with gradients, a block is computed again in the backward pass.

Shape legend: B batch, T tokens, H query heads, Hk key heads (head h of q uses key head h // (H / Hk)), K key channels, V value
channels, A search channels, R distances, C cells, N rows of the state (the batch, or the packed segments), S slots of the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

State = tuple[Tensor, ...]


def _queries(op: str, name: str, q: Tensor) -> None:
    check.tensor(op, name, q, "[B, T, H, K]", 4)
    if q.shape[1] < 1:
        check.refuse(op, name, "of at least one token", check.describe(q))
    if q.is_complex():
        check.refuse(op, name, "real", check.describe(q))


def _keys(op: str, q: Tensor, stores: dict[str, Tensor]) -> None:
    """Check what is kept per token against q: batch, time, one head count that divides that of q, dtype and device."""
    first = next(iter(stores.values()))
    for name, x in stores.items():
        check.tensor(op, name, x, "[B, T, Hk, channels]", 4, q)
        check.sizes(op, name, x, {0: ("batch", q.shape[0]), 1: ("time", q.shape[1])})
        if x.shape[2] < 1 or q.shape[2] % x.shape[2]:
            check.refuse(op, name, f"of a head count that divides the {q.shape[2]} heads of 'q_BTHK'", f"{x.shape[2]} heads")
        check.sizes(op, name, x, {2: ("key heads", first.shape[2])})
    check.same_dtype(op, {"q_BTHK": q, **stores})


def _cache(op: str, value: object, rows: int, stores: dict[str, Tensor]) -> State | None:
    """Check a cache: one tensor [N, S, Hk, channels] per entry of `stores`, then length [N] int64, the valid slots of each row."""
    if value is None:
        return None
    sizes = [f"{name[:-5]} [{rows}, S, {x.shape[2]}, {x.shape[3]}]" for name, x in stores.items()]
    layout = f"a tuple ({', '.join(sizes)}, length [{rows}] int64)"
    if not isinstance(value, (tuple, list)) or len(value) != len(stores) + 1 or not all(isinstance(x, Tensor) for x in value):
        check.refuse(op, "initial_state", layout, f"{len(value)} entries" if isinstance(value, (tuple, list)) else repr(value))
    *kept, length = value
    for old, (name, new) in zip(kept, stores.items(), strict=True):
        if old.ndim != 4 or tuple(old.shape) != (rows, kept[0].shape[1], *new.shape[2:]) or old.device != new.device:
            check.refuse(op, "initial_state", layout, f"{check.describe(old)} on {old.device} for {name[:-5]}")
    if tuple(length.shape) != (rows,) or length.dtype not in (torch.int64, torch.int32) or length.device != kept[0].device:
        check.refuse(op, "initial_state", layout, f"{check.describe(length)} for length")
    if check.debugging() and bool(((length < 0) | (length > kept[0].shape[1])).any()):
        check.refuse(op, "initial_state", f"of lengths between 0 and the {kept[0].shape[1]} slots", length.tolist())
    return (*kept, length.to(torch.int64))


def _number(op: str, name: str, value: object, least: float, *, above: bool = False) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and (value > least if above else value >= least)
    if not (good and math.isfinite(value)):
        check.refuse(op, name, f"a number {'>' if above else '>='} {least:g}", repr(value))
    return float(value)


def _whole(op: str, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        check.refuse(op, name, "an integer >= 1", repr(value))
    return value


def relative_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    distance_RHK: Tensor,
    *,
    beyond: str = "clip",
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Causal softmax attention with an embedding of the distance in the logits.

        o_t = sum_{s <= t} softmax_s(scale (q_t.k_s + q_t.e_{t-s})) v_s

    Args:
        q_BTHK: [B, T, H, K]. k_BTHK: [B, T, Hk, K]. v_BTHV: [B, T, Hk, V].
        distance_RHK: e [R, H, K], or [R, 1, K] shared by the heads; row r is the distance r.
        beyond: distances of R and more: "clip" uses the last row, "zero" no embedding.
        scale: None means K^-1/2. initial_state: the cache (k, v, length). cu_seqlens: [N+1] offsets of packed segments (B = 1).

    Returns:
        (o [B, T, H, V], state): the new cache (k [N, S, Hk, K], v [N, S, Hk, V], length [N]), None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Huang et al. 2018, Music Transformer (arXiv 1809.04281).
    """
    op, stores = "relative_attention", {"k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    _queries(op, "q_BTHK", q_BTHK)
    _keys(op, q_BTHK, stores)
    batch, tokens, heads, size = q_BTHK.shape
    check.sizes(op, "k_BTHK", k_BTHK, {3: ("key channels", size)})
    check.tensor(op, "distance_RHK", distance_RHK, "[R, H, K] or [R, 1, K]", 3, q_BTHK)
    check.sizes(op, "distance_RHK", distance_RHK, {2: ("key channels", size)})
    if distance_RHK.shape[0] < 1 or distance_RHK.shape[1] not in (1, heads):
        check.refuse(op, "distance_RHK", f"[R >= 1, {heads} or 1, {size}]", check.describe(distance_RHK))
    check.choice(op, "beyond", beyond, ("clip", "zero"))
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q_BTHK.device)
    return call(
        op, backend, q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, distance_RHK=distance_RHK, beyond=beyond,
        scale=size**-0.5 if scale is None else float(scale), initial_state=_cache(op, initial_state, rows, stores),
        return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def softplus_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    *,
    power: float | None = None,
    offset: float = 1.0,
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Causal attention by softplus rows whose scale grows with the logarithm of the number of visible tokens.

        A_ts = softplus(scale log(n) q_t.k_s),  s <= t,  n = t + 1 tokens are visible;      w_t = A_t / |A_t|_1
        power p:  R_ts = max(n w_ts - c, 0)^p,  c = offset where n >= 3, else 0;           w_t <- R_t / |R_t|_1

    Args:
        q_BTHK: [B, T, H, K]. k_BTHK: [B, T, Hk, K]; both usually of unit length. v_BTHV: [B, T, Hk, V].
        power: p >= 1, or None: no second step. A row that is flat to 1e-6, of which nothing would be left, skips that step.
        scale: None means log K. initial_state: the cache (k, v, length). cu_seqlens: [N+1] offsets of packed segments (B = 1).

    Returns:
        (o [B, T, H, V], state): the new cache (k [N, S, Hk, K], v [N, S, Hk, V], length [N]), None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Gao & Spratling 2025, Softplus Attention with Re-weighting (arXiv 2501.13428).
    """
    op, stores = "softplus_attention", {"k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    _queries(op, "q_BTHK", q_BTHK)
    _keys(op, q_BTHK, stores)
    batch, tokens, _, size = q_BTHK.shape
    check.sizes(op, "k_BTHK", k_BTHK, {3: ("key channels", size)})
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q_BTHK.device)
    return call(
        op, backend, q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, power=None if power is None else _number(op, "power", power, 1),
        offset=_number(op, "offset", offset, 0), scale=math.log(size) if scale is None else float(scale),
        initial_state=_cache(op, initial_state, rows, stores), return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def cell_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    estimate_BTHC: Tensor,
    *,
    top_keys: int,
    prior: bool = True,
    scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Causal softmax attention over the keys of the best cells of an estimated attention row.

    The n = t + 1 visible keys are cut into C cells: key s lies in cell floor(s C / n), so cells widen as t grows (and some are
    empty while n < C). With p_t the softmax of the estimate over the cells that are not empty,

        M_t = the ceil(top_keys min(C, n) / n) cells of largest p_t
        o_t = sum_{s in M_t} softmax_s(scale q_t.k_s + [prior] log p_t(cell of s)) v_s

    About top_keys keys, at least one cell: n / C keys once n > C top_keys, which is linear in t. Ties go to either cell.

    Args:
        q_BTHK: [B, T, H, K]. k_BTHK: [B, T, Hk, K]. v_BTHV: [B, T, Hk, V].
        estimate_BTHC: [B, T, H, C], the logits of the estimated row. prior: add log p, through which the estimate is learned.
        scale: None means K^-1/2. initial_state: the cache (k, v, length). cu_seqlens: [N+1] offsets of packed segments (B = 1).

    Returns:
        (o [B, T, H, V], state): the new cache (k [N, S, Hk, K], v [N, S, Hk, V], length [N]), None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Lee et al. 2023, SEA: Sparse Linear Attention with Estimated Attention Mask (arXiv 2310.01777).
    """
    op, stores = "cell_attention", {"k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    _queries(op, "q_BTHK", q_BTHK)
    _keys(op, q_BTHK, stores)
    batch, tokens, heads, size = q_BTHK.shape
    check.sizes(op, "k_BTHK", k_BTHK, {3: ("key channels", size)})
    check.tensor(op, "estimate_BTHC", estimate_BTHC, "[B, T, H, C]", 4, q_BTHK)
    check.sizes(op, "estimate_BTHC", estimate_BTHC, {0: ("batch", batch), 1: ("time", tokens), 2: ("heads", heads)})
    if estimate_BTHC.shape[3] < 1:
        check.refuse(op, "estimate_BTHC", "of at least one cell", check.describe(estimate_BTHC))
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q_BTHK.device)
    return call(
        op, backend, q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, estimate_BTHC=estimate_BTHC,
        top_keys=_whole(op, "top_keys", top_keys), prior=bool(prior), scale=size**-0.5 if scale is None else float(scale),
        initial_state=_cache(op, initial_state, rows, stores), return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def expand_cells(estimate_BTHC: Tensor) -> Tensor:
    """The estimated attention matrix [B, H, T, T] of one sequence per row, to look at: p_t of `cell_attention`, shared by the keys
    of a cell."""
    check.tensor("expand_cells", "estimate_BTHC", estimate_BTHC, "[B, T, H, C]", 4)
    tokens, cells = estimate_BTHC.shape[1], estimate_BTHC.shape[3]
    n, s = torch.arange(1, tokens + 1, device=estimate_BTHC.device)[:, None], torch.arange(tokens, device=estimate_BTHC.device)
    cell_TS = (s * cells // n).clamp_max(cells - 1)
    logits = estimate_BTHC.transpose(1, 2).gather(3, cell_TS.expand(*estimate_BTHC.shape[:1], estimate_BTHC.shape[2], -1, -1))
    first, end = cell_bounds(cell_TS, n, cells)
    logits = (logits - (end - first).clamp_min(1).to(logits.dtype).log()).masked_fill(s >= n, -torch.inf)
    return logits.softmax(-1)


def cell_bounds(cell: Tensor, n: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """First key and end of a cell of n visible keys."""
    return (cell * n + cells - 1) // cells, ((cell + 1) * n + cells - 1) // cells


def span_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    search_q_BTHA: Tensor,
    search_k_BTHA: Tensor,
    *,
    spans: int = 2,
    window_stripes: int = 7,
    backward: float = 2.0,
    forward: float = 0.0,
    search_power: float = 0.5,
    span_power: float = 0.5,
    scale: float | None = None,
    search_scale: float | None = None,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Two-step causal attention: search about n^p anchors, then attend within the best spans. O(T^(1+max(p, span_power))).

    Of the n = t + 1 visible keys the last d_{j0} - 1 are the window, with d_j = floor(j^(1/p)), j0 = window_stripes + 1. Anchors
    are the keys n - d_j >= 0, j >= j0; their score is g_j = search_scale search_q_t.search_k_{n - d_j}. For each of the `spans`
    best anchors a,

        span = keys a - ceil(backward n^s) ... a + ceil(forward n^s), s = span_power, within 0 and the start of the window
        o_t^a = sum_i softmax_i(scale q_t.k_i) v_i   over the span and the window
        o_t = sum_a softmax_a(g_a) o_t^a             (only the window, while there are no anchors)

    With p = s = 1/2 and backward >= 2 every key lies in the span of some anchor. The gate makes the search differentiable.

    Args:
        q_BTHK: [B, T, H, K]. k_BTHK: [B, T, Hk, K]. v_BTHV: [B, T, Hk, V].
        search_q_BTHA: [B, T, H, A]. search_k_BTHA: [B, T, Hk, A].
        scale, search_scale: None means K^-1/2 and A^-1/2. cu_seqlens: [N+1] offsets of packed segments (B = 1).
        initial_state: the cache (k, v, search_k, length).

    Returns:
        (o [B, T, H, V], state): the new cache (k [N, S, Hk, K], v [N, S, Hk, V], search_k [N, S, Hk, A], length [N]), None unless
        `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: Superlinear Multi-Step Attention, 2026 (arXiv 2601.18401).
    """
    op, stores = "span_attention", {"k_BTHK": k_BTHK, "v_BTHV": v_BTHV, "search_k_BTHA": search_k_BTHA}
    _queries(op, "q_BTHK", q_BTHK)
    _keys(op, q_BTHK, stores)
    batch, tokens, heads, size = q_BTHK.shape
    check.sizes(op, "k_BTHK", k_BTHK, {3: ("key channels", size)})
    check.tensor(op, "search_q_BTHA", search_q_BTHA, "[B, T, H, A]", 4, q_BTHK)
    wanted = {0: ("batch", batch), 1: ("time", tokens), 2: ("heads", heads), 3: ("search channels", search_k_BTHA.shape[3])}
    check.sizes(op, "search_q_BTHA", search_q_BTHA, wanted)
    powers = {"search_power": search_power, "span_power": span_power}
    for name, value in powers.items():
        if not _number(op, name, value, 0, above=True) < 1:
            check.refuse(op, name, "a number in (0, 1)", repr(value))
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q_BTHK.device)
    return call(
        op, backend, q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV, search_q_BTHA=search_q_BTHA, search_k_BTHA=search_k_BTHA,
        spans=_whole(op, "spans", spans), window_stripes=_whole(op, "window_stripes", window_stripes),
        backward=_number(op, "backward", backward, 0), forward=_number(op, "forward", forward, 0), **powers,
        scale=size**-0.5 if scale is None else float(scale),
        search_scale=search_k_BTHA.shape[3] ** -0.5 if search_scale is None else float(search_scale),
        initial_state=_cache(op, initial_state, rows, stores), return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def stripe_distance(j: int, power: float) -> int:
    """d_j = floor(j^(1/p))."""
    return math.floor(j ** (1 / power) + 1e-9)  # 1e-9: j^2.0 must not fall below its integer


def stripe_distances(slots: int, first: int, power: float) -> list[int]:
    """d_j, j = first, first + 1, ..., while d_j <= slots."""
    distances, j = [], first
    while (distance := stripe_distance(j, power)) <= slots:
        distances.append(distance)
        j += 1
    return distances


def reach(n: Tensor | int, factor: float, power: float):
    """ceil(factor n^power), an integer (tensor)."""
    if isinstance(n, Tensor):
        return (factor * n.double() ** power - 1e-9).ceil().clamp_min(0).long()
    return max(0, math.ceil(factor * n**power - 1e-9))
