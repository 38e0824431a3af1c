"""Backend `triton`: GPU kernels. Registering them imports no triton; the kernels are loaded by the first call that needs them."""

from linnet.ops.triton import recurrent  # noqa: F401  (registers its implementation)
