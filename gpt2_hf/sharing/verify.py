"""Is a folder a stock GPT-2 that anyone can load? Asked as a program of its own, as on a reader's machine.

    python verify.py KNOWN_CODE_AND_AUTO_MAP FOLDER ...

``check_folders`` in fresh_process.py starts it so, by this file's path, and reads the lines of JSON that it writes.
gpt2_hf cannot be imported there, so this file stands alone, however long it is.

Letters: T positions, C channels, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXTS = (
    "Hello, I'm a language model,",
    "  Leading,  double and trailing spaces, \n\n\ttabs and newlines \n",
    "naïve café — “Übermut”, 東京, ελληνικά, 🙂",
    "def square(x):\n    return x ** 2  # 1234567890\n",
)
UNLIMITED = 10**20  # transformers' "no limit" is 10**30
# fp32 against float64, relative to the largest centred logit: about 1e-6 in GPT-2 124M, more in deeper models.
LOGITS_TOLERANCE = 1e-4
_SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
_MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")


@dataclass(frozen=True)
class Result:
    """Outcome of one check; ``status`` is "ok", "warning" or "FAILED"."""

    check: str
    status: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:<8} {self.check:<14} {self.text}"


class CheckFailed(Exception):
    pass


class CheckWarning(Exception):
    pass


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in ``folder``: the single one if there, else those of the index.

    Raises:
        CheckFailed: when there is neither, or the index names anything but shards beside it.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        if odd := sorted(str(name) for name in shards if not _SHARD.fullmatch(str(name))):
            raise CheckFailed(f"{INDEX} names {odd[0]!a}: shards lie beside it, as model-00001-of-00002.safetensors")
        return [folder / name for name in sorted(shards)]
    raise CheckFailed(f"no {WEIGHTS}, and no {INDEX}")


class Folder:
    """A checkpoint folder as files, and as what stock transformers makes of it; everything is read when first used.

    Args:
        known_code: name and sha256 of the Python files that may be run when they lie there.
        auto_map: config.json's only way to them.
    """

    def __init__(
        self, path: Path, known_code: Mapping[str, str] | None = None, auto_map: Mapping[str, str] | None = None
    ):
        self.path, self.known_code, self.auto_map = path, known_code or {}, auto_map or {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def stock_config(self) -> Any:
        from transformers import GPT2Config

        return GPT2Config.from_pretrained(self.path, local_files_only=True)

    @cached_property
    def files(self) -> dict[str, Any]:
        """Name in the file -> the open file that has it, from which a tensor is read when it is asked for."""
        found: dict[str, Any] = {}
        for path in weight_files(self.path):
            file = safe_open(path, "pt")
            found |= dict.fromkeys(file.keys(), file)
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self.files.items()}

    @cached_property
    def names(self) -> dict[str, str]:
        """Today's name -> name in the file, without mask buffers. Old hub files leave out "transformer."."""
        plain = not any(name.startswith("transformer.") for name in self.files)
        prefix = "transformer." if plain else ""
        return {
            name if name == "lm_head.weight" else prefix + name: name
            for name in self.files
            if not _MASK_BUFFER.search(name)
        }

    def read(self, name: str) -> Tensor:
        """The tensor of today's name, in float64."""
        if name not in self.names:
            raise CheckFailed(f"{name} is missing")
        stored = self.names[name]
        return self.files[stored].get_tensor(stored).double()

    @cached_property
    def tokens(self) -> Tensor:
        """(T,) random tokens from the whole vocabulary."""
        length = min(64, self.stock_config.n_positions)
        return torch.randint(self.stock_config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))

    @cached_property
    def stock(self) -> tuple[Any, dict[str, Any]]:
        """What a plain from_pretrained makes of the folder, in fp32, and what it says about keys."""
        from transformers import AutoModelForCausalLM

        if self.config.get("model_type") != "gpt2":  # it could be of any size, with random weights
            raise CheckFailed("not tried: config.json is not that of a gpt2")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=torch.float32, local_files_only=True, output_loading_info=True, trust_remote_code=False
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise CheckFailed("transformers refuses shapes that are not those of config.json") from None
        return loaded

    @cached_property
    def stock_logits(self) -> Tensor:
        with torch.no_grad():
            return self.stock[0](self.tokens[None]).logits[0].double()  # (T, V)


def activation(name: str, x: Tensor) -> Tensor:
    """GPT-2's GELU (Hendrycks & Gimpel 2016, section 2: the tanh form), the exact one, or ReLU."""
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "relu":
        return x.clamp(min=0)
    raise CheckWarning(f"not compared: no formula here for the activation {name!r}")


