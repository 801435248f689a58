"""Reference curves: what is read from them, and which run has one."""

import dataclasses
import json
import math

import pytest

from gpt2_hf.config import RunConfig
from gpt2_hf.knobs import ConfigError
from gpt2_hf.reference import CURVES, Curve, find_curve, read_run


def config(**sections) -> RunConfig:
    plain = RunConfig()
    changed = {name: dataclasses.replace(getattr(plain, name), **values) for name, values in sections.items()}
    return dataclasses.replace(plain, **changed)


def test_between_points_the_logarithm_of_the_loss_is_straight_over_that_of_the_step():
    curve = Curve("a power law", {}, {"val_loss": [(step, 8 * step**-0.25) for step in (16.0, 256.0, 4096.0)]})
    for step in (16, 50, 250.5, 256, 4000, 4096):
        assert curve.at("val_loss", step) == pytest.approx(8 * step**-0.25)
    assert curve.at("val_loss", 15) is None and curve.at("val_loss", 4097) is None
    assert curve.at("train_loss", 50) is None


def test_the_band_is_wider_where_the_curve_is_steep():
    curve = Curve("c", {}, {"val_loss": [(100.0, 6.0), (200.0, 5.0), (400.0, 5.0)]}, {"val_loss": 0.1})
    assert curve.band("val_loss", 300) == pytest.approx(0.1) == curve.band("val_loss", 400)
    assert curve.band("val_loss", 150) == pytest.approx(0.1 + curve.at("val_loss", 150) - curve.at("val_loss", 157.5))


def test_left_out_points_of_the_known_curve_are_found_again_as_well_as_is_claimed():
    content = json.loads((CURVES / "gpt2_124m_fineweb.json").read_text())
    points = [(float(x), float(y)) for x, y in content["points"]["val_loss"]]
    errors = []
    for index in range(1, len(points) - 1):
        (left, out, right) = points[index - 1 : index + 2]
        errors.append(Curve("c", {}, {"val_loss": [left, right]}).at("val_loss", out[0]) - out[1])
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) == pytest.approx(0.055, abs=0.0005)


@pytest.mark.parametrize(
    ("path", "level"),
    [
        ("data/fineweb_edu_10bt", -0.1326),
        ("data/edu_fineweb10B", -0.1326),
        ("x/fineweb10B", 0),
        ("FineWeb-Edu", -0.1326),
    ],
)
def test_the_lecture_s_recipe_has_a_curve_at_the_level_of_its_text(path, level):
    curve, why_not = find_curve(config(data={"path": path}))
    assert why_not == "" and curve.at("val_loss", 500) == pytest.approx(5.374 + level)
    assert ("FineWeb-Edu" in curve.remark) == (level != 0)
    plain, _ = find_curve(config(data={"path": "fineweb"}))
    assert (curve.band("val_loss", 9000) > plain.band("val_loss", 9000)) == (level != 0)


def test_public_runs_on_another_text_are_told_apart():
    """Validation losses of the lecture's program on FineWeb-Edu (build-nanogpt, pull request 30): after and before a
    repair of how processes exchange accumulated gradients; last that of a run published as a failure."""
    healthy = {250: 6.1631, 1000: 4.1533, 1250: 3.9518}
    broken = {250: 6.4300, 1000: 4.8797, 1250: 4.5877, 2500: 4.1250, 19_073: 3.397}
    curve, _ = find_curve(config())
    gaps = {step: loss - curve.at("val_loss", step) for step, loss in healthy.items()}
    assert all(abs(gap) < curve.band("val_loss", step) for step, gap in gaps.items())
    assert all(loss - curve.at("val_loss", step) > 2 * curve.band("val_loss", step) for step, loss in broken.items())


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"n_layer": 11}},
        {"model": {"dropout": 0.1}},
        {"model": {"init_from": "openai-community/gpt2"}},
        {"data": {"path": "data/openwebtext"}},
        {"data": {"path": "data/fineweb", "seq_len": 512}},
        {"data": {"path": "data/fineweb", "document_mask": True}},
    ],
)
def test_what_cannot_be_compared_has_none(sections):
    curve, why_not = find_curve(config(**sections))
    assert curve is None and why_not


def test_none_is_asked_for_and_none_is_spoken_of():
    assert find_curve(config(eval={"reference": "none"})) == (None, "")


@pytest.fixture
def earlier(tmp_path):
    run = tmp_path / "earlier"
    run.mkdir()
    rows = [{"step": s, "tokens_seen": 10 * s, "train_loss": 5 - s / 100, "grad_norm": 2.0} for s in range(0, 201, 5)]
    rows += [{"step": 100, "val_loss": 4.5}, {"step": 200, "val_loss": float("nan")}, "no row"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.yaml").write_text(RunConfig().to_yaml())
    return run


def test_an_earlier_run_is_a_reference(earlier):
    for path in (earlier, earlier / "metrics.jsonl"):
        curve = read_run(path)
        assert curve.points["val_loss"] == [(100, 4.5)]
        # The mean over 50 steps around 100; an independent sum.
        middle = [s for s in range(75, 126, 5)]
        assert curve.at("train_loss", 100) == pytest.approx(sum(5 - s / 100 for s in middle) / len(middle), abs=0.03)
        assert curve.at("grad_norm", 100) == pytest.approx(2)
        assert curve.recipe["optim.lr"] == RunConfig().optim.lr
    assert find_curve(config(eval={"reference": str(earlier)}))[0] == read_run(earlier)


def test_what_is_no_reference_is_one_line(earlier, tmp_path):
    def refused(**sections) -> str:
        with pytest.raises(ConfigError) as caught:
            find_curve(config(**sections))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no losses" in refused(eval={"reference": str(tmp_path / "nowhere")})
    assert "n_layer (12, here 3)" in refused(eval={"reference": str(earlier)}, model={"n_layer": 3})
    assert "this run itself" in refused(eval={"reference": str(earlier)}, train={"run_dir": str(earlier)})
    (earlier / "config.yaml").write_bytes(b"\xff")
    assert "cannot be read" in refused(eval={"reference": str(earlier)})
    (earlier / "config.yaml").unlink()
    assert read_run(earlier).recipe == {"train.global_batch_tokens": 10}
    assert find_curve(config(eval={"reference": str(earlier)}, model={"n_layer": 3}))[0] is not None
