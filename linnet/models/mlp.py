"""Channel mixers (MLPs): what a block does to every token by itself.

An MLP is made by `factory(d_model, d_ff, **options)` and maps [..., D] to [..., D]. Its output projection is `down_proj`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.mixers._layers import full
from linnet.models.pattern import parse_layers

_mlps: dict[str, Callable[..., nn.Module] | None] = {"none": None}


def register_mlp(name: str):
    """Class decorator: `@register_mlp("geglu")` on a module whose constructor takes (d_model, d_ff, **options)."""

    def register(cls):
        known = _mlps.get(name)
        if name in _mlps and (known is None or known.__qualname__ != cls.__qualname__):
            raise ValueError(f"register_mlp: name must be new; got {name!r}")
        _mlps[name] = cls
        return cls

    return register


def mlp_factory(pattern: str) -> Callable[[int, int], nn.Module] | None:
    """What makes the MLP that `pattern` names, as a function of (d_model, d_ff); None for "none"."""
    specs = parse_layers(pattern, "mlp")
    if len(specs) != 1:
        raise ValueError(f"mlp must name one MLP; got {pattern!r}")
    name, options = specs[0]
    if name not in _mlps:
        close = difflib.get_close_matches(name, _mlps, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"mlp must be one of {', '.join(sorted(_mlps))}; got {name!r}{hint}")
    known = list(inspect.signature(_mlps[name]).parameters)[2:] if _mlps[name] else []
    for option in options:
        if option not in known:
            raise ValueError(f"mlp {name!r}: option must be one of {', '.join(known) or '(it has none)'}; got {option!r}")
    return functools.partial(_mlps[name], **options) if _mlps[name] else None


@register_mlp("swiglu")
class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x). Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.gated_linear_unit(self.up_proj(x), self.gate_proj(x)))


@register_mlp("moe")
class MoE(nn.Module):
    """Mixture of SwiGLU experts, `top_k` of `experts` per token, weights renormalised over the chosen ones.

        p = softmax(W_router x),   y = sum_{e in top_k(p)} (p_e / sum_{top_k} p) expert_e(x)

    Dropless and without an auxiliary loss; every expert has width `d_ff`. Shazeer et al., "Outrageously Large Neural
    Networks", 2017 (arXiv 1701.06538). The gather of tokens per expert reads counts on the host, so this MLP does not
    compile as one graph.
    """

    def __init__(self, d_model: int, d_ff: int, experts: int = 8, top_k: int = 2):
        super().__init__()
        for name, value, bound in (("experts", experts, None), ("top_k", top_k, experts)):
            if not isinstance(value, int) or value < 1 or (bound is not None and value > bound):
                raise ValueError(f"mlp 'moe': {name} must be an integer in 1..{bound or 'any'}; got {value!r}")
        self.top_k = top_k
        self.router = nn.Linear(d_model, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(d_model, d_ff) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        weight_NK, expert_NK = full(self.router(x_ND)).softmax(-1).topk(self.top_k, dim=-1)
        weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
        y_ND = torch.zeros_like(x_ND)
        for index, expert in enumerate(self.experts):
            token, slot = (expert_NK == index).nonzero(as_tuple=True)
            y_M = expert(x_ND[token]) * weight_NK[token, slot, None].to(x.dtype)
            y_ND = y_ND.index_add(0, token, y_M.to(y_ND.dtype))
        return y_ND.view_as(x)