def plain_forward(config: Any, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """GPT-2 (Radford et al. 2019) written out once more, from the file's own tensors: tokens (T,) to logits (T, V).

    Shares nothing with transformers' model or ours, so an error in either shows. float64, one layer in memory.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).rsqrt()
        return centred * scale * read(f"{name}.weight") + read(f"{name}.bias")

    def project(x: Tensor, name: str) -> Tensor:
        return x @ read(f"{name}.weight") + read(f"{name}.bias")

    n_tokens, n_head = len(tokens), config.n_head
    future = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    embedding = read("transformer.wte.weight")
    x = embedding[tokens] + read("transformer.wpe.weight")[:n_tokens]  # (T, C)
    for i in range(config.n_layer):
        layer = f"transformer.h.{i}"
        qkv = project(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
        q, k, v = qkv.view(n_tokens, 3, n_head, -1).permute(1, 2, 0, 3)  # (H, T, D) each
        scores = q @ k.mT  # (H, T, T)
        if config.scale_attn_weights:
            scores = scores / math.sqrt(q.shape[-1])
        if config.scale_attn_by_inverse_layer_idx:
            scores = scores / (i + 1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        x = x + project(mixed.transpose(0, 1).reshape(n_tokens, -1), f"{layer}.attn.c_proj")
        hidden = activation(config.activation_function, project(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"))
        x = x + project(hidden, f"{layer}.mlp.c_proj")
    head = embedding if config.tie_word_embeddings else read("lm_head.weight")
    return norm(x, "transformer.ln_f") @ head.T


def difference(logits: Tensor, expected: Tensor) -> float:
    """Largest difference of two (T, V), relative to the largest logit once each row's mean, which says nothing, is
    taken out."""
    a, b = (t - t.mean(-1, keepdim=True) for t in (logits, expected))
    return ((a - b).abs().max() / b.abs().max()).item()


def check_files(f: Folder) -> str:
    used = weight_files(f.path)
    if missing := [file.name for file in used if not file.is_file()]:
        raise CheckFailed(f"{INDEX} names {', '.join(missing)}, which is not there")
    size = sum(file.stat().st_size for file in used)
    return f"{len(used)} safetensors file{'s' * (len(used) > 1)}, {size / 1e6:,.1f} MB"


def check_config(f: Folder) -> str:
    if f.config.get("model_type") != "gpt2":
        raise CheckFailed(f"model_type is {f.config.get('model_type')!r}, not 'gpt2'")
    if f.config.get("architectures") != ["GPT2LMHeadModel"]:
        raise CheckFailed(f"architectures is {f.config.get('architectures')}, not ['GPT2LMHeadModel']")
    if "auto_map" in f.config and f.config["auto_map"] != f.auto_map:
        raise CheckFailed(f"auto_map is {json.dumps(f.config['auto_map'])}, which leads to code that is not ours")
    if "auto_map" in f.config and (missing := [n for n in f.known_code if not (f.path / n).is_file()]):
        raise CheckFailed(f"auto_map needs {missing[0]}, which is not in the folder: save it again")
    c = f.stock_config
    shape = f"{c.n_layer} layers, {c.n_embd} wide, {c.n_head} heads, {c.n_positions} positions"
    return f"gpt2, {shape}, vocabulary {c.vocab_size}" + (", with code" if "auto_map" in f.config else "")


def check_keys(f: Folder) -> str:
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        stock = GPT2LMHeadModel(f.stock_config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in stock.items()}
    found = {name: f.shapes[in_file] for name, in_file in f.names.items()}
    for either in (expected, found):
        either.pop("lm_head.weight", None)  # the head has a check of its own
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not a weight of GPT-2" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name]}, by config.json {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckFailed("; ".join(sorted(problems)[:3]) + more)
    old = [f"{len(f.shapes) - len(f.names)} mask buffers"] if len(f.shapes) > len(f.names) else []
    old += ["names without 'transformer.'"] if "wte.weight" in f.shapes else []
    if old:
        raise CheckWarning(f"an old file, which loads all the same: {', '.join(old)}")
    n_parameters = sum(math.prod(shape) for shape in found.values())
    return f"{len(found)} tensors, {n_parameters:,} parameters, exactly GPT-2's names and shapes"


def check_head(f: Folder) -> str:
    on_disk = "lm_head.weight" in f.names
    if not f.stock_config.tie_word_embeddings:
        if not on_disk:
            raise CheckFailed("config.json unties the head, and the file has no lm_head.weight")
        return "a head of its own, as config.json says"
    if not on_disk:
        return "the embedding, with one copy on disk"
    if not torch.equal(f.read("lm_head.weight"), f.read("transformer.wte.weight")):
        raise CheckFailed("lm_head.weight differs from the embedding, and config.json says they are tied")
    raise CheckWarning("a second copy of the embedding is on disk")


def check_finite(f: Folder) -> str:
    dtypes = set()
    for name, file in f.files.items():
        tensor = file.get_tensor(name)
        if not tensor.isfinite().all():
            n_bad = tensor.numel() - int(tensor.isfinite().sum())
            raise CheckFailed(f"{name} has {n_bad:,} of {tensor.numel():,} values that are NaN or infinite")
        if not _MASK_BUFFER.search(name):
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
    return f"no NaN, no infinity; {', '.join(sorted(dtypes))}"


def check_loading(f: Folder) -> str:
    model, info = f.stock
    name = type(model).__name__
    if name != "GPT2LMHeadModel" or not type(model).__module__.startswith("transformers."):
        raise CheckFailed(f"AutoModelForCausalLM gives {type(model).__module__}.{name}, not the stock GPT2LMHeadModel")
    for kind, keys in info.items():
        if keys := [str(key) for key in keys if not _MASK_BUFFER.search(str(key))]:
            raise CheckFailed(f"{kind.replace('_', ' ')}: {', '.join(sorted(keys)[:3])}")
    return "AutoModelForCausalLM gives GPT2LMHeadModel, no key missing or left over"


def check_logits(f: Folder) -> str:
    error = difference(f.stock_logits, plain_forward(f.stock_config, f.read, f.tokens))
    if not error <= LOGITS_TOLERANCE:  # also when it is NaN
        raise CheckFailed(f"differ from a calculation with the file's tensors by {error:.1e} of the largest logit")
    return f"equal a calculation with the file's tensors to {error:.0e}"


def check_tokenizer(f: Folder) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(f.path, local_files_only=True, trust_remote_code=False)
    if len(tokenizer) <= 1:
        raise CheckFailed("no tokenizer: there is no tokenizer.json, and no vocab.json with merges.txt")
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        if back != text:
            raise CheckFailed(f"{text!r} comes back as {back!r}")
    if problem := next(tokenizer_problems(tokenizer, f.stock_config), None):
        raise CheckFailed(problem)
    if doubt := next(tokenizer_doubts(tokenizer, f.stock_config), None):
        raise CheckWarning(doubt)
    return f"{len(tokenizer)} tokens, texts come back unchanged, end of text {tokenizer.eos_token_id}"


def _size(tokenizer: Any) -> int:
    """Rows that a model needs for it: there may be numbers without a token."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_problems(tokenizer: Any, config: Any) -> Iterator[str]:
    """Why the tokenizer cannot be this model's."""
    size, rows = _size(tokenizer), config.vocab_size
    if size > rows:
        yield f"the tokenizer has {size} tokens, the model {rows} rows for them"
    for owner, token in (("tokenizer", tokenizer.eos_token_id), ("config.json", config.eos_token_id)):
        if isinstance(token, int) and token >= rows:
            yield f"the {owner}'s end of text is token {token}, the model has {rows} rows"
    is_padding = rows % 64 == 0 and rows - size < 1024
    if size < rows and not is_padding:
        yield f"the tokenizer has {size} tokens, the model {rows}: it is another model's"
    n_positions, longest = config.n_positions, tokenizer.model_max_length
    if n_positions < longest < UNLIMITED:
        yield (
            f"model_max_length is {longest}, and the model has {n_positions} positions, so that truncated texts "
            f"still do not fit: write {n_positions} into tokenizer_config.json"
        )


def tokenizer_doubts(tokenizer: Any, config: Any) -> Iterator[str]:
    """What is unusual in a tokenizer that fits."""
    size, rows, eos, n_positions = _size(tokenizer), config.vocab_size, tokenizer.eos_token_id, config.n_positions
    if size < rows:
        yield f"{size} tokens for {rows} rows: the rest is padding"
    if eos is None or eos != config.eos_token_id:
        yield f"the end of text is {eos} here and {config.eos_token_id} in config.json"
    if tokenizer.model_max_length >= UNLIMITED:
        yield f"tokenizer_config.json sets no model_max_length ({n_positions}): nothing cuts long texts"


def check_generation(f: Folder) -> str:
    from transformers import GenerationConfig

    model, n_new = f.stock[0], min(8, f.stock_config.n_positions - 4)
    saved = (f.path / "generation_config.json").is_file()
    if saved:
        GenerationConfig.from_pretrained(f.path, local_files_only=True)
    prompt = f.tokens[None, :4]
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_new, do_sample=False, pad_token_id=0
    )
    if output.shape[1] <= prompt.shape[1]:
        raise CheckFailed("generate() adds no token")
    if not saved:
        raise CheckWarning("generate() runs; there is no generation_config.json, its defaults come from config.json")
    return f"generation_config.json loads, generate() adds {output.shape[1] - prompt.shape[1]} greedy tokens"


