"""What only a CUDA device can show. Run where there is one: pytest -m gpu."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_train import losses, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_hf import hardware
from gpt2_hf.metrics import read_rows
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def test_bf16_error_is_within_twice_that_of_stock():
    torch.manual_seed(0)
    ours = GPTForCausalLM(GPTConfig(n_layer=4, **NO_DROPOUT)).cuda()
    stock = GPT2LMHeadModel(GPT2Config(n_layer=4, **NO_DROPOUT)).cuda()
    stock.load_state_dict(ours.state_dict())
    tokens = torch.randint(50257, (4, 513), device="cuda")
    truth = stock(tokens, labels=tokens)
    truth.loss.backward()
    grads = {name: p.grad.clone() for name, p in stock.named_parameters()}
    stock.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        stock_loss = stock(tokens, labels=tokens).loss
        ours_loss = ours(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    stock_loss.backward(), ours_loss.backward()
    assert abs(ours_loss - truth.loss) <= 2 * abs(stock_loss - truth.loss) + 1e-3
    for (name, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        error, budget = (a.grad - grads[name]).norm(), (b.grad - grads[name]).norm()
        assert error <= 2 * budget + 1e-3 * grads[name].norm(), name


def test_training_attention_uses_a_fused_kernel():
    """Without a mask PyTorch's flash kernel takes the job; with one materialised it would refuse."""
    model = GPTForCausalLM(GPTConfig(n_layer=1, attn_implementation="sdpa", **NO_DROPOUT)).cuda()
    tokens = torch.randint(50257, (2, 257), device="cuda")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()


def test_training_never_holds_the_logits():
    model = GPTForCausalLM(GPTConfig(n_layer=1, **NO_DROPOUT)).cuda()
    tokens = torch.randint(50257, (32, 1025), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    assert torch.cuda.max_memory_allocated() < 32 * 1024 * 50257 * 4  # fp32 logits alone


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_loop_learns_and_resumes(make_shards, tmp_path, precision, compile):
    pattern = [[(start + 3 * i) % 250 for i in range(120)] for start in range(60)]
    data = make_shards({"train": [pattern], "val": [pattern[:4]]})
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["vocab_size"] == 50257

    def run(name: str, steps: int) -> list[dict]:
        changes = {"train__precision": precision, "train__compile": compile, "model__vocab_size": None}
        schedule = {"optim__name": "muon", "optim__lr": 1e-2, "optim__muon_lr": 1e-2, "optim__min_lr_ratio": 1.0}
        train(tiny(data, tmp_path / name, train__steps=steps, eval__val_every=10, **changes, **schedule))
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        return read_rows(tmp_path / name / "metrics.jsonl")

    straight = run("straight", 40)
    assert straight[-1]["val_loss"] < math.log(50257) / 2
    run("parts", 20)
    assert losses(run("parts", 40)) == pytest.approx(losses(straight), rel=5e-2)


def test_what_auto_chooses_runs():
    name, why = hardware.choose_attention("auto", torch.device("cuda", 0), "bf16", 0.0)
    model = GPTForCausalLM(GPTConfig(n_layer=1, attn_implementation=name, **NO_DROPOUT)).cuda()
    tokens = torch.from_numpy(np.arange(258).reshape(2, 129)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    loss.backward()
    assert loss.isfinite(), (name, why)
