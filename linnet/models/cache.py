"""The recurrent state of a model between two calls, as a transformers `Cache`."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from linnet.mixers import State


class LinnetCache(Cache):
    """Per layer the mixer's state tuple, whose first axis is the row (batch row or packed document).

    states: one state tuple per layer, None before the first call. tokens_N: [N] tokens that every row has really seen, padding
    left out, None before the first call. seen_tokens: positions processed, padding included: what transformers counts.

    The state of a linear mixer has the same size after any number of tokens, and what it forgot is gone: there is no `crop`, and
    hence no assisted generation, until rollback exists.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int):
        # transformers' per-layer objects hold keys and values; here `states` replaces them
        super().__init__(layers=[])
        self.states: list[State | None] = [None] * num_layers
        self.tokens_N: Tensor | None = None
        self.seen_tokens = 0

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"LinnetCache(layers={len(self)}, rows={self.batch_size}, seen_tokens={self.seen_tokens})"

    @property
    def batch_size(self) -> int:
        """Rows of the state; -1 before the first call."""
        return -1 if self.tokens_N is None else self.tokens_N.shape[0]

    @property
    def is_initialized(self) -> bool:
        return self.tokens_N is not None

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [True] * len(self)

    is_dummy = is_sliding

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.is_initialized

    def state_bytes(self) -> int:
        """Bytes held now, all layers and rows together."""
        return sum(x.numel() * x.element_size() for state in self.states for x in state or ())

    def _map(self, change) -> None:
        self.states = [None if state is None else tuple(change(x) for x in state) for state in self.states]
        if self.tokens_N is not None:
            self.tokens_N = change(self.tokens_N)

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.tokens_N, self.seen_tokens = [None] * len(self), None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of the result is row beam_idx[i]."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, next to one another."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def to(self, device: torch.device | str) -> LinnetCache:
        """Move all tensors, in place."""
        self._map(lambda x: x.to(device))
        return self

    def detach(self) -> LinnetCache:
        """Cut the gradient to the past, in place (truncated backpropagation through time)."""
        self._map(lambda x: x.detach())
        return self

    def crop(self, *_: object, **__: object) -> NoReturn:
        raise ValueError(
            "LinnetCache.crop: a recurrent state cannot forget its last tokens; keep a copy.deepcopy of the cache instead"
        )

    def activate_past_recording(self) -> NoReturn:
        raise ValueError("LinnetCache: assisted generation needs a state that can be rolled back; use another decoding method")

    def update(self, *_: object, **__: object) -> NoReturn:
        raise ValueError("LinnetCache holds states of Linnet mixers, not keys and values; pass it to a Linnet model")

    update_conv_state = update_recurrent_state = get_conv_state = get_recurrent_state = update_indexer = update
    prefetch = offload = early_initialization = update


def check_cache(cache: object, num_layers: int) -> LinnetCache:
    """Refuse what is not a cache of a model with `num_layers` layers."""
    if not isinstance(cache, LinnetCache):
        raise ValueError(f"past_key_values must be a LinnetCache or None; got {type(cache).__name__}")
    if len(cache) != num_layers:
        raise ValueError(f"past_key_values must hold {num_layers} layers; got {len(cache)}")
    return cache
