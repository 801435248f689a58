"""Where a start begins: past any damage, where it is told to, and never anew by itself."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny, with_steps
from torch.nn import functional
from transformers import GPT2LMHeadModel

from gpt2_hf import runs
from gpt2_hf.config import ResumeSection
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.knobs import ConfigError
from gpt2_hf.runs import read_rows
from gpt2_hf.training.distributed import Host
from gpt2_hf.training.loop import train
from gpt2_hf.training.start import Start, find_start

FLAT = {"optim__min_lr_ratio": 1.0}  # or the rate would depend on the number of steps


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def asked(config, mode: str = "auto", from_: str | Path | None = None, force: tuple[str, ...] = ()):
    resume = ResumeSection(mode, None if from_ is None else str(from_), list(force))
    return dataclasses.replace(config, resume=resume)


def start_of(config) -> Start:
    return find_start(config, open_split(config.data.path, "train"), Host(PartialState(cpu=True)))


def refusal(config) -> str:
    with pytest.raises(ConfigError) as error:
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def begun(data, tmp_path):
    """A run with checkpoints of steps 2, 4 and 6, finished."""
    config = tiny(data, tmp_path / "run", train__steps=6, checkpoint__save_every=2, checkpoint__keep_last=3, **FLAT)
    run(config)
    return config


def manifest(text: bytes | str):
    return lambda f: (f / "manifest.json").write_bytes(text.encode() if isinstance(text, str) else text)


def entry(change):
    """The manifest with one entry, that of the weights, as ``change`` makes it."""

    def harm(folder: Path) -> None:
        entries = json.loads((folder / "manifest.json").read_text())
        changed = change(entries.pop("model.safetensors"))
        text = json.dumps(entries | ({} if changed is None else {"model.safetensors": changed}))
        (folder / "manifest.json").write_text(text)

    return harm


def replaced(put):
    return lambda f: (shutil.rmtree(f), put(f))


def state(text: str):
    """Another trainer_state/state.json in a folder that is whole."""

    def harm(folder: Path) -> None:
        (folder / "trainer_state" / "state.json").write_text(text)
        old = folder.rename(folder.with_name("old"))
        runs.write_folder(folder, lambda new: [path.rename(new / path.name) for path in old.glob("[!m]*")])
        (old / "model.safetensors").rename(folder / "model.safetensors")
        listed = json.loads((folder / "manifest.json").read_text())
        listed["model.safetensors"] = json.loads((old / "manifest.json").read_text())["model.safetensors"]
        (folder / "manifest.json").write_text(json.dumps(listed))
        shutil.rmtree(old)

    return harm


def pipe_in_place_of(name: str):
    return lambda f: ((f / name).unlink(), os.mkfifo(f / name))


HARMS = {
    "manifest: list": (manifest("[]"), "it lists no files"),
    "manifest: null": (manifest("null"), "it lists no files"),
    "manifest: number": (manifest("3"), "it lists no files"),
    "manifest: text": (manifest('"model.safetensors"'), "it lists no files"),
    "manifest: empty object": (manifest("{}"), "it lists no files"),
    "manifest: empty": (manifest(""), "manifest.json cannot be read"),
    "manifest: zeros": (manifest(b"\0" * 300), "manifest.json cannot be read"),
    "manifest: no UTF-8": (manifest(b"\xff\xfe\xff"), "manifest.json cannot be read"),
    "manifest: deep": (manifest("[" * 100_000), "nested too deeply"),
    "manifest: missing": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "manifest: folder": (lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()), "is not a file"),
    "manifest: pipe": (pipe_in_place_of("manifest.json"), "is not a file"),
    "manifest: NUL in a name": (manifest('{"a\\u0000b": {"bytes": 1, "sha256": "x"}}'), "leads out of the folder"),
    "manifest: no weights": (entry(lambda _: None), "manifest.json lists no weights"),
    "manifest: state left out": (
        lambda f: manifest(
            json.dumps({k: v for k, v in runs.read_manifest(f).items() if not k.startswith("trainer_state")})
        )(f),
        "is not in manifest.json",
    ),
    "entry: null": (entry(lambda _: []), "has no size or no hash"),
    "entry: number": (entry(lambda _: 3), "has no size or no hash"),
    "entry: no bytes": (entry(lambda e: {"sha256": e["sha256"]}), "has no size or no hash"),
    "entry: no hash": (entry(lambda e: {"bytes": e["bytes"]}), "has no size or no hash"),
    "entry: bytes are text": (entry(lambda e: e | {"bytes": str(e["bytes"])}), "has no size or no hash"),
    "entry: bytes are null": (entry(lambda e: e | {"bytes": None}), "has no size or no hash"),
    "entry: hash is a number": (entry(lambda e: e | {"sha256": 3}), "has no size or no hash"),
    "entry: another hash": (entry(lambda e: e | {"sha256": "0" * 64}), "has changed since it was written"),
    "file: missing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "file: cut": (lambda f: os.truncate(f / "model.safetensors", 100), "has 100 bytes instead of"),
    "file: a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors is missing",
    ),
    "file: dangling link": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("nowhere")),
        "model.safetensors is missing",
    ),
    "file: pipe": (pipe_in_place_of("model.safetensors"), "model.safetensors is no file"),
    "pipe beside the files": (lambda f: os.mkfifo(f / "model.safetensors.index.json"), "is no file"),
    "weights beside the weights": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json is not in manifest.json",
    ),
    "folder: link": (
        lambda f: (f.rename(f.parent.parent / "moved"), f.symlink_to(f.parent.parent / "moved")),
        "it is a symbolic link",
    ),
    "folder: dangling link": (replaced(lambda f: f.symlink_to("nowhere")), "it is a symbolic link"),
    "folder: link to itself": (replaced(lambda f: f.symlink_to(f.name)), "it is a symbolic link"),
    "folder: file": (replaced(lambda f: f.write_text("x")), "it is not a folder"),
    "folder: pipe": (replaced(lambda f: os.mkfifo(f)), "it is not a folder"),
    "folder: empty": (replaced(lambda f: f.mkdir()), "manifest.json cannot be read"),
    "folder: 10 digits": (lambda f: f.rename(f.with_name("step-0000000006")), "no checkpoint of a run is called so"),
    "folder: other name": (lambda f: f.rename(f.with_name("step-00000006.old")), "no checkpoint of a run is called so"),
    "folder: of another step": (lambda f: f.rename(f.with_name("step-00000009")), "it is the checkpoint of step 6"),
    "state: list": (state("[]"), "names no step"),
    "state: no step": (state("{}"), "names no step"),
    "state: step is text": (state('{"step": "6"}'), "names no step"),
    "state: not JSON": (state("{"), "state.json cannot be read"),
    "state: deep": (state("[" * 100_000), "state.json cannot be read"),
}


def test_whatever_the_newest_checkpoint_is_the_run_goes_on_from_the_one_before(begun, tmp_path, capsys):
    """Every harm on a copy of one real run; the lines name what was passed over."""
    run_dir = tmp_path / "run"
    shutil.copytree(run_dir, tmp_path / "kept", symlinks=True)
    for name, (harm, words) in HARMS.items():
        shutil.rmtree(run_dir)
        shutil.copytree(tmp_path / "kept", run_dir)
        harm(run_dir / "checkpoints" / "step-00000006")
        capsys.readouterr()
        assert start_of(begun) == Start(run_dir / "checkpoints" / "step-00000004", 4), name
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and words in said[0] and "step-" in said[0], (name, said)
        runs.prune(run_dir / "checkpoints", keep_last=1, keep_every=0)
        assert "step-00000004" in checkpoints(run_dir), name


@pytest.mark.parametrize(
    "name", ["folder: pipe", "folder: 10 digits", "manifest: state left out", "pipe beside the files"]
)
def test_a_harmed_run_goes_on_to_the_same_end(begun, tmp_path, name):
    """And saves over what is in its way."""
    straight = losses(read_rows(tmp_path / "run" / "metrics.jsonl"))
    HARMS[name][0](tmp_path / "run" / "checkpoints" / "step-00000006")
    final = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "final")
    assert losses(run(begun)) == straight
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == final
    assert runs.newest_whole(tmp_path / "run" / "checkpoints").name == "step-00000006"


def test_what_may_not_be_read_is_passed_over(begun, tmp_path, monkeypatch, capsys):
    """As root everything may be read, so the refusal is put in."""
    read = runs.sha256

    def refuse(path: Path):
        if path.match("step-00000006/model.safetensors"):
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(runs, "sha256", refuse)
    assert start_of(begun).step == 4
    assert "step-00000006 is damaged and not used: model.safetensors cannot be read (Permission denied)" in (
        capsys.readouterr().out
    )

    def closed(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(runs.os, "listdir", closed)
    assert "checkpoints cannot be read (Permission denied); choose another --train.run_dir" in refusal(begun)


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew_by_itself(begun, tmp_path, capsys):
    run_dir = tmp_path / "run"
    old_rows = (run_dir / "metrics.jsonl").read_text()
    for number in range(10, 14):
        (run_dir / "checkpoints" / f"step-{number:08d}").mkdir()
    for folder in (run_dir / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{}")
    said = refusal(begun)
    assert said.count("is damaged and not used") == 5 and "and 2 more" in said and "--resume.mode never" in said
    assert (run_dir / "metrics.jsonl").read_text() == old_rows and len(checkpoints(run_dir)) == 7

    capsys.readouterr()
    rows = run(asked(begun, "never"))
    assert f"beginning at step 0; what {run_dir} had so far is in {run_dir}/before-1" in capsys.readouterr().out
    assert losses(rows) == losses(read_rows(run_dir / "before-1" / "metrics.jsonl"))
    assert (run_dir / "before-1" / "metrics.jsonl").read_text() == old_rows
    assert runs.damage(run_dir / "before-1" / "final") is None and len(checkpoints(run_dir / "before-1")) == 7
    assert checkpoints(run_dir) == ["step-00000002", "step-00000004", "step-00000006"]
    assert start_of(begun).step == 6


def test_what_a_launcher_restarts_goes_on_though_it_was_told_to_begin_anew(begun, tmp_path, monkeypatch):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
        assert start_of(asked(begun, "never")).step == 6
        monkeypatch.setenv(name, "0")
    assert start_of(asked(begun, "never")) == Start() and (tmp_path / "run" / "before-1" / "final").is_dir()


def test_going_back_to_a_step_once(begun, tmp_path, capsys):
    run_dir, other = tmp_path / "run", dataclasses.replace(begun.optim, lr=3e-4)
    config = asked(dataclasses.replace(begun, optim=other), from_=2)
    first = read_rows(run_dir / "metrics.jsonl")
    rows = run(config)
    said = capsys.readouterr().out
    assert f"what {run_dir} had after it is in {run_dir}/before-1" in said and "changed since the last start: " in said
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert losses(rows)[:3] == losses(first)[:3] and losses(rows)[4:] != losses(first)[4:]
    assert checkpoints(run_dir / "before-1") == ["step-00000004", "step-00000006"]
    assert read_rows(run_dir / "before-1" / "metrics.jsonl") == first

    final = (run_dir / "final" / "model.safetensors").read_bytes()
    run(config)  # the same command: it has taken that step already
    assert "was taken by an earlier start" in capsys.readouterr().out and not (run_dir / "before-2").exists()
    assert (run_dir / "final" / "model.safetensors").read_bytes() == final
    shutil.rmtree(run_dir / "checkpoints" / "step-00000002")  # in time it is pruned
    assert losses(run(with_steps(config, 8)))[:6] == losses(rows)

    assert start_of(with_steps(begun, 8)).step == 8  # without it in between, it is a new wish
    said = refusal(with_steps(config, 8))
    assert "resume.from 2: no run can go on from" in said and said.endswith(
        f"steps with a checkpoint in {run_dir}: 4, 6, 8"
    )
    assert start_of(asked(with_steps(config, 8), from_="step-00000004")).step == 4
    assert checkpoints(run_dir / "before-2") == ["step-00000006", "step-00000008"]


def test_a_start_from_another_runs_checkpoint(begun, tmp_path, capsys):
    theirs = tmp_path / "run" / "checkpoints" / "step-00000004"
    new = dataclasses.replace(begun, train=dataclasses.replace(begun.train, run_dir=str(tmp_path / "new")))
    rows = run(asked(new, from_=theirs))
    assert f"resuming from {theirs}" in capsys.readouterr().out
    assert [row["step"] for row in rows] == [5, 6]
    assert losses(rows) == losses(read_rows(tmp_path / "run" / "metrics.jsonl"))[4:]
    assert len(checkpoints(tmp_path / "run")) == 3  # of which nothing is taken away

    (tmp_path / "new" / "checkpoints" / "step-00000006").rename(tmp_path / "away")
    assert start_of(asked(new, from_=theirs)) == Start(theirs, 4)  # killed before the first one of its own
    (tmp_path / "away").rename(tmp_path / "new" / "checkpoints" / "step-00000006")
    assert start_of(asked(new, from_=theirs)).step == 6
    for path, words in (
        (tmp_path / "run" / "final", "lists no|cannot be read"),
        (tmp_path, "manifest.json cannot be read"),
        (tmp_path / "nowhere", "it is not there"),
    ):
        assert "resume.from" in (said := refusal(asked(new, from_=path))) and any(w in said for w in words.split("|"))
    with pytest.raises(ConfigError, match="keep one of the two"):
        asked(new, "never", from_=2)


def test_all_that_differs_is_named_and_may_be_forced(begun, tmp_path, capsys):
    changed = dataclasses.replace(begun, train=dataclasses.replace(begun.train, seed=3, steps=8, overfit_batch=True))
    said = refusal(changed)
    assert "another train.seed (1337, now 3), another train.overfit_batch (False, now True)" in said
    assert said.endswith("or set them back, or go on all the same with --resume.force train.seed,train.overfit_batch")
    assert "another train.overfit_batch" in refusal(asked(changed, force=("train.seed",)))
    assert "resume.force: train.sead is not among model.n_layer" in refusal(asked(changed, force=("train.sead",)))

    capsys.readouterr()
    run(asked(changed, force=("train.seed", "train.overfit_batch")))
    said = capsys.readouterr().out
    assert (
        "resume.force: train.seed was 1337 in" in said and "changed since the last start: train.seed was 1337" in said
    )
    assert "changed since the last start: resume" not in said
    assert start_of(changed).step == 8  # its checkpoints are of the new recipe now

    wider = dataclasses.replace(changed, model=dataclasses.replace(begun.model, n_embd=64, dropout=0.1))
    said = refusal(asked(wider, force=("model.n_embd",)))
    assert "another model.n_embd (32, now 64)" in said and "model.n_embd cannot be forced" in said


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_checkpoint_with_the_lowest_validation_loss_stays(begun, tmp_path, keep_best):
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    rows[1]["val_loss"] = 0.5  # after step 2: better than it will ever be
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = dataclasses.replace(begun.checkpoint, keep_last=1, keep_best=keep_best)
    run(dataclasses.replace(with_steps(begun, 8), checkpoint=keep))
    assert checkpoints(tmp_path / "run") == (["step-00000002"] if keep_best else []) + ["step-00000008"]


def test_the_final_model_is_the_average_of_the_weights(data, tmp_path):
    """By all weights that the run had; what is measured at the end is of it, and the checkpoint stays as it was."""
    settings = {"optim__name": "muon", "optim__lr": 1e-2, "optim__ema": 0.6, "train__steps": 6}
    settings |= {"checkpoint__save_every": 1, "checkpoint__keep_last": 9, "eval__val_every": 6}
    config = tiny(data, tmp_path / "run", **settings)
    last = run(config)[-1]
    saved = [load_file(path / "model.safetensors") for path in sorted((tmp_path / "run/checkpoints").glob("step-*"))]
    assert len(saved) == 6
    final = load_file(tmp_path / "run/final/model.safetensors")
    for key, average in saved[0].items():
        for weights in saved[1:]:
            average = 0.6 * average + 0.4 * weights[key]
        torch.testing.assert_close(final[key], average, rtol=1e-6, atol=1e-8)

    def loss(folder: str) -> float:
        model = GPT2LMHeadModel.from_pretrained(tmp_path / "run" / folder).eval()
        windows = torch.from_numpy(
            TokenStream(open_split(data, "val"), 32, 0, shuffle=False).batch(0, 10).astype("int64")
        )
        with torch.no_grad():
            return functional.cross_entropy(model(windows[:, :-1]).logits.mT, windows[:, 1:]).item()

    assert last["val_loss"] == pytest.approx(loss("final"), rel=1e-5)
    assert last["val_loss_raw"] == pytest.approx(loss("checkpoints/step-00000006"), rel=1e-5)
    assert last["val_loss"] != last["val_loss_raw"]
    # The run's model is the average, though its newest checkpoint has other weights.
    assert runs.find_model(tmp_path / "run") == tmp_path / "run/final" and runs.step_of(tmp_path / "run/final") == 6
    before = (tmp_path / "run/final/model.safetensors").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "run/final/model.safetensors").stat().st_mtime_ns == before, "a finished run is left as it is"

    shutil.rmtree(tmp_path / "run/final")
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    run(config)
    for key, tensor in load_file(tmp_path / "run/final/model.safetensors").items():
        assert torch.equal(tensor, final[key])
