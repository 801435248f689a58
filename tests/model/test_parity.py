"""Numbers, inputs and outputs against stock GPT-2 in the same process: every precision, backend and kind of batch."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from test_model import SMALL, assert_equal_logits, pair
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gpt2_hf.model import GPTConfig, GPTForCausalLM, GPTModel
from gpt2_hf.model.attention import BACKENDS as OURS

flash = pytest.mark.gpu
BACKENDS = ["eager", "sdpa", "flex_attention", *OURS, pytest.param("flash_attention_2", marks=flash)]


@pytest.fixture(autouse=True)
def uncompiled_flex_attention(request):
    """Unfused flex_attention, but for the one test at the real shape: building a kernel takes seconds a shape."""
    if "real_shape" in request.node.name:
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


def tokens_of(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(211, (batch, length), generator=torch.Generator().manual_seed(seed))


def prepare(attn_implementation: str, **fields):
    """(ours, stock, device, tolerance relative to the largest value) for a backend, or a skip that says why."""
    if attn_implementation.startswith("flash"):
        from transformers.utils import is_flash_attn_2_available

        if not (torch.cuda.is_available() and is_flash_attn_2_available()):
            pytest.skip("needs a CUDA device and flash-attn")
        ours, stock = pair(attn_implementation, **fields)
        return ours.cuda().bfloat16(), stock.cuda().bfloat16(), "cuda", 2e-2
    # Stock GPT-2 has no flex_attention, and should not compute with a backend of ours.
    ours, stock = pair("eager" if attn_implementation == "eager" else "sdpa", **fields)
    ours.set_attn_implementation(attn_implementation)
    return ours, stock, "cpu", 1e-5


def assert_close(a: torch.Tensor, b: torch.Tensor, tolerance: float):
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("padding", ["none", "left", "right", "both"])
def test_padded_batches(attn_implementation, padding):
    ours, stock, device, tolerance = prepare(attn_implementation)
    tokens = tokens_of(3, 24).to(device)
    mask = torch.ones_like(tokens)
    if padding in ("left", "both"):
        mask[0, :7] = mask[2, :1] = 0
    if padding in ("right", "both"):
        mask[1, 15:] = mask[2, 23:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for kwargs in ({}, {"position_ids": positions}):
        with torch.no_grad():
            a = ours(tokens, attention_mask=mask, **kwargs).logits
            b = stock(tokens, attention_mask=mask, **kwargs).logits
        assert_close(a[mask.bool()], b[mask.bool()], tolerance)
    # With the positions of the tokens, padding must not change what a row gives alone.
    for row in range(3):
        with torch.no_grad():
            alone = ours(tokens[row : row + 1, mask[row].bool()]).logits[0]
        assert_close(a[row, mask[row].bool()], alone, 2 * tolerance)
    # Labels of padding are left out of the loss, through both ways of giving them.
    labels = tokens.masked_fill(mask == 0, -100)
    kwargs = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        expected = stock(tokens, labels=labels, **kwargs).loss
        assert_close(ours(tokens, labels=labels, **kwargs).loss, expected, tolerance)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        assert_close(ours(tokens, shift_labels=shifted, **kwargs).loss, expected, tolerance)


@pytest.mark.parametrize("attn_implementation", BACKENDS)
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_documents_do_not_see_each_other(attn_implementation, batch):
    if attn_implementation.startswith("flash") and batch > 1:
        pytest.skip("FlashAttention finds documents by their positions in a batch of one only")
    ours, stock, device, tolerance = prepare(attn_implementation)
    tokens = tokens_of(batch, 30).to(device)
    lengths = [[4, 9, 1, 16], [13, 17]][:batch]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(device)
    with torch.no_grad():
        packed = ours(tokens, position_ids=positions, use_cache=False).logits
        assert_close(packed, stock(tokens, position_ids=positions, use_cache=False).logits, tolerance)
        for row in range(batch):
            alone = [ours(document[None]).logits[0] for document in tokens[row].split(lengths[row])]
            assert_close(packed[row], torch.cat(alone), 2 * tolerance)
    if attn_implementation != "flex_attention":  # has no backward on a CPU
        ours.train()
        loss = ours(tokens, position_ids=positions, shift_labels=tokens.roll(-1, 1), reduction="sum").loss
        loss.backward()
        alone_loss = sum(
            ours(part[None], shift_labels=label[None], reduction="sum").loss
            for row in range(batch)
            for part, label in zip(
                tokens[row].split(lengths[row]), tokens[row].roll(-1).split(lengths[row]), strict=True
            )
        )
        assert_close(loss, alone_loss, tolerance)


def test_flash_attention_is_told_the_positions_of_packed_documents(monkeypatch):
    """Without a GPU: what the backend is given, since it finds the documents by it, and no mask in plain training."""
    seen = {}

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        seen.update(kwargs, mask=attention_mask)
        return query.transpose(1, 2), None

    ours, _ = pair("eager")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", attention)
    ours.config._attn_implementation_internal = "flash_attention_2"
    tokens = tokens_of(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    ours(tokens, position_ids=positions, use_cache=False)
    assert torch.equal(seen.pop("position_ids"), positions) and seen.pop("mask") is None
    ours(tokens, shift_labels=tokens)
    assert seen.get("position_ids") is None and seen["mask"] is None


@pytest.mark.parametrize("attn_implementation", BACKENDS)
def test_hidden_states(attn_implementation):
    ours, stock, device, tolerance = prepare(attn_implementation)
    tokens = tokens_of(2, 17).to(device)
    with torch.no_grad():
        a = ours(tokens, output_hidden_states=True)
        b = stock(tokens, output_hidden_states=True)
    assert len(a.hidden_states) == len(b.hidden_states) == ours.config.n_layer + 1
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert_close(x, y, tolerance)
    if attn_implementation == "eager":  # the one that has the weights
        with torch.no_grad():
            a, b = (model(tokens, output_attentions=True).attentions for model in (ours, stock))
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, tolerance)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_causality_by_gradients(attn_implementation):
    """Logits at a position depend on every token up to it and on none behind it."""
    ours, _ = pair(attn_implementation)
    embeddings = ours.transformer.wte(tokens_of(1, 12)).detach().requires_grad_()
    for training in (False, True):  # with cache and mask, and without
        logits = ours.train(training)(inputs_embeds=embeddings).logits
        for t in range(12):
            (reach,) = torch.autograd.grad(logits[0, t].square().sum(), embeddings, retain_graph=True)
            reach = reach[0].abs().sum(-1)
            assert (reach[: t + 1] > 0).all() and (reach[t + 1 :] == 0).all()


def errors(model, tokens, truth, grads, autocast: bool) -> dict[str, float]:
    """Distance of a bf16 computation from the fp32 truth, by part: the norm, relative to the truth's."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shift = {"labels": tokens} if isinstance(model, GPT2LMHeadModel) else {"shift_labels": tokens[:, 1:]}
        inputs = tokens if isinstance(model, GPT2LMHeadModel) else tokens[:, :-1]
        loss = model(inputs, **shift).loss
        with torch.no_grad():
            out = model(tokens, output_hidden_states=True)
    loss.backward()
    found = {"loss": (loss.detach(), truth.loss), "logits": (out.logits, truth.logits)}
    found |= {f"hidden {i}": pair for i, pair in enumerate(zip(out.hidden_states, truth.hidden_states, strict=True))}
    found |= {name: (p.grad, grads[name]) for name, p in model.named_parameters()}
    return {name: ((a.float() - b).norm() / b.norm()).item() for name, (a, b) in found.items()}


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_bf16_error_is_within_twice_stocks(attn_implementation, autocast):
    fields = {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 128, "vocab_size": 1024}
    ours, stock = pair(attn_implementation, **fields)
    tokens = torch.randint(1024, (4, 96), generator=torch.Generator().manual_seed(0))
    truth = stock(tokens, labels=tokens, output_hidden_states=True)
    truth.loss.backward()
    grads = {name: p.grad.clone() for name, p in stock.named_parameters()}
    if not autocast:
        ours, stock = ours.bfloat16(), stock.bfloat16()
    mine, theirs = (errors(m, tokens, truth, grads, autocast) for m in (ours, stock))
    assert mine.keys() == theirs.keys() and max(theirs.values()) > 1e-3
    for name in mine:
        # One rounding of a scalar can come out exact by luck: the loss has a floor of one bf16 step in a thousand.
        assert mine[name] <= 2 * theirs[name] + (1e-3 if name == "loss" else 0), name


