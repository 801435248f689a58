"""What the libraries around a model expect of it: Trainer, TRL, PEFT, export, compile, saving, and transformers' rules.

Each test compares with stock GPT2LMHeadModel of equal weights, or with a calculation of its own.
"""

import copy
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from test_generation import EOS, VOCAB, byte_tokenizer, one_thread  # noqa: F401  one_thread: a fixture
from test_model import SMALL, assert_equal_logits, pair
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from gpt2_hf.model import GPTConfig, GPTForCausalLM, GPTModel

DEV = "the extra 'dev' is not installed, as on a machine that only trains"


def tokens(batch: int = 3, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 211, (batch, length), generator=torch.Generator().manual_seed(seed))


def right_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return tokens(len(lengths), max(lengths)) * mask, mask


def assert_same_weights(a, b, rtol=1e-5, atol=1e-6):
    b = b.state_dict()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# Trainer


def rows(count: int = 64, first_label: bool = True) -> list[dict]:
    """Rows padded to 16 with 1 to 15 labels: a mean of the rows' means is far from the mean over labels.

    Half of the rows, those with few labels, repeat one token, so that they differ in loss from the others.
    """
    generator = torch.Generator().manual_seed(0)
    data = []
    for i in range(count):
        length = [3, 16][i % 2]
        ids = torch.randint(1, 211, (16,), generator=generator) if i % 2 else torch.full((16,), 7)
        labels = ids.clone()
        labels[length:] = -100
        if not first_label:
            labels[0] = -100
        data.append({"input_ids": ids, "attention_mask": (torch.arange(16) < length).long(), "labels": labels})
    return data


def train(model, folder, batch: int = 8, accumulation: int = 1, data=None, steps: int = 6, resume=None, **arguments):
    """Losses as Trainer logs them."""
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        # The gradient of the keys' biases is zero but for rounding, which Adam would blow up to full steps.
        "adam_epsilon": 1e-4,
        "train_sampling_strategy": "sequential",
        **arguments,
    }
    trainer = Trainer(model=model, args=TrainingArguments(str(folder), **settings), train_dataset=data or rows())
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def by_hand() -> tuple[list[float], GPT2LMHeadModel]:
    """Six steps of 8 rows in a loop of its own: the loss is the sum over labels divided by their number."""
    _, model = pair()
    model.train()
    data, losses = rows(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, eps=1e-4)
    for step in range(6):
        batch = data[8 * step : 8 * step + 8]
        batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        labels = batch.pop("labels")[:, 1:].flatten()
        loss = F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_trainer_divides_by_the_labels_of_the_whole_batch(batch, accumulation, by_hand, tmp_path):
    ours, _ = pair()
    losses = train(ours, tmp_path, batch, accumulation)
    assert losses == pytest.approx(by_hand[0], rel=1e-5)
    assert_same_weights(ours, by_hand[1], rtol=1e-4, atol=1e-5)


def test_a_mean_of_means_would_be_seen(by_hand):
    """That the rows above tell the two ways of averaging apart."""
    ours, _ = pair()
    each = torch.stack([ours(**{key: value[None] for key, value in row.items()}).loss for row in rows()[:8]])
    batch = {key: torch.stack([row[key] for row in rows()[:8]]) for key in rows()[0]}
    assert abs(each.mean() - ours(**batch).loss) > 0.02


