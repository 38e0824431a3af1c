"""Random calls of the matrix-state operators, drawn by hypothesis: what the laws in test_recurrent_laws.py run over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

import linnet.ops as ops

OPS = ("linear_attention", "delta_rule", "dplr")
LENGTHS = (1, 2, 15, 16, 17, 33, 63, 64, 65, 100)


@dataclass
class Call:
    """One operator call: `tensors` are differentiable arguments with time on axis 1 (`steps` per token) or constant."""

    op: str
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    state: tuple[torch.Tensor, ...] | None = None
    steps: int = 1
    cu_seqlens: torch.Tensor | None = None
    per_step: set[str] = field(default_factory=set)

    def run(self, backend: str | None = None, *, tensors=None, state="own", cu_seqlens="own", **extra):
        arguments = dict(tensors or self.tensors)
        names = ("q", "k", "v", "a", "b", "log_decay") if self.op == "dplr" else ("q", "k", "v")
        order = [arguments.pop(n) for n in names if n in arguments]
        return getattr(ops, self.op)(
            *order, **arguments, **self.options, **extra, return_state=True, backend=backend,
            initial_state=self.state if isinstance(state, str) else state,
            cu_seqlens=self.cu_seqlens if isinstance(cu_seqlens, str) else cu_seqlens,
        )  # fmt: skip

    def time(self, name: str, start: int, end: int, tensors=None) -> torch.Tensor:
        """The tokens start..end of argument `name`; constants unchanged."""
        x = (tensors or self.tensors)[name]
        if not self.has_time(name):
            return x
        n = self.steps if name in self.per_step else 1
        return x[:, start * n : end * n]

    def has_time(self, name: str) -> bool:
        return self.tensors[name].ndim >= 3

    def slice(self, start: int, end: int, tensors=None) -> dict[str, torch.Tensor]:
        return {name: self.time(name, start, end, tensors) for name in self.tensors}

    @property
    def tokens(self) -> int:
        return self.tensors["q"].shape[1]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _heads(draw, total: int) -> int:
    return draw(st.sampled_from([h for h in (1, 2, 4) if total % h == 0]))


@st.composite
def calls(draw, ops_=OPS, packed=None, lengths=LENGTHS, decay_scale=None, dtype=torch.float64):
    """A call of one of `ops_` with random operands, options, head counts, decay kind, state and packing."""
    op = draw(st.sampled_from(ops_))
    seed = draw(st.integers(0, 2**31 - 1))
    rng = torch.Generator().manual_seed(seed)
    H, K, V = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 3, 8])), draw(st.sampled_from([1, 5, 8]))
    n = draw(st.sampled_from([1, 1, 2, 3])) if op != "dplr" else 1
    cu = None
    if packed is None:
        packed = draw(st.booleans())
    if packed:
        parts = draw(st.lists(st.sampled_from([0, 1, 5, 16, 17, 33]), min_size=1, max_size=4).filter(sum))
        cu, B, T = offsets(parts), 1, sum(parts)
        rows = len(parts)
    else:
        B, T = draw(st.sampled_from([1, 2])), draw(st.sampled_from(lengths))
        rows = B

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=dtype)

    def key(heads):
        x = normal(B, T * n, heads, K)
        return x / x.norm(dim=-1, keepdim=True)

    heads = {name: _heads(draw, H) for name in ("q", "k", "v", "g", "e", "w", "p", "i", "u")}
    heads[draw(st.sampled_from(["q", "k", "v"]))] = H
    tensors = {"q": normal(B, T, heads["q"], K), "k": key(heads["k"]), "v": normal(B, T * n, heads["v"], V)}
    per_step, options, state_heads = {"k", "v"}, {}, [heads["k"], heads["v"]]
    kind = draw(st.sampled_from(["none", "head", "channel", "token", "token_channel"]))
    strength = draw(st.sampled_from([0.05, 1.0, 20.0])) if decay_scale is None else decay_scale
    per_head, per_token = (heads["g"],), (B, T, heads["g"])
    shape = {"head": per_head, "channel": (*per_head, K), "token": per_token, "token_channel": (*per_token, K)}.get(kind)
    if shape is not None:
        g = -strength * torch.rand(*shape, generator=rng, dtype=dtype)
        if draw(st.booleans()):
            g = g * (torch.rand(*shape, generator=rng) > 0.3)
        tensors["log_decay"] = g
        state_heads.append(heads["g"])
    if op == "linear_attention":
        options["read"] = draw(st.sampled_from(["after", "before"]))
        options["normalizer"] = draw(st.sampled_from([None, "sum", "floor"]))
        if options["normalizer"] == "sum":
            # Positive features keep the sum away from zero, as every user of it does; a large eps keeps the gradients of q and k
            # away from zero where a single token would otherwise return v whatever q and k are.
            options["normalizer_eps"] = 0.3
            tensors["q"], tensors["k"] = tensors["q"].abs() + 0.1, tensors["k"].abs() + 0.1
        if options["read"] == "before" and draw(st.booleans()):
            tensors["bonus"] = normal(heads["u"], K).abs()
            state_heads.append(heads["u"])
        if draw(st.booleans()):
            tensors["log_gain"] = normal(B, T * n, heads["i"]) * draw(st.sampled_from([1.0, 30.0]))
            if options["normalizer"] is None:
                tensors["log_gain"] = -tensors["log_gain"].abs()
            per_step.add("log_gain")
            state_heads.append(heads["i"])
    if op == "delta_rule":
        channelwise, beta = draw(st.booleans()), draw(st.sampled_from([1.0, 2.0]))
        if channelwise:
            tensors["erase"] = torch.rand(B, T * n, heads["e"], K, generator=rng, dtype=dtype)
        else:
            tensors["erase"] = beta * torch.rand(B, T * n, heads["e"], generator=rng, dtype=dtype)
        per_step.add("erase")
        state_heads.append(heads["e"])
        if channelwise or draw(st.booleans()):
            tensors["write"] = torch.rand(B, T * n, heads["w"], *([V] if draw(st.booleans()) else []), generator=rng, dtype=dtype)
            per_step.add("write")
            state_heads.append(heads["w"])
        if draw(st.booleans()):
            tensors["write_key"] = tensors["k"][:, :, :1] * 0.7 if heads["k"] == 1 else tensors["k"] * 0.7
            tensors["write_key"] = tensors["write_key"].clone()
            per_step.add("write_key")
        weak = strength < 5 or shape is None  # erasing an undecayed read of a strongly decayed state diverges
        options["erase_read"] = draw(st.sampled_from(["after_decay", "before_decay"])) if weak else "after_decay"
        options["read"] = draw(st.sampled_from(["after", "before"]))
    if op == "dplr":
        kappa = key(heads["e"])
        tensors["a"] = -kappa
        tensors["b"] = 0.5 * kappa * torch.rand(kappa.shape, generator=rng, dtype=dtype)
        state_heads.append(heads["e"])
        tensors["log_decay"] = tensors.get("log_decay")
    if op != "dplr" and n > 1:
        options["steps_per_token"] = n
    if draw(st.booleans()):
        options["scale"] = 1.0
    tensors = {name: x for name, x in tensors.items() if x is not None}
    Hs = max(state_heads)
    state = None
    if draw(st.booleans()):
        state = [normal(rows, Hs, K, V)]
        if options.get("normalizer"):
            state.append(normal(rows, Hs, K).abs() + 0.5)
        if "log_gain" in tensors:
            m = normal(rows, Hs)
            state.append(m if options["normalizer"] else -m.abs())
        state = tuple(state)
    return Call(op, tensors, options, state, n, cu, per_step)
