"""Backend `torch`: chunkwise PyTorch on any device, differentiable, without a Python loop over tokens."""

from linnet.ops.torch import attention, conv, elementwise, long_conv, recurrent  # noqa: F401  (each registers its implementations)
