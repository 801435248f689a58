"""Whether two models differ by more than chance, told from the same items scored by both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Of two models on the same items, the first minus the second.

    Attributes:
        mean: over items.
        stderr: standard error of that mean; nan for a single item.
        p: how likely as large a difference is if the models do not differ; None without scipy.
    """

    mean: float
    stderr: float
    p: float | None


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values, (N,), from their own spread; nan for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compare what two models got for each of the same items, (N,) each.

    Right or wrong answers (bool) are compared by McNemar's exact test, which looks at the items where one is right and
    the other wrong; anything else, such as the losses of windows, by Student's test of the differences.
    """
    differences = first.astype(float) - second.astype(float)
    return Difference(float(differences.mean()), standard_error(differences), _p_value(first, second, differences))


def _p_value(first: np.ndarray, second: np.ndarray, differences: np.ndarray) -> float | None:
    try:
        from scipy import stats
    except ImportError:
        return None
    if not differences.any():
        return 1.0
    if first.dtype == bool and second.dtype == bool:
        only_first = int((first & ~second).sum())
        return float(stats.binomtest(only_first, int((first != second).sum())).pvalue)
    return float(stats.ttest_rel(first, second).pvalue) if len(first) > 1 else math.nan
