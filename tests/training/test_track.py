"""On track or not: healthy runs are left alone, and of each usual cause, planted in a small run, the check speaks."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from test_train import clean_state as clean_state
from test_train import run, tiny

from gpt2_hf.data import stream
from gpt2_hf.data.stream import TokenStream
from gpt2_hf.model import GPTForCausalLM
from gpt2_hf.model.modeling_gpt import GPTPreTrainedModel
from gpt2_hf.reference import Curve
from gpt2_hf.training import track
from gpt2_hf.training.track import DataSeen, Track, odd_weights

VOCAB, SOURCES, STEPS = 256, 8, 100
EOT = VOCAB - 1


def documents(n: int, seed: int) -> list[list[int]]:
    """Texts of several sources, one source after the other.

    In each, a token names the next one, most of the time; else that is one of 64, which are the source's favourites.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    follows = np.random.Generator(np.random.Philox(1)).permuted(np.tile(np.arange(EOT), (SOURCES, 1)), axis=1)
    found = []
    for number in range(n):
        source = number * SOURCES // n
        token, text = 0, []
        for place in range(int(rng.integers(20, 60))):
            is_free = not place or rng.random() > 0.8
            token = int((source * 32 + rng.integers(64)) % EOT if is_free else follows[source][token])
            text.append(token)
        found.append(text)
    return found


def corpus(root: Path, name: str, train: list[list[int]], end: int = EOT) -> Path:
    """Shards of a small vocabulary; ``end`` closes the documents of the training split, 255 those of validation."""
    path = write_shards(root, {"train": [train], "val": [documents(160, 2)]}, name)
    for split, closing in (("train", end), ("val", EOT)):
        file = path / split / "00000.ds"
        tokens = np.fromfile(file, "<u2")
        tokens[tokens == 50256] = closing
        tokens.tofile(file)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": VOCAB, "eot": EOT}))
    return path


def settings(data: Path, run_dir: Path, **changes):
    small = {
        "model__vocab_size": VOCAB,
        "optim__lr": 0.05,
        "optim__warmup_steps": 30,
        "train__steps": STEPS,
        "train__global_batch_tokens": 16 * 32,
        "train__micro_batch_size": 16,
        "train__log_every": 5,
        "train__check_kernels": False,
        "eval__val_every": 50,
        "eval__val_tokens": 3200,
        "checkpoint__save_every": 0,
    }
    return tiny(data, run_dir, **small | changes)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """The folder of a run to compare with, its data beside it."""
    root = tmp_path_factory.mktemp("good")
    data = corpus(root, "data", documents(4000, 1))
    run(settings(data, root / "run", eval__reference="none"))
    return root / "run"


@pytest.fixture
def compared(good, tmp_path, monkeypatch, capsys):
    """A function that trains like the good run but for some changes: its rows, and what the check said after step 0."""
    monkeypatch.setattr(track, "FIRST", 100)
    monkeypatch.setattr(track, "ENOUGH_STEPS", 20)

    def train(data: Path = good.parent / "data", **changes) -> tuple[list[dict], list[str]]:
        changes = {"eval__reference": str(good)} | changes
        rows = run(settings(data, tmp_path / "run", **changes))
        said = [line.strip() for line in capsys.readouterr().out.splitlines()]
        said = [line for line in said if " on track (" in line or " the reference by " in line]
        print(*said, sep="\n")  # pytest -rP shows it
        return rows, said

    return train


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_healthy_run_is_on_track(compared, seed):
    rows, said = compared(train__seed=seed)
    judged = {row["step"]: row for row in rows if "off_track" in row}
    assert list(judged) == [100] and not judged[100]["off_track"]
    assert len(said) == 1 and said[0].startswith("step 100: on track (validation ")
    for row in judged.values():
        assert abs(row["val_loss"] - row["reference_loss"]) < row["reference_band"] + 1e-4


def residual_weights(factor: float):
    """An initialisation like GPT-2's, but for the residual projections, which are so many times as large."""
    plain = GPTPreTrainedModel._init_weights

    def init(self, module):
        plain(self, module)
        if type(module).__name__ == "ResidualProjection":
            module.weight.data.mul_(factor)

    return init