def check_code(f: Folder) -> str:
    if f.config["auto_map"] != f.auto_map:  # repository--module.Class and module.x--y.Class are of another repository
        raise CheckFailed("auto_map leads to code that is not ours: not run")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in f.path.glob("*.py")}
    if foreign := sorted(name for name, found in hashes.items() if f.known_code.get(name) != found):
        raise CheckWarning(f"code of someone else, or of another version: not run ({', '.join(foreign[:3])})")
    with tempfile.TemporaryDirectory() as clean:
        model = load_with_code(f, Path(clean))
    if not type(model).__module__.startswith("transformers_modules."):
        raise CheckFailed(f"trust_remote_code=True gives {type(model).__name__}, not the folder's class")
    with torch.no_grad():
        error = difference(model(f.tokens[None]).logits[0].double(), f.stock_logits)
    if not error <= LOGITS_TOLERANCE:
        raise CheckFailed(f"logits differ from stock by {error:.1e} of the largest")
    return f"trust_remote_code=True gives {type(model).__name__}, logits equal stock to {error:.0e}"


def load_with_code(f: Folder, clean: Path) -> Any:
    """The model by the folder's code, in the empty folder ``clean``: other files of a folder, such as
    custom_generate/ or an adapter's, lead to more code."""
    from transformers import AutoModelForCausalLM

    weights = [path.name for path in weight_files(f.path) if path.parent == f.path]
    for name in ("config.json", INDEX, *weights, *f.known_code):
        if (f.path / name).is_file():
            shutil.copyfile(f.path / name, clean / name)
    return AutoModelForCausalLM.from_pretrained(
        clean, dtype=torch.float32, local_files_only=True, trust_remote_code=True
    )


