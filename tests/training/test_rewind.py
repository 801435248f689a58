"""Training that goes wrong in its middle: steps are skipped, the run goes back and past the data, or it stops."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_train import ROOT, TORCHRUN, losses, run, tiny, with_steps
from test_train import clean_state as clean_state
from test_train import data as data
from test_watch import folders, large_weights

from gpt2_hf.config import DataSection, RunConfig, TrainSection
from gpt2_hf.data.shards import open_split
from gpt2_hf.data.stream import StepLoader, TokenStream
from gpt2_hf.knobs import ConfigError
from gpt2_hf.runs import read_rows
from gpt2_hf.training import checkpoint, rewind
from gpt2_hf.training import loop as training
from gpt2_hf.training.loop import train, train_step
from gpt2_hf.training.metrics import RunLog
from gpt2_hf.training.watch import ENOUGH, PAST, SCALER_SKIPS, Diverged, Watch


@pytest.fixture(autouse=True)
def quick_to_save(monkeypatch):
    """Checkpoints without a tokenizer, which takes longer to write than all these runs to train."""
    monkeypatch.setattr(checkpoint, "save_tokenizer", lambda *_: None, raising=False)


def nan_gradient(model, optimizers):
    """To be called before a step."""
    model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * torch.nan)


def worse_weights(model, optimizers):
    """By a few nats, but no worse than guessing and the margin."""
    for p in model.parameters():
        p.mul_(4.5)


class Harm:
    """Lets ``harm(model, optimizers)`` happen before each of ``steps`` of a run, the first ``times`` that it comes by.

    A step's gradient hooks live as long as the step. What ``seen`` holds is (step, first sample's tokens).
    """

    def __init__(self, monkeypatch, harm, steps, times=1):
        self.harm, self.steps, self.times = harm, steps, times
        self.seen: list[tuple[int, list[int]]] = []
        monkeypatch.setattr(training, "train_step", self)

    def __call__(self, accelerator, model, optimizers, batch, number, *rest):
        step = number + 1
        self.seen.append((step, batch[0, 0].tolist()))
        count = sum(seen == step for seen, _ in self.seen)
        if step in self.steps and count <= self.times:
            with torch.no_grad():
                self.harm(model, optimizers)
        result = train_step(accelerator, model, optimizers, batch, number, *rest)
        if hooks := model.transformer.ln_f.weight._backward_hooks:
            hooks.clear()
        return result


def same_weights(a: Path, b: Path) -> bool:
    found = [load_file(path / "final" / "model.safetensors") for path in (a, b)]
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def flat(data: Path, run_dir: Path, **changes) -> RunConfig:
    """A run whose loss hardly moves, that is looked at closely: 16 samples a step, saved every 12 steps."""
    settings = {
        "optim__lr": 1e-4,
        "train__steps": 30,
        "train__log_every": 5,
        "train__max_bad_steps": 3,
        "checkpoint__save_every": 12,
    }
    return tiny(data, run_dir, **{**settings, **changes})


def test_data_passed_over_while_batches_grow(data, tmp_path, monkeypatch):
    """Back from step 25 to 12, over an edge: all samples come once, in their order, in steps of the size of each."""
    harm = Harm(monkeypatch, worse_weights, {23})
    rows = run(flat(data, tmp_path / "run", train__batch_ramp=[8 * 32], train__batch_ramp_steps=14))
    assert [row["data_offset"] for row in rows if "rewound_from" in row] == [2 * 8 + 11 * 16]
    steps = [step for step, _ in harm.seen]
    assert steps == [*range(1, 26), *range(13, 31)]
    firsts = itertools.accumulate([8 if step <= 14 else 16 for step in steps[:-1]], initial=0)
    stream = TokenStream(open_split(data, "train"), 32, 1337)
    assert [tokens for _, tokens in harm.seen] == [stream.batch(first, 1)[0].tolist() for first in firsts]
    assert rows[-1]["tokens_seen"] == 14 * 256 + 16 * 512


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_whose_gradients_are_not_finite_changes_nothing(data, tmp_path, monkeypatch, name):
    def config(folder: str) -> RunConfig:
        return tiny(data, tmp_path / folder, train__steps=8, train__log_every=4, optim__name=name)

    Harm(monkeypatch, nan_gradient, {5, 6})
    rows = run(config("harmed"))
    assert [row.get("skipped_steps") for row in rows] == [None, 2] and len(losses(rows)) == 2

    def left_out(accelerator, model, optimizers, batch, number, *rest):
        if number + 1 in (5, 6):
            return torch.tensor(math.nan), torch.tensor(math.nan)
        return train_step(accelerator, model, optimizers, batch, number, *rest)

    monkeypatch.setattr(training, "train_step", left_out)
    run(config("left_out"))
    assert same_weights(tmp_path / "harmed", tmp_path / "left_out")


def test_an_exploded_run_goes_back_and_past_the_data(data, tmp_path, monkeypatch, capsys):
    """Far above its past in steps 23 to 25, though not above guessing: back to 12, and on with the data of step 26."""
    harm = Harm(monkeypatch, worse_weights, {23})
    rows = run(flat(data, tmp_path / "run"))
    folder = tmp_path / "run" / "checkpoints" / "step-00000012"
    said = capsys.readouterr().out
    assert "step 24: not saved, as the loss is far above" in said
    assert f"for 3 steps: going back to {folder}, and passing over the data of steps 13 to 25" in said
    assert [row for row in rows if "rewound_from" in row] == [
        {"step": 12, "tokens_seen": 12 * 512, "rewound_from": 25, "data_offset": 13 * 16}
    ]
    assert [row["step"] for row in rows] == [5, 10, 12, 12, 15, 20, 24, 25, 30]
    assert max(losses(rows)) < 5.7

    # What each step saw first: no data twice, none left out.
    assert [step for step, _ in harm.seen[12:]] == [*range(13, 26), *range(13, 31)]
    samples = TokenStream(open_split(data, "train"), 32, 1337).batch(0, 43 * 16)
    assert [tokens for _, tokens in harm.seen] == [samples[16 * k].tolist() for k in range(43)]
    newest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000030" / "trainer_state/state.json").read_text())
    assert newest["data_offset"] == 208 and len(newest["past"]["losses"]) == 30


def test_what_one_rank_meets_all_ranks_decide_on(data, tmp_path):
    """Rank 1 alone has a broken kernel, then a loss that is no number in step 3, a weight that is none in step 8."""
    program = """
