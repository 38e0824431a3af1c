r"""Torch almost-linear RNN and sLSTM: all rows side by side, token by token, with hand-written backward passes.

Rows are sorted by falling length, so that those which still run at a step are the first ones: packed segments cost no more steps
than the longest of them. The forward stores the states; the backward recomputes everything else from them for all tokens at once
and keeps in its loop only what depends on the next token.

almost_linear_rnn: with G_t the gradient of z_t,
    G_p = decay * G_t + phi'(p_t) * (W^T G_t),   gradient of z_{t-1}: (1 - strength_t) * G_p
    dx_t = G_t,   d decay = sum G_t p_t,   dW = sum G_t phi(p_t)^T,
    dtarget_t = strength_t G_p,   dstrength_t = G_p (target_t - z_{t-1})

slstm: no output depends on m, so the backward holds every m fixed (C, n then have their stored scale); what a caller does with
the final m itself travels back along the branch of the maximum that was taken, as mu.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.torch.scan import last_of_segment, segment_of_token


class Rows:
    """The steps of a call: which tokens run side by side at each of them, and the states that enter and leave."""

    def __init__(self, cu_seqlens: Tensor | None, tokens: int):
        self.cu, self.steps = cu_seqlens, tokens
        if cu_seqlens is not None:
            lengths = cu_seqlens.long().diff()
            self.order = lengths.argsort(descending=True, stable=True)
            lengths = lengths[self.order]
            self.steps = int(lengths[0])
            step = torch.arange(self.steps, device=cu_seqlens.device)[:, None]
            self.live = (step < lengths).sum(1).tolist()
            self.index = (cu_seqlens[:-1].long()[self.order] + step)[step < lengths]  # tokens, step after step
            self.segment, first = segment_of_token(cu_seqlens, tokens)
            self.first = first[None]

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """[B, T, ...] -> one tensor [live rows, ...] per step."""
        return x.unbind(1) if self.cu is None else x[0, self.index].split(self.live)

    def join(self, steps: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        if self.cu is None:
            return torch.stack(steps, 1)
        flat = torch.cat(steps)
        out = torch.empty_like(flat)
        out[self.index] = flat
        return out[None]

    def enter(self, *states: Tensor) -> tuple[Tensor, ...]:
        """States [N, ...] in the order of the rows."""
        return states if self.cu is None else tuple(s[self.order] for s in states)

    def leave(self, state: Tensor) -> Tensor:
        """A copy in the order of the caller."""
        if self.cu is None:
            return state.clone()
        out = torch.empty_like(state)
        out[self.order] = state
        return out

    def previous(self, x: Tensor, x0: Tensor) -> Tensor:
        """The token before each of x [B, T, ...], from x0 [N, ...]."""
        if self.cu is None:
            return torch.cat([x0[:, None], x[:, :-1]], 1)
        first = self.first.view(1, -1, *[1] * (x.ndim - 2))
        return torch.where(first, x0[self.segment][None], x.roll(1, 1))


def _grow(g: Tensor, last: Tensor, live: int) -> Tensor:
    """Backward in time, rows join at their last token with the gradient of their final state."""
    return g if len(g) == live else torch.cat([g, last[len(g) : live]])


# ---- almost-linear RNN -----------------------------------------------------------------------------------------------


def _floor(units: int, relu_units: int, like: Tensor) -> Tensor:
    """phi(p) = max(p, floor)."""
    floor = like.new_zeros(units)
    floor[: units - relu_units] = -torch.inf
    return floor


def _forced(rows: Rows, strength: Tensor | None) -> list[bool]:
    """At which steps a teacher acts: sparse forcing leaves most of them alone."""
    if strength is None:
        return [False] * rows.steps
    tokens = strength.ne(0).any(-1)
    return tokens.any(0).tolist() if rows.cu is None else [bool(s.any()) for s in rows.split(tokens)]


@operator("linnet::almost_linear_rnn")
def alrnn_op(
    x: Tensor, decay: Tensor, weight: Tensor, relu_units: int, target: Tensor | None, strength: Tensor | None, z0: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """z [B, T, M], all operands of one dtype."""
    rows, floor, W = Rows(cu_seqlens, x.shape[1]), _floor(x.shape[2], relu_units, x), weight.mT
    (z,), out, forced = rows.enter(z0), [], _forced(rows, strength)
    teacher = None if target is None else list(zip(rows.split(target), rows.split(strength), strict=True))
    for t, x_t in enumerate(rows.split(x)):
        p = z if len(z) == len(x_t) else z[: len(x_t)]
        if forced[t]:
            p = torch.lerp(p, *teacher[t])
        z = torch.addmm(x_t, torch.maximum(p, floor), W).addcmul_(decay, p)
        out.append(z)
    return rows.join(out)


@alrnn_op.register_fake
def _(x, decay, weight, relu_units, target, strength, z0, cu_seqlens):
    return torch.empty_like(x)


@operator("linnet::almost_linear_rnn_backward")
def alrnn_backward_op(
    dz: Tensor, z: Tensor, decay: Tensor, weight: Tensor, relu_units: int, target: Tensor | None, strength: Tensor | None,
    z0: Tensor, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, decay, weight, z0, target and strength (the last two empty without forcing)."""
    rows, floor = Rows(cu_seqlens, z.shape[1]), _floor(z.shape[2], relu_units, z)
    before = rows.previous(z, z0)
    p = before if target is None else torch.lerp(before, target, strength)
    slopes, kept = rows.split((p > floor).to(p.dtype)), None if target is None else rows.split(1 - strength)
    forced, (last,), G, dp = _forced(rows, strength), rows.enter(torch.zeros_like(z0)), [], []
    g = last[:0]
    for t, dz_t in reversed(list(enumerate(rows.split(dz)))):
        G.append(_grow(g, last, len(dz_t)) + dz_t)
        g = torch.addcmul(decay * G[-1], slopes[t], G[-1] @ weight)
        dp.append(g)
        if forced[t]:
            g = g * kept[t]
    dz0 = rows.leave(_grow(g, last, len(last)))
    dx = rows.join(G[::-1])
    flat = lambda y: y.flatten(0, 1)  # noqa: E731
    dweight = flat(dx).mT @ flat(torch.maximum(p, floor))
    empty = z.new_empty(0)
    if target is None:
        return dx, (dx * p).sum((0, 1)), dweight, dz0, empty, empty.clone()
    dp = rows.join(dp[::-1])
    return dx, (dx * p).sum((0, 1)), dweight, dz0, strength * dp, (target - before) * dp


