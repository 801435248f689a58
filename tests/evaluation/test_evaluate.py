import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.data.tokenizer import gpt2_tokenizer, load_tokenizer
from gpt2_hf.evaluation.evaluate import evaluate_folder, load_folder
from gpt2_hf.evaluation.hellaswag import LENGTH_MULTIPLE, HellaSwag, hellaswag_texts, load_hellaswag, parts_mask
from gpt2_hf.evaluation.validation import validation_loss
from gpt2_hf.model import GPTConfig, GPTForCausalLM

REPO = Path(__file__).parents[2]
TASKS = REPO / "gpt2_hf" / "assets" / "lm_eval"
N_ITEMS = 10_042
N_POSITIONS = 112  # shorter than many items, so that they are truncated
# Logits of few rows at a time: glibc maps and unmaps memory for larger ones, which is slower than the arithmetic.
SMALL = {"device": "cpu", "tokens_per_batch": 4 * N_POSITIONS}


def make_model(initializer_range: float = 0.02) -> GPTForCausalLM:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_embd=32, n_head=2, n_positions=N_POSITIONS, initializer_range=initializer_range)
    return GPTForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def items():
    return load_hellaswag(100)


@pytest.fixture(scope="module")
def task(items, tokenizer):
    return HellaSwag(items, tokenizer, n_positions=N_POSITIONS)


@pytest.fixture(scope="module")
def small_task(tokenizer):
    return HellaSwag(load_hellaswag(12), tokenizer, n_positions=N_POSITIONS)


# A fresh model scores by length; one with large weights has opinions, and is compared on more items.
@pytest.fixture(scope="module", params=[0.02, 0.4], ids=["fresh", "large-weights"])
def folder(request, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model(request.param).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def task_manager():
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS))


# HellaSwag


@pytest.fixture(scope="module")
def chosen(folder) -> list[int]:
    """Which of the 100 items to compare the model in `folder` on."""
    return list(range(0, 100, 4 if GPTConfig.from_pretrained(folder).initializer_range == 0.02 else 1))


def test_scores_equal_lm_evaluation_harness(folder, chosen, task, tokenizer, task_manager):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    stock = GPT2LMHeadModel.from_pretrained(folder)
    harness = lm_eval.simple_evaluate(
        HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=1),
        tasks=["hellaswag_offline_500"],
        samples={"hellaswag_offline_500": [5 * i for i in chosen]},
        task_manager=task_manager,
        bootstrap_iters=0,
    )
    samples = sorted(harness["samples"]["hellaswag_offline_500"], key=lambda sample: sample["doc_id"])
    expected = np.array([[float(answer[0]) for (answer,) in sample["resps"]] for sample in samples])
    n_chars = np.array([[len(choice) for choice in sample["doc"]["choices"]] for sample in samples])

    ours = task.score(load_folder(folder)[0], **SMALL)
    np.testing.assert_allclose(ours.loglikelihoods["lm_eval"][chosen], expected, rtol=1e-4)
    np.testing.assert_array_equal(ours.picks["acc"][chosen], expected.argmax(-1))
    np.testing.assert_array_equal(ours.picks["acc_norm"][chosen], (expected / n_chars).argmax(-1))
    for name in ("acc", "acc_norm"):
        right = (ours.picks[name] == task.labels)[chosen]
        assert right.tolist() == [bool(sample[name]) for sample in samples]
        assert right.mean() == pytest.approx(harness["results"]["hellaswag_offline_500"][f"{name},none"])
        assert ours.metrics[f"hellaswag_{name}"] == np.mean(ours.picks[name] == task.labels)
        assert len(set(ours.picks[name].tolist())) == 4

    library = pytest.importorskip("evaluate", reason="the extra eval has it")
    of_library = library.load(str(REPO / "gpt2_hf" / "assets" / "evaluate" / "likelihood")).compute(
        predictions=expected.tolist(),
        references=[sample["doc"]["gold"] for sample in samples],
        characters=n_chars.tolist(),
        tokens=np.ones_like(n_chars).tolist(),  # for the third figure, which the harness does not have
    )
    for name in ("acc", "acc_norm"):
        assert of_library[name] == pytest.approx(harness["results"]["hellaswag_offline_500"][f"{name},none"])