import os, torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from gpt2_hf.cli import parse_cli
from gpt2_hf.config import RunConfig
from gpt2_hf.model import modeling_gpt
from gpt2_hf.program import program
from gpt2_hf.runs import read_rows
from gpt2_hf.training import checkpoint, rewind
from gpt2_hf.training import loop as training

is_harmed = os.environ["RANK"] == "1"
step, harmed = training.train_step, []

def attend(module, query, key, value, mask, scaling, **kwargs):
    return sdpa_attention_forward(module, query, key, value, mask, scaling=(1 + is_harmed) * scaling, **kwargs)

def harmful(accelerator, model, optimizers, batch, number, *rest):
    bare = model.module.transformer
    hook = bare.ln_f.register_forward_hook(lambda *args: args[2] * (torch.nan if is_harmed and number == 2 else 1))
    result = step(accelerator, model, optimizers, batch, number, *rest)
    hook.remove()
    if is_harmed and number == 7 and not harmed:
        harmed.append(True)
        bare.wpe.weight.data[-1] = torch.nan
    return result

AttentionInterface.register("broken", attend)
AttentionMaskInterface.register("broken", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
modeling_gpt.CAUSAL_WITHOUT_MASK += ("broken",)
training.train_step = harmful
program(lambda: training.train(parse_cli(RunConfig)))()
"""
    (tmp_path / "script.py").write_text(program)
    config = flat(
        data,
        tmp_path / "run",
        model__attn_implementation="broken",
        train__steps=10,
        train__micro_batch_size=4,
        checkpoint__save_every=4,
    )
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, "--nproc_per_node", "2", "script.py", "--config", "recipe.yaml"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "taking attention sdpa" in result.stdout
    assert "the weights or the optimizer's state are not finite after step 8: going back" in result.stdout
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 4, 5, 8, 10]
    assert [row.get("skipped_steps") for row in rows] == [1, None, None, None, None]
    assert (rows[1]["rewound_from"], rows[1]["data_offset"]) == (8, 64) and len(losses(rows)) == 4


def test_a_kill_in_a_rewind_comes_to_the_same_point(data, tmp_path, monkeypatch):
    """With a checkpoint of the time when the loss was rising already, which must not be gone on from either."""

    def begin(name: str) -> RunConfig:
        Harm(monkeypatch, worse_weights, {23})
        return flat(data, tmp_path / name)

    def unharmed(name: str) -> list[dict]:
        Harm(monkeypatch, worse_weights, ())
        rows = run(flat(data, tmp_path / name))
        timed = {"tokens_per_sec", "mfu", "peak_memory"}
        return [{k: v for k, v in row.items() if k not in timed} for row in rows]

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr(Watch, "try_weights", lambda *_: True)  # so that 24 is saved
    found = {}
    for place, moment in ((rewind, "discard_untrusted"), (RunLog, "go_back")):
        config = begin(moment)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, moment, kill)
            train(config)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert ("step-00000024" in folders(tmp_path / moment)) == (moment == "discard_untrusted")
        found[moment] = unharmed(moment)
        assert [row["data_offset"] for row in found[moment] if "rewound_from" in row] == [13 * 16]
        assert folders(tmp_path / moment) == ["step-00000024", "step-00000030"]
        assert found[moment] == found["discard_untrusted"]
        assert same_weights(tmp_path / moment, tmp_path / "discard_untrusted")


def test_a_run_that_diverges_again_and_again_stops_and_can_be_told_to_go_on(data, tmp_path, monkeypatch):
    config = flat(data, tmp_path / "run", train__steps=12, train__max_rewinds=2, checkpoint__save_every=4)
    Harm(monkeypatch, nan_gradient, range(6, 9), times=9)
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    with pytest.raises(FloatingPointError, match=rf"not finite in 3 steps on end.*{folder} is good, and the next"):
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    record = json.loads((tmp_path / "run" / "rewind.json").read_text())
    assert record == {"step": 4, "rewound_from": 8, "data_offset": 2 * 4 * 16, "times": 2}

    def again(**changes) -> list[dict]:
        return run(dataclasses.replace(config, train=dataclasses.replace(config.train, **changes)))

    with pytest.raises(FloatingPointError, match="not finite in 3 steps"):
        again()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(FloatingPointError, match="not finite in 3 steps"):
        again(max_rewinds=3, on_divergence="stop")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(FloatingPointError, match="not finite in 2 steps"):
        again(max_bad_steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    Harm(monkeypatch, nan_gradient, range(6, 9))
    rows = again(max_rewinds=3)
    assert [row["data_offset"] for row in rows if "rewound_from" in row] == [64, 128, 192]


def test_weights_that_are_worth_nothing_are_gone_back_from_at_once(data, tmp_path, monkeypatch):
    Harm(monkeypatch, large_weights, {8})
    rows = run(flat(data, tmp_path / "run", train__steps=10, checkpoint__save_every=4))
    assert [(row["step"], row["rewound_from"]) for row in rows if "rewound_from" in row] == [(4, 8)]


def test_when_told_to_stop_it_leaves_no_exploded_checkpoint(data, tmp_path, monkeypatch, capsys):
    config = flat(data, tmp_path / "run", train__on_divergence="stop", checkpoint__keep_last=1)
    Harm(monkeypatch, worse_weights, {23})
    monkeypatch.setattr(Watch, "try_weights", lambda *_: True)  # so that 24 is saved
    with pytest.raises(FloatingPointError, match=r"for 3 steps, so this is not saved; no checkpoint was saved"):
        train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert folders(tmp_path / "run") == []
    assert "step-00000024 was made when training had begun to diverge, and is deleted" in capsys.readouterr().out


def test_a_record_that_cannot_be_read_is_named(data, tmp_path):
    config = tiny(data, tmp_path / "run", train__steps=2, checkpoint__save_every=2)
    run(config)
    for text in ("", "[]", '{"step": "x"}', '{"step": 2}'):
        (tmp_path / "run" / "rewind.json").write_text(text)
        with pytest.raises(ConfigError, match=r"rewind\.json cannot be read .*put it back, or delete it"):
            train(with_steps(config, 4))
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_record_of_what_is_gone_is_forgotten(data, tmp_path):
    """The run is begun anew where it had once gone back to step 4; its checkpoints are not those of that time."""
    config = tiny(data, tmp_path / "run", train__steps=6, checkpoint__save_every=3)
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "rewind.json"
    record.write_text(json.dumps({"step": 4, "rewound_from": 8, "data_offset": 64, "times": 1}))
    run(config)
    assert not record.exists() and folders(tmp_path / "run") == ["step-00000003", "step-00000006"]
    record.write_text(json.dumps({"step": 7, "rewound_from": 8, "data_offset": 64, "times": 1}))
    run(with_steps(config, 7))
    assert not record.exists() and "step-00000006" in folders(tmp_path / "run")


def test_the_loader_reads_from_its_offset(data):
    stream = TokenStream(open_split(data, "train"), 32, 7)
    for rank in (0, 1):
        sizes = {"global_batch_size": 8, "micro_batch_size": 2, "rank": rank, "world_size": 2}
        with StepLoader(stream, 3, 5, data_offset=5, **sizes) as steps:
            found = torch.stack(list(steps)).flatten(1, 2)
        expected = [stream.batch(8 * step + 5 + 4 * rank, 4).astype("int64") for step in (3, 4)]
        assert torch.equal(found, torch.stack([torch.from_numpy(part) for part in expected]))


def watch(scaler: object = None, data: dict | None = None, **train) -> Watch:
    train = {"max_bad_steps": 10, "steps": 1000, **train}
    accelerator = SimpleNamespace(scaler=scaler, reduce=lambda tensor, how: tensor, num_processes=1)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=1000))
    config = RunConfig(data=DataSection(**(data or {})), train=TrainSection(**train))
    return Watch(config, accelerator, model)


def feed(watch: Watch, values: list[float], first: int = 1) -> dict:
    for value in values:
        watch.note(torch.tensor(value), torch.tensor(value))
    watch.look(first + len(values) - 1)
    return watch.figures()


def noise(n: int, mean: float = 3.0) -> list[float]:
    return (mean + 0.02 * torch.randn(n, generator=torch.Generator().manual_seed(n))).tolist()


def test_spikes_are_counted_and_one_step_is_no_trouble():
    seen = watch()
    feed(seen, noise(50))
    assert feed(seen, [*noise(5), 3.5, *noise(5), 5.0, 3.0], 51) == {
        "train_loss": 3.0,
        "grad_norm": 3.0,
        "loss_spikes": 2,
    }
    assert feed(seen, [3.0], 64) == {"train_loss": 3.0, "grad_norm": 3.0}
    assert feed(seen, [math.nan], 65) == {"skipped_steps": 1}


@pytest.mark.parametrize("told_apart", [1, 3, 200])
def test_trouble_begins_where_the_loss_began_to_rise(told_apart):
    """At step 51, by the update of step 50, however many steps are read at once, and over a resume."""
    values = [*noise(50), 3.3, 3.5, 3.7, 3.9, *[4.5] * 10]
    seen = watch()
    with pytest.raises(Diverged, match=r"train_loss is 4\.5 at step 64, above 4\.0 for 10 steps") as error:
        for start in range(0, len(values), told_apart):
            resumed = watch()
            resumed.restart(json.loads(json.dumps(seen.state())))
            seen = resumed
            feed(seen, values[start : start + told_apart], start + 1)
    assert error.value.step == 50


def test_a_new_level_is_got_used_to_and_early_steps_have_none():
    seen = watch()
    feed(seen, [11.0, *torch.linspace(11, 3, ENOUGH + 80).tolist(), *noise(2 * PAST)])
    assert "loss_spikes" in feed(seen, noise(PAST + 50, 3.6))
    assert "loss_spikes" not in feed(seen, noise(30, 3.6))


def test_a_gradient_scaler_may_skip_many_steps():
    seen = watch(scaler=object())
    assert feed(seen, [3.0, *[math.inf] * SCALER_SKIPS, 3.0])["skipped_steps"] == SCALER_SKIPS
    with pytest.raises(Diverged, match=f"in 10 steps on end, up to step {SCALER_SKIPS + 10}") as error:
        feed(seen, [math.inf] * (SCALER_SKIPS + 20))
    assert error.value.step == SCALER_SKIPS + 1
