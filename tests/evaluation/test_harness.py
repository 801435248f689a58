"""The kinds of choices that the usual tasks of lm-evaluation-harness offer, through the harness on a live model."""

import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.evaluation import harness
from gpt2_hf.evaluation.evaluate import load_folder
from gpt2_hf.model import GPTConfig, GPTForCausalLM

DATA = """
from datasets import Dataset

WORDS = "the man sat down on a chair and read his book until night came over town".split()

def rows():
    return [
        {
            "question": " ".join(WORDS[i : i + 4]),
            "choices": [WORDS[3 * i % 16], " ".join(WORDS[i % 7 : i % 7 + 3]), " ".join(WORDS[i % 5 : i % 5 + 2])],
            "label": i % 3,
            "text": " ".join(WORDS[i:] + WORDS[: i + 1]),
        }
        for i in range(11)
    ]

def load(**_):
    return {"test": Dataset.from_list(rows())}

def which_context(doc):
    return doc["label"] % 2

def contexts(doc):
    return [f"{doc['question']} {name}" for name in ("Ann", "the cat")]

def rest(doc):
    return "went " + doc["choices"][1]
"""
TASKS = {
    # Endings of several lengths, as in arc, sciq, piqa and openbookqa.
    "endings": r"""
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    # As in winogrande the contexts differ, and what follows is the same.
    "contexts": """
doc_to_text: !function data.which_context
doc_to_target: !function data.rest
doc_to_choice: !function data.contexts
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    # Answers of one token, which the harness reads from one forward call, and no aggregation is named: as in boolq.
    "answers": r"""
doc_to_text: "{{text}}\nQuestion: {{question}}?\nAnswer:"
doc_to_target: "{{label % 2}}"
doc_to_choice: ["no", "yes"]
metric_list:
  - metric: acc
""",
}


@pytest.fixture
def tasks(tmp_path) -> Path:
    (tmp_path / "data.py").write_text(DATA)
    head = "custom_dataset: !function data.load\ntest_split: test\noutput_type: multiple_choice\n"
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}metadata: {{version: 3}}\n")
    return tmp_path


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(0)
    config = GPTConfig(n_layer=2, n_embd=32, n_head=2, n_positions=112, initializer_range=0.4)
    GPTForCausalLM(config).save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def answers_by_hand(folder: Path) -> dict[str, np.ndarray]:
    """Whether each item's answer is right, by task and metric, from plain logits of the stock class."""
    stock, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), load_tokenizer()

    def score(context: str, rest: str) -> float:
        labels = tokenizer.encode(f" {rest}")
        tokens = torch.tensor([tokenizer.encode(context) + labels])
        with torch.no_grad():
            logprobs = stock(tokens[:, :-1]).logits[0, -len(labels) :].log_softmax(-1)
        return logprobs[torch.arange(len(labels)), labels].sum().item()

    module: dict = {}
    exec(DATA, module)
    right = []
    for row in module["rows"]():
        label, question = row["label"], row["question"]
        endings = np.array([score(f"Question: {question}\nAnswer:", choice) for choice in row["choices"]])
        contexts = [score(context, module["rest"](row)) for context in module["contexts"](row)]
        answers = [score(f"{row['text']}\nQuestion: {question}?\nAnswer:", word) for word in ("no", "yes")]
        right.append(
            {
                "endings acc": endings.argmax() == label,
                "endings acc_norm": (endings / [len(choice) for choice in row["choices"]]).argmax() == label,
                "contexts acc": np.argmax(contexts) == label % 2,
                "answers acc": np.argmax(answers) == label % 2,
            }
        )
    return {name: np.array([item[name] for item in right]) for name in right[0]}


def test_choices_of_each_kind_are_those_of_a_plain_loop(tasks, folder):
    found = harness.Harness(list(TASKS), include_path=tasks).evaluate(*load_folder(folder), batch_size=3)
    expected = answers_by_hand(folder)
    assert set(found.outcomes) == set(expected)
    for name, right in expected.items():
        assert 0 < right.sum() < len(right), "all alike would also come of nonsense"
        assert found.outcomes[name].tolist() == right.tolist(), name
        task, metric = name.split()
        assert found.table[task][metric] == pytest.approx(right.mean())
        assert found.table[task][f"{metric}_stderr"] == pytest.approx(right.std(ddof=1) / math.sqrt(len(right)))


def test_the_script_that_compares_item_by_item(folder, monkeypatch, capsys):
    """Its row for a model with large weights: the same picks, and no difference to speak of."""
    script = Path(__file__).with_name("harness_equality.py")
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), "--items", "6"])
    runpy.run_path(str(script), run_name="__main__")
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
    assert (row[2], row[6], row[7], row[9], row[10]) == ("6", "6", "none", "6", "none") and float(row[5]) < 0.01
