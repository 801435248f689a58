"""What grows over a run: each step is a function of its number, and no token is lost or comes twice."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from test_rewind import feed, noise, watch
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny, with_steps
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from gpt2_hf.config import DataSection, RunConfig, TrainSection, flat
from gpt2_hf.corpus.inspection import inspect_data
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import StepLoader, TokenStream, cut
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTForCausalLM
from gpt2_hf.planning.plan import make_plan
from gpt2_hf.planning.plan import text as plan_text
from gpt2_hf.reference import _incomparable
from gpt2_hf.schedules import in_stages, sum_before
from gpt2_hf.training import checkpoint
from gpt2_hf.training import loop as training
from gpt2_hf.training.build import Parts, build_model
from gpt2_hf.training.loop import train, train_step
from gpt2_hf.training.measures import build_document_mask
from gpt2_hf.training.watch import advice_on_memory

LENGTHS = {"data__seq_len_ramp": [8, 16], "data__seq_len_ramp_steps": 3}
BATCHES = {"train__batch_ramp": [8 * 32], "train__batch_ramp_steps": 4}


def numbered(n: int, seq_len: int) -> torch.Tensor:
    """Windows of a text whose tokens are their own places."""
    return torch.stack([torch.arange(k * seq_len, (k + 1) * seq_len + 1) for k in range(n)])


@pytest.mark.parametrize("length", [1, 4, 12])
def test_pieces_have_each_token_as_a_target_once(length):
    pieces = cut(numbered(5, 12), length)
    assert pieces.shape == (5 * 12 // length, length + 1)
    assert pieces[:, 1:].flatten().tolist() == list(range(1, 61))
    assert all(b - a == 1 for row in pieces.tolist() for a, b in pairwise(row))


def test_lengths_at_their_knots():
    data = DataSection(seq_len=64, seq_len_ramp=[8, 32], seq_len_ramp_steps=5)
    assert [data.seq_len_at(step) for step in (0, 4, 5, 9, 10, 10**9)] == [8, 8, 32, 32, 64, 64]
    assert [step for step in range(100) if data.begins_seq_len(step)] == [0, 5, 10]
    assert [step for step in range(100) if DataSection().begins_seq_len(step)] == [0]


@pytest.mark.parametrize(
    ("ramp", "steps", "words"),
    [
        ([48], 5, "data.seq_len_ramp 48 does not divide data.seq_len 64"),
        ([16, 8], 5, r"data.seq_len_ramp \[16, 8\] must increase"),
        ([16, 16], 5, "must increase"),
        ([64], 5, "stay below data.seq_len 64"),
        ([16], 0, "data.seq_len_ramp needs data.seq_len_ramp_steps"),
    ],
)
def test_lengths_that_cannot_be(ramp, steps, words):
    with pytest.raises(ConfigError, match=words):
        DataSection(seq_len=64, seq_len_ramp=ramp, seq_len_ramp_steps=steps)


def test_a_ramp_beyond_the_last_step_is_remarked_on(data):
    assert not RunConfig().remarks()
    config = tiny(data, data, **LENGTHS, train__steps=6, optim__warmup_steps=1)
    assert [line for line in config.remarks() if "data.seq_len_ramp takes 6 steps, and train.steps is 6" in line]
    assert not with_steps(config, 7).remarks()


def gradients(config: RunConfig, batch: torch.Tensor, step: int, eot: int = 250) -> tuple[float, dict, GPTForCausalLM]:
    """Loss and gradients of an update, and the model, a new one."""
    accelerator = Accelerator(cpu=True)
    model = build_model(config, None, accelerator, "fp64")
    split = type("Split", (), {"eot": eot, "eot_first": False})
    documents = build_document_mask(config, split, model, torch.float64)
    loss, _ = train_step(accelerator, model, [], batch, step, config, documents)
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}, model


def text(n_micro_steps: int = 2, n: int = 4, seq_len: int = 32) -> torch.Tensor:
    return torch.randint(0, 251, (n_micro_steps, n, seq_len + 1), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("step", "length"), [(0, 8), (2, 8), (3, 16), (5, 16), (6, 32)])
def test_a_step_is_that_of_stock_gpt2_on_the_pieces(data, tmp_path, step, length):
    config = tiny(data, tmp_path, **LENGTHS, train__precision="fp64", optim__max_grad_norm=1e9)
    batch = text()
    loss, found, model = gradients(config, batch, step)
    model.save_pretrained(tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    pieces = [row[i : i + length + 1] for row in batch.flatten(0, 1) for i in range(0, 32, length)]
    each = []
    for piece in pieces:
        logits = stock(piece[None, :-1]).logits[0]
        each.append(torch.nn.functional.cross_entropy(logits, piece[1:]))
    expected = torch.stack(each).mean()
    expected.backward()
    assert type(stock).__name__ == "GPT2LMHeadModel" and loss == pytest.approx(expected.item(), rel=1e-12)
    for name, p in stock.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_are_kept_apart_in_pieces(data, tmp_path, attention):
    """As by the definition: each document of each piece alone."""
    config = tiny(data, tmp_path, **LENGTHS, data__document_mask=True, optim__max_grad_norm=1e9)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attn_implementation=attention))
    batch = torch.where(text() < 60, 250, text())
    loss, _, model = gradients(config, batch, 0)
    total, n = 0.0, 0
    with torch.no_grad():
        for piece in cut(batch.flatten(0, 1), 8).tolist():
            starts = [0, *(i + 1 for i, token in enumerate(piece[:-2]) if token == 250), 8]
            for a, b in pairwise(starts):
                logits = model(torch.tensor([piece[a:b]])).logits[0]
                total += torch.nn.functional.cross_entropy(logits, torch.tensor(piece[a + 1 : b + 1])).item() * (b - a)
                n += b - a
    assert n == batch[..., 1:].numel() and loss == pytest.approx(total / n, rel=1e-6)


@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)
def test_each_length_is_compiled_once(data, tmp_path, monkeypatch):
    """Also of more lengths than the compiler would take by itself; nothing falls back to plain code."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: setattr(self, "_compiled_call_impl", torch.compile(self._call_impl, **options)),
    )
    torch._dynamo.reset()
    counters.clear()
    ramp = [1, 2, 3, 4, 5, 6, 10, 12, 15, 20]
    config = tiny(data, tmp_path, model__n_layer=1, data__seq_len=60, data__seq_len_ramp=ramp,
                  data__seq_len_ramp_steps=1, train__compile="on")  # fmt: skip
    accelerator = Accelerator(cpu=True)
    model = build_model(config, None, accelerator, "fp32")
    graphs = []
    for step in range(len(ramp) + 3):
        train_step(accelerator, model, [], text(seq_len=60), step, config)
        graphs.append(counters["stats"]["unique_graphs"])
    # A block and, once, the loss's kernel, which sees tokens in a row.
    assert graphs == [2 + min(step, len(ramp)) for step in range(len(ramp) + 3)]
    torch._dynamo.reset()


