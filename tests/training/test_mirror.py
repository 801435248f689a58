"""A run's copy in object storage: whole or not there, never waited for, and enough for a fresh machine."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from test_remote import faults, new_url, upload
from test_remote import proxy as proxy
from test_remote import s3_server as s3_server
from test_resume import FLAT, asked, refusal, start_of
from test_rewind import Harm, flat, same_weights, worse_weights
from test_stop import is_alive
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny, with_steps

from gpt2_hf import runs
from gpt2_hf.config import CheckpointSection
from gpt2_hf.data.storage import Retry, Storage
from gpt2_hf.runs import read_rows
from gpt2_hf.training import stored_run
from gpt2_hf.training.loop import train
from gpt2_hf.training.mirror import Mirror
from gpt2_hf.training.start import Rewind
from gpt2_hf.training.stored_run import Copy, Keep, fetch_newest

QUICK = Retry(timeout=20, first_wait=0.01, longest_wait=0.02, give_up=30)
KEEP_ALL = Keep(keep_last=100, keep_every=0, keep_best=True)


def write(folder: Path, text: str, step: int | None = None) -> None:
    """A model's folder; a checkpoint where a step is given."""

    def put(path: Path) -> None:
        for name, content in (("config.json", "{}"), ("model.safetensors", text)):
            (path / name).write_text(content)
        if step is not None:
            (path / "trainer_state").mkdir()
            (path / "trainer_state" / "state.json").write_text(json.dumps({"step": step}))

    runs.write_folder(folder, put)


@pytest.fixture
def small_run(tmp_path):
    """Checkpoints of steps 10, 20 and 30, and final, of a few bytes each."""
    for step in (10, 20, 30):
        write(tmp_path / "run" / "checkpoints" / runs.step_name(step), f"weights {step}", step)
    write(tmp_path / "run" / "final", "weights 30")
    rows = [{"step": step, "val_loss": loss} for step, loss in ((10, 1.0), (20, 3.0), (30, 2.0))]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run"


def copy_all(small_run: Path, url: str, *arguments, retry: Retry = QUICK) -> list[str]:
    copy = Copy(small_run, Storage.open(url, retry), *arguments)
    copied = []
    while left := copy.left():
        copy.add(left[0])
        copied.append(left[0])
    return copied


def there(url: str) -> dict[str, bytes]:
    storage = Storage.open(url, QUICK)
    return {name: storage.read_file(name) for name in storage.find()}


def steps_there(url: str) -> list[int]:
    return stored_run.steps_there(set(there(url)))


def mirrored(config, url: str, **changes):
    checkpoint = dataclasses.replace(config.checkpoint, mirror=url, **changes)
    return dataclasses.replace(config, checkpoint=checkpoint)


def moved_to(config, run_dir: Path):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(run_dir)))


@pytest.mark.parametrize("kind", ["memory", "file", "s3"])
def test_a_copy_is_the_run_and_comes_back_equal(small_run, tmp_path, request, kind):
    if kind == "s3":
        request.getfixturevalue("proxy")
    url = new_url(kind, tmp_path)
    if kind == "s3":
        upload(url.rpartition("/")[0], {"other": b"of someone else"})
    assert copy_all(small_run, url, KEEP_ALL, 0) == [
        "checkpoints/step-00000030", "final", "checkpoints/step-00000020", "checkpoints/step-00000010",
    ]  # fmt: skip
    local = {p.relative_to(small_run).as_posix(): p.read_bytes() for p in small_run.rglob("*") if p.is_file()}
    assert there(url) == local
    assert copy_all(small_run, url, KEEP_ALL, 30) == []  # another process finds it there

    fresh, seen = tmp_path / "fresh", []
    fresh.mkdir()
    found = fetch_newest(fresh, url, lambda state, where: seen.append((state["step"], where)))
    assert found == fresh / "checkpoints" / "step-00000030" and runs.problem(found) is None
    assert seen == [(30, f"{url}/checkpoints/step-00000030")]
    assert (fresh / "metrics.jsonl").read_bytes() == local["metrics.jsonl"]
    assert {p.name for p in fresh.iterdir()} == {"checkpoints", "metrics.jsonl"}
    assert fetch_newest(fresh, url, lambda *_: None, only=10).name == "step-00000010"
    assert fetch_newest(fresh, url, lambda *_: None, only=11) is None
    assert fetch_newest(fresh, url + "/empty", lambda *_: None) is None


