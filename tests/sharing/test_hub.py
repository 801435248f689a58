"""Publishing to a Hub that speaks HTTP: what arrives there loads, and what goes wrong leaves nothing half-made."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import write_shards
from hub_server import TOKEN, serving
from small_gpt2 import edit_weights, save

from gpt2_hf.runs import read_rows, write_folder
from gpt2_hf.sharing import hub as hub_calls
from gpt2_hf.sharing import publish as publishing
from gpt2_hf.sharing.privacy import PublishError
from gpt2_hf.sharing.publish import publish
from gpt2_hf.sharing.verify import Result

SCRIPT = Path(__file__).parents[2] / "scripts" / "publish.py"
LOAD = """
import json, sys
class Hide:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "gpt2_hf": raise ImportError(name)
sys.meta_path.insert(0, Hide())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained("me/x") for auto in (AutoModelForCausalLM, AutoTokenizer))
total = sum(weight.double().sum().item() for weight in model.state_dict().values())
print(json.dumps([type(model).__name__, total, tokenizer("Hello")["input_ids"]]))
"""


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture
def run(tmp_path) -> Path:
    write_folder(tmp_path / "run" / "final", save)
    return tmp_path / "run"


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """This process's huggingface_hub asks the stand-in, and waits for nothing; the checks pass."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    files = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    passes = [Result("everything", "ok", "fine")]
    monkeypatch.setattr(publishing, "check_folders", lambda paths, *_: {paths[0]: passes})
    huggingface_hub.close_session()  # a client made before may be kept offline
    yield hub
    huggingface_hub.close_session()


def outside(hub, home, *command):
    """A command in a process of its own that knows the stand-in as the Hub."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, *command], env=kept | own, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pushed_by_the_command_loaded_by_stock_transformers(hub, run, tmp_path):
    output = outside(hub, tmp_path, str(SCRIPT), str(run), "--repo", "me/x")
    assert f"{hub.url}/me/x" in output
    repo = hub.repos["me/x"]
    assert repo["private"] is True and len(repo["commits"]) == 2  # the empty one, and ours
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert repo["commits"][-1].keys() == names | {"README.md", "figures.json"}
    for name in names:
        assert repo["commits"][-1][name] == (run / "final" / name).read_bytes()

    hub.faults.append(["GET", "model.safetensors", "truncate", 1])
    kind, total, tokens = json.loads(outside(hub, tmp_path, "-c", LOAD).splitlines()[-1])
    assert hub.faults[0][3] == 0  # the download did break off
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert kind == "GPT2LMHeadModel" and len(tokens) == 5
    assert total == pytest.approx(sum(weight.double().sum().item() for weight in expected.values()), rel=1e-12)


FAULTS = [
    ("GET", "whoami", 401, "the token is not valid"),
    ("GET", "whoami", 429, "too many requests (429)"),
    ("GET", "whoami", "reset", "the Hub cannot be reached"),
    ("GET", "whoami", "stall", "the Hub cannot be reached"),
    ("POST", "preupload", 403, "this token may not write to me/x"),
    ("POST", "preupload", "stall", "the Hub cannot be reached"),
    ("POST", "batch", 500, "the Hub answers 500"),
    ("PUT", "blobs", 500, "the Hub answers 500"),
    ("PUT", "blobs", "truncate", "the Hub cannot be reached"),
    ("POST", "commit", 401, "the token is not valid"),
    ("POST", "commit", 429, "too many requests (429)"),
    ("POST", "commit", 500, "the Hub answers 500"),
    ("POST", "commit", "reset", "the Hub cannot be reached"),
    ("POST", "commit", "stall", "the Hub cannot be reached"),
]


@pytest.mark.parametrize(("method", "path", "fault", "words"), FAULTS, ids=lambda value: str(value))
def test_a_hub_in_trouble_is_one_line_and_nothing_half_made(here, run, monkeypatch, method, path, fault, words):
    publish(run, "me/x")
    before = list(here.repos["me/x"]["commits"])
    edit_weights(run / "final", lambda w: w["transformer.wte.weight"].add_(1))
    monkeypatch.setattr(hub_calls, "STALL_S", 0.5)
    here.faults.append([method, path, fault, 1000])
    with pytest.raises(PublishError) as error:
        publish(run / "final", "me/x")
    assert words in str(error.value) and "\n" not in str(error.value) and TOKEN not in str(error.value)
    assert here.faults[0][3] < 1000 and here.repos["me/x"]["commits"] == before

    here.faults.clear()
    publish(run / "final", "me/x")
    assert len(here.repos["me/x"]["commits"]) == len(before) + 1
    assert here.repos["me/x"]["commits"][-1]["model.safetensors"] == (run / "final/model.safetensors").read_bytes()


@pytest.mark.parametrize(("path", "fault"), [("blobs", 500), ("blobs", "truncate"), ("preupload", 429)])
def test_what_passes_is_tried_again(here, run, path, fault):
    here.faults.append(["PUT" if path == "blobs" else "POST", path, fault, 2])
    assert publish(run, "me/x")
    assert here.faults[0][3] == 0 and len(here.repos["me/x"]["commits"]) == 2


def test_a_repository_that_cannot_be_made_is_not_half_made(here, run):
    here.faults.append(["POST", "create", 500, 1000])
    with pytest.raises(PublishError, match="the Hub answers 500"):
        publish(run, "me/x")
    assert here.faults[0][3] < 1000 and not here.repos


def test_a_run_in_training_reaches_the_hub_by_a_process_of_its_own(hub, tmp_path):
    """Checkpoints of a run whose Hub answers 500 at first: the curve is that of a run without, and all gets there."""
    rng = np.random.Generator(np.random.Philox(9))
    documents = {split: [[rng.integers(0, 90, 60).tolist() for _ in range(40)]] for split in ("train", "val")}
    data = write_shards(tmp_path, documents)
    recipe = {
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32},
        "data": {"path": str(data), "seq_len": 32},
        "train": {"steps": 6, "global_batch_tokens": 256, "micro_batch_size": 8, "log_every": 1, "compile": "off"},
        "eval": {"val_every": 3, "val_tokens": 64, "hellaswag_every": 0, "sample_every": 0},
        "checkpoint": {"save_every": 3},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [str(SCRIPT.with_name("pretrain.py")), "--config", str(tmp_path / "recipe.yaml"), "--train.run_dir"]
    outside(hub, tmp_path, *command, str(tmp_path / "alone"))
    hub.faults.append(["POST", "commit", 500, 1])
    published = ["--publish.repo", "me/y", "--publish.every_steps", "3", "--publish.wait_s", "120"]
    outside(hub, tmp_path, *command, str(tmp_path / "run"), *published)
    rows, alone = (
        [
            (row["step"], row.get("train_loss"), row.get("val_loss"))
            for row in read_rows(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("run", "alone")
    )
    assert rows == alone and hub.faults[0][3] == 0
    assert hub.repos["me/y"]["private"] is True
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    assert hub.repos["me/y"]["commits"][-1]["model.safetensors"] == final
