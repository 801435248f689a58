"""Parameter groups, and Muon against a singular value decomposition."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from gpt2_hf import hardware
from gpt2_hf.config import OptimSection
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.training.optim import (
    Muon,
    WeightAverage,
    averaged,
    build_optimizers,
    orthogonalize,
    set_lr,
    step_optimizers,
)

CPU = torch.device("cpu")


def tiny() -> GPTForCausalLM:
    torch.manual_seed(0)
    return GPTForCausalLM(GPTConfig(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=60000))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_group_and_matrices_decay(name):
    model = tiny()
    optimizers = build_optimizers(model, OptimSection(name=name, lr=1e-3, muon_lr=2e-3), CPU)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {names[id(p)]: g for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    assert groups.keys() == set(names.values())
    for n, p in model.named_parameters():
        in_block = ".h." in n and p.ndim == 2
        assert groups[n]["weight_decay"] == (0.1 if p.ndim == 2 else 0), n
        assert groups[n]["lr"] == (2e-3 if name == "muon" and in_block else 1e-3), n
    set_lr(optimizers, 0.5)
    assert all(g["lr"] == g["peak_lr"] / 2 and g["weight_decay"] in (0.1, 0) for g in groups.values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_roles_have_rates_betas_and_decay_of_their_own(name):
    own: dict[str, Any] = {
        "embedding_lr": 3e-3, "embedding_betas": (0.8, 0.95), "embedding_weight_decay": 0.01,
        "position_lr": 4e-3, "position_betas": (0.7, 0.9), "position_weight_decay": 0.02,
        "vector_lr": 5e-3, "vector_betas": (0.9, 0.997), "vector_weight_decay": 0.03,
    }  # fmt: skip
    model = tiny()
    optimizers = build_optimizers(model, OptimSection(name=name, lr=1e-3, decay_follows_lr=True, **own), CPU)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {names[id(p)]: g for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]}
    expected = {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "position"}
    for n, p in model.named_parameters():
        role = expected.get(n, "vector" if p.ndim == 1 else None)
        if role:
            for setting in ("lr", "betas", "weight_decay"):
                assert groups[n][setting] == own[f"{role}_{setting}"], (n, setting)
        else:
            assert groups[n]["lr"] == (1e-3 if name == "adamw" else 0.02), n
            assert groups[n]["weight_decay"] == 0.1
    set_lr(optimizers, 0.5)
    assert groups["transformer.wpe.weight"]["lr"] == 2e-3
    assert groups["transformer.wpe.weight"]["weight_decay"] == 0.01


def test_gradient_scaler_unscales_each_optimizer_once():
    def update(scale: float) -> list[torch.Tensor]:
        model = tiny()
        optimizers = build_optimizers(model, OptimSection(name="muon", lr=1e-2, muon_lr=1e-2, eps=1.0), CPU)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator) * (scale or 1)
            if scaler:
                scaler.scale(torch.ones(()))  # as a backward pass would: the scaler makes its state lazily
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)  # as clipping does
            step_optimizers(optimizers, scaler, nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            assert all(p.grad is None for p in model.parameters())
        return [p.detach() for p in model.parameters()]

    for a, b in zip(update(0), update(1024.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", [".h.0.mlp.c_fc.weight", "wte.weight", None])
def test_an_overflow_anywhere_skips_the_step_everywhere(bad, where):
    """The scaler judges Muon's gradients and AdamW's apart, while clipping makes one norm of both."""
    model = tiny()
    optimizers = build_optimizers(model, OptimSection(name="muon", lr=1e-2, muon_lr=1e-2), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def update(overflow: bool) -> dict[str, bool]:
        """One step as train_step makes it; which parameters moved."""
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        scaler.scale(torch.ones(()))
        for name, p in model.named_parameters():
            p.grad = torch.full_like(p, scaler.get_scale())
            if overflow and where and name.endswith(where):
                p.grad[0, 0] = bad
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_optimizers(optimizers, scaler, norm)
        return {name: not torch.equal(p, before[name]) for name, p in model.named_parameters()}

    assert all(update(False).values())  # momentum, by which a step would move even without a gradient
    moved = update(True)
    assert set(moved.values()) == {where is None}
    assert scaler.get_scale() == (1024 if where is None else 512)
    assert all(update(False).values()) and all(p.isfinite().all() for p in model.parameters())


def test_untied_head_is_not_for_muon():
    model = GPTForCausalLM(
        GPTConfig(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=60000, tie_word_embeddings=False)
    )
    _, muon = build_optimizers(model, OptimSection(name="muon"), CPU)
    assert {tuple(p.shape) for g in muon.param_groups for p in g["params"]} == {(16, 48), (16, 16), (16, 64), (64, 16)}


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_orthogonalize_keeps_singular_vectors_and_levels_values(shape):
    torch.manual_seed(1)
    matrix = torch.randn(2, *shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ orthogonalize(matrix) @ vh.mT  # diagonal, if the vectors are kept
    values = inside.diagonal(dim1=-2, dim2=-1)
    assert (values > 0.3).all() and (values < 1.3).all() and values.median() > 0.6
    off_diagonal = inside - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 0.05


@pytest.mark.parametrize("split", [True, False])
def test_muon_splits_query_key_value(split):
    torch.manual_seed(2)
    gradient = torch.randn(16, 48) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(16)
    p = nn.Parameter(torch.zeros(16, 48))
    p.grad = gradient
    Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, split_qkv=split).step()
    parts, gradients = (p.detach().chunk(3, 1), gradient.chunk(3, 1)) if split else ([p.detach()], [gradient])
    for part, g in zip(parts, gradients, strict=True):
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        size = 1 if split else math.sqrt(3)
        assert (part + size * u @ vh).norm() < 0.4 * part.norm()  # each on its own scale


def reference_muon(p: nn.Parameter, split: bool, **settings: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """PyTorch's own, for weights as nn.Linear has them, [out, in]: those of a Conv1D transposed."""
    parts = [nn.Parameter(part.T.clone()) for part in (p.detach().chunk(3, 1) if split else [p.detach()])]
    return parts, torch.optim.Muon(parts, nesterov=True, adjust_lr_fn="original", **settings)


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (64, 256), (256, 64)], ids=["c_proj", "c_attn", "c_fc", "down"])
def test_muon_is_pytorchs_on_transposed_weights(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)  # in which PyTorch's always iterates
    torch.manual_seed(4)
    p = nn.Parameter(0.02 * torch.randn(shape, dtype=torch.float64))
    split = shape[1] == 3 * shape[0]
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    theirs, reference = reference_muon(p, split, **settings)
    ours = Muon([p], **settings)
    start = p.detach().clone()
    for _ in range(5):
        p.grad = torch.randn_like(p)
        for part, gradient in zip(theirs, p.grad.chunk(3, 1) if split else [p.grad], strict=True):
            part.grad = gradient.T.clone()
        ours.step()
        reference.step()
    expected = torch.cat([part.detach().T for part in theirs], dim=1)
    assert (p - expected).norm() < 1e-6 * (p - start).norm()


