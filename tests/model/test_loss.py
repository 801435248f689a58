"""The fused head and loss against cross_entropy on full logits, in float64 and with an error budget below."""

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt2_hf.model import loss as loss_module
from gpt2_hf.model.loss import linear_cross_entropy


def reference(hidden, weight, labels, divisor=None):
    logits = hidden.double() @ weight.double().T
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum")
    return total / (divisor or (labels != -100).sum())


def inputs(dtype=torch.float64, vocab_size=307):
    torch.manual_seed(0)
    hidden = torch.randn(3, 50, 16).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(vocab_size, 16)).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (3, 50))
    labels[0, :7] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_bytes", [2**28, 384 * 8 * 130])  # one chunk; several, the last one shorter
@pytest.mark.parametrize("divisor", [None, 1000])
def test_loss_and_gradients_in_float64(monkeypatch, chunk_bytes, divisor):
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, labels, divisor)
    expected = reference(hidden, weight, labels, divisor)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # An upstream factor stands for a gradient scaler or someone else's division.
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(3 * expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_error_budget_per_dtype(dtype, budget):
    hidden, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(hidden, weight, labels)
    expected = reference(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=budget)
    got = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(got, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= budget * b.norm()


def test_fp16_gradients_survive_a_small_factor_and_a_scaler():
    """1 / 524288 alone is below fp16's smallest number, and the loss scale alone would overflow it."""
    hidden, weight, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=524_288)
    got = torch.autograd.grad(65_536 * loss, (hidden, weight))
    expected = torch.autograd.grad(65_536 * reference(hidden, weight, labels, 524_288), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm()


def test_without_gradients_and_reductions():
    hidden, weight, labels = inputs()
    with torch.no_grad():
        each = linear_cross_entropy(hidden, weight, labels, reduction="none")
        expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none").view(3, 50)
        torch.testing.assert_close(each, expected)  # torch gives 0 at ignored labels too
        assert (each[0, :7] == 0).all()
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), each.sum() / 143)
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, reduction="sum"), each.sum())
        nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), reduction="none")
        assert nothing.shape == (3, 50) and not nothing.any()
    with pytest.raises(ValueError, match="no_grad"):
        linear_cross_entropy(hidden, weight, labels, reduction="none")
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(hidden, weight, labels, reduction="avg")


def test_padding_of_the_vocabulary_takes_no_part():
    """All logits far below 0: columns of zeros would swallow the probability."""
    hidden, weight, labels = inputs()
    weight = weight.detach() - 100 * hidden.detach().mean((0, 1)).sign()
    hidden = hidden.detach().abs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, -weight.abs() * 10, labels)
    torch.testing.assert_close(loss, reference(hidden, -weight.abs() * 10, labels))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operators return: the most that was alive at once. Nothing was, before it began."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in given:
                self.alive[key] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(n_bytes for _, n_bytes in self.alive.values()))
        return result


@pytest.mark.parametrize(("dtype", "copies"), [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 0)])
def test_softmax_without_a_compiler_holds_one_copy_in_fp32(dtype, copies):
    """The copy counted in sizes of the logits; in fp32 there is nothing to widen."""
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 2048).to(dtype), torch.randint(2048, (64,))
    before = logits.double()
    with LiveBytes() as count:
        total, nll = loss_module.exponentiate(logits, labels)
    size = logits.numel() * logits.element_size()
    assert copies * size <= count.peak < (copies + 0.05) * size
    torch.testing.assert_close(nll.double(), F.cross_entropy(before, labels, reduction="none"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double() / total[:, None], before.softmax(-1), rtol=1e-2, atol=1e-6)


def test_softmax_of_a_gpu_leaves_nothing_in_the_padding():
    """Padded columns hold what the GEMM left there, above all others; the rest is the softmax of the vocabulary."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 384, dtype=torch.float64), torch.randint(307, (6,))
    logits[:, 307:] = 50
    expected = logits[:, :307].softmax(-1)
    counts = torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.float64)
    wanted = loss_module._of_labels(logits, labels)
    assert torch.equal(wanted, logits[torch.arange(6), labels])
    spent = logits.clone()
    nll = loss_module.softmax(logits, wanted, counts, 307)
    assert (logits[:, 307:] == 0).all()
    torch.testing.assert_close(logits[:, :307], expected * counts[:, None])
    torch.testing.assert_close(nll, -expected.gather(1, labels[:, None]).log()[:, 0])
    assert torch.equal(loss_module.likelihood(spent, wanted, 307), nll)


def test_gradient_of_a_token_that_is_nearly_certain():
    """1 - p is right in bf16 too; rounding p and taking the label's row away afterwards would leave little of it."""
    torch.manual_seed(0)
    weight = torch.randn(307, 64)
    labels = torch.arange(40)
    hidden = (weight[labels] * 0.2).bfloat16().float()  # p > 0.99 for most
    weight = weight.bfloat16().float().requires_grad_()
    hidden.requires_grad_()
    sure = (hidden @ weight.T).softmax(-1)[labels, labels] > 0.99
    assert sure.sum() > 20
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    got = torch.autograd.grad(loss, hidden)[0][sure]
    expected = torch.autograd.grad(reference(hidden, weight, labels), hidden)[0][sure]
    assert ((got - expected).norm(dim=1) <= 0.1 * expected.norm(dim=1)).all()


def test_compiled_kernels_agree(monkeypatch):
    hidden, weight, labels = inputs(torch.float32)
    eager = linear_cross_entropy(hidden, weight, labels)
    eager_grads = torch.autograd.grad(eager, (hidden, weight))
    for name in ("exponentiate", "softmax", "likelihood"):
        monkeypatch.setattr(loss_module.LossKernels, name, None)  # restored after
    loss_module.LossKernels.compile(dynamic=False)
    compiled = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, (hidden, weight)), eager_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_scoring_by_tiles_equals_cross_entropy(monkeypatch, dtype, rtol):
    monkeypatch.setattr(loss_module, "TILE", (40, 128))  # neither 143 labels nor 307 columns are a multiple
    hidden, weight, labels = inputs(dtype)
    with torch.no_grad():
        nll = linear_cross_entropy(hidden, weight, labels, reduction="none")
        logits = hidden.double() @ weight.double().T
        expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(nll.double(), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("n_tokens", "sizes"),
    [(100, {100}), (2048, {512}), (1024, {512}), (65536, {512}), (3 * 511, {511}), (1031, {516, 515})],
)
def test_chunks_have_one_size_where_possible(n_tokens, sizes):
    chunks = loss_module._chunks(torch.empty(n_tokens, 1, dtype=torch.bfloat16), 50304)
    assert {part.stop - part.start for part in chunks} == sizes
    assert [part.start for part in chunks] == [0, *(part.stop for part in chunks[:-1])] and chunks[-1].stop == n_tokens
