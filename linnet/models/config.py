"""The configuration of a Linnet model: a transformers configuration whose layers are a pattern of mixers."""

from __future__ import annotations

import difflib
import math
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from linnet.mixers import mixer_config
from linnet.models.mlp import mlp_factory
from linnet.models.pattern import LayerSpec, parse_layers


class LinnetConfig(PreTrainedConfig):
    """Configuration of `LinnetModel` and `LinnetForCausalLM`.

    Args:
        vocab_size: number of token ids. d_model: width of the residual stream. heads: heads of every mixer that has heads
            (a layer may say otherwise: `attention(heads=2)`).
        layers: the layers, as a pattern `"3*gated_deltanet + attention(window=256)"`, or a list of patterns and dictionaries
            `{"mixer": "kda", "expand_v": 2}`.
        num_layers: None: `layers` is the whole list. A number: `layers` is repeated, and cut after that many layers.
        mlp: the MLP of every block: "swiglu", "moe(experts=8, top_k=2)", "none", or a name from `register_mlp`.
        d_ff: width of the MLP; None means `mlp_ratio * d_model`, rounded up to a multiple of 64. The default ratio 8/3 gives
            SwiGLU's three matrices the parameters of a classic MLP with ratio 4.
        norm_eps: epsilon of the RMSNorms. tie_embeddings: the output matrix is the embedding matrix.
        initializer_range: standard deviation of embeddings and of the linear maps outside the mixers.
        scale_residual: divide the initial weights of the MLPs' output projections by sqrt(2 * num_layers), as GPT-2 does.
            Mixers have their authors' initialisation.
        use_cache: whether the model returns its state by default (never while training).

    The names of transformers work for reading and writing: hidden_size, num_attention_heads, num_hidden_layers,
    intermediate_size, rms_norm_eps, tie_word_embeddings; `layer_types` can be read.

    Raises:
        ValueError: naming the argument, what was expected and what came; unknown mixers and unknown options included.
    """

    model_type = "linnet"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "d_ff",
        "rms_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
    }

    vocab_size: int = 32_000
    d_model: int = 512
    heads: int = 4
    layers: str | list = "3*gated_deltanet + attention"
    num_layers: int | None = None
    mlp: str = "swiglu"
    mlp_ratio: float = 8 / 3
    d_ff: int | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    scale_residual: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        self._refuse_misspelt(kwargs)
        for name in ("vocab_size", "d_model", "heads"):
            self._require(name, "an integer >= 1", lambda x: isinstance(x, int) and x >= 1)
        for name in ("num_layers", "d_ff"):
            self._require(name, "an integer >= 1 or None", lambda x: x is None or (isinstance(x, int) and x >= 1))
        for name in ("mlp_ratio", "norm_eps", "initializer_range"):
            self._require(name, "a number > 0", lambda x: isinstance(x, (int, float)) and 0 < x < math.inf)
        self._require("mlp", "a pattern such as 'swiglu' or 'moe(experts=8)'", lambda x: isinstance(x, str))
        pattern = parse_layers(self.layers)
        if self.num_layers is None:
            self.num_layers = len(pattern)
        elif self.num_layers < len(pattern):
            raise ValueError(
                f"num_layers must be at least {len(pattern)}, the layers that {self.layers!r} describes; got {self.num_layers}"
            )
        if self.d_ff is None:
            self.d_ff = 64 * math.ceil(self.mlp_ratio * self.d_model / 64)
        for index, spec in enumerate(pattern):
            try:
                self.mixer_config(spec)
            except (ValueError, TypeError) as error:
                raise ValueError(f"layers: layer {index} ({spec}): {error}") from error
        mlp_factory(self.mlp)
        super().__post_init__(**kwargs)

    def _require(self, name: str, expected: str, holds: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not holds(value):
            raise ValueError(f"{name} must be {expected}; got {value!r}")

    def _refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        """Configurations may carry foreign keys (transformers adds its own); near misses of a known one are mistakes."""
        known = {f.name for f in fields(self)} | set(self.attribute_map)
        for name in kwargs:
            close = difflib.get_close_matches(name, known, 1, cutoff=0.8)
            if close and not hasattr(type(self), name):
                raise ValueError(f"LinnetConfig: unknown argument {name!r} (did you mean {close[0]!r}?)")

    @property
    def layer_specs(self) -> list[LayerSpec]:
        """One (mixer, options) per layer, the pattern repeated up to `num_layers`."""
        pattern = parse_layers(self.layers)
        return [pattern[i % len(pattern)] for i in range(self.num_layers)]

    @property
    def layer_types(self) -> list[str]:
        """What transformers calls the layers: full_attention, sliding_attention or linear_attention."""
        kinds = {"attention": lambda o: "sliding_attention" if o.get("window") else "full_attention"}
        return [kinds.get(spec.mixer, lambda o: "linear_attention")(spec.options) for spec in self.layer_specs]

    def mixer_config(self, spec: LayerSpec) -> Any:
        """The mixer's own configuration for one layer of this model."""
        options = {"heads": self.heads, **spec.options}
        if "d_model" in options:
            raise ValueError(f"option must not be 'd_model', which is the model's; got d_model={options['d_model']!r}")
        return mixer_config(spec.mixer, self.d_model, options.pop("heads"), **options)
