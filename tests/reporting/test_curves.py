import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_hf.reporting.curves import build_figure, plot_curves, plot_runs
from gpt2_hf.reporting.measured import ReportError, format_tokens, read_run, smooth

matplotlib = pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")

SCRIPT = Path(__file__).parents[2] / "scripts" / "report.py"


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run's folder; 40 steps, with HellaSwag on `items` items unless that is None."""

    def make(name="run", items=10_042, preset="gpt2", n_layer="null", path="data/fineweb_edu_10bt", tail="", rows=None):
        folder = tmp_path / name
        folder.mkdir()
        if rows is None:
            rows = []
            for step in range(40):
                seen = {"step": step, "tokens_seen": 1000 * step}
                rows.append({**seen, "train_loss": 4 + 4 * math.exp(-step / 5), "lr": 1e-3, "grad_norm": 1.0})
                if step % 10 == 0:
                    rows.append({**seen, "val_loss": 4.5})
                if step % 10 == 0 and items:
                    scores = {"hellaswag_lecture_acc": 0.28, "hellaswag_acc": 0.27, "hellaswag_acc_norm": 0.29}
                    rows.append({**seen, **scores, "hellaswag_items": items, "hellaswag_stderr": 0.02})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
        if preset:
            (folder / "config.yaml").write_text(
                f"model: {{preset: {preset}, n_layer: {n_layer}}}\ndata: {{path: {path}}}\n"
            )
        return folder

    return make


def panels_of(*folders):
    return by_name(build_figure([read_run(folder) for folder in folders]))


def by_name(figure):
    """Each panel's axes by the first words of its y label."""
    return {axis.get_ylabel().split(" (")[0].split("\n")[0]: axis for axis in figure.axes}


def marks_of(axis):
    return {text.get_text() for text in axis.texts}


def legend_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_panels_and_legends(make_run):
    figure = build_figure([read_run(make_run())])
    figure.draw_without_rendering()
    panels = by_name(figure)
    assert list(panels) == ["loss", "HellaSwag accuracy", "learning rate"]
    assert legend_of(panels["loss"]) == ["training (smoothed)", "validation"]
    assert legend_of(panels["HellaSwag accuracy"]) == ["the lecture's way", "lm-eval acc_norm"]
    assert panels["learning rate"].get_xlabel() == "tokens seen"
    assert [label.get_text() for label in panels["learning rate"].get_xticklabels()][-2:] == ["35K", "40K"]
    for name in ("loss", "HellaSwag accuracy"):  # legends stay off the curves
        axis = panels[name]
        assert axis.get_legend().get_window_extent().y0 >= axis.get_window_extent().y1 - 1
    assert panels["loss"].get_ylim()[0] < 3.2924  # a mark below the curve is in view


@pytest.mark.parametrize(
    ("options", "val_marks", "hellaswag_marks"),
    [
        ({}, {"GPT-2 124M\n3.2924 published"}, {"GPT-2 124M\n29.55% published", "GPT-3 124M\n33.70% published"}),
        (
            {"path": "/data/FineWeb-10BT"},
            {"GPT-2 124M\n3.4250 published"},
            {"GPT-2 124M\n29.55% published", "GPT-3 124M\n33.70% published"},
        ),
        ({"path": "data/shakespeare"}, set(), {"GPT-2 124M\n29.55% published", "GPT-3 124M\n33.70% published"}),
        ({"preset": "gpt2-medium"}, set(), {"GPT-2 355M\n37.52% published"}),
        (
            {"preset": "gpt2-medium", "path": "fineweb"},
            {"GPT-2 355M\n3.0831 published"},
            {"GPT-2 355M\n37.52% published"},
        ),
        ({"n_layer": 4}, set(), set()),
        ({"preset": None}, set(), set()),
    ],
    ids=["edu", "fineweb", "other data", "medium edu", "medium", "own shape", "no config"],
)
def test_marks_only_where_they_apply(make_run, options, val_marks, hellaswag_marks):
    panels = panels_of(make_run(**options))
    assert marks_of(panels["loss"]) == val_marks
    assert marks_of(panels["HellaSwag accuracy"]) == hellaswag_marks | {"chance\n25.00%"}


