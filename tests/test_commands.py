"""Wrong arguments of the commands beside training: one line, exit status 2, and nothing made."""

import io
import runpy
import sys
from pathlib import Path

import pytest

from gpt2_hf.data.tokenizer import load_tokenizer
from gpt2_hf.model import GPTConfig, GPTForCausalLM
from gpt2_hf.runs import write_folder

ROOT = Path(__file__).parent.parent
LONG = "9" * 5000
NO_NUMBERS = ("", " ", "abc", "1:30", "010", "0x10", "1.2.3", "1e", "1 2", "[1]", "{a: 1}", "true", "nan", "inf", LONG)
NO_COUNTS = (*NO_NUMBERS, "1.5", "-1", "1e30")
NO_POSITIVES = (*NO_COUNTS, "0")
NO_PATHS = ("", " ", "null", "$NOT_SET/x", "${NOT_SET}", "~nobody_here/x", "s3://bucket/x", "https://host/x")
NO_SWITCHES = ("", "2", "maybe", "null")

# Command: what stands before, and the flags with values that they cannot have ("" is the first bare argument).
WRONG = {
    "generate.py": (
        [],
        {
            "": NO_PATHS,
            "--max_tokens": NO_POSITIVES,
            "--samples": (*NO_POSITIVES, "1e9"),
            "--top_k": NO_COUNTS,
            "--temperature": (*NO_NUMBERS, "-1", "1e9"),
            "--seed": (*NO_COUNTS, "18446744073709551616"),
            "--prompt": ("\udce9",),
        },
    ),
    "evaluate.py": (
        ["nowhere"],
        {
            "": NO_PATHS,
            "--tokens_per_batch": (*NO_POSITIVES, "-5"),
            "--n_windows": NO_POSITIVES,
            "--hellaswag_items": (*NO_COUNTS, "10043"),
            "--document_mask": NO_SWITCHES[:-1],
            "--seq_len": NO_POSITIVES,
            "--limit": NO_POSITIVES,
            "--include_path": NO_PATHS,
            "--output_path": NO_PATHS,
            "--dtype": ("", "float8", "null"),
            "--device": ("", "meta", "cuda:99", "tpu", "cpu:x"),
            "--data": ("", " ", "null", "$NOT_SET/x"),
        },
    ),
    "inspect_data.py": (
        ["nowhere"],
        {
            "": ("", " ", "null", "$NOT_SET/x", "nowhere"),
            "--documents": NO_COUNTS,
            "--sample": NO_POSITIVES,
            "--seed": NO_COUNTS,
            "--picture": (*NO_PATHS, "no_folder/x.png"),
            "--json": (*NO_PATHS, "no_folder/x.json"),
            "--config": (*NO_PATHS, "nowhere.yaml"),
        },
    ),
    "train_tokenizer.py": (
        ["nowhere.txt", "--out=t"],
        {
            "": (*NO_PATHS, "nowhere.txt", "*.txt"),
            "--out": NO_PATHS,
            "--vocab_size": (*NO_POSITIVES, "256", "1e9"),
            "--sample_bytes": NO_POSITIVES,
            "--seed": (*NO_COUNTS, "18446744073709551616"),
            "--overwrite": NO_SWITCHES,
            "--encoding": ("", "klingon"),
            "--separator": ("",),
            "--text_field": ("",),
            "--dataset": (*NO_PATHS, "x/y"),
            "--config": ("nowhere.yaml",),
        },
    ),
    "report.py": (
        [],
        {
            "": (*NO_PATHS, "nowhere"),
            "--out": NO_PATHS,
            "--price": (*NO_NUMBERS, "0", "-1"),
            "--every": (*NO_POSITIVES, "86401"),
            "--diff": ("x",),
            "--watch": ("x",),
        },
    ),
    "doctor.py": ([], {"--run_dir": NO_PATHS, "--seconds": (*NO_NUMBERS, "-1", "1e9")}),
    "plan.py": (
        [],
        {
            "": ("nowhere.yaml", "no folder/x.yaml"),
            "--gpus": ("", "8x", "V100", "0xH100", "8xTPU"),
            "--price": (*NO_NUMBERS, "-1"),
            "--train.steps": NO_POSITIVES,
            "--nothing": ("1",),
        },
    ),
    "publish.py": (["nowhere"], {"": (*NO_PATHS, "nowhere"), "--check": ("x",)}),
    "sweep.py": (
        ["nowhere.yaml"],
        {
            "": (*NO_PATHS, "nowhere.yaml"),
            "--grid": ("", "x", "=1", "optim.lr", "optim.lr=", "train.seed=1,2", "train.run_dir=x"),
            "--set": ("", "x", "=1", "optim.lr", "train.seed=1", "train.run_dir=x"),
            "--seeds": (*(text for text in NO_POSITIVES if text != "[1]"), "1,1", "1,x", "1,0", "1337"),
            "--out": NO_PATHS,
            "--jobs": NO_POSITIVES,
            "--ab": ("x",),
            "--again": ("x",),
            "--only_show": ("x",),
        },
    ),
    "convert.py": (
        ["nowhere.pt", "out"],
        {
            "": (*NO_PATHS, "nowhere.pt"),
            "--n_head": NO_POSITIVES,
            "--vocab_size": NO_POSITIVES,
            "--dtype": ("", "float8", "null"),
            "--to": ("", "gguf"),
            "--activation": ("", "relu"),
            "--overwrite": ("x",),
        },
    ),
    "benchmark.py": (
        [],
        {
            "--rounds": NO_POSITIVES,
            "--seconds": (*NO_NUMBERS, "0", "-1", "1e9"),
            "--micro_batch_size": NO_POSITIVES,
            "--hellaswag_items": (*NO_POSITIVES, "10043"),
            "--out": NO_PATHS,
            "--shape": ("", "1B"),
            "--what": ("", "all"),
            "--device": ("meta", "tpu", ""),
        },
    ),
    "benchmark_data.py": (
        [],
        {"": ("", "null", "$NOT_SET/x"), "--rounds": NO_POSITIVES, "--documents": NO_POSITIVES, "--what": ("", "x")},
    ),
}
CASES = [
    (name, [value, *bare[1:]] if flag == "" else [*bare, f"{flag}={value}"], flag)
    for name, (bare, flags) in WRONG.items()
    for flag, values in flags.items()
    for value in values
]


