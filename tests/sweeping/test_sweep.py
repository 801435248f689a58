"""Is one recipe better than another: what is run, what is said of it, and how sure that is."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_train import ROOT, tiny
from test_train import data as data

from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.files import lock_folder
from gpt2_hf.knobs import ConfigError
from gpt2_hf.program import UserError
from gpt2_hf.runs import NOT_SAVED, read_rows
from gpt2_hf.sweeping.candidates import plan_sweep, read_sweep
from gpt2_hf.sweeping.compare import compare, holm, judge, mean_curve, seeds_needed, tokens_to
from gpt2_hf.sweeping.outcomes import STARTED, read_all, read_outcome
from gpt2_hf.sweeping.picture import build_figure
from gpt2_hf.sweeping.results import rank, table, verdict
from gpt2_hf.sweeping.sweep import sweep

TOKENS = (0, 1000, 2000, 4000)

# A training program that is none: it writes what a run leaves, by what BEHAVE/<candidate>-<seed> says.
TRAINER = """
import json, os, pathlib, signal, sys, time
settings = dict(word[2:].split("=", 1) for word in sys.argv[3:])
run, behave = pathlib.Path(settings["train.run_dir"]), pathlib.Path(os.environ["BEHAVE"])
name = f"{run.parent.name}-{settings['train.seed']}"
with open(behave / "order", "a") as order:
    print(name, os.environ.get("OMP_NUM_THREADS"), file=order)
how = (behave / name).read_text() if (behave / name).exists() else ""
if how == "fail":
    sys.exit("error: no such data")
if how == "diverge":
    sys.exit("error: loss is not finite, NOT_SAVED; lower it")
if how == "wait":
    def told(*_):
        (run / "saved").touch()
        sys.exit(85)
    signal.signal(signal.SIGTERM, told)
    run.mkdir(parents=True)
    (run / "is_running").touch()
    time.sleep(60)
