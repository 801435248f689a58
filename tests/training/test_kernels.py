"""Kernels that compute wrongly are found before the first step, replaced and named; sound ones change nothing."""

import dataclasses

import pytest
import torch
from accelerate.state import AcceleratorState
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from gpt2_hf.config import RunConfig
from gpt2_hf.data.documents import DocumentMask
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model import modeling_gpt
from gpt2_hf.model.attention import CAUSAL_WITHOUT_MASK
from gpt2_hf.model.loss import LossKernels
from gpt2_hf.training import build
from gpt2_hf.training import loop as training
from gpt2_hf.training.loop import train, train_step


def doubled(module, query, key, value, attention_mask, scaling, **kwargs):
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=2 * scaling, **kwargs)


def sees_the_future(module, query, key, value, attention_mask, scaling, **kwargs):
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=False)


def no_number(module, query, key, value, attention_mask, scaling, **kwargs):
    y, weights = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return y * torch.nan, weights


@pytest.fixture
def registered(monkeypatch):
    """Makes a function the attention backend "broken", which is causal by itself as ours are."""

    def register(function) -> str:
        AttentionInterface.register("broken", function)
        AttentionMaskInterface.register("broken", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        monkeypatch.setattr(modeling_gpt, "CAUSAL_WITHOUT_MASK", (*CAUSAL_WITHOUT_MASK, "broken"))
        return "broken"

    yield register
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("broken", None)


@pytest.mark.parametrize(
    ("broken", "precision"),
    [(doubled, "fp32"), (doubled, "bf16"), (sees_the_future, "bf16"), (no_number, "bf16")],
)
def test_broken_attention_is_replaced_and_named(data, tmp_path, registered, capsys, broken, precision):
    config = {"train__steps": 3, "train__precision": precision}
    found = run(tiny(data, tmp_path / "a", **config, model__attn_implementation=registered(broken)))
    said = capsys.readouterr().out
    what = "losses" if broken is no_number else "gradients of attention's matrices"
    assert f"attention broken, not compiled: {what} differ by" in said
    assert "of those of plain kernels; taking attention sdpa, not compiled" in said
    sound = run(tiny(data, tmp_path / "b", **config, model__attn_implementation="sdpa"))
    assert "plain kernels" not in capsys.readouterr().out
    assert losses(found) == losses(sound)


def test_broken_documents_are_replaced_too(data, tmp_path, monkeypatch, capsys):
    """A mask that knows no documents; what else keeps them apart then does so in the new backend's way."""
    config = {"train__steps": 2, "data__document_mask": True, "eval__val_every": 2}
    sound = run(tiny(data, tmp_path / "a", **config, model__attn_implementation="eager"))
    call = DocumentMask.__call__

    def one_document(self, input_ids, on_host=None):
        if self.attention == "sdpa":
            input_ids = torch.zeros_like(input_ids)
        return call(self, input_ids, on_host)

    monkeypatch.setattr(DocumentMask, "__call__", one_document)
    capsys.readouterr()
    found = run(tiny(data, tmp_path / "b", **config, model__attn_implementation="sdpa"))
    assert "taking attention eager, not compiled" in capsys.readouterr().out
    assert losses(found) == losses(sound) and found[-1]["val_loss"] == sound[-1]["val_loss"]


def test_a_broken_compiler_is_left(data, tmp_path, monkeypatch, capsys):
    def miscompiled(graph, inputs):
        return lambda *args: tuple(1.01 * x if x.is_floating_point() else x for x in graph(*args))

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiler(*a, **{**k, "backend": miscompiled}))
    monkeypatch.setattr(torch.nn.Module, "compile", _compile_with(miscompiled))
    torch._dynamo.reset()
    found = run(tiny(data, tmp_path / "a", train__steps=3, train__compile="on"))
    torch._dynamo.reset()
    assert "taking attention sdpa, not compiled" in capsys.readouterr().out
    assert losses(found) == losses(run(tiny(data, tmp_path / "b", train__steps=3)))


def _compile_with(backend):
    compile = torch.nn.Module.compile
    return lambda self, *args, **kwargs: compile(self, *args, **{**kwargs, "backend": backend})


def test_a_broken_loss_has_nothing_in_its_place(data, tmp_path, monkeypatch):
    kernel = LossKernels.exponentiate
    monkeypatch.setattr(LossKernels, "exponentiate", staticmethod(lambda *a: tuple(1.1 * x for x in kernel(*a))))
    monkeypatch.setattr(LossKernels, "reset", lambda: None)
    config = tiny(data, tmp_path / "run", train__steps=2)
    with pytest.raises(ConfigError, match=r"attention eager, not compiled: losses differ by .*--train\.check_kernels"):
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run").exists()
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, check_kernels=False)))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dropout": 0.1},
        {"train__precision": "bf16", "train__gradient_checkpointing": True, "data__document_mask": True},
    ],
)
def test_the_run_stays_what_it_is(data, tmp_path, monkeypatch, changes):
    """From the generator on, also over a resume."""
    before = []

    def step(accelerator, model, *rest):
        before.append((torch.get_rng_state(), [p.grad for p in model.parameters()], model.training))
        return train_step(accelerator, model, *rest)

    monkeypatch.setattr(training, "train_step", step)
    found = []
    for check in (True, False):
        config = tiny(data, tmp_path / str(check), train__check_kernels=check, checkpoint__save_every=2, **changes)
        short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
        long = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4))
        run(short)
        found.append(losses(run(long)))
    assert found[0] == found[1]
    for with_check, without in zip(before[:4], before[4:], strict=True):
        assert torch.equal(with_check[0], without[0]) and with_check[1:] == without[1:]
        assert not any(with_check[1]) and with_check[2]


def test_only_a_start_that_trains_checks(data, tmp_path, monkeypatch):
    made = []
    check = build.KernelCheck
    monkeypatch.setattr(build, "KernelCheck", lambda *args: made.append(check(*args)) or made[-1])
    config: RunConfig = tiny(data, tmp_path / "run", train__steps=2, checkpoint__save_every=2)
    run(config)
    for path in (tmp_path / "run" / "final").iterdir():
        path.unlink()
    (tmp_path / "run" / "final").rmdir()
    run(config)  # writes the final model again, and makes no step
    assert len(made) == 1
