"""A card's figures, computed again: a wrong one is found, in the text, in figures.json and in the weights."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import write_shards
from huggingface_hub import parse_eval_result_entries
from small_gpt2 import edit_weights, save
from yaml import safe_load

from gpt2_hf.data.shards import open_split
from gpt2_hf.evaluation.evaluate import evaluate_folder
from gpt2_hf.program import UserError
from gpt2_hf.runs import write_folder
from gpt2_hf.sharing.card import eval_results, marked, model_card
from gpt2_hf.sharing.figures import _best, gather, public_command, public_path
from gpt2_hf.sharing.proof import prove
from gpt2_hf.sharing.staging import stage


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as a reader has it, of a model with its run's figures, and the data that those are of."""
    root = tmp_path_factory.mktemp("published")
    texts = [[ord(c) % 256 for c in f"{n} lines of text, {n} times. " * 4] for n in range(12)]
    data = write_shards(root, {"train": [texts], "val": [texts]})
    final = root / "run" / "final"
    write_folder(final, lambda path: save(path, tokenizer="gpt2"))
    figures = evaluate_folder(final, data, hellaswag_items=20, tokens_per_batch=640)
    rows = [
        {"step": 4, "tokens_seen": 400, "tokens_per_sec": 100.0},
        {"step": 8, "tokens_seen": 800, "tokens_per_sec": 50.0, **figures},
    ]
    config = {"data": {"path": str(data), "seq_len": 32}, "train": {"steps": 8, "global_batch_tokens": 100}}
    fingerprint = open_split(data, "train").fingerprint
    start = {"step": 0, "processes": 2, "precision": "fp32", "device": "a card", "data_fingerprint": fingerprint}
    (root / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "run" / "config.yaml").write_text(json.dumps(config))
    (root / "run" / "starts.jsonl").write_text(json.dumps(start | {"command": ["/home/me/secret.py"]}) + "\n")
    folder = root / "model"
    folder.mkdir()
    stage(final, folder, False)
    record = gather(final, folder, price=3.0) | {"repo": "me/x", "with_code": False, "curves": False}
    (folder / "figures.json").write_text(json.dumps(record))
    (folder / "README.md").write_text(model_card(record, "mit", "en") + "\nMy own words: 7.0.\n")
    return folder, data


def copy_of(published, tmp_path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "copy"))