def test_the_library_evaluate_gives_the_same_figures(task, items, stream, tokenizer):
    """From log-likelihoods of our scorer, its picks; from a validation stream's, its bits per byte."""
    library = pytest.importorskip("evaluate", reason="the extra eval has it")
    folder = str(REPO / "gpt2_hf" / "assets" / "evaluate" / "likelihood")
    model = make_model(0.4)
    scores = task.score(model, **SMALL)
    metric = library.load(folder)
    for way, names in (("lm_eval", ("acc", "acc_norm")), ("lecture", ("lecture_acc",))):
        endings = [hellaswag_texts(item, way)[1] for item in items]
        found = metric.compute(
            predictions=scores.loglikelihoods[way].tolist(),
            references=[item["label"] for item in items],
            characters=[[len(text) for text in texts] for texts in endings],
            tokens=[[len(tokenizer.encode(f" {text}")) for text in texts] for texts in endings],
        )
        for name in names:
            assert found[name] == scores.metrics[f"hellaswag_{name}"], name
    # By hand: the second ending is likelier, the first per character, the third per token.
    lengths = {"characters": [[10, 4, 3]], "tokens": [[2, 2, 8]]}
    for right, expected in ((0, (0, 1, 0)), (1, (1, 0, 0)), (2, (0, 0, 1))):
        found = metric.compute(predictions=[[-4.0, -2.0, -6.0]], references=[right], **lengths)
        assert (found["acc"], found["acc_norm"], found["lecture_acc"]) == expected

    loss = validation_loss(model, stream, n_windows=3, batch_size=1, device="cpu")
    windows = stream.batch(0, 3).astype(np.int64)
    n_bytes = [int(gpt2_tokenizer().token_byte_lengths[window[1:]].sum()) for window in windows]
    with torch.no_grad():
        nats = [float(model(torch.tensor(w)[None], labels=torch.tensor(w)[None]).loss) * (len(w) - 1) for w in windows]
    found = library.load(folder, "text").compute(predictions=[-x for x in nats], references=n_bytes)
    assert found["bits_per_byte"] == pytest.approx(loss["val_bpb"], rel=1e-5)


def test_offline_tasks_refuse_shots(task_manager):
    """Their only split is the one that is scored, so shots from it would give answers away."""
    import lm_eval

    for name in ("hellaswag_offline", "hellaswag_offline_500"):
        with pytest.raises(ValueError, match="num_fewshot is 2, and hellaswag_offline holds only the items that are"):
            lm_eval.simple_evaluate("dummy", tasks=[name], num_fewshot=2, limit=3, task_manager=task_manager)
    lm_eval.simple_evaluate(
        "dummy", tasks=["hellaswag_offline_500"], num_fewshot=0, limit=3, task_manager=task_manager, bootstrap_iters=0
    )


def test_lecture_way_equals_a_plain_loop(folder, task, items, tokenizer):
    stock = GPT2LMHeadModel.from_pretrained(folder)
    picks = []
    for item in items[::4]:
        context = tokenizer.encode(item["ctx"])
        losses = []
        for ending in item["endings"]:
            continuation = tokenizer.encode(" " + ending)
            n = len(continuation)
            tokens = torch.tensor([(context + continuation)[-N_POSITIONS - 1 :]])
            with torch.no_grad():
                logits = stock(tokens[:, :-1], logits_to_keep=n).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, -n:]).item())
        picks.append(int(np.argmin(losses)))
    scores = task.score(load_folder(folder)[0], **SMALL)
    assert scores.picks["lecture_acc"][::4].tolist() == picks
    accuracy = np.mean(scores.picks["lecture_acc"] == [item["label"] for item in items])
    assert scores.metrics["hellaswag_lecture_acc"] == pytest.approx(accuracy)
    assert scores.metrics["hellaswag_items"] == 100
    assert scores.metrics["hellaswag_stderr"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 100))


