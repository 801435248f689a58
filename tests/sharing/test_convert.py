"""Conversion against the formats themselves: each has a small model and a file written here, from its description."""

import dataclasses
import importlib.util
import math
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2_hf.evaluation.evaluate import load_folder
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import write_folder
from gpt2_hf.sharing.convert import ConversionError, convert

L, H, C, T, V = 2, 4, 32, 24, 211
TOKENS = torch.arange(2 * T).reshape(2, T) * 37 % V


# ---- a GPT as nanoGPT and build-nanogpt have it: nn.Linear, one key per parameter


class Block(nn.Module):
    def __init__(self, bias: bool, gelu: str, mask: bool):
        super().__init__()
        self.gelu = gelu
        self.ln_1, self.ln_2 = (nn.LayerNorm(C, bias=bias) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(C, 4 * C, bias=bias), nn.Linear(4 * C, C, bias=bias)
        if mask:
            self.attn.register_buffer("bias", torch.ones(T, T).tril()[None, None])

    def forward(self, x):
        n, t = x.shape[:2]
        q, k, v = self.attn.c_attn(self.ln_1(x)).view(n, t, 3, H, C // H).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(C // H) + torch.full((t, t), -math.inf).triu(1)
        x = x + self.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.gelu))


class PlainGPT(nn.Module):
    def __init__(self, vocab_size: int = V, bias: bool = True, gelu: str = "none", mask: bool = False, seed: int = 0):
        super().__init__()
        self.lm_head = nn.Linear(C, vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, C),
                "wpe": nn.Embedding(T, C),
                "h": nn.ModuleList([Block(bias, gelu, mask) for _ in range(L)]),
                "ln_f": nn.LayerNorm(C, bias=bias),
            }
        )
        self.transformer.wte.weight = self.lm_head.weight
        torch.manual_seed(seed)
        with torch.no_grad():  # large enough for attention to be uneven and for the two GELUs to differ
            for name, p in self.named_parameters():
                p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.3)

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


@dataclasses.dataclass
class BuildConfig:
    block_size: int = T
    vocab_size: int = V
    n_layer: int = L
    n_head: int = H
    n_embd: int = C


def nanogpt_file(path: Path, plain: PlainGPT, prefix: str = "", **changes) -> Path:
    """ckpt.pt as nanoGPT's train.py saves it, with the state of AdamW."""
    state = {
        i: {"step": torch.tensor(500.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.ones_like(p)}
        for i, p in enumerate(plain.parameters())
    }
    args = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": plain.lm_head.out_features}
    checkpoint = {
        "model": {prefix + name: value for name, value in plain.state_dict().items()},
        "optimizer": {"state": state, "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "params": [*state]}]},
        "model_args": {**args, "bias": plain.transformer.ln_f.bias is not None, "dropout": 0.1},
        "iter_num": 500,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4, "n_head": 999, "compile": True},
    }
    torch.save(checkpoint | changes, path)
    return path


def build_nanogpt_file(path: Path, model: PlainGPT, monkeypatch) -> Path:
    """model_05000.pt as build-nanogpt saves it: its configuration is an object of a class of the script that ran."""
    in_script = dataclasses.make_dataclass("GPTConfig", [], bases=(BuildConfig,))
    monkeypatch.setattr(in_script, "__module__", "__main__")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "GPTConfig", in_script, raising=False)
        config = in_script(vocab_size=model.lm_head.out_features)
        config.n_head = H  # in the object's own dictionary, whatever the class's defaults
        torch.save({"model": model.state_dict(), "config": config, "step": 5000, "val_loss": 3.1}, path)
    return path


# ---- llm.c: the binary written with struct, read with numpy, and a forward pass over its arrays

LLMC_ARRAYS = {
    "wte": ("P", "C"),
    "wpe": ("T", "C"),
    "ln1w": ("L", "C"),
    "ln1b": ("L", "C"),
    "qkvw": ("L", "3C", "C"),
    "qkvb": ("L", "3C"),
    "attprojw": ("L", "C", "C"),
    "attprojb": ("L", "C"),
    "ln2w": ("L", "C"),
    "ln2b": ("L", "C"),
    "fcw": ("L", "4C", "C"),
    "fcb": ("L", "4C"),
    "fcprojw": ("L", "C", "4C"),
    "fcprojb": ("L", "C"),
    "lnfw": ("C",),
    "lnfb": ("C",),
}


