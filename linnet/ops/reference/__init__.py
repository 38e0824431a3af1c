"""Backend `reference`: the specification, executable. One token at a time, in the dtype of the operands (at least fp32)."""

from linnet.ops.reference import (  # noqa: F401 (each registers its implementations)
    attention,
    bidirectional,
    convolution,
    decode,
    elementwise,
    loss,
    memory,
    nonlinear,
    norm,
    pooling,
    recurrent,
    weighted_attention,
)