def test_a_run_resumed_in_any_stage_equals_one_that_ran_through(data, tmp_path, capsys):
    ramps = {**LENGTHS, **BATCHES}
    config = tiny(data, tmp_path / "a", **ramps, model__dropout=0.1, train__steps=9, checkpoint__save_every=100)
    straight, said = run(config), capsys.readouterr().out
    assert [row["tokens_seen"] for row in straight] == [256, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584]
    assert [row["step"] for row in straight if "tokens_per_sec" in row] == [2, 3, 5, 6, 8, 9]  # of one length each
    epochs = 3584 / open_split(data, "train").n_tokens
    assert f"2 accumulated; {epochs:.2f} epochs\nto begin with, updates of 256 tokens, 4 steps each\n" in said
    assert "to begin with, windows of 8, then 16 tokens, 3 steps each\n" in said
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "b")))
    for stop in (1, 3, 4, 5, 6):  # within stages, and at their ends
        run_up_to(config, stop)
    other = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, seq_len_ramp=[16]),
        train=dataclasses.replace(config.train, batch_ramp_steps=5),
    )
    with pytest.raises(
        ConfigError, match=r"another data.seq_len_ramp \(\[8, 16\], now \[16\]\), another train.batch_r"
    ):
        train(other)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(run(config)) == losses(straight)


class Killed(Exception):
    pass


def run_up_to(config: RunConfig, step: int) -> None:
    """Go on until the checkpoint of ``step`` is there, and then as if killed."""

    def save_and_die(parts: Parts, at: int) -> None:
        checkpoint.save(parts, at)
        parts.saver.wait()
        raise Killed

    saving = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save_every=step))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "save", save_and_die)
        train(saving)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_higher_loss_of_longer_windows_is_no_spike():
    ramp = {"seq_len": 64, "seq_len_ramp": [32], "seq_len_ramp_steps": 50}
    for settings, spikes in (({}, 10), (ramp, 0)):
        seen = watch(data=settings, max_bad_steps=100)
        feed(seen, noise(50))
        assert feed(seen, [5.0] * 10, 51).get("loss_spikes", 0) == spikes