@alrnn_backward_op.register_fake
def _(dz, z, decay, weight, relu_units, target, strength, z0, cu_seqlens):
    like = lambda y: z.new_empty(0) if y is None else torch.empty_like(y)  # noqa: E731
    return tuple(map(like, (z, decay, weight, z0, target, strength)))


def _alrnn_setup(ctx, inputs, output):
    _, decay, weight, ctx.relu_units, target, strength, z0, cu_seqlens = inputs
    ctx.save_for_backward(output, decay, weight, target, strength, z0, cu_seqlens)


def _alrnn_backward(ctx, dz):
    z, decay, weight, target, strength, z0, cu_seqlens = ctx.saved_tensors
    dx, ddecay, dweight, dz0, dtarget, dstrength = torch.ops.linnet.almost_linear_rnn_backward(
        dz, z, decay, weight, ctx.relu_units, target, strength, z0, cu_seqlens
    )
    forced = target is not None
    return dx, ddecay, dweight, None, dtarget if forced else None, dstrength if forced else None, dz0, None


alrnn_op.register_autograd(_alrnn_backward, setup_context=_alrnn_setup)
refuse_double_backward(alrnn_backward_op)


@implements("almost_linear_rnn", "torch")
def almost_linear_rnn(
    x_BTM, decay_M, weight_MM, relu_units, target_BTM, strength_BTM, initial_state, return_state, cu_seqlens
):  # fmt: skip
    dtype = accumulate_dtype(x_BTM, decay_M, weight_MM)
    count = x_BTM.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    z0 = x_BTM.new_zeros(count, x_BTM.shape[2], dtype=dtype) if initial_state is None else initial_state[0].to(dtype)
    target, strength = (None if p is None else p.to(dtype) for p in (target_BTM, strength_BTM))
    operands = (x_BTM.to(dtype), decay_M.to(dtype), weight_MM.to(dtype))
    z = alrnn_op(*operands, relu_units, target, strength, z0, cu_seqlens)
    return z.to(x_BTM.dtype), (last_of_segment(z, cu_seqlens, z0),) if return_state else None


# ---- sLSTM -----------------------------------------------------------------------------------------------------------


