"""Regression in context: examples (x_i, y_i) of a function that is new in every row, and what the classical methods make of them.

Garg et al., "What Can Transformers Learn In-Context?", 2022 (arXiv 2208.01066); comparators of von Oswald et al. 2022
(2212.07677), Fu et al. 2023 (2310.17086). The comparators are vectorised over rows and predict at every number of examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linnet.evals.tasks._base import Batch, Task, register_task, value_metrics

FUNCTIONS = ("linear", "sparse", "sign", "quadratic", "relu")
SHIFTS = ("none", "skewed", "scaled", "half_space", "orthogonal_query", "opposite_query")


@register_task("in_context_regression")
@register_task("in_context_classification", function="sign")
@register_task("in_context_outliers", function="sign", outliers=0.5)
@register_task("in_context_uncertainty", uncertainty=True, noise=0.5)
@dataclass(frozen=True, kw_only=True)
class InContextRegression(Task):
    """`length` examples of d numbers, x ~ N(0, I), y = w.x + noise * N(0, 1), w ~ N(0, task_scale^2 I).

    layout: "interleaved": x_1 y_1 x_2 y_2 ..., y_i asked at x_i (y is padded with zeros; two channels tell x from y);
    "joint": tokens (x_i, y_i), then the query (x, 0), where y is asked.
    function: "linear", "sparse" (three weights), "sign" (of w.x), "quadratic" (in x^2), "relu" (two layers, 100 units).
    shift, for tests: "skewed" covariance ~ 1 / i^2, "scaled" x by 2, "half_space" (x in d/2 dimensions), "orthogonal_query",
    "opposite_query" (the sign pattern of x changes at the last example). task_scale: of w, another shift.
    outliers: the share of examples that carry x + outlier_size * v with a random label; v is one direction for all rows.
    uncertainty: the model gives mean and log variance and is trained on the Gaussian likelihood.
    """

    length: int = 11
    dimensions: int = 5
    layout: str = "interleaved"
    function: str = "linear"
    shift: str = "none"
    noise: float = 0.0
    task_scale: float = 1.0
    outliers: float = 0.0
    outlier_size: float = 4.0
    uncertainty: bool = False
    inputs, targets = "vectors", "values"

    def check(self) -> None:
        if self.layout not in ("interleaved", "joint"):
            self.refuse("layout", "'interleaved' or 'joint'")
        if self.function not in FUNCTIONS:
            self.refuse("function", "one of " + ", ".join(FUNCTIONS))
        if self.shift not in SHIFTS:
            self.refuse("shift", "one of " + ", ".join(SHIFTS))

    @property
    def input_size(self) -> int:
        return self.dimensions + (3 if self.layout == "interleaved" else 1)

    @property
    def output_size(self) -> int:
        return 2 if self.uncertainty else 1

    def examples(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """x [B, n, d] and y [B, n] in float64."""
        d, n = self.dimensions, self.length
        x, w = rng.standard_normal((size, n, d)), self.task_scale * rng.standard_normal((size, d))
        if self.shift == "skewed":
            scale = 1 / np.arange(1, d + 1)
            rotation = np.linalg.qr(rng.standard_normal((d, d)))[0]
            x = x * (scale / np.sqrt((scale**2).mean())) @ rotation
        elif self.shift == "scaled":
            x = 2 * x
        elif self.shift == "half_space":
            basis = np.linalg.qr(rng.standard_normal((size, d, d)))[0][:, :, : (d + 1) // 2]
            x = x @ basis @ basis.transpose(0, 2, 1)
        elif self.shift == "opposite_query":
            sign = rng.choice((-1.0, 1.0), (size, 1, d))
            x = np.abs(x) * sign * np.where(np.arange(n) == n - 1, -1, 1)[:, None]
        elif self.shift == "orthogonal_query" and n - 1 < d:
            basis = np.linalg.qr(x[:, :-1].transpose(0, 2, 1))[0]
            x[:, -1] -= np.einsum("bdk,bk->bd", basis, np.einsum("bdk,bd->bk", basis, x[:, -1]))
        if self.function == "sparse":
            w *= rng.random((size, d)).argsort(1) < 3
        if self.function == "relu":
            a, b = rng.standard_normal((size, d, 100)), rng.standard_normal((size, 100))
            y = np.einsum("bnh,bh->bn", np.maximum(x @ a, 0), b) * np.sqrt(2 / 100)
        else:
            y = np.einsum("bnd,bd->bn", x**2 / np.sqrt(3) if self.function == "quadratic" else x, w)
        y = np.sign(y) if self.function == "sign" else y + self.noise * rng.standard_normal(y.shape)
        if self.outliers:
            hit = (rng.random((size, n)) < self.outliers) & (np.arange(n) < n - 1)
            x = x + np.where(hit, self.outlier_size, 0)[..., None] * np.ones(d) / np.sqrt(d)
            y = np.where(hit, rng.choice((-1.0, 1.0), y.shape), y)
        return x, y

    def generate(self, rng, size, split):
        x, y = self.examples(rng, size)
        n, d = self.length, self.dimensions
        if self.layout == "joint":
            inputs = np.concatenate((x, y[..., None]), -1)
            inputs[:, -1, -1] = 0
            targets = np.full((size, n, 1), np.nan)
            targets[:, -1, 0] = y[:, -1]
        else:
            inputs = np.zeros((size, n, 2, d + 3))
            inputs[:, :, 0, :d], inputs[:, :, 1, d] = x, y
            inputs[:, :, 0, d + 1], inputs[:, :, 1, d + 2] = 1, 1
            inputs = inputs.reshape(size, 2 * n, -1)
            targets = np.full((size, 2 * n, 1), np.nan)
            targets[:, ::2, 0] = y
        return Batch(inputs.astype(np.float32), targets.astype(np.float32), {"x": x, "y": y})

    def metrics(self, output, batch):
        """Also the squared error over d at every number of examples, and with `uncertainty` the negative log-likelihood."""
        sums = value_metrics(output[..., :1], batch.targets)
        asked = ~np.isnan(batch.targets[..., 0])
        error = np.where(asked, output[..., 0] - np.nan_to_num(batch.targets[..., 0]), 0.0) ** 2
        step = slice(None, None, 2) if self.layout == "interleaved" else slice(-1, None)
        sums["error_by_examples"] = (error.sum(0)[step] / self.dimensions, asked.sum(0)[step])
        if self.function == "sign":
            right = np.sign(output[..., 0]) == np.nan_to_num(batch.targets[..., 0])
            sums["sign_accuracy"] = (int((right & asked).sum()), int(asked.sum()))
        if self.uncertainty:
            nll = 0.5 * (output[..., 1] + error * np.exp(-output[..., 1]) + np.log(2 * np.pi))
            sums["nll"] = (float(nll[asked].sum()), int(asked.sum()))
        return sums


# ---- comparators ---------------------------------------------------------------------------------------------------------
# fit(x [B, n, d], y [B, n]) -> weights [B, d]. `curve` asks each of them at every number of examples.


def least_squares(x: np.ndarray, y: np.ndarray, ridge: float = 0.0) -> np.ndarray:
    """The minimum-norm least-squares weights; with ridge > 0 those of ridge regression.

    ridge = noise^2 / task_scale^2 is the posterior mean of a Gaussian prior on the weights.
    """
    if ridge == 0:
        return np.einsum("bdn,bn->bd", np.linalg.pinv(x), y)
    gram = x.transpose(0, 2, 1) @ x + ridge * np.eye(x.shape[-1])
    return np.linalg.solve(gram, x.transpose(0, 2, 1) @ y[..., None])[..., 0]


def posterior_variance(x: np.ndarray, query: np.ndarray, noise: float, task_scale: float = 1.0) -> np.ndarray:
    """Variance of y at query [B, d] given the examples: q^T (X^T X / noise^2 + I / task_scale^2)^-1 q + noise^2."""
    precision = x.transpose(0, 2, 1) @ x / noise**2 + np.eye(x.shape[-1]) / task_scale**2
    return np.einsum("bd,bd->b", query, np.linalg.solve(precision, query[..., None])[..., 0]) + noise**2


def gradient_descent(x: np.ndarray, y: np.ndarray, steps: int = 1, rate: float = 0.1, precondition=None) -> np.ndarray:
    """`steps` steps from zero on |X w - y|^2 / 2n: w <- w + rate * A X^T (y - X w) / n, with the preconditioner A (None: I)."""
    w = np.zeros((len(x), x.shape[-1]))
    for _ in range(steps):
        gradient = np.einsum("bnd,bn->bd", x, y - np.einsum("bnd,bd->bn", x, w)) / x.shape[1]
        w = w + rate * (gradient if precondition is None else gradient @ precondition.T)
    return w


def optimal_preconditioner(covariance: np.ndarray, examples: int, noise: float = 0.0) -> np.ndarray:
    """Gamma^-1, Gamma = (1 + 1/n) C + (tr C + noise^2) / n I: the best one step for x ~ N(0, C), w ~ N(0, I).

    Isotropic: 1 / (1 + (d + 1 + noise^2) / n), the step n / (n + d + 1 + noise^2). Zhang et al. 2023 (arXiv 2306.09927).
    """
    d = len(covariance)
    return np.linalg.inv((1 + 1 / examples) * covariance + (np.trace(covariance) + noise**2) / examples * np.eye(d))


def newton(x: np.ndarray, y: np.ndarray, steps: int = 1) -> np.ndarray:
    """M_k X^T y with M_0 = S / |S|_F^2 and M_{k+1} = 2 M_k - M_k S M_k, S = X^T X: the residual I - M_k S is squared each time."""
    S = x.transpose(0, 2, 1) @ x
    M = S / np.square(S).sum((1, 2), keepdims=True)
    for _ in range(steps):
        M = 2 * M - M @ S @ M
    return np.einsum("bde,bnd,bn->be", M, x, y)


def curve(fit, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean squared error over d after 0, 1, .. n-1 examples, each tested on the next one: as `error_by_examples`."""
    errors = [np.square(y[:, 0]).mean()]
    errors += [np.square(np.einsum("bd,bd->b", fit(x[:, :k], y[:, :k]), x[:, k]) - y[:, k]).mean() for k in range(1, x.shape[1])]
    return np.array(errors) / x.shape[-1]
