"""A run that begins with the weights of another model: any GPT-2, by the same loop, and without it when resumed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import write_shards
from safetensors.torch import load_file
from test_train import clean_state as clean_state
from test_train import losses, run, tiny, with_steps
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from gpt2_hf import runs
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.knobs import ConfigError
from gpt2_hf.training.build import build_accelerator, build_model, zero_residuals

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = np.random.Generator(np.random.Philox(9))
    documents = {
        split: [[rng.integers(0, 90, 60).tolist() for _ in range(n)]] for split, n in (("train", 40), ("val", 8))
    }
    return write_shards(tmp_path_factory.mktemp("data"), documents)


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """What stock transformers saves of a GPT-2 that is not quite OpenAI's: the exact GELU, a wide inner layer."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(5)
    config = GPT2Config(**SHAPE, activation_function="gelu", n_inner=96, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


def going_on(data: Path, run_dir: Path, source: Path, **changes) -> RunConfig:
    settings = {
        "model__vocab_size": None,
        "model__init_from": str(source),
        "eval__val_every": 2,
        "eval__val_tokens": 320,
    }
    return tiny(data, run_dir, **(settings | {"train__steps": 4, "checkpoint__save_every": 2} | changes))


def stock_loss(folder: Path, data: Path, n_windows: int) -> float:
    """The mean loss of stock transformers over the first windows of the validation split."""
    tokens = np.concatenate([shard.tokens() for shard in open_split(data, "val").shards]).astype(np.int64)
    windows = torch.stack([torch.from_numpy(tokens[32 * i : 32 * i + 33]) for i in range(n_windows)])
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits.double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def test_any_gpt2_is_trained_on_as_what_it_is(data, stock, tmp_path):
    rows = run(going_on(data, tmp_path / "run", stock))
    assert rows[0]["step"] == 0
    assert rows[0]["val_loss"] == pytest.approx(stock_loss(stock, data, 10), abs=1e-5)
    assert rows[-1]["val_loss"] == pytest.approx(stock_loss(tmp_path / "run" / "final", data, 10), abs=1e-5)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.03
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert (config["activation_function"], config["n_inner"], config["dtype"]) == ("gelu", 96, "float32")
    (start,) = runs.read_rows(tmp_path / "run" / "starts.jsonl")
    assert start["init_from"] == {"source": str(stock), "version": runs.weights_hash(stock)}


def test_a_resumed_run_needs_the_first_weights_no_more(data, stock, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stock, source)
    config = going_on(data, tmp_path / "run", source)
    straight = run(going_on(data, tmp_path / "straight", source))
    run(with_steps(config, 2))
    shutil.rmtree(source)
    assert losses(run(config)) == losses(straight)
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("run", "straight"))
    assert all(torch.equal(a[name], b[name]) for name in a | b)


def test_weights_of_half_precision_are_trained_in_full(data, stock, tmp_path):
    GPT2LMHeadModel.from_pretrained(stock, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    rows = run(going_on(data, tmp_path / "run", tmp_path / "half", train__steps=1))
    assert rows[0]["val_loss"] == pytest.approx(stock_loss(stock, data, 10), abs=0.05)
    saved = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["dtype"] == "float32"


def test_a_run_goes_on_from_a_run(data, stock, tmp_path):
    run(going_on(data, tmp_path / "first", stock, train__steps=2))
    rows = run(going_on(data, tmp_path / "second", tmp_path / "first", train__steps=2))
    assert rows[0]["val_loss"] == pytest.approx(stock_loss(tmp_path / "first" / "final", data, 10), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__n_layer": 3}, "another shape than the recipe's model: --model.n_layer 2$"),
        ({"model__n_embd": 64, "model__n_positions": 32}, "--model.n_embd 32 --model.n_positions 64"),
        ({"model__init_from": "no/such"}, r"model.init_from no/such \(no such folder, so looked for on the Hub\)"),
        ({"model__init_from": "empty"}, "empty holds no model"),
    ],
)
def test_what_cannot_be_begun_with_is_one_line_and_makes_nothing(data, stock, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=said):
        run(going_on(data, tmp_path / "run", stock, **changes))
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_refused(data, stock, tmp_path):
    shutil.copytree(stock, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(stock)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="another tokenizer than GPT-2's"):
        run(going_on(data, tmp_path / "run", tmp_path / "other"))


def test_first_weights_are_the_run_s_own(data, stock, tmp_path):
    """They are part of what a run is: it cannot be told others later on."""
    run(going_on(data, tmp_path / "run", stock, model__init_from=None, train__steps=2))
    with pytest.raises(ConfigError, match=r"another model.init_from \(None, now .*--resume.force model.init_from"):
        run(going_on(data, tmp_path / "run", stock))


def test_the_short_name():
    short, long = (
        parse_cli(RunConfig, [flag, "openai-community/gpt2"]) for flag in ("--init_from", "--model.init_from")
    )
    assert short == long
    assert short.model.init_from == "openai-community/gpt2"


def test_with_zero_init_blocks_begin_as_the_identity(data, tmp_path):
    def begin():
        config = tiny(data, tmp_path / "run")
        PartialState(cpu=True)
        return build_model(config, None, build_accelerator(config, "fp32"), "fp32")

    plain, zeroed = begin(), begin()
    zero_residuals(zeroed)
    for (name, a), (_, b) in zip(plain.named_parameters(), zeroed.named_parameters(), strict=True):
        assert torch.equal(b, torch.zeros_like(b) if name.endswith("c_proj.weight") else a), name
    zeroed.save_pretrained(tmp_path / "zeroed")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "zeroed")
    first, *others = stock(torch.arange(32)[None], output_hidden_states=True).hidden_states
    norm = stock.transformer.ln_f
    assert all(torch.equal(other, first) or torch.equal(other, norm(first)) for other in others)

    config = tiny(data, tmp_path / "run", model__zero_init=True, train__steps=1, model__vocab_size=None)
    run(config)  # from zero a step of AdamW leads no further than its rate
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    moved = [weight.abs().max() for name, weight in after.items() if name.endswith("c_proj.weight")]
    assert len(moved) == 4 and min(moved) > 0 and max(moved) < 1.01 * config.optim.lr
