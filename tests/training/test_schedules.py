"""The learning rate of each step: known knots, and what every schedule keeps to."""

import dataclasses

import pytest

from gpt2_hf.config import OptimSection
from gpt2_hf.schedules import SCHEDULES
from gpt2_hf.training.optim import lr_at


def test_lectures_schedule_at_its_knots():
    config = OptimSection()
    at = [config.lr * lr_at(step, 19_073, config) for step in (0, 714, 715, 9_894, 19_073, 30_000)]
    expected = [6e-4 / 715, 6e-4, 6e-4, 6e-5 + (6e-4 - 6e-5) / 2, 6e-5, 6e-5]
    assert at == pytest.approx(expected, rel=1e-3)


def test_trapezoid_at_its_knots():
    config = OptimSection(schedule="trapezoid", warmup_steps=10, decay_ratio=0.2, min_lr_ratio=0.0)
    assert [lr_at(step, 100, config) for step in (0, 9, 10, 79, 80, 90, 100, 200)] == pytest.approx(
        [0.1, 1, 1, 1, 1, 0.5, 0, 0]
    )


def test_linear_at_its_knots():
    config = OptimSection(schedule="linear", warmup_steps=10, min_lr_ratio=0.0)
    assert [lr_at(step, 100, config) for step in (0, 9, 10, 55, 99, 100, 200)] == pytest.approx(
        [0.1, 1, 1, 0.5, 1 / 90, 0, 0]
    )
    to_a_floor = dataclasses.replace(config, min_lr_ratio=0.2)
    assert [lr_at(step, 100, to_a_floor) for step in (10, 55, 100, 200)] == pytest.approx([1, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_rise_then_never_rise_again(schedule):
    config = OptimSection(schedule=schedule, warmup_steps=7)
    rates = [lr_at(step, 50, config) for step in range(60)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:7] == sorted(rates[:7]) and rates[6:] == sorted(rates[6:], reverse=True)
    assert lr_at(0, 50, dataclasses.replace(config, warmup_steps=0)) == 1
