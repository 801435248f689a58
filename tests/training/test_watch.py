"""What is saved is good: diverged models, full disks, a launcher's own wishes; settings that change on resume."""

import dataclasses
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState
from conftest import write_shards
from safetensors.torch import load_file, save_file
from test_train import clean_state as clean_state
from test_train import data as data
from test_train import losses, run, tiny, with_steps

from gpt2_hf import hardware, runs
from gpt2_hf.cli import field_types
from gpt2_hf.config import RunConfig
from gpt2_hf.knobs import ConfigError
from gpt2_hf.model.loss import LossKernels
from gpt2_hf.program import UserError
from gpt2_hf.runs import read_rows
from gpt2_hf.training import checkpoint
from gpt2_hf.training import loop as training
from gpt2_hf.training.loop import train, train_step
from gpt2_hf.training.preflight import ENGINES, check_launcher
from gpt2_hf.training.start import identity


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def harmed_step(monkeypatch, at: int, harm) -> None:
    """Let ``harm(model, optimizers)`` happen in the update of step ``at``."""

    def step(accelerator, model, optimizers, batch, number, *rest):
        result = train_step(accelerator, model, optimizers, batch, number, *rest)
        if number + 1 == at:
            with torch.no_grad():
                harm(model, optimizers)
        return result

    monkeypatch.setattr(training, "train_step", step)


def a_nan_weight(model, optimizers):
    model.transformer.h[1].mlp.c_fc.weight[3, 5] = torch.nan


def an_unused_nan(model, optimizers):
    model.transformer.wpe.weight[-1] = torch.nan  # a position beyond seq_len: no loss ever sees it


def large_weights(model, optimizers):
    for p in model.parameters():
        p.mul_(30)


def a_nan_average(model, optimizers):
    optimizers[0].state[model.transformer.wpe.weight]["exp_avg"][0, 0] = torch.nan


@pytest.mark.parametrize("harm", [a_nan_weight, an_unused_nan, large_weights, a_nan_average])
def test_no_bad_checkpoint_is_made_and_the_next_start_goes_on_from_the_good_one(data, tmp_path, monkeypatch, harm):
    config = tiny(
        data,
        tmp_path / "run",
        train__steps=9,
        train__log_every=100,
        train__on_divergence="stop",
        checkpoint__save_every=3,
    )
    straight = run(dataclasses.replace(config, train=dataclasses.replace(config.train, run_dir=str(tmp_path / "a"))))
    harmed_step(monkeypatch, 6, harm)
    with pytest.raises(FloatingPointError, match=r"after step 6\b.*step-00000003 is good, and the next start goes on"):
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert folders(tmp_path / "run") == ["step-00000003"]
    monkeypatch.undo()
    assert losses(run(config)) == losses(straight)


