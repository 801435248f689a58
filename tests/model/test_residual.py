"""The residual stream in bf16: what it changes, by how much, and what it leaves as it is."""

import itertools

import pytest
import torch
from accelerate.state import AcceleratorState
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_hf.hardware import has_narrow_residual
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.training.loop import train

SIZES = {"n_layer": 6, "n_head": 2, "n_embd": 64, "n_positions": 64, "vocab_size": 301}
SIZES |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def models():
    """Ours with a narrow stream, and stock GPT-2 with the same weights, of the size that training gives them."""
    torch.manual_seed(0)
    ours = GPTForCausalLM(GPTConfig(**SIZES, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.2)
    ours.transformer.drop.narrow = True
    stock = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_error_is_within_twice_that_of_stock_under_autocast():
    """Stock's stream is fp32 under autocast, so this is what halving it costs: little, as its products round anyway."""
    ours, stock = models()
    tokens = torch.randint(301, (4, 65))
    stock.double()
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    exact = stock(inputs, labels=labels, shift_labels=labels).loss
    exact_grads = gradients(stock, exact)
    stock.float()
    with torch.autocast("cpu", torch.bfloat16):
        stock_loss = stock(inputs, labels=labels, shift_labels=labels).loss
        our_loss = ours(inputs, shift_labels=labels).loss
    stock_grads, our_grads = gradients(stock, stock_loss), gradients(ours, our_loss)
    assert abs(our_loss - exact) <= 2 * abs(stock_loss - exact) + 1e-3
    for name, grad in exact_grads.items():
        budget = (stock_grads[name] - grad).norm()
        assert (our_grads[name] - grad).norm() <= 2 * budget + 1e-3 * grad.norm(), name


def test_all_of_the_stream_is_narrow_and_only_under_autocast():
    ours, _ = models()
    tokens = torch.randint(301, (2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = ours(tokens, output_hidden_states=True)
    assert {h.dtype for h in narrow.hidden_states} == {torch.bfloat16}
    wide = ours(tokens, output_hidden_states=True)
    assert {h.dtype for h in wide.hidden_states} == {torch.float32}
    ours.transformer.drop.narrow = False
    assert torch.equal(ours(tokens).logits, wide.logits)
    with torch.autocast("cpu", torch.bfloat16):
        stream = ours(tokens, output_hidden_states=True).hidden_states
    assert {h.dtype for h in stream} == {torch.float32}


def test_auto_is_narrow_on_cuda_in_bf16_alone():
    every = itertools.product(("auto", "bf16", "fp32"), ("cpu", "cuda"), ("bf16", "fp16", "fp32"))
    narrow = [asked for asked in every if has_narrow_residual(*asked)]
    assert narrow == [("auto", "cuda", "bf16"), ("bf16", "cpu", "bf16"), ("bf16", "cuda", "bf16")]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_learns_with_it_and_resumes_bit_for_bit(data, tmp_path, checkpointing):
    settings = {"train__precision": "bf16", "train__gradient_checkpointing": checkpointing, "optim__lr": 3e-3}
    settings |= {"optim__min_lr_ratio": 1.0}  # so that fewer steps are the first of more

    def found(name, steps, residual):
        rows = run(tiny(data, tmp_path / name, train__steps=steps, train__residual=residual, **settings))
        AcceleratorState._reset_state(reset_partial_state=True)
        return losses(rows)

    straight, wide = found("narrow", 24, "bf16"), found("wide", 24, "fp32")
    assert straight != wide and straight == pytest.approx(wide, rel=1e-2)
    found("parts", 12, "bf16")
    assert found("parts", 24, "bf16") == straight


def test_it_needs_products_in_bf16(data, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.residual bf16 needs train\.precision bf16, and that is fp32"):
        train(tiny(data, tmp_path / "run", train__precision="fp32", train__residual="bf16"))