def llmc_shapes(vocab: int, layers: int = L) -> dict[str, tuple[int, ...]]:
    letters = {"P": -(-vocab // 128) * 128, "T": T, "L": layers, "C": C, "3C": 3 * C, "4C": 4 * C}
    return {name: tuple(letters[letter] for letter in shape) for name, shape in LLMC_ARRAYS.items()}


def llmc_arrays(vocab: int = V) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    arrays = {name: draw.normal(0, 0.3, shape).astype("<f4") for name, shape in llmc_shapes(vocab).items()}
    for name in ("ln1w", "ln2w", "lnfw"):
        arrays[name] += 1
    arrays["wte"][vocab:] = 0
    return arrays


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper halves of fp32 numbers, rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(x).view("<u4").astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def from_bfloat16(x: np.ndarray) -> np.ndarray:
    return (x.astype("<u4") << 16).view("<f4")


def llmc_file(path: Path, arrays: dict[str, np.ndarray], vocab: int = V, version: int = 3, n_head: int = H) -> Path:
    numbers = [20240326, version, T, vocab, L, n_head, C, len(arrays["wte"])]
    encode = to_bfloat16 if version == 5 else np.asarray
    body = b"".join(encode(arrays[name]).tobytes() for name in LLMC_ARRAYS)
    path.write_bytes(struct.pack("<256i", *numbers, *[0] * 248) + body)
    return path


def read_llmc(path: Path, vocab: int = V, layers: int = L) -> tuple[list[int], dict[str, np.ndarray]]:
    raw = path.read_bytes()
    header = list(struct.unpack("<256i", raw[:1024]))
    body = np.frombuffer(raw[1024:], "<u2" if header[1] == 5 else "<f4")
    body = from_bfloat16(body) if header[1] == 5 else body
    arrays = {}
    for name, shape in llmc_shapes(vocab, layers).items():
        arrays[name], body = body[: math.prod(shape)].reshape(shape), body[math.prod(shape) :]
    assert len(body) == 0
    return header, arrays


def llmc_logits(arrays: dict[str, np.ndarray], tokens: torch.Tensor, vocab: int = V) -> torch.Tensor:
    """GPT-2 in float64, written on the arrays; (B, T, V)."""

    def norm(x, w, b):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w + b

    a = {name: array.astype(np.float64) for name, array in arrays.items()}
    x = a["wte"][tokens.numpy()] + a["wpe"][: tokens.shape[1]]
    n, t = tokens.shape
    future = np.triu(np.full((t, t), -np.inf), 1)
    for i in range(len(a["ln1w"])):
        qkv = norm(x, a["ln1w"][i], a["ln1b"][i]) @ a["qkvw"][i].T + a["qkvb"][i]
        q, k, v = (part.reshape(n, t, H, C // H).swapaxes(1, 2) for part in np.split(qkv, 3, -1))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(C // H) + future
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + y.swapaxes(1, 2).reshape(n, t, C) @ a["attprojw"][i].T + a["attprojb"][i]
        h = norm(x, a["ln2w"][i], a["ln2b"][i]) @ a["fcw"][i].T + a["fcb"][i]
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + h @ a["fcprojw"][i].T + a["fcprojb"][i]
    return torch.tensor(norm(x, a["lnfw"], a["lnfb"]) @ a["wte"][:vocab].T)


# ---- helpers


def stock(folder: Path) -> GPT2LMHeadModel:
    model, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def assert_same_logits(converted, reference, rows: int | None = None, tokens: torch.Tensor = TOKENS):
    """``reference`` is a model, or logits; the first ``rows`` of its vocabulary count."""
    expected = (reference if isinstance(reference, torch.Tensor) else reference(tokens))[..., :rows].double()
    found = converted(tokens)
    found = (found if isinstance(found, torch.Tensor) else found.logits).double()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def gpt2_folder(path: Path, **fields) -> Path:
    """A stock folder, made by transformers, with weights large enough to tell models apart."""
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "n_positions": T, "vocab_size": V}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 0, "eos_token_id": 0, **fields}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(path)
    return path


def refused(*args, **kwargs) -> str:
    """The message, one line, of a conversion that must fail."""
    with pytest.raises(ConversionError) as error:
        convert(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- nanoGPT and build-nanogpt to gpt2


@pytest.mark.parametrize("prefix, bias", [("", True), ("module._orig_mod.", False)])
def test_nanogpt(tmp_path, prefix, bias, capsys):
    model = PlainGPT(bias=bias, mask=bool(prefix))
    convert(nanogpt_file(tmp_path / "ckpt.pt", model, prefix), tmp_path / "out")
    converted = stock(tmp_path / "out")
    assert_same_logits(converted, model)
    assert converted.config.activation_function == "gelu" and converted.config.attn_pdrop == 0.1
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    output = capsys.readouterr().out
    assert ("biases: the model has none" in output) is not bias
    assert "tokenizer: none" in output and "--tokenizer names its own" in output


def test_the_two_gelus_are_told_apart(tmp_path):
    """The tolerance of these tests would notice the wrong one."""
    exact, tanh = PlainGPT(), PlainGPT(gelu="tanh")
    with torch.no_grad():
        assert (exact(TOKENS) - tanh(TOKENS)).abs().max() > 3e-5 * exact(TOKENS).abs().max()
    old = nanogpt_file(tmp_path / "old.pt", tanh)
    convert(old, tmp_path / "asked", activation="gelu_new")
    assert_same_logits(stock(tmp_path / "asked"), tanh)
    args = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "dropout": 0.1}  # nanoGPT's, early January 2023
    convert(nanogpt_file(tmp_path / "oldest.pt", tanh, model_args=args), tmp_path / "by_date")
    assert_same_logits(stock(tmp_path / "by_date"), tanh)


def test_build_nanogpt(tmp_path, monkeypatch, capsys):
    model = PlainGPT(50304, gelu="tanh")
    path = build_nanogpt_file(tmp_path / "model.pt", model, monkeypatch)
    with pytest.raises(pickle.UnpicklingError):  # the difficulty is real
        torch.load(path, weights_only=True)
    convert(path, tmp_path / "out")
    converted = stock(tmp_path / "out")
    assert_same_logits(converted, model, 50257)
    assert converted.config.vocab_size == 50257
    assert "cut from 50,304 to 50,257 rows" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]
    assert converted.generation_config.eos_token_id == 50256
    convert(path, tmp_path / "all", vocab_size=50304)
    assert_same_logits(stock(tmp_path / "all"), model)


def test_vocabularies_that_are_not_padding_stay(tmp_path):
    model = PlainGPT(65)  # a character model, as nanoGPT's shakespeare_char
    convert(nanogpt_file(tmp_path / "ckpt.pt", model), tmp_path / "out")
    converted = stock(tmp_path / "out")
    assert_same_logits(converted, model, tokens=TOKENS % 65)
    assert converted.config.vocab_size == 65 and converted.generation_config.eos_token_id is None
    assert "66" in refused(tmp_path / "ckpt.pt", tmp_path / "more", vocab_size=66)


@pytest.mark.parametrize("to", ["nanogpt", "llmc"])
def test_rows_that_texts_use_are_not_cut(tmp_path, to):
    """GPT-2's vocabulary, padded or not, in each of the formats."""
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8}
    GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu_new")).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "file", to=to, activation="gelu" if to == "nanogpt" else None)
    for source, way in ((tmp_path / "file", {}), (tmp_path / "model", {"to": "llmc"})):
        for rows in (10, 50256):
            assert "leave it out" in refused(source, tmp_path / "out", vocab_size=rows, **way)
    convert(tmp_path / "file", tmp_path / "same", vocab_size=50257)