@pytest.fixture(scope="module")
def alone(items, tokenizer, tmp_path_factory) -> np.ndarray:
    """Log-likelihoods of the endings of 25 items, (25, 4), each scored by itself with stock GPT-2, the lm-eval way."""
    path = tmp_path_factory.mktemp("stock")
    make_model(0.4).save_pretrained(path)
    stock = GPT2LMHeadModel.from_pretrained(path)
    found = []
    for item in items[::4]:
        context, endings = hellaswag_texts(item, "lm_eval")
        for ending in endings:
            labels = tokenizer.encode(" " + ending)
            tokens = torch.tensor([(tokenizer.encode(context) + labels)[-N_POSITIONS - 1 :]])
            with torch.no_grad():
                logprobs = stock(tokens[:, :-1]).logits[0, -len(labels) :].log_softmax(-1)
            found.append(logprobs.gather(1, tokens[0, -len(labels) :, None]).sum().item())
    return np.array(found).reshape(-1, 4)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_each_ending_is_scored_as_if_alone(attention, items, tokenizer, alone):
    model = make_model(0.4)
    model.config._attn_implementation = attention  # flash_attention_2 is not even installed: sdpa takes its place
    task = HellaSwag(items[::4], tokenizer, n_positions=N_POSITIONS, ways=["lm_eval"])
    assert {1, 4} <= {len(numbers) for _, numbers in task._rows}  # both kinds of item: that fit, and that don't
    scores = task.score(model, **SMALL)
    np.testing.assert_allclose(scores.loglikelihoods["lm_eval"], alone, rtol=1e-4)
    assert model.config._attn_implementation == attention


def test_a_wrapped_model_gets_its_attention_back_after_an_error(small_task):
    model = Recorder(make_model())
    model.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ZeroDivisionError):
        small_task.score(model, **SMALL, autocast=lambda: 1 / 0)
    assert model.model.config._attn_implementation == "flex_attention"


def test_nothing_leaks_between_endings(items, tokenizer):
    item = min(items, key=lambda item: len(item["ctx"]))
    changed = {**item, "endings": [*item["endings"]]}
    changed["endings"][1] = "sings " * len(tokenizer.encode(" " + hellaswag_texts(item, "lm_eval")[1][1]))
    tasks = [HellaSwag([it], tokenizer, n_positions=N_POSITIONS, ways=["lm_eval"]) for it in (item, changed)]
    before, after = (task.score(make_model(0.4), **SMALL).loglikelihoods["lm_eval"][0] for task in tasks)
    assert abs(before[1] - after[1]) > 1
    np.testing.assert_allclose(before[[0, 2, 3]], after[[0, 2, 3]], rtol=1e-6)


def test_parts_mask_shows_the_prefix_and_the_own_part():
    seen = parts_mask(torch.tensor([[0, 0, 1, 1, 2, 0]]), "sdpa")
    assert seen.shape == (1, 1, 6, 6)
    expected = ["100000", "110000", "111000", "111100", "110010", "110001"]  # the last is padding
    assert ["".join(str(int(value)) for value in row) for row in seen[0, 0]] == expected
    added = parts_mask(torch.tensor([[0, 0, 1, 1, 2, 0]]), "eager")
    assert torch.equal(added == 0, seen) and torch.equal(added == -torch.inf, ~seen)


def test_padding_changes_nothing(small_task, monkeypatch):
    expected = small_task.score(make_model(0.4), **SMALL)
    monkeypatch.setitem(LENGTH_MULTIPLE, "cpu", LENGTH_MULTIPLE["cuda"])
    model = Recorder(make_model(0.4))
    padded = small_task.score(model, **SMALL)
    assert all(length % 32 == 0 for _, length in model.shapes)
    for way, values in expected.loglikelihoods.items():
        np.testing.assert_allclose(padded.loglikelihoods[way], values, rtol=1e-5)
    assert all((padded.picks[name] == picked).all() for name, picked in expected.picks.items())
    assert padded.metrics == expected.metrics


