"""The benchmark measures what it says: the same training in every variant, and honest arithmetic on the times."""

import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from gpt2_hf import hardware
from gpt2_hf.benchmark import processes, results, run, speed, update, variants, worker
from gpt2_hf.benchmark.breakdown import profile_step
from gpt2_hf.benchmark.card import card_at_work, form_of, read_card
from gpt2_hf.benchmark.limits import floor_seconds, measure_limits, measure_shape
from gpt2_hf.benchmark.processes import RaceError
from gpt2_hf.benchmark.race import Result, Row, race
from gpt2_hf.benchmark.variants import OURS, Shape, Variant, build, read_batches
from gpt2_hf.benchmark.worker import Racer, conversation
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.planning.cards import M124, M355, M774, M1558
from gpt2_hf.training.memory import Parameters, Way, memory_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Shape(n_layer=2, n_embd=32, n_head=2, seq_len=64, micro_batch_size=2, grad_accum_steps=2, vocab_size=307)
PLAIN_OURS = replace(OURS, compile=False, bf16=False)
STOCK = Variant("transformers fp32", "stock")
LOST = Variant("lost", "none.py:GPT")

# A model in nanoGPT's form: its names, nn.Linear's [out, in] weights, forward(tokens, targets) -> (logits, loss).
NANO = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
    def forward(self, x):
        heads = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn, self.mlp = Attention(config), MLP(config)
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class Small(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd), wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)), ln_f=nn.LayerNorm(config.n_embd)))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
    def forward(self, tokens, targets):
        parts = self.transformer
        x = parts.wte(tokens) + parts.wpe(torch.arange(tokens.shape[1]))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


