"""TTT-MLP: the state is a two-layer network that is trained, by gradient descent, on the tokens that pass."""

from __future__ import annotations

from dataclasses import dataclass

from linnet.mixers._options import number, size
from linnet.mixers._registry import register_mixer
from linnet.mixers._test_time import TTTConfig, TTTMixer


@dataclass(frozen=True)
class TTTMLPConfig(TTTConfig, mixer="ttt_mlp"):
    base_lr: float = number(0.1, "inner learning rate times the channels of a head, at most", above=0)
    expand: int = size(4, "hidden width of the inner network over the channels of a head")

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size, self.expand * self.size, self.size)


@register_mixer("ttt_mlp")
class TTTMLP(TTTMixer):
    r"""Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024 (arXiv 2407.04620).

        f(z) = z + LayerNorm(gelu(z W_1 + b_1) W_2 + b_2)

    in place of the linear model of `ttt_linear`, with a base_lr of 0.1. Everything else is as there. State: conv [N, 2D, W-1],
    count [N] of tokens, W and A [N,H,P]: W_1, b_1, W_2, b_2 in one row per head.
    """

    Config = TTTMLPConfig
