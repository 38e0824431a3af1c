"""Reconstruction of a dynamical system from a time series: train an almost-linear RNN, let it run freely, compare the attractors.

    series = standardize(lorenz63(100_000))
    result = reconstruct(series, units=20, relu_units=2)
    result.measures     {"D_stsp": .., "D_H": .., "lyapunov": .., "regions": .., "prediction_error": ..}

A reconstruction is judged by what it does in the long run, not by the next step: a chaotic system separates from any model of it
after a few Lyapunov times, while its invariant measure (D_stsp) and its spectrum (D_H) stay comparable.

Shape legend: B batch, T time steps, N observed variables, M units, P rectified units.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.evals.runner import Run, check_time, row_of
from linnet.mixers.al_rnn import init_dynamics
from linnet.models import parse_layers

F64 = torch.float64


# ---- systems -------------------------------------------------------------------------------------------------------------


Point = tuple[float, ...]


def integrate(field: Callable[[Point], Point], start: Point, steps: int, dt: float) -> Tensor:
    """The states [steps, N], fp64, of x' = field(x) after 1, 2, .. fixed steps of the classical Runge-Kutta method of order 4."""
    x, states = tuple(start), []
    move = lambda x, k, h: tuple(a + h * b for a, b in zip(x, k, strict=True))
    for _ in range(steps):
        k1 = field(x)
        k2 = field(move(x, k1, dt / 2))
        k3 = field(move(x, k2, dt / 2))
        k4 = field(move(x, k3, dt))
        x = tuple(a + dt / 6 * (p + 2 * q + 2 * r + s) for a, p, q, r, s in zip(x, k1, k2, k3, k4, strict=True))
        states.append(x)
    return torch.tensor(states, dtype=F64)


def lorenz63(
    steps: int,
    dt: float = 0.01,
    *,
    sigma: float = 10.0,
    rho: float = 28.0,
    beta: float = 8 / 3,
    transient: int = 2000,
    seed: int = 0,
) -> Tensor:
    """A trajectory [steps, 3] in fp64 of x' = sigma (y - x), y' = x (rho - z) - y, z' = x y - beta z, on its attractor.

    It starts near (1, 1, 25), moved by `seed`, and the first `transient` steps are dropped. Same arguments, same numbers.
    """
    moved = torch.randn(3, dtype=F64, generator=torch.Generator().manual_seed(seed)).tolist()

    def field(s: Point) -> Point:
        x, y, z = s
        return sigma * (y - x), x * (rho - z) - y, x * y - beta * z

    return integrate(field, (1.0 + moved[0], 1.0 + moved[1], 25.0 + moved[2]), transient + steps, dt)[transient:]


def standardize(series_TN: Tensor) -> Tensor:
    """Every variable to mean 0 and standard deviation 1."""
    return (series_TN - series_TN.mean(0)) / series_TN.std(0)


# ---- measures ------------------------------------------------------------------------------------------------------------


def state_space_divergence(true_TN: Tensor, generated_TN: Tensor, bins: int = 30, alpha: float = 1e-5) -> float:
    """D_stsp: KL(p_true || p_generated) of histograms over state space, in nats.

    Bins per variable span the range of the true series. Both histograms get `alpha` per bin; generated points outside that range
    are in no bin but count in the total, so that a run that leaves the attractor cannot look good by what remains. NaN counts as
    outside.
    """
    low, high = true_TN.amin(0), true_TN.amax(0)

    def histogram(x: Tensor) -> Tensor:
        position = (x.to(F64) - low) / (high - low) * bins
        inside = ((position >= 0) & (position <= bins)).all(1)  # False for NaN
        cell, index = position[inside].long().clamp_max(bins - 1), 0
        for axis in range(x.shape[1]):
            index = index * bins + cell[:, axis]
        counts = torch.bincount(index, minlength=bins ** x.shape[1]).to(F64)
        return (counts + alpha) / (x.shape[0] + alpha * counts.numel())

    true_TN = true_TN.to(F64)
    low, high = low.to(F64), high.to(F64)
    p, q = histogram(true_TN), histogram(generated_TN)
    return float((p * (p.log() - q.log())).sum())


def power_spectrum(series_TN: Tensor, sigma: float = 20.0) -> Tensor:
    """|FFT|^2 of the standardised variables [F, N], smoothed over frequencies by a Gaussian of `sigma` bins, of sum 1."""
    x = series_TN.to(F64)
    spread = x.std(0)
    x = (x - x.mean(0)) / torch.where(spread > 1e-6, spread, torch.inf)
    power = torch.fft.rfft(x, dim=0).abs().square()
    reach = math.ceil(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=F64) / sigma).square())
    power = nn.functional.pad(power.mT[:, None], (reach, reach), mode="reflect")
    power = nn.functional.conv1d(power, (kernel / kernel.sum())[None, None])[:, 0].mT
    return power / power.sum(0).clamp_min(1e-300)  # a constant has no spectrum: all zero, and the distance to it is 1


