"""Checkpoints: whole or absent, checked, rotated."""

import json

import pytest
import torch
from torch import nn

from gpt2_hf import checkpoint
from gpt2_hf.config import OptimSection
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.optim import build_optimizers


def write(path):
    (path / "sub").mkdir()
    (path / "a.bin").write_bytes(b"abc")
    (path / "sub" / "b.txt").write_text("text")


def test_written_folder_is_whole_and_replaces_the_old(tmp_path):
    folder = tmp_path / "step-00000010"
    for _ in range(2):
        checkpoint.write_folder(folder, write)
        assert checkpoint.damage(folder) is None
        assert {p.name for p in folder.rglob("*")} == {"sub", "a.bin", "b.txt", "manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


def test_an_error_while_writing_leaves_the_old_one(tmp_path):
    folder = tmp_path / "step-00000010"
    checkpoint.write_folder(folder, write)

    def fail(path):
        write(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_folder(folder, fail)
    assert checkpoint.damage(folder) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "a.bin").write_bytes(b"ab"), "2 bytes instead of 3"),
        (lambda f: (f / "a.bin").write_bytes(b"abd"), "a.bin has changed"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_newest_whole_passes_over_damage_and_says_so(tmp_path, harm, words):
    for step in (10, 20):
        checkpoint.write_folder(tmp_path / f"step-{step:08d}", write)
    (tmp_path / ".step-00000030.writing").mkdir()
    assert checkpoint.newest_whole(tmp_path).name == "step-00000020"
    harm(tmp_path / "step-00000020")
    said = []
    assert checkpoint.newest_whole(tmp_path, said.append).name == "step-00000010"
    assert len(said) == 1 and words in said[0]
    assert checkpoint.newest_whole(tmp_path / "nothing") is None


def test_prune_keeps_the_last_and_every_nth(tmp_path):
    for step in range(10, 110, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / ".step-00000005.deleting").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, keep_every=40)
    assert list(checkpoint.saved_steps(tmp_path)) == [40, 80, 90, 100]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_returns_exactly_and_new_settings_win(tmp_path, name):
    def build(lr):
        torch.manual_seed(0)
        model = GPTForCausalLM(GPTConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=60000))
        return model, build_optimizers(model, OptimSection(name=name, lr=lr, muon_lr=lr), torch.device("cpu"))

    def update(model: nn.Module, optimizers, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()

    model, optimizers = build(1e-3)
    update(model, optimizers, 1)
    checkpoint.write_trainer_state(tmp_path, checkpoint.trainer_state(model, optimizers), {"step": 1})
    other, other_optimizers = build(1e-3)
    other.load_state_dict(model.state_dict())
    assert checkpoint.load_trainer_state(tmp_path, other, other_optimizers) == {"step": 1}
    assert json.loads((tmp_path / "trainer_state" / "state.json").read_text()) == {"step": 1}
    for m, o in ((model, optimizers), (other, other_optimizers)):
        update(m, o, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    changed, changed_optimizers = build(5e-4)
    checkpoint.load_trainer_state(tmp_path, changed, changed_optimizers)
    assert {g["peak_lr"] for o in changed_optimizers for g in o.param_groups} == {5e-4}
