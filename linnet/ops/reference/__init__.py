"""Backend `reference`: the specification, executable. One token at a time, in the dtype of the operands (at least fp32)."""

from linnet.ops.reference import attention, convolution, elementwise, recurrent  # noqa: F401  (each registers its implementations)
