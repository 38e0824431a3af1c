"""One residual block, one model, one causal language model, for every mixer.

- Layers are data: `LinnetConfig.layers` names the mixer of every block.
- Block: x + mixer(norm(x)), then x + mlp(norm(x)); RMSNorm in fp32, its result in the dtype of autocast if that is on; no biases;
  no position embedding (mixers know their order).
- Mixers never see a padding mask: padded batches are packed into one row of documents (`cu_seqlens`) on the way in, and
  unpacked on the way out, so that padding is exactly inert.
- The loss is taken a few tokens at a time; full logits exist only where they are asked for.
- The recurrent state is a `LinnetCache`; `generate` is transformers'.

Shape legend: B batch, T tokens, D model width, V vocabulary, N rows of the state (the batch, or the packed documents).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from linnet.mixers import Context, Mixer, State, get_mixer
from linnet.mixers._layers import RMSNorm
from linnet.models.cache import LinnetCache, check_cache
from linnet.models.config import LinnetConfig
from linnet.models.loss import IGNORE, linear_cross_entropy, next_token_targets
from linnet.models.mlp import mlp_factory
from linnet.models.pattern import LayerSpec
from linnet.ops._dispatch import debugging, product_dtype


@dataclass
class LinnetOutput(BaseModelOutputWithPast):
    """As in transformers, with aux_loss: the weighted sum of what the mixers add to the loss while they train, or None."""

    aux_loss: Tensor | None = None


@dataclass
class LinnetCausalLMOutput(CausalLMOutputWithPast):
    """As in transformers, with aux_loss: what `loss` holds beside the cross-entropy, before the share of `num_items_in_batch`."""

    aux_loss: Tensor | None = None


class LinnetBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)) unless the model has no MLP."""

    def __init__(self, config: LinnetConfig, spec: LayerSpec, index: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = get_mixer(spec.mixer)(config.mixer_config(spec), layer_index=index, num_layers=config.num_layers)
        make_mlp = mlp_factory(config.mlp)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps) if make_mlp else None
        self.mlp = make_mlp(config.d_model, config.d_ff) if make_mlp else None

    def forward(
        self,
        x_BTD: Tensor,
        state: State | None,
        shared: dict[str, Any],
        cu_seqlens: Tensor | None,
        positions_BT: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, State | None, dict[str, Any], dict[int, Tensor]]:
        """The block as a function: `shared` is copied, so that a recomputation (checkpointing) sees what the first run saw.

        Returns hidden states, the mixer's state, the shared values and the auxiliary loss of this layer, if it has one.
        """
        context = Context(cu_seqlens=cu_seqlens, positions=positions_BT, return_state=return_state, shared=dict(shared))
        dtype = product_dtype(x_BTD)  # converted here once, not by each of the projections that read it
        y_BTD, state = self.mixer(self.mixer_norm(x_BTD).to(dtype), state, context=context)
        x_BTD = x_BTD + y_BTD
        if self.mlp is not None:
            x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD).to(dtype))
        return x_BTD, state, context.shared, context.losses


class LinnetPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving."""

    config: LinnetConfig
    config_class = LinnetConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinnetBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # transformers then refuses assisted generation by itself
    # Decay rates and step sizes stay fp32 when a checkpoint is loaded in bf16 or fp16: rounding them changes how long a state
    # lasts.
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "_inside_mixer", False):
            return
        if isinstance(module, Mixer):
            self._reset_unloaded(module)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            std = self.config.initializer_range
            if getattr(module, "_residual_output", False) and self.config.scale_residual:
                std /= math.sqrt(2 * self.config.num_layers)
            init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):  # norms, and parts of registered MLPs
            self._reset_unloaded(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside its own package transformers takes a module without direct parameters for initialised: most mixers.
        super()._initialize_weights(module, False)

    @staticmethod
    def _reset_unloaded(module: nn.Module) -> None:
        """The module's own initialisation, for what was not loaded only: loaded tensors come back bit for bit."""
        tensors = [*module.parameters(), *module.buffers()]
        loaded = [(x, x.clone()) for x in tensors if getattr(x, "_is_hf_initialized", False)]
        if len(loaded) < len(tensors):
            module.reset_parameters()
            for x, value in loaded:
                x.copy_(value)

    def _mark_initialized(self) -> None:
        """Mixers were initialised by their constructors; on the meta device there was nothing to initialise yet."""
        for mixer in (layer.mixer for layer in self.layers):  # a mixer may hold another one
            done = not any(x.is_meta for x in mixer.parameters())
            for part in mixer.modules():
                part._inside_mixer, part._is_hf_initialized = part is not mixer, done

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable | None = None, **kwargs: Any
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing: use_reentrant must be False (values shared between layers need gradients); got True"
            )
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any):
        """As in transformers. A torn or foreign weight file is refused with its name (OSError); nothing is written.

        Weights on the CPU are copied out of the mapped file: they stay whatever happens to the file, and are aligned in memory, on
        which the last bit of a matrix product depends.
        """
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder", ""))
            bad = [str(file) for file in sorted(folder.glob("*.safetensors")) if not _readable(file)]
            raise OSError(f"corrupt checkpoint: {', '.join(bad) or pretrained_model_name_or_path}: {error}") from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for x in (*model.parameters(), *model.buffers()):
            if x.device.type == "cpu":
                x.data = x.data.clone()
        return loaded

    def state_bytes(self, tokens: int = 0) -> int:
        """Bytes of the recurrent state of one sequence after `tokens` tokens, all layers together."""
        mixers = (block.mixer for block in self.modules() if isinstance(block, LinnetBlock))
        return sum(mixer.state_spec().bytes_per_row(tokens) for mixer in mixers if mixer.causal)


