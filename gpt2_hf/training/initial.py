"""Weights of another model to begin a run with: a gpt2 folder, a run, or a model of the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from .. import runs
from ..config import RunConfig
from ..data.tokenizer import Tokenizer
from ..evaluation.evaluate import load_folder
from ..knobs import ConfigError
from ..model import GPTConfig, GPTForCausalLM

SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class InitialWeights:
    """Where a run's first weights come from.

    Attributes:
        source: a gpt2 folder, or a model id of the Hub.
        version: the hash of a folder's weights, or the commit of the Hub's.
    """

    source: str
    version: str | None


def find_initial_weights(config: RunConfig, of_data: Tokenizer) -> InitialWeights | None:
    """What ``model.init_from`` names, looked at but for its weights; None where a run begins with random ones.

    Raises:
        ConfigError: when it is no GPT-2, or has another shape or tokenizer than the run's, saying what to set.
    """
    named = config.model.init_from
    if named is None:
        return None
    is_folder = Path(named).is_dir()
    try:
        source = str(runs.find_model(Path(named))) if is_folder else named
        found = GPTConfig.from_pretrained(source)
        version = runs.weights_hash(Path(source)) if is_folder else getattr(found, "_commit_hash", None)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        where = "" if is_folder else " (no such folder, so looked for on the Hub)"
        raise ConfigError(f"model.init_from {named}{where}: {str(error).strip().splitlines()[0]}") from None
    _refuse_another_shape(config, found)
    # A folder without tokenizer files has an empty vocabulary.
    if len(tokenizer) > 1 and tokenizer.get_vocab() != of_data.hugging_face().get_vocab():
        whose = "GPT-2's" if of_data.is_gpt2 else of_data.name
        raise ConfigError(f"model.init_from {named} has another tokenizer than {whose}, of which the data is made")
    return InitialWeights(source, version)


def model_config(config: RunConfig, source: str | Path | None) -> GPTConfig:
    """The model's configuration: the recipe's, or that of the weights at ``source`` with the recipe's dropout.

    These may have what no recipe sets: another activation, an inner width, a head of their own.
    """
    own = config.model.gpt_config()
    if source is None:
        return own
    found = GPTConfig.from_pretrained(source)
    for name in DROPOUT:
        setattr(found, name, getattr(own, name))
    return found


def load_initial_weights(model: GPTForCausalLM, weights: InitialWeights) -> None:
    """Copy them into the model, in its precision. Raises ConfigError for weights that cannot be read."""
    try:
        found, _ = load_folder(weights.source)
    except ValueError as error:
        raise ConfigError(f"model.init_from: {error}") from None
    model.load_state_dict(found.state_dict())


def _refuse_another_shape(config: RunConfig, found: GPTConfig) -> None:
    own = config.model.gpt_config()
    flags = [f"--model.{name} {getattr(found, name)}" for name in SHAPE if getattr(found, name) != getattr(own, name)]
    if flags:
        raise ConfigError(
            f"model.init_from {config.model.init_from} has another shape than the recipe's model: {' '.join(flags)}"
        )
