"""A line for each thing that training needs: ok where it is there, what to do where it isn't."""

import json
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_train import clean_state as clean_state

from gpt2_hf import hardware
from gpt2_hf.planning import doctor, smoke
from gpt2_hf.planning.doctor import Finding, examine, report

SCRIPT = Path(__file__).parents[2] / "scripts" / "doctor.py"


def only(findings) -> Finding:
    (finding,) = findings
    assert "\n" not in str(finding)
    return finding


def of(findings, what: str) -> list[Finding]:
    return [finding for finding in findings if finding.what == what]


@pytest.mark.parametrize(
    ("name", "found", "mark", "says"),
    [
        ("torch", "2.10.0", "do", "torch is 2.10.0, and >=2.11 is needed: pip install"),
        ("transformers", None, "do", "transformers is not installed: pip install"),
        ("transformers", "99.0", "note", "transformers 99.0 (5.24.0)"),
        ("tiktoken", "0.12.0", "note", "tiktoken 0.12.0 takes quadratic time"),
    ],
)
def test_releases_that_are_too_old_absent_untested_or_bad_are_named(monkeypatch, name, found, mark, says):
    installed = doctor.version

    def version(package: str) -> str:
        if package == name and found is None:
            raise doctor.PackageNotFoundError(package)
        return found if package == name else installed(package)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr("gpt2_hf.model.versions.version", version)
    told = of(doctor.packages(), "packages")
    assert any(finding.mark == mark and says in finding.text for finding in told)
    assert any(finding.mark == "ok" for finding in told) == (mark == "note")


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_PYTHON", (4, 0))
    finding = only(of(doctor.packages(), "python"))
    assert finding.mark == "do" and "install 4.0 or newer" in finding.text


def test_a_card_that_torch_does_not_see_is_something_to_do(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "pick_device", lambda name: doctor.torch.device("cpu"))
    assert only(doctor.devices()).mark == "ok"
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    to_do, cpu = doctor.devices()
    assert to_do.mark == "do" and "driver 580.1" in to_do.text and cpu.mark == "ok"


def test_without_a_compiler_training_works_slower(monkeypatch):
    monkeypatch.setattr(hardware, "compile_obstacle", lambda device: "no C++ compiler found")
    finding = only(doctor.compiler())
    assert finding.mark == "note" and finding.text.startswith("no C++ compiler found: training works without")
    shown = " ".join(finding.text for finding in doctor.attention())
    assert "flex_attention" not in shown.partition("also")[2].partition(";")[0]


def test_what_fits_is_predicted(monkeypatch):
    monkeypatch.setattr(hardware, "pick_device", lambda name: doctor.torch.device("cpu"))
    found = []
    for gigabytes in (1e3, 20, 2):
        monkeypatch.setattr(doctor, "room_here", lambda device, room=gigabytes: room * 1e9)
        found.append(only(doctor.memory()))
    assert [finding.mark for finding in found] == ["ok", "ok", "note"]
    assert "up to 512 windows" in found[0].text and "gradient_checkpointing true" in found[2].text
    assert 1 < int(found[1].text.split()[4]) < 64


def test_too_few_threads_are_seen(monkeypatch):
    monkeypatch.setattr(hardware, "pick_device", lambda name: doctor.torch.device("cpu"))
    monkeypatch.setattr(hardware, "usable_cpus", lambda: 1000)
    monkeypatch.setattr(doctor.psutil, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    finding = only(doctor.threads())
    assert finding.mark == "note" and "OMP_NUM_THREADS is 1" in finding.text
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(doctor.psutil, "getloadavg", lambda: (900.0, 0.0, 0.0))
    assert [finding.mark for finding in doctor.threads()] == ["ok", "note"]


def test_the_disk_is_that_of_the_runs(monkeypatch, tmp_path):
    finding = only(doctor.disk(tmp_path / "not" / "there" / "yet"))
    assert str(tmp_path) in finding.text and "MB/s" in finding.text
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: doctor.shutil._ntuple_diskusage(1e10, 1e10, 1e9))
    assert only(doctor.disk(tmp_path)).mark == "note"

    def refuse(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    finding = only(doctor.disk(tmp_path))
    assert finding.mark == "do" and "Read-only file system" in finding.text


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_the_hub_is_no_condition_and_a_token_is_never_shown(monkeypatch, token):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in only(doctor.hub()).text
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        finding = only(doctor.hub())
    assert finding.mark == "ok" and "answers" in finding.text and "secret" not in finding.text
    assert ("a token is there" in finding.text) == (token is not None)
    finding = only(doctor.hub())  # nobody listens there now
    assert finding.mark == "ok" and "cannot be reached" in finding.text


def test_two_processes_add_up_a_tensor(monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "device_count", lambda: 0)
    assert only(doctor.processes()).mark == "ok"
    monkeypatch.setattr(doctor, "PEER", "raise SystemExit('no route')")
    finding = only(doctor.processes())
    assert finding.mark == "note" and "no route" in finding.text


def ended(code: int, out: str = "", errors: str = ""):
    return lambda command, **options: subprocess.CompletedProcess(command, code, out, errors)


@pytest.mark.parametrize(
    ("result", "mark", "says"),
    [
        (ended(-11), "do", "ended by SIGSEGV: try --train.compile off"),
        (ended(1, errors="Traceback\nRuntimeError: no such kernel"), "do", "RuntimeError: no such kernel"),
        (
            ended(0, json.dumps({"first_loss": 10.8, "last_loss": 10.7, "tokens_per_sec": 5.0, "first_s": 1.0})),
            "do",
            "1",
        ),
        (
            ended(0, json.dumps({"first_loss": 10.8, "last_loss": 6.7, "tokens_per_sec": 5.0, "first_s": 1.0})),
            "ok",
            "6.70",
        ),
    ],
)
def test_what_becomes_of_the_trial(monkeypatch, result, mark, says):
    monkeypatch.setattr(doctor.subprocess, "run", result)
    finding = only(doctor.trial(1.0))
    assert finding.mark == mark and says in finding.text


def test_the_trial_learns_on_the_packaged_plays(monkeypatch):
    monkeypatch.setattr(hardware, "compile_obstacle", lambda device: "not now")
    found = smoke.smoke(1.0)
    assert 10.5 < found["first_loss"] < 11.2 and found["first_loss"] - found["last_loss"] > doctor.LEAST_FALL
    assert found["tokens_per_sec"] > 0


def test_a_check_that_fails_itself_is_a_line_and_the_others_follow(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("an odd\nmachine")
        yield

    for name in ("attention", "processes"):
        monkeypatch.setattr(doctor, name, broken)
    found = list(examine(tmp_path, smoke_s=0))
    assert [f.mark for f in found if "an odd machine" in f.text] == ["note", "note"]
    assert {"python", "packages", "disk", "hub", "compiler"} <= {finding.what for finding in found}


def test_the_last_line_and_the_status_say_whether_training_can_work(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--seconds", "0"])
    monkeypatch.setattr(
        doctor, "examine", lambda run_dir, seconds: iter([Finding("ok", "a", "b"), Finding("do", "c", "d")])
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert end.value.code == 1 and "1 thing to do" in capsys.readouterr().out
    said: list[str] = []
    assert report(iter([Finding("note", "a", "b")]), said.append)
    assert said[-1].strip() == "training can work here; 1 note"