def test_an_adapter_is_not_taken_for_its_base_model(tmp_path):
    """In a folder of its own, and beside a model's weights."""
    peft = pytest.importorskip("peft", reason="the extra dev has it")
    config = GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=V, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True, target_modules=["c_attn"])
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path / "base", tmp_path / "both")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path / "both")
    config.save_pretrained(tmp_path / "adapter")
    for folder in ("adapter", "both"):
        assert "adapter" in refused(tmp_path / folder, tmp_path / "out.bin", to="llmc")
        with pytest.raises(ValueError, match="adapter"):
            load_folder(tmp_path / folder)


def test_weights_alone_need_the_gelu_and_assume_heads(tmp_path, capsys):
    model = PlainGPT(gelu="tanh")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert "--activation" in refused(tmp_path / "weights.pt", tmp_path / "out")
    convert(tmp_path / "weights.pt", tmp_path / "out", activation="gelu_new", n_head=H)
    assert_same_logits(stock(tmp_path / "out"), model)
    capsys.readouterr()
    convert(tmp_path / "weights.pt", tmp_path / "assumed", activation="gelu_new")
    assert "heads: 1" in capsys.readouterr().out
    assert "--n_head" in refused(tmp_path / "weights.pt", tmp_path / "no", activation="gelu_new", n_head=5)


