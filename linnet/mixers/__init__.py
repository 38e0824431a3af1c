"""Token mixers: one file per method, hidden state -> operands of one operator -> output."""

from linnet.mixers._base import Context, Mixer, State, StateSpec
from linnet.mixers._registry import build_mixer, get_mixer, list_mixers, mixer_config, register_mixer

__all__ = ["Context", "Mixer", "State", "StateSpec", "build_mixer", "get_mixer", "list_mixers", "mixer_config", "register_mixer"]
