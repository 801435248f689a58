"""Pretrain GPT-2 in the Hugging Face ecosystem: stock checkpoints in, stock checkpoints out."""

from .model import GPTConfig, GPTForCausalLM, GPTModel

__version__ = "0.1.0"
__all__ = ["GPTConfig", "GPTForCausalLM", "GPTModel"]
