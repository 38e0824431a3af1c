"""Feature maps phi of linear attention, by name: functions that act on every channel separately.

    get_feature_map("elu+1")(x) = elu(x) + 1

"elu+1": Katharopoulos et al., "Transformers are RNNs", 2020 (arXiv 2006.16236); positive everywhere, needed by a normaliser.
"relu": Kasai et al., "Finetuning Pretrained Transformers into RNNs", 2021 (arXiv 2103.13076), without its linear map.
"silu": Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024 (arXiv 2406.06484); signed.
"identity": no map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}


def get_feature_map(name: str) -> Callable[[Tensor], Tensor]:
    """The feature map called `name`; an unknown name is a ValueError that lists the known ones."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature map must be one of {', '.join(map(repr, FEATURE_MAPS))}; got {name!r}")
    return FEATURE_MAPS[name]
