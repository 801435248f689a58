"""Several models on the same text and items: tables, differences, records in runs; the harness on live models."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from scipy import stats
from transformers import GPT2LMHeadModel

from gpt2_hf import runs
from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.evaluation import harness
from gpt2_hf.evaluation.compare import paired_difference
from gpt2_hf.evaluation.evaluate import Ranks, choose_text, evaluate_folder, load_folder
from gpt2_hf.evaluation.harness import Harness
from gpt2_hf.evaluation.side_by_side import evaluate_side_by_side
from gpt2_hf.model import GPTConfig, GPTForCausalLM

ROOT = Path(__file__).parents[2]
QUICK = {"device": "cpu", "tokens_per_batch": 2048}


def save_model(folder: Path, seed: int, n_positions: int = 64, **shape) -> Path:
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": n_positions, "initializer_range": 0.3}
    GPTForCausalLM(GPTConfig(**(sizes | shape))).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two runs, of 64 and 128 positions, with data of their own, and a folder that is no run's."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.Generator(np.random.Philox(3))
    documents = [[rng.integers(0, 50256, 300).tolist() for _ in range(8)]]
    data = write_shards(root, {"train": documents, "val": documents})
    for name, seed, n_positions, mask in (("first", 1, 64, "true"), ("second", 2, 128, "false")):
        run = root / "runs" / name
        runs.write_folder(run / "final", lambda f, s=seed, n=n_positions: save_model(f, s, n))
        (run / "metrics.jsonl").write_text('{"step": 40, "tokens_seen": 81920, "val_loss": 9.0}\n')
        recipe = f"data: {{path: {data}, seq_len: {n_positions}, document_mask: {mask}}}\neval: {{val_tokens: 640}}\n"
        (run / "config.yaml").write_text(recipe)
    save_model(root / "other", 3, 128)
    return root


@pytest.fixture
def copy(place, tmp_path) -> Path:
    shutil.copytree(place, tmp_path / "place", dirs_exist_ok=True)
    return tmp_path / "place"


def test_a_run_is_measured_on_its_own_text_and_so_is_what_is_beside_it(place):
    text = choose_text([place / "runs" / "first"])
    assert (text.seq_len, text.n_windows, text.document_mask) == (64, 10, True)
    assert choose_text([place / "runs" / "second", place / "runs" / "first"]).seq_len == 64  # what both can read
    assert choose_text([place / "other"]) is None
    beside = choose_text([place / "other", place / "runs" / "first" / "final"])
    assert (beside.path, beside.seq_len, beside.n_windows) == (text.path, 64, 10)
    given = choose_text([place / "runs" / "first"], data=text.path, document_mask=False)
    assert given.n_windows == given.stream.n_windows > 30 and not given.document_mask
    with pytest.raises(ValueError, match=r"seq_len is 100, and .*first.* has 64 positions"):
        choose_text([place / "runs" / "first"], seq_len=100)


def test_figures_equal_stock_transformers(place):
    """Loss, perplexity and their spread over windows, from plain logits of the stock class."""
    text = choose_text([place / "other"], data=choose_text([place / "runs" / "first"]).path, n_windows=9)
    found = evaluate_folder(place / "other", text.path, n_windows=9, hellaswag_items=0, **QUICK)
    windows = torch.from_numpy(text.stream.batch(0, 9).astype(np.int64))
    with torch.no_grad():
        logits = GPT2LMHeadModel.from_pretrained(place / "other")(windows[:, :-1]).logits.double()
    losses = torch.nn.functional.cross_entropy(logits.mT, windows[:, 1:], reduction="none").mean(-1).numpy()
    assert found["val_loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["val_ppl"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert found["val_loss_stderr"] == pytest.approx(stats.sem(losses), rel=1e-5)


def test_differences_are_those_of_scipy():
    rng = np.random.Generator(np.random.Philox(4))
    a = rng.random(300)
    b = a + rng.normal(0.02, 0.1, 300)
    found = paired_difference(a, b)
    assert (found.mean, found.p) == pytest.approx(((a - b).mean(), stats.ttest_rel(a, b).pvalue))
    assert found.stderr == pytest.approx(stats.sem(a - b))
    # McNemar: of 12 items on which they differ, 10 go to the first. 2 * P(X >= 10) for X binomial of 12 and 1/2.
    first = np.array([True] * 10 + [False] * 2 + [True] * 50 + [False] * 30)
    second = np.array([False] * 10 + [True] * 2 + [True] * 50 + [False] * 30)
    expected = 2 * sum(math.comb(12, k) for k in (10, 11, 12)) / 2**12
    assert paired_difference(first, second).p == pytest.approx(expected)
    assert paired_difference(first, first).p == 1
    assert math.isnan(paired_difference(a[:1], b[:1]).stderr)


def test_two_runs_side_by_side(copy, capsys):
    a, b, other = copy / "runs" / "first", copy / "runs" / "second", copy / "other"
    evaluate_side_by_side([str(a), str(b), str(other)], hellaswag_items=8, **QUICK)
    evaluate_side_by_side([str(a), str(b)], hellaswag_items=8, **QUICK)
    out = capsys.readouterr().out
    assert "validation: 10 windows of 64 tokens" in out and "documents apart" in out
    (line,) = [line for line in out.splitlines() if line.startswith("validation loss") and "p " in line]
    rows = runs.read_rows(a / runs.EVALUATIONS)
    assert [row["of_run"] for row in rows] == [True, False, False, True, False]
    assert [row["model"] for row in rows[:3]] == ["final", "second", "other"]
    assert rows[0]["weights"] == runs.weights_hash(a / "final") and rows[0]["step"] == 40
    found = evaluate_folder(a, hellaswag_items=8, **QUICK)
    assert rows[0]["figures"] == rows[3]["figures"] == found
    assert f"{found['val_loss']:.4f} ± {found['val_loss_stderr']:.4f}" in line
    difference = found["val_loss"] - rows[1]["figures"]["val_loss"]
    assert f"{difference:+.4f}, p" in line
    assert [row["of_run"] for row in runs.read_rows(b / runs.EVALUATIONS)] == [False, True, False, False, True]
    assert all(json.loads(json.dumps(row)) == row and row["data"]["windows"] == 10 for row in rows)


def test_a_run_whose_data_went_away_is_evaluated_without(copy, capsys):
    shutil.rmtree(choose_text([copy / "runs" / "first"]).path)
    found = evaluate_folder(copy / "runs" / "first", hellaswag_items=4, **QUICK)
    assert "val_loss" not in found and found["hellaswag_items"] == 4
    assert "no validation loss: no prepared data in" in capsys.readouterr().out


def test_processes_share_the_work_and_speak_once(copy):
    """Two ranks find what one does, also by the harness, each with a share of the items."""
    run = copy / "runs" / "first"
    arguments = [str(run), "--hellaswag_items", "7", "--tasks", "hellaswag_offline_500", "--limit", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "scripts" / "evaluate.py")
    done = subprocess.run([*command, script, *arguments], capture_output=True, text=True, env=env, cwd=copy)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("HellaSwag acc_norm") == done.stdout.count("is a run: taking") == 1
    assert done.stderr.count("Running loglikelihood requests: 100%") <= 1
    (row,) = runs.read_rows(run / runs.EVALUATIONS)
    expected = evaluate_folder(run, hellaswag_items=7, **QUICK)
    assert row["figures"] == pytest.approx(expected, abs=1e-6)
    model, tokenizer = load_folder(run)
    alone = Harness(["hellaswag_offline_500"], limit=5).evaluate(model, tokenizer)
    assert row["harness"] == alone.table and row["harness"]["hellaswag_offline_500"]["n"] == 5
    files = sorted(path.name.partition("_")[0] for path in (run / "lm_eval").iterdir())
    assert files == ["results", "samples"]


ACC = "{metric: acc, aggregation: mean, higher_is_better: true}"
KINDS = {
    "choice": f"""output_type: multiple_choice