def spectral_distance(true_TN: Tensor, generated_TN: Tensor, sigma: float = 20.0) -> float:
    """D_H: the Hellinger distance of the power spectra, in [0, 1], mean over variables. 1 where the run is not finite."""
    if not bool(generated_TN.isfinite().all()):
        return 1.0
    length = min(len(true_TN), len(generated_TN))
    p, q = (power_spectrum(x[:length], sigma) for x in (true_TN, generated_TN))
    return float((1 - (p * q).sqrt().sum(0)).clamp_min(0).sqrt().mean())


# ---- model and recipe ----------------------------------------------------------------------------------------------------


class DynamicsRNN(nn.Module):
    """An almost-linear RNN without inputs whose first N units are the observed variables.

        z_t = A z_{t-1} + W phi(z_{t-1}) + h,   x_t = z_t[:N],   start (x_0, L x_0)

    A diagonal, phi the ReLU on the last P units (Brenner et al. 2024, arXiv 2410.14240).
    """

    def __init__(self, observed: int, units: int = 20, relu_units: int = 2):
        super().__init__()
        if not 1 <= observed <= units - relu_units or relu_units < 0:
            raise ValueError(
                "DynamicsRNN: arguments 'observed' and 'relu_units' must be >= 1 and >= 0 and fit into 'units'; "
                f"got {observed}, {relu_units} and {units}"
            )
        self.observed, self.units, self.relu_units = observed, units, relu_units
        self.A, self.h = nn.Parameter(torch.empty(units)), nn.Parameter(torch.zeros(units))
        self.W, self.L = nn.Parameter(torch.empty(units, units)), nn.Parameter(torch.empty(units - observed, observed))
        init_dynamics(self.A, self.W)
        nn.init.normal_(self.L, std=0.01)

    def start(self, x_BN: Tensor) -> Tensor:
        """The state [B, M] of a first observation."""
        return torch.cat((x_BN, x_BN @ self.L.mT), 1)

    def forward(self, x_BTN: Tensor, strength_T: Tensor) -> Tensor:
        """The observation after each of x_1 .. x_T: [B, T, N]; before step t > 1 the observed units move to x_t by strength_t."""
        batch, steps, _ = x_BTN.shape
        rest = self.units - self.observed
        target = nn.functional.pad(x_BTN, (0, rest))
        strength = nn.functional.pad(strength_T[:, None].expand(-1, self.observed), (0, rest)).expand(batch, -1, -1)
        z_BTM, _ = ops.almost_linear_rnn(
            self.h.expand(batch, steps, -1), self.A, self.W, self.relu_units, target_BTM=target, strength_BTM=strength,
            initial_state=self.start(x_BTN[:, 0]),
        )  # fmt: skip
        return z_BTM[..., : self.observed]

    @torch.no_grad()
    def run(self, x_N: Tensor, steps: int) -> Tensor:
        """The states [steps, M] of a free run from one observation."""
        inputs = self.h.expand(1, steps, -1)
        return ops.almost_linear_rnn(inputs, self.A, self.W, self.relu_units, initial_state=self.start(x_N[None]))[0][0]

    def words(self, z_TM: Tensor) -> Tensor:
        """The linear region of every state [T], 0 .. 2^P - 1: which of the rectified units are positive."""
        bits = 2 ** torch.arange(self.relu_units)
        return ((z_TM[:, self.units - self.relu_units :] > 0) * bits).sum(1)

    @torch.no_grad()
    def lyapunov(self, z_TM: Tensor, skip: int = 100) -> float:
        """The largest Lyapunov exponent per step along a trajectory: the mean growth of a tangent vector."""
        A, W, growth = self.A.to(F64), self.W.to(F64), 0.0
        slope = torch.ones_like(z_TM, dtype=F64)
        slope[:, self.units - self.relu_units :] = (z_TM[:, self.units - self.relu_units :] > 0).to(F64)
        v = torch.full((self.units,), self.units**-0.5, dtype=F64)
        for t, gate in enumerate(slope):
            v = A * v + W @ (gate * v)
            norm = v.norm().clamp_min(1e-300)
            v = v / norm
            growth += float(norm.log()) if t >= skip else 0.0
        return growth / max(1, len(z_TM) - skip)