def test_trainer_curve_equals_stock(tmp_path):
    """Without a label at position 0: transformers 5.23 counts that one for stock GPT-2, though nothing predicts it."""
    ours, stock = pair()
    data = rows(first_label=False)
    for batch, accumulation in ((8, 1), (2, 4)):
        ours, stock = pair()
        a, b = (train(model, tmp_path, batch, accumulation, data) for model in (ours, stock))
        assert a == pytest.approx(b, rel=1e-5) and a[-1] < a[0]
        assert_same_weights(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_gradient_checkpointing(use_reentrant, by_hand, tmp_path):
    ours, _ = pair()
    keywords = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    losses = train(ours, tmp_path, 4, 2, gradient_checkpointing=True, **keywords)
    assert ours.is_gradient_checkpointing
    assert losses == pytest.approx(by_hand[0], rel=1e-5)


def test_trainer_saves_stock_folders_and_resumes(tmp_path):
    ours, _ = pair(resid_pdrop=0.1, attn_pdrop=0.1)
    whole = train(ours, tmp_path / "a", save_strategy="steps", save_steps=3)
    again, _ = pair(resid_pdrop=0.1, attn_pdrop=0.1)
    rest = train(again, tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-3"))
    assert rest[-3:] == whole[-3:]
    assert_same_weights(again, ours, rtol=0, atol=0)
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "a" / "checkpoint-6", output_loading_info=True)
    assert not any(info.values())
    assert_equal_logits(ours.eval(), loaded.eval(), tokens())


def test_trainer_sees_the_labels_without_being_told(tmp_path):
    losses = []
    for model in pair():
        settings = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model=model, args=settings, eval_dataset=rows(8, first_label=False))
        assert trainer.label_names == ["labels"] and trainer.model_accepts_loss_kwargs
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"label_smoothing_factor": 0.1}, {"bf16_full_eval": True}], ids=str)
def test_trainer_evaluates_and_predicts_like_stock(arguments, tmp_path):
    metrics = []
    for model in pair():
        seen = {}

        def keep(predictions, seen=seen):
            seen["logits"] = predictions.predictions
            return {"right": (predictions.predictions[:, :-1].argmax(-1) == predictions.label_ids[:, 1:]).mean()}

        arguments = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, **arguments}
        settings = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, **arguments)
        data = rows(8, first_label=False)
        trainer = Trainer(model=model, args=settings, eval_dataset=data, compute_metrics=keep)
        result = trainer.evaluate()
        assert seen["logits"].shape == (8, 16, 211)
        metrics.append([result["eval_loss"], result["eval_right"], float(abs(seen["logits"]).mean())])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-2 if arguments.get("bf16_full_eval") else 1e-5)


def test_rows_flattened_into_one_keep_to_themselves():
    """transformers' padding-free collator tells rows apart by positions that start again."""
    ours, stock = pair()
    data = [{"input_ids": row["input_ids"][: int(row["attention_mask"].sum())].tolist()} for row in rows(4)]
    batch = DataCollatorWithFlattening()(data)
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    ours.train(), stock.train()
    # Stock makes a cache in training too, and then looks across: Trainer turns it off.
    a, b = ours(**batch), stock(**batch, use_cache=False)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.loss, b.loss)
    with torch.no_grad():
        alone = torch.cat([ours.eval()(torch.tensor([row["input_ids"]])).logits for row in data], 1)
    torch.testing.assert_close(a.logits, alone, rtol=1e-4, atol=1e-4)


# TRL


@pytest.mark.parametrize(
    "way", [{}, {"padding_free": True, "max_length": None}, {"packing": True}], ids=["padded", "flattened", "packed"]
)
def test_sft_trainer_learns_like_stock(way, tmp_path):
    trl = pytest.importorskip("trl", reason=DEV)
    datasets = pytest.importorskip("datasets", reason=DEV)
    text = ["To be, or not to be", "Now is the winter", "If music be the food of love, play on", "ROMEO:"]
    tokenizer = byte_tokenizer()
    curves = []
    for model in pair(vocab_size=VOCAB, bos_token_id=EOS, eos_token_id=EOS):
        model.loss_type = "ForCausalLM"  # stock's is None, and Trainer then counts labels that nothing predicts
        arguments = trl.SFTConfig(
            str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **{"max_length": 48, **way},
        )
        data = datasets.Dataset.from_dict({"text": text * 8})
        trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    ours, stock = curves
    assert len(ours) == 8 and ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(stock, rel=1e-4)


# PEFT


def lora(**settings):
    return pytest.importorskip("peft", reason=DEV).LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, **settings)


