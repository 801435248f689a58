import json
import runpy
import struct
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gpt2_hf import runs
from gpt2_hf.reporting.diff import _place, compare_runs
from gpt2_hf.reporting.measured import ReportError

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"


def single(value, ulps=0):
    """A float32 that is so many numbers above ``value``, as JSON has it."""
    bits = struct.unpack("<i", struct.pack("<f", value))[0] + ulps
    return struct.unpack("<f", struct.pack("<i", bits))[0]


def rows(n_steps=20, every=1, **changes):
    """Rows of a run; ``changes`` are losses by step, as s12=..."""
    found = []
    for step in range(every, n_steps + 1, every):
        loss = changes.get(f"s{step}", single(5 - step / 10))
        found.append({"step": step, "tokens_seen": 10 * step, "train_loss": loss, "lr": 1e-3, "tokens_per_sec": step})
    return found


@pytest.fixture
def make_run(tmp_path):
    def make(name, measured, settings=None, environment=None, models=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured))
        base = {"model": {"preset": "gpt2"}, "optim": {"lr": 1e-3}, "train": {"run_dir": str(folder), "log_every": 1}}
        base["optim"] |= settings or {}
        (folder / "config.yaml").write_text(yaml.safe_dump(base))
        (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", **(environment or {})}))
        for model, tensors in (models or {}).items():
            place = folder / ("final" if model == "final" else f"checkpoints/{runs.step_name(model)}")
            runs.write_folder(place, lambda to, tensors=tensors: save_file(tensors, to / "model.safetensors"))
        return folder

    return make


def weights(**changes):
    names = ("ln_f.weight", "h.10.ln_1.weight", "h.2.mlp.c_fc.weight", "h.2.attn.c_attn.weight", "wte.weight")
    tensors = {f"transformer.{name}": torch.ones(4, 3) for name in names}
    for name, value in changes.items():
        tensors[f"transformer.{name.replace('__', '.')}"][1, 2] = value
    return tensors


def test_equal_runs_are_said_to_be_equal(make_run):
    a = make_run("a", rows(), models={10: weights(), "final": weights()})
    b = make_run("b", rows(), models={10: weights(), "final": weights()})
    are_equal, lines = compare_runs(a, b)
    text = "\n".join(lines)
    assert are_equal
    assert "all 60 figures are equal, over 20 steps that both have rows of (1 to 20)" in text  # rates are not compared
    assert "weights are equal in all that both have saved: step-00000010, final" in text
    assert "settings, versions, machine and data are the same" in text


def test_the_first_step_that_differs_is_named_with_how_far(make_run):
    a = make_run("a", rows(s12=single(3.8), s15=3.0))
    b = make_run("b", rows(s12=single(3.8, 3), s15=2.0), {"lr": 2e-3}, {"torch": "2.12.0"})
    are_equal, lines = compare_runs(a, b)
    text = "\n".join(lines)
    assert not are_equal
    assert "first difference is at step 12, after 11 that are equal, of 20 steps" in text
    assert "train_loss" in lines[1] and "3 ulp of float32" in lines[1]
    assert "2 of 9 differ" in text
    assert "setting optim.lr: 0.001 against 0.002" in text and "torch: 2.13.0 against 2.12.0" in text
    assert "run_dir" not in text


def test_a_double_differs_by_ulps_of_its_own(make_run):
    close = make_run("a", rows(s3=0.1)), make_run("b", rows(s3=0.1 + 2**-56))
    assert "1 ulp of float64" in "\n".join(compare_runs(*close)[1])


def test_the_first_tensor_is_that_of_the_network_not_of_the_alphabet(make_run):
    a = make_run("a", rows(), models={5: weights(), 10: weights()})
    changed = weights(ln_f__weight=2.0, h__10__ln_1__weight=3.0, h__2__mlp__c_fc__weight=1.5)
    b = make_run("b", rows(), models={5: weights(), 10: changed})
    are_equal, lines = compare_runs(a, b)
    text = "\n".join(lines)
    assert not are_equal
    assert "step-00000010 is the first model of both that differs; equal are step-00000005" in text
    assert "transformer.h.2.mlp.c_fc.weight: 1 of 12 numbers differ, by at most 0.5; 3 of 5 tensors differ" in text


def test_tensors_are_sorted_as_the_network_has_them():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=12, n_embd=4, n_head=1, vocab_size=8, n_positions=4)
    names = list(GPT2LMHeadModel(config).state_dict())
    assert sorted(names, key=_place) == names


def test_rows_made_twice_and_other_intervals_are_compared_where_both_have_them(make_run):
    again = [*rows(12, s11=9.0, s12=9.0), *[row for row in rows() if row["step"] > 10]]
    assert compare_runs(make_run("a", again), make_run("b", rows()))[0]
    are_equal, lines = compare_runs(make_run("often", rows(30)), make_run("seldom", rows(20, every=5)))
    text = "\n".join(lines)
    assert are_equal and "over 4 steps that both have rows of (5 to 20)" in text
    assert "goes on, to step 30" in text


def test_what_is_missing_is_a_line(make_run):
    a, b = make_run("a", rows(), models={5: weights()}), make_run("b", rows(), models={7: weights()})
    (b / "config.yaml").unlink()
    (b / "environment.json").unlink()
    text = "\n".join(compare_runs(a, b)[1])
    assert "no config.yaml" in text and "no environment.json" in text
    assert "no checkpoint of the same step in both" in text
    with pytest.raises(ReportError, match=r"no rows in .*nowhere.*give the folder of a run"):
        compare_runs(a, b.with_name("nowhere"))
    with pytest.raises(ReportError, match=r"no step in common \(20 steps, 1 to 20 and 1 steps, 50 to 50\)"):
        compare_runs(a, make_run("later", rows(50, every=50)))


def test_a_model_that_cannot_be_read_is_passed_over(make_run):
    a = make_run("a", rows(), models={5: weights(), "final": weights()})
    b = make_run("b", rows(), models={5: weights(ln_f__weight=2.0), "final": weights()})
    (b / "checkpoints/step-00000005/model.safetensors").write_bytes(b"no weights")
    are_equal, lines = compare_runs(a, b)
    text = "\n".join(lines)
    assert are_equal and "step-00000005 cannot be compared: the weights in" in text and "saved: final" in text


@pytest.mark.parametrize(("loss", "status"), [(4.0, 0), (4.5, 1)])
def test_the_script_ends_with_a_status_that_says_it(make_run, monkeypatch, capsys, loss, status):
    a, b = make_run("a", rows(s10=4.0)), make_run("b", rows(s10=loss))
    monkeypatch.setattr(sys, "argv", ["report.py", "--diff", str(a), str(b)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == status
    assert capsys.readouterr().out.splitlines()[0].endswith("are different" if status else "are equal")
