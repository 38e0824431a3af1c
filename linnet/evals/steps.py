"""One optimizer step of an experiment. On a GPU it is recorded as a CUDA graph: models this small wait for Python otherwise."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WARM = 2  # steps per shape of batch before it is recorded: they compile kernels and make the optimizer's state
GRAPHS = 8  # shapes recorded at most; others are launched by Python

Batch = tuple[Tensor, ...]


def stream(device: str) -> contextlib.AbstractContextManager[Any]:
    """Context in which training on this device has to run: recording is not possible on the default stream."""
    if not device.startswith("cuda"):
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


class Step:
    """loss(*batch), its gradients, clipped to the norm `clip`, and one step of AdamW; zero gradients afterwards.

    step(batch) returns the loss, of which the next call overwrites the value. `batch` may lie in pinned memory. `graphs=False`, a
    device other than CUDA and complex parameters: everything is launched by Python, as after a recording that failed.
    """

    def __init__(
        self, loss: Callable[..., Tensor], groups: Iterable[dict[str, Any]], device: str, *, learning_rate: float,
        betas: tuple[float, float], clip: float, precision: str = "fp32", graphs: bool = True,
    ):  # fmt: skip
        groups = list(groups)
        self.parameters = [p for group in groups for p in group["params"]]
        fused = device.startswith("cuda") and not any(p.is_complex() for p in self.parameters)
        self.recording = graphs and fused
        self.loss, self.device, self.clip, self.bf16 = loss, device, clip, precision == "bf16"
        rate = torch.tensor(learning_rate, device=device) if self.recording else learning_rate
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused, capturable=self.recording)
        self.seen: Counter[tuple[torch.Size, ...]] = Counter()
        self.recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Batch, Tensor]] = {}
        self.replays = 0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16)

    def __call__(self, batch: Batch) -> Tensor:
        shapes = tuple(x.shape for x in batch)
        self.seen[shapes] += 1
        if self.recording and shapes not in self.recorded and self.seen[shapes] > WARM and len(self.recorded) < GRAPHS:
            self._record(shapes, batch)
        if shapes not in self.recorded:
            return self._work(tuple(x.to(self.device, non_blocking=True) for x in batch))
        graph, held, loss = self.recorded[shapes]
        for x, new in zip(held, batch, strict=True):
            x.copy_(new, non_blocking=True)
        graph.replay()
        self.replays += 1
        return loss

    def _work(self, batch: Batch) -> Tensor:
        with self.autocast():
            loss = self.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _record(self, shapes: tuple[torch.Size, ...], batch: Batch) -> None:
        held, graph = tuple(x.to(self.device) for x in batch), torch.cuda.CUDAGraph()
        pool = next(iter(self.recorded.values()))[0].pool() if self.recorded else None
        try:  # thread_local: another thread prepares the next batch in pinned memory meanwhile
            with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
                loss = self._work(held)
        except RuntimeError as error:
            warnings.warn(f"this step is launched by Python, it cannot be recorded as a CUDA graph: {error}", stacklevel=3)
            self.recording = False
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.recorded[shapes] = graph, held, loss
