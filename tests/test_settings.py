"""Wrong settings of every command: one line, exit status 2, and nothing made; or accepted and right."""

import itertools
import math
import os
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from gpt2_hf import knobs
from gpt2_hf.cli import field_types, parse_cli
from gpt2_hf.config import OptimSection, RunConfig, TrainSection
from gpt2_hf.corpus.prepare import PrepareConfig
from gpt2_hf.knobs import ConfigError

LONG = "9" * 5000
NO_NUMBERS = ["", " ", "abc", "1:30", "0x10", "1.2.3", "--1", "1e", "1 2", "[1]", "{a: 1}", "true", "nan", "inf"]
NO_NUMBERS += ["1e999", "1e99999999999999999999", LONG]
NO_COUNTS = [*NO_NUMBERS, "010", "1.5", "-1", "-1e3", "1e30", "12,5"]
NO_SWITCHES = ["", "2", "maybe", "null", "[true]", "tru"]
NO_WORDS = ["", "nothing", "null", "ADAMW", "[auto]", "1"]


def impossible(kind: type) -> list[str]:
    """What a knob of that kind cannot be, whatever its limits."""
    if get_origin(kind) is Literal:
        return NO_WORDS
    if get_origin(kind) in (list, tuple):
        return [""] if knobs.bare(get_args(kind)[0]) is str else NO_NUMBERS
    return {int: NO_COUNTS, float: NO_NUMBERS, bool: NO_SWITCHES}.get(kind, [])


def wrong_values(cls: type) -> list[tuple[str, str]]:
    found = []
    for name, annotation in field_types(cls).items():
        is_optional = type(None) in get_args(annotation)
        values = impossible(knobs.bare(annotation))
        found += [(name, value) for value in values if not (is_optional and value == "null")]
    return found


