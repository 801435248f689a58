"""Pretrain GPT-2 in the Hugging Face ecosystem: stock checkpoints in, stock checkpoints out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import GPTConfig, GPTForCausalLM, GPTModel

__version__ = "0.1.0"
__all__ = ["GPTConfig", "GPTForCausalLM", "GPTModel"]


def __getattr__(name: str) -> Any:
    """The model, and PyTorch with it, loads when it is asked for: a worker that prepares data needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import model

    return getattr(model, name)
