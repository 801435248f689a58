"""How "auto" finds the fastest attention. On a CPU stand its backends for those of a card; times are planted."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import run, tiny

from gpt2_hf import hardware
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import modeling_gpt
from gpt2_hf.training import attention

CPU = torch.device("cpu")


@pytest.fixture
def trial(data, tmp_path, monkeypatch):
    """(config, times to plant, names that were tried); the cache folder is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    times, tried = {"sdpa": 1.0, "eager": 2.0}, []

    def planted(step, device, seconds):
        step()  # forward and back, for real
        name = tried[-1]
        return times[name] / 1e3

    measure = attention._milliseconds

    def noted(name, *rest):
        tried.append(name)
        return measure(name, *rest)

    monkeypatch.setattr(hardware, "fastest", planted)
    monkeypatch.setattr(attention, "_milliseconds", noted)
    return tiny(data, tmp_path / "run"), times, tried


def best(config, names=("sdpa", "eager"), precision="bf16", is_compiled=False):
    return attention.fastest(names, config, CPU, precision, is_compiled)


@pytest.mark.parametrize(("milliseconds", "expected"), [(2.0, "sdpa"), (0.5, "eager"), (0.97, "eager"), (0.99, "sdpa")])
def test_the_fastest_wins_unless_the_first_is_as_good(trial, milliseconds, expected):
    config, times, _ = trial
    times["eager"] = milliseconds
    name, why = best(config)
    assert name == expected
    assert "fastest of those tried here, ms a block: " in why and f"eager {milliseconds:g}" in why and "sdpa 1" in why


def test_it_is_remembered_until_something_changes(trial, monkeypatch, tmp_path):
    config, times, tried = trial
    found = best(config)
    times["eager"] = 0.1
    assert best(config) == found and tried == ["sdpa", "eager"]
    assert best(config, precision="fp16")[0] == "eager" and len(tried) == 4
    monkeypatch.setattr(attention, "version", lambda package: "another")
    assert best(config)[0] == "eager" and len(tried) == 6
    monkeypatch.setattr(hardware, "describe", lambda device: "another card")
    best(config)
    assert len(tried) == 8
    assert len(json.loads((tmp_path / "cache/gpt2_hf/attention.json").read_text())) == 4


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": 1}'])
def test_a_damaged_memory_is_made_anew(trial, tmp_path, content):
    config, _, tried = trial
    (tmp_path / "cache/gpt2_hf").mkdir(parents=True)
    (tmp_path / "cache/gpt2_hf/attention.json").write_text(content)
    assert best(config)[0] == best(config)[0] == "sdpa" and len(tried) == 2


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(trial, tmp_path):
    config, *_ = trial
    (tmp_path / "cache").write_text("a file")
    assert best(config)[0] == "sdpa"


def test_what_does_not_run_is_left_out(trial):
    config, times, _ = trial
    times |= {"flash_attention_2": 0.1, "nonsense": 0.1}
    assert best(config, ("flash_attention_2", "nonsense", "eager", "sdpa"))[0] == "sdpa"
    with pytest.raises(RuntimeError, match="none of flash_attention_2 runs"):
        best(config, ("flash_attention_2",))


def test_a_block_that_the_compiler_must_leave_is_left_out(trial, monkeypatch):
    config, times, _ = trial
    times["sdpa_fa"] = 5.0
    assert best(config, ("sdpa_fa", "sdpa"), is_compiled=True)[0] == "sdpa"
    forward = modeling_gpt.GPTAttention.forward

    def leaving(self, x, *args, **kwargs):
        if self.config._attn_implementation == "sdpa":
            torch._dynamo.graph_break()
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(modeling_gpt.GPTAttention, "forward", leaving)
    assert best(config, ("sdpa_fa", "sdpa"), "fp16", is_compiled=True)[0] == "sdpa_fa"


@pytest.mark.parametrize("names", [("sdpa", "eager"), ("sdpa", "flex_attention")])
def test_documents_are_apart_in_the_trial_too(trial, monkeypatch, names):
    config, times, _ = trial
    times["flex_attention"] = 3.0
    seen = []
    mask = attention.DocumentMask.__call__
    monkeypatch.setattr(attention.DocumentMask, "__call__", lambda self, *a: seen.append(a) or mask(self, *a))
    object.__setattr__(config.data, "document_mask", True)
    assert best(config, names)[0] == "sdpa" and len(seen) == 2


def test_candidates_are_what_the_card_and_the_recipe_admit(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        hardware, "flash_obstacle", lambda name, *rest, by_name: None if name[-1] in "23" else "is not installed"
    )
    of = attention.candidates
    assert of(cuda, "bf16", 0.0, False, True) == [
        "sdpa",
        "sdpa_cudnn",
        "sdpa_fa",
        "flash_attention_3",
        "flash_attention_2",
    ]
    assert of(cuda, "bf16", 0.0, True, True) == ["flex_attention", "flash_attention_3", "flash_attention_2"]
    assert of(cuda, "bf16", 0.0, True, False) == ["flash_attention_3", "flash_attention_2"]
    assert of(cuda, "fp32", 0.0, False, True) == []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert of(cuda, "bf16", 0.0, True, True) == ["flex_attention", "flash_attention_2"]


def test_a_run_takes_what_was_found(trial, capsys, monkeypatch):
    """As on a card: the rule's choice is replaced by the trial's, and the first line of the run says so."""
    config, times, tried = trial
    times["eager"] = 0.1
    rule = attention.choose_attention

    def as_on_a_card(config, accelerator, precision, is_compiled):
        class Card:
            device = type("Device", (), {"type": "cuda"})()
            is_main_process, print = True, staticmethod(print)

        return rule(config, Card, precision, is_compiled)

    monkeypatch.setattr(hardware, "choose_attention", lambda *args, **options: ("sdpa", "by rule"))
    monkeypatch.setattr(attention, "candidates", lambda *args: ["sdpa", "eager"])
    find = attention.fastest
    monkeypatch.setattr(attention, "fastest", lambda names, config, device, *rest: find(names, config, CPU, *rest))
    monkeypatch.setattr("gpt2_hf.training.build.choose_attention", as_on_a_card)
    run(config)
    out = capsys.readouterr().out
    assert "trying attention: sdpa, eager" in out
    assert "attention eager (fastest of those tried here, ms a block: eager 0.1, sdpa 1)" in out
    AcceleratorState._reset_state(reset_partial_state=True)


def test_what_is_asked_for_and_what_must_repeat_is_not_tried(data, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "candidates", lambda *args: pytest.fail("tried"))
    monkeypatch.setattr(hardware, "choose_attention", lambda requested, *args, **options: (requested, "by rule"))

    class Card:
        device = torch.device("cuda", 0)

    for changes in ({"model__attn_implementation": "eager"}, {"train__deterministic": True}):
        config = tiny(data, tmp_path / "run", **changes)
        name, why = attention.choose_attention(config, Card, "bf16", True)
        assert why == "by rule" and name == config.model.attn_implementation


def test_a_name_that_cannot_work_is_one_line(data, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.attn_implementation: flash_attention_2 needs CUDA, this is cpu"):
        run(tiny(data, tmp_path / "run", model__attn_implementation="flash_attention_2"))