def test_a_measured_baseline_takes_the_place_of_the_published_one(make_run):
    folder = make_run()
    figures = {"val_loss": 3.31, "hellaswag_lecture_acc": 0.29, "hellaswag_items": 10_042}
    rows = [
        {"model": "openai-community/gpt2", "of_run": False, "figures": {"val_loss": 9.0}},
        {"model": "openai-community/gpt2", "of_run": False, "figures": figures},  # the newest counts
        {"model": "elsewhere", "of_run": False, "figures": {"val_loss": 2.0}, "data": {"path": "data/other"}},
        {"model": "final", "of_run": True, "figures": {"val_loss": 1.0}},
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    panels = panels_of(folder)
    assert marks_of(panels["loss"]) == {"openai-community/gpt2\n3.3100 measured"}
    assert marks_of(panels["HellaSwag accuracy"]) == {
        "chance\n25.00%",
        "openai-community/gpt2\n29.00% measured",
        "GPT-3 124M\n33.70% published",
    }


def test_the_reference_curve_is_drawn_where_rows_have_it(make_run):
    rows = [{"step": s, "tokens_seen": 10 * s, "train_loss": 5.0, "reference_loss": 4.9} for s in range(3)]
    assert "reference" in legend_of(panels_of(make_run(rows=rows))["loss"])


def test_hours_are_added_up_from_the_rates(make_run):
    """Twice 7,200 tokens: at 1 token a second on one GPU, then at 4 on two; then some whose rate is not known."""
    rates = [(1, 1.0), (2, 4.0), (3, None)]
    rows = [{"step": s, "tokens_seen": 7200 * s, "train_loss": 5.0, "tokens_per_sec": rate} for s, rate in rates]
    folder = make_run(rows=rows)
    starts = [{"step": 0, "processes": 1}, {"step": 1, "processes": 2}]
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    run, tokens = read_run(folder), np.array([0, 3600, 7200, 14_400, 21_600])
    assert run.hours(tokens).tolist() == pytest.approx([0, 1, 2, 2.5, 3])
    assert run.hours(tokens, of_devices=True).tolist() == pytest.approx([0, 1, 2, 3, 4])
    assert run.steps(tokens).tolist() == [1, 1, 1, 2, 3]
    without = read_run(make_run("slow", rows=[{"step": 1, "tokens_seen": 10, "train_loss": 5.0}]))
    assert np.isnan(without.hours(tokens)).all()


def test_a_subset_of_hellaswag_shows_its_error(make_run):
    axis = panels_of(make_run(items=500))["HellaSwag accuracy"]
    assert axis.get_ylabel().endswith("500 items")
    assert "± 1 standard error" in legend_of(axis)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    error = math.sqrt(0.28 * 0.72 / 500)
    assert band.min() == pytest.approx(0.28 - error) and band.max() == pytest.approx(0.28 + error)


def test_no_hellaswag_no_panel(make_run):
    assert list(panels_of(make_run(items=None))) == ["loss", "learning rate"]


def test_a_line_cut_off_by_a_kill_is_left_out(make_run):
    run = read_run(make_run(tail='{"step": 40, "tokens_seen": 40000, "train_lo'))
    assert run.series("train_loss")[0].max() == 39_000


def test_rows_made_twice_count_once(make_run):
    rows = [
        {"step": s, "tokens_seen": 10 * s, "train_loss": loss} for s, loss in ((0, 9.0), (1, 8.0), (2, 7.0), (1, 6))
    ]
    tokens, loss = read_run(make_run(rows=rows)).series("train_loss")
    assert tokens.tolist() == [0, 10, 20] and loss.tolist() == [9, 6, 7]


@pytest.mark.parametrize("tokens_seen", [0, 524_288])
def test_a_single_row(make_run, tokens_seen):
    folder = make_run(rows=[{"step": 0, "tokens_seen": tokens_seen, "train_loss": 11.0, "lr": 1e-5}])
    assert plot_curves(folder) == folder / "curves.png" and (folder / "curves.png").is_file()


def test_losses_that_are_not_finite_are_shown_as_such(make_run):
    values = [9.0, 8.0, math.nan, 7.0, math.inf]
    rows = [{"step": s, "tokens_seen": 10 * s, "train_loss": loss} for s, loss in enumerate(values)]
    axis = panels_of(make_run(rows=rows))["loss"]
    assert "not finite (2 rows)" in legend_of(axis)
    assert 9 < axis.get_ylim()[1] < 10
    all_nan = [{"step": 0, "tokens_seen": 0, "train_loss": math.nan}]
    assert plot_curves(make_run("nan", rows=all_nan)).is_file()


def test_several_runs_over_each_other(make_run, tmp_path):
    a, b = make_run("a"), make_run("b", path="data/fineweb")
    panels = panels_of(a, b)
    assert legend_of(panels["loss"]) == legend_of(panels["HellaSwag accuracy"]) == ["a", "b"]
    assert marks_of(panels["loss"]) == set()  # two corpora: neither's mark holds for both
    out = tmp_path / "pictures" / "both.png"
    assert plot_runs([a, b], out) == out and out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "start"),
    [("x.pdf", b"%PDF-"), ("x.SVG", b"<?xml")],
)
def test_the_ending_names_the_format(make_run, tmp_path, name, start):
    assert plot_runs([make_run()], tmp_path / name).read_bytes().startswith(start)


