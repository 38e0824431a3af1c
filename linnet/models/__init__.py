"""One model for every mixer, in the classes of transformers.

Importing this package registers the model type "linnet" with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from linnet.models.cache import LinnetCache
from linnet.models.config import LinnetConfig
from linnet.models.decoding import GraphedDecoder
from linnet.models.loss import linear_cross_entropy, next_token_targets
from linnet.models.mlp import MoE, SwiGLU, register_mlp
from linnet.models.modeling import LinnetBlock, LinnetForCausalLM, LinnetModel, LinnetPreTrainedModel
from linnet.models.optim import no_weight_decay_parameters, parameter_groups
from linnet.models.pattern import LayerSpec, parse_layers

AutoConfig.register("linnet", LinnetConfig, exist_ok=True)
AutoModel.register(LinnetConfig, LinnetModel, exist_ok=True)
AutoModelForCausalLM.register(LinnetConfig, LinnetForCausalLM, exist_ok=True)

__all__ = [
    "GraphedDecoder",
    "LayerSpec",
    "LinnetBlock",
    "LinnetCache",
    "LinnetConfig",
    "LinnetForCausalLM",
    "LinnetModel",
    "LinnetPreTrainedModel",
    "MoE",
    "SwiGLU",
    "linear_cross_entropy",
    "next_token_targets",
    "no_weight_decay_parameters",
    "parameter_groups",
    "parse_layers",
    "register_mlp",
]