def test_heads_that_the_file_knows_are_not_replaced(tmp_path):
    nanogpt_file(tmp_path / "ckpt.pt", PlainGPT())
    assert "4 heads" in refused(tmp_path / "ckpt.pt", tmp_path / "out", n_head=2)
    convert(tmp_path / "ckpt.pt", tmp_path / "out", n_head=4)


def test_untied_head_is_kept(tmp_path):
    model = PlainGPT()
    model.lm_head.weight = nn.Parameter(torch.randn(V, C))
    convert(nanogpt_file(tmp_path / "ckpt.pt", model), tmp_path / "out")
    assert_same_logits(stock(tmp_path / "out"), model)


def test_foreign_code_never_runs(tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model": PlainGPT().state_dict(), "config": Harm()}, tmp_path / "harm.pt")
    assert "mkdir" in refused(tmp_path / "harm.pt", tmp_path / "out")

    # A configuration whose module, when imported, does harm; and one that is made by a call.
    (tmp_path / "their_train.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for reduce, works in ((None, True), (lambda self: (type(self), (1, 2)), False)):
        theirs = types.ModuleType("their_train")
        theirs.GPTConfig = type(
            "GPTConfig", (), {"__module__": "their_train"} | ({"__reduce__": reduce} if reduce else {})
        )
        config = theirs.GPTConfig()
        vars(config).update(dataclasses.asdict(BuildConfig()))
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "their_train", theirs)
            torch.save(
                {"model": (model := PlainGPT(gelu="tanh")).state_dict(), "config": config}, tmp_path / "config.pt"
            )
        if works:
            convert(tmp_path / "config.pt", tmp_path / "out")
            assert_same_logits(stock(tmp_path / "out"), model)
        else:
            refused(tmp_path / "config.pt", tmp_path / "not_out")
    assert not (tmp_path / "harm").exists()


# ---- llm.c to gpt2


@pytest.mark.parametrize("version", [3, 5])
def test_llmc(tmp_path, version):
    arrays = llmc_arrays()
    convert(llmc_file(tmp_path / "model", arrays, version=version), tmp_path / "out")
    converted = stock(tmp_path / "out")
    if version == 5:
        arrays = {name: from_bfloat16(to_bfloat16(array)) for name, array in arrays.items()}
    assert_same_logits(converted, llmc_logits(arrays, TOKENS))
    state = converted.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state["transformer.wte.weight"], torch.tensor(arrays["wte"][:V]))
    assert torch.equal(state["transformer.h.1.attn.c_proj.weight"], torch.tensor(arrays["attprojw"][1].T))
    assert torch.equal(state["transformer.h.0.ln_2.bias"], torch.tensor(arrays["ln2b"][0]))


def test_llmc_with_gpt2s_vocabulary_has_a_tokenizer(tmp_path):
    arrays = llmc_arrays(50257)
    convert(llmc_file(tmp_path / "model.bin", arrays, 50257), tmp_path / "out", dtype="bfloat16")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 50257
    converted = stock(tmp_path / "out")
    assert converted.dtype == torch.bfloat16 and converted.config.vocab_size == 50257
    wpe = from_bfloat16(to_bfloat16(arrays["wpe"]))
    assert torch.equal(converted.transformer.wpe.weight.float(), torch.tensor(wpe))


# ---- gpt2 to the others


@pytest.mark.parametrize(("dtype", "activation"), [("float32", "gelu_new"), ("bfloat16", "gelu_pytorch_tanh")])
def test_to_llmc(tmp_path, dtype, activation):
    folder = gpt2_folder(tmp_path / "gpt2", activation_function=activation)
    convert(folder, tmp_path / "model.bin", to="llmc", dtype=dtype)
    header, arrays = read_llmc(tmp_path / "model.bin")
    assert header == [20240326, 3 if dtype == "float32" else 5, T, V, L, H, C, 256] + [0] * 248
    assert not arrays["wte"][V:].any()
    model = stock(folder)
    if dtype == "float32":
        assert_same_logits(model, llmc_logits(arrays, TOKENS))
    wte = model.transformer.wte.weight.detach().numpy()
    wte = wte if dtype == "float32" else from_bfloat16(to_bfloat16(wte))
    assert np.array_equal(arrays["wte"][:V], wte)