def test_a_copy_keeps_what_the_run_would_keep(small_run, tmp_path):
    url = new_url("file", tmp_path)
    assert copy_all(small_run, url, Keep(1, 0, True), 0) == [
        "checkpoints/step-00000030",
        "final",
        "checkpoints/step-00000010",
    ]
    assert steps_there(url) == [30, 10]  # the best, by validation loss
    write(small_run / "checkpoints" / "step-00000040", "weights 40", 40)
    (tmp_path / "storage" / "checkpoints" / "step-00000025").mkdir()
    (tmp_path / "storage" / "checkpoints" / "step-00000025" / "model.safetensors").write_text("broken off")
    assert copy_all(small_run, url, Keep(1, 30, False), 30) == ["checkpoints/step-00000040"]
    assert steps_there(url) == [40, 30]
    left = {path.name for path in (tmp_path / "storage" / "checkpoints").iterdir()}
    assert left == {"step-00000040", "step-00000030"}

    copy_all(small_run, url, Keep(1, 0, True), 40)
    assert steps_there(url) == [40, 10]
    for path in (small_run / "checkpoints").glob("step-000000[123]0"):
        shutil.rmtree(path)  # as on a fresh machine, which has brought no more than the newest
    write(small_run / "checkpoints" / "step-00000050", "weights 50", 50)
    copy_all(small_run, url, Keep(1, 0, True), 40)
    assert steps_there(url) == [50, 10]

    damaged = small_run / "checkpoints" / "step-00000040" / "model.safetensors"
    damaged.write_text("weights 41")
    copied = copy_all(small_run, new_url("memory", tmp_path), KEEP_ALL, 0)
    assert copied == ["checkpoints/step-00000050", "final"]  # nor is damage copied


def test_what_a_start_leaves_behind_is_moved_aside_there_too(small_run, tmp_path):
    url = new_url("file", tmp_path)
    copy_all(small_run, url, KEEP_ALL, 0)
    before = there(url)
    for step in (20, 30):
        shutil.rmtree(small_run / "checkpoints" / runs.step_name(step))
    shutil.rmtree(small_run / "final")
    copy = Copy(small_run, Storage.open(url, QUICK), KEEP_ALL, 10)
    assert copy.left() == [] and steps_there(url) == [10]
    moved = {name.removeprefix("before-1/"): content for name, content in there(url).items() if "before-1/" in name}
    assert moved == {name: content for name, content in before.items() if "00010" not in name}
    Copy(small_run, Storage.open(url, QUICK), KEEP_ALL, 0)  # and now from the beginning
    assert steps_there(url) == [] and "before-2/checkpoints/step-00000010/manifest.json" in there(url)


def test_a_run_that_goes_back_does_so_there_too(small_run, tmp_path):
    url = new_url("file", tmp_path)
    copy_all(small_run, url, KEEP_ALL, 0)
    copy = Copy(small_run, Storage.open(url, QUICK), KEEP_ALL, 30)
    for step in (20, 30):
        shutil.rmtree(small_run / "checkpoints" / runs.step_name(step))
    shutil.rmtree(small_run / "final")
    Rewind(step=10, rewound_from=33, data_offset=23, times=1).write(small_run)
    assert copy.left() == [] and steps_there(url) == [10]
    write(small_run / "checkpoints" / "step-00000020", "weights 43", 20)
    assert copy.left() == ["checkpoints/step-00000020"]
    copy.add(copy.left()[0])
    assert copy.left() == [] and "before-1/final/manifest.json" in there(url)
    (fresh := tmp_path / "fresh").mkdir()
    assert (fetch_newest(fresh, url, lambda *_: None) / "model.safetensors").read_text() == "weights 43"
    assert Rewind.read(fresh) == Rewind.read(small_run)


