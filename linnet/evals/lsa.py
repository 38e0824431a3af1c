"""What one layer of linear self-attention learns from regression: the best preconditioned step of gradient descent.

Zhang et al., "Trained Transformers Learn Linear Models In-Context", 2023 (arXiv 2306.09927); Ahn et al. 2023 (2306.00297).
The layer is `linnet.evals.exact.layer` with full, free P and Q; the answer is minus the last label entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linnet.evals.runner import Run, append_result, read_results
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


def train_lsa(spectrum: np.ndarray, *, layers: int = 1, seed: int = 0, steps: int = 3000, device: str = "cpu") -> dict[str, float]:
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


def train_all(
    out: str | Path,
    *,
    seeds: Iterable[int] = range(3),
    device: str = "cpu",
    progress: Callable[[str], None] | None = print,
    steps: int = 3000,
    **_: Any,
) -> list[dict[str, Any]]:
    """One row per spectrum, depth and seed, as a sweep writes them."""
    path, device, rows = Path(out) / "results.jsonl", device.split(",")[0], []
    cases = [("isotropic", 1), ("anisotropic", 1), ("isotropic", 4)]
    base = Run("in_context_regression", "linear self-attention", steps=steps, learning_rate=1e-2, batch_size=ROWS)
    for seed in seeds:
        for spectrum, layers in cases:
            label = spectrum + (f", {layers} layers" if layers > 1 else "")
            run = replace(base, label=label, layers=f"{label} {base.layers}", seed=seed)
            found = [row for row in read_results(path) if row["key"] == run.key]
            if not found:
                began = time.perf_counter()
                metrics = train_lsa(SPECTRA[spectrum], layers=layers, seed=seed, steps=steps, device=device)
                row = {"key": run.key, "label": label, "task": run.task, "layers": run.layers, "seed": seed, "status": "done"}
                row |= {"learning_rate": run.learning_rate, "steps": steps, "steps_taken": steps, "history": [], "device": device}
                row |= {"validation": -metrics["risk"], "metrics": {"train": metrics}, "seconds": time.perf_counter() - began}
                append_result(path, row)
                found = [row]
                if progress:
                    progress(f"linear self-attention, {label}, seed {seed}: {metrics['risk_ratio']:.3f} of the best step's risk")
            rows += found
    return rows
