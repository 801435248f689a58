"""Under releases that are newer than the newest tested, wrong results become an error that names the versions."""

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from test_train import data as data  # a fixture
from test_train import losses, run, tiny

from gpt2_hf.model import GPTConfig, GPTForCausalLM, modeling_gpt, versions
from gpt2_hf.model.loss import LossKernels

ROOT = Path(__file__).parents[2]


@pytest.fixture
def newer(monkeypatch):
    """As on the day after a release of transformers."""
    monkeypatch.setitem(versions.NEWEST_TESTED, "transformers", "5.0.0")
    monkeypatch.setattr(GPTForCausalLM, "_generation_compared", False)


def model(**settings) -> GPTForCausalLM:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=101, **settings)
    return GPTForCausalLM(config).eval()


def draw(gpt: GPTForCausalLM) -> list[int]:
    torch.manual_seed(1)
    tokens = torch.tensor([[5, 6, 7]])
    return gpt.generate(tokens, max_new_tokens=8, do_sample=True, pad_token_id=0)[0].tolist()


def test_one_table_of_versions():
    """The pins are what was tested last; the bounds admit them, and the README names both."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    lowest = dict(re.findall(r"^ +(torch|transformers|accelerate)>=(\S+)$", (ROOT / "setup.cfg").read_text(), re.M))
    readme = (ROOT / "README.md").read_text()
    assert versions.NEWEST_TESTED.keys() == lowest.keys()
    for name, newest in versions.NEWEST_TESTED.items():
        assert pins[name] == newest
        assert Version(lowest[name]) <= Version(newest)
        assert re.search(rf"\| {name} \| {re.escape(lowest[name])} \| {re.escape(newest)} \|", readme), name


def test_every_bound_admits_its_pin():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pins = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower().replace("_", "-"), re.M)
    )
    listed = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for requirement in map(Requirement, "\n".join(listed).split()):
        pin = pins.get(requirement.name.replace("_", "-"))
        assert pin is None or Version(pin) in requirement.specifier, requirement
    for name in ("evaluate", "tokenizers"):
        assert name in pins


def test_code_that_travelled_names_the_version_that_it_needs(tmp_path):
    """Under an older transformers, which knows its own version by its metadata."""
    model().save_pretrained(tmp_path / "model", with_code=True)
    program = f"""
import importlib.metadata, sys
class Hide:
    def find_spec(self, name, *rest):
        if name.split('.')[0] == 'gpt2_hf': raise ImportError(name)
sys.meta_path.insert(0, Hide())
from transformers import AutoModelForCausalLM
installed = importlib.metadata.version
importlib.metadata.version = lambda name: '5.0.0' if name == 'transformers' else installed(name)
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    oldest = re.search(r"^ +(transformers>=\S+)$", (ROOT / "setup.cfg").read_text(), re.M)
    assert f"{oldest[1]} is required" in result.stdout, result.stderr
    assert "5.0.0" in result.stdout and "stock GPT-2" in result.stdout


def test_what_is_untested_is_named(monkeypatch):
    for name in versions.NEWEST_TESTED:
        monkeypatch.setitem(versions.NEWEST_TESTED, name, "999")
    assert versions.untested() == ""
    monkeypatch.setitem(versions.NEWEST_TESTED, "accelerate", "1.0.0")
    assert versions.untested() == f"accelerate {version('accelerate')} (1.0.0)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_generation_is_as_it_was(newer, monkeypatch, dtype):
    checked, compare = [], modeling_gpt.compare_cached
    monkeypatch.setattr(modeling_gpt, "compare_cached", lambda *args: checked.append(compare(*args)))
    gpt = model().to(dtype).train()
    first, second = draw(gpt), draw(gpt)
    assert first == second and len(checked) == 1 and gpt.training


def test_a_cache_that_is_lost_is_an_error(newer, monkeypatch):
    """As happened with transformers 5.24: the cache came under a name that the model did not know."""
    forward = GPTForCausalLM.forward

    def deaf(self, *args, cache=None, past_key_values=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPTForCausalLM, "forward", deaf)
    with pytest.raises(ImportError, match=rf"transformers {version('transformers')} \(5.0.0\)"):
        draw(model())


def test_nothing_is_checked_under_tested_releases(monkeypatch):
    monkeypatch.setattr(modeling_gpt, "untested", lambda: "")
    monkeypatch.setattr(GPTForCausalLM, "_generation_compared", False)
    monkeypatch.setattr(modeling_gpt, "compare_cached", None)  # would raise
    draw(model())


@pytest.mark.parametrize("changes", [{}, {"model__dropout": 0.1, "data__document_mask": True}])
def test_a_sound_run_is_as_it_was(newer, data, tmp_path, changes):
    checked = losses(run(tiny(data, tmp_path / "checked", train__steps=2, **changes)))
    versions.NEWEST_TESTED["transformers"] = "999"
    assert losses(run(tiny(data, tmp_path / "plain", train__steps=2, **changes))) == checked


@pytest.mark.parametrize("what", ["loss", "attention"])
def test_a_wrong_first_step_is_an_error(newer, data, tmp_path, monkeypatch, what):
    if what == "loss":
        kernel = LossKernels.exponentiate
        monkeypatch.setattr(LossKernels, "exponentiate", staticmethod(lambda *a: tuple(1.1 * x for x in kernel(*a))))
    else:
        block = modeling_gpt.GPTAttention.forward
        monkeypatch.setattr(
            modeling_gpt.GPTAttention,
            "forward",
            lambda self, x, *args, **kwargs: block(self, x.flip(1), *args, **kwargs),
        )
    with pytest.raises(ImportError, match="first training step"):
        run(tiny(data, tmp_path / "run", train__steps=3, train__check_kernels=what != "loss"))
