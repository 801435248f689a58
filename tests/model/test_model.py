"""The model against stock transformers, in the same process and in a process without our package."""

import copy
import inspect
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from gpt2_hf.model import GPTConfig, GPTForCausalLM, GPTModel

SMALL = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 48, "vocab_size": 211}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def pair(attn_implementation: str = "sdpa", **fields) -> tuple[GPTForCausalLM, GPT2LMHeadModel]:
    """Ours and stock with the same random weights; large ones, so that attention is not uniform."""
    fields = {**SMALL, **NO_DROPOUT, "bos_token_id": 0, "eos_token_id": 0, **fields}
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**fields, attn_implementation=attn_implementation))
    with torch.no_grad():
        for name, p in stock.named_parameters():
            p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.1)
    ours = GPTForCausalLM(GPTConfig(**fields, attn_implementation=attn_implementation))
    ours.load_state_dict(stock.state_dict())
    return ours.eval(), stock.eval()


def assert_equal_logits(ours, stock, *args, **kwargs):
    with torch.no_grad():
        a, b = ours(*args, **kwargs).logits, stock(*args, **kwargs).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_inner": 100},
        {"activation_function": "relu"},
        {"activation_function": "gelu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
def test_logits_loss_and_gradients_equal_stock(fields, attn_implementation):
    ours, stock = pair(attn_implementation, **fields)
    tokens = torch.randint(211, (3, 33))
    assert_equal_logits(ours, stock, tokens)
    ours.train(), stock.train()
    ours_loss = ours(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    stock_loss = stock(tokens, labels=tokens).loss
    assert ours_loss.item() == pytest.approx(stock_loss.item(), rel=1e-6)
    assert ours(tokens, labels=tokens).loss.item() == pytest.approx(stock_loss.item(), rel=1e-6)
    ours_loss.backward(), stock_loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-9, name


def test_full_124m_equals_stock():
    fields = {**NO_DROPOUT}
    torch.manual_seed(0)
    ours = GPTForCausalLM(GPTConfig(**fields)).eval()
    stock = GPT2LMHeadModel(GPT2Config(**fields)).eval()
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in stock.state_dict().items()}
    stock.load_state_dict(ours.state_dict())
    assert ours.num_parameters() == 124_439_808
    tokens = torch.randint(50257, (1, 33))
    assert_equal_logits(ours, stock, tokens)
    ours.train()(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    stock.train()(tokens, labels=tokens).loss.backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm(), name


def test_micro_batches_add_up_to_the_mean():
    ours, _ = pair()
    tokens = torch.randint(211, (4, 33))
    whole = ours(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    parts = [ours(t[:, :-1], shift_labels=t[:, 1:], num_items_in_batch=4 * 32).loss for t in tokens.split(1)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)


def test_initialisation_table():
    """Radford et al. 2019 and OpenAI's code: every tensor's mean and standard deviation."""
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(n_layer=8, n_head=4, n_embd=256, n_positions=256))
    residual = 0.02 / math.sqrt(2 * 8)
    table = {
        "wte.weight": (0, 0.02),
        "wpe.weight": (0, 0.01),
        "attn.c_attn.weight": (0, 0.02),
        "attn.c_proj.weight": (0, residual),
        "mlp.c_fc.weight": (0, 0.02),
        "mlp.c_proj.weight": (0, residual),
        "ln_1.weight": (1, 0),
        "ln_2.weight": (1, 0),
        "ln_f.weight": (1, 0),
        "bias": (0, 0),
    }
    for name, p in model.named_parameters():
        mean, std = next(row for key, row in table.items() if name.endswith(key))
        assert abs(p.mean().item() - mean) <= 0.02 * std, name
        assert p.std().item() == pytest.approx(std, rel=0.02), name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_saved_folder_is_stock_in_a_process_without_our_package(tmp_path):
    ours, _ = pair()
    folder = tmp_path / "model"
    ours.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["model_type"] == "gpt2"
    assert not {"auto_map", "_tolerant"} & config.keys()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.save(ours(tokens).logits, tmp_path / "logits.pt")
    program = f"""
import sys
class Hide:
    def find_spec(self, name, *rest):
        if name.split('.')[0] == 'gpt2_hf': raise ImportError(name)
sys.meta_path.insert(0, Hide())
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained({str(folder)!r}, output_loading_info=True)
assert type(model).__name__ == 'GPT2LMHeadModel' and not any(info.values()), info
expected = torch.load({str(tmp_path / "logits.pt")!r})
assert torch.allclose(model(torch.arange(20)[None]).logits, expected, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_stock_config_object_is_taken_and_saved_as_ours(tmp_path):
    model = GPTForCausalLM(GPT2Config(**SMALL))
    assert isinstance(model.config, GPTConfig)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]


def test_presets_are_the_published_sizes():
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, size in sizes.items():
        with torch.device("meta"):
            assert GPTForCausalLM(GPTConfig.preset(name)).num_parameters() == size


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"n_layers": 3}, TypeError, "did you mean 'n_layer'"),
        ({"dropout": 0.1}, TypeError, "no field 'dropout'"),
        ({"n_head": 7}, ValueError, "multiple of n_head"),
        ({"activation_function": "geloo"}, ValueError, "'geloo' is not one of .*gelu_new"),
        ({"add_cross_attention": True}, ValueError, "not supported"),
    ],
)
def test_impossible_configurations_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        GPTConfig(**fields)
    with pytest.raises(error, match=words):
        GPTConfig.preset("gpt2", **fields)


# Configuration, and the rest of PreTrainedModel


def tokens() -> torch.Tensor:
    return torch.randint(1, 211, (3, 20), generator=torch.Generator().manual_seed(0))


def test_configuration_round_trips(tmp_path):
    config = GPTConfig(**SMALL, attn_pdrop=0.3, tie_word_embeddings=False, pad_token_id=5, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    config.to_json_file(tmp_path / "plain.json")
    again = {
        "from_pretrained": GPTConfig.from_pretrained(tmp_path),
        "from_json_file": GPTConfig.from_json_file(tmp_path / "plain.json"),
        "from_dict": GPTConfig.from_dict(config.to_dict()),
        "keywords": GPTConfig(**config.to_dict()),
        "file's keywords": GPTConfig(**json.loads((tmp_path / "config.json").read_text())),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
    }
    for way, other in again.items():
        assert type(other) is GPTConfig and other.to_diff_dict() == config.to_diff_dict(), way
        assert (other.attn_pdrop, other.eos_token_id, other.hidden_size) == (0.3, [1, 2], 64), way
    stock = GPT2Config.from_pretrained(tmp_path)
    assert stock.attn_pdrop == 0.3 and stock.num_hidden_layers == 3 and not stock.tie_word_embeddings
    assert GPTConfig.from_pretrained(tmp_path, n_layer=7).num_hidden_layers == 7
    config.hidden_size = 32
    assert config.n_embd == 32
    # Saved a second time it is the same file.
    first = json.loads((tmp_path / "config.json").read_text())
    again["from_pretrained"].save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == first


def test_fields_of_every_configuration_are_taken_and_shown():
    stock = GPT2Config(**SMALL)
    for name, value in {
        "output_attentions": True,
        "output_hidden_states": True,
        "num_labels": 5,
        "id2label": {0: "a", 1: "b", 2: "c"},
        "name_or_path": "x",
        "problem_type": "regression",
        "return_dict": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }.items():
        ours, expected = GPTConfig(**SMALL, **{name: value}), GPT2Config(**SMALL, **{name: value})
        assert getattr(ours, name) == getattr(expected, name), name
        assert GPTConfig(**ours.to_dict()).to_dict() == ours.to_dict(), name
    assert GPTConfig(**stock.to_dict()).to_dict().keys() - {"n_ctx"} == stock.to_dict().keys()
    for misspelt, meant in (("num_label", "num_labels"), ("output_attention", "output_attentions")):
        with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
            GPTConfig(**{misspelt: 1})
    shown = inspect.signature(GPTConfig.__init__).parameters
    assert shown["n_layer"].default == 12 and shown.keys() == inspect.signature(GPT2Config.__init__).parameters.keys()


def test_n_ctx_is_written_and_n_positions_decides(tmp_path):
    GPTConfig(**SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == SMALL["n_positions"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_ctx": 5}))
    assert GPTConfig.from_pretrained(tmp_path).to_dict()["n_ctx"] == SMALL["n_positions"]  # as stock reads it
    assert GPTConfig.from_pretrained(tmp_path, n_positions=7).to_dict()["n_ctx"] == 7
    with pytest.raises(ValueError, match="n_ctx is 5 and n_positions 48"):
        GPTConfig(**SMALL, n_ctx=5)


def test_stock_aliases_name_the_same_fields():
    a, b = (
        GPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64),
        GPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    )
    assert a.to_dict() == b.to_dict()


def test_generation_settings_come_from_the_configuration_as_in_stock():
    ours, stock = pair(pad_token_id=9, eos_token_id=[4, 5])
    assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
    assert ours.generation_config.eos_token_id == [4, 5] and ours.generation_config.pad_token_id == 9
    assert ours.can_generate()


def test_small_habits_of_pretrained_models(tmp_path):
    ours, stock = pair()
    for only in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**only) == stock.num_parameters(**only)
    assert ours.get_memory_footprint() == stock.get_memory_footprint()
    assert ours.main_input_name == stock.main_input_name == "input_ids"
    assert ours.dtype == stock.dtype and ours.device == stock.device
    assert ours.get_parameter_or_buffer("transformer.wte.weight") is ours.transformer.wte.weight
    assert ours.loss_function is stock.loss_function
    assert ours.model_tags is None
    ours.add_model_tags(["gpt2", "mine"])
    ours.add_model_tags("mine")
    assert ours.model_tags == ["gpt2", "mine"]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert ours.state_dict().keys() == stock.state_dict().keys()
    # Every tensor of the model is a parameter or a buffer; none hangs loose on a module.
    known = {id(t) for t in [*ours.parameters(), *ours.buffers()]}
    loose = [v for m in ours.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert all(id(t) in known for t in loose)


def test_auto_classes_take_ours_by_our_configuration():
    """Stock configurations keep on making stock models."""
    for auto, ours, stock in (
        (AutoModelForCausalLM, GPTForCausalLM, GPT2LMHeadModel),
        (AutoModel, GPTModel, GPT2Model),
    ):
        assert type(auto.from_config(GPTConfig(**SMALL))) is ours
        assert type(auto.from_config(GPT2Config(**SMALL))) is stock


def test_input_gradients_can_be_required_and_released():
    ours, _ = pair()
    for p in ours.parameters():
        p.requires_grad_(False)
    ours.enable_input_require_grads()
    assert ours(tokens()).logits.requires_grad
    ours.disable_input_require_grads()
    assert not ours(tokens()).logits.requires_grad