@pytest.mark.parametrize("way", ["lm_eval", "lecture"])
def test_one_way_alone_gives_the_same_numbers(way, small_task, tokenizer):
    model = make_model(0.4)
    alone = HellaSwag(load_hellaswag(12), tokenizer, n_positions=N_POSITIONS, ways=[way]).score(model, **SMALL)
    both = small_task.score(model, **SMALL)
    assert set(alone.loglikelihoods) == {way}
    np.testing.assert_allclose(alone.loglikelihoods[way], both.loglikelihoods[way], rtol=1e-5)
    assert alone.metrics.items() <= both.metrics.items() or way == "lm_eval"


class Recorder(torch.nn.Module):
    """Passes calls on to a model and remembers their shapes."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, **kwargs):
        assert not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        return self.model(**kwargs)


@pytest.mark.parametrize("world_size", [2, 3])
def test_hellaswag_is_the_same_on_several_ranks(small_task, world_size):
    alone = small_task.score(make_model(0.4), **SMALL)
    parts, shapes = [], []
    for rank in range(world_size):
        model = Recorder(make_model(0.4))
        small_task.score(
            model,
            device="cpu",
            tokens_per_batch=1000,
            rank=rank,
            world_size=world_size,
            reduce=lambda part: parts.append(part) or part,
        )
        shapes.append(model.shapes)
    assert all(shape == shapes[0] for shape in shapes)
    together = small_task.score(make_model(0.4), **SMALL, reduce=lambda part: sum(parts))
    for way, expected in alone.loglikelihoods.items():
        np.testing.assert_allclose(together.loglikelihoods[way], expected, rtol=1e-5)
    assert together.metrics == alone.metrics


def test_hellaswag_does_not_depend_on_the_batch(small_task):
    expected = small_task.score(make_model(0.4), **SMALL)
    for tokens_per_batch in (1, 1000, 10**6):
        model = Recorder(make_model(0.4))
        scores = small_task.score(model, device="cpu", tokens_per_batch=tokens_per_batch)
        assert all(rows == 1 or rows * length <= tokens_per_batch for rows, length in model.shapes)
        for way, values in expected.loglikelihoods.items():
            np.testing.assert_allclose(scores.loglikelihoods[way], values, rtol=1e-5)


def test_texts_equal_the_harness_on_all_items():
    from lm_eval.tasks.hellaswag.utils import process_docs

    class Rows(list):
        def map(self, function):
            return [function(row) for row in self]

    items = load_hellaswag()
    assert len(items) == N_ITEMS
    for item, doc in zip(items, process_docs(Rows(items)), strict=True):
        assert hellaswag_texts(item, "lm_eval") == (doc["query"], doc["choices"])
        assert item["label"] == doc["gold"]


def test_offline_tasks_are_the_harness_task_with_our_data(task_manager):
    loaded = task_manager.load(["hellaswag_offline", "hellaswag_offline_500"])["tasks"]
    for name, items in (("hellaswag_offline", load_hellaswag()), ("hellaswag_offline_500", load_hellaswag(500))):
        docs = list(loaded[name].eval_docs)
        assert len(docs) == len(items)
        assert [(doc["query"], doc["choices"]) for doc in docs] == [hellaswag_texts(item, "lm_eval") for item in items]

    from lm_eval.tasks import _yaml_loader as reader

    theirs = reader.load_yaml(task_manager.task_index["hellaswag"].yaml_path, resolve_func=False)
    ours = reader.load_yaml(TASKS / "hellaswag_offline.yaml", resolve_func=False)
    for key in (
        "output_type",
        "validation_split",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "metric_list",
        "metadata",
    ):
        assert ours[key] == theirs[key]


def test_context_and_ending_tokenise_apart_as_together(tokenizer):
    for item in load_hellaswag(300):
        for way in ("lm_eval", "lecture"):
            context, endings = hellaswag_texts(item, way)
            for ending in endings:
                apart = tokenizer.encode(context) + tokenizer.encode(" " + ending)
                assert tokenizer.encode(f"{context} {ending}") == apart


def test_hellaswag_subset_is_fixed_and_spread():
    subset = load_hellaswag(4)
    everything = load_hellaswag()
    assert [everything.index(item) for item in subset] == [0, 2510, 5021, 7531]
    for limit in (0, N_ITEMS + 1):
        with pytest.raises(ValueError, match=f"limit is {limit}: choose 1 to 10042"):
            load_hellaswag(limit)


def test_unknown_way_is_refused(items, tokenizer):
    with pytest.raises(ValueError, match="ways"):
        HellaSwag(items, tokenizer, ways=["lectures"])


# Validation loss


@pytest.fixture
def stream(make_shards) -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, 50256, 700).tolist()
    data = make_shards({"val": [[tokens[:100], tokens[100:101], tokens[101:]]]})
    return TokenStream(open_split(data, "val"), seq_len=32, seed=0, shuffle=False)


def test_validation_loss_equals_a_plain_loop(stream, tmp_path):
    model = make_model(0.4)
    model.save_pretrained(tmp_path)
    stock = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    nats, n_bytes = 0.0, 0
    for index in range(7):
        window = torch.from_numpy(stream.window(0, index).astype(np.int64))
        with torch.no_grad():
            logprobs = stock(window[None, :-1]).logits[0].log_softmax(-1)
        nats -= logprobs[torch.arange(32), window[1:]].sum().item()
        n_bytes += sum(gpt2_tokenizer().token_byte_lengths[token] for token in window[1:].tolist())
    result = validation_loss(model.double(), stream, n_windows=7, batch_size=3, device="cpu")
    assert result["val_loss"] == pytest.approx(nats / (7 * 32), rel=1e-12)
    assert result["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 1), (100, 1), (2, 2), (5, 3), (7, 2)])
def test_validation_loss_does_not_depend_on_batch_and_ranks(stream, batch_size, world_size):
    expected = validation_loss(make_model().double(), stream, n_windows=7, batch_size=7, device="cpu")
    parts, shapes = [], []
    for rank in range(world_size):
        model = Recorder(make_model().double())
        validation_loss(
            model,
            stream,
            n_windows=7,
            batch_size=batch_size,
            device="cpu",
            rank=rank,
            world_size=world_size,
            reduce=lambda part: parts.append(part) or torch.ones(3),
        )
        shapes.append(model.shapes)
    calls = math.ceil(7 / (batch_size * world_size))
    assert shapes == [[(batch_size, 32)] * calls] * world_size
    nats, n_tokens, n_bytes = sum(parts).tolist()
    assert nats / n_tokens == pytest.approx(expected["val_loss"], rel=1e-12)
    assert nats / math.log(2) / n_bytes == pytest.approx(expected["val_bpb"], rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_train_mode_comes_back_even_after_an_error(stream, training):
    model = make_model().train(training)
    validation_loss(model, stream, n_windows=1, batch_size=1, device="cpu")
    assert model.training == training

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validation_loss(model, stream, n_windows=1, batch_size=1, device="cpu", autocast=fails)
    assert model.training == training
    assert model.transformer.h[0].training == training


@pytest.mark.parametrize("n_windows", [0, 10_000])
def test_too_many_windows_are_refused(stream, n_windows):
    with pytest.raises(ValueError, match=f"n_windows is {n_windows}, the validation split has {stream.n_windows}"):
        validation_loss(make_model(), stream, n_windows=n_windows, batch_size=1, device="cpu")


# Folders and the scripts


def test_evaluate_folder_gives_all_figures(make_shards, tmp_path, small_task):
    data = make_shards({"val": [[list(range(1000))]]})
    model = make_model(0.4)
    model.save_pretrained(tmp_path / "model")  # without a tokenizer: the packaged one serves
    results = evaluate_folder(tmp_path / "model", data, hellaswag_items=12, **SMALL)
    stream = TokenStream(open_split(data, "val"), N_POSITIONS, seed=0, shuffle=False)
    expected = small_task.score(model, **SMALL).metrics
    expected |= validation_loss(model, stream, n_windows=stream.n_windows, batch_size=2, device="cpu")
    del expected["hellaswag_stderr"]  # of which each figure has its own
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    for name in ("acc", "acc_norm", "lecture_acc"):
        share = results[f"hellaswag_{name}"]
        assert results[f"hellaswag_{name}_stderr"] == pytest.approx((share * (1 - share) / 11) ** 0.5)
    found = evaluate_folder(tmp_path / "model", data, hellaswag_items=0, n_windows=2, device="cpu")
    assert found.keys() == {"val_loss", "val_bpb", "val_ppl", "val_loss_stderr"}


def test_a_folder_without_all_weights_is_refused(tmp_path):
    model = make_model()
    weights = model.state_dict()
    del weights["transformer.h.1.ln_1.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights \(transformer.h.1.ln_1.weight"):
        load_folder(tmp_path)


def run_script(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(REPO / "scripts" / name), run_name="__main__")
    return exit.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/nothing/final"], "no folder runs/nothing/final"),
        (["nobody/nothing"], "cannot load nobody/nothing"),
        (["."], "no config.json"),
        (["llama"], "model_type 'llama'"),
        (["broken"], "cannot load broken"),
        (["model", "--data", "nowhere"], "no prepared data in nowhere"),
        (["model", "--hellaswag_items", "-1"], "hellaswag_items is -1, and must be >= 0"),
        (["model", "--device", "abacus"], "device 'abacus'"),
        (["model", "--dtype", "int8"], "dtype"),
        (["model", "--hellaswag", "3"], "--hellaswag"),
        ([], "models"),
    ],
)
def test_evaluate_script_says_what_is_wrong_in_one_line(arguments, message, monkeypatch, tmp_path, capsys):
    make_model().save_pretrained(tmp_path / "model")
    make_model().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run_script("evaluate.py", arguments, monkeypatch) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_evaluate_script_prints_a_table(make_shards, monkeypatch, tmp_path, capsys):
    make_model().save_pretrained(tmp_path)
    data = make_shards({"val": [[list(range(1000))]]})
    arguments = ["evaluate.py", str(tmp_path), "--data", str(data), "--hellaswag_items", "8", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(REPO / "scripts" / "evaluate.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "GPT-2 124M" in out and "0.2955" in out and "HellaSwag on 8 of 10,042 items" in out
    assert re.search(r"\nvalidation loss \(nats per token\) +10\.\d{4} ± 0\.\d{4} ", out)


def test_the_race_with_the_harness_finds_the_same_picks(tmp_path):
    from gpt2_hf.benchmark.hellaswag import race_hellaswag, write_random_model

    shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": N_POSITIONS, "initializer_range": 0.4}
    found = race_hellaswag(write_random_model(tmp_path, **shape), 3, 1, batch_sizes=(1, 5))
    assert found["same_picks"] == {"acc": True, "acc_norm": True}
    assert list(found["seconds"]) == ["gpt2_hf", "lm_eval, batch 1", "lm_eval, batch 5"]
    assert found["speedup"]["min"] == found["speedup"]["median"] > 0


@pytest.mark.slow
def test_offline_task_is_a_plain_lm_eval_command(tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    command = [str(Path(sys.executable).with_name("lm_eval")), "--model", "hf", "--model_args", "pretrained=final"]
    command += ["--include_path", str(TASKS), "--tasks", "hellaswag_offline_500", "--limit", "8", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "acc_norm" in done.stdout
