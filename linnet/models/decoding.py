"""One token at a time at the speed of the device: a decode step on states of fixed size, recorded once as a CUDA graph.

The step is the model's ordinary forward of one token, inside a handler that turns every operator call on a state of this decoder
into the step in place of `linnet.ops.decode`; a new state that a mixer computes by itself is copied back. Mixers know nothing of
it. On the CPU the same step runs without a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linnet.models.cache import LinnetCache, check_cache
from linnet.models.modeling import LinnetForCausalLM
from linnet.ops import decode, execute, use_handler


class GraphedDecoder:
    """Decoding of a fixed number of sequences.

    >>> decoder = GraphedDecoder(model.eval(), batch_size=8, max_tokens=4096)
    >>> logits_BV = decoder.prefill(prompt_BT)
    >>> for _ in range(100):
    ...     logits_BV = decoder.step(logits_BV.argmax(-1))

    Args:
        model: in eval mode; its weights must stay where they are. batch_size: B, the rows of every call.
        max_tokens: tokens of a sequence for which the key-value caches of full softmax attention have room; needed where the model
            has such layers. Every step reads all of that room.
        graph: None: a CUDA graph where the model is on a CUDA device. False: never.

    A mixer must not use a state again after it has passed it to an operator, and cannot be recorded if it reads values on the host.

    Raises:
        ValueError: naming the argument, what was expected and what came; also the layers whose state grows with the tokens and that
            have no form of a fixed size.
    """

    def __init__(
        self, model: LinnetForCausalLM, batch_size: int, *, max_tokens: int | None = None, graph: bool | None = None
    ):  # fmt: skip
        if not isinstance(model, LinnetForCausalLM):
            raise ValueError(f"model must be a LinnetForCausalLM; got {type(model).__name__}")
        if model.training:
            raise ValueError("model must be in eval mode; got a model in training mode")
        for name, value in (("batch_size", batch_size), ("max_tokens", 1 if max_tokens is None else max_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1; got {value!r}")
        if graph and model.device.type != "cuda":
            raise ValueError(f"graph must be None or False on {model.device.type}; got {graph!r}")
        self.model, self.batch_size, self.max_tokens = model, batch_size, max_tokens
        self.ids_BT = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self.tokens_N = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self.longest = 0  # tokens of the longest sequence, known without asking the device
        self._graph = self._logits_BV = None
        self._allocate()
        if graph or (graph is None and model.device.type == "cuda"):
            self._record()
        self.reset()

    @torch.no_grad()
    def _allocate(self) -> None:
        """Make the states from those after one token and try a step on them."""
        cache = LinnetCache(len(self.model.model.layers))
        self.model(self.ids_BT, past_key_values=cache, use_cache=True)
        mixers = [layer.mixer for layer in self.model.model.layers]
        self.states: list[tuple[Tensor, ...]] = []
        growing: dict[int, int] = {}  # state -> layer
        for index, (mixer, state) in enumerate(zip(mixers, cache.states, strict=True)):
            shapes = mixer.state_spec().shapes if state else ()
            if self.max_tokens is None and any(None in shape for shape in shapes):
                raise ValueError(f"max_tokens must be given: the state of layer {index} ({mixer.name}) grows; got None")
            sizes = [[self.max_tokens if size is None else size for size in shape] for shape in shapes]
            buffers = tuple(x.new_zeros(len(x), *size) for x, size in zip(state or (), sizes, strict=True))
            growing |= {id(x): index for x, shape in zip(buffers, shapes, strict=True) if None in shape}
            self.states.append(buffers)
        self.room = self.max_tokens if growing else None
        self._owned = {id(x) for state in self.states for x in state}
        self._stepped: set[int] = set()  # states that an operator has updated in place
        self.load(cache)
        refused, failure = set(), None
        try:
            for index, new in enumerate(self._forward()[1]):
                if [x.shape for x in self.states[index]] != [x.shape for x in new or ()]:
                    refused.add(index)
        except Exception as error:
            if not set(growing) - self._stepped:
                raise
            failure = error
        refused |= {growing[x] for x in set(growing) - self._stepped}
        if refused:
            names = ", ".join(f"{index} ({mixers[index].name})" for index in sorted(refused))
            expected = "have layers whose state is of a fixed size or a key-value cache of full attention"
            raise ValueError(f"model must {expected}; got layers {names}") from failure

    def _handle(self, op: str, backend: str | None, arguments: dict[str, Any]) -> Any:
        """Operator calls of a step: in place on states of this decoder."""
        state = arguments.get("initial_state")
        if state is not None and all(id(x) in self._owned for x in state):
            result = decode.in_place(op, backend, arguments)
            if result is not None:
                self._stepped |= {id(x) for x in state}
                return result
        return execute(op, backend, arguments)

    def _forward(self) -> tuple[Tensor, list[tuple[Tensor, ...] | None], Tensor]:
        cache = LinnetCache(len(self.states))
        cache.states = [state or None for state in self.states]
        cache.tokens_N = self.tokens_N
        with use_handler(self._handle):
            logits_BTV = self.model(self.ids_BT, past_key_values=cache, use_cache=True).logits
        return logits_BTV[:, -1], cache.states, cache.tokens_N

    @torch.no_grad()
    def _step(self) -> Tensor:
        logits_BV, states, tokens_N = self._forward()
        for state, new in zip(self.states, states, strict=True):
            for x, y in zip(state, new or (), strict=True):
                if x is not y:
                    x.copy_(y)
        self.tokens_N.copy_(tokens_N)
        return logits_BV

    def _record(self) -> None:
        with torch.cuda.device(self.model.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels and makes workspaces, which a capture must not
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits_BV = self._step()

    def reset(self) -> None:
        """Forget everything; the next call must be `prefill` or `load`."""
        self.tokens_N.zero_()
        self.longest = 0

    @torch.no_grad()
    def load(self, cache: LinnetCache) -> None:
        """Continue from a cache of this model with B rows. It is copied."""
        check_cache(cache, len(self.states))
        if cache.batch_size != self.batch_size:
            raise ValueError(f"cache must hold {self.batch_size} rows; got {cache}")
        longest = int(cache.tokens_N.max())
        if self.room is not None and longest > self.room:
            raise ValueError(f"cache must hold at most max_tokens = {self.room} tokens per row; got {longest}")
        for state, new in zip(self.states, cache.states, strict=True):
            for x, y in zip(state, new or (), strict=True):
                y = y[tuple(slice(size) for size in x.shape)]  # slots beyond the length of a row are padding
                x.zero_()
                x[tuple(slice(size) for size in y.shape)].copy_(y)
        self.tokens_N.copy_(cache.tokens_N)
        self.longest = longest

    def cache(self) -> LinnetCache:
        """A copy of the state, for the model's ordinary forward and `generate`."""
        cache = LinnetCache(len(self.states))
        cache.states = [tuple(x.clone() for x in state) or None for state in self.states]
        cache.tokens_N, cache.seen_tokens = self.tokens_N.clone(), self.longest
        return cache

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Start B new sequences; the logits [B, V] of their last tokens. Padding, marked by the mask, belongs on the left."""
        cache = LinnetCache(len(self.states))
        out = self.model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.load(cache)
        return out.logits[:, -1]

    def step(self, ids_B: Tensor) -> Tensor:
        """The next token of every sequence, [B] or [B, 1] -> logits [B, V]. With a graph they are overwritten by the next step."""
        if ids_B.numel() != self.batch_size or ids_B.shape[0] != self.batch_size:
            raise ValueError(f"ids_B must be of shape [{self.batch_size}]; got {list(ids_B.shape)}")
        if not self.longest:
            raise ValueError("step must follow prefill or load; got a decoder without sequences")
        if self.room is not None and self.longest >= self.room:
            raise ValueError(f"max_tokens must leave room for one more token; got {self.room} with {self.longest} tokens seen")
        self.ids_BT.copy_(ids_B.view(-1, 1))
        self.longest += 1
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._logits_BV

    def generate(
        self, input_ids: Tensor, max_new_tokens: int, attention_mask: Tensor | None = None,
        choose: Callable[[Tensor], Tensor] = lambda logits_BV: logits_BV.argmax(-1),
    ) -> Tensor:  # fmt: skip
        """New tokens [B, max_new_tokens], chosen from the logits [B, V] by `choose` (greedily). Nothing ends early."""
        ids = [choose(self.prefill(input_ids, attention_mask))]
        while len(ids) < max_new_tokens:
            ids.append(choose(self.step(ids[-1])))
        return torch.stack(ids, 1)
