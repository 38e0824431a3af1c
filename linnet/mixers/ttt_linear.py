"""TTT-Linear: the state is a linear model that is trained, by gradient descent, on the tokens that pass."""

from __future__ import annotations

from dataclasses import dataclass

from linnet.mixers._registry import register_mixer
from linnet.mixers._test_time import TTTConfig, TTTMixer


@dataclass(frozen=True)
class TTTLinearConfig(TTTConfig, mixer="ttt_linear"):
    pass


@register_mixer("ttt_linear")
class TTTLinear(TTTMixer):
    r"""Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024 (arXiv 2407.04620).

        W_t = W' - s_i sum_{j <= i} lr_j (gradient of loss_j at W'),   o_t = f(q_t; W_t)
        f(z; W) = z + LayerNorm(z W + b),   loss_t = 1/2 |f(k_t; W') - v_t|^2 per head
        lr_j = base_lr sigmoid(x_j W_lr + b_lr) / K,   s_i = max(1/(i+1) + learnt_i, 0)
        y_t = W_o (LayerNorm(o_t) * gelu(x_t W_g))

    W' are the weights, with b, at the start of the mini-batch of t, of which t is token i = 0, 1, ..; those of an empty row are
    learnt. q and k pass a short convolution and are turned by i. Maps to `linnet.ops.short_conv` and `linnet.ops.neural_memory`.
    State: conv [N, 2D, W-1], count [N] of tokens, W [N,H,P] the weights after the steps so far (unscaled), A [N,H,P] those at the
    start of the mini-batch.
    """

    Config = TTTLinearConfig