CAUSES = {
    "learning rate too high": ("a learning rate that is too high", {"optim__lr": 0.5}),
    "learning rate too low": ("a learning rate that is too low", {"optim__lr": 5e-4}),
    "no warm-up": ("a warm-up that is missing or too short", {"optim__warmup_steps": 0}),
    "batch too small": (
        "a batch that is too small",
        {"train__global_batch_tokens": 32, "train__micro_batch_size": 1},
    ),
    "repeated data": ("repeated data", {}),
    "missing end-of-text": ("missing end-of-text", {}),
    "unshuffled data": ("unshuffled data", {}),
    "residual initialisation": ("initial weights", {}),
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_planted_cause_is_named(compared, tmp_path, monkeypatch, name):
    expected, changes = CAUSES[name]
    if name == "repeated data":
        changes = {"data": corpus(tmp_path, "data", documents(40, 1) * 100)}
    elif name == "missing end-of-text":
        changes = {"data": corpus(tmp_path, "data", documents(4000, 1), end=7)}
    elif name == "unshuffled data":
        monkeypatch.setattr(stream, "TokenStream", partial(TokenStream, shuffle=False))
    elif name == "residual initialisation":
        monkeypatch.setattr(GPTPreTrainedModel, "_init_weights", residual_weights(300))
    rows, said = compared(**changes)
    assert next(row["off_track"] for row in rows if "off_track" in row) == 1
    cause = said[0].partition("the likely cause is ")[2]
    assert expected in cause.partition(";")[0], said


def test_unscaled_residual_projections_are_named_before_the_first_step(good, tmp_path, monkeypatch, capsys):
    config = settings(good.parent / "data", tmp_path / "run", eval__reference=str(good), train__steps=1)
    assert odd_weights(GPTForCausalLM(config.model.gpt_config())) == ""
    monkeypatch.setattr(GPTPreTrainedModel, "_init_weights", residual_weights(2))
    run(config)
    assert "initial weights with another standard deviation, c_proj 0.02 (GPT-2: 0.01)" in capsys.readouterr().out


def seen(windows: np.ndarray, per_step: int = 8) -> DataSeen:
    """What is seen of windows, (n, T), in steps of ``per_step``, each as two micro-batches."""
    found = DataSeen(EOT)
    n_steps = len(windows) // per_step
    padded = np.pad(windows[: n_steps * per_step], ((0, 0), (0, 1)))
    for batch in torch.from_numpy(padded.astype(np.int64)).view(n_steps, 2, per_step // 2, -1):
        found.note(batch)
    return found


def test_what_is_seen_of_the_data():
    rng = np.random.Generator(np.random.Philox(3))
    windows = rng.integers(0, 200, (2400, 64))
    windows[::10, 5] = EOT
    fresh = seen(windows)
    assert (fresh.n_steps, fresh.n_tokens, fresh.n_eot) == (300, 2400 * 64, 240)
    assert fresh.repeated == 0
    assert fresh.drift == pytest.approx((1, 0), abs=0.2)

    # Four copies of the same text, each cut into windows at other places, so that 16 tokens on end are whole in three
    # quarters of the cases.
    whole = (64 - 15) / 64
    news = [1, 1 - whole, (1 - whole) ** 2, (1 - whole) ** 3]
    text = np.concatenate([np.roll(windows[:600].ravel(), 7 * copy) for copy in range(4)])
    assert seen(text.reshape(-1, 64)).repeated == pytest.approx(1 - sum(news) / 4, abs=0.03)

    # The first half of the run reads other words than the second.
    sorted_by_source = np.concatenate([windows[:1200] % 32, windows[1200:]])
    ratio, excess = seen(sorted_by_source).drift
    assert ratio > 10 and excess > 0.1
    assert seen(rng.permutation(sorted_by_source)).drift == pytest.approx((1, 0), abs=0.3)


def test_memory_of_the_data_stays_small(monkeypatch):
    monkeypatch.setattr(track, "MOST_KEPT", 100)
    windows = np.random.Generator(np.random.Philox(4)).integers(0, 50_000, (2000, 64))
    found = seen(np.concatenate([windows, windows, windows]))
    assert len(found._seen) <= 100
    assert found.repeated == pytest.approx(2 / 3, abs=0.1)


def checked(curve: Curve | None, said: list[str], **changes) -> Track:
    config = settings(Path("data"), Path("run"), **{"train__steps": 1000, "eval__val_every": 0} | changes)
    return Track(config, curve, said.append, EOT, 10**9)


def test_a_line_when_the_verdict_changes_and_now_and_then():
    said: list[str] = []
    check = checked(Curve("good", {}, {"val_loss": [(100.0, 4.0), (2000.0, 4.0)]}, {"val_loss": 0.1}), said)
    said.clear()
    for step in range(250, 1001, 50):
        row = check.judge(step, {"val_loss": 4.05 if step < 500 or step > 900 else 4.5})
        assert row == {"reference_loss": 4.0, "reference_band": 0.1, "off_track": int(500 <= step <= 900)}
    assert [int(line.split()[1][:-1]) for line in said] == [250, 400, 500, 750, 950]
    assert [" on track " in line for line in said] == [True, True, False, False, True]
    assert "none of the usual causes fits" in said[2]
    assert check.judge(1100, {"val_loss": math.nan})["off_track"] == 1


def test_the_rates_of_another_optimizer_are_not_compared():
    curve = Curve("good", {"optim.name": "adamw", "optim.lr": 5e-4}, {"val_loss": [(1.0, 4.0), (999.0, 4.0)]})
    said: list[str] = []
    checked(curve, said, optim__name="muon", optim__lr=0.05).judge(300, {"val_loss": 5.0})
    assert "the likely cause is the optimizer (optim.name muon, there adamw)" in said[-1]
    assert "rate that is too" not in said[-1]


def test_training_losses_are_compared_where_nothing_is_validated():
    curve = Curve("good", {}, {"train_loss": [(1.0, 5.0), (2000.0, 5.0)]}, {"train_loss": 0.1})
    rng = np.random.Generator(np.random.Philox(5))
    noise = rng.normal(0, 0.3, 200)
    for off in (0.0, 1.0):
        check = checked(curve, [])
        rows = {s: check.judge(s, {"train_loss": 5 + off + noise[s // 5]}) for s in range(5, 1000, 5)}
        judged = {step: row for step, row in rows.items() if row}
        assert list(judged) == list(range(250, 1000, 50))
        assert {row["off_track"] for row in judged.values()} == {int(off)}


@pytest.mark.parametrize(("batch", "steps", "place"), [(256, 1000, 300), (256, 2000, 150), (1024, 500, 600)])
def test_other_batches_are_compared_at_the_same_step_or_number_of_tokens(batch, steps, place):
    """The reference has 1000 steps of 512 tokens: with as many steps it is the step that counts."""
    curve = Curve("good", {"train.steps": 1000, "train.global_batch_tokens": 512}, {"val_loss": [(1, 9.0), (999, 3.0)]})
    changes = {"train__global_batch_tokens": batch, "train__steps": steps, "optim__schedule": "trapezoid"}
    row = checked(curve, [], **changes).judge(300, {"val_loss": 4.0})
    assert row["reference_loss"] == pytest.approx(curve.at("val_loss", place), abs=1e-4)


def test_a_reference_whose_rate_has_fallen_is_no_measure_of_a_longer_run():
    recipe = {"train.steps": 400, "optim.schedule": "cosine", "optim.warmup_steps": 10, "optim.min_lr_ratio": 0.0}
    curve = Curve("short", recipe, {"val_loss": [(1, 9.0), (400, 3.0)]})
    check = checked(curve, [])
    assert check.judge(390, {"val_loss": 4.0}) == {}


def test_a_reference_changes_no_loss(good, tmp_path):
    rows = run(settings(good.parent / "data", tmp_path / "run", eval__reference=str(good), train__steps=STEPS))
    plain = [json.loads(line) for line in (good / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "train_loss", "grad_norm", "val_loss")
    assert [{k: row.get(k) for k in kept} for row in rows] == [{k: row.get(k) for k in kept} for row in plain]