def cut(path: Path) -> None:
    os.truncate(path / "model.safetensors", 3)


def same_size(path: Path) -> None:
    (path / "model.safetensors").write_text("Weights 30")


def text(name: str, content: str):
    return lambda path: (path / name).write_text(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "model.safetensors has 3 bytes instead of 10"),
        (same_size, "model.safetensors is not what its manifest.json says"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        *((text("manifest.json", content), "") for content in ("{}", "[]", "null", "", "\0", "[" * 100_000)),
        (text("manifest.json", '{"../../x": {"bytes": 1, "sha256": "x"}}'), "leads out of the folder"),
        (text("trainer_state/state.json", "[123456789]"), "has 11 bytes instead of 12"),
        (text("trainer_state/state.json", "[1234567890]"), "stands for what it says of itself"),
        (lambda path: (path / "manifest.json").unlink(), None),  # half a copy, of which nothing is to be said
    ],
)
def test_damage_there_is_passed_over_by_name(small_run, tmp_path, capsys, harm, words):
    url = new_url("file", tmp_path)
    copy_all(small_run, url, KEEP_ALL, 0)
    harm(tmp_path / "storage" / "checkpoints" / "step-00000030")
    fresh = tmp_path / "fresh"
    assert fetch_newest(fresh, url, lambda *_: None) == fresh / "checkpoints" / "step-00000020"
    said = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert len(said) == (words is not None) and all(
        "step-00000030 is damaged" in line and words in line for line in said
    )
    assert [path.name for path in (fresh / "checkpoints").iterdir()] == ["step-00000020"]


def test_a_storage_in_trouble_is_asked_until_all_is_there_manifests_last(proxy, small_run, tmp_path, monkeypatch):
    url = new_url("s3", tmp_path)
    upload(url, {"other": b"x"})
    chance = random.Random(7)
    proxy.plan = lambda request: chance.choice(
        ["", "", "", "500", "503", "reset", "stall" if chance.random() < 0.3 else ""]
    )
    proxy.requests.clear()
    retry = Retry(timeout=0.7, first_wait=0.01, longest_wait=0.02, give_up=120)
    copy_all(small_run, url, KEEP_ALL, 0, retry=retry)
    proxy.plan = lambda request: ""
    local = {p.relative_to(small_run).as_posix(): p.read_bytes() for p in small_run.rglob("*") if p.is_file()}
    assert there(url) == local | {"other": b"x"}
    put = [request.path.partition("?")[0] for request in proxy.requests if request.method == "PUT"]
    for folder in ("checkpoints/step-00000030", "final"):
        names = [path.rpartition("/")[2] for path in put if f"{folder}/" in path]
        first = names.index("manifest.json")
        assert len(names) > 3 and set(names[first:]) == {"manifest.json"}, names

    monkeypatch.setattr(stored_run, "AT_START", QUICK)
    proxy.plan = faults("model.safetensors", "500", "truncate", "reset", "503", "truncate")
    assert fetch_newest(tmp_path / "fresh", url, lambda *_: None).name == "step-00000030"


