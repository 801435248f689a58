import base64
import json
import re
import runpy
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from gpt2_hf.files import lock_folder
from gpt2_hf.reporting import watch as watching
from gpt2_hf.reporting.measured import ReportError, read_run

pytest.importorskip("bokeh", reason="the extra 'report' is not installed")

from gpt2_hf.reporting.page import write_page
from gpt2_hf.reporting.plots import build_plots, thin

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>console.error('run')</script>"


@pytest.fixture
def make_run(tmp_path):
    """A function that writes the folder of a run of 40 steps, with all that a run records."""

    def make(name="run", n_steps=40, lr=1e-3, samples=("Once upon a time",), **more):
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for step in range(1, n_steps + 1):
            row = {"step": step, "tokens_seen": 1000 * step, "train_loss": 4 + 4 / step, "lr": lr, "grad_norm": 1.0}
            row |= {"tokens_per_sec": 500.0, "mfu": 0.4, "peak_memory": 1.5}
            if step % 10 == 0:
                row |= {"val_loss": 4.5, "val_bpb": 1.4, "samples": [f"{text} {step}" for text in samples]}
                row |= {"hellaswag_lecture_acc": 0.28, "hellaswag_acc_norm": 0.29, "hellaswag_items": 500}
            rows.append(row)
        config = {
            "data": {"path": "data/mine"},
            "optim": {"lr": lr},
            "train": {"steps": n_steps, "run_dir": str(folder)},
        }
        environment = {"torch": "2.13.0", "processes": 1, "device": "a GPU", "data_fingerprint": "abc123"}
        start = {"time": "2026-01-02T03:04:05+0000", "step": 0, "command": ["pretrain.py"], **environment}
        starts = [{**start, "config": config}, {**start, "step": 20, "processes": 2, "config": config}]
        write_rows(folder / "metrics.jsonl", [*rows, *more.get("rows", ())])
        write_rows(folder / "starts.jsonl", starts)
        write_rows(folder / "evaluations.jsonl", more.get("evaluations", ()))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "environment.json").write_text(json.dumps(environment))
        return folder

    return make


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """The tags of a page, and its text outside of scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


def sources_of(plot):
    """Name and columns of each curve of a plot that tells its values."""
    return {line.name: line.data_source.data for line in plot.figure.renderers if line.name}


def test_the_page_has_a_section_for_all_that_a_run_recorded(make_run):
    evaluation = {
        "model": "openai-community/gpt2",
        "of_run": False,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "evaluate.py x",
        "data": {"path": "data/mine", "windows": 7, "seq_len": 64},
        "figures": {"val_loss": 3.25, "val_loss_stderr": 0.01},
        "harness": {"piqa": {"acc": 0.6, "acc_stderr": 0.02, "n": 100}},
    }
    rewound = {"step": 30, "tokens_seen": 30_000, "rewound_from": 36}
    folder = make_run(evaluations=[evaluation], rows=[rewound])
    page = Page(write_page([folder], folder / "report.html", price=2.0))
    for title in ("Loss", "HellaSwag", "Learning rate", "Gradient norm", "Throughput", "MFU", "Memory"):
        assert title in page.text
    for text in (
        "Once upon a time 40",
        "Once upon a time 10",
        "processes: 1 -> 2",
        "went back to this step from step 36",
    ):
        assert text in page.text
    for text in (
        "3.2500\xa0±\xa00.0100",
        "data/mine: 7 windows of 64",
        "acc 0.6000\xa0±\xa00.0200",
        "fingerprint abc123",
    ):
        assert text in page.text
    axes = [attributes["data-axis"] for _, attributes in page.tags if "data-axis" in attributes]
    assert axes == ["tokens", "steps", "hours", "dollars"]
    assert "What differs" not in page.text


def test_nothing_comes_from_elsewhere(make_run):
    folder = make_run()
    path = write_page([folder], folder / "report.html")
    assert path.stat().st_size < 3_000_000
    for tag, attributes in Page(path).tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:,").startswith("data:"), tag
        assert attributes.get("http-equiv") in (None, "Content-Security-Policy")


def test_what_users_wrote_stays_text(make_run):
    evaluations = [
        {"model": EVIL, "of_run": False, "figures": {"val_loss": 3.0}, "command": "x https://me:secret@host/"}
    ]
    folder = make_run("<img src=x>", samples=("<script>alert(1)</script> & more",), evaluations=evaluations)
    path = write_page([folder, make_run("b")], folder / "report.html")
    page = Page(path)
    assert "<script>alert(1)</script> & more 40" in page.text and EVIL in page.text and "<img src=x>" in page.text
    assert "img" not in [tag for tag, _ in page.tags]
    assert "<script>alert" not in path.read_text() and "<script>console.error" not in path.read_text()
    assert "secret" not in path.read_text()


def test_curves_hold_their_values_and_where_they_lie(make_run):
    loss, *_ = build_plots([read_run(make_run())], price=3.6)
    curve = sources_of(loss)["training"]
    assert curve["value"].tolist() == [4 + 4 / step for step in range(1, 41)]
    assert curve["tokens"].tolist() == [1000 * step for step in range(1, 41)]
    assert curve["steps"].tolist() == list(range(1, 41))
    assert curve["hours"][-1] == pytest.approx(40_000 / 500 / 3600)
    assert curve["dollars"][-1] == pytest.approx(0.001 * (20_000 / 500 + 2 * 20_000 / 500))  # two GPUs from step 20 on
    assert loss.figure.y_range.end > 6 and loss.figure.y_range.start < 4.1


def test_several_runs_have_a_colour_each_and_what_differs_stands_first(make_run):
    folders = [make_run("a"), make_run("b", lr=2e-3), make_run("c", n_steps=20)]
    plots = build_plots([read_run(folder) for folder in folders])
    tags = [line.glyph.tags for line in plots[0].figure.renderers if line.name]
    assert [number for _, number in tags] == [0, 0, 1, 1, 2, 2]
    assert len({color for color, _ in tags}) == 3
    assert "b: validation" in sources_of(plots[0])
    page = Page(write_page(folders, folders[0] / "report.html"))
    text = page.text[page.text.index("What differs") : page.text.index("Samples")]
    assert "optim.lr" in text and "train.steps" in text and "run_dir" not in text and "torch" not in text
    assert [attributes["data-run"] for _, attributes in page.tags if "data-run" in attributes] == ["0", "1", "2"]


def test_verdicts_are_told_where_they_change_and_last(make_run):
    rows = [
        {
            "step": s,
            "tokens_seen": 1000 * s,
            "val_loss": 5.0,
            "reference_loss": 4.5,
            "reference_band": 0.1,
            "off_track": off,
        }
        for s, off in ((41, 0), (42, 0), (43, 1), (44, 1), (45, 1))
    ]
    folder = make_run(rows=rows)
    text = Page(write_page([folder], folder / "report.html")).text
    told = re.findall(r"step (4\d)(on track|off track)validation 5.0000(4.5000\xa0±\xa00.100)", text)
    assert [(step, verdict) for step, verdict, _ in told] == [
        ("41", "on track"),
        ("43", "off track"),
        ("45", "off track"),
    ]
    (loss, *_) = build_plots([read_run(folder)])
    (area,) = [drawn.data_source.data for drawn in loss.figure.renderers if "low" in drawn.data_source.data]
    assert area["low"] == pytest.approx([4.4] * 5) and area["high"] == pytest.approx([4.6] * 5)


def test_a_figure_that_is_missing_or_not_finite_is_no_obstacle(make_run, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    rows = [{"step": s, "tokens_seen": 10 * s, "train_loss": 5.0, "val_loss": float("nan")} for s in range(3)]
    write_rows(folder / "metrics.jsonl", rows)
    page = Page(write_page([folder], folder / "report.html"))
    assert "values that are not finite are left out" in page.text
    assert "hours" not in [attributes.get("data-axis") for _, attributes in page.tags]
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="no rows in"):
        write_page([folder], folder / "report.html")


def test_thinned_curves_keep_their_peaks_and_the_page_its_size(make_run):
    values = np.sin(np.arange(50_000) / 1000)
    values[[123, 30_001]] = 9, -9
    kept = thin(values, 500)
    assert len(kept) <= 500 and {0, 123, 30_001, 49_999} <= set(kept.tolist())
    assert thin(values, 50_000).tolist() == list(range(50_000))
    long_run = make_run(n_steps=20_000)
    assert write_page([long_run] * 6, long_run / "report.html", price=1.0).stat().st_size < 3_000_000


def test_the_page_follows_a_run_until_it_ends(make_run, tmp_path, monkeypatch, capsys):
    folder, out = make_run(), tmp_path / "page.html"
    assert not watching.is_running(folder)
    held = [lock_folder(folder)]
    written = []

    def sleep(seconds):
        written.append(out.read_text())
        held.pop().close()  # the run ends in the meantime

    monkeypatch.setattr(time, "sleep", sleep)
    assert watching.is_running(folder)
    watching.watch([folder], out, None, 7)
    assert len(written) == 1 and '"refresh_s": 7' in written[0]
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{out} is written every 7 s while training goes on; Ctrl-C ends that"
    assert last == f"nothing trains in {folder} (any more)"


def test_ctrl_c_ends_watching_with_a_line(make_run, tmp_path, monkeypatch, capsys):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()  # nothing was measured yet

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    with lock_folder(folder), pytest.raises(KeyboardInterrupt, match=r"no longer watching .*run; .*page\.html stays"):
        watching.watch([folder], tmp_path / "page.html", None, 7)
    assert capsys.readouterr().out.startswith(f"nothing was measured in {folder} yet")


@pytest.mark.parametrize(
    ("missing", "written"),
    [("bokeh.models", "curves.png"), ("matplotlib.figure", "report.html")],
    ids=["page", "picture"],
)
def test_without_a_package_the_other_one_is_written(make_run, monkeypatch, capsys, missing, written):
    folder = make_run()
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    told = capsys.readouterr()
    assert told.out.split() == [str(folder / written)]
    assert re.fullmatch(r"error: .* needs \w+: pip install .*\n", told.err)


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["--pdf"], ["run/curves.pdf"]),
        (["-o", "x.svg", "--png"], ["x.svg", "run/curves.png"]),
        (["-o", "new/x.html"], ["new/x.html"]),
    ],
    ids=["pdf", "svg and png", "page"],
)
def test_the_script_writes_what_it_is_asked_for(make_run, tmp_path, monkeypatch, capsys, arguments, written):
    pytest.importorskip("matplotlib", reason="the extra report has it")
    make_run()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "run", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.split() == written
    starts = {".pdf": b"%PDF", ".svg": b"<?xml", ".png": b"\x89PNG", ".html": b"<!doctype html>"}
    for name in written:
        assert Path(name).read_bytes().startswith(starts[Path(name).suffix])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--diff"], "--diff compares two runs, and 1 is given"),
        (["--watch", "-o", "x.png"], "--watch writes a page, and x.png is none"),
        (["--price", "0"], "price is 0.0, and must be > 0"),
        (["-o", "x.docx"], "x.docx ends in .docx"),
        (["nowhere"], "no rows in nowhere/metrics.jsonl"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(make_run, tmp_path, monkeypatch, capsys, arguments, line):
    make_run()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "run", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_page_without_an_error_or_a_request(make_run, tmp_path):
    """The page's policy makes a request an error on the console."""
    evaluations = [{"model": EVIL, "of_run": False, "figures": {"val_loss": 3.0}}]
    folders = [make_run("<img src=x onerror=console.error('name')>", evaluations=evaluations), make_run("b")]
    path = write_page(folders, tmp_path / "report.html", price=2.0)
    told = """
    const one = Bokeh.documents[0].roots()[0];
    const tell = () => console.log("seen:" + btoa(JSON.stringify({
      range: [one.x_range.start, one.x_range.end], label: one.below[0].axis_label,
      field: one.renderers[0].glyph.x.field,
      shown: one.renderers.map((line) => line.visible), wide: document.documentElement.scrollWidth - innerWidth,
    })));
    if (sessionStorage.getItem("second")) {
      tell();
      fetch("https://example.org/").catch(() => 0);
    } else {
      sessionStorage.setItem("second", "yes");
      document.querySelector("[data-axis=hours]").click();
      document.querySelector("[data-run='1']").click();
      tell();
      one.x_range.setv({ start: 0.005, end: 0.01 });
      location.reload();
    }
    """
    html = path.read_text().replace("</body>", f"<script>setTimeout(() => {{ {told} }}, 1000)</script></body>")
    path.write_text(html)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    command += ["--virtual-time-budget=6000", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    result = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    lines = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    texts = [found[1] for line in lines if (found := re.search(r"seen:([\w+/=]+)", line))]
    before, after = (json.loads(base64.b64decode(text)) for text in texts)
    assert before.pop("range")[1] == pytest.approx(1.015 * 40_000 / 500 / 3600)
    assert after.pop("range") == [0.005, 0.01]
    assert before == after  # the page was loaded anew in between
    assert after["label"] == "hours of training" and after["field"] == "hours" and after["wide"] <= 0
    assert set(after["shown"]) == {True, False}
    odd = [line for line in lines if "[bokeh" not in line and "seen:" not in line]
    assert len(odd) == 2 and all("example.org" in line for line in odd), odd  # refused: the one that this test made
