"""One token of linear attention (decoding): S <- Diag(e^g) S + k v^T, o = scale S^T q for every query head of the state's group.

Grid: one program per (tile of V, row and state head). The state is read once and written once: 8 K V bytes per head in fp32, which
is all the traffic that matters; floor = 2 * state bytes / memory bandwidth.
"""

import triton
import triton.language as tl


@triton.jit
def step_kernel(
    q, k, v, g, S_in, S_out, o, stride_q, stride_k, stride_v, stride_g, scale, HS, H, Hq, Hk, Hv, Hg, K, V,
    BK: tl.constexpr, BV: tl.constexpr, DECAY: tl.constexpr, VECTOR: tl.constexpr, EXCL: tl.constexpr, HAS_IN: tl.constexpr,
):  # fmt: skip
    iv = tl.program_id(0)
    h = tl.program_id(1) % HS
    b = (tl.program_id(1) // HS).to(tl.int64)
    kk = tl.arange(0, BK)
    vv = iv * BV + tl.arange(0, BV)
    mk = kk < K
    mv = vv < V
    at = (b * HS + h) * K * V + kk[:, None] * V + vv[None, :]
    mask = mk[:, None] & mv[None, :]
    if HAS_IN:
        S = tl.load(S_in + at, mask=mask, other=0.0).to(tl.float32)
    else:
        S = tl.zeros([BK, BV], tl.float32)
    kb = tl.load(k + b * stride_k + (h // (HS // Hk)) * K + kk, mask=mk, other=0.0).to(tl.float32)
    vb = tl.load(v + b * stride_v + (h // (HS // Hv)) * V + vv, mask=mv, other=0.0).to(tl.float32)
    new = S
    if DECAY:
        if VECTOR:
            new = S * tl.exp(tl.load(g + b * stride_g + (h // (HS // Hg)) * K + kk, mask=mk, other=0.0).to(tl.float32))[:, None]
        else:
            new = S * tl.exp(tl.load(g + b * stride_g + h // (HS // Hg)).to(tl.float32))
    new = new + kb[:, None] * vb[None, :]
    read = S if EXCL else new
    rep = H // HS
    for i in range(0, rep):
        head = h * rep + i
        qb = tl.load(q + b * stride_q + (head // (H // Hq)) * K + kk, mask=mk, other=0.0).to(tl.float32)
        ob = tl.sum(read * qb[:, None], 0) * scale
        tl.store(o + (b * H + head) * V + vv, ob.to(o.dtype.element_ty), mask=mv)
    tl.store(S_out + at, new, mask=mask)
