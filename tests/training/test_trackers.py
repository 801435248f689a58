"""A tracker that fails, hangs or is full costs the run nothing, and a resumed run is one curve there."""

import json
import threading

import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny, with_steps

from gpt2_hf.training import trackers


class Recorder(GeneralTracker):
    """Stands for wandb; what it was told is in ``told``."""

    name = "wandb"
    requires_logging_directory = False
    told: list[tuple] = []

    def __init__(self, run_name, **kwargs):
        super().__init__()
        self.told.append(("init", kwargs))

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.told.append(("config", values))

    def log(self, values, step=None, **kwargs):
        self.told.append(("log", step, values))

    def finish(self):
        self.told.append(("finish",))


@pytest.fixture
def tracked(data, tmp_path, monkeypatch):
    """A run of 6 steps that is tracked by the class given, and the class's record."""

    def make(kind: type[Recorder], **changes):
        kind.told = []
        monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", kind)
        monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB])
        config = tiny(data, tmp_path / "run", train__steps=6, train__trackers=["wandb"], checkpoint__save_every=3)
        return config, kind.told

    return make


def test_a_resumed_run_is_one_curve(tracked, tmp_path):
    config, told = tracked(Recorder)
    run(with_steps(config, 3))
    run(config)
    begun = [entry[1] for entry in told if entry[0] == "init"]
    name = json.loads((tmp_path / "run" / "tracker.json").read_text())["id"]
    assert begun == [{"id": name, "name": "run", "resume": "allow"}] * 2
    assert [entry[1] for entry in told if entry[0] == "log"] == list(range(1, 7))
    assert all(entry[2]["train_loss"] for entry in told if entry[0] == "log")
    assert told.count(("finish",)) == 2 and ("config" in {entry[0] for entry in told})
    assert trackers.run_id(tmp_path / "run", is_new=True) != name
    (tmp_path / "run" / "tracker.json").write_text("{")
    assert len(trackers.run_id(tmp_path / "run", is_new=False)) == 8


class Failing(Recorder):
    def log(self, values, step=None, **kwargs):
        super().log(values, step)
        if step in (2, 4):
            raise ConnectionError("the service\nis down")

    def finish(self):
        raise ConnectionError("gone")


def test_a_tracker_that_raises_is_named_once(tracked, capsys):
    config, told = tracked(Failing)
    assert len(losses(run(config))) == 6
    said = capsys.readouterr().out
    assert said.count("a tracker fails (ConnectionError: the service is down): training goes on") == 1
    assert "gone" not in said and [entry[1] for entry in told if entry[0] == "log"] == list(range(1, 7))


class Unwilling(Recorder):
    def __init__(self, run_name, **kwargs):
        raise RuntimeError("no key")


def test_a_tracker_that_does_not_begin_is_named(tracked, capsys):
    config, _ = tracked(Unwilling)
    assert len(losses(run(config))) == 6
    assert capsys.readouterr().out.count("a tracker cannot be used (RuntimeError: no key)") == 1


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_tracker_that_hangs_is_left(tracked, monkeypatch, capsys, moment):
    forever = threading.Event()
    hanging = type("Hanging", (Recorder,), {moment: lambda *args, **kwargs: forever.wait()})
    monkeypatch.setattr(trackers, "PATIENCE", 0.05 if moment == "start" else 2)
    monkeypatch.setattr(trackers, "WAITING", 2 if moment == "log" else 100)
    config, _ = tracked(hanging)
    assert len(losses(run(config))) == 6
    said = capsys.readouterr().out
    assert said.count("does not answer") == (moment == "start")
    assert said.count("does not keep up, and misses rows") == (moment == "log")
    assert said.count("did not take in its last rows in time") == 1
    forever.set()