def forcing(kind: str, steps: int, interval: int, strength: float) -> Tensor:
    """Strength of the teacher before every step [T]: "sparse" 1 every `interval` steps, "generalized" `strength` always."""
    if kind == "sparse":
        return (torch.arange(steps) % interval == 0).float()
    if kind == "generalized":
        return torch.full((steps,), float(strength))
    raise ValueError(f"reconstruct: argument 'teacher' must be one of 'sparse', 'generalized'; got {kind!r}")


@dataclass
class Reconstruction:
    """What `reconstruct` returns: the trained model, its measures, the losses per epoch, and states [T, M] of a free run."""

    model: DynamicsRNN
    measures: dict[str, float]
    losses: list[float]
    states: Tensor
    seconds: float

    @property
    def generated(self) -> Tensor:
        """The observed variables [T, N] of the free run."""
        return self.states[:, : self.model.observed]


def reconstruct(
    series_TN: Tensor,
    *,
    test_TN: Tensor | None = None,
    units: int = 20,
    relu_units: int = 2,
    teacher: str = "sparse",
    interval: int = 16,
    strength: float = 0.1,
    window: int = 200,
    batch: int = 16,
    epochs: int = 2000,
    batches: int = 50,
    rates: tuple[float, float] = (1e-3, 1e-5),
    noise: float = 0.05,
    run: int = 10_000,
    transient: int = 1000,
    seed: int = 0,
    until: float | None = None,
) -> Reconstruction:
    """Train an almost-linear RNN on a standardised series and judge its free run.

    The loss is the mean squared error of the observed variables over windows of `window` steps with teacher forcing; RAdam, its
    rate falling exponentially from `rates[0]` to `rates[1]` over epochs * batches steps; Gaussian noise on every window.
    The defaults are the paper's for Lorenz-63: 100,000 steps over windows of 200.

    Args:
        series_TN: [T, N], N variables of mean 0 and deviation 1. test_TN: what the free run is compared with (None: the series).
        units, relu_units: M and P. teacher: "sparse" replaces the observed units by the data every `interval` steps (Mikhaeil
            et al. 2022, arXiv 2110.07238); "generalized" moves them by `strength` at every step (Hess et al. 2023,
            arXiv 2306.04406, with a constant strength).
        run, transient: steps of the free run that are compared, after those that are dropped.
        seed: of the weights, the windows and the noise. The same arguments on the same machine give the same result.
        until: a value of `time.time()` after which it raises `TimeoutError`.

    Returns:
        A `Reconstruction`; its measures: D_stsp, D_H, `lyapunov` (largest exponent per step), `regions` (linear regions visited),
        `prediction_error` (mean squared, over 20 free steps).

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if series_TN.ndim != 2 or len(series_TN) <= window + 1:
        came = tuple(series_TN.shape)
        raise ValueError(
            f"reconstruct: argument 'series_TN' must be of shape [T, N] with T > window + 1 = {window + 1}; got {came}"
        )
    strengths, began = forcing(teacher, window, interval, strength), time.perf_counter()
    data, test = series_TN.float(), (series_TN if test_TN is None else test_TN).float()
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DynamicsRNN(data.shape[1], units, relu_units)
    optimizer = torch.optim.RAdam(model.parameters(), lr=rates[0])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (rates[1] / rates[0]) ** (1 / max(1, epochs * batches)))
    offsets, losses = torch.arange(window + 1), []
    for _ in range(epochs):
        total = 0.0
        for _ in range(batches):
            check_time(until)
            first = torch.randint(len(data) - window, (batch, 1), generator=rng)
            x = data[first + offsets]
            x = x + noise * torch.randn(x.shape, generator=rng)
            loss = (model(x[:, :-1], strengths) - x[:, 1:]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        losses.append(total / batches)
    states = model.run(test[0], transient + run)[transient:]
    return Reconstruction(model, judge(model, states, test), losses, states, time.perf_counter() - began)


@torch.no_grad()
def judge(model: DynamicsRNN, states_TM: Tensor, test_TN: Tensor, horizon: int = 20) -> dict[str, float]:
    """The measures of a free run against a true series."""
    generated = states_TM[:, : model.observed]
    starts = torch.linspace(0, len(test_TN) - horizon - 1, 200).long()[:, None] + torch.arange(horizon + 1)
    x = test_TN[starts]
    free = model(x[:, :-1], torch.zeros(horizon))
    finite = bool(states_TM.isfinite().all())
    return {
        "D_stsp": state_space_divergence(test_TN, generated),
        "D_H": spectral_distance(test_TN, generated),
        "lyapunov": model.lyapunov(states_TM) if finite else math.inf,
        "regions": float(model.words(states_TM).unique().numel()),
        "prediction_error": float((free - x[:, 1:]).square().mean()),
    }


# ---- the measured example ------------------------------------------------------------------------------------------------

# Windows of 100 instead of 200, 15,000 steps instead of 100,000 at a higher rate: minutes on one core.
BUDGET = {"window": 100, "batch": 32, "epochs": 300, "rates": (1e-2, 2e-4), "noise": 0.05, "run": 100_000}
SETTINGS: dict[str, dict[str, Any]] = {
    "P = 0": {"units": 30, "relu_units": 0},
    "P = 2": {"units": 20, "relu_units": 2},
    "P = 10": {"units": 30, "relu_units": 10},
    "P = 10, generalized": {"units": 30, "relu_units": 10, "teacher": "generalized", "strength": 0.2},
}


def lorenz_series() -> tuple[Tensor, Tensor]:
    """40,000 steps to train on and the 100,000 after them to compare with, standardised together."""
    series = standardize(lorenz63(140_000))
    return series[:40_000], series[40_000:]


def lorenz_example(options: dict[str, Any]) -> Reconstruction:
    torch.set_num_threads(1)  # the matrices are tiny
    train, test = lorenz_series()
    return reconstruct(train, test_TN=test, **options)


def train_run(run: Run, device: str = "cpu", until: float | None = None) -> dict[str, Any]:
    """The row of a sweep for a run whose layers say "al_rnn(units=M, relu_units=P)"; on the CPU, wherever the sweep is."""
    options = BUDGET | {"epochs": max(1, run.steps // 50), "seed": run.seed} | parse_layers(run.layers)[0].options
    train, test = lorenz_series()
    result = reconstruct(train, test_TN=test, until=until, **options)
    row = row_of(run, "cpu") | {"steps_taken": run.steps, "history": [], "validation": -result.measures["prediction_error"]}
    return row | {"metrics": {"train": result.measures | {"loss": result.losses[-1]}}, "seconds": result.seconds}


def plot(true_TN: Tensor, results: dict[str, Reconstruction], path: Path) -> None:
    """The attractor in the (x, z) plane, coloured by linear region, and the spectra."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results) + 2, figsize=(3.6 * (len(results) + 2), 3.4), constrained_layout=True)
    shown = 6000
    axes[0].plot(true_TN[:shown, 0], true_TN[:shown, 2], lw=0.4, color="0.3")
    axes[0].set_title("Lorenz-63")
    for axis, (name, result) in zip(axes[1:], results.items(), strict=False):
        x, words = result.generated[:shown], result.model.words(result.states[:shown])
        words = torch.unique(words, return_inverse=True)[1]
        axis.scatter(x[:, 0], x[:, 2], c=words, s=0.4, cmap="viridis")
        axis.set_title(f"{name}: D_stsp {result.measures['D_stsp']:.2f}, D_H {result.measures['D_H']:.2f}", fontsize=10)
        axis.set_xlim(axes[0].get_xlim())
        axis.set_ylim(axes[0].get_ylim())
    for axis in axes[:-1]:
        axis.set_xlabel("x")
    axes[0].set_ylabel("z")
    runs = {name: result.generated for name, result in results.items()}
    for name, series in ({"Lorenz-63": true_TN} | runs).items():
        if bool(series.isfinite().all()):
            spectrum = power_spectrum(series)[:, 2]
            axes[-1].semilogy(torch.linspace(0, 0.5, len(spectrum)), spectrum.clamp_min(1e-9), label=name, lw=1)
    axes[-1].set_xlim(0, 0.06)
    axes[-1].set_xlabel("frequency of z (per step)")
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(out: Path = Path("docs/measured"), workers: int = 1, seed: int = 0) -> None:
    """Reconstruct Lorenz-63 with each of SETTINGS; write al_rnn_lorenz.json and al_rnn_lorenz.png into `out`."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    _, test = lorenz_series()
    jobs = [BUDGET | options | {"seed": seed} for options in SETTINGS.values()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = dict(zip(SETTINGS, pool.map(lorenz_example, jobs), strict=True))
    rows = []
    for name, result in results.items():
        cost = {"loss": result.losses[-1], "seconds": round(result.seconds)}
        rows.append({"name": name, **SETTINGS[name], **result.measures, **cost})
        print(json.dumps(rows[-1]))
    other = standardize(lorenz63(len(test), seed=1))
    floor = {"D_stsp": state_space_divergence(test, other), "D_H": spectral_distance(test, other)}
    report = {"budget": BUDGET, "seed": seed, "torch": torch.__version__, "true_against_true": floor, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "al_rnn_lorenz.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(test, results, out / "al_rnn_lorenz.png")


if __name__ == "__main__":
    import typer

    typer.run(main)
