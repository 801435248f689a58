"""GPTConfig: the hub's GPT-2 configuration, strict about spelling, with the four published sizes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GPT2Config
from transformers.activations import ACT2FN
from transformers.utils.versions import require_version

from .hub import HubConfig

# Here, as of code that has travelled this file is read first.
require_version(
    "transformers>=5.17",
    "Without trust_remote_code=True the same weights load as stock GPT-2 in any version.",
)

# OpenAI's four sizes (Radford et al. 2019, table 2); "gpt2" is the 124M model.
PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# What every configuration of transformers takes beside the declared fields, or has in its to_dict().
_LIBRARY_NAMES = {"attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path"}
_LIBRARY_NAMES |= {"num_labels", "output_attentions", "per_layer_config", "quantization_config", "torch_dtype"}


@contextmanager
def _as_value_error() -> Iterator[None]:
    """transformers checks the fields' types, with errors of a class of its own and of several lines."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from None


class GPTConfig(HubConfig, GPT2Config):
    """GPT-2's fields under GPT-2's names; what it writes is a plain ``gpt2`` configuration.

    Differs from ``GPT2Config`` in two ways. A misspelt field raises (``GPTConfig(n_layers=4)`` would otherwise train
    the wrong model without a word), and the saved ``config.json`` names the stock architecture, so every tool that
    reads GPT-2 reads our folders.

    Raises:
        TypeError: for a field that GPT-2 does not have.
        ValueError: for values that no GPT-2 can have, or features that this implementation leaves out.
    """

    def __init__(self, *, _tolerant: bool = False, **kwargs: Any):
        # Hub files carry fields of their own time (n_ctx, task_specific_params): only from_dict may pass those.
        if not _tolerant:
            known = {f.name for f in fields(GPT2Config)} | set(self.attribute_map) | _LIBRARY_NAMES | {"n_ctx"}
            for name in kwargs:
                if name not in known and not name.startswith("_"):
                    close = difflib.get_close_matches(name, known, 1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise TypeError(f"GPTConfig has no field {name!r}{hint}")
        n_ctx = kwargs.pop("n_ctx", None)  # written by to_dict; n_positions alone decides
        with _as_value_error():
            super().__init__(**kwargs)
        if not _tolerant and n_ctx not in (None, self.n_positions):
            raise ValueError(f"n_ctx is {n_ctx} and n_positions {self.n_positions}: leave n_ctx out, it is the same")
        self._check()

    __init__.__signature__ = inspect.signature(GPT2Config.__init__)  # type: ignore[attr-defined]  # for editors and help()

    def _check(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "n_inner", "n_positions", "vocab_size"):
            size = getattr(self, name)
            if size is not None and size < 1:  # of these, the types let n_inner alone be None
                raise ValueError(f"{name} is {size}, and must be 1 or more")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be from 0 to 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function {self.activation_function!r} is not one of transformers' ({', '.join(ACT2FN)})"
            )
        if self.add_cross_attention:
            raise ValueError("add_cross_attention=True is not supported: this is a decoder without an encoder")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """The configuration of a published size: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        with _as_value_error():
            found = super().from_dict({**config_dict, "_tolerant": True}, **kwargs)
        # Once more: transformers sets kwargs on the finished configuration.
        (found[0] if isinstance(found, tuple) else found)._check()
        return found

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("_tolerant", None)
        output["n_ctx"] = self.n_positions  # GPT-2's name for it in 2019, which some converters still read
        return output
