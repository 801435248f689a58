"""Documents that share a window: apart with data.document_mask, exactly as before without it."""

import dataclasses
import itertools
import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.utils as hf
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch.nn.attention.flex_attention import create_block_mask
from transformers import GPT2LMHeadModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpt2_hf import hardware
from gpt2_hf.config import DataSection, EvalSection, ModelSection, RunConfig
from gpt2_hf.data import documents
from gpt2_hf.data.documents import DocumentMask, block_mask, cumulative_lengths, dense_mask, document_positions
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.evaluation.evaluate import evaluate_folder
from gpt2_hf.evaluation.validation import validation_loss
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import read_rows
from gpt2_hf.training import start
from gpt2_hf.training.distributed import Host
from gpt2_hf.training.loop import train
from gpt2_hf.training.measures import build_document_mask

VOCAB = 61
E = 60  # <|endoftext|>
BACKENDS = ["eager", "sdpa", "flex_attention", "flash_attention_2"]
# Windows by their shape: . is any other token.
WINDOWS = (
    "................",  # a document longer than the window
    "E...............",
    "...............E",
    "E..............E",
    "EEE....EE......E",
    "EEEEEEEEEEEEEEEE",
    ".E.E.E..E...E.EE",
    "....E...........",
)


def windows() -> torch.Tensor:
    """(B, T): WINDOWS with random tokens for the dots."""
    ordinary = torch.randint(1, E, (len(WINDOWS), 16), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.tensor([[c == "E" for c in row] for row in WINDOWS]), E, ordinary)


def split(row: list[int], eot_first: bool) -> list[range]:
    """The places of each document in a row, from the definition."""
    starts = [t for t in range(len(row)) if t == 0 or (row[t] == E if eot_first else row[t - 1] == E)]
    return [range(a, b) for a, b in pairwise([*starts, len(row)])]


def varlen_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """What FlashAttention's function for packed rows computes, one document after the other."""
    assert attention_mask is None
    bounds = kwargs["cu_seq_lens_q"].tolist()
    assert bounds == kwargs["cu_seq_lens_k"].tolist() and kwargs["cu_seq_lens_q"].dtype == torch.int32
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, H, D)
    assert bounds[0] == 0 and bounds[-1] == len(q)
    assert all(0 <= b - a <= min(kwargs["max_length_q"], kwargs["max_length_k"]) for a, b in pairwise(bounds))
    parts = []
    for a, b in pairwise(bounds):
        if b > a:
            q1, k1, v1 = (x[a:b].transpose(0, 1) for x in (q, k, v))
            y = torch.nn.functional.scaled_dot_product_attention(q1, k1, v1, is_causal=True, scale=scaling)
            parts.append(y.transpose(0, 1))
    return torch.cat(parts).unflatten(0, (len(query), -1)), None


@pytest.fixture
def make_model(monkeypatch):
    """A function that makes a float64 model on a backend, with weights so large that attention is not uniform."""

    def make(attention: str, **fields) -> GPTForCausalLM:
        torch.manual_seed(0)
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": VOCAB}
        fields = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **fields}
        model = GPTForCausalLM(GPTConfig(**sizes, **fields, bos_token_id=E, eos_token_id=E)).double()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if "ln" in name and name.endswith("weight") else 0.0, 0.3)
        if attention == "flash_attention_2":
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, attention, varlen_attention)
            model.config._attn_implementation_internal = attention
        else:
            model.set_attn_implementation(attention)
        return model

    return make


# From tokens to positions and masks