def test_fp64_equals_stock_to_the_last_digits():
    """In double precision nothing hides behind rounding."""
    ours, stock = pair()
    ours, stock = ours.double(), stock.double()
    tokens = tokens_of(3, 33)
    ours_loss, stock_loss = ours(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss, stock(tokens, labels=tokens).loss
    ours_loss.backward(), stock_loss.backward()
    with torch.no_grad():
        assert_close(ours(tokens).logits, stock(tokens).logits, 1e-12)
    # Stock upcasts its logits to fp32 before the loss.
    assert_close(ours_loss, stock_loss.double(), 1e-6)
    logits = stock(tokens).logits[:, :-1].flatten(0, 1)
    assert_close(ours_loss, torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()), 1e-12)


def test_backends_agree_at_the_real_shape():
    """Head size 64 and 1024 positions, with a row that is padded: two layers of GPT-2 124M, below the head."""
    torch.manual_seed(0)
    stock = GPT2Model(GPT2Config(n_layer=2, vocab_size=1000)).eval()
    ours = GPTModel(GPTConfig(n_layer=2, vocab_size=1000)).eval()
    ours.load_state_dict(stock.state_dict())
    mask = (torch.arange(1024) >= torch.tensor([0, 300])[:, None]).long()
    inputs = {"input_ids": torch.randint(1000, (2, 1024)), "attention_mask": mask, "use_cache": False}
    torch._dynamo.reset()
    with torch.no_grad():
        expected = stock(**inputs).last_hidden_state
        for attn_implementation in ("eager", "sdpa", "flex_attention"):
            ours.set_attn_implementation(attn_implementation)
            assert_close(ours(**inputs).last_hidden_state[mask.bool()], expected[mask.bool()], 1e-5)


