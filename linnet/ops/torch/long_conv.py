r"""Long convolution as a custom operator: Fourier transforms of overlapping blocks (overlap-save), a few channels at a time.

With x = [past L-1 | u | ...] the outputs are the valid part of a convolution, y_t = sum_j k_j x_{t+L-1-j}. Blocks of n samples
advance by n - L + 1, so that the circular convolution of a block is exact behind its first L - 1 samples; a kernel as long as
the sequence takes one block. Work: O(T log L) per channel. Memory beside inputs and outputs: about WORKSPACE elements, whatever T
and D, because channels are independent.

    dx = the valid convolution of dy, padded by L - 1 zeros on both sides, with the flipped kernel
    dk_j = sum_t dy_t x_{t+L-1-j}, the correlation of the blocks of dy and x

Nothing is kept for the backward but the operands. Packed segments are convolved one by one: offsets are read on the host.
Few lags go through the shifted products of the short convolution, which is causal bit for bit.
"""

# No `from __future__ import annotations` here: custom operators read their schema from the annotations.

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops._autograd import operator, refuse_double_backward
from linnet.ops._dispatch import implements
from linnet.ops._shapes import accumulate_dtype
from linnet.ops.torch.conv import _state, conv_op

WORKSPACE = 1 << 22  # samples that are transformed together
DIRECT = 64  # lags up to which shifted products are faster than transforms on the CPU


def _fast_size(n: int) -> int:
    """The smallest 2^a 3^b 5^c >= n: transforms of these sizes are fast everywhere."""
    best, five = 1 << (n - 1).bit_length(), 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            best = min(best, three << (rest - 1).bit_length())
            three *= 3
        five *= 5
    return best


