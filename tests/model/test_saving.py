"""Files, precisions and devices: what is saved and loaded is stock's, and tied and resized weights stay so."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from test_ecosystem import assert_same_weights, tokens
from test_model import SMALL, assert_equal_logits, pair
from transformers import GPT2LMHeadModel

from gpt2_hf.model import GPTConfig, GPTForCausalLM, GPTModel


def stored_keys(folder) -> list[str]:
    keys = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            keys += f.keys()
    return keys


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["50GB", "100KB"])
def test_saved_as_safetensors_alone_in_any_number_of_shards(max_shard_size, tied, tmp_path):
    ours, stock = pair(tie_word_embeddings=tied)
    ours.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    names = {file.name for file in tmp_path.iterdir()}
    shards = [name for name in names if name.endswith(".safetensors")]
    others = {"config.json", "generation_config.json"}
    others |= {"model.safetensors.index.json"} if len(shards) > 1 else set()
    assert names == others | set(shards)
    assert (len(shards) > 1) == (max_shard_size == "100KB")
    # A tied head is stored once.
    keys = stored_keys(tmp_path)
    assert len(keys) == len(set(keys)) and ("lm_head.weight" in keys) != tied
    stock.save_pretrained(tmp_path / "stock")
    assert set(keys) == set(stored_keys(tmp_path / "stock"))
    for kind in (GPTForCausalLM, GPT2LMHeadModel):
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert_same_weights(loaded, stock, rtol=0, atol=0)
        head, table = loaded.lm_head.weight, loaded.transformer.wte.weight
        assert (head is table) == tied and (head.data_ptr() == table.data_ptr()) == tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto", torch.bfloat16])
def test_loads_in_the_precision_asked_for(dtype, tmp_path):
    ours, stock = pair()
    ours.to(torch.bfloat16).save_pretrained(tmp_path)
    stock = stock.to(torch.bfloat16)
    expected = torch.float16 if dtype == "float16" else torch.bfloat16
    loaded = GPTForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == loaded.config.dtype == expected
    assert {p.dtype for p in loaded.parameters()} == {expected}
    assert_same_weights(loaded, reference, rtol=0, atol=0)
    with torch.no_grad():
        a, b = loaded.eval()(tokens()).logits, reference.eval()(tokens()).logits
    assert a.dtype == b.dtype == expected
    assert (a - b).abs().max() <= 0.02 * b.abs().max()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casts_take_every_tensor_along(cast):
    ours, stock = pair()
    getattr(ours, cast)(), getattr(stock, cast)()
    (dtype,) = {t.dtype for t in ours.state_dict().values()}
    assert ours.lm_head.weight is ours.transformer.wte.weight
    with torch.no_grad():
        a, b = ours(tokens(), labels=tokens()), stock(tokens(), labels=tokens())
    assert a.logits.dtype == b.logits.dtype == dtype and a.loss.dtype == b.loss.dtype
    tolerance = 1e-12 if dtype == torch.double else 0.02
    assert (a.logits - b.logits).abs().max() <= tolerance * b.logits.abs().max()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"transformer": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_map(device_map, tmp_path):
    ours, stock = pair()
    ours.save_pretrained(tmp_path)
    loaded = GPTForCausalLM.from_pretrained(tmp_path, device_map=device_map).eval()
    assert not any(t.is_meta for t in loaded.state_dict().values())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_equal_logits(loaded.cpu() if device_map != "auto" else loaded, stock, tokens())


def test_offloaded_to_disk_and_dispatched_over_blocks(tmp_path):
    from accelerate import infer_auto_device_map

    ours, stock = pair()
    ours.save_pretrained(tmp_path)
    sizes = {"cpu": 500_000, "disk": 10**9}  # less than the model: the rest stays on the disk
    places = infer_auto_device_map(ours, max_memory=sizes, no_split_module_classes=ours._no_split_modules)
    assert {"cpu", "disk"} == set(places.values())
    # A block is never cut in two: attention and its residual stay on one device.
    assert not any(name.startswith("transformer.h.") and name.count(".") > 2 for name in places)
    loaded = GPTForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload").eval()
    assert any(p.is_meta for p in loaded.parameters())
    assert_equal_logits(loaded, stock, tokens())


def test_built_on_the_meta_device_and_filled():
    with torch.device("meta"):
        empty = GPTForCausalLM(GPTConfig(**SMALL))
    assert all(t.is_meta for t in empty.state_dict().values()) and not list(empty.named_buffers())
    _, stock = pair()
    empty.load_state_dict(stock.state_dict(), assign=True)
    empty.tie_weights()
    assert_equal_logits(empty.eval(), stock, tokens())


def test_another_vocabulary_is_initialised_anew_on_request(tmp_path):
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = GPTForCausalLM.from_pretrained(tmp_path, vocab_size=5000, ignore_mismatched_sizes=True)
    table = loaded.transformer.wte.weight
    assert table.shape == (5000, 64) and loaded.lm_head.weight is table
    assert table.std().item() == pytest.approx(0.02, rel=0.02) and abs(table.mean().item()) < 1e-3
    for name, tensor in ours.state_dict().items():
        if tensor.shape[0] != 211:
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_base_model_and_head_load_each_others_files(tmp_path):
    ours, stock = pair()
    ours.save_pretrained(tmp_path / "head")
    base = GPTModel.from_pretrained(tmp_path / "head").eval()
    with torch.no_grad():
        expected = stock.transformer(tokens()).last_hidden_state
        torch.testing.assert_close(base(tokens()).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    base.save_pretrained(tmp_path / "base")
    assert_equal_logits(GPTForCausalLM.from_pretrained(tmp_path / "base").eval(), stock, tokens())


def test_generation_settings_are_saved_and_loaded(tmp_path):
    ours, _ = pair()
    ours.generation_config.update(max_new_tokens=4, do_sample=True, top_k=3)
    ours.save_pretrained(tmp_path)
    for kind in (GPTForCausalLM, GPT2LMHeadModel):
        settings = kind.from_pretrained(tmp_path).generation_config
        assert (settings.max_new_tokens, settings.do_sample, settings.top_k) == (4, True, 3)


def test_tied_weights_stay_tied(tmp_path):
    ours, _ = pair()

    def tied(model):
        same = model.lm_head.weight is model.transformer.wte.weight
        assert same and len(list(model.parameters())) == len(model.state_dict()) - 1
        return same

    assert tied(ours) and tied(ours.to(torch.bfloat16)) and tied(ours.to(torch.float32))
    ours.resize_token_embeddings(230)
    assert tied(ours) and tied(copy.deepcopy(ours)) and tied(pickle.loads(pickle.dumps(ours)))
    ours.save_pretrained(tmp_path)
    loaded = GPTForCausalLM.from_pretrained(tmp_path)
    assert tied(loaded) and loaded.config.vocab_size == 230
    # One step moves both at once.
    loaded(tokens(), labels=tokens()).loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert tied(loaded) and not torch.equal(loaded.lm_head.weight, ours.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("size", [230, 150, None])
def test_resized_embeddings_equal_stock(size, mean_resizing, tied, tmp_path):
    ours, stock = pair(tie_word_embeddings=tied)
    before = ours.transformer.wte.weight.detach().clone()
    for model in (ours, stock):
        torch.manual_seed(0)
        model.resize_token_embeddings(size, pad_to_multiple_of=None if size else 64, mean_resizing=mean_resizing)
    size = size or 256  # 211 rounded up
    for model in (ours, stock):
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
        assert model.lm_head.weight.shape == (size, 64) and model.lm_head.out_features == size
    kept = min(size, 211)
    assert torch.equal(ours.transformer.wte.weight[:kept], before[:kept])
    if size > 211:
        new = ours.transformer.wte.weight[211:].detach()
        assert new.abs().max() > 0 and new.std() < 0.2
        if not mean_resizing:
            assert new.std().item() == pytest.approx(ours.config.initializer_range, rel=0.2)
    stock.load_state_dict(ours.state_dict())
    few = tokens() % 150
    assert_equal_logits(ours, stock, few)
    a, b = ours(few, labels=few).loss, stock(few, labels=few).loss
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    assert ours(few[:, :-1], shift_labels=few[:, 1:]).loss.item() == pytest.approx(b.item(), rel=1e-5)
    keywords = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(few, **keywords), stock.generate(few, **keywords))
    ours.save_pretrained(tmp_path)
    assert_equal_logits(GPT2LMHeadModel.from_pretrained(tmp_path).eval(), stock, few)


def test_embeddings_are_got_and_set():
    ours, _ = pair()
    assert ours.get_input_embeddings() is ours.transformer.wte is ours.transformer.get_input_embeddings()
    assert ours.get_output_embeddings() is ours.lm_head
    assert ours.base_model is ours.transformer is ours.get_decoder()
    table, head = torch.nn.Embedding(10, 64), torch.nn.Linear(64, 10, bias=False)
    ours.set_input_embeddings(table)
    ours.set_output_embeddings(head)
    assert ours.transformer.wte is table and ours.lm_head is head
    ours.tie_weights()
    assert head.weight is table.weight