def test_a_fresh_machine_goes_on_where_the_last_one_was(data, tmp_path, capsys):
    """One run on three machines, the last of which only hears that it is finished, against one straight run."""
    url = new_url("file", tmp_path)
    config = tiny(data, tmp_path / "a", train__steps=4, checkpoint__save_every=2, eval__val_every=4, **FLAT)
    straight = run(with_steps(moved_to(config, tmp_path / "straight"), 8))
    run(mirrored(config, url))
    assert steps_there(url) == [4, 2] and "is finished" not in capsys.readouterr().out
    assert (tmp_path / "a" / "mirror.log").read_text().count(" copied ") == 3
    shutil.rmtree(tmp_path / "a")

    rows = run(with_steps(mirrored(moved_to(config, tmp_path / "b"), url), 8))
    said = capsys.readouterr().out
    assert f"fetching {url}/checkpoints/step-00000004" in said and "train.steps was 4, now 8" in said
    assert losses(rows) == losses(straight) and [row["step"] for row in rows] == [row["step"] for row in straight]
    final = (tmp_path / "straight" / "final" / "model.safetensors").read_bytes()
    assert there(url)["final/model.safetensors"] == final and steps_there(url) == [8, 6]
    assert read_rows(tmp_path / "storage" / "metrics.jsonl") == rows

    other = tiny(data, tmp_path / "c", train__steps=8, train__seed=3, optim__name="muon")
    said = refusal(mirrored(other, url))
    assert (
        f"{url}/checkpoints/step-00000008 holds a run with another train.seed (1337, now 3), another optim.name" in said
    )
    assert not (tmp_path / "c" / "checkpoints").exists()  # nothing was fetched of it

    run(with_steps(mirrored(moved_to(config, tmp_path / "d"), url), 8))
    assert (tmp_path / "d" / "final" / "model.safetensors").read_bytes() == final


def test_a_fresh_machine_goes_on_past_what_a_run_has_gone_back_from(data, tmp_path, monkeypatch):
    """Back from step 25 to 12, the last that is saved; all else that the first machine made is lost with it."""
    url = new_url("file", tmp_path)
    config = flat(data, tmp_path / "a", checkpoint__keep_last=9)
    Harm(monkeypatch, worse_weights, {23})
    straight = run(moved_to(config, tmp_path / "straight"))
    monkeypatch.undo()
    Harm(monkeypatch, worse_weights, {23})
    run(mirrored(config, url))
    monkeypatch.undo()
    for folder in ("step-00000024", "step-00000030"):
        shutil.rmtree(tmp_path / "storage" / "checkpoints" / folder)
    shutil.rmtree(tmp_path / "storage" / "final")
    rows = run(mirrored(moved_to(config, tmp_path / "b"), url))
    assert losses(rows) == losses(straight) and [r for r in rows if "rewound_from" in r]
    assert same_weights(tmp_path / "straight", tmp_path / "b")


def test_a_damaged_run_goes_on_from_its_mirror(data, tmp_path):
    url = new_url("file", tmp_path)
    config = mirrored(tiny(data, tmp_path / "run", train__steps=4, checkpoint__save_every=2, **FLAT), url)
    run(config)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{}")
    assert start_of(config).step == 4 and runs.problem(start_of(config).checkpoint) is None
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    assert start_of(asked(config, from_=2)).step == 2  # of those that are there


def test_a_storage_that_does_not_answer_is_no_reason_to_begin_anew(data, tmp_path, proxy, monkeypatch):
    monkeypatch.setattr(stored_run, "AT_START", Retry(timeout=1, first_wait=0.01, longest_wait=0.02, give_up=0.3))
    url = new_url("s3", tmp_path)
    config = mirrored(tiny(data, tmp_path / "run", train__steps=2), url, mirror_wait_s=0)
    proxy.plan = lambda request: "503"
    said = refusal(config)
    assert said.startswith(f"checkpoint.mirror: {url}: HTTP 503") and said.endswith("--resume.mode never")
    proxy.plan = lambda request: ""
    assert "bucket does not exist" in refusal(config)
    assert len(losses(run(asked(config, "never")))) == 2
    for wrong, words in (("nosuch://x/y", "nosuch"), (str(tmp_path / "run"), "is the run's own folder")):
        assert words in refusal(mirrored(config, wrong))


