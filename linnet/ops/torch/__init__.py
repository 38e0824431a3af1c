"""Backend `torch`: chunkwise PyTorch on any device, differentiable, without a Python loop over tokens but for `nonlinear`."""

from linnet.ops.torch import (  # noqa: F401 (each registers its implementations)
    attention,
    bidirectional,
    conv,
    decode,
    elementwise,
    long_conv,
    loss,
    memory,
    nonlinear,
    norm,
    pooling,
    recurrent,
    weighted_attention,
)