(run / "final").mkdir(parents=True)
lr = {"a": 1e-3, "b": 2e-3}[run.parent.name]
(run / "config.yaml").write_text(f"optim: {{lr: {lr}}}\\ntrain: {{steps: 4, seed: {settings['train.seed']}}}")
loss = 5 + len(run.parent.name) + int(settings["train.seed"]) ** 2 / 10 + (hash(name) % 97) / 1000
rows = [{"step": 0, "tokens_seen": 0, "val_loss": 9.0}, {"step": 4, "tokens_seen": 4000, "val_loss": loss}]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
""".replace("NOT_SAVED", NOT_SAVED)


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Recipes a.yaml and b.yaml in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, lr in (("a", "1e-3"), ("b", "2e-3")):
        Path(f"{name}.yaml").write_text(f"optim: {{lr: {lr}}}\ntrain: {{steps: 4}}\n")
    return ["a.yaml", "b.yaml"]


def write_run(plan, candidate, seed, losses, n_steps=4, log="", final=True, tokens=TOKENS) -> Path:
    """A run's folder with these validation losses over TOKENS."""
    run_dir = plan.run_dir(candidate, seed)
    (run_dir / "final").mkdir(parents=True) if final else run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(parse_cli(RunConfig, plan.arguments(candidate, seed)).to_yaml())
    steps = np.linspace(0, n_steps, len(losses)).astype(int)
    rows = [{"step": int(s), "tokens_seen": t, "val_loss": x} for s, t, x in zip(steps, tokens, losses, strict=False)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if log:
        plan.log(candidate, seed).write_text(f"{STARTED}now\n{log}")
    return run_dir


def write_sweep(plan, finals) -> None:
    """Finished runs with these final losses, {candidate's number: [of each seed]}; inf diverged, nan is not there."""
    for number, losses in finals.items():
        for seed, loss in zip(plan.seeds, losses, strict=True):
            if math.isinf(loss):
                says = f"error: bad, {NOT_SAVED}; lower it\n"
                write_run(plan, plan.candidates[number], seed, [9 + seed / 10], 0, says, final=False)
            elif not math.isnan(loss):
                write_run(plan, plan.candidates[number], seed, [9 + seed / 10, loss + 2, loss + 1, loss])


def shown(plan):
    outcomes = read_all(plan)
    rows = rank(plan, outcomes)
    return rows, table(plan, rows, outcomes), outcomes


# What is to be run


def test_a_grid_is_every_combination_named_as_it_was_written(recipes):
    plan = plan_sweep(
        recipes[:1], ["optim.lr=1e-3,2E-3", "optim.betas=[0.9,0.95],[0.9,0.99]"], ["train.steps=7"], [2], Path("o")
    )
    assert [candidate.name for candidate in plan.candidates] == [
        "a,lr=1e-3,betas=[0.9,0.95]", "a,lr=1e-3,betas=[0.9,0.99]",
        "a,lr=2E-3,betas=[0.9,0.95]", "a,lr=2E-3,betas=[0.9,0.99]",
    ]  # fmt: skip
    config = parse_cli(RunConfig, plan.arguments(plan.candidates[3], 2))
    assert (config.optim.lr, config.optim.betas) == (2e-3, (0.9, 0.99))
    assert (config.train.steps, config.train.seed) == (7, 2)
    assert config.train.run_dir == "o/a,lr=2E-3,betas=[0.9,0.99]/seed-2"


def test_seeds_are_a_number_of_them_or_themselves(recipes):
    assert plan_sweep(recipes, [], [], [4], Path("o")).seeds == (1, 2, 3, 4)
    assert plan_sweep(recipes, [], [], [3, 5, 8], Path("o")).seeds == (3, 5, 8)


def test_a_sweep_is_read_as_it_was_written(recipes):
    plan = plan_sweep(recipes, ["optim.lr=1e-3,2e-3"], ["train.steps=7"], [2], Path("o"))
    plan.write()
    assert read_sweep(Path("o")) == plan
    Path("o/sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"o/sweep\.json cannot be read"):
        read_sweep(Path("o"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((["a.yaml", "a.yaml"], [], []), "2 candidates are called a"),
        ((["a.yaml"], ["optim.lr=1,1"], []), "2 candidates are called a,lr=1"),
        ((["a.yaml"], ["optim.lr=1", "optim.lr=2"], []), "optim.lr twice"),
        ((["a.yaml"], ["train.seed=1,2"], []), "by --seeds"),
        ((["a.yaml"], [], ["train.run_dir=x"]), "by --out"),
        ((["a.yaml"], [], ["eval.val_every=0"]), "no loss to compare"),
        ((["a.yaml"], [], ["checkpoint.mirror=s3://b/x"]), "checkpoint.mirror is set, and all runs would share it"),
        ((["a.yaml"], [], ["publish.repo=me/x"]), "publish.repo is set"),
        (([], [], []), "no recipe"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, words, recipes):
    with pytest.raises(ConfigError, match=words):
        plan_sweep(*arguments, [2], Path("o"))


def test_a_wrong_value_of_the_grid_is_refused_before_anything_is_run(recipes, capsys):
    with pytest.raises(SystemExit):
        sweep(recipes, Path("o"), ["false"], grid=["optim.lr=1e-3,fast"])
    assert capsys.readouterr().err == "error: optim.lr is fast: give a number\n"
    assert not Path("o").exists()


def test_a_run_with_other_settings_in_its_place_is_named(recipes):
    plan = plan_sweep(recipes, [], [], [2], Path("o"))
    write_run(plan, plan.candidates[1], 2, [9, 8, 7, 6])
    assert plan_sweep(
        recipes, [], ["train.log_every=3", "checkpoint.keep_last=1", "eval.sample_every=0"], [2], Path("o")
    )
    with pytest.raises(ConfigError, match=r"o/b/seed-2 is a run with optim\.eps 1e-08, and 1e-09 is asked for"):
        plan_sweep(recipes, [], ["optim.eps=1e-9"], [2], Path("o"))
    config = Path("o/b/seed-2/config.yaml")
    config.write_text(config.read_text().replace("seed: 2", "seed: 3"))
    with pytest.raises(ConfigError, match=r"train\.seed 3, and 2 is asked for"):
        plan_sweep(recipes, [], [], [2], Path("o"))


# The statistics


def test_differences_are_paired_by_seed_as_scipy_pairs_them():
    rng = np.random.Generator(np.random.Philox(3))
    baseline = {seed: 5 + rng.normal() for seed in range(1, 7)}
    other = {seed: baseline.get(seed, 0) - 0.02 + 0.01 * rng.normal() for seed in (2, 3, 4, 5, 9)}
    (found,) = compare(baseline, [other])
    pairs = [(other[seed], baseline[seed]) for seed in (2, 3, 4, 5)]
    differences = [a - b for a, b in pairs]
    assert found.n == 4
    assert found.difference.mean == pytest.approx(np.mean(differences))
    assert found.difference.stderr == pytest.approx(stats.sem(differences))
    assert found.difference.p == found.p_adjusted == pytest.approx(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)
    assert found.word == "better" and compare(other, [baseline])[0].word == "worse"
    # Unpaired, the spread of the seeds hides it.
    assert stats.ttest_ind(*zip(*pairs, strict=True)).pvalue > 0.5
    assert compare(baseline, [{9: 1.0}]) == [None]


def test_holms_adjustment_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.6])[::2] == [1.0, 1.0] and math.isnan(holm([0.5, math.nan])[1])
    assert holm([]) == []


def test_a_sweep_of_equal_recipes_seldom_shows_a_difference():
    """Of a hundred sweeps of equals at most about five may say otherwise, however many candidates they have."""
    rng = np.random.Generator(np.random.Philox(5))
    wrong = wrong_unadjusted = 0
    for _ in range(300):
        losses = rng.normal(size=(6, 4))
        baseline, *others = [dict(enumerate(row)) for row in losses]
        found = compare(baseline, others)
        wrong += any(c.word != "no difference shown" for c in found)
        wrong_unadjusted += any(c.difference.p < 0.05 for c in found)
    assert wrong / 300 < 0.08 < 0.12 < wrong_unadjusted / 300


def test_the_rule():
    assert judge(-0.1, 3, 0.049) == "better" and judge(0.1, 3, 0.049) == "worse"
    for n, p in ((2, 0.001), (3, 0.05), (8, 0.2), (1, math.nan)):
        assert judge(-0.1, n, p) == "no difference shown"


@pytest.mark.parametrize("mean, n_tests", [(0.4, 1), (1.0, 1), (0.4, 5), (30.0, 1)])
def test_so_many_seeds_would_show_the_difference_and_one_fewer_would_not(mean, n_tests):
    shape = np.array([-1.0, 0.5, 1.3, -0.4, -0.2])
    differences = mean + (shape - shape.mean()) / shape.std(ddof=1)
    n = seeds_needed(differences, n_tests)
    p = [2 * stats.t.sf(mean * math.sqrt(k), k - 1) for k in (n, n - 1)]
    assert p[0] * n_tests < 0.05 and (n == 3 or p[1] * n_tests >= 0.05)


def test_too_few_or_too_many_seeds_to_say():
    assert seeds_needed(np.array([0.1])) is None
    assert seeds_needed(np.array([1.0, -1.0, 1e-9])) is None


def test_tokens_to_a_loss_lie_on_the_line_between_measurements():
    tokens, losses = np.array([0.0, 100, 200, 300]), np.array([9.0, 5, 5, 4])
    assert tokens_to(7, tokens, losses) == 50 and tokens_to(4.25, tokens, losses) == 275
    assert tokens_to(5, tokens, losses) == 100 and tokens_to(9.5, tokens, losses) == 0
    assert tokens_to(3.9, tokens, losses) is None


def test_a_mean_curve_takes_others_between_their_measurements():
    a, b = (np.array([0.0, 100, 200]), np.array([9.0, 5, 4])), (np.array([0.0, 200]), np.array([9.0, 5]))
    tokens, mean, spread = mean_curve([a, b])
    assert tokens.tolist() == [0, 100, 200] and mean.tolist() == [9, 6, 4.5]
    assert spread == pytest.approx([0, math.sqrt(2), math.sqrt(0.5)])


# What is read and said


def test_what_became_of_a_run(recipes):
    plan = plan_sweep(recipes, [], [], [6], Path("o"))
    a = plan.candidates[0]

    def state(seed):
        return read_outcome(plan.run_dir(a, seed), plan.log(a, seed)).state

    write_run(plan, a, 1, [9, 8, 7, 6.5])
    write_run(plan, a, 2, [9, 8], 2, log="error: disk full\n", final=False)
    write_run(plan, a, 3, [9, 8], 2, log=f"10%\r20%\nerror: bad, {NOT_SAVED}; lower it\nmore\n", final=False)
    write_run(plan, a, 4, [9, 8], 2, log=f"error: x, {NOT_SAVED}\n{STARTED}later\n", final=False)
    write_run(plan, a, 5, [9, 8, 7, math.nan])
    assert [state(seed) for seed in range(1, 7)] == ["finished", "failed", "diverged", "begun", "diverged", "missing"]
    write_run(plan, plan.candidates[1], 1, [9, 8, 7, 6], final=False)  # killed before the model was written
    assert read_outcome(Path("o/b/seed-1"), Path("o/b/seed-1.log")).state == "begun"
    assert read_outcome(Path("o/a/seed-1"), Path("o/a/seed-1.log")).loss == 6.5
    assert read_outcome(Path("o/a/seed-3"), Path("o/a/seed-3.log")).loss == math.inf


def test_the_table_is_by_rank_with_what_diverged_and_what_is_missing_last(recipes):
    plan = plan_sweep(recipes[:1], ["optim.lr=1,2,3,4"], [], [3], Path("o"))
    finals = {0: [5.0, 5.1, 5.3], 1: [4.0, math.inf, 4.1], 2: [4.9, 5.0, 5.21], 3: [math.nan] * 3}
    write_sweep(plan, finals)
    rows, text, _ = shown(plan)
    assert [row.candidate.name for row in rows] == ["a,lr=3", "a,lr=1", "a,lr=2", "a,lr=4"]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:6]]
    differences = np.array(finals[2]) - np.array(finals[0])
    p = stats.ttest_1samp(differences, 0).pvalue
    assert cells[0][1:9] == [
        "3 of 3", f"{np.mean(finals[2]):.4f}", f"{stats.sem(finals[2]):.4f}",
        f"{differences.mean():+.4f}", f"{stats.sem(differences):.4f}", f"{p:.2g}", f"{p:.2g}", "better",
    ]  # fmt: skip
    assert cells[1][8] == "baseline" and cells[1][4:8] == ["-"] * 4 and cells[1][9] == "1.000"
    assert cells[2][1:4] == ["3 of 3", "diverged", "-"] and cells[2][8] == "diverged in 1 of 3"
    assert cells[3][1:] == ["0 of 3", *["-"] * 8]
    # From 2000 to 4000 tokens a loss falls by 1: that much earlier is the baseline's end reached.
    assert float(cells[0][9]) == pytest.approx(1 + differences.mean() / 2, abs=6e-4)
    assert len({len(line) for line in text.splitlines()[:6]}) == 1