def run(monkeypatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("script", WRONG)
def test_wrong_arguments_are_one_line_and_make_nothing(script, monkeypatch, capsys, tmp_path):
    for _, arguments, flag in (case for case in CASES if case[0] == script):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, script, *arguments)
        said = capsys.readouterr()
        what = f"{[argument[:50] for argument in arguments]}: {said}"
        assert stop.value.code == 2, what
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and len(said.err) < 700, what
        assert flag.lstrip("-") in said.err or arguments[-1].partition("=")[2] in said.err, what
        assert not any(tmp_path.iterdir()), what


def test_there_are_many_of_them():
    assert len(CASES) > 300


def test_unknown_and_missing_arguments(monkeypatch, capsys):
    for script in WRONG:
        for arguments in (["x", "y", "z", "--no_such_thing"], ["--no_such_thing=1"]):
            with pytest.raises(SystemExit) as stop:
                run(monkeypatch, script, *arguments)
            said = capsys.readouterr().err
            assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: "), said


def test_help_says_what_may_stand_there(monkeypatch, capsys):
    for script in WRONG:
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, script, "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert stop.value.code == 0
        assert "(required" not in text and "(default: None)" not in text
    run_help = {"evaluate.py": "[>= 1 and <= 1000000000] (default: 16384)", "inspect_data.py": "(default: 3)"}
    for script, words in run_help.items():
        with pytest.raises(SystemExit):
            run(monkeypatch, script, "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert text.count(words) == 1


@pytest.fixture
def a_run(tmp_path) -> Path:
    folder = tmp_path / "a run"
    model = GPTForCausalLM(GPTConfig(n_layer=1, n_head=1, n_embd=8, n_positions=64))

    def write(final: Path) -> None:
        model.save_pretrained(final)
        load_tokenizer().save_pretrained(final)

    write_folder(folder / "final", write)
    return folder


def test_a_runs_folder_is_taken_for_its_model(a_run, monkeypatch, capsys):
    monkeypatch.setenv("RUNS", str(a_run.parent))
    run(monkeypatch, "generate.py", "$RUNS/a run", "--samples=1", "--max_tokens=2", "--prompt=Hi")
    assert "> Hi" in capsys.readouterr().out
    run(monkeypatch, "evaluate.py", "$RUNS/a run", "--hellaswag_items=0")
    assert "GPT-2 124M" in capsys.readouterr().out


def test_an_ascii_console_takes_any_prompt(a_run, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    run(monkeypatch, "generate.py", str(a_run), "-n1", "-m1", "-p", "caf\u00e9")
    assert b"> caf\\xe9" in console.buffer.getvalue()


@pytest.mark.parametrize(
    "row",
    [
        "null",
        "[]",
        "5",
        '{"tokens_seen": null, "train_loss": 1}',
        f'{{"tokens_seen": {LONG[:400]}}}',
        '{"tokens_seen": 5, "train_loss": "x"}',
        '{"tokens_seen": 5, "lr": [1]}',
    ],
)
def test_rows_that_no_run_writes_are_refused(row, tmp_path, monkeypatch, capsys):
    run_dir = tmp_path / "r"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "tokens_seen": 4, "train_loss": 2.0}\n' + row + "\n")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "report.py", "r")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "metrics.jsonl has a" in said
    assert not (run_dir / "curves.png").exists()