def _readable(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except SafetensorError:
        return False


class LinnetModel(LinnetPreTrainedModel):
    """Embedding, blocks, final norm: token ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: LinnetConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(LinnetBlock(config, spec, index) for index, spec in enumerate(config.layer_specs))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        for name, module in self.layers.named_modules():
            module._residual_output = name.endswith("down_proj") and ".mlp." in name
        self._mark_initialized()
        self.post_init()

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one; else there is no cache."""
        return all(layer.mixer.causal for layer in self.layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinnetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> LinnetOutput:
        """Hidden states after the final norm.

        Args:
            input_ids: [B, T]; or inputs_embeds: [B, T, D].
            attention_mask: [B, T] or, with a cache, [B, past + T]; zero marks padding, on either side. Rows are packed inside.
            position_ids: [B, T] or [1, T] position of every token in its own document; None counts real tokens.
            past_key_values: a `LinnetCache`, updated in place. With `cu_seqlens` or padding it has one row per document.
            use_cache: return a cache; None means the configuration's choice, and never while training or with a mixer that is not
                causal.
            cu_seqlens: [N+1] offsets of packed documents (B = 1), from 0 to T; nothing leaks between documents.
            output_hidden_states: also return the input of every block and the final hidden states.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"exactly one of input_ids and inputs_embeds must be given; got {'neither' if input_ids is None else 'both'}"
            )
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions must be false: linear mixers form no attention matrix; got True")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x_BTD.shape[1] == 0:
            raise ValueError("input_ids must hold at least one token per row; got 0")
        batch, tokens = x_BTD.shape[:2]
        if attention_mask is None and past_key_values is None:
            cu_seqlens = _document_offsets(cu_seqlens, position_ids, kwargs)
        cu_seqlens = _check_offsets(cu_seqlens, batch, tokens, x_BTD.device)
        mask_BT = _check_mask(attention_mask, batch, tokens, cu_seqlens)
        if position_ids is not None:
            if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
                raise ValueError(
                    f"position_ids must be of shape [{batch}, {tokens}] or [1, {tokens}]; got {list(position_ids.shape)}"
                )
            position_ids = position_ids.expand(batch, tokens)
        cache = None if past_key_values is None else check_cache(past_key_values, len(self.layers))
        usual = self.config.use_cache and not self.training and self.causal
        wanted = use_cache if use_cache is not None else (cache is not None or usual)
        cache = cache or (LinnetCache(len(self.layers)) if wanted else None)

        index_M = None
        if mask_BT is not None:
            index_M = mask_BT.flatten().nonzero()[:, 0]
            cu_seqlens = F.pad(mask_BT.sum(1).cumsum(0), (1, 0)).to(torch.int32)
            x_BTD = x_BTD.flatten(0, 1)[index_M][None]
            position_ids = None if position_ids is None else position_ids.flatten()[index_M][None]
        tokens_N = cache.tokens_N if cache is not None else None
        counts_N = x_BTD.new_full((batch,), tokens, dtype=torch.int64) if cu_seqlens is None else cu_seqlens.diff().long()
        if tokens_N is not None and tokens_N.shape != counts_N.shape:
            raise ValueError(
                f"past_key_values must hold {counts_N.shape[0]} rows (the batch, or the packed documents); got {tokens_N.shape[0]}"
            )
        positions_BT = position_ids if position_ids is not None else _positions(x_BTD, cu_seqlens, tokens_N)

        hidden, shared, losses = [], {}, {}
        checkpointing = self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
        return_state = cache is not None and wanted and not checkpointing
        states = []
        for index, layer in enumerate(self.layers):
            hidden.append(x_BTD)
            state = cache.states[index] if cache is not None else None
            x_BTD, state, shared, loss = layer(x_BTD, state, shared, cu_seqlens, positions_BT, return_state)
            states.append(state)
            losses |= loss
        x_BTD = self.norm(x_BTD)

        def unpacked(y: Tensor) -> Tensor:
            if index_M is None:
                return y
            return y.new_zeros(batch * tokens, y.shape[-1]).index_copy(0, index_M, y[0]).view(batch, tokens, -1)

        if return_state:
            cache.states = states
            cache.tokens_N = counts_N if tokens_N is None else tokens_N + counts_N
            # Documents of different lengths count as the longest one; a padded batch counts its padding, as transformers does.
            cache.seen_tokens = (
                cache.seen_tokens + tokens if index_M is not None or cu_seqlens is None else int(cache.tokens_N.max())
            )
        wanted_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return LinnetOutput(
            last_hidden_state=unpacked(x_BTD),
            past_key_values=cache if return_state else None,
            hidden_states=tuple(unpacked(y) for y in (*hidden, x_BTD)) if wanted_hidden else None,
            aux_loss=sum(losses.values()) if losses else None,
        )


def _check_offsets(cu_seqlens: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor | None:
    """Document offsets as int32. Their values are read where that is free (on the CPU) or `linnet.debug()` is on."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point() or cu_seqlens.device != device:
        came = f"{list(cu_seqlens.shape)}, {cu_seqlens.dtype} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens must be an int32 tensor [N+1] on {device} with N >= 1; got {came}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs one row that holds all documents (batch size 1); got batch size {batch}")
    if not torch.compiler.is_compiling() and (device.type == "cpu" or debugging()):
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must be non-decreasing from 0 to the number of tokens {tokens}; got {cu_seqlens.tolist()}"
            )
    return cu_seqlens.to(torch.int32)


def _check_mask(mask: Tensor | None, batch: int, tokens: int, cu_seqlens: Tensor | None) -> Tensor | None:
    """The mask of the tokens of this call [B, T] (bool), or None where nothing is padding."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        expected = f"[{batch}, {tokens}] (with a cache: [{batch}, past + {tokens}])"
        raise ValueError(f"attention_mask must be of shape {expected}; got {list(mask.shape)}")
    mask_BT = mask[:, -tokens:] != 0
    if bool(mask_BT.all()):
        return None
    if cu_seqlens is not None:
        raise ValueError("attention_mask must be None or all ones with cu_seqlens (packed documents have no padding); got zeros")
    if not bool(mask_BT.any()):
        raise ValueError("attention_mask must mark at least one real token; got only zeros")
    return mask_BT


def _document_offsets(cu_seqlens: Tensor | None, position_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Offsets of packed documents, also where they come as transformers' padding-free collators send them.

    That is as `cu_seq_lens_q`, or as position_ids that start at 0 again, which are not seen under torch.compile.
    """
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None or position_ids is None or position_ids.shape[0] != 1 or torch.compiler.is_compiling():
        return cu_seqlens
    start_N = (position_ids[0, 1:] == 0).nonzero()[:, 0] + 1
    if not start_N.numel():
        return None
    return torch.cat((start_N.new_zeros(1), start_N, start_N.new_full((1,), position_ids.shape[1]))).to(torch.int32)


