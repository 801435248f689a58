"""What only a CUDA device can show. Run where there is one: pytest -m gpu."""

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from test_document_mask import BACKENDS, E, split
from test_train import ROOT, compile_once, losses, tiny
from test_train import clean_state as clean_state
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import is_flash_attn_2_available

from gpt2_hf import hardware
from gpt2_hf.data.documents import DocumentMask
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import read_rows
from gpt2_hf.training import build
from gpt2_hf.training import loop as training
from gpt2_hf.training.loop import train, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OBSTACLE = hardware.compile_obstacle(torch.device("cuda"))
needs_compiler = pytest.mark.skipif(OBSTACLE is not None, reason=f"torch.compile: {OBSTACLE}")
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


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_training_attention_uses_a_fused_kernel(kernel):
    """Without a mask PyTorch's fused kernels take the job; with one materialised flash would refuse."""
    model = GPTForCausalLM(GPTConfig(n_layer=1, attn_implementation="sdpa", **NO_DROPOUT)).cuda()
    tokens = torch.randint(50257, (2, 257), device="cuda")
    with sdpa_kernel(kernel), torch.autocast("cuda", torch.bfloat16):
        model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()


def test_training_never_holds_the_logits():
    model = GPTForCausalLM(GPTConfig(n_layer=1, **NO_DROPOUT)).cuda()
    tokens = torch.randint(50257, (32, 1025), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    assert torch.cuda.max_memory_allocated() < 32 * 1024 * 50257 * 4  # fp32 logits alone


@pytest.fixture
def steps_never_wait(monkeypatch):
    """From a run's third step on, whatever makes the host wait for the GPU raises."""

    def step(accelerator, model, optimizers, batch, number, *rest):
        torch.cuda.set_sync_debug_mode("error" if number % 20 > 1 else "default")  # runs start at 0 or 20
        try:
            return train_step(accelerator, model, optimizers, batch, number, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(training, "train_step", step)


@pytest.mark.parametrize(
    ("precision", "compile", "optimizer"),
    [
        pytest.param("bf16", "on", "muon", marks=needs_compiler),
        ("fp16", "off", "muon"),
        ("fp32", "off", "adamw"),
    ],
)
def test_loop_learns_and_resumes(make_shards, tmp_path, steps_never_wait, precision, compile, optimizer):
    pattern = [[(start + 3 * i) % 250 for i in range(120)] for start in range(60)]
    data = make_shards({"train": [pattern], "val": [pattern[:4]]})

    def run(name: str, steps: int) -> list[dict]:
        changes = {"train__precision": precision, "train__compile": compile, "model__vocab_size": None}
        schedule = {"optim__name": optimizer, "optim__lr": 1e-2, "optim__muon_lr": 0.04, "optim__min_lr_ratio": 1.0}
        schedule |= {"optim__cautious_decay": True, "optim__ema": 0.5}
        train(tiny(data, tmp_path / name, train__steps=steps, eval__val_every=10, **changes, **schedule))
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        return read_rows(tmp_path / name / "metrics.jsonl")

    straight = run("straight", 40)
    assert straight[-1]["val_loss"] < math.log(50257) / 2
    run("parts", 20)
    assert losses(run("parts", 40)) == pytest.approx(losses(straight), rel=5e-2)


@needs_compiler
def test_checkpointed_dropout_is_a_function_of_the_step(make_shards, tmp_path):
    """A resumed run draws what the straight one drew. In fp32 little else than other dropout moves a loss by 1e-3."""
    pattern = [[(start + 3 * i) % 250 for i in range(120)] for start in range(60)]
    data = make_shards({"train": [pattern], "val": [pattern[:4]]})

    def run(name: str, steps: int) -> list[float]:
        changes = {"train__gradient_checkpointing": True, "train__precision": "fp32", "train__tf32": False}
        changes["model__vocab_size"] = None
        schedule = {"model__dropout": 0.3, "optim__lr": 1e-3, "optim__min_lr_ratio": 1.0, "train__compile": "on"}
        train(tiny(data, tmp_path / name, train__steps=steps, **changes, **schedule))
        AcceleratorState._reset_state(reset_partial_state=True)
        torch._dynamo.reset()
        return losses(read_rows(tmp_path / name / "metrics.jsonl"))

    straight = run("straight", 20)
    run("parts", 10)
    assert run("parts", 20) == pytest.approx(straight, rel=1e-4)


@needs_compiler
def test_batches_are_there_when_they_are_read(make_shards, tmp_path):
    """Pinned batches go to the card while it computes: were one read too early, waiting for each kernel would tell."""
    pattern = [[(start + 3 * i) % 250 for i in range(120)] for start in range(60)]
    data = make_shards({"train": [pattern], "val": [pattern[:4]]})
    found = []
    for name, blocking in (("free", "0"), ("blocking", "1"), ("again", "0")):
        changes = {"train__precision": "bf16", "train__compile": "on", "train__deterministic": True}
        changes |= {"model__vocab_size": None, "optim__lr": 1e-2, "train__global_batch_tokens": 16 * 32}
        config = tiny(data, tmp_path / name, train__steps=20, train__log_every=1, **changes)
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(config.to_yaml())
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "pretrain.py"), "--config", str(recipe)],
            env=os.environ | {"CUDA_LAUNCH_BLOCKING": blocking},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(losses(read_rows(tmp_path / name / "metrics.jsonl")))
    assert found[0] == found[1] == found[2] and len(found[0]) == 20


