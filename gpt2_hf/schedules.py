"""What changes over the steps of a run, as functions of the step alone.

The learning rate's shape between the warm-up and the end of the run is a function a schedule. Each takes
(step, first, last, decay_ratio) and gives the height above the floor, from 1 down to 0, for first <= step < last:
``first`` is where the warm-up ends, ``last`` the number of steps of the run.
"""

import math
from collections.abc import Sequence


def cosine(step: int, first: int, last: int, decay_ratio: float) -> float:
    """Half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * (step - first) / (last - first)))


def trapezoid(step: int, first: int, last: int, decay_ratio: float) -> float:
    """A plateau, then linear down over the last ``decay_ratio`` of the steps."""
    decay_steps = max(1, round(decay_ratio * last))
    return min(1.0, (last - step) / decay_steps)


def linear(step: int, first: int, last: int, decay_ratio: float) -> float:
    """Straight down."""
    return (last - step) / (last - first)


SCHEDULES = {"cosine": cosine, "trapezoid": trapezoid, "linear": linear}


def in_stages(step: int, first: Sequence[int], steps: int, then: int) -> int:
    """The value at ``step``, from 0: each of ``first`` for so many ``steps``, and ``then`` after them."""
    return first[step // steps] if step < len(first) * steps else then


def sum_before(step: int, first: Sequence[int], steps: int, then: int) -> int:
    """The sum of the values of ``in_stages`` at all steps before ``step``."""
    past = min(step, len(first) * steps)  # of the stages
    ended, rest = divmod(past, steps) if past else (0, 0)
    return steps * sum(first[:ended]) + (rest * first[ended] if rest else 0) + (step - past) * then
