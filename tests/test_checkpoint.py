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


def model_folder(path, weights, **files):
    """A folder as a run writes it, with ``weights`` for weights."""

    def write(folder):
        for name, content in ({"config.json": "{}", "model.safetensors": weights} | files).items():
            (folder / name).write_text(content)

    checkpoint.write_folder(path, write)


def test_the_model_of_a_run_is_its_final_unless_there_is_a_newer_one(tmp_path):
    run, said = tmp_path / "run", []
    final, steps = run / "final", run / "checkpoints"

    def find():
        said.clear()
        return checkpoint.find_model(run, said.append)

    for folder in (run, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder|no config\.json"):
            checkpoint.find_model(folder)
    model_folder(steps / "step-00000010", "ten")
    assert find() == steps / "step-00000010" and said == [f"{run} is a run: taking {find()}, as final is not there"]
    model_folder(steps / "step-00000020", "twenty")
    model_folder(final, "twenty", **{"tokenizer.json": "{}"})
    assert find() == final and said == [f"{run} is a run: taking {final}"]
    assert checkpoint.find_model(final) == final

    model_folder(steps / "step-00000070", "seventy")  # trained on, and killed
    assert find() == steps / "step-00000070" and "as final has other weights than step-00000070" in said[-1]
    assert checkpoint.find_model(final) == final  # by its own name it is taken as it is
    (steps / "step-00000070" / "model.safetensors").write_text("dam")
    assert find() == final and "damaged" in said[0]

    (final / "model.safetensors").write_text("dam")
    assert find() == steps / "step-00000020" and "as final is damaged: model.safetensors has 3 bytes" in said[-1]
    for path in checkpoint.saved_steps(steps).values():
        (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint, and final is damaged"):
        find()
    model_folder(final, "all that was kept")
    assert find() == final


def test_folders_without_weights_or_manifest_are_not_the_same(tmp_path):
    for name in ("a", "b"):
        checkpoint.write_folder(tmp_path / name, write)
    assert not checkpoint.same_weights(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        model_folder(tmp_path / name, "same")
    assert checkpoint.same_weights(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "manifest.json").unlink()
    assert not checkpoint.same_weights(tmp_path / "a", tmp_path / "b")


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
