"""Versions: one table of what was tested, and what happens with a release that is newer."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from test_model import pair
from test_train import clean_state, data, losses, run, tiny  # noqa: F401  the first two are fixtures
from transformers import GenerationMixin

from gpt2_hf.model import GPTForCausalLM, modeling_gpt, versions
from gpt2_hf.model.modeling_gpt import GPTModel
from gpt2_hf.model.versions import OLDEST, TESTED, check_loss

ROOT = Path(__file__).parents[1]
WINDOWS = torch.arange(3 * 40).view(3, 40) * 7 % 211


@pytest.fixture
def newer(monkeypatch):
    """As on the day after a release of transformers."""
    installed = {name: "99.1" if name == "transformers" else tested for name, tested in TESTED.items()}
    monkeypatch.setattr(versions, "version", installed.__getitem__)
    versions.untested.cache_clear()
    yield
    versions.untested.cache_clear()


def no_context():
    return torch.autocast("cpu", enabled=False)


def test_setup_constraints_and_readme_agree_with_the_table():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    bounds = {r.name: str(r.specifier) for r in map(Requirement, setup["options"]["install_requires"].split())}
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    readme = (ROOT / "README.md").read_text()
    for name, tested in TESTED.items():
        assert bounds[name] == f">={OLDEST[name]}"
        assert Version(OLDEST[name]) <= Version(pins[name]) <= Version(tested)
        assert re.search(rf"{name} {re.escape(OLDEST[name])} to {re.escape(tested)}\b", readme), name
    python = setup["options"]["python_requires"]
    assert python == ">=3.11" and "Python 3.11" in readme
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"] == "3.11"


def test_every_requirement_with_a_pin_admits_it():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().splitlines() if "==" in line
    )
    extras = [*setup["options.extras_require"].values(), setup["options"]["install_requires"]]
    for line in "\n".join(extras).split():
        requirement = Requirement(line)
        for name in (requirement.name, requirement.name.replace("-", "_")):
            assert name not in pins or Version(pins[name]) in requirement.specifier, line


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({}, ""),
        ({"torch": "2.13.0+cpu"}, ""),
        ({"torch": "2.11.0a0+git1", "transformers": "5.17.0", "accelerate": None}, ""),
        ({"transformers": "99.0.dev0", "torch": "2.98.1+cu130"}, "torch 2.98.1+cu130, transformers 99.0.dev0"),
        ({"accelerate": "98.0"}, "accelerate 98.0"),
    ],
    ids=str,
)
def test_what_is_newer_than_tested_is_named(installed, found, monkeypatch):
    def version(name: str) -> str:
        if installed.get(name, "") is None:
            raise versions.PackageNotFoundError(name)
        return installed.get(name, TESTED[name])

    monkeypatch.setattr(versions, "version", version)
    versions.untested.cache_clear()
    assert versions.untested() == found
    versions.untested.cache_clear()


def forgets_the_cache(self, *args, past_key_values=None, cache=None, **kwargs):
    return FORWARD(self, *args, **kwargs)


FORWARD = GPTModel.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_generation_with_a_newer_release_is_checked_and_leaves_no_trace(dtype, training, newer):
    ours, stock = pair(resid_pdrop=0.5)
    ours.to(dtype), stock.to(dtype)
    prompt = WINDOWS[:, :5]
    ours.train(training)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ours.generate(prompt[:1], max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert ours._generation_is_checked and ours.training == training
    if not training:  # in training, generation itself draws for dropout
        assert torch.equal(torch.get_rng_state(), before)
    ours.eval()
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(ours.generate(prompt, **settings), stock.generate(prompt, **settings))


@pytest.mark.parametrize("training", [False, True])
def test_a_cache_that_is_passed_by_is_an_error_that_names_the_versions(training, newer, monkeypatch):
    ours, _ = pair()
    monkeypatch.setattr(GPTModel, "forward", forgets_the_cache)
    ours.train(training)
    with pytest.raises(ImportError, match=r"transformers 99\.1.*transformers 5.*install the tested versions") as caught:
        ours.generate(WINDOWS[:, :5], max_new_tokens=3, do_sample=False)
    assert len(str(caught.value).splitlines()) == 1 and ours.training == training


def test_tested_versions_are_not_checked(monkeypatch):
    monkeypatch.setattr(versions, "version", TESTED.__getitem__)
    versions.untested.cache_clear()
    monkeypatch.setattr(versions, "_compare", lambda *_: pytest.fail("compared"))
    ours, _ = pair()
    ours.generate(WINDOWS[:1, :5], max_new_tokens=2, do_sample=False, pad_token_id=0)
    check_loss(ours, WINDOWS, no_context())
    versions.untested.cache_clear()


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_the_loss_with_a_newer_release_is_checked_and_leaves_no_trace(fields, attn_implementation, newer):
    ours, _ = pair(attn_implementation, **fields)
    ours.config.resid_pdrop = 0.5
    ours.train()
    weights = {name: p.clone() for name, p in ours.named_parameters()}
    compiled = [block.compile(backend="eager") for block in ours.transformer.h]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    before = torch.get_rng_state()
    for enabled in (False, True):
        check_loss(ours, WINDOWS, torch.autocast("cpu", torch.bfloat16, enabled=enabled))
    assert torch.equal(torch.get_rng_state(), before) and ours.training and len(compiled) == 3
    assert not torch._dynamo.utils.counters["stats"]
    for name, p in ours.named_parameters():
        assert p.grad is None and torch.equal(p, weights[name])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("what", ["loss", "attention", "nan"])
def test_another_loss_than_stocks_is_an_error_that_names_the_versions(what, bf16, newer, monkeypatch):
    ours, _ = pair()
    if what == "loss":  # labels one place off
        right = modeling_gpt.linear_cross_entropy
        monkeypatch.setattr(
            modeling_gpt, "linear_cross_entropy", lambda x, w, labels, *rest: right(x, w, labels.roll(1, 1), *rest)
        )
    elif what == "attention":
        for block in ours.transformer.h:
            block.attn.scaling *= 4
    else:
        monkeypatch.setattr(
            modeling_gpt, "linear_cross_entropy", lambda x, w, labels, *_: torch.full(labels.shape, torch.nan)
        )
    with pytest.raises(ImportError, match=r"loss differs from stock.*transformers 99\.1"):
        check_loss(ours, WINDOWS, torch.autocast("cpu", torch.bfloat16, enabled=bf16))


def test_code_that_travelled_names_the_version_that_it_needs(tmp_path):
    """Under an older transformers, which knows its own version by its metadata."""
    pair()[0].save_pretrained(tmp_path / "model", with_code=True)
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
    assert f"transformers>={OLDEST['transformers']}" in result.stdout, result.stderr
    assert "5.0.0" in result.stdout and "stock GPT-2" in result.stdout


def test_generate_has_the_signature_of_transformers():
    assert inspect.signature(GPTForCausalLM.generate) == inspect.signature(GenerationMixin.generate)


def test_a_run_with_a_newer_release_has_the_same_curve(tmp_path, request, monkeypatch):
    shards = request.getfixturevalue("data")
    changes = {"model__dropout": 0.2, "train__steps": 3}
    expected = losses(run(tiny(shards, tmp_path / "a", **changes)))
    request.getfixturevalue("newer")
    compared = []
    monkeypatch.setattr(versions, "_compare", lambda what, *_: compared.append(what))
    assert losses(run(tiny(shards, tmp_path / "b", **changes))) == expected
    assert len(compared) == 1


def test_a_run_stops_where_its_loss_is_another_than_stocks(tmp_path, request, newer, monkeypatch):
    right = modeling_gpt.linear_cross_entropy
    monkeypatch.setattr(
        modeling_gpt, "linear_cross_entropy", lambda x, w, labels, *rest: right(x, w, labels.roll(1, 1), *rest)
    )
    with pytest.raises(ImportError, match="the training loss differs"):
        run(tiny(request.getfixturevalue("data"), tmp_path / "run"))
