"""Any GPT-2 of the Hub comes in: each relative of the family, each form of file; and what is not one is refused."""

import json
import logging
import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gpt2_hf.model import GPTConfig, GPTForCausalLM

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": 97}
END = {"bos_token_id": 0, "eos_token_id": 0}
TOKENS = torch.arange(40).view(2, 20) % 97


def stock_model(cls=GPT2LMHeadModel, **fields):
    """Stock GPT-2 with random weights, large enough that attention and activations are not near-linear."""
    torch.manual_seed(0)
    model = cls(GPT2Config(**{**SMALL, **END, **fields})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.2)
    return model


@pytest.fixture
def logged():
    """What transformers logs at warning level and above."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def assert_same(loaded, stock):
    with torch.no_grad():
        a, b = loaded.eval()(TOKENS).logits, stock(TOKENS).logits
    assert a.dtype == b.dtype
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


FAMILY = {
    "distilgpt2": {"n_layer": 6},
    "medium's heads": {"n_head": 16, "n_embd": 64},
    "large's heads": {"n_head": 20, "n_embd": 80},
    "xl's heads": {"n_head": 25, "n_embd": 100},  # neither is a power of two
    "xl's depth": {"n_layer": 48, "n_embd": 8},
    "inner": {"n_inner": 50},
    "vocabulary and context": {"vocab_size": 131, "n_positions": 77},
    "untied": {"tie_word_embeddings": False},
    "unscaled": {"scale_attn_weights": False},
    "scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "all of Mistral's": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "epsilon": {"layer_norm_epsilon": 1e-2},
    **{name: {"activation_function": name} for name in ("gelu", "relu", "gelu_fast", "quick_gelu", "silu", "tanh")},
}


@pytest.mark.parametrize("fields", FAMILY.values(), ids=FAMILY)
def test_the_family(fields, tmp_path, logged):
    stock = stock_model(**fields)
    stock.save_pretrained(tmp_path / "in")
    loaded = GPTForCausalLM.from_pretrained(tmp_path / "in")
    # And out again: what we save, stock loads.
    loaded.save_pretrained(tmp_path / "out")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    for attn_implementation in ("eager", "sdpa"):
        for model in (stock, loaded, back):
            model.set_attn_implementation(attn_implementation)
        assert_same(loaded, stock)
        assert_same(back, stock)
    assert logged == []


def write_bin(folder, weights, shards: int = 1):
    """The files that GPT-2s of 2019 to 2022 have, written by hand."""
    names = sorted(weights)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    parts = {f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin": names[i::shards] for i in range(shards)}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_safetensors(folder, weights):
    save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


WRITERS = {
    "safetensors": write_safetensors,
    "bin": write_bin,
    "sharded bin": lambda folder, weights: write_bin(folder, weights, shards=3),
}


# Files without the prefix come from the model without its head.
@pytest.mark.parametrize(("prefix", "head"), [("transformer.", True), ("transformer.", False), ("", False)])
@pytest.mark.parametrize("buffers", [True, False], ids=["mask buffers", "no buffers"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_old_files_load_without_a_warning(prefix, buffers, head, write, tmp_path, logged):
    stock = stock_model()
    config = stock.config.to_dict() | {"n_ctx": 24, "task_specific_params": {"text-generation": {"max_length": 50}}}
    del config["dtype"], config["tie_word_embeddings"], config["pad_token_id"]  # unknown in their time
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {prefix + k.removeprefix("transformer."): v for k, v in stock.transformer.state_dict().items()}
    if head:
        weights["lm_head.weight"] = stock.lm_head.weight.detach()
    if buffers:
        for layer in range(SMALL["n_layer"]):
            weights[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write(tmp_path, weights)
    loaded = GPTForCausalLM.from_pretrained(tmp_path)
    assert logged == []
    assert_same(loaded, stock)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_gamma_and_beta_are_layer_norms_names_too(write, tmp_path, logged):
    """As TensorFlow calls them; saved again, they have GPT-2's names."""
    stock = stock_model()
    stock.config.save_pretrained(tmp_path)
    weights = {
        name.replace(".weight", ".gamma").replace(".bias", ".beta") if ".ln_" in name else name: p
        for name, p in stock.state_dict().items()
        if name != "lm_head.weight"
    }
    assert "transformer.h.1.ln_2.gamma" in weights and "transformer.ln_f.beta" in weights
    write(tmp_path, weights)
    loaded = GPTForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, stock)
    loaded.save_pretrained(tmp_path / "out")
    assert_same(GPT2LMHeadModel.from_pretrained(tmp_path / "out"), stock)
    assert logged == []


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("head", "ignore"), [(True, False), (True, True), (False, False)])
def test_a_padded_vocabulary_is_named(write, head, ignore, tmp_path):
    """Rows beyond config.json's, as nanoGPT's trainers leave them; with the head beside the embedding or without."""
    stock = stock_model()
    stock.config.save_pretrained(tmp_path)
    weights = stock.state_dict()
    padded = torch.cat([weights["transformer.wte.weight"], torch.zeros(31, 32)])
    weights |= {"transformer.wte.weight": padded, "lm_head.weight": padded.clone()}
    if not head:
        del weights["lm_head.weight"]
    write(tmp_path, weights)
    words = r"weight is \(128, 32\) in the file and \(97, 32\) by config.json: vocab_size=128 loads"
    with pytest.raises(ValueError, match=words) as caught:
        GPTForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)
    assert len(str(caught.value).splitlines()) == 1
    whole = GPTForCausalLM.from_pretrained(tmp_path, vocab_size=128)
    whole.resize_token_embeddings(97)
    assert_same(whole, stock)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_implementation": "kernels-community/flash-attn"}, "kernels"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ|optimum"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "aqlm|AQLM"),
    ],
    ids=str,
)
def test_what_is_not_installed_is_named_in_one_line(changes, words, tmp_path):
    stock_model().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ImportError, match=f"cannot load {tmp_path}: .*({words})") as caught:
        GPTForCausalLM.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_an_adapter_beside_weights_is_refused(tmp_path):
    """transformers would load the adapter's base model and say nothing."""
    stock_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2", "peft_type": "LORA"}))
    with pytest.raises(ValueError, match=r"beside model\.safetensors lies adapter_config\.json"):
        GPTForCausalLM.from_pretrained(tmp_path)


