"""GPT-2 in the hub's own layout: ``state_dict()`` of GPTForCausalLM is the checkpoint, key for key.

Shapes in comments: B batch, T positions (query), S positions (key), C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import CAUSAL_WITHOUT_MASK, eager_attention
from .configuration_gpt import GPTConfig
from .hub import HubModel
from .loss import linear_cross_entropy
from .versions import compare_cached, untested

# transformers 5.24 renamed the cache, in its own calls and in what it expects to get back.
_CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"


class ResidualProjection(Conv1D):
    """A projection whose output is added to the residual stream. A class of its own, because transformers offers only
    modules that own parameters to ``_init_weights``, not the attention or MLP around them."""


class EmbeddingSum(nn.Dropout):
    """Token and position embeddings, summed and dropped out: what the residual stream begins with.

    Under autocast that is fp32, and so is everything that the blocks add to it. ``narrow`` puts the stream in the dtype
    of autocast, which halves what is kept and moved of it.
    """

    narrow = False

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]  # (B, T, C), (1 or B, T, C)
        x = super().forward(tokens + positions)
        device = x.device.type
        narrow = self.narrow and torch.is_autocast_enabled(device)
        return x.to(torch.get_autocast_dtype(device)) if narrow else x


class Norm(nn.LayerNorm):
    """In the precision of its weights at least, which autocast sees to on CUDA alone: sums of thousands are in here."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.promote_types(x.dtype, self.weight.dtype)))


class FinalNorm(Norm):
    """Returns the dtype of the stream it reads."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class GPTAttention(nn.Module):
    """Causal self-attention, computed by whichever backend ``config._attn_implementation`` names."""

    is_causal = True

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.upcast = config.reorder_and_upcast_attn
        self.dropout = config.attn_pdrop
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = ResidualProjection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, attention_mask: Any = None, kv_cache: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*x.shape[:-1], -1, self.head_dim)  # (B, T, H, D)
        query, key, value = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        if kv_cache is not None:
            key, value = kv_cache.update(key, value, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        y, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )  # y: (B, T, H, D)
        return self.resid_dropout(self.c_proj(y.reshape(x.shape))), weights


class GPTMLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(n_inner, config.n_embd)
        # The same function as transformers' "gelu_new" (the tanh approximation), in one pass instead of eight.
        is_gpt2s = config.activation_function == "gelu_new"
        self.act = nn.GELU(approximate="tanh") if is_gpt2s else ACT2FN[config.activation_function]
        self.c_proj = ResidualProjection(config.n_embd, n_inner)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class GPTBlock(GradientCheckpointingLayer):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = Norm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTAttention(config, layer_idx)
        self.ln_2 = Norm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPTMLP(config)

    def forward(self, x: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        kv_cache = kwargs.pop(_CACHE, None)  # by its name of the day, under which checkpointing takes it away
        x = x + self.attn(self.ln_1(x), attention_mask, kv_cache, **kwargs)[0]
        return x + self.mlp(self.ln_2(x))


class GPTPreTrainedModel(HubModel, PreTrainedModel):
    config_class = GPTConfig
    config: GPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTBlock"]
    _skip_keys_device_placement = [_CACHE]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GPTBlock,
        "attentions": OutputRecorder(GPTAttention, index=1),
    }
    # Causal masks that old hub files carry as buffers; the mask is computed here.
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$"]

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        if not isinstance(config, GPTConfig):  # a stock GPT2Config, from AutoConfig for example
            implementation = config._attn_implementation_internal
            config = GPTConfig.from_dict(config.to_dict())
            config._attn_implementation_internal = implementation
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation (Radford et al. 2019, section 2.3, and OpenAI's released code), all in one place."""
        std = self.config.initializer_range
        if isinstance(module, Conv1D):
            # 2 * n_layer projections add to the residual stream: shrink each, so that its variance does not grow.
            shrink = math.sqrt(2 * self.config.n_layer) if isinstance(module, ResidualProjection) else 1
            init.normal_(module.weight, std=std / shrink)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, std=std / 2 if module is self.base_model.wpe else std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class GPTModel(GPTPreTrainedModel):
    """The decoder without its head: token ids (B, T) to hidden states (B, T, C)."""

    _input_embed_layer = "wte"

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        config = self.config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = EmbeddingSum(config.embd_pdrop)
        self.h = nn.ModuleList([GPTBlock(config, i) for i in range(config.n_layer)])
        self.ln_f = FinalNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        past_key_values: Cache | None = None,
        attention_mask: Any = None,  # (B, S), 1 for tokens and 0 for padding; or ready for the backend
        token_type_ids: Tensor | None = None,  # (B, T), embedded by wte and added, for dialogue models that have them
        position_ids: Tensor | None = None,  # (B, T) or (1, T); where they start again, so does attention (no cache)
        inputs_embeds: Tensor | None = None,  # (B, T, C), instead of input_ids
        use_cache: bool | None = None,
        cache: Any = None,  # past_key_values, as transformers calls it from 5.24 on
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if cache is None:
            cache = past_key_values
        elif _CACHE != "cache" and not isinstance(cache, Cache):  # continuous batching's, for its attention function
            kwargs["cache"], cache = cache, past_key_values
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.pop("encoder_hidden_states", None) is not None:
            raise ValueError("encoder_hidden_states given to a decoder without an encoder: use stock GPT2LMHeadModel")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        # A mask is a (T, S) tensor that turns off the fast kernels: build one only when something must be hidden
        # beside the future, or when the backend cannot hide the future by itself.
        plain = attention_mask is None and position_ids is None and cache is None
        if "cu_seq_lens_q" in kwargs and self.config._attn_implementation.startswith("flash_attention"):
            plain = attention_mask is None  # it is told where documents end: don't read that from the device again
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            exporting = torch.compiler.is_exporting()  # to compare would fix the longest sequence in the program
            if not exporting and isinstance(seen, int) and seen + x.shape[1] > self.config.n_positions:
                raise ValueError(f"{seen + x.shape[1]} tokens for a model of {self.config.n_positions} positions")
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen
        else:
            # FlashAttention finds the documents of one packed row by them; of several, by cu_seq_lens_q and its like.
            kwargs["position_ids"] = position_ids
        mask = None
        if not (plain and self.config._attn_implementation in CAUSAL_WITHOUT_MASK):
            mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids=position_ids)

        if token_type_ids is not None:
            x = x + self.wte(token_type_ids)
        x = self.drop(x, self.wpe(position_ids))
        for block in self.h:
            x = block(x, mask, **{_CACHE: cache}, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x), **{_CACHE: cache if use_cache else None})


