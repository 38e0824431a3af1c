"""Backend `triton`: GPU kernels. Registering them imports no triton; the kernels are loaded by the first call that needs them."""

from linnet.ops.triton import conv, decode, delta, dplr, gate, loss, norm, recurrent, scan, selective_scan  # noqa: F401  (registers their implementations)