def differing(folder: Path, data: Path | None, capsys) -> set[str]:
    capsys.readouterr()
    passed = prove(str(folder), data and str(data))
    found = {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERS")}
    assert passed == (not found)
    return found


def test_true_figures_are_found_true(published, capsys):
    folder, data = published
    assert differing(folder, data, capsys) == set()
    assert differing(folder, None, capsys) == set()
    assert prove(str(folder)) and "not tried val_loss" in capsys.readouterr().out.replace("  ", " ")


def test_tokens_of_a_run_whose_batches_grew(published, tmp_path, capsys):
    folder = copy_of(published, tmp_path)
    record = json.loads((folder / "figures.json").read_text())
    for ramp, is_true in (([50], True), ([60], False)):  # 4 x 50 + 4 x 150 = 800
        record["run"] |= {"batch_tokens": 150, "batch_ramp": ramp, "batch_ramp_steps": 4}
        (folder / "figures.json").write_text(json.dumps(record))
        assert ("tokens" not in differing(folder, None, capsys)) == is_true


def test_the_card_has_what_the_records_say_and_no_place_of_this_machine(published):
    folder, data = published
    card = (folder / "README.md").read_text()
    # 400 tokens at 100 a second and 400 at 50: 12 s on two devices, 24 device-seconds at 3 dollars an hour.
    record = json.loads((folder / "figures.json").read_text())
    assert record["run"]["time"] == {"hours": round(12 / 3600, 5), "device_hours": round(24 / 3600, 5), "starts": 1}
    assert record["run"]["cost"] == {"price": 3.0, "dollars": round(3 * 24 / 3600, 4)}
    assert "| val | 12 |" in card and "not searched for items" in card and "license: mit" in card
    for text in (card, (folder / "figures.json").read_text()):
        assert str(data) not in text and "secret" not in text and "/home" not in text


def test_a_wrong_figure_in_the_text_is_found(published, tmp_path, capsys):
    folder = copy_of(published, tmp_path)
    card = (folder / "README.md").read_text()
    shown = f"{json.loads((folder / 'figures.json').read_text())['run']['last']['figures']['val_loss']:.4f}"
    (folder / "README.md").write_text(card.replace(shown, "2.0000"))
    assert differing(folder, None, capsys) == {"card"}
    (folder / "README.md").write_text("# nothing of it\n")
    assert differing(folder, None, capsys) == {"card"}


@pytest.mark.parametrize(("key", "change"), [("val_loss", -0.1), ("val_bpb", -0.1), ("hellaswag_acc_norm", 0.3)])
def test_a_wrong_figure_in_the_file_is_found_although_the_text_agrees(published, tmp_path, capsys, key, change):
    folder = copy_of(published, tmp_path)
    record = json.loads((folder / "figures.json").read_text())
    record["run"]["last"]["figures"][key] += change
    (folder / "figures.json").write_text(json.dumps(record))
    (folder / "README.md").write_text(marked(record))
    found = differing(folder, published[1], capsys)
    assert key in found and "card" not in found


def test_other_weights_are_found(published, tmp_path, capsys):
    folder = edit_weights(copy_of(published, tmp_path), lambda w: w["transformer.wte.weight"].mul_(1.5))
    assert {"weights", "val_loss"} <= differing(folder, published[1], capsys)


def test_what_cannot_be_compared_is_one_line(published, tmp_path):
    folder = copy_of(published, tmp_path)
    other = write_shards(tmp_path, {"train": [[[1] * 90]], "val": [[[2] * 90]]})
    with pytest.raises(UserError, match="is not what this was measured on"):
        prove(str(folder), str(other))
    (folder / "figures.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="lacks or garbles an entry"):
        prove(str(folder))
    (folder / "figures.json").unlink()
    with pytest.raises(UserError, match="there is nothing to compare with"):
        prove(str(folder))
    with pytest.raises(UserError, match="give a folder, a run, or a repository"):
        prove(str(tmp_path / "no" / "such"))


def test_places_of_this_machine_are_shortened():
    assert [public_path(p) for p in ("data/x", "/home/me/x", "~/x", "../y/x", "s3://b/x")] == ["data/x", *"xxxx"]
    command = f"{sys.executable} scripts/evaluate.py runs/demo --data=/mnt/mine/shards"
    assert public_command(command).endswith(" scripts/evaluate.py runs/demo --data=shards")
    assert "/" not in public_command(command).split()[0]


def test_only_whole_benchmarks_are_results_for_the_hub(published):
    record = json.loads((published[0] / "figures.json").read_text())
    assert eval_results(record) == {}
    record["run"]["last"]["figures"]["hellaswag_items"] = 10_042
    ((name, text),) = eval_results(record).items()
    (entry,) = parse_eval_result_entries(safe_load(text))
    assert name == ".eval_results/hellaswag.yaml" and entry.dataset_id == "Rowan/hellaswag"
    assert entry.value == pytest.approx(record["run"]["last"]["figures"]["hellaswag_acc_norm"], abs=1e-6)


def test_a_measurement_that_was_repeated_is_shown_once():
    """Of each the one on most items, and of several such the newest."""
    rows = [
        {
            "date": "1",
            "data": {"windows": 10},
            "figures": {"val_loss": 1.0, "hellaswag_acc": 0.1, "hellaswag_items": 50},
        },
        {"date": "2", "figures": {"hellaswag_acc": 0.2, "hellaswag_items": 10_042}},
        {
            "date": "3",
            "data": {"windows": 10},
            "figures": {"val_loss": 3.0, "hellaswag_acc": 0.3, "hellaswag_items": 9},
        },
        {"date": "4", "figures": {}, "harness": {"hellaswag": {"acc": 0.4, "n": 20}, "piqa": {"acc": 0.4, "n": 20}}},
        {"date": "5", "figures": {}, "harness": {"piqa": {"acc": 0.5, "n": 20}}},
    ]
    kept = [(row["date"], row["figures"], row["harness"]) for row in _best(rows)]
    assert kept == [
        ("2", {"hellaswag_acc": 0.2, "hellaswag_items": 10_042}, None),
        ("3", {"val_loss": 3.0}, None),
        ("4", {}, {"hellaswag": {"acc": 0.4, "n": 20}}),
        ("5", {}, {"piqa": {"acc": 0.5, "n": 20}}),
    ]


def test_what_a_model_was_begun_from_is_said(tmp_path):
    record = {"shape": dict.fromkeys(("n_layer", "n_embd", "n_head", "n_positions", "vocab_size"), 1), "parameters": 1}
    record |= {"repo": "me/x", "with_code": False, "curves": False}
    run = {"step": 1, "steps": 1, "tokens": 1, "machine": {}, "time": None, "cost": None, "data": None, "recipe": None}
    for version, expected in (("0" * 40, "base_model: openai-community/gpt2\n"), ("0" * 64, None)):
        begun_from = {"name": "openai-community/gpt2", "version": version}
        card = model_card(record | {"run": run | {"begun_from": begun_from}}, None, None)
        assert "It began with the weights of openai-community/gpt2." in card
        assert (expected in card) if expected else "base_model" not in card