CHECKS: dict[str, Callable[[Folder], str]] = {
    "files": check_files,
    "configuration": check_config,
    "names, shapes": check_keys,
    "head": check_head,
    "values": check_finite,
    "loading": check_loading,
    "logits": check_logits,
    "tokenizer": check_tokenizer,
    "generation": check_generation,
    "code": check_code,
}


def run_checks(folder: Folder) -> Iterator[Result]:
    """All checks of a folder, in this process; one that fails does not stop the others."""
    odd = [path.name for path in folder.path.glob("*") if path.exists() and not (path.is_file() or path.is_dir())]
    if odd:  # a pipe would be read for ever
        yield Result("files", "FAILED", f"{min(odd)} is neither a file nor a folder: nothing is looked at")
        return
    for name, check in CHECKS.items():
        try:
            if name == "code" and not folder.config.get("auto_map"):
                continue
            yield Result(name, "ok", check(folder))
        except CheckWarning as warning:
            yield Result(name, "warning", str(warning))
        except Exception as error:  # whatever a library says of a broken file is the finding
            text = " ".join(str(error).split()) or type(error).__name__
            yield Result(name, "FAILED", text if len(text) <= 300 else text[:300] + " ...")


class Hidden:
    """Stands before everything that finds modules, and lets nobody import gpt2_hf."""

    @staticmethod
    def find_spec(name: str, *rest: Any) -> None:
        if name.split(".")[0] == "gpt2_hf":
            raise ImportError("gpt2_hf is hidden from the check")


def main() -> None:
    """A JSON line for each result of each folder in sys.argv[2:], and one without a result that ends each folder."""
    sys.meta_path.insert(0, Hidden)
    output, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the results

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known_code, auto_map = json.loads(sys.argv[1])
    for folder in sys.argv[2:]:
        for result in run_checks(Folder(Path(folder), known_code, auto_map)):
            print(json.dumps({"folder": folder, **asdict(result)}), file=output, flush=True)
        print(json.dumps({"folder": folder}), file=output, flush=True)


if __name__ == "__main__":
    main()