# Inputs and outputs


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 211, (3, 20), generator=torch.Generator().manual_seed(seed))


def test_the_attention_backend_can_be_switched():
    ours, stock = pair("sdpa")
    mask = (torch.arange(20) >= torch.tensor([0, 9, 15])[:, None]).long()  # left padding, which must give no NaN
    inputs = {"input_ids": tokens() * mask, "attention_mask": mask}
    with torch.no_grad():
        expected = stock(**inputs).logits[mask.bool()]
        for name in ("eager", "sdpa"):
            for model in (ours, stock):
                model.set_attn_implementation(name)
            assert ours.config._attn_implementation == ours.transformer.config._attn_implementation == name
            found = ours(**inputs).logits
            assert not found.isnan().any()
            torch.testing.assert_close(found[mask.bool()], expected, rtol=1e-4, atol=1e-4)
            shapes = [[a.shape for a in m(**inputs, output_attentions=True).attentions] for m in (ours, stock)]
            assert shapes[0] == shapes[1] and len(shapes[0]) == (3 if name == "eager" else 0)


def test_unknown_and_missing_backends_are_refused_as_by_stock():
    for name in ("flash_attention_2", "no_such_backend"):
        for kind, config in ((GPTForCausalLM, GPTConfig), (GPT2LMHeadModel, GPT2Config)):
            with pytest.raises((ImportError, ValueError)):
                kind(config(**SMALL, attn_implementation=name))


def test_every_argument_of_stock_is_an_argument_of_ours_in_the_same_place():
    ours, stock = (
        [name for name, p in inspect.signature(kind.forward).parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
        for kind in (GPTForCausalLM, GPT2LMHeadModel)
    )
    stock = [name for name in stock if not name.startswith("encoder_")]  # this decoder has no encoder
    # The cache was renamed in transformers 5.24; ours takes both names with every version.
    stock = ["past_key_values" if name == "cache" else name for name in stock]
    assert "cache" in ours
    assert [name for name in ours if name in stock] == stock
    assert ours[: stock.index("inputs_embeds") + 1] == stock[: stock.index("inputs_embeds") + 1]


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5, 19])], ids=str)
def test_logits_to_keep(keep):
    ours, stock = pair()
    assert_equal_logits(ours, stock, tokens(), logits_to_keep=keep)
    with torch.no_grad():
        picked = ours(tokens()).logits[:, -keep:] if isinstance(keep, int) else ours(tokens()).logits[:, keep]
        torch.testing.assert_close(ours(tokens(), logits_to_keep=keep).logits, picked)