def test_muons_rate_bounds_what_a_step_does_to_a_layers_output_at_any_width():
    for width in (32, 128, 512):
        torch.manual_seed(5)
        for shape in ((width, width), (width, 4 * width), (4 * width, width)):
            p = nn.Parameter(torch.zeros(shape))
            p.grad = torch.randn(width).outer(torch.randn(shape[1])).repeat(shape[0] // width, 1) + torch.randn(shape)
            Muon([p], lr=0.02, weight_decay=0.0).step()
            gain = torch.linalg.matrix_norm(p.detach(), ord=2) * math.sqrt(shape[0] / shape[1])  # of root mean squares
            assert 0.6 * 0.02 < gain / max(1, math.sqrt(shape[0] / shape[1])) < 1.3 * 0.02, (shape, gain)


def test_muon_nesterov_and_decay_step_by_step(monkeypatch):
    """Two steps by hand, the orthogonalisation taken from the function, which has its own test."""
    monkeypatch.setattr(hardware, "default_precision", lambda device: "fp32")
    torch.manual_seed(3)
    start, g1, g2 = (torch.randn(8, 24) for _ in range(3))
    p = nn.Parameter(start.clone())
    optimizer = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, buffer = start.clone(), torch.zeros(8, 24)
    for g in (g1, g2):
        p.grad = g.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * g
        direction = torch.cat([orthogonalize(m[None])[0] for m in (0.1 * g + 0.9 * buffer).chunk(3, 1)], 1)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * direction
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_cautious_decay_takes_only_what_the_update_makes_smaller(name, monkeypatch):
    monkeypatch.setattr(hardware, "default_precision", lambda device: "fp32")

    def step(**settings: Any) -> tuple[GPTForCausalLM, GPTForCausalLM]:
        before, model = tiny(), tiny()
        optimizers = build_optimizers(model, OptimSection(name=name, lr=1e-5, muon_lr=1e-5, **settings), CPU)
        for seed in (1, 2):
            torch.manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            step_optimizers(optimizers, None, torch.ones(()))
        return before, model

    _, free = step(weight_decay=0.0)
    before, decayed = step(weight_decay=100.0, cautious_decay=True)
    for n, p in decayed.named_parameters():
        start, without = before.get_parameter(n), free.get_parameter(n)
        moved, taken = without - start, without - p
        if p.ndim == 1:
            assert torch.equal(p, without)
            continue
        clear = moved.abs() > 1.5e-5 if name == "adamw" or ".h." not in n else moved.abs() > 0  # two steps, one way
        shrinks = (moved * start < 0) & clear & (start.abs() > 1e-3)
        grows = (moved * start > 0) & clear & (start.abs() > 1e-3)
        if name == "adamw":
            assert (taken[shrinks] * start[shrinks].sign() > 0).all(), n
            assert (taken[grows].abs() < 1e-7).all(), n
        assert 0.2 < (taken.abs() > 1e-7).float().mean() < 0.9, n  # some do, some don't


def test_a_skipped_step_decays_nothing():
    model = tiny()
    optimizers = build_optimizers(model, OptimSection(name="muon", cautious_decay=True, weight_decay=10.0), CPU)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step_optimizers(optimizers, None, torch.tensor(math.nan))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_average_of_weights_is_the_series_it_says():
    p = nn.Parameter(torch.zeros(3))
    average = WeightAverage([p], decay=0.75)
    expected = None
    for value in (1.0, 3.0, -2.0, 5.0):
        p.data.fill_(value)
        average.step()
        expected = value if expected is None else 0.75 * expected + 0.25 * value
    with averaged(nn.Module(), [average]) as has_one:
        assert has_one and torch.allclose(p, torch.full((3,), expected))
    assert torch.equal(p.detach(), torch.full((3,), 5.0))
    with averaged(nn.Module(), []) as has_one:
        assert not has_one