def test_sharded_and_bf16_files(tmp_path, logged):
    stock = stock_model().bfloat16()
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    narrow = GPTForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}  # the file's precision, as stock does
    assert all(torch.equal(p, stock.get_parameter(name)) for name, p in narrow.named_parameters())
    wide = GPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(wide, stock.float())
    assert logged == []


def test_classifiers_body_loads_and_the_first_layers_of_a_deeper_model(tmp_path):
    stock = stock_model(GPT2ForSequenceClassification, n_layer=3)
    stock.save_pretrained(tmp_path)
    loaded = GPTForCausalLM.from_pretrained(tmp_path, n_layer=2)
    assert loaded.num_parameters() == GPTForCausalLM(GPTConfig(**SMALL)).num_parameters()
    for name, p in loaded.transformer.named_parameters():
        assert torch.equal(p, stock.transformer.get_parameter(name)), name


def test_position_and_type_embeddings_are_stocks():
    stock = stock_model()
    ours = GPTForCausalLM(GPTConfig(**SMALL, **END)).eval()
    ours.load_state_dict(stock.state_dict())
    types = TOKENS.flip(1)
    with torch.no_grad():
        # In stock's order of arguments: input_ids, past_key_values, attention_mask, token_type_ids, position_ids.
        a = ours(TOKENS, None, torch.ones_like(TOKENS), types, torch.arange(2, 22)[None]).logits
        b = stock(TOKENS, None, torch.ones_like(TOKENS), types, torch.arange(2, 22)[None]).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert not torch.allclose(a, ours(TOKENS).logits, atol=1e-2)
    with pytest.raises(ValueError, match="25 tokens for a model of 24 positions"):
        ours(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="use stock GPT2LMHeadModel"):
        ours(TOKENS, encoder_hidden_states=torch.zeros(2, 3, 32))


# What a user may hand us that is not a whole GPT-2 -> what the one line must say.


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def to_bin(folder, content=None):
    (folder / "model.safetensors").unlink()
    torch.save(content or stock_model().state_dict(), folder / "pytorch_model.bin")


def write_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


class Code:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


def pickled_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Code()}, folder / "pytorch_model.bin")


def other_model(folder):
    LlamaForCausalLM(
        LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    ).save_pretrained(folder)


def missing_shard(folder):
    (folder / "model.safetensors").unlink()
    stock_model().save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