@needs_compiler
def test_each_mode_compiles_once(make_shards, tmp_path, monkeypatch):
    compile_once(make_shards, tmp_path / "run", monkeypatch, train__precision="bf16", model__dropout=0.1)


def test_what_auto_chooses_runs():
    name, why = hardware.choose_attention("auto", torch.device("cuda", 0), "bf16", 0.0)
    model = GPTForCausalLM(GPTConfig(n_layer=1, attn_implementation=name, **NO_DROPOUT)).cuda()
    tokens = torch.from_numpy(np.arange(258).reshape(2, 129)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    loss.backward()
    assert loss.isfinite(), (name, why)
    assert torch.cuda.get_device_capability()[0] < 8 or "math" not in why


@pytest.fixture(params=[name for name in BACKENDS if name != "eager"])  # eager has no kernel of its own
def packed(request):
    """(model, backend, dtype of autocast or None, tokens): windows of 300 tokens, neither a multiple of a block."""
    if request.param == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("needs flash-attn")
    if request.param == "flex_attention" and OBSTACLE:
        pytest.skip(OBSTACLE)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 300, "vocab_size": E + 1}
    model = GPTForCausalLM(GPTConfig(**sizes, **NO_DROPOUT, bos_token_id=E, eos_token_id=E)).cuda()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.1)
    model.set_attn_implementation(request.param)
    tokens = torch.randint(1, E, (3, 300))
    tokens[0, [0, 40, 41, 42, 130, 170, 299]] = E
    tokens[1, 200] = E  # the third row is one document
    yield model, request.param, torch.bfloat16 if request.param.startswith("flash") else None, tokens
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compile", "eot_first"), [(False, False), (False, True), pytest.param(True, True, marks=needs_compiler)]
)
def test_documents_are_apart_on_every_backend(packed, eot_first, compile):
    """Logits of each document alone, and by gradients: exactly nothing reaches another document."""
    model, attention, dtype, tokens = packed
    mask = DocumentMask(E, eot_first, attention, dtype or torch.float32)
    parts = [split(row, eot_first) for row in tokens.tolist()]
    on_device = tokens.cuda()
    tolerance = 2e-2 if dtype else 5e-3  # of the largest; FlexAttention's kernels multiply fp32 as TF32, to 1.5e-3

    def autocast():
        return torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None)

    model.eval().set_attn_implementation("sdpa")
    with torch.no_grad(), autocast():
        alone = [
            model(on_device[row : row + 1, p.start : p.stop], use_cache=False).logits[0]
            for row in range(3)
            for p in parts[row]
        ]
    model.set_attn_implementation(attention)
    if compile:
        for block in model.transformer.h:
            block.compile(dynamic=False)
    apart = mask(on_device, tokens)
    with torch.no_grad(), autocast():
        logits = model(on_device, use_cache=False, **apart).logits
    expected = torch.cat(alone).view_as(logits)
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()

    model.train()
    embeddings = model.transformer.wte(on_device).detach()
    for row, part in [(0, parts[0][0]), (0, parts[0][2]), (0, parts[0][-1]), (1, parts[1][0]), (2, parts[2][0])]:
        inside = torch.zeros(tokens.shape, dtype=torch.bool, device="cuda")
        inside[row, part.start : part.stop] = True
        x = embeddings.clone().requires_grad_()
        with autocast():
            model(inputs_embeds=x, shift_labels=on_device.where(inside, -100), **apart).loss.backward()
        reach = x.grad.abs().sum(-1)
        assert (reach[inside] > 0).all() and (reach[~inside] == 0).all()