def test_a_baseline_that_diverged_leaves_nothing_to_compare_with(recipes):
    plan = plan_sweep(recipes, [], [], [2], Path("o"))
    write_sweep(plan, {0: [5.0, math.inf], 1: [4.0, 4.1]})
    rows, text, _ = shown(plan)
    assert [row.candidate.name for row in rows] == ["b", "a"] and all(row.comparison is None for row in rows)
    assert "baseline, diverged in 1 of 2" in text
    assert verdict(plan, rows) == (
        "training diverged, of a in 1 of 2 seeds, of b in 0 of 2: there are no means to compare"
    )


NOTHING, SHOWN = "no difference shown: ", "0.0967 nats (standard error 0.0033, 3 seeds, p = 0.0012)"


@pytest.mark.parametrize(
    "a, b, words",
    [
        ([5.0, 5.1, 5.3], [4.9, 5.0, 5.21], f"b is better than a by {SHOWN}"),
        ([4.9, 5.0, 5.21], [5.0, 5.1, 5.3], f"b is worse than a by {SHOWN}"),
        ([5.0, 5.1], [4.9, 5.0004], NOTHING
         + "b is 0.0998 nats lower than a (standard error 0.0002, 2 seeds, p = 0.0013"),
        ([5.0], [5.1], NOTHING + "b is 0.1000 nats higher than a (1 seed) (at least 3 seeds are needed)"),
        ([5.0, 5.1], [5.0, 5.1], NOTHING + "a and b have the same losses (standard error 0.0000, 2 seeds, p = 1)"),
        ([5.0, math.nan], [math.nan, 5.1], "nothing to compare yet: no seed has finished of both a and b"),
    ],
)  # fmt: skip
def test_a_verdict_in_a_sentence(a, b, words, recipes):
    plan = plan_sweep(recipes, [], [], [len(a)], Path("o"))
    write_sweep(plan, {0: a, 1: b})
    assert verdict(plan, shown(plan)[0]).startswith(words)


