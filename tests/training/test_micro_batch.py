"""``train.micro_batch_size auto``: the fastest that fits, found once, by all ranks together, on the same curve."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_distributed import launch
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny, with_steps

from gpt2_hf import hardware
from gpt2_hf.corpus.inspection import inspect_data
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTForCausalLM
from gpt2_hf.runs import read_rows
from gpt2_hf.training import micro_batch
from gpt2_hf.training.loop import train
from gpt2_hf.training.memory import Way
from gpt2_hf.training.micro_batch import fastest, first_size, search
from gpt2_hf.training.preflight import check_run
from gpt2_hf.training.watch import advice_on_memory

AUTO = {"train__micro_batch_size": "auto"}
# Seconds of a micro-step: 2 windows are as fast as 4, and both faster than other sizes.
SECONDS = {1: 1.5, 2: 2.0, 4: 4.0, 8: 9.0, 16: 20.0}


@dataclass
class Try:
    """What the model was called with while a size was timed."""

    windows: int = 0
    had_gradients: list[bool] = field(default_factory=list)


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine on which so many windows fit; the list that it returns is filled with what is tried."""

    def make(limit: int, seconds: dict[int, float] = SECONDS) -> list[Try]:
        forward, tried, timed = GPTForCausalLM.forward, [], []

        def limited(self, input_ids, *args, **kwargs):
            for one in timed:
                one.windows = len(input_ids)
                one.had_gradients.append(self.transformer.wte.weight.grad is not None)
            if len(input_ids) > limit:
                raise torch.OutOfMemoryError("no memory")
            return forward(self, input_ids, *args, **kwargs)

        def clock(micro_step, *_) -> float:
            tried.append(Try())
            timed.append(tried[-1])
            try:
                for _ in range(3):
                    micro_step()
            finally:
                timed.clear()
            return seconds[tried[-1].windows]

        monkeypatch.setattr(GPTForCausalLM, "forward", limited)
        monkeypatch.setattr(hardware, "fastest", clock)
        monkeypatch.setattr(hardware, "peak_flops", lambda *_: (1e12, "not measured"))
        return tried

    return make


def windows(tried: list[Try]) -> list[int]:
    return [one.windows for one in tried]


def curve(first: float, rising: int, flat: int, falling: int) -> list[float]:
    rates = [first]
    for factor in (1.05,) * rising + (1.0,) * flat + (0.95,) * falling:
        rates.append(rates[-1] * factor)
    return rates


@pytest.mark.parametrize("limit", [1, 4, 64])
@pytest.mark.parametrize("shape", [(6, 0, 0), (0, 6, 0), (0, 0, 6), (2, 2, 2), (3, 0, 3), (0, 3, 3)])
def test_the_search_finds_the_smallest_of_the_fastest_from_wherever_it_begins(shape, limit):
    sizes = [1, 2, 4, 8, 16, 32, 64]
    rates = dict(zip(sizes, curve(100.0, *shape), strict=True))
    fitting = {size: rate for size, rate in rates.items() if size <= limit}
    best = min(size for size, rate in fitting.items() if rate == max(fitting.values()))
    for first in sizes:
        tried = []

        def rate_of(size: int, tried=tried) -> float | None:
            tried.append(size)
            return fitting.get(size)

        found, too_large = search(sizes, first, rate_of)
        assert fastest(found) == best
        assert len(tried) == len({*tried}) and found == {size: rates[size] for size in tried if size in fitting}
        assert too_large == min((size for size in tried if size > limit), default=None)


def test_a_search_tries_no_more_than_it_needs():
    tried = []

    def rate_of(size: int) -> float | None:
        tried.append(size)
        return {16: 90.0, 32: 100.0, 64: 100.5}.get(size)

    assert fastest(search([1, 2, 4, 8, 16, 32, 64, 128, 256], 64, rate_of)[0]) == 32
    assert tried == [64, 128, 32, 16], "the start, beyond it, and down to where it is slower"


def test_where_a_trial_begins(data, tmp_path):
    config = tiny(data, tmp_path)  # windows of 32 tokens
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    on_card, on_cpu = (Way(device, "bf16", True, "sdpa") for device in ("cuda", "cpu"))
    assert [first_size(config, on_card, fits, sizes) for fits in (0, 1, 64, 512)] == [1, 1, 64, 512]
    assert [first_size(config, on_cpu, fits, sizes) for fits in (0, 64, 512)] == [1, 64, 128]


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("tokens_per_sec", "mfu", "peak_memory")} for row in rows]


