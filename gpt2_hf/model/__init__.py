"""The model: every other file in this folder can travel to the Hub beside the weights."""

from transformers import AutoModel, AutoModelForCausalLM

from .configuration_gpt import GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTModel

# Our configuration stands for our classes; a stock one, from a Hub id for example, for the stock classes as ever.
AutoModel.register(GPTConfig, GPTModel)
AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM)

__all__ = ["GPTConfig", "GPTForCausalLM", "GPTModel"]