def _plan(samples: int, lags: int) -> tuple[int, int, int]:
    """Transform size n, outputs per block, number of blocks for `samples` inputs of which samples - lags + 1 give an output."""
    outputs, n = samples - lags + 1, _fast_size(max(4 * lags, 1024))
    if n >= samples:
        return _fast_size(samples), outputs, 1
    return n, n - lags + 1, -(-outputs // (n - lags + 1))


def _blocks(x: Tensor, n: int, step: int, count: int) -> Tensor:
    """[..., samples] -> [..., count, n], block c from sample c * step, zeros behind the end."""
    x = F.pad(x, (0, max(0, (count - 1) * step + n - x.shape[-1])))
    return x.unfold(-1, n, step)[..., :count, :]


def _channel_parts(rows: int, groups: int, share: int, samples: int):
    """Slices of channel groups (as kernels, as channels) whose transforms fit in the workspace."""
    size = max(1, WORKSPACE // max(1, 2 * rows * share * samples))
    for start in range(0, groups, size):
        end = min(start + size, groups)
        yield slice(start, end), slice(start * share, end * share)


def _time_last(x: Tensor, channels: slice, share: int, before: int, after: int, past: Tensor | None) -> Tensor:
    """[R, T, D] -> [R, G, share, before + T + after], the padding zero or, in front, `past` [R, before, D]."""
    y = x[:, :, channels].mT
    y = F.pad(y, (before, after)) if past is None else F.pad(torch.cat([past[:, :, channels].mT, y], -1), (0, after))
    return y.unflatten(1, (-1, share))


def _valid(x: Tensor, kernel: Tensor) -> Tensor:
    """y_t = sum_j kernel_j x_{t+L-1-j}: x [R, G, share, P], kernel [G, L] -> [R, G, share, P-L+1]."""
    samples, lags = x.shape[-1], kernel.shape[-1]
    n, step, count = _plan(samples, lags)
    spectrum = torch.fft.rfft(_blocks(x, n, step, count), n=n)
    spectrum.mul_(torch.fft.rfft(kernel, n=n)[:, None, None])
    y = torch.fft.irfft(spectrum, n=n)[..., lags - 1 : lags - 1 + step]
    return y.flatten(-2)[..., : samples - lags + 1]


def _correlation(x: Tensor, dy: Tensor, lags: int) -> Tensor:
    """dk_j = sum_t dy_t x_{t+L-1-j}, summed over rows and shared channels: [G, L]."""
    n, step, count = _plan(x.shape[-1], lags)
    spectrum = torch.fft.rfft(_blocks(x, n, step, count), n=n)
    spectrum.mul_(torch.fft.rfft(_blocks(dy, step, step, count), n=n).conj())
    return torch.fft.irfft(spectrum.sum((0, 2, 3)), n=n)[..., :lags].flip(-1)


def _rows(cu_seqlens: Tensor | None, batch: int, tokens: int) -> list[tuple[slice, slice, slice]]:
    """(batch rows, tokens, state rows) of sequences of one length that are convolved together."""
    if cu_seqlens is None:
        return [(slice(0, batch), slice(0, tokens), slice(0, batch))]
    offsets = cu_seqlens.tolist()
    pairs = enumerate(zip(offsets, offsets[1:], strict=False))
    return [(slice(0, 1), slice(a, b), slice(i, i + 1)) for i, (a, b) in pairs if a < b]


def _extent(u: Tensor, kernel: Tensor, past: Tensor | None, lookahead: int) -> tuple[Tensor, int, int]:
    """The part of the kernel that can meet an input of this sequence, the zeros before it and its lookahead."""
    T, L = u.shape[1], kernel.shape[1]
    last = L if past is not None else min(L, lookahead + T)
    first = max(0, lookahead - T + 1)
    return kernel[:, first:last], first, lookahead - first


@operator("linnet::long_conv")
def long_conv_op(u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, lookahead: int) -> Tensor:
    """u [B, T, D], kernel [G, L], past [N, L-1, D], oldest first (causal only)."""
    y = torch.empty_like(u)
    share = u.shape[2] // kernel.shape[0]
    for b, t, n in _rows(cu_seqlens, u.shape[0], u.shape[1]):
        own, before = u[b, t], None if past is None else past[n]
        part, _, ahead = _extent(own, kernel, past, lookahead)
        lags = part.shape[1]
        for g, d in _channel_parts(own.shape[0], kernel.shape[0], share, own.shape[1] + lags):
            x = _time_last(own, d, share, lags - 1 - ahead, ahead, before)
            y[b, t, d] = _valid(x, part[g]).flatten(1, 2).mT
    return y


@long_conv_op.register_fake
def _(u, kernel, past, cu_seqlens, lookahead):
    return torch.empty_like(u)


@operator("linnet::long_conv_backward")
def long_conv_backward_op(
    dy: Tensor, u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, lookahead: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, kernel and past (empty without it)."""
    du, dkernel = torch.empty_like(u), torch.zeros_like(kernel)
    dpast = u.new_empty(0) if past is None else torch.zeros_like(past)
    share = u.shape[2] // kernel.shape[0]
    for b, t, n in _rows(cu_seqlens, u.shape[0], u.shape[1]):
        own, before = u[b, t], None if past is None else past[n]
        part, first, ahead = _extent(own, kernel, past, lookahead)
        lags = part.shape[1]
        zeros, tokens = lags - 1 - ahead, own.shape[1]
        for g, d in _channel_parts(own.shape[0], kernel.shape[0], share, tokens + 2 * lags):
            x = _time_last(own, d, share, zeros, ahead, before)
            g_y = _time_last(dy[b, t], d, share, 0, 0, None)
            dkernel[g, first : first + lags] += _correlation(x, g_y, lags)
            if past is None:  # only the tokens' own gradients
                dx = _valid(F.pad(g_y, (ahead, zeros)), part[g].flip(-1))
                du[b, t, d] = dx.flatten(1, 2).mT
            else:
                dx = _valid(F.pad(g_y, (lags - 1, lags - 1)), part[g].flip(-1)).flatten(1, 2).mT
                du[b, t, d], dpast[n, :, d] = dx[:, lags - 1 :], dx[:, : lags - 1]
    return du, dkernel, dpast


@long_conv_backward_op.register_fake
def _(dy, u, kernel, past, cu_seqlens, lookahead):
    return torch.empty_like(u), torch.empty_like(kernel), u.new_empty(0) if past is None else torch.empty_like(past)


def _setup(ctx, inputs, output):
    *tensors, ctx.lookahead = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    u, kernel, past, cu_seqlens = ctx.saved_tensors
    du, dkernel, dpast = long_conv_backward_op(dy, u, kernel, past, cu_seqlens, ctx.lookahead)
    return du, dkernel, None if past is None else dpast, None, None


long_conv_op.register_autograd(_backward, setup_context=_setup)
refuse_double_backward(long_conv_backward_op)


def _direct(u: Tensor, kernel: Tensor, past: Tensor | None, cu_seqlens: Tensor | None, lookahead: int) -> Tensor:
    """Shifted products: lags 0 .. forwards, and the future's, if any, as a convolution of the reversed sequence."""
    taps = kernel.repeat_interleave(u.shape[2] // kernel.shape[0], 0).mT
    y = conv_op(u, taps[lookahead:].contiguous(), None, past, cu_seqlens, False)
    if lookahead:
        ahead = torch.cat([torch.zeros_like(taps[:1]), taps[:lookahead].flip(0)])
        back = None if cu_seqlens is None else u.shape[1] - cu_seqlens.flip(0)
        y = y + conv_op(u.flip(1), ahead, None, None, back, False).flip(1)
    return y


@implements("long_conv", "torch")
def long_conv(u_BTD, kernel_DL, skip_D, lookahead, method, initial_state, return_state, cu_seqlens):
    dtype = accumulate_dtype(u_BTD, kernel_DL)
    u, kernel, lags = u_BTD.to(dtype), kernel_DL.to(dtype), kernel_DL.shape[1]
    past = initial_state[0].to(dtype).mT.contiguous() if initial_state is not None and lags > 1 else None
    state = (_state(u, past, cu_seqlens, lags).mT.contiguous(),) if return_state else None
    if past is None:
        kernel, _, lookahead = _extent(u, kernel, past, lookahead)
    if u.shape[1] == 1 and cu_seqlens is None:  # one decoded token
        seen = u if past is None else torch.cat([past, u], 1)
        taps = kernel.flip(1).repeat_interleave(u.shape[2] // kernel.shape[0], 0).mT
        y = (seen * taps).sum(1, keepdim=True)
    elif method == "direct" or (method == "auto" and kernel.shape[1] <= DIRECT):
        y = _direct(u, kernel, past, cu_seqlens, lookahead)
    else:
        y = long_conv_op(u, kernel, past, cu_seqlens, lookahead)
    if skip_D is not None:
        y = y + skip_D.to(dtype) * u
    return y.to(u_BTD.dtype), state
