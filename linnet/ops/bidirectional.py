"""Linear attention that sees the whole sequence: every token reads one matrix, the sum over all tokens of its row or segment.

Shape legend: B batch, T tokens, H heads, K key channels, V value channels, N packed segments. The head count of every operand
divides H, the largest one; output head h uses operand head h // (H / H_operand).
"""

from __future__ import annotations

from torch import Tensor

from linnet.ops import _checks as check
from linnet.ops._dispatch import call
from linnet.ops.recurrent import _common, _scale


def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_gain: Tensor | None = None,
    normalizer: str | None = None,
    normalizer_eps: float = 1e-6,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
):
    r"""Linear attention without order: `linear_attention` where every token reads the state after the last token.

        S = sum_s e^{i_s} k_s v_s^T,   z = sum_s e^{i_s} k_s,   o_t = scale S^T q_t

    Args:
        q: [B, T, H, K]. k: [B, T, H, K]. v: [B, T, H, V].
        log_gain: i, natural logarithm, [B, T, H]. Needs a normaliser, or i <= 0. Sums are kept relative to the largest gain of the
            row, which changes no result.
        normalizer: None | "sum": o_t / (scale q_t.z + eps), of the true values.
        scale: None means K^-1/2.
        cu_seqlens: [N+1] token offsets of packed segments (B = 1); no segment sees another.

    Returns:
        (o [B, T, H, V] in the dtype of v, None): there is no recurrent state. Sums are in at least fp32.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Sources: Katharopoulos et al. 2020 (arXiv 2006.16236), Shen et al. 2018, Efficient Attention (1812.01243).
    """
    op = "bidirectional_attention"
    _common(op, q, k, v, 1)
    check.choice(op, "normalizer", normalizer, (None, "sum"))
    counts = {"q": q.shape[2], "k": k.shape[2], "v": v.shape[2]}
    if log_gain is not None:
        check.tensor(op, "log_gain", log_gain, "[B, T, H]", 3, q)
        check.sizes(op, "log_gain", log_gain, {0: ("batch", q.shape[0]), 1: ("time", q.shape[1])})
        counts["log_gain"] = log_gain.shape[2]
        if normalizer is None and check.debugging() and bool((log_gain > 0).any()):
            check.refuse(op, "log_gain", "<= 0 when there is no normalizer", f"a largest value of {float(log_gain.max())}")
    check.heads(op, counts)
    check.cu_seqlens(op, cu_seqlens, q.shape[0], q.shape[1], q.device)
    return call(
        op, backend, q=q, k=k, v=v, log_gain=log_gain, normalizer=normalizer, normalizer_eps=float(normalizer_eps),
        scale=_scale(scale, q), cu_seqlens=cu_seqlens,
    )  # fmt: skip
