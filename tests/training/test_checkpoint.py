"""The state of the optimizers: saved and back, bit for bit."""

import json

import pytest
import torch
from accelerate import PartialState
from torch import nn

from gpt2_hf.config import OptimSection, RunConfig, TrainSection
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import write_folder
from gpt2_hf.training import checkpoint
from gpt2_hf.training.distributed import Host
from gpt2_hf.training.optim import build_optimizers
from gpt2_hf.training.start import find_start


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
    host = Host(PartialState(cpu=True))
    checkpoint.write_trainer_state(tmp_path, checkpoint.optimizer_tensors(model, optimizers), {"step": 1}, host)
    other, other_optimizers = build(1e-3)
    other.load_state_dict(model.state_dict())
    assert checkpoint.load_trainer_state(tmp_path, other, other_optimizers, host) == {"step": 1}
    assert json.loads((tmp_path / "trainer_state" / "state.json").read_text()) == {"step": 1}
    for m, o in ((model, optimizers), (other, other_optimizers)):
        update(m, o, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    changed, changed_optimizers = build(5e-4)
    checkpoint.load_trainer_state(tmp_path, changed, changed_optimizers, host)
    assert {g["peak_lr"] for o in changed_optimizers for g in o.param_groups} == {5e-4}


def test_a_model_under_a_checkpoints_name_is_refused_in_a_line(tmp_path):
    """It is whole, so it would be gone on from; but it does not say of which run it is."""
    config = RunConfig(train=TrainSection(run_dir=str(tmp_path)))
    folder = tmp_path / "checkpoints" / "step-00000010"
    write_folder(folder, lambda path: (path / "model.safetensors").write_text("weights"))
    with pytest.raises(ConfigError, match=r"no run can go on from it: trainer_state/state\.json cannot be read"):
        find_start(config, None, Host(PartialState(cpu=True)))
