import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.evaluation.generate import PROMPT, sample_text
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import newest_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model() -> GPTForCausalLM:
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig(n_layer=2, n_embd=16, n_head=2, n_positions=24, initializer_range=0.5))


def test_samples_depend_on_the_seed_alone(model, tokenizer):
    torch.manual_seed(1)
    first = sample_text(model, tokenizer, max_new_tokens=10, n_samples=3, seed=7)
    torch.manual_seed(2)
    assert sample_text(model, tokenizer, max_new_tokens=10, n_samples=3, seed=7) == first
    assert sample_text(model, tokenizer, max_new_tokens=10, n_samples=3, seed=8) != first
    assert len(set(first)) == 3
    assert all(text.startswith(PROMPT) for text in first)


@pytest.mark.parametrize("training", [True, False])
def test_random_state_and_train_mode_stay(model, tokenizer, training):
    model.train(training)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    sample_text(model, tokenizer, max_new_tokens=4, n_samples=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == model.transformer.training == training

    def fails(*_):
        raise RuntimeError("stop")

    hook = model.transformer.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="stop"):
        sample_text(model, tokenizer, max_new_tokens=4, n_samples=1)
    hook.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training


def test_greedy_follows_the_likeliest_token(model, tokenizer):
    tokens = tokenizer.encode("To be")
    model.eval()
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    greedy = sample_text(model, tokenizer, "To be", max_new_tokens=6, n_samples=2, temperature=0)
    assert greedy == [tokenizer.decode(tokens, skip_special_tokens=True)] * 2
    assert sample_text(model, tokenizer, "To be", max_new_tokens=6, n_samples=1, top_k=1) == greedy[:1]


def test_text_ends_where_the_positions_do(model, tokenizer):
    seen = []
    hook = model.transformer.wpe.register_forward_hook(lambda _, positions, __: seen.append(int(positions[0].max())))
    sample_text(model, tokenizer, max_new_tokens=1000, n_samples=4)
    hook.remove()
    assert max(seen) <= 22  # the 24th token is drawn, but never read
    with pytest.raises(ValueError, match="the prompt has 24 tokens, the model 24"):
        sample_text(model, tokenizer, " the" * 24)


def test_empty_prompt_starts_a_document(model, tokenizer):
    assert len(sample_text(model, tokenizer, "", max_new_tokens=4, n_samples=2)) == 2


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"n_samples": 0}, {"top_k": -1}, {"temperature": -0.5}])
def test_wrong_numbers_are_refused(model, tokenizer, wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} {wrong[name]}"):
        sample_text(model, tokenizer, **wrong)


def make_folder(path: Path, age: int, *files: str) -> Path:
    path.mkdir(parents=True)
    for file in files:
        (path / file).touch()
        os.utime(path / file, (10**9 - age, 10**9 - age))
    return path


def test_newest_run_is_the_checkpoint_written_last(tmp_path):
    assert newest_run(tmp_path / "runs") is None
    whole = ("config.json", "model.safetensors")
    old = make_folder(tmp_path / "runs/a/final", 50, *whole)
    assert newest_run(tmp_path / "runs") == old
    newer = make_folder(tmp_path / "runs/b/checkpoints/step-00000010", 20, *whole)
    make_folder(tmp_path / "runs/b/checkpoints/.step-00000020.writing", 5, *whole)
    make_folder(tmp_path / "runs/b/checkpoints/step-00000030", 5, "config.json")
    assert newest_run(tmp_path / "runs") == newer
    newest = make_folder(tmp_path / "runs/b/final", 1, *whole)
    assert newest_run(tmp_path / "runs") == newest


def run_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_takes_the_newest_run(model, monkeypatch, tmp_path, capsys):
    model.save_pretrained(tmp_path / "runs" / "demo" / "final")
    monkeypatch.chdir(tmp_path)
    run_script(["-p", "To be", "-m", "4", "-n", "2"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/demo/final:"
    assert sum(line.startswith("> To be") for line in lines) == 2


def test_script_without_a_run_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    preset = GPTConfig(n_layer=1, n_embd=8, n_head=1)
    monkeypatch.setattr("gpt2_hf.model.GPTConfig", lambda: preset)
    run_script(["-m", "2", "-n", "1"], monkeypatch)
    out = capsys.readouterr().out
    assert "untrained GPT-2 124M" in out and f"> {PROMPT}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/nothing/final"], "no folder runs/nothing/final"),
        (["nobody/nothing"], "cannot load nobody/nothing"),
        (["model", "-p", " the" * 24], "shorten the prompt"),
        (["model", "-n", "0"], "samples is 0, and must be >= 1"),
        (["model", "-m", "many"], "max_tokens"),
        (["model", "--sample", "3"], "--sample"),
    ],
)
def test_script_says_what_is_wrong_in_one_line(model, arguments, message, monkeypatch, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run_script(arguments, monkeypatch)
    assert exit.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