def test_to_nanogpt(tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2", activation_function="gelu")
    convert(folder, tmp_path / "ckpt.pt", to="nanogpt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    args = checkpoint["model_args"]
    sizes = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V}
    assert args == {**sizes, "bias": True, "dropout": 0.1}
    model = PlainGPT(seed=9)
    model.load_state_dict(checkpoint["model"])
    assert_same_logits(stock(folder), model)
    # What a resumed run does with the rest.
    decay, no_decay = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    before = model.lm_head.weight.detach().clone()
    model(TOKENS).logsumexp(-1).mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.lm_head.weight)
    assert checkpoint["iter_num"] == 0 and checkpoint["best_val_loss"] > 1e6


def test_to_build_nanogpt(tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2")
    convert(folder, tmp_path / "model.pt", to="build-nanogpt")
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    assert BuildConfig(**checkpoint["config"]) == BuildConfig()
    model = PlainGPT(gelu="tanh", seed=9)
    model.load_state_dict(checkpoint["model"])
    assert_same_logits(stock(folder), model)


def test_round_trips_keep_every_bit(tmp_path):
    config = {"n_layer": L, "n_head": H, "n_embd": C, "n_positions": T, "vocab_size": V}
    torch.manual_seed(3)
    ours = GPTForCausalLM(GPTConfig(**config, bos_token_id=0, eos_token_id=0))
    ours.save_pretrained(tmp_path / "start")
    weights = ours.state_dict()
    for number, to in enumerate(("llmc", "build-nanogpt", "nanogpt")):
        gelu = {"activation": "gelu"} if to == "nanogpt" else {}
        convert(tmp_path / "start", tmp_path / f"{number}.file", to=to, **gelu)
        convert(tmp_path / f"{number}.file", tmp_path / f"{number}")
        back = stock(tmp_path / f"{number}")
        assert back.config.activation_function == gelu.get("activation", "gelu_new") and back.config.n_head == H
        assert back.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in back.state_dict().items())
    convert(tmp_path / "0.file", tmp_path / "direct.pt", to="build-nanogpt")  # from file to file
    direct = torch.load(tmp_path / "direct.pt", weights_only=True)["model"]
    assert torch.equal(direct["transformer.h.1.mlp.c_fc.weight"], weights["transformer.h.1.mlp.c_fc.weight"].T)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in direct.values())


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"tie_word_embeddings": False}, "not tied"),
        ({"n_inner": 100}, "n_inner is 100"),
        ({"activation_function": "relu"}, "activation is relu"),
        ({"activation_function": "gelu"}, "--to nanogpt keeps it, --activation gelu_new"),
        ({"scale_attn_weights": False}, "scale_attn_"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
    ],
    ids=str,
)
def test_what_a_format_cannot_hold(tmp_path, fields, reason):
    folder = gpt2_folder(tmp_path / "gpt2", **fields)
    for to in ("llmc", "build-nanogpt"):
        assert reason in refused(folder, tmp_path / "out", to=to)
    if fields.get("activation_function") != "gelu":
        refused(folder, tmp_path / "out", to="nanogpt")
    assert os.listdir(tmp_path) == ["gpt2"]


def test_formats_are_recommended_only_if_they_take_it(tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2", activation_function="quick_gelu")
    for to, own in (("llmc", "gelu_new"), ("build-nanogpt", "gelu_new"), ("nanogpt", "gelu")):
        message = refused(folder, tmp_path / "out", to=to)
        assert "activation is quick_gelu" in message and f"--activation {own}" in message and "--to" not in message
    folder = gpt2_folder(tmp_path / "gpt2")
    assert "--to build-nanogpt keeps it, --activation gelu" in refused(folder, tmp_path / "out", to="nanogpt")


def test_a_head_of_its_own_is_not_dropped_whatever_config_json_says(tmp_path):
    folder = gpt2_folder(tmp_path / "gpt2")  # which says that it is tied
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.randn(V, C)}, folder / "model.safetensors", {"format": "pt"})
    for to in ("llmc", "build-nanogpt"):
        assert "not tied" in refused(folder, tmp_path / "out", to=to)
    equal = weights["transformer.wte.weight"].clone()
    save_file(weights | {"lm_head.weight": equal}, folder / "model.safetensors", {"format": "pt"})
    convert(folder, tmp_path / "out", to="llmc")
    assert np.array_equal(read_llmc(tmp_path / "out")[1]["wte"][:V], equal.numpy())