def test_what_is_not_shown_says_how_many_seeds_would_show_it(recipes):
    plan = plan_sweep(recipes, [], [], [4], Path("o"))
    a, b = [5.0, 5.1, 5.3, 5.2], [4.9, 5.2, 5.1, 5.22]
    write_sweep(plan, {0: a, 1: b})
    n = seeds_needed(np.array(b) - np.array(a))
    assert 10 < n < 100 and f"(about {n} seeds would show this one)" in verdict(plan, shown(plan)[0])


def test_two_seeds_with_the_same_losses_are_an_error(recipes):
    plan = plan_sweep(recipes, [], [], [3], Path("o"))
    for seed in (1, 3):
        write_run(plan, plan.candidates[1], seed, [9, 8, 7, 6])
    with pytest.raises(UserError, match="b: the runs of seeds 1 and 3 have exactly the same losses"):
        read_all(plan)


def test_notes_say_what_makes_a_comparison_unfair(recipes):
    Path("b.yaml").write_text("train: {steps: 8}\ndata: {seq_len: 512}\n")
    plan = plan_sweep(recipes, [], [], [1], Path("o"))
    folder = write_run(plan, plan.candidates[0], 1, [9, 8, 7, 6])
    write_run(plan, plan.candidates[1], 1, [9, 8, 7, 6.5], n_steps=8)
    with (folder / "metrics.jsonl").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.write(json.dumps({"step": 1, "rewound_from": 3, "data_offset": 8}) + "\n" + text)
    _, text, _ = shown(plan)
    assert "differ in data.seq_len: their losses may be of different text" in text
    assert "differ in train.steps" in text
    assert "passed over data on the way, which no other run did: a seed 1." in text


