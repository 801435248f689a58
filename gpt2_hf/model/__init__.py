"""The model: every other file in this folder can travel to the Hub beside the weights."""

from transformers import AutoModelForCausalLM

from .configuration_gpt import GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTModel

# Our configuration stands for our class; a stock one, from a Hub id for example, for the stock class as ever.
AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM)

__all__ = ["GPTConfig", "GPTForCausalLM", "GPTModel"]