def test_inputs_embeds_equal_input_ids():
    ours, _ = pair()
    with torch.no_grad():
        embeds = ours.get_input_embeddings()(tokens())
        assert torch.equal(ours(inputs_embeds=embeds).logits, ours(tokens()).logits)
    for model in pair():
        with pytest.raises(ValueError):
            model(tokens(), inputs_embeds=embeds)
        with pytest.raises(ValueError):
            model()


@pytest.mark.parametrize("extra", [{}, {"use_cache": False}, {"labels": True}, {"labels": True, "all": True}], ids=str)
def test_outputs_have_stock_names_and_order(extra):
    ours, stock = pair("eager")
    keywords = {name: value for name, value in extra.items() if name == "use_cache"}
    if "labels" in extra:
        keywords["labels"] = tokens()
    if "all" in extra:
        keywords |= {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        a, b = ours(tokens(), **keywords), stock(tokens(), **keywords)
        assert not getattr(b, "cross_attentions", None)  # empty, and there only when attentions are asked for
        names = [name for name in b if name != "cross_attentions"]
        assert list(a) == names
        x, y = ours(tokens(), **keywords, return_dict=False), stock(tokens(), **keywords, return_dict=False)
    y = y[: len(names)]
    assert type(x) is type(y) is tuple and [type(i) for i in x] == [type(i) for i in y] and len(x) == len(a)
    for i, (name, value) in enumerate(a.items()):
        if isinstance(value, torch.Tensor):
            assert torch.equal(x[i], value), name


def test_hidden_states_and_attentions_by_argument_and_by_configuration():
    ours, stock = pair("eager")
    with torch.no_grad():
        out = ours(tokens(), output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == 3 + 1 and len(out.attentions) == 3
        assert {h.shape for h in out.hidden_states} == {(3, 20, 64)}
        assert {a.shape for a in out.attentions} == {(3, 4, 20, 20)}
        torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(3, 4, 20))
        assert torch.equal(ours.lm_head(out.hidden_states[-1]), out.logits)
        for model in (ours, stock):
            model.config.output_hidden_states = model.config.output_attentions = True
            out = model(tokens())
            assert len(out.hidden_states) == 4 and len(out.attentions) == 3
            model.config.output_hidden_states = model.config.output_attentions = False
            assert model(tokens()).hidden_states is None


def test_gradients_reach_hidden_states_and_attentions():
    ours, stock = pair("eager")
    gradients = []
    for model in (ours, stock):
        out = model(tokens(), output_hidden_states=True, output_attentions=True)
        kept = [out.hidden_states[0], out.hidden_states[1], out.attentions[0]]
        for t in kept:
            t.retain_grad()
        out.logits.flatten()[0].backward()
        gradients.append([t.grad for t in kept])
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_each_dropout_works_in_training_and_rests_in_evaluation(name, attn_implementation):
    ours, stock = pair(attn_implementation, **{name: 0.5})
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, ours(tokens()).logits)
        assert_equal_logits(ours, stock, tokens())
        ours.train()
        assert not torch.allclose(ours(tokens()).logits, ours(tokens()).logits)
        if attn_implementation == "eager":  # the same draws in the same order
            torch.manual_seed(1)
            a = ours(tokens()).logits
            torch.manual_seed(1)
            torch.testing.assert_close(a, stock.train()(tokens()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labelled", [0, 1, 10, 20])
def test_loss_of_partly_labelled_rows_equals_stock(labelled):
    ours, stock = pair()
    labels = tokens().clone()
    labels[:, labelled:] = -100
    a, b = ours(tokens(), labels=labels).loss, stock(tokens(), labels=labels).loss
    torch.testing.assert_close(a, b, equal_nan=True)
    count = torch.tensor(57)
    a, b = (model(tokens(), labels=labels, num_items_in_batch=count).loss for model in (ours, stock))
    torch.testing.assert_close(a, b)
    expected = F.cross_entropy(
        stock(tokens()).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    torch.testing.assert_close(a, expected / count)
