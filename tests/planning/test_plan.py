"""Predictions beside what is counted on real tensors and what was measured; choices that follow from them."""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import run, tiny

from gpt2_hf import hardware
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import GPTForCausalLM
from gpt2_hf.planning.cards import CARDS, M124, M355, M1558, card_here, parse_gpus
from gpt2_hf.planning.plan import PlanConfig, make_plan, plain, text, to_json, way_here
from gpt2_hf.planning.speed import Rates, cpu_step_seconds
from gpt2_hf.training.build import build_accelerator, build_model, set_precision
from gpt2_hf.training.memory import Parameters, Way, activation_bytes, memory_of
from gpt2_hf.training.optim import WeightAverage, build_optimizers

ROOT = Path(__file__).parents[2]
ON_CARD = Way("cuda", "bf16", True, "sdpa")


def recipe(name: str, *arguments: str) -> PlanConfig:
    return parse_cli(PlanConfig, plain([str(ROOT / "recipes" / f"{name}.yaml"), *arguments]))


def shaped(n_layer: int, n_embd: int, n_head: int, seq_len: int, micro_batch_size: int, **train) -> RunConfig:
    config = RunConfig()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=seq_len),
        data=dataclasses.replace(config.data, seq_len=seq_len),
        train=dataclasses.replace(
            config.train, global_batch_tokens=micro_batch_size * seq_len, micro_batch_size=micro_batch_size, **train
        ),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32", "compile": "off"},
        {"precision": "bf16", "compile": "off"},
        {"precision": "bf16", "compile": "on"},
        {"precision": "bf16", "compile": "off", "gradient_checkpointing": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_activations_are_what_a_forward_pass_keeps(settings):
    device = torch.device("cpu")
    if settings["compile"] == "on" and (obstacle := hardware.compile_obstacle(device)):
        pytest.skip(obstacle)
    config = shaped(3, 96, 3, 256, 4, **settings)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=512))
    PartialState(cpu=True)
    precision = set_precision(config, device)
    accelerator = build_accelerator(config, precision)
    model = build_model(config, None, accelerator, precision)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    prepared = accelerator.prepare_model(model)
    tokens = torch.randint(512, (4, 257))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = prepared(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss  # whose graph holds what is kept
    of_tokens = [t for place, t in kept.items() if place not in weights and _is_of_tokens(t, 4 * 256)]
    counted = sum(tensor.untyped_storage().nbytes() for tensor in of_tokens)
    way = way_here(config, device)
    predicted = activation_bytes(config, way) * 4 * 256
    if config.train.gradient_checkpointing:  # of which one block's are kept only later, one at a time
        once = dataclasses.replace(config, train=dataclasses.replace(config.train, gradient_checkpointing=False))
        one = dataclasses.replace(once, model=dataclasses.replace(once.model, n_layer=1))
        two = dataclasses.replace(once, model=dataclasses.replace(once.model, n_layer=2))
        predicted -= 4 * 256 * (activation_bytes(two, way) - activation_bytes(one, way))
    assert counted == pytest.approx(predicted, rel=0.04) and loss.requires_grad


def _is_of_tokens(tensor: torch.Tensor, n_tokens: int) -> bool:
    """A weight in another precision has no side, nor two together, as long as the batch: 96, 288, 384, 512."""
    return tensor.numel() % n_tokens == 0 and not (tensor.ndim == 2 and {*tensor.shape} <= {96, 288, 384, 512})


@pytest.mark.parametrize(("name", "ema"), [("adamw", 0.0), ("muon", 0.1)])
def test_weights_and_averages_are_those_of_the_optimizers(name, ema):
    config = shaped(2, 32, 2, 64, 2, precision="fp32")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=name, ema=ema))
    model = GPTForCausalLM(config.model.gpt_config())
    optimizers = build_optimizers(model, config.optim, torch.device("cpu"))
    optimizers += [WeightAverage(model.parameters(), 0.9)] if ema else []
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    averages = [t for o in optimizers for state in o.state.values() for t in state.values() if t.numel() > 1]
    n = Parameters.of(config)
    memory = memory_of(config, Way("cpu", "fp32", False, "sdpa"), n, 2, accumulates=False)
    assert n.total == sum(p.numel() for p in model.parameters()) == model.num_parameters()
    assert memory.weights == 4 * n.total
    assert memory.averages == sum(4 * tensor.numel() for tensor in averages)
    assert n.total - n.embeddings == sum(p.numel() for name, p in model.named_parameters() if ".w" not in name[:16])


