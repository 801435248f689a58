"""A new run from weights that are there: theirs exactly, at step 0, recorded; and no longer needed afterwards."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from test_train import TORCHRUN, VOCAB, finish, launch, losses, run, tiny, with_steps
from test_train import clean_state as clean_state
from test_train import data as data
from transformers import GPT2LMHeadModel

from gpt2_hf import runs
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import read_rows
from gpt2_hf.training import initial
from gpt2_hf.training.checkpoint import read_state
from gpt2_hf.training.distributed import Host
from gpt2_hf.training.loop import train
from gpt2_hf.training.start import Start


@pytest.fixture
def first(data, tmp_path):
    """A finished run, whose weights others begin with."""
    config = tiny(data, tmp_path / "first", train__steps=5, optim__lr=1e-2, optim__warmup_steps=1, data__seq_len=64)
    run(config)
    return tmp_path / "first"


def begun_from(data, run_dir, source, **changes) -> RunConfig:
    settings = {"model__init_from": str(source), "data__seq_len": 64, "train__global_batch_tokens": 8 * 64}
    return tiny(data, run_dir, **{**settings, **changes})


def refusal(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as error:
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_first_loss_is_that_of_stock_gpt2_on_the_folder(first, data, tmp_path):
    config = begun_from(data, tmp_path / "second", first, train__steps=1, eval__val_every=1, eval__val_tokens=10**6)
    rows = run(config)
    stream = TokenStream(open_split(data, "val"), 64, seed=0, shuffle=False)
    windows = torch.from_numpy(stream.batch(0, stream.n_windows).astype(np.int64))
    stock = GPT2LMHeadModel.from_pretrained(first / "final").eval()
    with torch.no_grad():
        logits = stock(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert rows[0]["step"] == 0 and rows[0]["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert expected < 0.98 * np.log(VOCAB)  # random weights have that of guessing


def test_a_fresh_optimizer_and_the_first_steps_of_a_new_run(first, data, tmp_path):
    """Not a resumed run: warm-up, data and step begin anew, and the averages are those of its own few steps."""
    rows = run(begun_from(data, tmp_path / "second", first / "final", train__steps=2, checkpoint__save_every=2))
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["lr"] == pytest.approx(6e-4 / 10)
    state = read_state(tmp_path / "second" / "checkpoints" / "step-00000002")
    assert state["step"] == 2 and state["data_offset"] == 0
    hashed = runs.weights_hash(first / "final")
    assert state["init_from"] == {"name": str(first / "final"), "weights": hashed}
    assert json.loads((tmp_path / "second" / "environment.json").read_text())["init_from"]["weights"] == hashed
    assert read_rows(tmp_path / "second" / "starts.jsonl")[0]["init_from"]["weights"] == hashed


def test_a_run_without_it_is_as_it_was(data, tmp_path):
    run(tiny(data, tmp_path / "run", train__steps=2, checkpoint__save_every=2))
    assert "init_from" not in json.loads((tmp_path / "run" / "environment.json").read_text())
    assert read_state(tmp_path / "run" / "checkpoints" / "step-00000002")["init_from"] is None


def test_a_resumed_run_needs_the_folder_no_more_and_is_the_straight_one(first, data, tmp_path):
    flat = {"optim__min_lr_ratio": 1.0, "checkpoint__save_every": 2}
    straight = run(begun_from(data, tmp_path / "straight", first, train__steps=4, **flat))
    config = begun_from(data, tmp_path / "second", first, train__steps=2, **flat)
    run(config)
    shutil.rmtree(first)
    assert losses(run(with_steps(config, 4))) == losses(straight)
    second = load_file(tmp_path / "second" / "final" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "straight" / "final" / "model.safetensors").items():
        assert torch.equal(tensor, second[name]), name
    begun = read_state(tmp_path / "second" / "checkpoints" / "step-00000002")["init_from"]
    assert read_state(tmp_path / "second" / "checkpoints" / "step-00000004")["init_from"] == begun
    assert json.loads((tmp_path / "second" / "environment.json").read_text())["init_from"] == begun
    finished = run(with_steps(config, 4))  # nor does a run that is finished look for it
    assert losses(finished) == losses(straight)


@pytest.mark.parametrize("other", ["nowhere/else", None])
def test_another_beginning_is_another_run(first, data, tmp_path, other):
    config = begun_from(data, tmp_path / "second", first, train__steps=2, checkpoint__save_every=2)
    run(config)
    changed = dataclasses.replace(with_steps(config, 4), model=dataclasses.replace(config.model, init_from=other))
    line = refusal(changed)
    assert f"another model.init_from ({first}, now {other})" in line and "--resume.force model.init_from" in line


def test_bf16_weights_are_trained_in_fp32(first, data, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(first / "final", half)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", {"format": "pt"})
    run(begun_from(data, tmp_path / "second", half, train__steps=1))
    trained = load_file(tmp_path / "second" / "final" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"model__n_layer": 3}, "--model.n_layer 2"),
        ({"model__n_embd": 64, "model__n_positions": 128}, "--model.n_embd 32 --model.n_positions 64"),
        ({"model__vocab_size": 300}, f"--model.vocab_size {251}"),
        ({"model__n_head": 4}, "--model.n_head 2"),
    ],
)
def test_another_shape_is_refused_with_the_flags_to_set(first, data, tmp_path, changes, flags):
    line = refusal(begun_from(data, tmp_path / "second", first, **changes))
    assert line.endswith(f"set {flags}"), line
    assert not (tmp_path / "second").exists()


def test_a_published_size_is_named_by_its_preset():
    medium = GPTConfig.preset("gpt2-medium")
    assert initial._flags(RunConfig().model, medium) == "--model.preset gpt2-medium"
    wide = dataclasses.replace(RunConfig().model, n_embd=96, n_head=12)  # which a preset alone would not undo
    assert initial._flags(wide, medium) == "--model.n_layer 24 --model.n_head 16 --model.n_embd 1024"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no/such/folder/here", "there is no such folder; give a run, a folder, or a hub id"),
        ("somebody/no-such-model", "somebody/no-such-model: "),
        ("resume", "a run resumes by itself; leave it out"),
        ("scratch", "begins with random weights by itself; leave it out"),
    ],
)
def test_what_is_no_model_is_refused(data, tmp_path, name, says):
    assert says in refusal(begun_from(data, tmp_path / "second", name))
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("setting", [{"activation_function": "gelu"}, {"n_inner": 96}, {"layer_norm_epsilon": 1e-6}])
def test_what_no_recipe_can_keep_is_refused(data, tmp_path, setting):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 251}
    GPTForCausalLM(GPTConfig(**shape, **setting, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "odd")
    ((name, value),) = setting.items()
    assert f"has {name} {value}, which no recipe can have" in refusal(
        begun_from(data, tmp_path / "run", tmp_path / "odd")
    )


def test_another_tokenizer_is_refused(first, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(first / "final", other)
    for name in ("vocab.json", "merges.txt"):
        (other / name).unlink()
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["First"], vocab["Second"] = vocab["Second"], vocab["First"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another tokenizer than GPT-2's" in refusal(begun_from(data, tmp_path / "run", other))


def test_ranks_that_see_other_weights_under_one_name_do_not_begin(first, data, tmp_path):
    config = begun_from(data, tmp_path / "run", first)

    class TwoRanks(Host):
        def __init__(self) -> None:
            self.rank, self.world_size, self.group = 0, 2, None

        def gather(self, value):
            return [value, dataclasses.replace(value, weights="f" * 64)]

    with pytest.raises(ConfigError, match="has other weights on other machines: copy one folder to all"):
        initial.find_initial(config, Start(), TwoRanks())
    assert initial.find_initial(config, Start(tmp_path, 4), TwoRanks()) is None


def test_the_short_flag_means_the_same():
    long = parse_cli(RunConfig, ["--model.init_from", "openai-community/gpt2"])
    assert parse_cli(RunConfig, ["--init_from", "openai-community/gpt2"]) == long
    assert parse_cli(RunConfig, ["--init-from=openai-community/gpt2"]) == long
    assert long.model.init_from == "openai-community/gpt2" and RunConfig().model.init_from is None


def test_two_ranks_train_what_one_does(first, data, tmp_path):
    config = begun_from(data, tmp_path / "two", first, train__steps=2, train__micro_batch_size=4)
    one = losses(
        run(dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "one"))))
    )
    finish(launch(config, tmp_path, *TORCHRUN, "--nproc_per_node", "2"))
    assert losses(read_rows(tmp_path / "two" / "metrics.jsonl")) == pytest.approx(one, rel=1e-6)
