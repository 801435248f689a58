"""Parameter groups, and Muon against a singular value decomposition."""

import math

import pytest
import torch
from torch import nn

from gpt2_hf import hardware
from gpt2_hf.config import OptimSection
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.training.optim import Muon, build_optimizers, orthogonalize, set_lr, step_optimizers

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
    assert all(g["lr"] == g["peak_lr"] / 2 for g in groups.values())


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


def test_muon_splits_query_key_value_and_scales_like_adamw():
    torch.manual_seed(2)
    gradient = torch.randn(16, 48) * torch.tensor([1.0, 100.0, 0.01]).repeat_interleave(16)
    p = nn.Parameter(torch.zeros(16, 48))
    p.grad = gradient
    optimizer = Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0)
    optimizer.step()
    for part, g in zip(p.detach().chunk(3, 1), gradient.chunk(3, 1), strict=True):
        u, _, vh = torch.linalg.svd(g)
        assert (part + 0.2 * math.sqrt(16) * u @ vh).norm() < 0.4 * part.norm()  # each third on its own scale
        assert part.pow(2).mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


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
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(8) * direction
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)