def test_a_sharded_model_takes_what_its_tensors_were_counted_to():
    config = recipe("gpt2_1558m")
    n = Parameters.of(config)

    def held(shards: int) -> float:
        memory = memory_of(config, dataclasses.replace(ON_CARD, shards=shards), n, 1, accumulates=True)
        return (memory.weights + memory.averages + memory.gradients + memory.copies) / 1e9

    # The table in docs/operations.md: 24.9 GB whole, where blocks are cast besides, and 12.6 in 8 shares.
    assert held(1) == pytest.approx(24.92 + 2 * n.matrices / 1e9, abs=0.05)
    assert held(8) == pytest.approx(12.6, abs=0.1)


@pytest.mark.parametrize(("accumulates", "measured"), [(False, 24.08), (True, 24.6)])
def test_memory_on_a_card_is_what_was_measured(accumulates, measured):
    """Of tensors, docs/results.md, when the residual stream was fp32; in bf16 each block keeps 2 bytes less of it."""
    config = recipe("gpt2_124m")
    wide = dataclasses.replace(config, train=dataclasses.replace(config.train, residual="fp32"))
    of_wide, of_bf16 = (memory_of(one, ON_CARD, Parameters.of(config), 64, accumulates) for one in (wide, config))
    assert (of_wide.total - of_wide.rest) / 1e9 == pytest.approx(measured, rel=0.02)
    numbers = 64 * 1024 * 768
    assert of_wide.activations - of_bf16.activations == 2 * numbers * (12 + 1)


def test_speed_on_a_card_is_what_was_measured():
    config = recipe("gpt2_124m")
    assert 440_000 < make_plan(config, "H100").tokens_per_sec < 470_000  # docs/results.md: 453,600 to 459,800
    assert 490_000 < make_plan(config, "H200").tokens_per_sec < 510_000  # 499,926 to 504,109
    eight = make_plan(config, "8xH100", price=2.5)
    assert 42 * 60 < eight.training_seconds < 52 * 60  # llm.c: 45 minutes for 3% more tokens
    hours = (eight.training_seconds + eight.measuring_seconds) / 3600
    assert eight.dollars == pytest.approx(hours * 8 * 2.5, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "rates", "seconds"),
    [
        (shaped(4, 256, 4, 256, 8), Rates(0.43e12, 53.3e9, 3.85e9), 0.703),
        (shaped(12, 768, 12, 1024, 1), Rates(0.436e12, 37.5e9, 3.85e9), 2.846),
    ],
)
def test_speed_on_two_cores_is_what_was_measured(config, rates, seconds):
    """The tables in docs/results.md, with the rates beside them."""
    way = Way("cpu", "bf16", True, "blockwise")
    size = config.train.micro_batch_size
    assert cpu_step_seconds(config, way, Parameters.of(config), rates, size, 1) == pytest.approx(seconds, rel=0.2)


def test_time_goes_with_work():
    config, way, rates = shaped(4, 256, 4, 256, 8), Way("cpu", "bf16", True, "blockwise"), Rates(4e11, 5e10, 4e9)
    n = Parameters.of(config)
    one, two, three = (cpu_step_seconds(config, way, n, rates, 8, steps) for steps in (1, 2, 3))
    assert three - two == pytest.approx(two - one) and one < two < 2 * one  # the update comes once
    recomputed = shaped(4, 256, 4, 256, 8, gradient_checkpointing=True)
    assert one < cpu_step_seconds(recomputed, way, n, rates, 8, 1) < 4 / 3 * one
    assert cpu_step_seconds(config, dataclasses.replace(way, is_compiled=False), n, rates, 8, 1) > one