def refuse(run, capsys, tmp_path: Path) -> str:
    """Run something that must end with one line and exit status 2, and make nothing; returns the line."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run()
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert len(captured.err) < 600
    assert sorted(tmp_path.rglob("*")) == before
    return captured.err


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("cls", [RunConfig, PrepareConfig])
def test_what_no_knob_can_be(cls, capsys, tmp_path):
    base = [] if cls is RunConfig else ["--out=out", "--inputs=shakespeare"]
    cases = wrong_values(cls)
    assert len(cases) > (600 if cls is RunConfig else 120)
    for name, value in cases:
        line = refuse(lambda name=name, value=value: parse_cli(cls, [*base, f"--{name}={value}"]), capsys, tmp_path)
        assert name in line, line


OUT_OF_RANGE = [
    ("model.dropout", "1"), ("model.dropout", "-0.1"), ("model.n_layer", "0"), ("model.n_head", "0"),
    ("model.n_embd", "0"), ("model.n_positions", "0"), ("model.vocab_size", "0"), ("model.n_head", "7"),
    ("data.seq_len", "0"), ("data.seq_len", "2048"), ("data.cache_gb", "-1"), ("data.cache_gb", "0"),
    ("data.seq_len_ramp", "256"), ("data.seq_len_ramp", "0"), ("data.seq_len_ramp", "-8"), ("data.seq_len_ramp", "a,8"),
    ("data.seq_len_ramp_steps", "-1"),
    ("data.path", ""), ("data.path", " "), ("data.path", "null"), ("data.path", "$NOT_SET/x"),
    ("data.cache_dir", ""), ("data.cache_dir", "s3://bucket/x"), ("data.cache_dir", "~nobody_here/x"),
    ("optim.lr", "0"), ("optim.lr", "-1e-3"), ("optim.muon_lr", "0"), ("optim.muon_lr", "-1"),
    ("optim.embedding_lr", "0"), ("optim.vector_lr", "-1"), ("optim.position_lr", "0"),
    ("optim.embedding_betas", "0.9"), ("optim.vector_betas", "0.9,1"), ("optim.vector_weight_decay", "-1"),
    ("optim.embedding_weight_decay", "-1"), ("optim.ema", "1"), ("optim.ema", "-0.1"),
    ("optim.muon_momentum", "5"), ("optim.muon_momentum", "1"), ("optim.muon_momentum", "-0.1"),
    ("optim.betas", "2,3"), ("optim.betas", "-1,0.9"), ("optim.betas", "1,1"), ("optim.betas", "0.9"),
    ("optim.betas", "0.9,0.95,0.99"), ("optim.betas", ""), ("optim.betas", "a,b"), ("optim.betas", "nan,nan"),
    ("optim.eps", "0"), ("optim.eps", "-1"), ("optim.weight_decay", "-0.1"), ("optim.max_grad_norm", "0"),
    ("optim.max_grad_norm", "-1"), ("optim.warmup_steps", "-1"), ("optim.decay_ratio", "0"),
    ("optim.decay_ratio", "2"), ("optim.decay_ratio", "-0.3"), ("optim.min_lr_ratio", "5"),
    ("optim.min_lr_ratio", "-0.1"), ("train.run_dir", ""), ("train.run_dir", "null"), ("train.run_dir", "None"),
    ("train.run_dir", "$NOT_SET/x"), ("train.run_dir", "${NOT_SET}"), ("train.run_dir", "~nobody_here/x"),
    ("train.run_dir", "s3://bucket/run"), ("train.run_dir", "gs://b/x"), ("train.run_dir", "https://x/y"),
    ("train.run_dir", "hf://datasets/x"), ("train.steps", "0"), ("train.steps", "1e12"),
    ("train.global_batch_tokens", "0"), ("train.global_batch_tokens", "256e12"),
    ("train.batch_ramp", "0"), ("train.batch_ramp", "1e6"), ("train.batch_ramp", "64,32"), ("train.batch_ramp", "5"),
    ("train.batch_ramp_steps", "-1"), ("train.micro_batch_size", "0"), ("train.micro_batch_size", "1e9"),
    ("train.micro_batch_size", "Auto"), ("train.micro_batch_size", "auto,8"),
    ("train.seed", "-1"), ("train.seed", "18446744073709551616"), ("train.log_every", "0"), ("eval.val_every", "-1"),
    ("eval.val_tokens", "0"), ("eval.hellaswag_items", "0"), ("eval.hellaswag_items", "10043"),
    ("eval.hellaswag_every", "-1"), ("eval.sample_every", "-5"), ("eval.sample_count", "0"),
    ("eval.sample_count", "1e9"), ("eval.sample_tokens", "0"), ("eval.sample_prompt", "\udce9 not UTF-8"),
    ("checkpoint.save_every", "-1"), ("checkpoint.keep_last", "0"), ("checkpoint.keep_every", "-1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_what_a_knob_of_a_run_cannot_be(name, value, capsys, tmp_path):
    line = refuse(lambda: parse_cli(RunConfig, [f"--{name}={value}"]), capsys, tmp_path)
    assert name.rpartition(".")[2] in line


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("optim.min_lr_ratio", "1", 1.0), ("optim.min_lr_ratio", "0", 0.0), ("optim.decay_ratio", "1", 1.0),
        ("train.seed", "0", 0), ("train.seed", "9223372036854775807", 2**63 - 1), ("train.steps", "1e9", 10**9),
        ("train.steps", "1_000", 1000), ("train.steps", "+5", 5), ("optim.lr", "1e6", 1e6), ("optim.lr", ".5", 0.5),
        ("train.steps", "1e6", 10**6), ("optim.lr", "1e-3", 0.001), ("train.run_dir", "1e3", "1e3"),
        ("data.document_mask", "yes", True), ("data.document_mask", "ON", True), ("data.verify", "False", False),
        ("optim.betas", "(0.5, 0)", (0.5, 0.0)), ("optim.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("optim.betas", "0.8,0.9", (0.8, 0.9)), ("train.trackers", "wandb,tensorboard", ["wandb", "tensorboard"]),
        ("train.trackers", "[wandb]", ["wandb"]), ("train.trackers", "wandb", ["wandb"]),
        ("eval.sample_prompt", "null", "null"), ("eval.sample_prompt", "010", "010"), ("eval.sample_prompt", "", ""),
        ("data.path", "s3://bucket/x", "s3://bucket/x"), ("train.run_dir", "./null", "./null"),
        ("model.n_layer", "null", None), ("train.trackers", "[]", []), ("train.micro_batch_size", "1e0", 1),
        ("train.micro_batch_size", "auto", "auto"),
    ],
)  # fmt: skip
def test_what_is_accepted_means_what_it_says(name, value, found):
    section, key = name.split(".")
    taken = getattr(getattr(parse_cli(RunConfig, [f"--{name}={value}"]), section), key)
    assert taken == found and type(taken) is type(found)


TRAPS = {
    "train: {seed: 1:30}": "train.seed",
    "train: {steps: 010}": "train.steps",
    "train: {steps: 0x10}": "train.steps",
    "train: {steps: 0o10}": "train.steps",
    "train: {steps: 0b11}": "train.steps",
    "optim: {lr: .inf}": "optim.lr",
    "optim: {lr: .nan}": "optim.lr",
    "optim: {lr: 190:20:30.15}": "optim.lr",
    "train: {steps: yes}": "train.steps",
    "train: {steps: 2026-11-26}": "train.steps",
    "train: {steps: }": "train.steps is empty",
    "train: {run_dir: }": "train.run_dir is empty",
    "train: {run_dir: null}": "train.run_dir is empty",
    "train: {run_dir: ''}": "train.run_dir is empty",
    "train: {run_dir: 'null'}": "train.run_dir",
    "train: {steps: 5}\ntrain: {seed: 1}": "a second time",
    "train: {steps: 5, steps: 6}": "a second time",
    "train:\n  steps: 5\n  seed: 1\n  steps: 5": "line 4",
    "optim: {lr: 1}\noptim:": "a second time",
    "train:\n\tsteps: 5": "is not YAML",
    "train: {steps: 5": "is not YAML",
    "train: 5": "is a section",
    "train: [steps, 5]": "is a section",
    "train: {steps: {a: 5}}": "train.steps",
    "train: {steps: [5]}": "train.steps",
    "steps: 5": "did you mean 'train.steps'",
    "train.steps: 5\n? [a]\n: 5": "",
    "- train": "mapping",
    "5": "mapping",
    "text": "mapping",
    "train: &a {steps: 5, x: *a}": "",
    "a: &a {b: *a}": "unknown key 'a'",
    "train: !!python/object/apply:os.system ['true']": "is not YAML",
    "train: !unknown 5": "is not YAML",
    "model: {dropout: 1,5}": "",
    "model: {preset: gpt3}": "model.preset",
    "model: {preset: }": "model.preset is empty",
    "optim: {betas: 0.9}": "optim.betas",
    "optim: {betas: [0.9, [1]]}": "optim.betas",
    "optim: {betas: {a: 1}}": "optim.betas",
    f"train: {{steps: {LONG}}}": "train.steps",
    f"optim: {{lr: {LONG}}}": "optim.lr",
    "train: {steps: '5 '}": "train.steps",
    "train: {resume: true}": "resumes by itself",
    "train: {learning_rate: 1}": "optim.lr",
    "train: {batch_size: 1}": "train.micro_batch_size",
    "gradient_accumulation_steps: 8": "train.global_batch_tokens",
    "\x00": "is not YAML",
    "train: {steps: \x07}": "is not YAML",
}  # fmt: skip


@pytest.mark.parametrize("text", TRAPS, ids=lambda text: ascii(text)[:50])
def test_traps_of_yaml(text, capsys, tmp_path):
    Path("recipe.yaml").write_text(text)
    line = refuse(lambda: parse_cli(RunConfig, ["--config", "recipe.yaml"]), capsys, tmp_path)
    assert TRAPS[text] in line, line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("eval: {sample_prompt: caf\u00e9}".encode("latin-1"), "is not UTF-8"),
        ("train: {steps: 5}".encode("utf-16"), "UTF-16"),
        ("train: {steps: 5}".encode("utf-32"), "UTF-16"),
        (b"\x80\x81", "is not UTF-8"),
        (b"\x1f\x8b\x08\x00", "is not UTF-8"),
    ],
)
def test_recipes_of_other_encodings(content, words, capsys, tmp_path):
    Path("recipe.yaml").write_bytes(content)
    assert words in refuse(lambda: parse_cli(RunConfig, ["--config", "recipe.yaml"]), capsys, tmp_path)


def test_a_recipe_as_windows_writes_it():
    Path("recipe.yaml").write_bytes(b"\xef\xbb\xbftrain:\r\n  steps: 7\r\n")
    assert parse_cli(RunConfig, ["--config", "recipe.yaml"]).train.steps == 7


@pytest.mark.parametrize("name", ["", ".", "nowhere.yaml", "\udce9.yaml", "a/b/c.yaml", "/dev/null/x", "x\0y"])
def test_recipes_that_are_not_there(name, capsys, tmp_path):
    refuse(lambda: parse_cli(RunConfig, ["--config", name]), capsys, tmp_path)


def test_paths_are_expanded_in_every_knob_that_is_one(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    for cls, base in ((RunConfig, []), (PrepareConfig, ["--inputs=shakespeare", "--out=x"])):
        hints = field_types(cls)
        paths = [name for name, hint in hints.items() if "path" in knobs.limit_of(hint)]
        assert paths
        for name, (typed, found) in itertools.product(paths, (("~/x", "/home/me/x"), ("$DISK/x", "/disk/x"))):
            others = [flag for flag in base if name not in ("inputs", "dataset") or not flag.startswith("--inputs")]
            value = parse_cli(cls, [*others, f"--{name}={typed}"])
            for part in name.split("."):
                value = getattr(value, "from_" if part == "from" else part)
            assert value in (found, (found,)), name


def test_python_is_told_as_the_shell_is():
    no_numbers = ({"lr": -1.0}, {"lr": math.nan}, {"lr": "1"}, {"warmup_steps": 1.5}, {"eps": True}, {"eps": None})
    for wrong in (*no_numbers, {"betas": (0.9,)}, {"name": "sgd"}):
        with pytest.raises(ConfigError, match=f"^optim.{next(iter(wrong))} is "):
            OptimSection(**wrong)
    with pytest.raises(ConfigError, match=r"train\.tf32"):
        TrainSection(tf32=1)
    assert TrainSection(run_dir="~").run_dir == os.path.expanduser("~")


def test_what_is_odd_is_said():
    config = parse_cli(RunConfig, ["--train.steps=20", "--checkpoint.save_every=10", "--checkpoint.keep_every=15"])
    assert [remark.split()[0] for remark in config.remarks()] == ["optim.warmup_steps", "checkpoint.keep_every"]
    assert RunConfig().remarks() == []


def test_help_explains_every_knob_and_shows_its_limits(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(RunConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(f" --{name} " in text for name in field_types(RunConfig))
    assert "The network: --model.preset {gpt2,gpt2-medium,gpt2-large,gpt2-xl} one of OpenAI's sizes" in text
    assert "updates in all. [>= 1 and <= 1000000000] (default: 19073)" in text and "as a share of its peak; it" in text
    assert "(Raises" not in text and text.count("[>= 0 and < 1]") >= 3
