"""Token ids -> loss and logits: the network, weight for weight the hub's gpt2.

In comes a `GPTConfig` and a batch. Out come a loss or logits, and from `save_pretrained` a folder that stock
transformers loads. Anything may be touched that keeps logits and gradients equal to stock GPT-2's: `tests/model`
compares them in float64. Files here import only each other, because on request they travel to the Hub beside weights.
"""

from transformers import AutoModel, AutoModelForCausalLM

from .configuration_gpt import GPTConfig
from .modeling_gpt import GPTForCausalLM, GPTModel

# Our configuration stands for our classes; a stock one, from a Hub id for example, for the stock classes as ever.
AutoModel.register(GPTConfig, GPTModel)
AutoModelForCausalLM.register(GPTConfig, GPTForCausalLM)

__all__ = ["GPTConfig", "GPTForCausalLM", "GPTModel"]