def _slstm_gates(i: Tensor, f: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(i', f', the new m, where it comes from i)."""
    kept = F.logsigmoid(f) + m
    fresh = (n == 0) | (i >= kept)
    new = torch.where(fresh, i, kept)
    return (i - new).exp(), (kept - new).clamp_max(0).exp(), new, fresh


@operator("linnet::slstm")
def slstm_op(
    x: Tensor, weight: Tensor, h0: Tensor, C0: Tensor, n0: Tensor, m0: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, C, n, m after every token, [B, T, H, K] each; all operands of one dtype."""
    rows, R, out = Rows(cu_seqlens, x.shape[1]), weight.flatten(2), []  # R [H, K, 4 K]
    state = rows.enter(h0, C0, n0, m0)
    for x_t in rows.split(x):
        h, C, n, m = (s[: len(x_t)] for s in state)
        recurrent = torch.bmm(h.transpose(0, 1), R).transpose(0, 1)
        i, f, z, o = (x_t + recurrent.reshape(x_t.shape)).unbind(2)
        enter, keep, m, _ = _slstm_gates(i, f, n, m)
        C, n = keep * C + enter * z.tanh(), keep * n + enter
        state = (o.sigmoid() * C / n, C, n, m)
        out.append(state)
    return tuple(rows.join(list(values)) for values in zip(*out, strict=True))


@slstm_op.register_fake
def _(x, weight, h0, C0, n0, m0, cu_seqlens):
    return tuple(x.new_empty(*x.shape[:3], x.shape[4]) for _ in range(4))


@operator("linnet::slstm_backward")
def slstm_backward_op(
    dh: Tensor, dC: Tensor, dn: Tensor, dm: Tensor, h: Tensor, C: Tensor, n: Tensor, m: Tensor, x: Tensor, weight: Tensor,
    h0: Tensor, C0: Tensor, n0: Tensor, m0: Tensor, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, h0, C0, n0, m0."""
    rows = Rows(cu_seqlens, x.shape[1])
    hp, Cp, np, mp = (rows.previous(s, s0) for s, s0 in ((h, h0), (C, C0), (n, n0), (m, m0)))
    i, f, z, o = (x + torch.einsum("bthk,hkgl->bthgl", hp, weight)).unbind(3)
    enter, keep, _, fresh = _slstm_gates(i, f, np, mp)
    z, closing = z.tanh(), torch.sigmoid(-f)
    # what a unit gradient of h, C, n, mu gives to C, n and to the gates; rows of the gates in the order i, f, z, o
    zero = torch.zeros_like(z)
    from_h = torch.stack((zero, zero, zero, h * torch.sigmoid(-o)), 3)
    from_C = torch.stack((enter * z, keep * closing * Cp, enter * (1 - z * z), zero), 3)
    from_n = torch.stack((enter, keep * closing * np, zero, zero), 3)
    from_mu = torch.stack((fresh.to(z.dtype), torch.where(fresh, 0, closing), zero, zero), 3)
    slopes = (o.sigmoid() / n, -h / n, keep, (~fresh).to(z.dtype), from_h, from_C, from_n, from_mu)
    steps = list(zip(*map(rows.split, (dh, dC, dn, dm - dC * C - dn * n, *slopes)), strict=True))
    back = weight.flatten(2).mT.contiguous()  # [H, 4 K, K]
    (last,), dx = rows.enter(torch.zeros_like(h0)), []
    g = [last[:0]] * 4
    for dh_t, dC_t, dn_t, dmu_t, h_C, h_n, keep, passed, from_h, from_C, from_n, from_mu in reversed(steps):
        g_h, g_C, g_n, g_mu = (_grow(p, last, len(dh_t)) for p in g)
        g_h = g_h + dh_t
        g_C, g_n, g_mu = torch.addcmul(g_C + dC_t, g_h, h_C), torch.addcmul(g_n + dn_t, g_h, h_n), g_mu + dmu_t
        gates = from_h * g_h[:, :, None]
        for slope, p in ((from_C, g_C), (from_n, g_n), (from_mu, g_mu)):
            gates.addcmul_(slope, p[:, :, None])
        dx.append(gates)
        g = [torch.bmm(gates.flatten(2).transpose(0, 1), back).transpose(0, 1), keep * g_C, keep * g_n, passed * g_mu]
    dx = rows.join(dx[::-1])
    dh0, dC0, dn0, mu = (rows.leave(_grow(p, last, len(last))) for p in g)
    return dx, torch.einsum("bthk,bthgl->hkgl", hp, dx), dh0, dC0, dn0, mu + dC0 * C0 + dn0 * n0


@slstm_backward_op.register_fake
def _(dh, dC, dn, dm, h, C, n, m, x, weight, h0, C0, n0, m0, cu_seqlens):
    return tuple(map(torch.empty_like, (x, weight, h0, C0, n0, m0)))


def _slstm_setup(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs)


def _slstm_backward(ctx, dh, dC, dn, dm):
    return *torch.ops.linnet.slstm_backward(dh, dC, dn, dm, *ctx.saved_tensors), None


slstm_op.register_autograd(_slstm_backward, setup_context=_slstm_setup)
refuse_double_backward(slstm_backward_op)


@implements("slstm", "torch")
def slstm(x_BTHGK, weight_HKGK, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(x_BTHGK, weight_HKGK)
    batch, _, heads, _, size = x_BTHGK.shape
    count = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    zero = x_BTHGK.new_zeros(count, heads, size, dtype=dtype)
    state = [zero if initial_state is None else s.to(dtype) for s in (initial_state or (zero,) * 4)]
    values = slstm_op(x_BTHGK.to(dtype), weight_HKGK.to(dtype), *state, cu_seqlens)
    new = tuple(last_of_segment(v, cu_seqlens, s) for v, s in zip(values, state, strict=True)) if return_state else None
    return values[0].to(x_BTHGK.dtype), new
