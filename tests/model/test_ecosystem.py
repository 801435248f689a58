"""What the libraries around a model expect of it: Trainer, TRL, PEFT, gradient checkpointing, export, compile.

Each test compares with stock GPT2LMHeadModel of equal weights, or with a calculation of its own.
"""

import pytest
import torch
import torch.nn.functional as F
from test_generation import EOS, VOCAB, byte_tokenizer
from test_generation import one_thread as one_thread  # a fixture
from test_model import assert_equal_logits, pair
from transformers import (
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from gpt2_hf.model import GPTForCausalLM

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


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (1, 8)])
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
    a, b = (train(model, tmp_path, 2, 4, rows(first_label=False)) for model in (ours, stock))
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
        assert trainer.label_names == ["labels"] and trainer.model_accepts_loss_kwargs
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


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_gradient_checkpointing_enabled_and_disabled(use_reentrant):
    gradients, calls = [], []
    for checkpointing in (False, True):
        ours, _ = pair()
        ours.train()
        if checkpointing and use_reentrant is None:  # by its newer name, where there is one
            getattr(ours, "activation_checkpointing_enable", ours.gradient_checkpointing_enable)()
        elif checkpointing:
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
    ours, _ = pair(n_layer=1)  # every layer is traced anew
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