@pytest.mark.parametrize("eot_first", [False, True])
def test_positions_and_masks_follow_from_the_definition(eot_first):
    tokens = torch.cat([windows(), torch.randint(E - 3, VOCAB, (50, 16))])
    positions = document_positions(tokens, E, eot_first)
    seen = dense_mask(positions, torch.float32)[:, 0]
    bounds = cumulative_lengths(positions, int((positions == 0).sum())).tolist()
    starts = []
    for row, text in enumerate(tokens.tolist()):
        parts = split(text, eot_first)
        assert positions[row].tolist() == [place - part.start for part in parts for place in part]
        expected = [[any(q in part and k in part for part in parts) and k <= q for k in range(16)] for q in range(16)]
        assert seen[row].tolist() == [[0.0 if x else -math.inf for x in line] for line in expected]
        starts += [16 * row + part.start for part in parts]
    assert bounds[: len(starts)] == starts and set(bounds[len(starts) :]) == {tokens.numel()}


@pytest.mark.parametrize("length", [48, 128, 256, 300, 1024])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.02, 0.5])
def test_flex_blocks_equal_those_that_pytorch_finds(length, share):
    tokens = torch.where(torch.rand(3, length, generator=torch.Generator().manual_seed(1)) < share, E, 1)
    positions = document_positions(tokens, E, False)
    ours = block_mask(positions)
    dense = dense_mask(positions, torch.float32)[:, 0] == 0
    theirs = create_block_mask(lambda b, h, q, k: dense[b, q, k], 3, None, length, length, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        for prefix in ("", "q"):  # the backward pass has its own: queries by keys
            name = name.replace("kv", "q") if prefix else name
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("attention", BACKENDS)
def test_nothing_waits_for_the_device(attention):
    """Meta tensors have no values to wait for: reading one is an error."""
    keywords = DocumentMask(E, False, attention)(windows().to("meta"), windows())
    assert keywords["position_ids"].shape == (8, 16) and keywords["position_ids"].is_meta


def test_batches_have_one_shape():
    mask = DocumentMask(E, False, "flash_attention_2")
    tokens = torch.randint(1, E, (64, 256))
    shapes = set()
    for n_documents in (0, 30, 90, 150, 190):
        tokens[tokens == E] = 1
        tokens.view(-1)[torch.randperm(tokens.numel())[:n_documents]] = E
        shapes.add(mask(tokens)["cu_seq_lens_q"].shape)
    assert shapes == {(257,)}
    tokens[:] = E  # the most there can be
    assert mask(tokens)["cu_seq_lens_q"].tolist() == list(range(64 * 256 + 1))


# The model


@pytest.mark.parametrize("eot_first", [False, True])
@pytest.mark.parametrize("attention", BACKENDS)
def test_logits_equal_those_of_each_document_alone(make_model, attention, eot_first):
    model, alone = make_model(attention).eval(), make_model("sdpa").eval()
    tokens = windows()
    # flex_attention would be compiled, which takes seconds, and does not work on every CPU.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        packed = model(tokens, use_cache=False, **DocumentMask(E, eot_first, attention, torch.float64)(tokens)).logits
        for row, text in enumerate(tokens.tolist()):
            for part in split(text, eot_first):
                logits = alone(tokens[row : row + 1, part.start : part.stop], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, part.start : part.stop], logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eot_first", [False, True])
@pytest.mark.parametrize(
    ("attention", "how"),
    [
        *itertools.product(["eager", "sdpa", "flash_attention_2"], ["plain", "bf16", "checkpointing"]),
        # Not flash: what stands for its kernel here loops over the data. The kernel itself is compiled in test_gpu.py.
        *itertools.product(["eager", "sdpa"], ["compiled"]),
    ],
)
def test_no_gradient_reaches_another_document(make_model, attention, how, eot_first):
    model = make_model(attention).train()
    dtype = torch.float64
    if how == "bf16":
        model, dtype = model.float(), torch.bfloat16
    if how == "checkpointing":
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if how == "compiled":
        for block in model.transformer.h:
            block.compile(dynamic=False, backend="aot_eager")
    tokens = windows()
    labels = torch.randint(VOCAB, tokens.shape)
    apart = DocumentMask(E, eot_first, attention, dtype)(tokens)
    embeddings = model.transformer.wte(tokens).detach()
    for n in range(max(len(split(text, eot_first)) for text in tokens.tolist())):
        inside = torch.zeros(tokens.shape, dtype=torch.bool)
        for row, text in enumerate(tokens.tolist()):
            if n < len(parts := split(text, eot_first)):
                inside[row, parts[n].start : parts[n].stop] = True
        if how != "plain" and n not in (0, 1, 4):
            continue
        x = embeddings.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
            model(inputs_embeds=x, shift_labels=labels.where(inside, -100), **apart).loss.backward()
        reach = x.grad.abs().sum(-1)
        assert (reach[inside] > 0).all() and (reach[~inside] == 0).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_blocks_are_compiled_once(make_model, attention):
    """Whatever the documents: none, many, all of one token."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model(attention).train()
    for block in model.transformer.h:
        block.compile(dynamic=False, backend="aot_eager")
    mask = DocumentMask(E, False, attention, torch.float64)
    for number, rows in enumerate(windows().split(2)):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            model(rows, shift_labels=rows, **mask(rows)).loss.backward()
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_lengths_are_believed_of_flash_attention_only(make_model, monkeypatch):
    """It needs no mask beside them. Another backend would not read them: there the positions still count."""
    tokens = windows()
    lengths = DocumentMask(E, False, "flash_attention_2")(tokens)
    with torch.no_grad():
        expected = make_model("sdpa").train()(tokens, position_ids=lengths["position_ids"]).logits
        assert torch.equal(make_model("sdpa").train()(tokens, **lengths).logits, expected)

        def refuse(*args, **kwargs):
            raise AssertionError("a mask was made")

        monkeypatch.setattr("gpt2_hf.model.modeling_gpt.create_causal_mask", refuse)
        torch.testing.assert_close(make_model("flash_attention_2").train()(tokens, **lengths).logits, expected)


# The loop


@pytest.fixture(autouse=True)
def clean_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def data(make_shards):
    """Short documents, some of one token or none, over the small vocabulary."""
    rng = np.random.Generator(np.random.Philox(3))
    texts = [[rng.integers(0, E, n).tolist() for n in rng.integers(0, 40, 60)] for _ in range(2)]
    path = make_shards({"train": [texts[0]], "val": [texts[1]]})
    for file in path.glob("*/*.ds"):
        tokens = np.fromfile(file, "<u2")
        tokens[tokens == 50256] = E
        tokens.tofile(file)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": VOCAB, "eot": E}))
    return path


def recipe(data: Path, run_dir: Path, document_mask: bool = True, dropout: float = 0.0, **train) -> RunConfig:
    base = RunConfig()
    settings = {
        "run_dir": str(run_dir),
        "steps": 4,
        "global_batch_tokens": 8 * 32,
        "micro_batch_size": 4,
        "precision": "fp64",
        "compile": "off",
        "log_every": 1,
    }
    return RunConfig(
        model=ModelSection(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=VOCAB, dropout=dropout),
        data=DataSection(path=str(data), seq_len=32, document_mask=document_mask),
        optim=dataclasses.replace(base.optim, lr=1e-2, warmup_steps=2),
        train=dataclasses.replace(base.train, **{**settings, **train}),
        eval=EvalSection(val_every=2, val_tokens=320, hellaswag_every=0, sample_every=0),
        checkpoint=dataclasses.replace(base.checkpoint, save_every=0),
    )


def run(config: RunConfig) -> list[dict]:
    train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    return read_rows(Path(config.train.run_dir) / "metrics.jsonl")


def figures(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows if name in row]


def loss_by_document(model: GPT2LMHeadModel, batch: np.ndarray) -> float:
    """Mean loss of windows (n, T + 1), every document on its own and every position with its label."""
    total = 0.0
    for window in batch.astype(np.int64):
        for part in split(window[:-1].tolist(), eot_first=False):
            tokens = torch.from_numpy(window[part.start : part.stop + 1])
            with torch.no_grad():
                logprobs = model(tokens[None, :-1]).logits[0].log_softmax(-1)
            total -= logprobs.gather(1, tokens[1:, None]).sum().item()
    return total / batch[:, 1:].size


def test_losses_are_those_of_stock_transformers_document_by_document(data, tmp_path):
    config = recipe(data, tmp_path / "on")
    rows = run(config)
    torch.manual_seed(config.train.seed)
    GPTForCausalLM(config.model.gpt_config()).save_pretrained(tmp_path / "start")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "start").double()
    val = TokenStream(open_split(data, "val"), 32, seed=0, shuffle=False).batch(0, 10)
    first = TokenStream(open_split(data, "train"), 32, config.train.seed).batch(0, 8)
    assert rows[0]["val_loss"] == pytest.approx(loss_by_document(stock, val), rel=1e-9)
    assert rows[1]["train_loss"] == pytest.approx(loss_by_document(stock, first), rel=1e-9)
    trained = GPT2LMHeadModel.from_pretrained(tmp_path / "on" / "final").double()
    assert rows[-1]["val_loss"] == pytest.approx(loss_by_document(trained, val), rel=1e-9)
    without = run(recipe(data, tmp_path / "off", document_mask=False, steps=1))
    assert abs(rows[0]["val_loss"] - without[0]["val_loss"]) > 1e-6


def test_curve_does_not_depend_on_micro_batch_and_accumulation(data, tmp_path):
    whole, pieces = (run(recipe(data, tmp_path / str(size), micro_batch_size=size)) for size in (8, 2))
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert figures(pieces, name) == pytest.approx(figures(whole, name), rel=1e-9)


def test_dropout_overfitting_and_finished_runs(data, tmp_path, capsys):
    changes = {"dropout": 0.1, "overfit_batch": True, "steps": 15}
    first, second = (run(recipe(data, tmp_path / name, **changes)) for name in ("a", "b"))
    assert figures(first, "train_loss") == figures(second, "train_loss")
    assert figures(first, "train_loss")[-1] < 0.9 * figures(first, "train_loss")[0]
    assert run(recipe(data, tmp_path / "a", **changes)) == first
    assert "is finished" in capsys.readouterr().out


def test_without_it_nothing_changes(data, tmp_path, monkeypatch):
    """No mask is made, by us or by transformers, and the model is given what it was always given."""

    def refuse(*args, **kwargs):
        raise AssertionError("a mask was made")

    given = []
    forward = GPTForCausalLM.forward
    for name in ("document_positions", "dense_mask", "block_mask"):
        monkeypatch.setattr(documents, name, refuse)
    monkeypatch.setattr("gpt2_hf.model.modeling_gpt.create_causal_mask", refuse)
    monkeypatch.setattr(
        GPTForCausalLM,
        "forward",
        lambda self, *args, **kwargs: given.append(set(kwargs)) or forward(self, *args, **kwargs),
    )
    run(recipe(data, tmp_path / "off", document_mask=False, check_kernels=False))  # which makes one to compare with
    train, val = {"shift_labels", "num_items_in_batch"}, {"input_ids", "shift_labels", "use_cache", "reduction"}
    assert set(map(frozenset, given)) == {frozenset(train), frozenset(val)}
    with pytest.raises(AssertionError, match="a mask was made"):
        run(recipe(data, tmp_path / "on", check_kernels=False))


def test_shards_whose_documents_begin_with_the_token():
    config = RunConfig(data=DataSection(document_mask=True))
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
    made = build_document_mask(config, SimpleNamespace(eot=7, eot_first=True), model, torch.bfloat16)
    assert made == DocumentMask(7, True, "sdpa", torch.bfloat16)
    assert build_document_mask(RunConfig(), SimpleNamespace(eot=7, eot_first=True), model, torch.bfloat16) is None


@pytest.mark.parametrize("saved", [{}, {"data.document_mask": False}, {"data.document_mask": True}])
def test_a_run_cannot_change_it_on_the_way(data, tmp_path, monkeypatch, saved):
    """A checkpoint that does not name it was made without."""
    monkeypatch.setattr(start.runs, "newest_whole", lambda *_: tmp_path / "checkpoints" / "step-00000003")
    monkeypatch.setattr(start.checkpoint, "read_state", lambda folder: {"step": 3, **saved})
    before = saved.get("data.document_mask", False)
    for now in (False, True):
        arguments = recipe(data, tmp_path, document_mask=now), open_split(data, "train"), Host(PartialState(cpu=True))
        if now == before:
            assert start.find_start(*arguments) == start.Start(tmp_path / "checkpoints" / "step-00000003", 3)
        else:
            with pytest.raises(ConfigError, match=rf"another data.document_mask \({before}, now {now}\)"):
                start.find_start(*arguments)


def test_validation_pads_its_last_batch(data):
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=VOCAB)).double()
    stream = TokenStream(open_split(data, "val"), 32, seed=0, shuffle=False)
    mask = DocumentMask(E, False, "sdpa", torch.float64)
    found = [
        validation_loss(model, stream, n_windows=7, batch_size=size, device="cpu", documents=mask) for size in (7, 3)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_a_folder_is_evaluated_as_it_was_trained(make_shards, tmp_path):
    data = make_shards({"val": [[[5, 6, 7] * n for n in range(1, 9)]]})
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=32, initializer_range=0.5))
    model.save_pretrained(tmp_path / "model")
    stream = TokenStream(open_split(data, "val"), 32, seed=0, shuffle=False)
    scored = []
    for mask in (None, DocumentMask(50256, False, "sdpa")):
        expected = validation_loss(model, stream, n_windows=3, batch_size=3, device="cpu", documents=mask)
        found = evaluate_folder(
            tmp_path / "model", data, n_windows=3, hellaswag_items=0, device="cpu", document_mask=mask is not None
        )
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        scored.append(found["val_loss"])
    assert abs(scored[0] - scored[1]) > 1e-3


# What is chosen and what is refused


def test_backends_that_cannot_are_refused():
    data = DataSection(document_mask=True)
    for name in ("auto", *BACKENDS):
        RunConfig(model=ModelSection(attn_implementation=name), data=data)
    RunConfig(model=ModelSection(attn_implementation="paged|sdpa"))
    with pytest.raises(ConfigError, match=r"does not work with .* paged\|sdpa; .* eager, sdpa, flex_attention, flash"):
        RunConfig(model=ModelSection(attn_implementation="paged|sdpa"), data=data)


@pytest.mark.parametrize(
    ("device", "precision", "dropout", "flash", "obstacle", "expected"),
    [
        ("cuda", "bf16", 0.0, False, None, "flex_attention"),
        ("cuda", "bf16", 0.0, True, None, "flash_attention_2"),
        ("cuda", "bf16", 0.1, False, None, "sdpa"),  # flex_attention has no dropout
        ("cuda", "bf16", 0.0, False, "no C compiler", "sdpa"),
        ("cuda", "fp32", 0.0, False, None, "sdpa"),
        ("cpu", "bf16", 0.0, False, None, "sdpa"),
    ],
)
def test_auto_prefers_what_skips_hidden_blocks(monkeypatch, device, precision, dropout, flash, obstacle, expected):
    for version in (2, 3, 4):
        available = flash and version == 2
        monkeypatch.setattr(hf, f"is_flash_attn_{version}_available", lambda a=available: a, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hardware, "_sdpa_kernel", lambda *_: "cudnn")
    monkeypatch.setattr(hardware, "compile_obstacle", lambda device: obstacle)
    name, why = hardware.choose_attention("auto", torch.device(device), precision, dropout, document_mask=True)
    assert name == expected and why
    assert hardware.choose_attention("auto", torch.device(device), precision, dropout)[0] == "sdpa"