def test_auto_is_the_number_that_it_finds_and_a_resumed_run_keeps_it(data, tmp_path, machine, capsys, monkeypatch):
    changes = {"model__dropout": 0.1, "train__steps": 6, "checkpoint__save_every": 3, "eval__val_every": 3}
    given = run(tiny(data, tmp_path / "given", **changes, train__micro_batch_size=2))
    tried = machine(limit=8)
    config = tiny(data, tmp_path / "run", **changes, **AUTO)
    run(with_steps(config, 3))
    out = capsys.readouterr().out
    assert windows(tried) == [16, 8, 4, 2, 1]
    assert "micro_batch_size 2; tokens/s a process in a trial: 1 21, 2 32, 4 32, 8 28, 16 does not fit" in out
    assert "2 x 32 x 1 processes x 8 accumulated" in out
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["micro_batch_size"] == 2
    tried.clear()
    rows = run(config)
    assert tried == [] and "micro_batch_size 2, as this run has found before" in capsys.readouterr().out
    assert untimed(rows) == untimed(given)
    weights = [load_file(tmp_path / name / "final/model.safetensors") for name in ("given", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    monkeypatch.setattr(hardware, "describe", lambda device: "another card")
    monkeypatch.setitem(SECONDS, 4, 3.0)
    run(with_steps(config, 7))
    out = capsys.readouterr().out
    assert windows(tried) == [16, 8, 4, 2]
    assert "this run's micro_batch_size 2 was found with another device: trying again" in out
    assert "train.micro_batch_size was 2, now 4" in out
    state = json.loads((tmp_path / "run/checkpoints/step-00000007/trainer_state/state.json").read_text())
    assert state["micro_batch"]["size"] == 4 and state["micro_batch"]["conditions"]["device"] == "another card"


def test_a_size_is_tried_as_training_would_hold_it(data, tmp_path, machine, monkeypatch):
    """With gradients of the micro-steps before it in the update, and room for the optimizer's state."""
    tried = machine(limit=16)
    run(tiny(data, tmp_path / "run", train__steps=1, **AUTO))
    held = {one.windows: one.had_gradients for one in tried}
    assert held[16] == [False] * 3 and held[8] == [False, True, False] and held[4] == [False, True, True]
    monkeypatch.setattr(micro_batch, "n_averages", lambda *_: 2**58)
    with pytest.raises(ConfigError, match=r"^out of memory with micro-batches of one window; try --train.grad"):
        train(tiny(data, tmp_path / "other", **AUTO))
    assert not (tmp_path / "other").exists()


def test_what_a_cpu_is_predicted_not_to_hold_is_not_tried(data, tmp_path, machine, monkeypatch):
    tried = machine(limit=16, seconds={1: 1.0, 2: 1.5, 4: 2.0})
    monkeypatch.setattr(micro_batch, "largest_that_fits", lambda *_: 4)
    rows = run(tiny(data, tmp_path / "run", train__steps=1, **AUTO))
    assert windows(tried) == [4, 2] and len(losses(rows)) == 1


def test_ramps_are_kept_to(data, tmp_path, machine, monkeypatch):
    """The size divides the smallest batch; of shorter windows as many go through at once as make up its tokens."""
    ramps = {"train__batch_ramp": [4 * 32], "train__batch_ramp_steps": 1}
    ramps |= {"data__seq_len_ramp": [8], "data__seq_len_ramp_steps": 2, "train__steps": 3}
    tried = machine(limit=64, seconds=dict.fromkeys((1, 2, 4), 1.0))
    rows = run(tiny(data, tmp_path / "auto", **ramps, **AUTO))
    assert windows(tried) == [4, 2]
    assert untimed(rows) == untimed(run(tiny(data, tmp_path / "given", **ramps, train__micro_batch_size=4)))


def test_all_ranks_take_what_the_smallest_and_slowest_of_them_can(data, tmp_path):
    script = tmp_path / "pretrain.py"
    script.write_text(
        """
import os, torch
from gpt2_hf import hardware
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.model import GPTForCausalLM
from gpt2_hf.training.loop import train
rank, forward, sizes = int(os.environ["RANK"]), GPTForCausalLM.forward, []
def limited(self, input_ids, *args, **kwargs):
    sizes.append(len(input_ids))
    if len(input_ids) > (4, 2)[rank]:
        raise torch.OutOfMemoryError
    return forward(self, input_ids, *args, **kwargs)
def clock(micro_step, *_):
    micro_step()
    return ({1: 1.0, 2: 1.0, 4: 1.0}, {1: 1.0, 2: 3.0})[rank][sizes[-1]]
GPTForCausalLM.forward, hardware.fastest = limited, clock
hardware.peak_flops = lambda *_: (1e12, "not measured")
train(parse_cli(RunConfig))
"""
    )
    out = launch(tiny(data, tmp_path / "run", train__steps=2, **AUTO), tmp_path, 2, script=script)
    assert "micro_batch_size 1; tokens/s a process in a trial: 1 32, 2 21, 4 does not fit" in out
    found = losses(read_rows(tmp_path / "run/metrics.jsonl"))
    assert found == pytest.approx(losses(run(tiny(data, tmp_path / "one", train__steps=2))), rel=1e-6)


def test_what_cannot_be_is_refused_in_one_line(data, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"global_batch_tokens 16 is not a multiple .* nearest that work are 32$"):
        train(tiny(data, tmp_path / "run", train__global_batch_tokens=16, **AUTO))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), print=print)
    check_run(tiny(data, tmp_path / "run"), two)
    with pytest.raises(ConfigError, match=r"auto tries sizes on each device by itself, which a sharded model cannot"):
        check_run(tiny(data, tmp_path / "run", **AUTO), two)


def test_auto_is_advised_where_it_was_not_used(data, tmp_path):
    config = tiny(data, tmp_path)
    with (
        pytest.raises(ConfigError, match=r"micro_batch_size 4: .* auto finds the fastest"),
        advice_on_memory(config, 1),
    ):
        raise torch.OutOfMemoryError
    with pytest.raises(ConfigError, match=r"stay the same$"), advice_on_memory(config, 1, is_found=True):
        raise torch.OutOfMemoryError


def test_the_first_batch_of_a_recipe_is_shown_without_a_trial(data, tmp_path):
    given, auto = (inspect_data(data, tiny(data, tmp_path, **s), sample=10).first_batch for s in ({}, AUTO))
    assert given.sha256 == auto.sha256 and (auto.micro_steps, auto.micro_batch_size) == (1, 16)
