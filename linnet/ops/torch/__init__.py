"""Backend `torch`: chunkwise PyTorch on any device, differentiable, without a Python loop over tokens."""

from linnet.ops.torch import attention, elementwise, recurrent, conv  # noqa: F401, I001  (each registers its implementations)
