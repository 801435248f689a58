"""Pretrain GPT-2 in the Hugging Face ecosystem: stock checkpoints in, stock checkpoints out."""

from transformers import AutoModelForCausalLM

from .model import GPTConfig, GPTForCausalLM, GPTModel

# Our configuration stands for our class; a stock one, from a Hub id for example, for the stock class as ever.
AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM)

__version__ = "0.1.0"
__all__ = ["GPTConfig", "GPTForCausalLM", "GPTModel"]