# ---- files that are not what they should be


def test_damaged_llmc_files(tmp_path):
    arrays = llmc_arrays()
    good = llmc_file(tmp_path / "good.bin", arrays).read_bytes()
    cases = {
        "should have": good[:-4],
        "bytes and, by its header": good + b"\0\0",
        "in its header": good[:500],
        "version 1": good[:4] + struct.pack("<i", 1) + good[8:],
        "neither": struct.pack("<i", 20240520) + good[4:],  # a shard of tokens
        "heads do not divide": good[:20] + struct.pack("<i", 5) + good[24:],
        "by its header": good[:12] + struct.pack("<i", 300) + good[16:],  # more tokens than rows
    }
    path = tmp_path / "bad.bin"
    for text, raw in cases.items():
        path.write_bytes(raw)
        message = refused(path, tmp_path / "out")
        assert text in message and str(path) in message
    path.write_bytes(b"")
    refused(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["bad.bin", "good.bin"]


def test_damaged_pt_files(tmp_path):
    model = PlainGPT()
    state = model.state_dict()
    good = nanogpt_file(tmp_path / "good.pt", model).read_bytes()
    path = tmp_path / "bad.pt"
    for raw in (good[: len(good) // 2], good[:100]):
        path.write_bytes(raw)
        assert "cut off or damaged" in refused(path, tmp_path / "out")
    lost = {name: value for name, value in state.items() if name != "transformer.h.1.mlp.c_fc.bias"}
    lost_block = {name: value for name, value in state.items() if ".h.1." not in name}
    hub_layout = state | {"transformer.h.0.attn.c_attn.weight": state["transformer.h.0.attn.c_attn.weight"].T}
    for broken, text in (
        (lost, "transformer.h.1.mlp.c_fc.bias is missing and should be (128,)"),
        (lost_block, "transformer.h.1.attn.c_attn.bias is missing"),
        (hub_layout, "is (32, 96) and should be (96, 32)"),
        (state | {"transformer.h.0.attn.q_norm.weight": torch.ones(8)}, "q_norm.weight is (8,) and should be absent"),
        (state | {"transformer.h.0.ln_1.bias": 3}, "ln_1.bias"),
        ({"layers.0.weight": torch.ones(3)}, "holds no GPT-2's weights"),
        (None, "holds no GPT-2's weights"),
    ):
        nanogpt_file(path, model, model=broken)
        message = refused(path, tmp_path / "out")
        assert text in message and str(path) in message
    for content in ([1, 2], {0: torch.zeros(1)}, {"model": {0: torch.zeros(1)}}):
        torch.save(content, path)
        assert "holds no GPT-2's weights" in refused(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["bad.pt", "good.pt"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"n_layer": "2"}, "says that its n_layer is '2'"),
        ({"n_head": -4}, "says that its n_head is -4"),
        ({"vocab_size": 2.5}, "says that its vocab_size is 2.5"),
        ({"dropout": "0.1"}, "settings that no GPT-2 has: .*pdrop"),
        ({"dropout": 3.0}, "settings that no GPT-2 has: .*pdrop is 3.0"),
        ({"dropout": None}, None),
    ],
    ids=str,
)
def test_settings_of_a_wrong_kind(tmp_path, changes, text):
    args = {"n_layer": L, "n_head": H, "n_embd": C, "block_size": T, "vocab_size": V, "bias": True, "dropout": 0.0}
    path = nanogpt_file(tmp_path / "ckpt.pt", PlainGPT(), model_args=args | changes)
    if text is None:
        convert(path, tmp_path / "out")
        assert stock(tmp_path / "out").config.attn_pdrop == 0
    else:
        message = refused(path, tmp_path / "out")
        assert re.search(text, message) and str(path) in message


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    model = PlainGPT()
    state = model.state_dict()
    name = "transformer.h.1.mlp.c_fc.bias"
    for bad, text in (
        (state[name].clone().fill_(torch.nan), f"NaN or infinite values in {name}"),
        (state[name].double() + 1e39, f"NaN or infinite values in {name}"),  # too large for fp32
        (state[name].to(torch.int8), f"{name} in torch.int8"),
        (state[name].to(torch.complex64), f"{name} in torch.complex64"),
    ):
        nanogpt_file(tmp_path / "ckpt.pt", model, model=state | {name: bad})
        for to in ("gpt2", "nanogpt"):
            assert text in refused(tmp_path / "ckpt.pt", tmp_path / "out", to=to)
    arrays = llmc_arrays()
    arrays["lnfw"][3] = np.inf
    assert "transformer.ln_f.weight" in refused(llmc_file(tmp_path / "model.bin", arrays), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "model.bin"]


def test_nothing_foreign_is_replaced(tmp_path):
    source = nanogpt_file(tmp_path / "ckpt.pt", PlainGPT())
    out, app, archive = tmp_path / "out", tmp_path / "app", tmp_path / "archive.zip"
    convert(source, tmp_path / "converted")
    for name in (
        "README.md",
        "training.py",
        "pytorch_model.bin",
        "lora/weights.safetensors",
        "merges.txt/mine",  # a folder under a known name
    ):
        shutil.copytree(tmp_path / "converted", out)
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("my work")
        assert name.split("/")[0] in refused(source, out, overwrite=True)
        assert (out / name).read_text() == "my work" and (out / "model.safetensors").is_file()
        shutil.rmtree(out)
    app.mkdir()
    for config in ("{", "[1]", "{}", '{"model_type": "bert"}', '{"port": 80}'):
        (app / "config.json").write_text(config)
        (app / "manifest.json").write_text('{"config.json": {"bytes": 1}}')
        assert "is no gpt2 folder" in refused(source, app, overwrite=True)
    (app / "config.json").unlink()
    os.mkfifo(app / "config.json")
    assert "is no gpt2 folder" in refused(source, app, overwrite=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("word/document.xml", "my thesis")
    (tmp_path / "notes.txt").write_text("my work")
    for name in ("archive.zip", "notes.txt"):
        before = (tmp_path / name).read_bytes()
        assert "neither a .pt nor an llm.c file" in refused(source, tmp_path / name, to="nanogpt", overwrite=True)
        assert (tmp_path / name).read_bytes() == before
    convert(source, tmp_path / "model.bin", to="nanogpt")  # whatever its name
    convert(gpt2_folder(tmp_path / "gpt2"), tmp_path / "model.bin", to="llmc", overwrite=True)
    convert(tmp_path / "model.bin", tmp_path / "gpt2", overwrite=True)  # made by another tool, and plain
    read_llmc(tmp_path / "model.bin")


def test_source_and_output_do_not_lie_in_each_other(tmp_path, monkeypatch):
    folder = gpt2_folder(tmp_path / "gpt2")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    inside = nanogpt_file(tmp_path / "ckpt.pt", model := PlainGPT()).rename(folder / "ckpt.pt")
    for source, output, to in (
        (folder, folder / "model.safetensors", "llmc"),
        (folder, folder / "new.bin", "llmc"),
        (folder, folder, "llmc"),
        (inside, folder, "gpt2"),
        (inside, folder / ".." / "gpt2", "gpt2"),
        (inside, inside, "nanogpt"),
    ):
        assert "lie in each other" in refused(source, output, to=to, overwrite=True)
    inside.rename(tmp_path / "ckpt.pt")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "the folder you are in" in refused(tmp_path / "ckpt.pt", ".")
    convert("../ckpt.pt", "new")
    assert_same_logits(stock(tmp_path / "here" / "new"), model)


def test_links_to_outputs_stay_links(tmp_path):
    source = nanogpt_file(tmp_path / "ckpt.pt", PlainGPT())
    convert(source, tmp_path / "disk" / "out")
    convert(source, tmp_path / "disk" / "model.pt", to="nanogpt")
    source = nanogpt_file(tmp_path / "ckpt.pt", model := PlainGPT(seed=7))
    for name, to in (("out", "gpt2"), ("model.pt", "nanogpt")):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        convert(source, tmp_path / name, to=to, overwrite=True)
        assert (tmp_path / name).is_symlink()
    assert_same_logits(stock(tmp_path / "disk" / "out"), model)
    head = torch.load(tmp_path / "disk" / "model.pt", weights_only=True)["model"]["lm_head.weight"]
    assert torch.equal(head, model.lm_head.weight)


def test_outputs_are_replaced_only_when_asked(tmp_path):
    source = nanogpt_file(tmp_path / "ckpt.pt", PlainGPT())
    out, file, other = tmp_path / "out", tmp_path / "model.pt", tmp_path / "other"
    convert(source, out)
    convert(source, file, to="nanogpt")
    source = nanogpt_file(tmp_path / "ckpt.pt", model := PlainGPT(seed=7))
    before = (out / "model.safetensors").read_bytes(), file.read_bytes()
    assert "--overwrite" in refused(source, out)
    assert "--overwrite" in refused(source, file, to="nanogpt")
    assert ((out / "model.safetensors").read_bytes(), file.read_bytes()) == before
    convert(source, out, overwrite=True)
    convert(source, file, to="nanogpt", overwrite=True)
    assert_same_logits(stock(out), model)
    assert file.read_bytes() != before[1]

    other.mkdir()
    (other / "thesis.txt").write_text("do not delete")
    for to, target in (("gpt2", other), ("gpt2", file), ("llmc", out), ("nanogpt", source)):
        refused(source, target, to=to, overwrite=True)
    assert (other / "thesis.txt").exists() and source.stat().st_size > 0
    (other / "thesis.txt").unlink()
    convert(source, other)  # an empty folder is no obstacle
    assert_same_logits(stock(other), model)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    folder = gpt2_folder(tmp_path / "gpt2")
    convert(folder, tmp_path / "whole.bin", to="llmc")
    before = (tmp_path / "whole.bin").read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    for source, output, to in (("gpt2", "whole.bin", "llmc"), ("whole.bin", "out", "gpt2")):
        message = refused(tmp_path / source, tmp_path / output, to=to, overwrite=True)
        assert f"{tmp_path / output} cannot be written" in message and "No space left" in message
    assert sorted(os.listdir(tmp_path)) == ["gpt2", "whole.bin"]
    assert (tmp_path / "whole.bin").read_bytes() == before


@pytest.mark.parametrize("to", ["gpt2", "llmc", "nanogpt"])
def test_a_full_disk_is_one_line(tmp_path, to):
    """A limit on the size of files stands for the disk; safetensors and torch.save have errors of their own for it."""
    source = nanogpt_file(tmp_path / "ckpt.pt", PlainGPT())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        message = refused(source, tmp_path / "out", to=to, activation="gelu_new" if to != "nanogpt" else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"{tmp_path / 'out'} cannot be written, is there room on the disk?" in message
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_a_run_is_converted_by_its_name(tmp_path, capsys):
    for name in ("checkpoints/step-00000020", "final"):
        write_folder(tmp_path / "run" / name, gpt2_folder)
    convert(tmp_path / "run", tmp_path / "model.bin", to="llmc")
    assert f"taking {tmp_path / 'run' / 'final'}" in capsys.readouterr().out
    assert_same_logits(stock(tmp_path / "run" / "final"), llmc_logits(read_llmc(tmp_path / "model.bin")[1], TOKENS))


def test_sources_that_are_not_there(tmp_path):
    message = refused(tmp_path / "nothing.pt", tmp_path / "out")
    assert message.startswith(f"no such file: {tmp_path / 'nothing.pt'}") and "--to" in message
    assert "no gpt2 folder" in refused(tmp_path / "nothing", tmp_path / "out", to="llmc")
    assert "no gpt2 folder" in refused(tmp_path, tmp_path / "out", to="llmc")
    assert "--to" in refused(gpt2_folder(tmp_path / "gpt2"), tmp_path / "out")


def test_the_script(tmp_path, capsys, monkeypatch):
    path = Path(__file__).parents[2] / "scripts" / "convert.py"
    spec = importlib.util.spec_from_file_location("convert_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, args)])
        script.main()
        return capsys.readouterr().out

    source = nanogpt_file(tmp_path / "ckpt.pt", model := PlainGPT())
    out = run(source, tmp_path / "out")
    n_parameters = sum(p.numel() for p in model.parameters())
    for text in ("nanoGPT, step 500", "2 layers, 32 wide, 4 heads, 24 positions, 211 tokens", f"{n_parameters:,} para"):
        assert text in out
    # The line that it prints works, with nothing of ours in sight.
    assert type(eval(out.strip().splitlines()[-1], {"transformers": transformers})) is GPT2LMHeadModel
    with pytest.raises(SystemExit) as stop:
        run(source, tmp_path / "out")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "written as nanogpt" in run(source, tmp_path / "again.pt", "--to", "nanogpt", "--overwrite")