doc_to_text: '{{{{q}}}}'
doc_to_target: '{{{{a}}}}'
doc_to_choice: [' yes', ' no']
metric_list: [{ACC}]
""",
    "last_word": f"""output_type: loglikelihood
doc_to_text: '{{{{q}}}}'
doc_to_target: '{{{{w}}}}'
metric_list: [{ACC}, {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
""",
}


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory) -> Path:
    """Tasks of the kinds that the usual ones are of: choices (arc, piqa, boolq...), and a last word (lambada)."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["sea", "house", "stone", "river", "garden", "king", "letter"]
    rows = [{"q": f"The {word} was", "a": i % 2, "w": f" {words[-1 - i]}"} for i, word in enumerate(words)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/items.jsonl}}}}\ntest_split: test\n"
    for name, text in KINDS.items():
        more = "target_delimiter: ''\nmetadata: {version: 2}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}{more}")
    return folder


def test_each_kind_of_task_runs_on_the_live_model(place, own_tasks, tmp_path):
    """Accuracies by hand from stock logits; the model comes back in the mode that it had."""
    model, tokenizer = load_folder(place / "other")
    model.train()
    found = Harness(list(KINDS), include_path=own_tasks).evaluate(model, tokenizer, batch_size=3, save_to=tmp_path)
    assert model.training
    model.eval()

    def loglikelihood(context: str, ending: str) -> float:
        context, whole = (tokenizer.encode(text) for text in (context, context + ending))
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole)))

    rows = [json.loads(line) for line in (own_tasks / "items.jsonl").read_text().splitlines()]
    right = [(loglikelihood(r["q"], " no") > loglikelihood(r["q"], " yes")) == bool(r["a"]) for r in rows]
    assert found.outcomes["choice acc"].tolist() == right
    assert found.table["choice"]["acc"] == pytest.approx(np.mean(right))
    assert found.table["choice"]["version"] == 2 and found.table["last_word"]["n"] == len(rows)
    nats = np.mean([loglikelihood(r["q"], r["w"]) for r in rows])
    assert found.table["last_word"]["perplexity"] == pytest.approx(math.exp(-nats), rel=1e-3)
    assert len(list(tmp_path.glob("results_*.json"))) == 1 and len(list(tmp_path.glob("samples_*.jsonl"))) == 2


def test_tasks_that_cannot_be_had_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="no task hellaswagg"):
        Harness(["hellaswagg"])
    with pytest.raises(ValueError, match=r"the data of task arc_easy cannot be had .*hellaswag_offline"):
        Harness(["arc_easy"])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match="--tasks needs lm-evaluation-harness: pip install"):
        Harness(["hellaswag_offline"])


def test_a_rank_takes_its_share(place, monkeypatch):
    """By itself the harness has each rank of a live model score everything."""
    model, tokenizer = load_folder(place / "other")
    shares = [harness._live(model, tokenizer, 1, None, Ranks(rank, 2)) for rank in range(2)]
    assert [(live.rank, live.world_size) for live in shares] == [(0, 2), (1, 2)]
