"""Publishing while a run trains: what is due, once each, and a Hub in trouble that nobody waits for."""

import json
import os
import time
from pathlib import Path

import pytest

from gpt2_hf import runs
from gpt2_hf.config import CheckpointSection, PublishSection, RunConfig
from gpt2_hf.knobs import ConfigError
from gpt2_hf.sharing import follow, publish


def write(folder: Path, text: str) -> None:
    def put(path: Path) -> None:
        (path / "config.json").write_text("{}")
        (path / "model.safetensors").write_text(text)

    runs.write_folder(folder, put)


@pytest.fixture
def run(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path / "run" / "checkpoints" / runs.step_name(step), f"weights {step}")
    return tmp_path / "run"


def test_the_newest_that_is_due_goes_up_once_and_the_final_model_last(run, monkeypatch):
    pushed = []
    monkeypatch.setattr(publish, "publish", lambda path, repo, **given: pushed.append((path.name, given)) or True)
    settings = {"repo": "me/x", "public": False, "license": "mit"}
    assert follow.due(run, 0, False) is None
    path = follow.due(run, 20, False)
    follow.push_one(run, path, settings)
    assert follow.due(run, 20, False) is None
    write(run / "checkpoints" / runs.step_name(20), "weights after going back")
    follow.push_one(run, follow.due(run, 20, False), settings)
    write(run / "final", "weights 30")
    assert follow.due(run, 20, False) is None
    follow.push_one(run, follow.due(run, 20, True), settings)
    assert follow.due(run, 20, True) is None
    assert [name for name, _ in pushed] == ["step-00000020", "step-00000020", "final"]
    assert [given["license"] for _, given in pushed] == ["mit", None, None]


def test_an_interval_without_checkpoints_is_refused():
    RunConfig(publish=PublishSection(repo="me/x", every_steps=2000))
    for wrong in (PublishSection(every_steps=1000), PublishSection(repo="me/x", every_steps=1500)):
        with pytest.raises(ConfigError, match=r"publish\.every_steps"):
            RunConfig(publish=wrong, checkpoint=CheckpointSection(save_every=1000))


def test_a_hub_that_cannot_be_reached_costs_a_line_and_a_bounded_wait(run, monkeypatch, capfd):
    write(run / "final", "weights 30")
    for name, value in {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with follow.following(run, PublishSection(repo="me/x", wait_s=20), True):
        assert time.monotonic() - began < 20 and os.environ["HF_TOKEN"]
    said = capfd.readouterr().out
    assert "publishing to me/x fails, and is tried again: " in said and said.count("tried again") == 1
    assert f"publish it with: python scripts/publish.py {run} --repo me/x" in said
    assert not (run / follow.PUBLISHED).exists() and "hf_x" not in (run / follow.LOG).read_text()
    assert json.loads((run / "final" / runs.MANIFEST).read_text())