# What a worker says, without training: that a variant is lost, or times that grow by turns; of threads that do not
# sleep twice as long ones.
STAND_IN = """
import json, os, sys
if json.loads(sys.argv[1])["variant"]["label"] == "lost":
    print(json.dumps({"error": "ValueError: no file"}))
    sys.exit()
print(json.dumps({"losses": [5.0, 4.0, 3.0], "micro_batch_size": 2}), flush=True)
slow = {"passive": 1, None: 2}[os.environ.get("OMP_WAIT_POLICY")]
for turn, question in enumerate(sys.stdin, 1):
    times = {"seconds": [slow * turn] * 2, "load": 1.0, "peak_memory_gb": 1.0}
    print(json.dumps({"matrices": 7.0} if question.strip() == "profile" else times), flush=True)
"""


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """A function that runs scripts/benchmark.py in an empty folder, on a tiny model without a compiler."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "compile_obstacle", lambda device: "switched off")
    monkeypatch.setattr(variants, "shape_of", lambda name, device: replace(TINY, vocab_size=50257))

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device=cpu", "--rounds=1", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
        return capsys.readouterr().out

    return main


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(processes, "WORKER", ("-c", STAND_IN))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_every_variant_trains_the_same_model_alike(tmp_path):
    """Our step, the plain loop on stock GPT-2, and a nanoGPT: the same losses over five updates."""
    (tmp_path / "nano.py").write_text(NANO)
    curves = []
    for variant in (PLAIN_OURS, STOCK, Variant("nano", f"{tmp_path / 'nano.py'}:Small"), replace(STOCK, fused=True)):
        step = build(variant, TINY, CPU)
        curves.append([float(step(batch)) for batch in read_batches(TINY)[:5]])
    assert curves[0][-1] < curves[0][0] - 0.05
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_padded_vocabulary_changes_little():
    losses = [float(build(replace(STOCK, padded=p), TINY, CPU)(read_batches(TINY)[0])) for p in (False, True)]
    assert 0 < losses[1] - losses[0] < 0.3  # 384 instead of 307 columns, which the softmax counts


def test_steps(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "variants", lambda *_: [PLAIN_OURS, STOCK])
    printed = benchmark("--rounds=2", "--seconds=0.05", "--grad_accum_steps=3", "--out=results")
    found = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert [row["label"] for row in found["table"]] == ["gpt2_hf", "transformers fp32"]
    for row in found["table"]:
        assert 0 < row["slowest"] <= row["tokens_per_sec"] <= row["fastest"] and row["peak_memory_gb"] > 0.1
        assert row["steps"] >= 4
    assert found["table"][1]["ratio"] == 1 and found["shape"]["grad_accum_steps"] == 3
    assert sum(found["breakdown_ms"].values()) > 0
    text = (tmp_path / "results" / "benchmark.md").read_text()
    assert text in printed and "2 x 64 tokens x 3 a step" in text
    assert "largest difference of our first 3 losses" in text
    assert (tmp_path / "results" / "benchmark.png").stat().st_size > 1000


def test_a_peer_that_cannot_run_has_its_error_in_its_row(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr("gpt2_hf.benchmark.race.measure_limits", lambda *_: {"gemm_fp32": 1e9, "copy": 1e9})
    result = race([PLAIN_OURS, LOST], TINY, CPU, rounds=2, seconds=1, logs=tmp_path)
    assert [row.rounds for row in result.rows] == [[[2, 2], [4, 4]], []]
    assert result.breakdown == {"matrices": 7}
    text = results.as_text(results.summarize(result, TINY, CPU))
    assert "| lost | failed: ValueError: no file |" in text and "No peer ran." in text
    request = {"variant": asdict(LOST), "shape": asdict(TINY), "device": "cpu"}
    (answer,) = conversation(request, [])
    assert answer["error"].startswith("ValueError: --peer none.py:GPT: no file 'none.py'")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("""print('{"error": "no memory"}')""", "our own step fails: no memory"),
        ("raise SystemExit('no such GPU')", r"a process ended with 1, see .*gpt2_hf\.log: no such GPU"),
    ],
)
def test_our_own_failure_ends_the_race(tmp_path, monkeypatch, program, words):
    monkeypatch.setattr(processes, "WORKER", ("-c", program))
    with pytest.raises(RaceError, match=words):
        race([PLAIN_OURS], TINY, CPU, 1, 0.1, tmp_path)


def row(variant, rounds, losses=(5.0, 4.0, 3.0)):
    return Row(variant, losses=list(losses), rounds=rounds, loads=[1.0], micro_batch_size=2, peak_memory_gb=1.0)


def test_arithmetic():
    # Rounds of 1 s and of 10 s (a busy machine): ours is always twice as fast as its neighbour in time.
    ours, peer = row(PLAIN_OURS, [[0.5, 0.5], [5.0, 5.0], [0.5]]), row(STOCK, [[1.0, 1.0], [10.0], [1.0]])
    assert ours.ratio_to(peer) == 2
    assert ours.contended() == 2 and peer.contended() == 1
    assert peer.tokens_per_sec(TINY) == [25.6, 256, 256, 256]  # 2 x 2 x 64 tokens
    limits = {"gemm_bf16": 2e9, "gemm_fp32": 1e9, "copy": 1e9}
    floor = floor_seconds(TINY, limits)
    parameters = 307 * 32 + 2 * 12 * 32 * 32
    assert floor["matrices"] == pytest.approx(6 * 256 * parameters / 2e9)
    assert floor["attention"] == pytest.approx(2 * 2 * 3 * 256 * (64 / 2) * 32 * 2 / 2e9)  # q k' and p v, layers
    assert floor["optimizer"] == pytest.approx(28 * (parameters + 64 * 32) / 1e9)
    found = results.summarize(Result([ours, peer], limits, {}), TINY, CPU)
    flops = 6 * found["shape"]["parameters"] + 12 * 2 * 32 * 64
    assert found["table"][0]["mfu"] == pytest.approx(256 / 0.5 * flops / 2e9)
    assert found["best_peer"] == "transformers fp32"
    text = results.as_text(found)
    assert "The best peer is transformers fp32." in text
    least = 1e3 * sum(floor.values())
    assert f"Floor of a step from these: {least:,.1f} ms (matrices " in text
    assert (
        f"ours takes 500.0 ms, so at least {least / 500:.0%} of it is unavoidable here: a floor, with attention" in text
    )


def test_the_floor_of_a_gpu_is_of_this_shapes_own_products():
    """Each part by hand: 256 tokens a step, 32 wide, 2 layers, and a rate of its own for each product."""
    rates = {"c_attn": 1e9, "c_proj": 2e9, "fc": 3e9, "proj": 4e9, "head": 5e9}
    limits = {"gemm_bf16": 9e9, "copy": 1e8, "attention": 7e8} | {
        f"product_{name}": rate for name, rate in rates.items()
    }
    floor = floor_seconds(TINY, limits)
    a_layer = 3 * 32 * 32 / 1e9 + 32 * 32 / 2e9 + 4 * 32 * 32 / 3e9 + 4 * 32 * 32 / 4e9
    assert floor["matrices"] == pytest.approx(6 * 256 * (2 * a_layer + 307 * 32 / 5e9))
    assert floor["attention"] == pytest.approx(2 * 2 * 3 * 256 * (64 / 2) * 32 * 2 / 7e8)
    # In bf16, forward and back, in 2 layers: 4 crossings of the residual stream, and GELU's 4 x 32 in and out.
    assert floor["between"] == pytest.approx(2 * 2 * 2 * 256 * (4 * 32 + 2 * 4 * 32) / 1e8)
    found = results.summarize(Result([row(PLAIN_OURS, [[5.0]]), row(STOCK, [[5.0]])], limits, {}), TINY, CPU)
    assert "products and attention at the rates of their own shapes, and the least traffic" in results.as_text(found)


def test_the_rates_of_a_shapes_products(monkeypatch):
    """Each is really multiplied; with a clock by which each takes a second, rates are the operations."""
    multiplied, mm = [], torch.mm

    def seen(a, b):
        multiplied.append((*a.shape, b.shape[1]))
        return mm(a, b)

    monkeypatch.setattr(torch, "mm", seen)
    monkeypatch.setattr(hardware, "fastest", lambda act, device, seconds: act() or 1.0)
    rates = measure_shape(TINY, CPU, 0.1)
    tokens, c, padded = 2 * 64, 32, 384  # of a micro-batch; 307 columns in multiples of 128
    wide = {"c_attn": (c, 3 * c), "c_proj": (c, c), "fc": (c, 4 * c), "proj": (4 * c, c), "head": (c, padded)}
    assert multiplied == [
        size for n, m in wide.values() for size in ((tokens, n, m), (tokens, m, n), (n, tokens, m))
    ]  # the output, the input's gradient, the weight's
    assert rates == {f"product_{name}": 6 * tokens * n * m for name, (n, m) in wide.items()} | {
        "attention": 3 * 2 * 2 * tokens * (64 / 2) * c
    }


def test_on_a_gpu_steps_are_timed_together(monkeypatch):
    """With a device that takes 0.3 s a step, and a host that hears of it only when it waits."""
    clock = {"host": 0.0, "device": 0.0}
    waits = []

    def step(batch):
        clock["device"] = max(clock["device"], clock["host"]) + 0.3
        return 5.0

    def wait():
        waits.append(clock["device"])
        clock["host"] = max(clock["host"], clock["device"])

    racer = object.__new__(Racer)
    racer.device, racer._step, racer._batches = torch.device("cuda"), step, itertools.repeat(None)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock["host"])
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(worker, "peak_memory_gb", lambda device: 1.0)
    found = racer.run(4.0)
    assert found["steps_together"] == 3 and found["seconds"] == pytest.approx([0.3] * len(found["seconds"]))
    assert len(waits) == 2 + len(found["seconds"]) and len(found["seconds"]) == 5


def test_larger_shapes_fit_a_card_of_80_gb():
    for name, parameters in (("124M", M124), ("355M", M355), ("774M", M774), ("1558M", M1558)):
        shape = variants.shape_of(name, "cuda")
        config = variants.run_config(replace(shape, grad_accum_steps=8))
        n = Parameters.of(config)
        assert n.total == parameters
        memory = memory_of(config, Way("cuda", "bf16", True, "sdpa"), n, shape.micro_batch_size, accumulates=True)
        assert memory.total < 79 * 2**30 and variants.shape_of(name, "cpu").micro_batch_size == 1


def test_what_a_card_is(monkeypatch):
    answer = "NVIDIA H100 80GB HBM3, 580.95.05, 81559, 1755, 1980, 2619, 700.00\nNVIDIA H100 80GB HBM3, 1\n"
    card = read_card(answer)
    assert card == {
        "name": "NVIDIA H100 80GB HBM3", "driver": "580.95.05", "memory_mib": 81559, "sm_mhz": 1755,
        "most_sm_mhz": 1980, "memory_mhz": 2619, "power_limit_w": 700, "form": "SXM",
    }  # fmt: skip
    assert read_card("") == read_card("No devices were found\n") == card_at_work(CPU) == {}
    spark = read_card("NVIDIA GB10, 580.95.05, [N/A], 2418, 3003, [N/A], [N/A]")
    assert spark["memory_mib"] is None and spark["form"] is None
    found = results.summarize(Result([row(PLAIN_OURS, [[1.0]])], {"gemm_fp32": 1e9, "copy": 1e9}, {}, card), TINY, CPU)
    assert found["card"] == card
    assert "(SXM, driver 580.95.05, 1,755 MHz, 2,619 MHz memory, 700 W)" in results.as_text(found)
    found["card"] = spark
    assert "(driver 580.95.05, 2,418 MHz)" in results.as_text(found)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("NVIDIA H100 PCIe", "PCIe"),
        ("NVIDIA H100 NVL", "NVL"),
        ("NVIDIA H200", "SXM"),
        ("NVIDIA H200 NVL", "NVL"),
        ("NVIDIA B200", "SXM"),
        ("NVIDIA B300 SXM6 AC", "SXM"),
        ("NVIDIA A100-SXM4-40GB", "SXM"),
        ("NVIDIA A100 80GB PCIe", "PCIe"),
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_cards_form_is_in_its_name(name, form):
    assert form_of(name) == form


@pytest.mark.parametrize("has_bf16", [True, False])
def test_no_figure_that_cannot_be(monkeypatch, has_bf16):
    """Limits measured a thousand times too small, as of an emulated product or beside another program."""
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: has_bf16)
    ours, peer = row(PLAIN_OURS, [[0.5, 0.5]]), row(STOCK, [[1.0, 1.0]])
    limits = {"gemm_fp32": 2e6, "copy": 1e6} | ({"gemm_bf16": 1e6} if has_bf16 else {})
    found = results.summarize(Result([ours, peer], limits, {}), TINY, CPU)
    assert [one["mfu"] for one in found["table"]] == pytest.approx([1.0, 0.5])
    text = results.as_text(found)
    assert "the fastest variant, which beat the measured fp32 matrix product" in text
    assert "unavoidable" not in text and "measured while the machine was busy" in text
    assert ("No peer in bf16" in text) != has_bf16 and ("bf16 product" in text) == has_bf16


@pytest.mark.parametrize("has_bf16", [True, False])
def test_an_emulated_precision_is_neither_measured_nor_raced(monkeypatch, has_bf16):
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: has_bf16)
    measured = []
    monkeypatch.setattr(hardware, "measure_gemm", lambda device, dtype, seconds: measured.append(dtype) or 1e12)
    monkeypatch.setattr(hardware, "fastest", lambda *_: 1.0)
    limits = measure_limits(TINY, CPU, 0.1)
    assert (torch.bfloat16 in measured) == ("gemm_bf16" in limits) == has_bf16 and "gemm_fp32" in limits
    rows = [*variants.variants("cpu", ["nano.py:GPT"], has_bf16), *variants.ladder("cpu", has_bf16)]
    assert any(one.bf16 for one in rows if one.model != "ours") == has_bf16
    assert any("bf16" in one.label for one in rows) == has_bf16
    assert "nano compile + bf16" in [one.label for one in rows] or not has_bf16
    assert len({one.label for one in rows}) == len(rows) - 1  # ours is in both


def test_wrong_losses_are_refused():
    wrong = Result([row(PLAIN_OURS, [[1.0]], (5.0, 4.0, 3.01)), row(STOCK, [[1.0]])], {}, {})
    with pytest.raises(RaceError, match="our step is wrong"):
        results.check(wrong)
    undefined = Result([row(PLAIN_OURS, [[1.0]], (5.0, 4.0, float("nan"))), row(STOCK, [[1.0]])], {}, {})
    with pytest.raises(RaceError):
        results.check(undefined)


def test_profile_finds_the_parts():
    step, batch = build(PLAIN_OURS, TINY, CPU), read_batches(TINY)[0]
    step(batch)
    parts = profile_step(lambda: step(batch), CPU, steps=1)
    for name in ("head + loss", "optimizer", "attention", "matrices"):
        assert parts[name] > 0, name


def test_share_of_the_loop(benchmark):
    assert "1,024 tokens a step (8 accumulated)" in (printed := benchmark("--what=loop"))
    assert "of the loop's time is computing" in printed


def test_what_updates_cost(benchmark, monkeypatch):
    """With a clock by which each update takes as long as was made up, and a step ten times that of AdamW."""
    made_up = {"AdamW": 2.0, "Muon": 3.0}
    monkeypatch.setattr(update, "KINDS", {name: update.KINDS[name] for name in made_up})
    times = itertools.cycle([*made_up.values(), 20.0])
    act_for_real = update._timed

    def timed(act, device):
        act_for_real(act, device)
        return next(times)

    monkeypatch.setattr(update, "_timed", timed)
    *_, head, a, b = benchmark("--what=update").splitlines()
    passes, rows = (20 - 2) * 524_288 / (TINY.tokens / TINY.grad_accum_steps), (a, b)
    assert head.split()[:2] == ["update", "of"]
    for row, (name, took) in zip(rows, made_up.items(), strict=True):
        assert row.split() == [name, f"{1000 * took:,.1f}", f"{took / (passes + took):.2%}"]


def test_beside_other_programs(benchmark, stand_in, monkeypatch):
    monkeypatch.setattr(hardware, "usable_cpus", lambda: 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")  # which is not OpenMP's default
    assert benchmark("--what=busy", "--grad_accum_steps=2").splitlines() == [
        "2 CPUs, 1 rounds",
        "| beside | fair share | threads that sleep | OpenMP's default |",
        "|---|---|---|---|",
        "| nothing, tokens/s |  | 256 | 128 |",
        "| 1 counting | 67% | 50% | 50% |",
        "| 2 counting | 50% | 33% | 33% |",
    ]


def test_start(benchmark, monkeypatch, tmp_path):
    """The demo's command, given to a pretrain.py that only keeps what it was told."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "pretrain.py").write_text("""
