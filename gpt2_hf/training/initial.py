"""The weights that a new run begins with instead of random ones: a folder's, a run's, or those of a model of the Hub.

They are read at step 0 alone. From the first checkpoint on a run needs no one else's folder; what it began with is
recorded by name and by the hash of the weights, in environment.json, starts.jsonl and every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GPT2Config
from transformers.utils import cached_file

from .. import runs
from ..config import ModelSection, RunConfig
from ..data.tokenizer import load_tokenizer
from ..files import sha256
from ..knobs import ConfigError, shown
from ..model import GPTConfig
from ..model.configuration_gpt import PRESETS
from . import checkpoint
from .distributed import Host, settled
from .start import SHAPE, Start

# What no recipe can set, and a checkpoint of the run would not keep.
FIXED = (
    "activation_function",
    "layer_norm_epsilon",
    "n_inner",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
# Any text that tokenizers with other merges, or other rules for spaces and numbers, would cut differently.
SAMPLE = "First Citizen: before we proceed 1234 times, über-\n\n  hear me SPEAK!\t"


@dataclass(frozen=True)
class Initial:
    """Weights to begin with.

    Attributes:
        name: as the recipe has it.
        weights: 64 hex digits that only these files have (``runs.weights_hash``).
    """

    name: str
    folder: Path
    weights: str

    def record(self) -> dict[str, str]:
        return {"name": self.name, "weights": self.weights}


def find_initial(config: RunConfig, start: Start, host: Host) -> Initial | None:
    """What ``model.init_from`` names, for a run that begins; None without it, and for a run that goes on.

    Every rank must call it, and sees files of its own.

    Raises:
        ConfigError: when there is no such model, another machine has another one of that name, or it isn't of the
            recipe's shape.
    """
    name = config.model.init_from
    if name is None or start.checkpoint is not None:
        return None
    found: list[Any] = settled(host.gather(_look(config.model, name, say=host.rank == 0)))
    if len({initial.weights for initial in found}) > 1:
        raise ConfigError(f"model.init_from {name} has other weights on other machines: copy one folder to all")
    return found[host.rank]


def recorded(start: Start, initial: Initial | None) -> dict[str, str] | None:
    """What the run began with, for its records: found now, or read from the checkpoint that it goes on from."""
    if start.checkpoint is None:
        return None if initial is None else initial.record()
    return checkpoint.read_state(start.checkpoint).get("init_from")


def _look(section: ModelSection, name: str, say: bool) -> Initial | ConfigError:
    try:
        folder = _folder(name, say)
        _check(section, name, folder)
        return Initial(name, folder, _hash(folder))
    except (OSError, ValueError, ImportError) as error:
        why = str(error) if isinstance(error, ConfigError) else f"model.init_from {name}: {error}"
        return ConfigError(" ".join(why.split()))


def _folder(name: str, say: bool) -> Path:
    """The gpt2 folder on this machine; a model of the Hub is fetched."""
    if Path(name).is_dir():
        return runs.find_model(Path(name), print if say else lambda line: None)
    if name in ("resume", "scratch"):  # nanoGPT's words
        way = "a run resumes by itself" if name == "resume" else "a run begins with random weights by itself"
        raise ConfigError(f"model.init_from {name}: {way}; leave it out")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ConfigError(f"model.init_from {shown(name)}: there is no such folder; give a run, a folder, or a hub id")
    return _fetch(name)


def _fetch(name: str) -> Path:
    """A model of the Hub, in the Hub's cache. Raises OSError when it is neither there nor to be had."""
    folder = Path(str(cached_file(name, "config.json"))).parent
    for file in TOKENIZER:
        with suppress(OSError):  # which it may lack
            cached_file(name, file)
    for file in WEIGHTS:
        try:
            found = Path(str(cached_file(name, file)))
        except OSError:
            continue
        if file.endswith(".json"):
            for part in sorted(set(json.loads(found.read_text())["weight_map"].values())):
                cached_file(name, part)
        return folder
    raise OSError(f"it has no weights that can be read ({', '.join(WEIGHTS)})")


def _hash(folder: Path) -> str:
    try:
        return runs.weights_hash(folder)
    except FileNotFoundError:
        files = sorted(folder.glob("pytorch_model*.bin"))  # of older folders
        if not files:
            raise
        return hashlib.sha256(json.dumps([[path.name, sha256(path)] for path in files]).encode()).hexdigest()


def _check(section: ModelSection, name: str, folder: Path) -> None:
    """Raise ConfigError where the recipe's model is another one, or its tokenizer cuts text in another way."""
    theirs, ours = GPTConfig.from_pretrained(folder), section.gpt_config()
    different = [key for key in SHAPE if getattr(theirs, key) != getattr(ours, key)]
    if different:
        listed = ", ".join(f"{key} {getattr(theirs, key)} (the recipe {getattr(ours, key)})" for key in different)
        raise ConfigError(f"model.init_from {name} has {listed}: set {_flags(section, theirs)}")
    default = GPT2Config()
    odd = [key for key in FIXED if getattr(theirs, key) != getattr(default, key)]
    if odd:
        listed = ", ".join(f"{key} {getattr(theirs, key)}" for key in odd)
        raise ConfigError(f"model.init_from {name} has {listed}, which no recipe can have: choose another model")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder) if _has_tokenizer(folder) else None
    packaged: Any = load_tokenizer()
    if tokenizer is not None and tokenizer(SAMPLE)["input_ids"] != packaged(SAMPLE)["input_ids"]:
        raise ConfigError(
            f"model.init_from {name} has another tokenizer than GPT-2's, which runs use: its weights would read "
            f"other words; choose another model"
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER)


def _flags(section: ModelSection, theirs: GPTConfig) -> str:
    """What to set so that the recipe has the shape of a model: as little as will do."""
    wanted = {key: getattr(theirs, key) for key in SHAPE}

    def fits(changed: ModelSection) -> bool:
        try:
            return all(getattr(changed.gpt_config(), key) == value for key, value in wanted.items())
        except ConfigError:
            return False

    changes: list[dict[str, Any]] = [{"preset": preset} for preset in PRESETS]
    for change in changes:
        if fits(replace(section, **change)):
            break
    else:
        ours = {key: getattr(section.gpt_config(), key) for key in SHAPE}
        change = {key: value for key, value in wanted.items() if value != ours[key]}
    return " ".join(f"--model.{key} {value}" for key, value in change.items())
