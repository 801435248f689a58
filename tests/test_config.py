"""How a recipe and the command line become a RunConfig, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig, TrainSection
from gpt2_hf.corpus.settings import PrepareConfig
from gpt2_hf.knobs import ConfigError

ROOT = Path(__file__).parent.parent
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))


def parse(*argv: str) -> RunConfig:
    return parse_cli(RunConfig, list(argv))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {steps: 1e3, seed: 5}\noptim: {lr: 3e-4, betas: [0.8, 0.9]}\nmodel: {n_layer: null}\n")
    return str(path)


def test_precedence_wherever_the_recipe_stands(recipe):
    for argv in (
        ["--config", recipe, "--train.seed", "7"],
        ["--train.seed=7", "--config", recipe],
        ["--train.seed", "7", f"--config={recipe}"],
    ):
        config = parse(*argv)
        assert (config.train.seed, config.train.steps, config.optim.lr) == (7, 1000, 3e-4)
        assert config.optim.betas == (0.8, 0.9)
        assert config.optim.eps == RunConfig().optim.eps


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--train.stepz", "3"], "did you mean 'train.steps'"),
        (["--train.l", "3"], "unknown key 'train.l'"),
        (["--train.lr", "3"], "did you mean 'optim.lr'"),
        (["--lr", "3"], "did you mean 'optim.lr'"),
        (["--train.steps"], "needs a value"),
        (["--train.steps", "0"], "train.steps is 0, and must be >= 1"),
        (["--data.seq_len", "2048"], "longer than the model's 1024 positions"),
        (["--model.n_head", "7"], "multiple of n_head"),
        (["--config", "nowhere.yaml"], "no recipe nowhere.yaml"),
        (["--config"], "needs the path"),
        (["stray"], "stray"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and words in message


def test_mistakes_in_a_recipe_name_the_file(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    for text, words in (
        ("train: {stepz: 3}", "did you mean 'train.steps'"),
        ("- a", "mapping"),
        ("train: {steps: a}", ""),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit):
            parse("--config", str(path))
        message = capsys.readouterr().err
        assert "bad.yaml" in message and words in message and message.count("\n") == 1


def test_resolved_config_reads_back_equal(tmp_path, recipe):
    config = parse("--config", recipe, "--train.trackers", "[tensorboard, wandb]")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse("--config", str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/data/*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_corpora_are_valid(path):
    config = parse_cli(PrepareConfig, ["--config", str(path)])
    assert config.out == f"data/{path.stem}" and (config.inputs or config.dataset)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_divide_on_1_and_8_processes(path):
    config = parse("--config", str(path))
    config.model.gpt_config()
    name = path.stem.removesuffix("_fp32")  # the same run for another machine
    assert config.train.run_dir == f"runs/{name}"
    for world_size in (1,) if name in ("demo", "characters") else (1, 8):
        assert config.grad_accum_steps(world_size) >= 1


@dataclass(frozen=True)
class Knobs:
    """Knobs that are text.

    Args:
        names: a list.
        separator: perhaps none.
        revision: perhaps none.
        compile: one of three.
    """

    names: tuple[str, ...] = ()
    separator: str | None = "given"
    revision: str | None = None
    compile: Literal["auto", "on", "off"] = "auto"


@pytest.mark.parametrize(
    "text", ["---", "~", "null", "NULL", "# x", "", " ", "\n\n", "\\n", '"', "1e3", "[x]", "{a: 1}"]
)
def test_text_stays_as_it_is_typed(text, tmp_path):
    assert parse_cli(Knobs, ["--separator", text]).separator == text
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"separator: {json.dumps(text)}\n")
    assert parse_cli(Knobs, ["--config", str(recipe)]).separator == text
    assert parse_cli(Knobs, [f"--separator={text}", "--revision=~", "--separator", "last"]) == Knobs((), "last", "~")


def test_nothing_in_a_recipe_is_none(tmp_path):
    recipe = tmp_path / "r.yaml"
    for nothing in ("null", "~", ""):
        recipe.write_text(f"separator: {nothing}\n")
        assert parse_cli(Knobs, ["--config", str(recipe)]).separator is None
        assert parse_cli(Knobs, ["--config", str(recipe), "--separator", "~"]).separator == "~"


def test_text_in_a_recipe_is_as_it_is_written_there(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("names: [1, 007, 2.50, a b, 'c,d', \U0001f600]\nrevision: 0123456\ncompile: on\n")
    names = ("1", "007", "2.50", "a b", "c,d", "\U0001f600")
    assert parse_cli(Knobs, ["--config", str(recipe)]) == Knobs(names, "given", "0123456", "on")
    for written in ("names: 1,2", "names: [1, 2]", "names:\n- 1\n- 2", "<<: {names: ['1', '2']}"):
        recipe.write_text(written)
        assert parse_cli(Knobs, ["--config", str(recipe)]).names == ("1", "2")
    for typed in ("1,2", "[1, 2]", '["1", "2"]'):
        assert parse_cli(Knobs, ["--names", typed]).names == ("1", "2")


def test_a_comma_in_the_name_of_a_file_does_not_part_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "b.jsonl", "[x],y.txt"):
        Path(name).touch()
    for typed in ("a,b.jsonl", "?,*.jsonl", "[x],y.txt", "[a],b.*"):
        assert parse_cli(Knobs, ["--names", typed]).names == (typed,)
        assert parse_cli(Knobs, [typed], positional="names").names == (typed,)
    assert parse_cli(Knobs, ["--names", "b.jsonl,c.jsonl"]).names == ("b.jsonl", "c.jsonl")
    assert parse_cli(Knobs, ["--names", '["a,b.jsonl", b.jsonl]']).names == ("a,b.jsonl", "b.jsonl")
    bare = ["a,b", "\U0001f600.txt", "[c]"]
    for argv in (bare, ["--separator", "x", *bare], [*bare, "--separator", "x"]):
        assert parse_cli(Knobs, argv, positional="names").names == tuple(bare)
    for argv in (["a", "--names=b"], ["--names=b", "a"]):
        with pytest.raises(SystemExit):
            parse_cli(Knobs, argv, positional="names")
    assert capsys.readouterr().err.count("names is given with --names and without") == 2


def test_every_knob_is_used_by_a_recipe_or_has_a_stated_reason():
    """Knobs multiply if nobody counts them. A new one belongs in a recipe, or in this list with its reason."""
    reasons = {
        "vocab_size": "other tokenizers",
        "tokenizer": "other projects' tokens",
        "attn_implementation": "what auto picks can be wrong",
        "init_from": "the weights of another model",
        "eps": "published value, ablations",
        "betas": "published value, ablations",
        "max_grad_norm": "published value, ablations",
        "muon_momentum": "published value, ablations",
        "muon_split_qkv": "ablations: to see that apart is better",
        "position_lr": "ablations: each role by itself",
        "position_betas": "ablations: each role by itself",
        "position_weight_decay": "ablations: each role by itself",
        "vector_lr": "ablations: each role by itself",
        "vector_weight_decay": "ablations: each role by itself",
        "embedding_betas": "ablations: each role by itself",
        "vector_betas": "ablations: each role by itself",
        "embedding_weight_decay": "ablations: each role by itself",
        "cautious_decay": "found by others, too little to see on small models: docs/recipe.md",
        "decay_follows_lr": "found by others, not tried yet: docs/recipe.md",
        "ema": "found by others, no gain on small models: docs/recipe.md",
        "zero_init": "found by others, a loss in short runs: docs/recipe.md",
        "batch_ramp": "the published recipe has updates of one size",
        "batch_ramp_steps": "the published recipe has updates of one size",
        "seed": "repeated runs",
        "precision": "what auto picks can be wrong",
        "residual": "fp32 rounds less, bf16 is faster",
        "compile": "what auto picks can be wrong",
        "tf32": "exactness",
        "deterministic": "exactness",
        "gradient_checkpointing": "small cards",
        "verify": "reads all data",
        "seq_len_ramp": "the published recipe has windows of one length",
        "seq_len_ramp_steps": "the published recipe has windows of one length",
        "cache_dir": "object storage",
        "cache_gb": "object storage",
        "document_starts": "reproductions cut windows anywhere",
        "document_mask": "reproductions pack without it",
        "overfit_batch": "debugging",
        "timeout_s": "networks and disks",
        "trackers": "needs an account or a package",
        "check_kernels": "a second or two, for those who measure them",
        "max_bad_steps": "what is odd depends on the data",
        "on_divergence": "whether a person is to look first",
        "max_rewinds": "whether a person is to look first",
        "sample_prompt": "taste",
        "sample_count": "taste",
        "sample_tokens": "taste",
        "reference": "which earlier run is a good one only its user knows",
        "keep_best": "the space of one checkpoint",
        "mirror": "object storage",
        "mirror_wait_s": "object storage",
        "repo": "needs an account",
        "every_steps": "needs an account",
        "public": "needs an account",
        "license": "needs an account",
        "wait_s": "needs an account",
        "mode": "of one start",
        "from": "of one start",
        "force": "of one start",
    }
    used = {key for path in RECIPES for section in yaml.safe_load(path.read_text()).values() for key in section}
    knobs = {key for section in yaml.safe_load(RunConfig().to_yaml()).values() for key in section}
    assert knobs - used - reasons.keys() == set()
    assert reasons.keys() - knobs == set()


def test_batch_sizes_that_do_not_divide_name_the_nearest_that_do():
    config = RunConfig(train=TrainSection(global_batch_tokens=500_000, micro_batch_size=64))
    with pytest.raises(ConfigError, match="458752 and 524288"):
        config.grad_accum_steps(1)
    config = RunConfig(train=TrainSection(global_batch_tokens=524_288, micro_batch_size=24))
    with pytest.raises(ConfigError, match="micro_batch_size 16 or 32"):
        config.grad_accum_steps(1)
    for world_size, micro_batch_size, expected in ((1, 64, 8), (8, 64, 1), (2, 4, 64)):
        config = RunConfig(train=TrainSection(micro_batch_size=micro_batch_size))
        assert config.grad_accum_steps(world_size) == expected