def fit(model, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = model(input_ids=tokens(seed=step % 2), labels=tokens(seed=step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


TARGETS = {
    "by model_type": ({}, 3),
    "c_attn": ({"target_modules": ["c_attn"], "fan_in_fan_out": True}, 3),
    "every projection": ({"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 12),
    "all-linear": ({"target_modules": "all-linear", "fan_in_fan_out": True}, 12),
    "with a head": ({"target_modules": ["c_attn", "lm_head"]}, 4),
    "DoRA": ({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}, 9),
}


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(("settings", "count"), TARGETS.values(), ids=TARGETS)
def test_lora_attaches_trains_saves_and_merges_like_stock(settings, count, tmp_path):
    peft = pytest.importorskip("peft", reason=DEV)
    losses = {}
    tied = settings.get("target_modules") != ["c_attn", "lm_head"]
    for model in pair(tie_word_embeddings=tied):
        kind = type(model)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, lora(**settings))
        layers = [module for module in adapted.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
        assert len(layers) == count
        assert all(layer.fan_in_fan_out == isinstance(layer.get_base_layer(), Conv1D) for layer in layers)
        losses[kind] = fit(adapted)
        adapted.eval().save_pretrained(tmp_path / kind.__name__)
        with torch.no_grad():
            expected = adapted(tokens()).logits
        for base in pair(tie_word_embeddings=tied):  # the adapter of one fits the other
            again = peft.PeftModel.from_pretrained(base, tmp_path / kind.__name__).eval()
            with torch.no_grad():
                torch.testing.assert_close(again(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        merged = adapted.merge_and_unload()
        assert type(merged) is kind
        with torch.no_grad():
            torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        assert_equal_logits(merged, GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval(), tokens())
    assert losses[GPTForCausalLM] == pytest.approx(losses[GPT2LMHeadModel], rel=1e-4)
    assert losses[GPTForCausalLM][-1] < losses[GPTForCausalLM][0]


def test_lora_on_c_proj_adds_the_low_rank_product():
    """ResidualProjection is a Conv1D of our own: its update is written out here."""
    peft = pytest.importorskip("peft", reason=DEV)
    ours, _ = pair()
    before = ours.transformer.h[1].mlp.c_proj.weight.detach().clone()
    adapted = peft.get_peft_model(ours, lora(target_modules=["c_proj"], fan_in_fan_out=True))
    fit(adapted, 2)
    layer = ours.transformer.h[1].mlp.c_proj
    product = 4.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).T.detach()  # alpha / r = 4
    assert product.abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.transformer.h[1].mlp.c_proj.weight.detach(), before + product)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_lora_with_gradient_checkpointing():
    peft = pytest.importorskip("peft", reason=DEV)
    losses = []
    for checkpointing in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        ours, _ = pair()
        torch.manual_seed(0)
        adapted = peft.get_peft_model(ours.train(), lora())
        if checkpointing:
            adapted.gradient_checkpointing_enable(checkpointing)
            adapted.enable_input_require_grads()
        losses.append(fit(adapted))
    assert losses[1] == losses[0] and losses[2] == losses[0]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "IA3Config"])
def test_other_adapters_equal_stock(kind):
    """Prompts come in as inputs_embeds, prefixes as a filled cache."""
    peft = pytest.importorskip("peft", reason=DEV)
    settings = {} if kind == "IA3Config" else {"num_virtual_tokens": 4}
    batch = {"input_ids": tokens(), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
    results = []
    for model in pair():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
        losses = fit(adapted)
        with torch.no_grad():
            results.append((losses, adapted.eval()(**batch).logits))
        text = adapted.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
        results[-1] += (text,)
    (a_losses, a_logits, a_text), (b_losses, b_logits, b_text) = results
    assert a_losses == pytest.approx(b_losses, rel=1e-4)
    torch.testing.assert_close(a_logits, b_logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(a_text, b_text)


def test_adapter_on_the_head_is_refused_where_it_would_be_passed_by():
    peft = pytest.importorskip("peft", reason=DEV)
    ours, _ = pair(tie_word_embeddings=False)
    adapted = peft.get_peft_model(ours, lora(target_modules=["lm_head"], init_lora_weights=False))
    t = tokens()
    with pytest.raises(ValueError, match="use labels"):
        adapted(input_ids=t[:, :-1], shift_labels=t[:, 1:])
    adapted(input_ids=t, labels=t).loss.backward()
    assert adapted.get_submodule("base_model.model.lm_head.lora_A.default").weight.grad.abs().sum() > 0


# Gradient checkpointing, export, compile


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_enabled_and_disabled(use_reentrant):
    gradients, calls = [], []
    for checkpointing in (False, True):
        ours, _ = pair()
        ours.train()
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            ours.enable_input_require_grads()
        assert ours.is_gradient_checkpointing == checkpointing
        count = []
        ours.transformer.h[1].attn.register_forward_hook(lambda *_, count=count: count.append(1))
        ours(tokens(), labels=tokens(), use_cache=True).loss.backward()
        gradients.append([p.grad for p in ours.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]  # it was computed again
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing
    ours(tokens(), labels=tokens()).loss.backward()
    assert len(count) == 3


def exported(model, sequence, **inputs):
    sizes = {0: torch.export.Dim("batch"), 1: sequence}
    program = torch.export.export(
        model, (), {**inputs, "use_cache": False}, dynamic_shapes={**dict.fromkeys(inputs, sizes), "use_cache": None}
    )
    return program.module()


@pytest.mark.parametrize("padded", [False, True])
def test_export_with_dynamic_shapes(padded):
    ours, _ = pair()
    ids, mask = right_padded([20, 11, 5])
    inputs = {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}
    program = exported(ours, torch.export.Dim("sequence", max=48), **inputs)
    for lengths in ([31, 4], [48], [7] * 5):
        ids, mask = right_padded(lengths)
        inputs = {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}
        with torch.no_grad():
            torch.testing.assert_close(program(**inputs, use_cache=False).logits, ours(**inputs).logits)


def test_export_without_a_named_longest_sequence():
    """As stock GPT-2 can be exported."""
    ours, stock = pair()
    for model in (stock, ours):
        program = exported(model, torch.export.Dim("sequence"), input_ids=tokens())
        torch.testing.assert_close(program(input_ids=tokens(2, 9), use_cache=False).logits, model(tokens(2, 9)).logits)


def calls() -> dict[str, dict]:
    ids, mask = right_padded([20, 11, 5])
    return {
        "tokens": {"input_ids": ids},
        "padding": {"input_ids": ids, "attention_mask": mask},
        "labels": {"input_ids": ids, "labels": ids},
        "shifted labels": {"input_ids": ids, "shift_labels": ids},
        "positions": {"input_ids": ids, "position_ids": torch.arange(20)[None] // 2},
        "last logits": {"input_ids": ids, "logits_to_keep": 1},
        "hidden states": {"input_ids": ids, "output_hidden_states": True},
    }


# Evaluation with shifted labels picks the positions that have one: their number only the data knows.
@pytest.mark.parametrize(
    ("call", "training"),
    [(c, training) for c in calls() for training in (False, True) if (c, training) != ("shifted labels", False)],
)
def test_forward_compiles_without_graph_break(call, training):
    ours, _ = pair()
    ours.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager" if training else "eager")
    inputs = calls()[call]
    with torch.set_grad_enabled(training):
        b = ours(**inputs)  # first: hooks for hidden states are installed in the first call, behind a lock
        a = compiled(**inputs)
    for name in ("loss", "logits"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y)
    if training and a.loss is not None:
        ours.zero_grad()
        a.loss.backward()
        found = [p.grad.clone() for p in ours.parameters()]
        ours.zero_grad()
        b.loss.backward()
        for x, p in zip(found, ours.parameters(), strict=True):
            torch.testing.assert_close(x, p.grad)


@pytest.mark.slow
def test_forward_compiled_by_inductor():
    ours, stock = pair(n_layer=1)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True)
    ours.train(), stock.train()
    compiled(tokens(), labels=tokens()).loss.backward()
    stock(tokens(), labels=tokens()).loss.backward()
    torch._dynamo.reset()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-9, name


# Saving and loading


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


def test_default_precision_of_a_saved_bf16_model_equals_stock(tmp_path):
    ours, _ = pair()
    ours.to(torch.bfloat16).save_pretrained(tmp_path)
    dtypes = {kind: kind.from_pretrained(tmp_path).dtype for kind in (GPTForCausalLM, GPT2LMHeadModel)}
    assert dtypes[GPTForCausalLM] == dtypes[GPT2LMHeadModel]


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


# Tied weights, embeddings


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


# Attention backends


@pytest.mark.parametrize("padded", ["no", "right", "left"])
def test_attention_backends_agree(padded):
    eager, stock = pair("eager")
    sdpa, _ = pair("sdpa")
    ids, mask = right_padded([20, 11, 5])
    if padded == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    inputs = {"input_ids": ids} if padded == "no" else {"input_ids": ids, "attention_mask": mask}
    real = mask.bool() if padded != "no" else torch.ones_like(mask).bool()
    with torch.no_grad():
        expected = stock(**inputs).logits[real]
        for model in (eager, sdpa):
            torch.testing.assert_close(model(**inputs).logits[real], expected, rtol=1e-4, atol=1e-4)
            assert not model(**inputs).logits.isnan().any()
        for name in ("eager", "sdpa"):
            sdpa.set_attn_implementation(name)
            assert sdpa.config._attn_implementation == sdpa.transformer.config._attn_implementation == name
            torch.testing.assert_close(sdpa(**inputs).logits[real], expected, rtol=1e-4, atol=1e-4)
            stock.set_attn_implementation(name)
            shapes = [[a.shape for a in m(**inputs, output_attentions=True).attentions] for m in (sdpa, stock)]
            assert shapes[0] == shapes[1] and len(shapes[0]) == (3 if name == "eager" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_flex_attention_equals_eager(padded):
    """On a CPU without gradients. Stock GPT-2 does not offer it."""
    ours, stock = pair("eager", n_layer=1)
    ids, mask = right_padded([20, 11, 5])
    inputs = {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}
    torch._dynamo.reset()
    with torch.no_grad():
        expected = stock(**inputs).logits
        ours.set_attn_implementation("flex_attention")
        found = ours(**inputs, use_cache=False).logits
    torch._dynamo.reset()
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_unknown_and_missing_backends_are_refused_as_by_stock():
    for name in ("flash_attention_2", "no_such_backend"):
        for kind, config in ((GPTForCausalLM, GPTConfig), (GPT2LMHeadModel, GPT2Config)):
            with pytest.raises((ImportError, ValueError)):
                kind(config(**SMALL, attn_implementation=name))


def test_a_row_alone_equals_the_row_in_a_batch():
    ours, _ = pair()
    ids, mask = right_padded([20, 11, 5, 1])
    with torch.no_grad():
        batch = ours(ids, attention_mask=mask).logits
        for row, length in enumerate(mask.sum(-1).tolist()):
            alone = ours(ids[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(batch[row, :length], alone, rtol=1e-4, atol=1e-4)


def test_left_padding_with_positions_equals_no_padding():
    ours, _ = pair()
    ids, mask = (t.flip(1) for t in right_padded([20, 11, 5]))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = ours(ids, attention_mask=mask, position_ids=positions).logits
        for row, length in enumerate(mask.sum(-1).tolist()):
            alone = ours(ids[row : row + 1, -length:]).logits[0]
            torch.testing.assert_close(batch[row, -length:], alone, rtol=1e-4, atol=1e-4)


# Inputs and outputs


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


def test_token_types_are_embedded_as_in_stock():
    ours, stock = pair()
    assert_equal_logits(ours, stock, tokens(), token_type_ids=tokens(seed=9))
    with torch.no_grad():
        assert not torch.allclose(ours(tokens(), token_type_ids=tokens(seed=9)).logits, ours(tokens()).logits)


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


# Configuration and the rest of PreTrainedModel


def test_configuration_round_trips(tmp_path):
    config = GPTConfig(**SMALL, attn_pdrop=0.3, tie_word_embeddings=False, pad_token_id=5, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    config.to_json_file(tmp_path / "plain.json")
    again = {
        "from_pretrained": GPTConfig.from_pretrained(tmp_path),
        "from_json_file": GPTConfig.from_json_file(tmp_path / "plain.json"),
        "from_dict": GPTConfig.from_dict(config.to_dict()),
        "keywords": GPTConfig(**config.to_dict()),
        "file's keywords": GPTConfig(**json.loads((tmp_path / "config.json").read_text())),
        "deepcopy": copy.deepcopy(config),
        "pickle": pickle.loads(pickle.dumps(config)),
    }
    for way, other in again.items():
        assert type(other) is GPTConfig and other.to_diff_dict() == config.to_diff_dict(), way
        assert (other.attn_pdrop, other.eos_token_id, other.hidden_size) == (0.3, [1, 2], 64), way
    stock = GPT2Config.from_pretrained(tmp_path)
    assert stock.attn_pdrop == 0.3 and stock.num_hidden_layers == 3 and not stock.tie_word_embeddings
    assert GPTConfig.from_pretrained(tmp_path, n_layer=7).num_hidden_layers == 7
    config.hidden_size = 32
    assert config.n_embd == 32
    # Saved a second time it is the same file.
    first = json.loads((tmp_path / "config.json").read_text())
    again["from_pretrained"].save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == first


def test_fields_of_every_configuration_are_taken_and_shown():
    stock = GPT2Config(**SMALL)
    for name, value in {
        "output_attentions": True,
        "output_hidden_states": True,
        "num_labels": 5,
        "id2label": {0: "a", 1: "b", 2: "c"},
        "name_or_path": "x",
        "problem_type": "regression",
        "return_dict": False,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }.items():
        ours, expected = GPTConfig(**SMALL, **{name: value}), GPT2Config(**SMALL, **{name: value})
        assert getattr(ours, name) == getattr(expected, name), name
        assert GPTConfig(**ours.to_dict()).to_dict() == ours.to_dict(), name
    assert GPTConfig(**stock.to_dict()).to_dict().keys() - {"n_ctx"} == stock.to_dict().keys()
    for misspelt, meant in (("num_label", "num_labels"), ("output_attention", "output_attentions")):
        with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
            GPTConfig(**{misspelt: 1})
    shown = inspect.signature(GPTConfig.__init__).parameters
    assert shown["n_layer"].default == 12 and shown.keys() == inspect.signature(GPT2Config.__init__).parameters.keys()


def test_n_ctx_is_written_and_n_positions_decides(tmp_path):
    GPTConfig(**SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == SMALL["n_positions"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_ctx": 5}))
    assert GPTConfig.from_pretrained(tmp_path).to_dict()["n_ctx"] == SMALL["n_positions"]  # as stock reads it
    assert GPTConfig.from_pretrained(tmp_path, n_positions=7).to_dict()["n_ctx"] == 7
    with pytest.raises(ValueError, match="n_ctx is 5 and n_positions 48"):
        GPTConfig(**SMALL, n_ctx=5)


def test_stock_aliases_name_the_same_fields():
    a, b = (
        GPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64),
        GPTConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    )
    assert a.to_dict() == b.to_dict()


def test_generation_settings_come_from_the_configuration_as_in_stock():
    ours, stock = pair(pad_token_id=9, eos_token_id=[4, 5])
    assert ours.generation_config.to_dict() == stock.generation_config.to_dict()
    assert ours.generation_config.eos_token_id == [4, 5] and ours.generation_config.pad_token_id == 9
    assert ours.can_generate()


def test_generation_settings_are_saved_and_loaded(tmp_path):
    ours, _ = pair()
    ours.generation_config.update(max_new_tokens=4, do_sample=True, top_k=3)
    ours.save_pretrained(tmp_path)
    for kind in (GPTForCausalLM, GPT2LMHeadModel):
        settings = kind.from_pretrained(tmp_path).generation_config
        assert (settings.max_new_tokens, settings.do_sample, settings.top_k) == (4, True, 3)


def test_small_habits_of_pretrained_models(tmp_path):
    ours, stock = pair()
    for only in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**only) == stock.num_parameters(**only)
    assert ours.get_memory_footprint() == stock.get_memory_footprint()
    assert ours.main_input_name == stock.main_input_name == "input_ids"
    assert ours.dtype == stock.dtype and ours.device == stock.device
    assert ours.get_parameter_or_buffer("transformer.wte.weight") is ours.transformer.wte.weight
    assert ours.loss_function is stock.loss_function
    assert ours.model_tags is None
    ours.add_model_tags(["gpt2", "mine"])
    ours.add_model_tags("mine")
    assert ours.model_tags == ["gpt2", "mine"]
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert ours.state_dict().keys() == stock.state_dict().keys()
    # Every tensor of the model is a parameter or a buffer; none hangs loose on a module.
    known = {id(t) for t in [*ours.parameters(), *ours.buffers()]}
    loose = [v for m in ours.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert all(id(t) in known for t in loose)


def test_auto_classes_take_ours_by_our_configuration():
    """Stock configurations keep on making stock models."""
    for auto, ours, stock in (
        (AutoModelForCausalLM, GPTForCausalLM, GPT2LMHeadModel),
        (AutoModel, GPTModel, transformers.GPT2Model),
    ):
        assert type(auto.from_config(GPTConfig(**SMALL))) is ours
        assert type(auto.from_config(GPT2Config(**SMALL))) is stock


def test_input_gradients_can_be_required_and_released():
    ours, _ = pair()
    for p in ours.parameters():
        p.requires_grad_(False)
    ours.enable_input_require_grads()
    assert ours(tokens()).logits.requires_grad
    ours.disable_input_require_grads()
    assert not ours(tokens()).logits.requires_grad