class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    """GPT-2 with its language-modelling head: reads and writes stock ``gpt2`` checkpoints."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _generation_compared = False  # with and without the cache, under a release of transformers that was not tested

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.transformer = GPTModel(self.config)
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        if not GPTForCausalLM._generation_compared:
            if untested():
                compare_cached(self, stock.generate)
            GPTForCausalLM._generation_compared = True
        return stock.generate(*args, **kwargs)

    functools.update_wrapper(generate, GenerationMixin.generate)  # its signature and help

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Any = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        reduction: str = "mean",
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or a loss, or both.

        Args:
            past_key_values: keys and values of earlier tokens; called ``cache`` from transformers 5.24 on. Either name
                works with any version.
            labels: (B, T), usually a copy of ``input_ids``; position t is scored against label t+1, -100 is ignored.
                Loss and logits come out as from stock GPT-2.
            shift_labels: (B, T), label t already being the token after input t; -100 is ignored. The training path:
                the logits are never built (``logits`` is None), the loss comes from ``linear_cross_entropy``. Not in
                the signature, where Trainer would take it for a column that every batch must have.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels here, so that
                gradients of several micro-batches add up to the gradient of their mean.
            reduction: with ``shift_labels``: "mean", "sum" or "none" (loss of shape (B, T), 0 where ignored).
            logits_to_keep: only the last so many positions (0: all), or these positions, get logits.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        if shift_labels is not None:
            use_cache = False
            if not isinstance(self.lm_head, nn.Linear):
                raise ValueError(f"shift_labels would pass by the {type(self.lm_head).__name__} on lm_head: use labels")
        out = self.transformer(
            input_ids,
            past_key_values=past_key_values,
            cache=cache,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = out.last_hidden_state  # (B, T, C)
        loss = logits = None
        if shift_labels is not None:
            loss = linear_cross_entropy(hidden, self.lm_head.weight, shift_labels, num_items_in_batch, reduction)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep])
            if labels is not None:
                vocab_size = logits.shape[-1]
                loss = self.loss_function(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE: out.get(_CACHE)},
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
