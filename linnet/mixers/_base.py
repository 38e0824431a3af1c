"""What every token mixer is: hidden states in, hidden states and a recurrent state out.

A mixer projects the hidden states to the operands of ONE operator of `linnet.ops`, calls it and projects back. It knows no
backend, no device, no process group and nothing of the model around it; it touches the time axis only through `linnet.ops`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linnet.mixers import _layers as L

State = tuple[Tensor, ...]
FAMILIES = ("diagonal", "delta", "softmax")  # diagonal transitions; everything beyond them; softmax attention itself


@dataclass(frozen=True)
class StateSpec:
    """The recurrent state of a mixer: one entry per tensor, the row axis N (batch row or packed segment) left out.

    A size of None grows with the tokens seen (mixers that keep every key); every other state has a constant size.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    def bytes_per_row(self, tokens: int = 0) -> int:
        """Bytes of one row's state after `tokens` tokens."""
        total = 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            count = 1
            for size in shape:
                count *= tokens if size is None else size
            total += count * dtype.itemsize
        return total


@dataclass
class Context:
    """What the layers of one forward pass share.

    cu_seqlens: [N+1] int32 offsets of packed documents (then the batch size is 1), or None.
    positions: [B, T] position of every token in its own document, or None for 0..T-1 in every row.
    return_state: whether the caller wants the new state.
    shared: values passed between layers (RWKV-7's first value, HGRN's lower bounds), written by earlier layers.
    losses: auxiliary losses by layer index, weighted, which a mixer writes while it trains; the model adds them to its own.
    """

    cu_seqlens: Tensor | None = None
    positions: Tensor | None = None
    return_state: bool = False
    shared: dict[str, Any] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)

    def carry(self, state: Tensor | State | None) -> dict[str, Any]:
        """The arguments with which every operator takes its state and the documents along."""
        return {"initial_state": state, "return_state": self.return_state, "cu_seqlens": self.cu_seqlens}

    def rows(self, x_BTD: Tensor) -> int:
        """N, the rows of a state: the batch, or the packed documents."""
        return x_BTD.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


class Mixer(nn.Module):
    """Base class. A subclass declares `Config` (a frozen dataclass with d_model) and implements `forward`.

    Its parts: either `add_parts`, which makes them from `self.config` before `reset_parameters` runs once, or a constructor of its
    own that ends with `self.reset_parameters()`. Its state: `state_shapes`, or `state_spec` where a dtype is not the usual one.

    Class attributes: `name` (set by `register_mixer`), `future_option` (the option that, unless it is False or 0, lets a token see
    later ones; a mixer that always does sets `causal = False`), `no_weight_decay` (names of its own parameters or
    submodules, decays and gates, that must not be decayed; one-dimensional parameters are never decayed anyway), `family` (one of
    FAMILIES, the group of the catalogue that `linnet compare --mixers all-FAMILY` takes).
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type]
    future_option: ClassVar[str | None] = None
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[str] = "diagonal"

    def __init__(self, config: Any, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__()
        self.config, self.layer_index, self.num_layers = config, layer_index, num_layers
        if hasattr(self, "add_parts"):
            self.add_parts()
            self.reset_parameters()

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one. Where one does there is no state and no decoding."""
        return self.future_option is None or not getattr(self.config, self.future_option)

    def require_causal(self, where: str) -> None:
        """Refuse to be used `where` causality is needed, naming the option that is in the way."""
        if not self.causal and self.future_option is None:
            raise ValueError(f"{self.name}: the mixer must be causal {where}; this one always sees the whole sequence")
        if not self.causal:
            value = getattr(self.config, self.future_option)
            raise ValueError(f"{self.name}: option '{self.future_option}' must be {type(value)()!r} {where}; got {value!r}")

    def refuse_state(self, state: State | None, context: Context) -> None:
        """For the forward of a mixer that need not be causal."""
        if state is not None or context.return_state:
            self.require_causal("where a state is given or wanted")

    def make_spec(self, **shapes: tuple[int | None, ...] | None) -> StateSpec:
        """A StateSpec from name=shape: at least fp32, int64 for shape () (a count of tokens); a name of shape None is left out."""
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        kept = {name: tuple(shape) for name, shape in shapes.items() if shape is not None}
        return StateSpec(tuple(kept), tuple(kept.values()), tuple(dtype if shape else torch.int64 for shape in kept.values()))

    def open_state(self, state: State | None, *names: str | None) -> list[Tensor | None]:
        """One tensor (None at the start) per name, None for a name that is None: this mixer does not keep that state.

        Without names: those of `state_shapes`.
        """
        if not names:
            names = tuple(name if shape is not None else None for name, shape in self.state_shapes().items())
        kept = [name for name in names if name is not None]
        if state is None:
            return [None] * len(names)
        if len(state) != len(kept):
            raise ValueError(f"{self.name}: argument 'state' must be a tuple ({', '.join(kept)}); got {len(state)} tensors")
        values = iter(state)
        return [None if name is None else next(values) for name in names]

    @staticmethod
    def close_state(context: Context, *values: Tensor | None) -> State | None:
        """The new state: the tensors that are kept, if the caller wants them."""
        return tuple(x for x in values if x is not None) if context.return_state else None

    def reset_parameters(self) -> None:
        """The authors' initialisation of every parameter of this mixer; here the usual one, `init_normal`."""
        L.init_normal(self)

    def state_shapes(self) -> dict[str, tuple[int | None, ...] | None]:
        """Names and shapes of the state as in `make_spec`: None for what this instance does not keep."""
        raise NotImplementedError

    def state_spec(self) -> StateSpec:
        return self.make_spec(**self.state_shapes())

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        raise NotImplementedError