def test_the_picture_of_a_knob(recipes):
    pytest.importorskip("matplotlib", reason="the extra report has it")
    plan = plan_sweep(recipes[:1], ["optim.lr=1e-3,2e-3,1e-2", "optim.eps=1e-8,1e-6"], [], [2], Path("o"))
    finals = {i: [5 - i / 10, 5.02 - i / 11] for i in range(6)}
    finals[4] = [4.4, math.inf]
    write_sweep(plan, finals)
    rows, _, outcomes = shown(plan)
    curves, knob = build_figure(plan, rows, outcomes).axes
    assert knob.get_xscale() == "log" and knob.get_xlabel() == "optim.lr"
    assert [label.get_text() for label in knob.get_xticklabels()] == ["1e-3", "2e-3", "1e-2"]
    assert [text.get_text() for text in knob.get_legend().get_texts()] == ["eps=1e-8", "eps=1e-6"]
    crosses = [line for line in knob.lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [1e-2]
    named = {line.get_label(): line.get_color() for line in (*curves.lines, *knob.lines)}
    assert named["a,lr=1e-3,eps=1e-8 (baseline)"] == named["eps=1e-8"] != named["eps=1e-6"]
    assert named["a,lr=1e-2,eps=1e-6"] == named["eps=1e-6"]  # the best of that line
    (best,) = (line for line in knob.lines if line.get_label() == "eps=1e-6")
    assert best.get_ydata() == pytest.approx([4.91 + 0.1 / 22, 4.71 + 0.3 / 22, 4.51 + 0.5 / 22])


def test_the_picture_of_recipes(recipes):
    pytest.importorskip("matplotlib", reason="the extra report has it")
    plan = plan_sweep(recipes, [], [], [2], Path("o"))
    write_sweep(plan, {0: [5.0, 5.2], 1: [4.9, 5.15]})
    rows, _, outcomes = shown(plan)
    curves, finals = build_figure(plan, rows, outcomes).axes
    assert [label.get_text() for label in finals.get_yticklabels()] == ["b", "a (baseline)"]
    mean = next(line for line in curves.lines if line.get_label() == "b")
    assert mean.get_ydata()[-1] == pytest.approx(5.025) and mean.get_xdata().tolist() == list(TOKENS)


# Running


@pytest.fixture
def trainer(tmp_path, recipes, monkeypatch):
    """The command of a training program that is none, and the folder that says how it behaves."""
    behave = tmp_path / "behave"
    behave.mkdir()
    monkeypatch.setenv("BEHAVE", str(behave))
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (tmp_path / "trainer.py").write_text(TRAINER)
    return [sys.executable, "-S", str(tmp_path / "trainer.py")], behave


def order(behave) -> list[str]:
    text = (behave / "order").read_text() if (behave / "order").exists() else ""
    (behave / "order").unlink(missing_ok=True)
    return text.splitlines()


def test_runs_are_made_seed_by_seed_once_and_past_a_failure(trainer, recipes, capsys):
    command, behave = trainer
    (behave / "a-1").write_text("fail")
    (behave / "b-2").write_text("diverge")
    with pytest.raises(UserError, match=r"1 of 4 runs failed, the first with: no such data \(o/a/seed-1\.log"):
        sweep(recipes, Path("o"), command)
    assert order(behave) == ["a-1 7", "b-1 7", "a-2 7", "b-2 7"]
    said = capsys.readouterr().out
    assert "a seed 1: failed: no such data" in said and "[3 of 4] b seed 2: diverged" in said
    assert "Failed, and tried again by the next start: a seed 1 (no such data)." in said
    (behave / "a-1").unlink()
    sweep(recipes, Path("o"), command)
    assert order(behave) == ["a-1 7"]
    assert "o: of 2 x 2 (candidates x seeds) runs 3 are there already" in capsys.readouterr().out
    (behave / "b-2").unlink()
    sweep(recipes, Path("o"), command)
    assert order(behave) == []
    sweep(recipes, Path("o"), command, again=True)
    assert order(behave) == ["b-2 7"]
    assert Path("o/table.md").read_text().splitlines()[0].startswith("| candidate")
    assert Path("o/sweep.png").stat().st_size > 10_000


def test_jobs_share_the_cores(trainer, recipes, monkeypatch):
    command, behave = trainer
    monkeypatch.setattr("gpt2_hf.sweeping.running._n_cores", lambda: 9)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep(recipes, Path("o"), command, jobs=4)
    assert sorted(order(behave)) == ["a-1 2", "a-2 2", "b-1 2", "b-2 2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the user says holds
    sweep(recipes, Path("p"), command, jobs=4)
    assert {"a-1 1", "a-2 1", "b-1 1", "b-2 1"} <= {*order(behave)}


def test_told_to_end_it_has_its_runs_save_and_says_how_to_go_on(trainer, recipes, capsys):
    command, behave = trainer
    for name in ("b-1", "a-2"):
        (behave / name).write_text("wait")
    waiting = [Path("o", name).absolute() for name in ("b/seed-1", "a/seed-2")]

    def tell_when_both_run() -> None:
        deadline = time.monotonic() + 60
        while not all((run / "is_running").exists() for run in waiting) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    teller = threading.Thread(target=tell_when_both_run)
    teller.start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        sweep(recipes, Path("o"), command, jobs=2)
    teller.join()
    assert str(stopped.value) == (
        "stopped: 1 of 4 runs are there, and of the others what was saved is kept in o; the same command goes on from "
        "there"
    )
    assert all((run / "saved").exists() for run in waiting)
    assert "2 runs are being made: waiting until what they have is saved" in capsys.readouterr().out
    assert sorted(line[:3] for line in order(behave)) == ["a-1", "a-2", "b-1"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_sweeps_in_one_folder_are_refused(trainer, recipes):
    command, behave = trainer
    Path("o").mkdir()
    with (
        lock_folder(Path("o")),
        pytest.raises(ConfigError, match=rf"o is being worked on by process {os.getpid()} .*--only_show"),
    ):
        sweep(recipes, Path("o"), command)
    assert order(behave) == []


def test_what_is_there_is_shown_without_running_anything(trainer, recipes, capsys):
    command, behave = trainer
    with pytest.raises(UserError, match="o holds no sweep"):
        sweep([], Path("o"), command, only_show=True)
    (behave / "b-2").write_text("fail")
    with pytest.raises(UserError):
        sweep(recipes, Path("o"), command, ab=True)
    order(behave)
    capsys.readouterr()
    lock = lock_folder(Path("o"))  # the sweep may be running still
    sweep([], Path("o"), command, only_show=True, ab=True)
    lock.close()
    assert order(behave) == []
    said = capsys.readouterr().out
    assert "1 of 2" in said and "no difference shown: b is" in said and "at least 3 seeds are needed" in said
    sweep(recipes, Path("elsewhere"), command, only_show=True)
    assert "0 of 2" in capsys.readouterr().out and not Path("elsewhere").exists()
    with pytest.raises(ConfigError, match="--ab compares two candidates, not 4"):
        sweep(recipes, Path("o"), command, grid=["optim.lr=1,2"], ab=True, only_show=True)


@pytest.mark.slow
def test_a_real_sweep_interrupted_and_gone_on_with(data, tmp_path):
    """Through the script and scripts/pretrain.py; the interrupted run loses no step."""
    config = tiny(data, tmp_path / "unused", train__steps=300, eval__val_every=100, checkpoint__save_every=0)
    (tmp_path / "slow.yaml").write_text(config.to_yaml())
    fast = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-2))
    (tmp_path / "fast.yaml").write_text(fast.to_yaml())
    command = [
        sys.executable,
        str(ROOT / "scripts" / "sweep.py"),
        "--ab",
        "slow.yaml",
        "fast.yaml",
        "--jobs",
        "2",
        "--seeds",
        "2",
    ]
    command += ["--out", "o", "--set", "eval.val_tokens=640"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}

    def start():
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def trained() -> list[Path]:
        rows = [tmp_path / "o" / name / "seed-1" / "metrics.jsonl" for name in ("slow", "fast")]
        return [path for path in rows if any("train_loss" in row for row in read_rows(path))]

    process = start()
    deadline = time.monotonic() + 300
    while not trained():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "stopped: 0 of 4 runs are there" in said, said
    interrupted = trained()
    said, _ = (process := start()).communicate(timeout=600)
    assert process.returncode == 0, said
    for path in interrupted:
        first, second = (row["step"] for row in read_rows(path.with_name("starts.jsonl")))
        assert first == 0 < second < 300
        assert [row["step"] for row in read_rows(path) if "train_loss" in row] == list(range(1, 301))

    finals = {
        name: [read_rows(tmp_path / "o" / name / f"seed-{n}" / "metrics.jsonl")[-1]["val_loss"] for n in (1, 2)]
        for name in ("slow", "fast")
    }
    assert len({*finals["slow"], *finals["fast"]}) == 4
    difference = np.mean(finals["fast"]) - np.mean(finals["slow"])
    words = f"no difference shown: fast is {-difference:.4f} nats lower than slow"
    assert difference < 0 and said.splitlines()[-1].startswith(words) and ", 2 seeds, p = " in said
    assert (tmp_path / "o" / "table.md").read_text().rstrip().endswith(said.splitlines()[-1])
