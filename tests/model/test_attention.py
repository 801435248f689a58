"""The backend for compiled training on a CPU against attention written out: outputs, gradients, use in a model."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.model.attention import blockwise_attention, eager_attention

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 300, "vocab_size": 97}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Module(torch.nn.Module):
    upcast, is_causal = False, True


@pytest.mark.parametrize("n_positions", [1, 128, 300])  # below, at and above a block; the last of 300 is shorter
def test_outputs_and_gradients_in_float64(n_positions):
    torch.manual_seed(0)
    qkv = torch.randn(3, 2, 3, n_positions, 16, dtype=torch.float64, requires_grad=True)
    future = torch.full((n_positions, n_positions), float("-inf")).triu(1).double()
    # Traced as under torch.compile, without building kernels.
    compiled = torch.compile(blockwise_attention, backend="eager", fullgraph=True, dynamic=False)
    got, _ = compiled(Module(), *qkv, None, 0.25)
    expected, _ = eager_attention(Module(), *qkv, future, 0.25)
    # Inside, the softmax is in fp32.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * weight).sum(), qkv)[0] for y in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def model(attention: str) -> GPTForCausalLM:
    torch.manual_seed(0)
    config = GPTConfig(**SMALL, **NO_DROPOUT, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
    return GPTForCausalLM(config)


def test_no_token_sees_the_future():
    ours = model("blockwise")
    for block in ours.transformer.h:
        block.compile(backend="eager", dynamic=False)
    x = torch.randn(1, 300, 32, requires_grad=True)
    out = ours.transformer(inputs_embeds=x, use_cache=False).last_hidden_state
    for place in (0, 127, 128, 255, 256, 299):  # edges of blocks
        reach = torch.autograd.grad(out[0, place, 0], x, retain_graph=True)[0][0].abs().sum(-1)
        assert (reach[: place + 1] > 0).all() and (reach[place + 1 :] == 0).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_it_is_stock(compiled):
    """Plain, padded, and generating with a cache, of which the last two it leaves to PyTorch's attention."""
    ours = model("blockwise").eval()
    stock = GPT2LMHeadModel(GPT2Config(**SMALL, **NO_DROPOUT, bos_token_id=0, eos_token_id=0)).eval()
    stock.load_state_dict(ours.state_dict())
    counter = CompileCounter()
    if compiled:
        for block in ours.transformer.h:
            block.compile(backend=counter, dynamic=False)
    tokens = torch.randint(1, 97, (2, 150))
    padding = torch.ones_like(tokens)
    padding[0, :20] = 0
    with torch.no_grad():
        for mask in (None, padding):
            got, expected = (m(tokens, attention_mask=mask, use_cache=False).logits for m in (ours, stock))
            real = slice(20, None)
            torch.testing.assert_close(got[:, real], expected[:, real], rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 9).long()}
    with torch.compiler.set_stance("force_eager"):
        assert ours.generate(tokens[:, :9], **settings).equal(stock.generate(tokens[:, :9], **settings))
    assert counter.frame_count == 2 * compiled  # one for each kind of mask


def test_a_saved_model_does_not_ask_for_it(tmp_path):
    model("blockwise").save_pretrained(tmp_path)
    assert "blockwise" not in (tmp_path / "config.json").read_text()


def test_bf16_training_is_within_twice_stocks_error():
    """Loss and every gradient in bf16, blocks traced as when compiled, against stock in fp32."""
    ours = model("blockwise")
    stock = GPT2LMHeadModel(GPT2Config(**SMALL, **NO_DROPOUT, bos_token_id=0, eos_token_id=0))
    stock.load_state_dict(ours.state_dict())
    tokens = torch.randint(97, (4, 301))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()

    def gradients(model, **kwargs):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kwargs.pop("bf16")):
            loss = model(inputs, shift_labels=labels, **kwargs).loss
        loss.backward()
        return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}

    truth, stocks = (gradients(stock, labels=labels, bf16=bf16) for bf16 in (False, True))
    for block in ours.transformer.h:
        block.compile(backend="eager", dynamic=False)
    for name, value in gradients(ours, bf16=True).items():
        error, budget = ((found - truth[name]).norm() / truth[name].norm() for found in (value, stocks[name]))
        assert error <= 2 * budget + (1e-4 if name == "loss" else 0), (name, error, budget)
