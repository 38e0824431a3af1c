"""A memory that is a small network: written by gradient descent on its own loss while it is read (test-time training).

Shape legend: B batch, T tokens, H heads, K key channels, V value channels, P weights of one head's network, N rows of the state
(the batch, or the packed segments).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call

State = tuple[Tensor, ...]
ACTIVATIONS = ("gelu", "silu", "relu2")


def memory_size(sizes: Sequence[int], bias: bool) -> int:
    """P: the weights of a network of these widths."""
    return sum((a + bool(bias)) * b for a, b in zip(sizes, sizes[1:], strict=False))


def _network(op: str, weights: object, biases: object, k: Tensor, v: Tensor) -> tuple[tuple[int, ...], int]:
    """Check the initial network; return its widths (K, ..., V) and its head count."""
    layout = "a sequence of L >= 1 tensors [H, d_{l-1}, d_l] with d_0 = K and d_L = V"
    if not isinstance(weights, (tuple, list)) or not weights:
        check.refuse(op, "weights", layout, check.describe(weights))
    sizes, heads = [k.shape[3]], weights[0].shape[0] if isinstance(weights[0], Tensor) and weights[0].ndim else 1
    for w in weights:
        check.tensor(op, "weights", w, "[H, d_{l-1}, d_l]", 3, k)
        if w.shape[:2] != (heads, sizes[-1]):
            check.refuse(op, "weights", layout, ", ".join(map(check.describe, weights)))
        sizes.append(w.shape[2])
    if sizes[-1] != v.shape[3]:
        check.refuse(op, "weights", f"of last width {v.shape[3]}, the value channels of 'v'", f"{sizes[-1]}")
    if biases is not None:
        expected = [(heads, size) for size in sizes[1:]]
        if not isinstance(biases, (tuple, list)) or [tuple(getattr(b, "shape", ())) for b in biases] != expected:
            check.refuse(op, "biases", f"None or tensors of shapes {expected}", repr(biases))
        for b in biases:
            check.tensor(op, "biases", b, "[H, d_l]", 2, k)
    return tuple(sizes), heads


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    rate: Tensor,
    log_decay: Tensor | None = None,
    log_momentum: Tensor | None = None,
    read_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
    residual: bool = False,
    activation: str = "gelu",
    mini_batch: int = 16,
    initial_state: State | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Read a network f(x; W) that is trained, token by token, to map k_t to v_t; gradients are taken once per mini-batch.

        g_t = gradient of 1/2 |f(k_t; A) - v_t|^2 at A, the weights at the start of the mini-batch of t
        S_t = e^{m_t} S_{t-1} - rate_t g_t,   W_t = e^{d_t} W_{t-1} + S_t             (without log_momentum S_t = -rate_t g_t)
        o_t = f(q_t; R_t),   R_t = A + read_scale_t (W_t - A)                          (without read_scale R_t = W_t)

    and A = W = R_t after the last token of a mini-batch. Mini-batches count from the first token of a row or segment. With

        f(x; W) = [x +] [LayerNorm] (act(.. act(x W_1 + b_1) ..) W_L + b_L)

    Args:
        q, k: [B, T, H, K]. v: [B, T, H, V]. Every head count divides the largest one, H.
        weights: W_1 .. W_L of an empty row, [H, d_{l-1}, d_l] with d_0 = K, d_L = V. biases: [H, d_l] each, or None.
        rate: [B, T, H], step size of each token's gradient.
        log_decay: d [B, T, H], <= 0, natural log of what remains of the weights, or None. log_momentum: m, likewise.
        read_scale: [B, T, H] or None.
        norm_weight, norm_bias: [H, V], LayerNorm over the last width of each head; both or neither.
        residual: add x; K = V only. activation: "gelu" (tanh form), "silu" or "relu2" (squared ReLU).
        mini_batch: tokens that share the weights of their gradients; 1 takes every gradient at the current weights.
        initial_state: (count [N] int64 of tokens seen, W [N, H, P], then A [N, H, P] if mini_batch > 1, then S [N, H, P] with
            log_momentum); P: W_1, b_1, W_2, .. flattened. None: the weights given, S = 0.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1), read on the host; empty segments are allowed.

    Returns:
        (o [B, T, H, V] in the dtype of v, state): the state in at least fp32, None unless `return_state`.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Sources: Sun et al. 2024, Learning to (Learn at Test Time) (arXiv 2407.04620); Behrouz et al. 2025, Titans (arXiv 2501.00663).
    """
    op = "neural_memory"
    check.tensor(op, "q", q, "[B, T, H, K]", 4)
    batch, tokens, _, key_size = q.shape
    if tokens < 1:
        check.refuse(op, "q", "of at least one token", check.describe(q))
    if q.is_complex():
        check.refuse(op, "q", "real", check.describe(q))
    time = {0: ("batch", batch), 1: ("time", tokens)}
    counts = {"q": q.shape[2]}
    for name, x, shape in (("k", k, "[B, T, H, K]"), ("v", v, "[B, T, H, V]")):
        check.tensor(op, name, x, shape, 4, q)
        check.sizes(op, name, x, time | ({3: ("key channels", key_size)} if name == "k" else {}))
        counts[name] = x.shape[2]
    check.same_dtype(op, {"q": q, "k": k, "v": v})
    for name, x in (("rate", rate), ("log_decay", log_decay), ("log_momentum", log_momentum), ("read_scale", read_scale)):
        if x is not None or name == "rate":
            check.tensor(op, name, x, "[B, T, H]", 3, q)
            check.sizes(op, name, x, time)
            counts[name] = x.shape[2]
            if name.startswith("log") and check.debugging() and bool((x > 0).any()):
                check.refuse(op, name, "<= 0 (a natural logarithm)", f"a largest value of {float(x.max())}")
    sizes, counts["weights"] = _network(op, weights, biases, k, v)
    heads = check.heads(op, counts)
    if (norm_weight is None) != (norm_bias is None):
        check.refuse(op, "norm_bias", "given if and only if norm_weight is", check.describe(norm_bias))
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x is not None:
            check.tensor(op, name, x, "[H, V]", 2, q)
            check.sizes(op, name, x, {0: ("heads", heads), 1: ("value channels", v.shape[3])})
    if residual and key_size != v.shape[3]:
        check.refuse(op, "residual", f"False where K = {key_size} and V = {v.shape[3]} differ", repr(residual))
    check.choice(op, "activation", activation, ACTIVATIONS)
    if isinstance(mini_batch, bool) or not isinstance(mini_batch, int) or mini_batch < 1:
        check.refuse(op, "mini_batch", "an integer >= 1", repr(mini_batch))
    rows = check.cu_seqlens(op, cu_seqlens, batch, tokens, q.device)
    flat = (rows, heads, memory_size(sizes, biases is not None))
    names = ["count", "W", *(["A"] if mini_batch > 1 else []), *(["S"] if log_momentum is not None else [])]
    initial_state = check.state(op, initial_state, {name: (rows,) if name == "count" else flat for name in names}, q.device)
    return call(
        op, backend, q=q, k=k, v=v, weights=tuple(weights), biases=None if biases is None else tuple(biases), rate=rate,
        log_decay=log_decay, log_momentum=log_momentum, read_scale=read_scale, norm_weight=norm_weight, norm_bias=norm_bias,
        norm_eps=float(norm_eps), residual=bool(residual), activation=activation, mini_batch=mini_batch,
        initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def flat_weights(weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> Tensor:
    """W_1, b_1, W_2, .. of every head in one row [H, P]."""
    parts = []
    for layer, w in enumerate(weights):
        parts += [w.flatten(1)] + ([] if biases is None else [biases[layer]])
    return torch.cat(parts, -1)
