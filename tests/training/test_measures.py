"""Which measurements are taken when, and that they are those of the rooms that make them."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from gpt2_hf.config import DataSection, EvalSection, ModelSection, RunConfig, TrainSection
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.model import GPTForCausalLM
from gpt2_hf.training.measures import Measures


@pytest.fixture
def measures(make_shards):
    """Validation after every 2nd step of 9, samples after every 3rd."""
    documents = [[int(token) for token in np.arange(start, start + 60) % 250] for start in range(9)]
    folder = make_shards({"train": [documents], "val": [documents]})
    config = RunConfig(
        model=ModelSection("gpt2", n_layer=1, n_head=2, n_embd=16, n_positions=32),
        data=DataSection(path=str(folder), seq_len=16),
        train=TrainSection(steps=9, micro_batch_size=4, global_batch_tokens=64),
        eval=EvalSection(
            val_every=2, val_tokens=160, hellaswag_every=0, sample_every=3, sample_count=2, sample_tokens=4
        ),
    )
    torch.manual_seed(0)
    model = GPTForCausalLM(config.model.gpt_config())
    yield (
        Measures(config, Accelerator(cpu=True), model, load_tokenizer(), open_split(folder, "val"), torch.float32),
        model,
        folder,
    )
    AcceleratorState._reset_state(reset_partial_state=True)


def test_each_is_taken_at_its_interval_and_all_after_the_last_step(measures):
    taken, *_ = measures
    validation, samples = {"val_loss", "val_bpb"}, {"samples"}
    expected = {0: validation, 1: set(), 2: validation, 3: samples, 6: validation | samples, 9: validation | samples}
    assert {step: taken.take(step).keys() for step in expected} == expected
    assert [step for step in range(1, 10) if taken.any_due(step)] == [2, 3, 4, 6, 8, 9]


def test_the_validation_loss_is_that_of_the_first_windows_in_order(measures):
    taken, model, folder = measures
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob("val/*.ds"))]).astype(np.int64)
    windows = torch.from_numpy(np.stack([tokens[16 * k : 16 * k + 17] for k in range(10)]))
    with torch.no_grad():
        logits = model.double()(windows[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        model.float()
    assert taken.take(2)["val_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_measuring_changes_nothing(measures):
    taken, model, _ = measures
    model.train()
    weights, random_state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    taken.take(6)
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
