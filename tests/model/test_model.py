"""The model against stock transformers, in the same process and in a process without our package."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_hf.model import GPTConfig, GPTForCausalLM

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
    tokens = torch.randint(50257, (1, 129))
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


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate_equals_stock(attn_implementation, settings):
    ours, stock = pair(attn_implementation)
    prompt = torch.randint(1, 211, (2, 7))
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0  # left padding
    keywords = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, **settings}
    assert torch.equal(ours.generate(prompt, **keywords), stock.generate(prompt, **keywords))


def test_gradient_checkpointing_changes_nothing():
    grads = []
    for checkpointing in (False, True):
        ours, _ = pair()
        ours.train()
        if checkpointing:
            getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
        tokens = torch.arange(66).view(2, 33)
        ours(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
        grads.append([p.grad for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


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
