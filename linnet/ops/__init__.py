"""The mathematics: functions of tensors, without parameters, modules or process groups.

Every operator takes [B, T, ...] operands, an optional `initial_state`, optional packed segments (`cu_seqlens`), and returns
`(output, state)`, the state a tuple of tensors with the row (batch or segment) first, or None unless `return_state=True`.
"""

# `import torch` must not appear in this file: the subpackage linnet.ops.torch would replace the name.
from linnet.ops import decode as decode
from linnet.ops import reference as reference
from linnet.ops import torch as torch
from linnet.ops import triton as triton
from linnet.ops._dispatch import backends_of, choose, debug, execute, operators, use_handler
from linnet.ops.affine import Segment, summarize, summarize_grad
from linnet.ops.attention import softmax_attention
from linnet.ops.bidirectional import bidirectional_attention
from linnet.ops.convolution import long_conv
from linnet.ops.elementwise import cumulative_logsumexp, scan, selective_scan, short_conv, token_shift
from linnet.ops.loss import softmax_cross_entropy
from linnet.ops.memory import neural_memory
from linnet.ops.nonlinear import almost_linear_rnn, slstm
from linnet.ops.norm import gated_linear_unit, gated_rms_norm, l2_norm
from linnet.ops.pooling import block_mean
from linnet.ops.recurrent import delta_rule, dplr, linear_attention
from linnet.ops.torch._inverse import use_inverse
from linnet.ops.weighted_attention import cell_attention, expand_cells, relative_attention, softplus_attention, span_attention

__all__ = [
    "Segment",
    "almost_linear_rnn",
    "backends_of",
    "bidirectional_attention",
    "block_mean",
    "cell_attention",
    "choose",
    "cumulative_logsumexp",
    "debug",
    "decode",
    "delta_rule",
    "dplr",
    "execute",
    "expand_cells",
    "gated_linear_unit",
    "gated_rms_norm",
    "l2_norm",
    "linear_attention",
    "long_conv",
    "neural_memory",
    "operators",
    "relative_attention",
    "scan",
    "selective_scan",
    "short_conv",
    "slstm",
    "softmax_attention",
    "softmax_cross_entropy",
    "softplus_attention",
    "span_attention",
    "summarize",
    "summarize_grad",
    "token_shift",
    "use_handler",
    "use_inverse",
]