@pytest.mark.parametrize("fault", ["stall", "403"])
def test_a_storage_that_never_takes_anything_costs_nothing_but_the_copies(data, tmp_path, proxy, capsys, fault):
    url = new_url("s3", tmp_path)
    upload(url, {"other": b"x"})
    config = tiny(data, tmp_path / "run", train__steps=4, checkpoint__save_every=1, **FLAT)
    straight = losses(run(moved_to(config, tmp_path / "straight")))
    proxy.plan = lambda request: fault if request.method == "PUT" else ""
    capsys.readouterr()
    assert losses(run(mirrored(config, url, mirror_wait_s=0.5))) == straight
    said = capsys.readouterr().out
    assert f"the mirror {url} lacks step-00000003, step-00000004, final after 0 s" in said
    assert f"python -m gpt2_hf.training.mirror {tmp_path}/run URL" in said
    assert runs.damage(tmp_path / "run" / "final") is None

    proxy.plan = lambda request: ""  # later, and by hand
    command = [sys.executable, "-m", "gpt2_hf.training.mirror", str(tmp_path / "run"), url]
    subprocess.run(command, check=True, timeout=60)
    assert steps_there(url) == [4, 3] and "final/manifest.json" in there(url)


def wait_until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_copying_process_that_is_killed_is_started_again(small_run, tmp_path, proxy, capsys):
    url = new_url("s3", tmp_path)
    upload(url, {"other": b"x"})
    proxy.plan = lambda request: "slow" if request.method == "PUT" else ""
    keep = CheckpointSection(mirror=url)
    followed = Mirror(small_run, keep, 30)
    try:
        wait_until(lambda: any(request.method == "PUT" for request in proxy.requests))
        followed._process.kill()
        assert not [name for name in there(url) if name.endswith("manifest.json")]  # nothing half is whole
        proxy.plan = lambda request: ""
        followed.finish(60)
    finally:
        followed.stop()
    said = capsys.readouterr().out
    assert "the mirror's process ended" in said and "lacks" not in said
    assert steps_there(url) == [30, 20, 10] and not (small_run / stored_run.LINKS).exists()


def test_a_checkpoint_that_is_pruned_while_it_is_copied_arrives_whole(small_run, tmp_path, monkeypatch):
    url = new_url("file", tmp_path)
    copy, write_file = Copy(small_run, Storage.open(url, QUICK), KEEP_ALL, 30), Storage.write

    def write_late(storage, name, file):
        shutil.rmtree(small_run / "checkpoints", ignore_errors=True)
        write_file(storage, name, file)

    monkeypatch.setattr(Storage, "write", write_late)
    copy.add("checkpoints/step-00000030")
    copy.add("checkpoints/step-00000020")  # gone before it began
    assert steps_there(url) == [30] and fetch_newest(tmp_path / "fresh", url, lambda *_: None)


def test_the_copying_process_ends_with_the_training_process(small_run, tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from gpt2_hf.config import CheckpointSection\n"
        "from gpt2_hf.training.mirror import Mirror\n"
        f"m = Mirror(Path({str(small_run)!r}), CheckpointSection(mirror={new_url('file', tmp_path)!r}), 30)\n"
        "while not m._there: time.sleep(0.02)\n"
        "print(m._process.pid, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    assert is_alive(child)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not is_alive(child))


def test_no_secret_of_a_mirror_is_told(data, tmp_path, capfd):
    url = "http://me:hunter2@127.0.0.1:9/folder?token=hunter3"
    config = mirrored(tiny(data, tmp_path / "run", train__steps=2, checkpoint__save_every=2), url, mirror_wait_s=2)
    train(asked(config, "never"))
    AcceleratorState._reset_state(reset_partial_state=True)
    told = "".join(capfd.readouterr()) + "".join(
        path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file()
    )
    assert "the mirror http://***@127.0.0.1:9/folder?token=*** lacks step-00000002, final" in told
    assert "hunter" not in told and (tmp_path / "run" / "mirror.log").read_text()


def test_the_copying_process_is_light():
    program = "import sys, gpt2_hf.training.mirror; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