def test_windows_at_document_starts_in_a_run(data, tmp_path, capsys):
    """Trained on in their order, looked at in the same, and counted as they are read."""
    config = tiny(data, tmp_path / "run", data__document_starts=True, train__steps=2, eval__val_every=2)
    shards = open_split(data, "train")
    stream = TokenStream(shards, 32, config.train.seed, document_starts=True)
    lengths = [n for shard in shards.shards for n in np.diff(shard.document_ends(), prepend=0).tolist()]
    epochs = 2 * 512 / (32 * sum(max(1, (n + 16) // 32) for n in lengths))
    rows, said = run(config), capsys.readouterr().out
    plain = run(tiny(data, tmp_path / "plain", train__steps=2, eval__val_every=2))
    assert f"2 accumulated; {epochs:.2f} epochs" in said
    assert losses(rows) != losses(plain) and rows[0]["val_loss"] == plain[0]["val_loss"]
    batch = inspect_data(data, config, sample=10).first_batch
    assert batch.epochs == make_plan(config, "1xH100").epochs == pytest.approx(epochs)
    assert batch.windows == stream.batch(0, 2).tolist()
    state = json.loads((tmp_path / "run/checkpoints/step-00000002/trainer_state/state.json").read_text())
    assert state["data.document_starts"] is True


# Batches


@pytest.mark.parametrize(("first", "steps"), [([], 0), ([], 3), ([5], 1), ([2, 4], 3), ([1, 2, 3], 10)])
def test_sums_over_stages_are_sums(first, steps):
    values = [in_stages(step, first, steps, 7) for step in range(50)]
    assert values[: len(first) * steps] == [value for value in first for _ in range(steps)]
    assert set(values[len(first) * steps :]) == {7}
    assert [sum_before(step, first, steps, 7) for step in range(51)] == [sum(values[:step]) for step in range(51)]
    assert sum_before(10**9, first, steps, 7) == sum(values) + 7 * (10**9 - 50)


@pytest.mark.parametrize(
    ("ramp", "steps", "words"),
    [
        ([512, 256], 5, r"train.batch_ramp \[512, 256\] must increase"),
        ([1024], 5, "stay below train.global_batch_tokens 1024"),
        ([256], 0, "train.batch_ramp needs train.batch_ramp_steps"),
    ],
)
def test_batches_that_cannot_be(data, tmp_path, ramp, steps, words):
    with pytest.raises(ConfigError, match=words):
        tiny(data, tmp_path, train__global_batch_tokens=1024, train__batch_ramp=ramp, train__batch_ramp_steps=steps)


def test_batches_that_do_not_fit(data, tmp_path):
    with pytest.raises(ConfigError, match=r"leave train\.batch_ramp out"):
        tiny(data, tmp_path, **BATCHES, train__overfit_batch=True)
    config = tiny(data, tmp_path, **{**BATCHES, "train__batch_ramp": [256, 300]})
    with pytest.raises(ConfigError, match=r"train\.batch_ramp 300 is not a multiple .* that work are 256 and 512"):
        config.grad_accum_steps(1)
    with pytest.raises(ConfigError, match=r"train\.batch_ramp 256 is not a multiple of .* 8 x 32 x 2 = 512"):
        tiny(data, tmp_path, **BATCHES).grad_accum_steps(2)
    assert tiny(data, tmp_path, **BATCHES).grad_accum_steps(1) == 2


def sizes_of(step: int) -> int:
    return 4 if step < 3 else 8 if step < 6 else 16


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("first", [0, 2, 3, 6, 7])
def test_growing_batches_read_the_same_samples(data, world_size, first):
    """All steps' batches on end are the samples in their order, from wherever one begins, on any number of ranks."""
    stream = TokenStream(open_split(data, "train"), 32, 7)
    sizes = {"global_batch_size": 16, "micro_batch_size": 2, "batch_ramp": [4, 8], "batch_ramp_steps": 3}
    ranks = []
    for rank in range(world_size):
        with StepLoader(stream, first, 9, **sizes, data_offset=5, rank=rank, world_size=world_size) as steps:
            ranks.append(list(steps))
    for step, shares in enumerate(zip(*ranks, strict=True), first):
        assert [share.shape for share in shares] == [(sizes_of(step) // 2 // world_size, 2, 33)] * world_size
    found = torch.cat([share.flatten(0, 1) for shares in zip(*ranks, strict=True) for share in shares])
    before = 5 + sum(map(sizes_of, range(first)))
    assert torch.equal(found, torch.from_numpy(stream.batch(before, len(found)).astype(np.int64)))


def test_a_stage_that_does_not_divide_is_refused(data):
    sizes = {"global_batch_size": 16, "micro_batch_size": 2, "batch_ramp": [6], "batch_ramp_steps": 3}
    with pytest.raises(ValueError, match="global_batch_size 6 is not a multiple"):
        StepLoader(TokenStream(open_split(data, "train"), 32, 7), 0, 9, **sizes, world_size=2)


def test_dropout_is_seeded_by_the_sample(data, tmp_path, monkeypatch):
    config = tiny(data, tmp_path, **BATCHES, model__dropout=0.1, train__micro_batch_size=4)
    seeded = []
    monkeypatch.setattr(training, "seed_dropout", lambda seed, step, sample: seeded.append((step, sample)))
    for step in (0, 3, 4, 5):
        n = config.train.tokens_of_step(step) // 32
        gradients(config, text(n // 4), step)
    assert seeded == [(0, 0), (0, 4), (3, 24), (3, 28), *((4, 32 + 4 * i) for i in range(4)),
                      *((5, 48 + 4 * i) for i in range(4))]  # fmt: skip


def test_memory_advice_divides_all_stages(data, tmp_path):
    config = tiny(data, tmp_path, train__global_batch_tokens=24 * 32, train__batch_ramp=[8 * 32],
                  train__batch_ramp_steps=1)  # fmt: skip
    with pytest.raises(ConfigError, match=r"try --train\.micro_batch_size 4:"), advice_on_memory(config, 1):
        raise torch.OutOfMemoryError


def test_a_plan_adds_up_the_stages():
    """Of 10 steps each: a quarter of the batch in short windows, half of it in short ones, all of it in long ones."""
    ramps = {"batch_ramp": [131_072, 262_144], "batch_ramp_steps": 10}
    config = RunConfig(
        data=DataSection(seq_len_ramp=[256], seq_len_ramp_steps=20), train=TrainSection(steps=30, **ramps)
    )
    plan = make_plan(config, "2xH100")
    stages = []
    for tokens, length in ((131_072, 256), (262_144, 256), (524_288, 1024)):
        size = 64 * 1024 // length
        train = TrainSection(steps=10, global_batch_tokens=tokens, micro_batch_size=size)
        stages.append(make_plan(RunConfig(data=DataSection(seq_len=length), train=train), "2xH100"))
    assert plan.tokens == sum(stage.tokens for stage in stages) == 10 * (131_072 + 262_144 + 524_288)
    assert plan.flops == sum(stage.flops for stage in stages) < plan.tokens * plan.flops_per_token
    assert plan.training_seconds == pytest.approx(sum(stage.training_seconds for stage in stages))
    assert plan.step_seconds == stages[-1].step_seconds and plan.micro_steps == 4
    assert "30 steps of 131,072 to 524,288 tokens = 9.18M tokens" in plan_text(plan, config)
    assert (131_072 // 1024 // 2) % plan.micro_batch_size == 0


def test_the_first_batch_that_is_shown_is_that_of_the_first_stage(data, tmp_path):
    config = tiny(data, tmp_path, **BATCHES)
    batch = inspect_data(data, config, sample=10).first_batch
    assert (batch.micro_steps, batch.micro_batch_size) == (1, 8)
    assert batch.epochs == pytest.approx((4 * 256 + 16 * 512) / open_split(data, "train").n_tokens)


def test_a_reference_of_other_batches_is_none(data, tmp_path):
    recipe = flat(tiny(data, tmp_path).to_yaml())
    assert _incomparable(tiny(data, tmp_path), recipe) is None
    assert _incomparable(tiny(data, tmp_path, **BATCHES), recipe) == "train.batch_ramp ([], here [256])"
    assert _incomparable(tiny(data, tmp_path, **LENGTHS), recipe) == "data.seq_len_ramp ([], here [8, 16])"
