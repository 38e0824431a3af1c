"""What one layer of linear self-attention learns from regression: the best preconditioned step of gradient descent.

Zhang et al., "Trained Transformers Learn Linear Models In-Context", 2023 (arXiv 2306.09927); Ahn et al. 2023 (2306.00297).
The layer is `linnet.evals.exact.layer` with full, free P and Q; the answer is minus the last label entry.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linnet.evals.runner import Run, check_time, row_of
from linnet.evals.tasks._base import stream
from linnet.evals.tasks.regression import optimal_preconditioner

DIMENSIONS, EXAMPLES, ROWS = 5, 20, 512
SPECTRA = {"isotropic": np.ones(DIMENSIONS), "anisotropic": 0.5 ** np.arange(DIMENSIONS)}


def predict(Z: Tensor, P_L: Tensor, Q_L: Tensor) -> Tensor:
    """Prompts Z [B, d+1, N+1] -> answers [B], through the layers P, Q [L, d+1, d+1]."""
    for P, Q in zip(P_L, Q_L, strict=True):
        key = Z[:, :, :-1]
        Z = Z + P @ key @ (key.mT @ Q @ Z) / key.shape[-1]
    return -Z[:, -1, -1]


def prompts(rng: np.random.Generator, rows: int, spectrum: np.ndarray) -> tuple[Tensor, Tensor]:
    x = rng.standard_normal((rows, DIMENSIONS, EXAMPLES + 1)) * np.sqrt(spectrum)[:, None]
    y = np.einsum("bd,bdn->bn", rng.standard_normal((rows, DIMENSIONS)), x)
    Z = np.concatenate((x, y[:, None]), 1)
    Z[:, -1, -1] = 0
    return torch.from_numpy(Z.astype(np.float32)), torch.from_numpy(y[:, -1].astype(np.float32))


def train_lsa(
    spectrum: np.ndarray, *, layers: int = 1, seed: int = 0, steps: int = 3000, device: str = "cpu", until: float | None = None
) -> dict[str, float]:
    """Train all of P and Q; the measures of the result.

    One layer starts, as in the theorem, at 0.1 times the structure of a step (from noise, a second, worse solution attracts it, in
    which inputs and labels change places for one direction); several layers start from N(0, 0.05^2).
    risk_ratio: its squared error over that of the best single step, tr C - tr(C^2 Gamma^-1). cosine: of the learned step with
    Gamma^-1. step_error: its mean eigenvalue against that of Gamma^-1 (both of the first layer).
    """
    torch.manual_seed(seed)
    P, Q = (0.05 * torch.randn(layers, DIMENSIONS + 1, DIMENSIONS + 1) for _ in range(2))
    if layers == 1:
        P, Q = torch.zeros_like(P), 0.1 * torch.eye(DIMENSIONS + 1)[None]
        P[0, -1, -1], Q[0, -1, -1] = -0.1, 0.0
    P, Q = (x.to(device).requires_grad_() for x in (P, Q))
    optimizer = torch.optim.Adam([P, Q], lr=1e-2 if layers == 1 else 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        check_time(until)
        Z, y = (x.to(device) for x in prompts(stream("lsa", seed, step), ROWS, spectrum))
        loss = (predict(Z, P, Q) - y).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([P, Q], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        Z, y = (x.to(device) for x in prompts(stream("lsa", "test"), 100_000, spectrum))
        risk = float((predict(Z, P, Q) - y).square().mean())
        step = -(P[0, -1, -1] * Q[0, :-1, :-1]).double().cpu().numpy()
    C, best = np.diag(spectrum), optimal_preconditioner(np.diag(spectrum), EXAMPLES)
    return {
        "risk": risk,
        "risk_ratio": risk / float(np.trace(C) - np.trace(C @ C @ best)),
        "cosine": float((step * best).sum() / np.linalg.norm(step) / np.linalg.norm(best)),
        "step_error": abs(float(np.trace(step) / np.trace(best)) - 1),
    }


def train_run(run: Run, device: str = "cpu", until: float | None = None) -> dict[str, Any]:
    """The row of a sweep for a run whose layers say "SPECTRUM, L layers"."""
    began, (spectrum, layers) = time.perf_counter(), run.layers.removesuffix(" layers").split(", ")
    metrics = train_lsa(SPECTRA[spectrum], layers=int(layers), seed=run.seed, steps=run.steps, device=device, until=until)
    row = row_of(run, device) | {"steps_taken": run.steps, "history": [], "validation": -metrics["risk"]}
    return row | {"metrics": {"train": metrics}, "seconds": time.perf_counter() - began}