def _positions(x_BTD: Tensor, cu_seqlens: Tensor | None, tokens_N: Tensor | None) -> Tensor | None:
    """Position of every token in its own document [B, T]; None for 0..T-1 in every row."""
    if cu_seqlens is None and tokens_N is None:
        return None
    index_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
    if cu_seqlens is None:
        return tokens_N[:, None] + index_T
    start_N = cu_seqlens[:-1].long() if tokens_N is None else cu_seqlens[:-1].long() - tokens_N
    document_T = torch.searchsorted(cu_seqlens[1:].long().contiguous(), index_T, right=True)
    return (index_T - start_N[document_T])[None]


class LinnetForCausalLM(LinnetPreTrainedModel, GenerationMixin):
    """`LinnetModel` with an output matrix: next-token logits, loss and `generate`.

    >>> config = LinnetConfig(vocab_size=256, d_model=256, heads=4, layers="3*gated_deltanet + attention", num_layers=8)
    >>> model = LinnetForCausalLM(config)
    >>> model(input_ids, labels=input_ids).loss.backward()
    >>> model.generate(input_ids[:, :10], max_new_tokens=50)
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinnetConfig):
        super().__init__(config)
        self.model = LinnetModel(config)
        for layer in self.model.layers:
            layer.mixer.require_causal("in a causal language model")
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinnetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LinnetCausalLMOutput:
        """Logits, or with labels the loss.

        Args (further ones: `LinnetModel.forward`):
            labels: [B, T], usually the input ids; position t predicts label t+1. -100, padding and the first token of a packed
                document are no targets.
            shift_labels (by name): [B, T] targets that are already shifted, used as they are.
            num_items_in_batch: what the summed loss is divided by (gradient accumulation); None means the number of targets.
            return_logits: None: logits are computed unless there are labels. With labels and True: both.
            logits_to_keep: compute logits of the last so many positions only, or of these positions; 0 means all.

        Returns:
            loss (fp32 scalar, nats per token; in training plus `aux_loss`, what mixers add) or None; logits [B, T, V] or None;
            past_key_values; hidden_states if asked for.
        """
        if attention_mask is None and past_key_values is None:
            cu_seqlens = _document_offsets(cu_seqlens, position_ids, kwargs)
        # not in the signature: transformers' Trainer expects every argument named after labels in every batch
        shift_labels = kwargs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        use_cache = False if has_labels and use_cache is None and past_key_values is None else use_cache
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cu_seqlens=cu_seqlens,
            return_dict=True,
            **kwargs,
        )
        x_BTD = output.last_hidden_state
        loss = None
        if has_labels:
            mask_BT = None if attention_mask is None else attention_mask[:, -x_BTD.shape[1] :]
            name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
            if given.shape != x_BTD.shape[:2]:
                raise ValueError(f"{name} must be of shape {list(x_BTD.shape[:2])} like the tokens; got {list(given.shape)}")
            targets_BT = next_token_targets(labels, cu_seqlens, mask_BT) if shift_labels is None else shift_labels
            loss = linear_cross_entropy(x_BTD, self.lm_head.weight, targets_BT, num_items=num_items_in_batch)
            if output.aux_loss is not None:
                share = 1.0 if num_items_in_batch is None else (targets_BT != IGNORE).sum() / num_items_in_batch
                loss = loss + share * output.aux_loss.to(loss)
        logits = None
        if return_logits or (return_logits is None and not has_labels):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x_BTD[:, keep])
        return LinnetCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            aux_loss=output.aux_loss,
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args: Any, **kwargs: Any) -> None:
        """`generate` starts with an empty `LinnetCache` unless the caller brings one."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            came = repr(generation_config.cache_implementation)
            raise ValueError(f"cache_implementation must be None (a Linnet model keeps its own state); got {came}")
        given = model_kwargs.get("past_key_values")
        if given is not None:
            check_cache(given, self.config.num_layers)._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinnetCache(self.config.num_layers)