@pytest.mark.parametrize("harm", [a_nan_weight, large_weights])
@pytest.mark.parametrize("save_every", [0, 9])
def test_the_last_update_is_looked_at_too(data, tmp_path, monkeypatch, harm, save_every):
    harmed_step(monkeypatch, 9, harm)
    with pytest.raises(FloatingPointError, match=r"after step 9\b.*no checkpoint was saved: start again with lower"):
        train(tiny(data, tmp_path / "run", train__steps=9, checkpoint__save_every=save_every))
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_an_absurd_rate_leaves_nothing_that_a_sane_one_would_go_on_from(data, tmp_path):
    with pytest.raises(FloatingPointError):
        train(tiny(data, tmp_path / "run", optim__lr=1e6, checkpoint__save_every=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(run(tiny(data, tmp_path / "run", checkpoint__save_every=1)))[-1] < 6


def test_a_loss_far_above_guessing_ends_the_run_between_checkpoints(data, tmp_path, monkeypatch):
    harmed_step(monkeypatch, 4, large_weights)
    with pytest.raises(FloatingPointError, match=r"train_loss is .* above 10\.5 for 10 steps"):
        train(tiny(data, tmp_path / "run", train__steps=60, checkpoint__save_every=50))
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] < 20


def test_a_checkpoint_that_is_bad_itself_is_named(data, tmp_path):
    config = tiny(data, tmp_path / "run", train__steps=4, checkpoint__save_every=4)
    run(config)
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"

    def spoil(path):
        file = folder / "model.safetensors"
        save_file({k: v * torch.nan for k, v in load_file(file).items()}, path / file.name, {"format": "pt"})
        for name in ("config.json", "trainer_state"):
            os.rename(folder / name, path / name)

    runs.write_folder(folder, spoil)
    with pytest.raises(FloatingPointError, match=r"so it was at the first step after .*step-00000004: delete that one"):
        train(with_steps(config, 8))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(FloatingPointError, match="not finite after step 4"):  # nor is it made the final model
        train(config)


# What a setting that differs from the last start's does: "same run" may not change, "applied" holds from now on.
IDENTITY = {
    "model.preset": "gpt2-medium",
    "model.n_layer": 3,
    "model.n_head": 4,
    "model.n_embd": 36,
    "model.n_positions": 65,
    "model.vocab_size": 252,
    "data.seq_len": 16,
    "data.seq_len_ramp": [16],
    "data.seq_len_ramp_steps": 3,
    "data.document_starts": True,
    "data.document_mask": True,
    "model.init_from": "another",
    "model.zero_init": True,
    "optim.name": "muon",
    "train.seed": 3,
    "train.global_batch_tokens": 8 * 32,
    "train.batch_ramp": [8 * 32],
    "train.batch_ramp_steps": 3,
    "train.overfit_batch": True,
}
APPLIED = {
    "model.dropout": 0.3,
    "model.attn_implementation": "eager",
    "optim.lr": 1e-3,
    "optim.embedding_lr": 1e-3,
    "optim.position_lr": 1e-3,
    "optim.vector_lr": 1e-3,
    "optim.muon_lr": 1e-3,
    "optim.muon_momentum": 0.5,
    "optim.muon_split_qkv": False,
    "optim.betas": (0.8, 0.9),
    "optim.embedding_betas": (0.8, 0.9),
    "optim.position_betas": (0.8, 0.9),
    "optim.vector_betas": (0.8, 0.9),
    "optim.eps": 1e-3,
    "optim.weight_decay": 0.3,
    "optim.embedding_weight_decay": 0.3,
    "optim.position_weight_decay": 0.3,
    "optim.vector_weight_decay": 0.3,
    "optim.cautious_decay": True,
    "optim.decay_follows_lr": True,
    "optim.ema": 0.5,
    "optim.max_grad_norm": 1e-3,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 9,
    "optim.decay_ratio": 0.3,
    "optim.min_lr_ratio": 0.9,
    "train.steps": 5,
    "train.micro_batch_size": 4,
    "train.precision": "fp64",
    "train.residual": "bf16",
    "train.compile": "on",
    "train.gradient_checkpointing": True,
    "train.log_every": 2,
    "eval.val_every": 3,
    "eval.val_tokens": 32,
    "eval.hellaswag_every": 3,
    "eval.hellaswag_items": 3,
    "eval.sample_every": 3,
    "eval.sample_prompt": "a",
    "eval.sample_count": 2,
    "eval.sample_tokens": 2,
    "checkpoint.save_every": 0,
    "checkpoint.keep_last": 3,
    "checkpoint.keep_every": 2,
}
# Where a change must show, if not in the final weights.
SEEN_IN = {
    "model.attn_implementation": {"attention"},
    "train.micro_batch_size": {"batch"},
    "train.compile": {"compiled"},
    "train.gradient_checkpointing": {"recomputed"},
    "checkpoint.save_every": {"kept"},
    "checkpoint.keep_last": {"kept"},
    "checkpoint.keep_every": {"kept"},
    **{name: {"rows"} for name in APPLIED if name == "train.log_every" or name.startswith("eval.")},
}
# Not part of the training state: places, checks, switches of the process, programs that look on, and what is done in
# trouble (test_rewind.py has resumed runs that take other settings of these).
OUTSIDE = {
    "data.path",
    "data.tokenizer",
    "data.verify",
    "data.cache_dir",
    "data.cache_gb",
    "train.run_dir",
    "train.tf32",
    "train.deterministic",
    "train.timeout_s",
    "train.trackers",
    "train.check_kernels",
    "train.max_bad_steps",
    "train.on_divergence",
    "train.max_rewinds",
    "eval.reference",  # test_track.py
    "checkpoint.keep_best",  # test_resume.py
    "checkpoint.mirror",
    "checkpoint.mirror_wait_s",
    "publish.repo",
    "publish.every_steps",
    "publish.public",
    "publish.license",
    "publish.wait_s",
    "resume.mode",
    "resume.from",
    "resume.force",
}


def test_every_setting_is_in_the_table():
    assert field_types(RunConfig).keys() == IDENTITY.keys() | APPLIED.keys() | OUTSIDE


@pytest.mark.parametrize("name", IDENTITY)
def test_what_a_run_is_cannot_change(data, name):
    from gpt2_hf.data.shards import open_split

    def of(**changes):
        return identity(tiny(data, data, **changes), open_split(data, "train"))

    # a ramp and its steps are set together
    ramp = {
        "data.seq_len_ramp": {"data__seq_len_ramp_steps": 2},
        "data.seq_len_ramp_steps": {"data__seq_len_ramp": [8]},
        "train.batch_ramp": {"train__batch_ramp_steps": 2},
        "train.batch_ramp_steps": {"train__batch_ramp": [4 * 32]},
    }.get(name, {})
    if name == "model.preset":
        default = dict.fromkeys(("model__n_layer", "model__n_head", "model__n_embd", "model__n_positions"))
        assert of(model__preset=IDENTITY[name], **default) != of(model__preset="gpt2", **default)
    else:
        key = name.replace(".", "__")
        before = of(**ramp, **{key: 2}) if name.endswith("_ramp_steps") else of()
        assert of(**ramp, **{key: IDENTITY[name]}) != before


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run stopped after 2 of 4 steps, and a function that goes on with a copy of it: what came out then."""
    root = tmp_path_factory.mktemp("begun")
    rng = np.random.Generator(np.random.Philox(9))
    shards = write_shards(root, {s: [rng.integers(0, 50256, (n, 60)).tolist()] for s, n in (("train", 40), ("val", 6))})
    base = {
        "model__vocab_size": None,
        "model__dropout": 0.1,
        "optim__name": "muon",
        "optim__muon_lr": 6e-4,
        "optim__warmup_steps": 1,
        "optim__schedule": "trapezoid",
        "optim__decay_ratio": 0.9,
        "train__global_batch_tokens": 8 * 32,
        "eval__val_every": 2,
        "eval__val_tokens": 64,
        "eval__hellaswag_items": 2,
        "eval__sample_every": 4,
        "eval__sample_count": 1,
        "eval__sample_tokens": 1,
        "checkpoint__save_every": 2,
        "checkpoint__keep_last": 1,
    }
    run(tiny(shards, root / "run", **base, train__steps=2))

    def go_on(run_dir: Path, monkeypatch, **changes) -> dict:
        shutil.copytree(root / "run", run_dir)
        shutil.rmtree(run_dir / "final")
        forward: dict = {}

        def look(accelerator, model, optimizers, batch, *rest):
            block = model.transformer.h[0]
            forward["attention"] = block.attn.config._attn_implementation
            forward["recomputed"] = model.is_gradient_checkpointing
            forward["compiled"] = hasattr(block, "compiled")
            forward["batch"] = batch.shape
            forward["dropout"] = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} | {
                block.attn.dropout
            }
            return train_step(accelerator, model, optimizers, batch, *rest)

        monkeypatch.setattr(training, "train_step", look)
        monkeypatch.setattr(hardware, "peak_flops", lambda *_: (1e12, "not measured"))
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: setattr(self, "compiled", True))
        monkeypatch.setattr(LossKernels, "compile", lambda **_: None)
        rows = run(tiny(shards, run_dir, **{**base, "train__steps": 4, **changes}))
        timed = {"tokens_per_sec", "mfu", "peak_memory"}
        return {
            "rows": [{k: v for k, v in row.items() if k not in timed} for row in rows],
            "weights": hashlib.sha256((run_dir / "final" / "model.safetensors").read_bytes()).hexdigest(),
            "kept": folders(run_dir),
            **forward,
        }

    return go_on


@pytest.mark.parametrize("name", APPLIED)
def test_a_resumed_run_takes_a_changed_setting(begun, tmp_path, monkeypatch, name):
    """Silently kept, it would make no difference: runs of equal settings are equal bit for bit."""
    also = {"eval__hellaswag_every": 4} if "hellaswag" in name else {}
    also |= {"train__precision": "bf16"} if name == "train.residual" else {}
    same = begun(tmp_path / "same", monkeypatch, **also)
    changed = begun(tmp_path / "changed", monkeypatch, **{**also, name.replace(".", "__"): APPLIED[name]})
    assert {key for key in same if same[key] != changed[key]} & SEEN_IN.get(name, {"weights"}), name


def test_dropout_turned_off_is_off(begun, tmp_path, monkeypatch):
    off = [begun(tmp_path / name, monkeypatch, model__dropout=0.0) for name in ("a", "b")]
    assert off[0] == off[1] and off[0]["dropout"] == {0.0}
    assert begun(tmp_path / "c", monkeypatch, model__dropout=0.3)["dropout"] == {0.3}
    assert json.loads((tmp_path / "a" / "final" / "config.json").read_text())["resid_pdrop"] == 0


@pytest.mark.parametrize("limit", [1000, 100_000, 1_000_000], ids=["settings", "state", "tokenizer"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(data, tmp_path, monkeypatch, capsys, limit):
    """Files that may not grow beyond a limit fail as on a full disk, while one checkpoint is written."""
    config = tiny(data, tmp_path / "run", train__steps=6, checkpoint__save_every=2)
    write, (soft, hard) = checkpoint.Saver._write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_on_little_space(saver, place: Path, *rest) -> None:
        try:
            if place.name == "step-00000004":
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            write(saver, place, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            written.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()))

    written: list[list[str]] = []
    monkeypatch.setattr(checkpoint.Saver, "_write", write_on_little_space)
    train(config)
    assert written[1] == ["step-00000002"] and folders(tmp_path / "run") == ["step-00000002", "step-00000006"]
    assert all(runs.damage(path) is None for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert "step-00000004 could not be written (File too large)" in capsys.readouterr().out


def test_a_model_that_the_disk_does_not_take_is_an_error(data, tmp_path, monkeypatch):
    config = tiny(data, tmp_path / "run", train__steps=4, checkpoint__save_every=2)
    write, (soft, hard) = checkpoint.Saver._write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_on_little_space(saver, place: Path, *rest) -> None:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if place.name == "final" else soft, hard))
            write(saver, place, *rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint.Saver, "_write", write_on_little_space)
    words = rf"^the disk of {tmp_path}/run is full.* at step 4; the next start goes on from .*step-00000004\)"
    with pytest.raises(UserError, match=words):
        train(config)


@pytest.mark.parametrize("variable", ENGINES)
def test_engines_of_the_launcher_are_refused(data, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=f"data parallel only.*unset {variable}"):
        train(tiny(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    check_launcher({variable: "false"})


def test_the_launchers_environment_changes_nothing(data, tmp_path, monkeypatch):
    config = {"train__steps": 3, "checkpoint__save_every": 3}
    plain = run(tiny(data, tmp_path / "plain", **config))
    for name, value in (("DYNAMO_BACKEND", "EAGER"), ("DYNAMO_MODE", "default"), ("MIXED_PRECISION", "bf16")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert losses(run(tiny(data, tmp_path / "run", **config))) == losses(plain)
    for folder in ("checkpoints/step-00000003", "final"):
        found = [load_file(tmp_path / name / folder / "model.safetensors") for name in ("plain", "run")]
        assert found[0].keys() == found[1].keys() and not any("_orig_mod" in key for key in found[1])
        assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    state = dcp.FileSystemReader(tmp_path / "run" / "checkpoints" / "step-00000003" / "trainer_state").read_metadata()
    assert "transformer.h.0.ln_1.weight.exp_avg" in state.state_dict_metadata and "_orig_mod" not in repr(state)