@pytest.mark.parametrize("name", ["gpt2_124m_24gb", "gpt2_350m", "gpt2_774m", "gpt2_1558m"])
@pytest.mark.parametrize("gpus", ["RTX 4090", "4xA100", "16xH100"])
def test_the_micro_batch_fits_divides_and_is_the_largest(name, gpus):
    config = recipe(name)
    plan = make_plan(config, gpus)
    n_devices, card = parse_gpus(gpus)
    n = Parameters.of(config)
    n_windows = config.train.global_batch_tokens // (config.data.seq_len * n_devices)
    way = dataclasses.replace(ON_CARD, shards=1)

    def takes(size: int) -> float:
        return memory_of(config, way, n, size, accumulates=size < n_windows).total

    fits = plan.sharings[0].fits
    if not fits:
        assert takes(1) > card.memory and "not even one window fits" in plan.why_not
        return
    assert takes(fits) <= card.memory and n_windows % fits == 0
    larger = next((size for size in range(fits + 1, n_windows + 1) if n_windows % size == 0), None)
    assert larger is None or takes(larger) > card.memory
    assert (
        plan.micro_batch_size * plan.micro_steps * n_devices * config.data.seq_len == config.train.global_batch_tokens
    )
    is_recipes = plan.micro_batch_size == config.train.micro_batch_size
    assert is_recipes or f"--train.micro_batch_size {plan.micro_batch_size}" in plan.why_not


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/gpt2_*.yaml")), ids=lambda path: path.stem)
def test_recipes_say_what_their_micro_batches_take(path):
    """In whole GB on one card; the first figure is that of the recipe's own."""
    config = recipe(path.stem)
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    told = re.findall(r"(?:of |\b)(\d+) take[s]? (\d+)(?: GB)?\b", comment)
    if path.stem in ("gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1558m"):
        assert told and int(told[0][0]) == config.train.micro_batch_size
    for size, gigabytes in told:
        taken = memory_of(config, ON_CARD, Parameters.of(config), int(size), accumulates=True).total
        assert round(taken / 1e9) == int(gigabytes), (size, gigabytes)


def test_auto_is_what_training_tries_first():
    config = recipe("gpt2_350m", "--train.micro_batch_size", "auto")
    plan = make_plan(config, "RTX 4090")
    assert plan.micro_batch_size == plan.sharings[0].fits > 1 and "auto" in text(plan, config)
    here = make_plan(config)
    fits = here.sharings[0].fits
    assert here.micro_batch_size == (max(1, min(4, fits)) if hardware.pick_device("auto").type == "cpu" else fits)
    with pytest.raises(ConfigError, match=r"global_batch_tokens 524288 is not a multiple of .* = 1 x 1024 x 3"):
        make_plan(config, "3xH100")


def test_a_batch_that_no_micro_batch_divides_is_refused_as_training_would():
    with pytest.raises(ConfigError, match=r"train.global_batch_tokens 524288 is not a multiple"):
        make_plan(recipe("gpt2_124m"), "3xH100")


@pytest.mark.parametrize(
    ("text", "number", "name"),
    [
        ("8xH100", 8, "H100"),
        ("h100", 1, "H100"),
        ("2 x a100-40gb", 2, "A100 40GB"),
        ("4090", 1, "RTX 4090"),
        ("3x RTX3090", 3, "RTX 3090"),
        ("H100-PCIe", 1, "H100 PCIe"),
        ("NVIDIA L4", 1, "L4"),
        ("8xB300", 8, "B300"),
        ("8xMI300X", 8, "MI300X"),
        ("rtx-pro-6000", 1, "RTX PRO 6000"),
        ("pro6000", 1, "RTX PRO 6000"),
        ("gb10", 1, "GB10"),
    ],
)
def test_cards_by_name(text, number, name):
    found, card = parse_gpus(text)
    assert (found, card.name) == (number, name)


