"""What this machine cannot do is refused before a run makes anything."""

import pytest
import torch

from gpt2_hf.config import EvalSection, ModelSection, OptimSection, RunConfig, TrainSection
from gpt2_hf.data.tokenizer import gpt2_tokenizer
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.training.preflight import (
    check_attention,
    check_devices,
    check_environment,
    check_launcher,
    check_memory,
    check_prompt,
    memory_of,
)

GB = 10**9


@pytest.mark.parametrize(
    "shape",
    [{"n_embd": 10**9, "n_head": 1}, {"n_positions": 10**9}, {"vocab_size": 10**12}, {"n_layer": 10**6}],
    ids=lambda shape: next(iter(shape)),
)
def test_a_model_that_memory_cannot_hold_is_refused(shape):
    config = RunConfig(model=ModelSection(**shape))
    with pytest.raises(ConfigError, match=r"parameters.* GB, and there are 24.0 GB here"):
        check_memory(config, 24 * GB, 1)


@pytest.mark.parametrize(("name", "ema", "copies"), [("adamw", 0, 4), ("muon", 0, 3), ("adamw", 0.1, 5)])
def test_the_limit_is_the_size_of_the_parameters(name, ema, copies):
    config = RunConfig(model=ModelSection(n_layer=2, n_embd=96, n_head=4), optim=OptimSection(name=name, ema=ema))
    with torch.device("meta"):
        model = GPTForCausalLM(GPTConfig(n_layer=2, n_embd=96, n_head=4))
    needed = 4 * copies * sum(parameter.numel() for parameter in model.parameters())
    check_memory(config, needed, 1)
    with pytest.raises(ConfigError):
        check_memory(config, needed - 1, 1)
    check_memory(config, needed // 2, 2, n_shards=2)


def test_a_step_of_more_tokens_than_memory_is_refused():
    config = RunConfig(train=TrainSection(global_batch_tokens=2**39))
    with pytest.raises(ConfigError, match=r"train\.global_batch_tokens"):
        check_memory(config, 24 * GB, 1)


def test_the_sizes_of_openai_fit_a_usual_machine():
    check_memory(RunConfig(), 8 * GB, 1)
    check_memory(RunConfig(model=ModelSection(preset="gpt2-xl")), 40 * GB, 1)
    assert memory_of(torch.device("cpu")) > GB / 2


@pytest.mark.parametrize("name", ["foo", "", "SDPA", "flash", "kernels community"])
def test_unknown_attention_is_refused(name):
    with pytest.raises(ConfigError, match=r"choose auto, eager.*sdpa"):
        check_attention(name)


@pytest.mark.parametrize("name", ["auto", "eager", "sdpa", "flex_attention", "blockwise"])
def test_known_attention_passes(name):
    check_attention(name)


def test_a_prompt_longer_than_the_model_is_refused():
    model = ModelSection(n_positions=1024)
    check_prompt(RunConfig(model=model, eval=EvalSection(sample_prompt="a " * 500)), gpt2_tokenizer())
    check_prompt(RunConfig(model=model, eval=EvalSection(sample_prompt="a " * 2000, sample_every=0)), gpt2_tokenizer())
    with pytest.raises(ConfigError, match=r"eval.sample_prompt has .* tokens"):
        check_prompt(RunConfig(model=model, eval=EvalSection(sample_prompt="a " * 2000)), gpt2_tokenizer())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("RANK", ""), ("LOCAL_RANK", "1.5"),
        ("OMP_NUM_THREADS", "abc"), ("OMP_NUM_THREADS", "0"), ("MASTER_PORT", "99999999"),
        ("ACCELERATE_MIXED_PRECISION", "fp99"), ("ACCELERATE_DYNAMO_BACKEND", "foo"),
    ],
)  # fmt: skip
def test_a_broken_environment_is_named(name, value, monkeypatch):
    check_environment()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"environment variable {name} is"):
        check_environment()


def test_an_environment_as_launchers_make_it_passes(monkeypatch):
    launcher = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    ours = {"OMP_NUM_THREADS": "1,1", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    for name, value in (launcher | ours).items():
        monkeypatch.setenv(name, value)
    check_environment()


def test_a_launcher_that_does_not_fit_the_machine_is_refused():
    eight = {"LOCAL_WORLD_SIZE": "8"}
    check_devices(8, eight)
    check_devices(0, {})
    check_devices(0, eight | {"ACCELERATE_USE_CPU": "true"})
    with pytest.raises(ConfigError, match=r"started 8 processes on \S+, which has no CUDA device: use .*cpu\.yaml"):
        check_devices(0, eight)
    with pytest.raises(ConfigError, match=r"which has 2 CUDA devices: use --num_processes 2"):
        check_devices(2, eight)
    check_launcher({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    with pytest.raises(ConfigError, match=r"FSDP's version 1 .*set FSDP_VERSION=2"):
        check_launcher({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})