import json, sys, time
from pathlib import Path
Path("arguments.json").write_text(json.dumps(sys.argv[1:]))
run = Path(sys.argv[sys.argv.index("--train.run_dir") + 1])
run.mkdir()
(run / "metrics.jsonl").write_text('{"val_loss": 4}\\n{"train_loss": 4}\\n')
time.sleep(600)
""")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    first, second = benchmark("--what=start").splitlines()
    assert first.startswith("demo, nothing compiled before: first step after ")
    assert second.startswith("demo, compiled before: first step after ")
    monkeypatch.chdir(ROOT)
    config = parse_cli(RunConfig, json.loads((tmp_path / "arguments.json").read_text()))
    assert config.train.log_every == 1 and config.train.run_dir.endswith("compiled_before")


def test_a_start_that_fails_says_why(monkeypatch, tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "pretrain.py").write_text("raise SystemExit('error: no disk')")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    with pytest.raises(RaceError, match=r"pretrain\.py ended: error: no disk"):
        run.race_start(1)


@pytest.mark.parametrize(("seeds", "noise"), [(1, r"unknown of one"), (2, r"\d\.\d{4}")])
def test_curves(benchmark, monkeypatch, seeds, noise):
    monkeypatch.setattr(run, "CURVE_SHAPE", TINY)
    monkeypatch.setattr(run, "CURVE_STEPS", 4)
    monkeypatch.setattr(run, "CURVE_END", 2)
    found = re.search(
        r"mean loss of the last 2 of 4 steps, ours and plain fp32, by seed: (.*)\n"
        rf"ours - plain: [+-]0\.00\d\d \(by seed .*\); standard deviation between seeds: {noise}\n",
        benchmark("--what=curve", f"--rounds={seeds}"),
    )
    assert found and len(json.loads(found[1])) == seeds


def test_scoring(benchmark):
    printed = benchmark("--what=hellaswag", "--hellaswag_items=3")
    assert "HellaSwag, 3 items, 1,635,744 parameters, fp32, seconds:" in printed
    for name in ("gpt2_hf", "lm_eval, batch 1", "lm_eval, batch 8", "lm_eval, batch 32"):
        assert f"\n{name}: " in printed
    assert "\nacc: the same picks\nacc_norm: the same picks\n" in printed


def test_data(monkeypatch, tmp_path, capsys):
    """The lecture's way reads files, whatever was named; the preparations themselves stand elsewhere."""
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # to be put back
    (tmp_path / "texts.jsonl").write_text('{"text": "To be"}\n{"text": "or not"}\n')
    given = []

    def lecture(files, out, processes):
        given.extend(files)
        out.mkdir()

    monkeypatch.setattr(speed, "prepare", lambda config: Path(config.out).mkdir())
    monkeypatch.setattr(speed, "prepare_as_in_the_lecture", lecture)
    monkeypatch.setattr(sys, "argv", ["benchmark_data.py", str(tmp_path), "--rounds=1"])
    runpy.run_path(str(ROOT / "scripts" / "benchmark_data.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert set(given) == {str(tmp_path / "texts.jsonl")}
    for title in ("encoding whole documents: 2 texts", "one worker, 2 texts", f"whole preparation of {tmp_path}"):
        assert f"\n{title}" in printed
    assert printed.count("100.0% (100.0% to 100.0%)") >= 4  # each table's base


def test_a_killed_benchmark_leaves_no_process(tmp_path):
    """Not even one that would never have ended, and never asks whether it should."""
    (tmp_path / "stuck.py").write_text("open('is_stuck', 'w').close()\nwhile True:\n    pass\n")
    code = f"""
import os, signal, time
from dataclasses import make_dataclass
from pathlib import Path
from gpt2_hf.benchmark.processes import Worker, program_with_us
def fields(**values):
    return make_dataclass("Fields", values)(**values)
variant, shape = fields(label="stuck", model="stuck.py:GPT"), fields(**{asdict(TINY)!r})
worker = Worker(variant, shape, "cpu", Path("logs"))
other = program_with_us("while True: pass")
Path("pids").write_text(f"{{worker._process.pid}} {{other.__enter__().pid}}")
while not Path("is_stuck").exists() and worker._process.poll() is None:
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / "is_stuck").exists()
    statuses = [Path(f"/proc/{pid}/stat") for pid in (tmp_path / "pids").read_text().split()]
    end = time.monotonic() + 60
    while any(map(runs, statuses)) and time.monotonic() < end:
        time.sleep(0.02)
    left = [int(status.parent.name) for status in statuses if runs(status)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def runs(status: Path) -> bool:
    try:
        return status.read_text().split()[2] != "Z"  # ended; nobody may be there to reap it
    except OSError:
        return False


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ladder_adds_one_thing_a_step(device):
    steps = variants.ladder(device, bf16=True)
    assert ("+ TF32" in [step.label for step in steps]) == (device == "cuda")
    for before, after in itertools.pairwise(steps[:-1]):
        assert sum(getattr(before, name) != getattr(after, name) for name in vars(after) if name != "label") == 1
    assert steps[-1] == OURS
