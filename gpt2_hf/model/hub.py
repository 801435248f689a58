"""Checkpoint folders of the Hub: only a whole GPT-2 comes in, and a stock one goes out, with this code on request.

Mixed into GPTConfig and GPTPreTrainedModel; holds nothing of the architecture.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig as ConfigBase
    from transformers import PreTrainedModel as ModelBase
else:
    ConfigBase = ModelBase = object

# What trust_remote_code=True makes of a folder that our code has travelled to.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt.GPTConfig",
    "AutoModel": "modeling_gpt.GPTModel",
    "AutoModelForCausalLM": "modeling_gpt.GPTForCausalLM",
}
# LayerNorm's names in files that came from TensorFlow.
OLD_NAMES = {r"(ln_\w)\.gamma$": r"\1.weight", r"(ln_\w)\.beta$": r"\1.bias"}
# By this list of class names Trainer knows that smoothed labels need shifting, and pipelines what they support.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt2_hf"] = "GPTForCausalLM"


def code_files() -> list[Path]:
    """The files that travel beside weights: modeling_gpt.py and the siblings that it imports."""
    modeling = Path(__file__).with_name("modeling_gpt.py")
    return sorted({modeling, *map(Path, get_relative_import_files(modeling))})


def _refuse_two_models(folder: Path) -> None:
    """transformers passes a folder's own weights by where an adapter's configuration lies beside them."""
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    if weights and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"cannot load {folder}: beside {weights[0].name} lies adapter_config.json, an adapter's, which would load "
            "another model: move one of them to a folder of its own"
        )


@contextmanager
def _errors_in_one_line(name: Any) -> Iterator[None]:
    """Whatever a library says of what it cannot load, as one line that names it, of the kind that callers expect."""
    broken = f"cannot load {name}: a weights file is cut off or damaged"
    try:
        yield
    except (ImportError, NotImplementedError) as error:  # the second where a quantisation needs another device
        why = " ".join(str(error).split())
        raise ImportError(
            f"cannot load {name}: its config.json, or an argument, asks for what is not there ({why})"
        ) from error
    except UnpicklingError as error:
        # Its own text would have the reader try weights_only=False.
        raise OSError(f"{broken} (or a pickle of more than tensors, which could run code)") from error
    except (SafetensorError, EOFError) as error:
        raise OSError(f"{broken} ({error})") from error
    except OSError as error:
        if error.errno is None or error.filename is not None:  # transformers' own words, or a file's name
            raise
        raise OSError(f"{broken} ({error.strerror})") from error
    except (AttributeError, LookupError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        # transformers trusts its files to hold what they should.
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise OSError(
            f"cannot load {name}: one of its files, or an argument, is not as it should be ({why})"
        ) from error


def _refuse_gaps(name: Any, info: dict[str, Any], ignore_mismatched_sizes: bool) -> None:
    """Refuse a model that has weights which no file gave it."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(f"cannot load {name}: it lacks {len(missing)} of the model's weights ({missing[0]}, ...)")
    if info["mismatched_keys"] and not ignore_mismatched_sizes:
        key, found, expected = min(info["mismatched_keys"])
        advice = f": vocab_size={found[0]} loads them all" if key.endswith(("wte.weight", "lm_head.weight")) else ""
        raise ValueError(
            f"cannot load {name}: {key} is {tuple(found)} in the file and {tuple(expected)} by config.json{advice}"
        )


class HubConfig(ConfigBase):
    """Reading and writing of config.json."""

    _with_code = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        # transformers would warn and go on with random weights. The oldest files have no model_type.
        if found.get("model_type", "gpt2" if "n_embd" in found else None) != "gpt2":
            what = f"its config.json says model_type {found.get('model_type')!r}" if found else "it has no config.json"
            raise ValueError(f"{pretrained_model_name_or_path} is not a GPT-2: {what}")
        return found, rest

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        for name in ("_with_code", "auto_map"):
            output.pop(name, None)
        if self._with_code:
            output["auto_map"] = dict(AUTO_MAP)
        # Written here and not in save_pretrained, which push_to_hub bypasses.
        output["architectures"] = ["GPT2LMHeadModel"]
        return output

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        if self._with_code:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for file in code_files():
                shutil.copyfile(file, Path(save_directory) / file.name)
        super().save_pretrained(save_directory, *args, **kwargs)

    @contextmanager
    def travelling_with_code(self, with_code: bool) -> Iterator[None]:
        """Whether code goes along with what is saved inside this context; an outer True holds in inner ones."""
        before = self._with_code
        self._with_code = before or with_code
        try:
            yield
        finally:
            self._with_code = before

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing. transformers calls it on code that it loaded from a folder, and a registered class saves its
        code every time; ours travels when ``with_code=True`` says so."""


class HubModel(ModelBase):
    """Reading and writing of a model's folder."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but all or nothing: a model with some weights left random is refused.

        That is meant so with ``output_loading_info`` too, whose ``missing_keys`` are therefore always empty.

        Raises:
            ValueError: when the folder holds another model, or not all weights of this one, or two models.
            OSError: when there is no such folder or model, or a file of it is cut off or damaged.
            ImportError: when config.json or an argument asks for a package or a device that is not there.
        """
        name = pretrained_model_name_or_path
        kwargs["key_mapping"] = OLD_NAMES | (kwargs.get("key_mapping") or {})
        if isinstance(name, str | Path):
            _refuse_two_models(Path(name))
        load: Any = partial(
            super().from_pretrained, name, *args, output_loading_info=True, ignore_mismatched_sizes=True
        )
        with _errors_in_one_line(name):
            try:
                model, info = load(**kwargs)
            except NotImplementedError:  # transformers compares a head that it has left out with the embedding
                ignore_mismatched_sizes = False
                model, info = load(**kwargs | {"tie_word_embeddings": False})
        _refuse_gaps(name, info, ignore_mismatched_sizes)
        # Saving would give the old names back.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not OLD_NAMES.keys() & set(c.source_patterns)]
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, with_code: bool = False, **kwargs: Any) -> None:
        """A stock ``gpt2`` folder, as transformers saves it.

        Args:
            with_code: copy this code beside the weights and name it in config.json: then ``trust_remote_code=True``
                loads our classes where gpt2_hf is not installed. Without that flag the folder still loads as stock.
        """
        with self.config.travelling_with_code(with_code):
            super().save_pretrained(save_directory, *args, **kwargs)

    # The names of transformers' parameters differ between the versions supported, so they are passed on as they come.
    def push_to_hub(  # type: ignore[override]
        self, *args: Any, with_code: bool = False, **kwargs: Any
    ) -> str:
        """As in transformers; ``with_code`` as in ``save_pretrained``."""
        with self.config.travelling_with_code(with_code):
            return super().push_to_hub(*args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing, as in HubConfig."""
