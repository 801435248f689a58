"""Final losses by seed -> whether a candidate is better than the baseline. Pure functions."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..evaluation.compare import Difference, paired_difference

ALPHA = 0.05
FEWEST = 3
MOST_SEEDS = 1000  # beyond which nobody asks

Word = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Comparison:
    """Of a candidate with the baseline, over the seeds that both have finished.

    Attributes:
        difference: candidate minus baseline, in nats: below 0 the candidate is better.
        n: seeds.
        p_adjusted: by Holm's method for all comparisons made beside this one; nan for a single seed.
        word: by the rule of `judge`.
        seeds_needed: of `seeds_needed`.
    """

    difference: Difference
    n: int
    p_adjusted: float
    word: Word
    seeds_needed: int | None


def judge(mean: float, n: int, p: float) -> Word:
    """The rule of significance.

    Both recipes are trained once with each seed, which sets the initial weights and the order of the data. Of each seed
    the difference of the two final losses is taken: what a seed does to both cancels. Their mean over n seeds has the
    standard error s / sqrt(n), s being the standard deviation of the differences, and Student's t-test says how likely
    (p) so large a mean would be if the recipes did not differ; where several candidates are compared with one baseline,
    p is Holm's, so that the chance of any false verdict among them is still p. A candidate is better, or worse, when
    p < 0.05 and n >= 3. Anything else is no proof that two recipes are equal: only that no difference was shown.

    Args:
        mean: of the candidate's losses minus the baseline's.
        p: two-sided, adjusted; nan when it is not known.
    """
    if n < FEWEST or not p < ALPHA:
        return "no difference shown"
    return "better" if mean < 0 else "worse"


def compare(baseline: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> list[Comparison | None]:
    """Each candidate's final losses by seed, all finite, against the baseline's; None where they share no seed.

    Raises:
        ImportError: without scipy.
    """
    need_scipy()
    differences: list[tuple[Difference, np.ndarray] | None] = []
    for losses in others:
        seeds = [seed for seed in baseline if seed in losses]
        ours, theirs = (np.array([found[seed] for seed in seeds]) for found in (losses, baseline))
        differences.append((paired_difference(ours, theirs), ours - theirs) if seeds else None)
    p_values = [_p(found[0]) if found else math.nan for found in differences]
    adjusted = holm(p_values)
    n_tests = sum(not math.isnan(p) for p in p_values)
    return [
        None
        if found is None
        else Comparison(
            found[0],
            len(found[1]),
            p,
            judge(found[0].mean, len(found[1]), p),
            seeds_needed(found[1], max(1, n_tests)),
        )
        for found, p in zip(differences, adjusted, strict=True)
    ]


def need_scipy() -> None:
    """Raises ImportError where scipy is missing."""
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("comparing runs needs scipy: pip install scipy")


def _p(difference: Difference) -> float:
    return math.nan if difference.p is None or math.isnan(difference.stderr) else difference.p


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of the p of several tests, in their order; nan stays, and counts for no test."""
    ranked = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def seeds_needed(differences: np.ndarray, n_tests: int = 1) -> int | None:
    """With how many seeds the mean and spread of these differences, (N,), would pass the rule.

    That is the least n with |mean| / (s / sqrt(n)) above Student's quantile for 0.05 / n_tests, the strictest that
    Holm's method asks for. A new sweep of that size finds a difference of just this size about every second time.

    Returns:
        None: one seed shows no spread, or over 1000 are needed.
    """
    from scipy import stats

    if len(differences) < 2:
        return None
    mean, spread = abs(differences.mean()), differences.std(ddof=1)
    n = np.arange(FEWEST, MOST_SEEDS + 1)
    enough = mean * np.sqrt(n) > spread * stats.t.ppf(1 - ALPHA / n_tests / 2, n - 1)
    return int(n[enough.argmax()]) if enough.any() else None


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mean loss and its standard deviation over runs, (N,) each, at the first run's tokens.

    Args:
        curves: tokens and losses of each run, at least one.
    """
    tokens = curves[0][0]
    losses = np.stack([np.interp(tokens, *curve) for curve in curves])
    return tokens, losses.mean(0), losses.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(tokens))


def tokens_to(loss: float, tokens: np.ndarray, losses: np.ndarray) -> float | None:
    """Where a curve, (N,) each, first comes down to ``loss``, linear between its points; None: nowhere."""
    below = losses <= loss
    if not below.any():
        return None
    i = int(below.argmax())
    if i == 0:
        return float(tokens[0])
    share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))