DAMAGE = {
    "cut off": (lambda f: cut(f / "model.safetensors"), OSError, "cannot load .*/model: .* damaged"),
    "empty": (lambda f: cut(f / "model.safetensors", 0), OSError, "cannot load .*/model: .* damaged"),
    "not weights": (
        lambda f: (f / "model.safetensors").write_bytes(b"<html>" * 99),
        OSError,
        "cannot load .*/model: .* damaged",
    ),
    "cut off .bin": (lambda f: (to_bin(f), cut(f / "pytorch_model.bin")), OSError, "cannot load .*/model: .* damaged"),
    "html .bin": (
        lambda f: (to_bin(f), (f / "pytorch_model.bin").write_text("<html>" * 99)),
        OSError,
        "cannot load .*/model: .* damaged",
    ),
    "code in .bin": (pickled_code, OSError, "cannot load .*/model: .*could run code"),
    "missing shard": (missing_shard, OSError, "model-00002-of-"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), OSError, "no file named model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), ValueError, "/model is not a GPT-2: it has no config.json"),
    "cut off config": (lambda f: cut(f / "config.json"), OSError, "not a valid JSON"),
    "another model": (other_model, ValueError, "/model is not a GPT-2: its config.json says model_type 'llama'"),
    "deeper config": (lambda f: change_config(f, n_layer=3), ValueError, r"lacks 12 of .*transformer\.h\.2\."),
    "other vocabulary": (
        lambda f: change_config(f, vocab_size=98),
        ValueError,
        r"wte.weight is \(97, 32\) in the file and \(98, 32\) by config.json",
    ),
    "cross-attention": (lambda f: change_config(f, add_cross_attention=True), ValueError, "decoder without an encoder"),
    "no heads": (lambda f: change_config(f, n_head=0), ValueError, "n_head is 0, and must be 1 or more"),
    "negative heads": (lambda f: change_config(f, n_head=-1), ValueError, "n_head is -1, and must be"),
    "no positions": (lambda f: change_config(f, n_positions=0), ValueError, "n_positions is 0, and must be"),
    "no vocabulary": (lambda f: change_config(f, vocab_size=-1), ValueError, "vocab_size is -1, and must be"),
    "no inner": (lambda f: change_config(f, n_inner=0), ValueError, "n_inner is 0, and must be"),
    "dropout": (lambda f: change_config(f, attn_pdrop=2.0), ValueError, "attn_pdrop is 2.0, and must be"),
    "heads in words": (lambda f: change_config(f, n_head="2"), ValueError, "'n_head'.* expected int, got str"),
    "layers left out": (lambda f: change_config(f, n_layer=None), ValueError, "'n_layer'.* expected int, got NoneType"),
    "epsilon in words": (
        lambda f: change_config(f, layer_norm_epsilon="1"),
        ValueError,
        "'layer_norm_epsilon'.*got str",
    ),
    "unknown dtype": (lambda f: change_config(f, dtype="float3"), OSError, "cannot load .*/model: .*float3"),
    "a list for a config": (lambda f: (f / "config.json").write_text("[1]"), OSError, "cannot load .*/model: .*list"),
    "a list for generation": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        OSError,
        "cannot load .*/model: .*list",
    ),
    **{
        f"index {text}": (lambda f, text=text: write_index(f, text), OSError, f"cannot load .*/model: .*{words}")
        for text, words in {
            "{": "JSONDecodeError",
            "{}": "weight_map",
            "[]": "TypeError",
            '{"metadata": {}, "weight_map": {}}': "IndexError",
        }.items()
    },
    "a list in .bin": (lambda f: to_bin(f, [1, 2]), OSError, "cannot load .*/model: .*TypeError"),
    "numbers for names in .bin": (
        lambda f: to_bin(f, {0: torch.zeros(1)}),
        OSError,
        "cannot load .*/model: .*'int' object",
    ),
    "unknown activation": (
        lambda f: change_config(f, activation_function="geloo"),
        ValueError,
        "'geloo' is not one of",
    ),
}


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_not_a_whole_gpt2_is_refused_in_one_line(damage, error, words, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    stock_model().save_pretrained(folder)
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words) as caught:
        GPTForCausalLM.from_pretrained(folder)
    assert len(str(caught.value).strip().splitlines()) == 1
    assert not (tmp_path / "it_ran").exists()


def test_overrides_are_checked_like_the_file(tmp_path):
    stock_model().save_pretrained(tmp_path)
    for fields, words in (
        ({"n_head": 0}, "n_head is 0"),
        ({"n_head": "2"}, "expected int"),
        ({"n_head": 3}, "multiple"),
    ):
        for load in (GPTForCausalLM.from_pretrained, GPTConfig.from_pretrained):
            with pytest.raises(ValueError, match=words):
                load(tmp_path, **fields)
        with pytest.raises(ValueError, match=words):
            GPTConfig(**{**SMALL, **fields})
    config, rest = GPTConfig.from_pretrained(tmp_path, n_layer=1, return_unused_kwargs=True, other=3)
    assert config.n_layer == 1 and rest == {"other": 3}