@needs_compiler
def test_document_masks_neither_recompile_nor_wait(packed):
    model, attention, dtype, tokens = packed
    mask = DocumentMask(E, False, attention, dtype or torch.float32)
    for block in model.train().transformer.h:
        block.compile(dynamic=False)
    for number, places in enumerate(([5, 250], [], list(range(0, 300, 50)))):
        tokens[tokens == E] = 1
        tokens[:, places] = E
        on_device = tokens.cuda()
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            torch.cuda.set_sync_debug_mode("error")
            try:
                apart = mask(on_device, tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                model(on_device, shift_labels=on_device, **apart).loss.backward()


@needs_compiler
def test_loop_learns_with_documents_apart(make_shards, tmp_path, steps_never_wait):
    data = make_shards(
        {"train": [[[(start + 3 * i) % 250 for i in range(12)] for start in range(400)]], "val": [[[1, 4] * 9] * 30]}
    )
    config = tiny(
        data,
        tmp_path / "run",
        data__seq_len=256,
        data__document_mask=True,
        model__n_positions=256,
        model__n_embd=128,  # heads of 64, as in every GPT-2
        model__vocab_size=None,
        train__precision="bf16",
        train__compile="on",
        train__steps=20,
        # The gradient of an embedding of more than 3072 tokens has a way of its own.
        train__micro_batch_size=16,
        train__global_batch_tokens=2 * 16 * 256,
        eval__val_every=10,
        optim__lr=1e-2,
    )
    train(config)
    found = losses(read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert found[-1] < found[0] / 2


def test_shares_of_a_model_train_and_are_saved_as_a_whole_one_is(make_shards, tmp_path, monkeypatch):
    """One process that has all shares: what NCCL, the mixed precision of shares and pinned copies do."""
    pattern = [[(start + 3 * i) % 250 for i in range(120)] for start in range(60)]
    data = make_shards({"train": [pattern], "val": [pattern[:4]]})
    settings = {"model__vocab_size": None, "train__precision": "bf16", "train__compile": "on", "eval__val_every": 3}
    settings |= {"optim__name": "muon", "optim__lr": 5e-3, "checkpoint__save_every": 3, "train__steps": 12}
    settings |= {"optim__cautious_decay": True, "optim__ema": 0.5}
    rows = {}
    for name in ("whole", "shares"):
        if name == "shares":
            launcher = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29577}
            for variable, value in launcher.items():
                monkeypatch.setenv(variable, str(value))
            monkeypatch.setattr(build, "sharding_mesh", lambda _: init_device_mesh("cuda", (1,)))
        config = tiny(data, tmp_path / name, **settings)
        for steps in (6, 12):  # the second goes on from the first
            train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps)))
            AcceleratorState._reset_state(reset_partial_state=True)
            torch._dynamo.reset()
        rows[name] = read_rows(tmp_path / name / "metrics.jsonl")
    whole, shares = losses(rows["whole"]), losses(rows["shares"])
    assert whole == pytest.approx(shares, rel=2e-2) and whole[-1] < whole[0] - 1