def test_an_ending_that_cannot_be_drawn_is_refused(make_run, tmp_path):
    folder = make_run()
    for name in ("x", "x.docx", "x.pgf", ".png"):
        with pytest.raises(ReportError, match=r"ends in .*: a picture's name ends in one of .*\.pdf, .*\.png, .*\.svg"):
            plot_runs([folder], tmp_path / "new" / name)
        assert not (tmp_path / "new").exists()


def test_nothing_to_draw_is_one_line(make_run, tmp_path):
    for folder in (tmp_path / "nowhere", make_run("empty", rows=[])):
        with pytest.raises(ReportError, match=r"no rows in .*metrics\.jsonl: give the folder of a run"):
            plot_curves(folder)
    with pytest.raises(ReportError, match="nothing to draw in grad"):
        plot_curves(make_run("grad", rows=[{"step": 0, "tokens_seen": 0, "grad_norm": 1.0}]))


def test_without_matplotlib_the_message_says_what_to_install(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        plot_curves(make_run())


def test_tokens_have_units():
    wanted = {0: "0", 500: "500", 1500: "1.5K", 524_288: "524.3K", 2.5e6: "2.5M", 1e10: "10B"}
    assert {n: format_tokens(n) for n in wanted} == wanted


def test_the_script_draws_the_newest_run(make_run, tmp_path, monkeypatch, capsys):
    folder = make_run()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("error: no run under runs/") and error.count("\n") == 1
    (tmp_path / "runs").mkdir()
    folder.rename(tmp_path / "runs" / "one")
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.split() == ["runs/one/report.html", "runs/one/curves.png"]
    assert (tmp_path / "runs/one/report.html").is_file() and (tmp_path / "runs/one/curves.png").is_file()


def test_a_smoothed_curve_is_a_mean_of_finite_neighbours():
    values = np.array([8.0, 6.0, np.nan, 4.0, np.inf, 2.0])
    assert smooth(values)[[0, 1, 3, 5]].tolist() == [8, 7, 4, 2] and np.isnan(smooth(values)[[2, 4]]).all()
    line = np.arange(1000.0)
    assert smooth(line)[:990] == pytest.approx(line[:990])  # windows are centred
    assert smooth(np.array([])).tolist() == []
