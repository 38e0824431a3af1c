"""SSE-H: sparse state expansion with softmax attention in every few layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._options import choice, size
from linnet.mixers._registry import register_mixer
from linnet.mixers.attention import Attention, AttentionConfig
from linnet.mixers.sse import SSE, SSEConfig


@dataclass(frozen=True)
class SSEHybridConfig(SSEConfig, mixer="sse_hybrid"):
    attention_every: int = size(6, "the last of so many layers is softmax attention, the others are `sse`", least=2)
    attention_heads: int | None = size(None, "heads of the attention (None: `heads`)")
    kv_heads: int | None = size(None, "its key/value heads, a divisor of them (None: as many)")
    window: int | None = size(None, "its window (None: every earlier token)")
    position: str = choice("rope", "its positions", "rope", "none")

    def check(self) -> None:
        super().check()
        heads = self.attention_heads or self.heads
        option = "heads" if self.attention_heads is None else "attention_heads"
        if self.d_model % heads:
            self.refuse(option, f"a divisor of d_model = {self.d_model}")
        if self.position == "rope" and self.d_model // heads % 2:
            self.refuse(option, f"a divisor of d_model / 2 = {self.d_model / 2:g} (rotary pairs)")
        if heads % (self.kv_heads or heads):
            self.refuse("kv_heads", f"a divisor of {heads} heads")

    @property
    def attention(self) -> AttentionConfig:
        heads = self.attention_heads or self.heads
        return AttentionConfig(
            d_model=self.d_model, heads=heads, kv_heads=self.kv_heads, window=self.window, position=self.position
        )


@register_mixer("sse_hybrid")
class SSEHybrid(Mixer):
    r"""Pan et al., "Scaling Linear Attention with Sparse State Expansion", 2025 (arXiv 2507.16577): SSE-H.

        y = attention(x) in every layer l = 0, 1, ... with (l + 1) mod attention_every = 0,   y = sse(x) in the others

    The pattern "5*sse + attention" of a model, as one name. State: that of the layer's own mixer.
    """

    family = "delta"
    Config = SSEHybridConfig

    def __init__(self, config: SSEHybridConfig, *, layer_index: int = 0, num_layers: int = 1):
        super().__init__(config, layer_index=layer_index, num_layers=num_layers)
        options = {"layer_index": layer_index, "num_layers": num_layers}
        attends = (layer_index + 1) % config.attention_every == 0
        self.mixer = Attention(config.attention, **options) if attends else SSE(config, **options)

    def reset_parameters(self) -> None:
        self.mixer.reset_parameters()

    def state_spec(self) -> StateSpec:
        return self.mixer.state_spec()

    def forward(self, x_BTD: Tensor, state: State | None = None, *, context: Context | None = None) -> tuple[Tensor, State | None]:
        return self.mixer(x_BTD, state, context=context)