@pytest.mark.parametrize(
    "text", ["", "8x", "V100", "A1000", "GB300", "RTX 6000", "x", "8xH", "0xH100", "-1xH100", "8", "1e3xH100"]
)
def test_an_unknown_card_is_named_beside_those_that_are_known(text):
    with pytest.raises(ConfigError) as error:
        parse_gpus(text)
    assert "\n" not in str(error.value) and ("H200" in str(error.value) or "from 1" in str(error.value))


def test_every_card_says_where_its_speed_comes_from():
    for card in CARDS:
        assert card.peak > 5e13 and 0 < card.mfu_of(M124) < 0.8
        assert any(word in card.source for word in ("measured", "published", "assumed"))
    h100 = parse_gpus("H100")[1]
    assert h100.mfu_of(M124) < h100.mfu_of(M355) < h100.mfu_of(M1558) == h100.mfu_of(10 * M1558)
    assert h100.mfu_of(1000) == h100.mfu_of(M124)


@pytest.mark.parametrize(
    ("driver", "name", "mfu"),
    [
        ("NVIDIA B300 SXM6 AC", "B300", 0.24),
        ("AMD Instinct MI300X VF", "MI300X", 0.25),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", 0.33),
        ("NVIDIA GB300", "NVIDIA GB300", 0.40),  # its peak is known, and nothing else
        ("NVIDIA RTX 6000 Ada Generation", "NVIDIA RTX 6000 Ada Generation", 0.40),
    ],
)
def test_the_card_of_this_machine_is_found_by_its_drivers_name(monkeypatch, driver, name, mfu):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=7e9))
    monkeypatch.setattr(hardware, "measure_gemm", lambda device, dtype: 1e12)
    card = card_here(torch.device("cuda"))
    assert (card.name, card.memory, card.mfu_of(M124)) == (name, 7e9, mfu) and "assumed" in card.source
    assert card.peak == (hardware.data_sheet_peak(driver) or 1e12)


def test_checkpoints_take_what_they_are_said_to(data, tmp_path):
    config = tiny(data, tmp_path / "run", train__steps=7, checkpoint__save_every=1, checkpoint__keep_every=3)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, n_embd=128))
    plan = make_plan(config)
    run(config)
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders]
    assert len(folders) <= plan.kept_checkpoints <= len(folders) + 1  # 3, and 6 and 7, which are the newest too
    assert max(sizes) == pytest.approx(plan.checkpoint_bytes, rel=0.05)
    assert plan.data_tokens and plan.data_bytes == pytest.approx(2 * plan.data_tokens, rel=0.2)


def test_the_page_fits_on_a_screen_and_says_the_same_as_the_json():
    for name, gpus in itertools.product(("gpt2_124m", "gpt2_1558m", "gpt2_paper"), ("16xH100", "L4", None)):
        config = recipe(name, "--train.steps", "1000", "--price", "3")
        plan = make_plan(config, gpus, config.price)
        lines = text(plan, config).splitlines()
        figures = json.loads(to_json(plan))
        assert len(lines) <= 24 and figures["dollars"] == plan.dollars > 0
        in_all = next(line for line in lines if "in all  " in line)
        assert f"{figures['sharings'][0]['memory']['total'] / 1e9:.2f}" in in_all
        assert len(figures["sharings"]) == (3 if gpus == "16xH100" else 1)


def test_a_recipe_may_stand_first_or_behind_its_flag():
    path = os.fspath(ROOT / "recipes" / "gpt2_350m.yaml")
    assert parse_cli(PlanConfig, plain([path])) == parse_cli(PlanConfig, plain(["--config", path]))
    assert parse_cli(PlanConfig, plain([])) == PlanConfig()
    assert parse_cli(PlanConfig, plain([path, "--json"])).json
