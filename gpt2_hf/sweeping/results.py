"""Outcomes of a sweep -> a table, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..evaluation.compare import standard_error
from ..reporting.measured import differences
from .candidates import Candidate, Sweep
from .compare import ALPHA, FEWEST, MOST_SEEDS, Comparison, compare, mean_curve, tokens_to
from .outcomes import Outcome

# Where candidates differ in one of these, their losses are of different text, or of another share of it.
OF_THE_TEXT = ("data.path", "data.seq_len", "data.document_mask", "eval.val_tokens")
OF_THE_LENGTH = ("train.steps", "train.global_batch_tokens", "train.batch_ramp", "train.batch_ramp_steps")
HEADERS = ("candidate", "seeds", "val_loss", "±", "difference", "±", "p", "p (Holm)", "verdict", "tokens")


@dataclass(frozen=True)
class Row:
    """A candidate's line of the table.

    Attributes:
        losses: final val_loss by seed, of finished runs.
        diverged: seeds of which training diverged.
        comparison: with the baseline; None for the baseline itself, where one of the two has diverged, or where no seed
            has finished in both.
        token_share: of the baseline's tokens, after which the mean curve has come down to the baseline's final loss;
            None where it does not, or either has diverged.
    """

    candidate: Candidate
    losses: dict[int, float]
    diverged: tuple[int, ...]
    comparison: Comparison | None
    token_share: float | None

    @property
    def mean(self) -> float:
        """Of the final losses: infinite if any run diverged, nan without any."""
        if self.diverged:
            return math.inf
        return float(np.mean(list(self.losses.values()))) if self.losses else math.nan

    @property
    def stderr(self) -> float:
        return math.nan if self.diverged else standard_error(np.array(list(self.losses.values())))


def rank(sweep: Sweep, outcomes: Mapping[str, Mapping[int, Outcome]]) -> list[Row]:
    """The table's lines, the best candidate first, then those that diverged, then those without a finished run."""
    baseline = outcomes[sweep.candidates[0].name]
    by_seed = [_losses(outcomes[candidate.name]) for candidate in sweep.candidates]
    diverged = [_diverged(outcomes[candidate.name]) for candidate in sweep.candidates]
    # A mean over those seeds alone in which training happened to work would be no mean of the recipe.
    usable = [{} if seeds or diverged[0] else losses for losses, seeds in zip(by_seed, diverged, strict=True)]
    comparisons = [None, *compare(usable[0], usable[1:])]
    rows = [
        Row(
            candidate,
            by_seed[i],
            diverged[i],
            comparisons[i],
            _token_share(usable[i], baseline, outcomes[candidate.name]),
        )
        for i, candidate in enumerate(sweep.candidates)
    ]

    def place(row: Row) -> tuple[bool, bool, float]:
        # By the difference, which is of the same seeds, also while some are still missing.
        loss = row.comparison.difference.mean + rows[0].mean if row.comparison else row.mean
        return math.isnan(row.mean), bool(row.diverged), 0.0 if math.isnan(loss) else loss

    return sorted(rows, key=place)


def _losses(outcomes: Mapping[int, Outcome]) -> dict[int, float]:
    return {seed: outcome.loss for seed, outcome in outcomes.items() if outcome.state == "finished"}


def _diverged(outcomes: Mapping[int, Outcome]) -> tuple[int, ...]:
    return tuple(seed for seed, outcome in outcomes.items() if outcome.state == "diverged")


def _token_share(
    usable: Mapping[int, float], baseline: Mapping[int, Outcome], ours: Mapping[int, Outcome]
) -> float | None:
    seeds = [seed for seed in usable if baseline[seed].state == "finished"]
    if not seeds:
        return None
    target = float(np.mean([baseline[seed].loss for seed in seeds]))
    tokens, losses, _ = mean_curve([(ours[seed].tokens, ours[seed].losses) for seed in seeds])
    reached = tokens_to(target, tokens, losses)
    return None if reached is None else reached / float(baseline[seeds[0]].tokens[-1])


def table(sweep: Sweep, rows: Sequence[Row], outcomes: Mapping[str, Mapping[int, Outcome]]) -> str:
    """A Markdown table that is readable as it is, and what must be known to read it."""
    cells = [HEADERS, *(_cells(sweep, row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*lines, "", *_notes(sweep, rows, outcomes)])


def _cells(sweep: Sweep, row: Row) -> tuple[str, ...]:
    found, n_seeds = row.comparison, len(row.losses) + len(row.diverged)
    compared = ("-", "-", "-", "-")
    if found:
        p = "-" if math.isnan(found.p_adjusted) else show_p(found.difference.p)
        adjusted = "-" if math.isnan(found.p_adjusted) else show_p(found.p_adjusted)
        compared = (f"{found.difference.mean:+.4f}", _number(found.difference.stderr), p, adjusted)
    return (
        row.candidate.name,
        f"{n_seeds} of {len(sweep.seeds)}",
        "diverged" if row.diverged else _number(row.mean),
        _number(row.stderr),
        *compared,
        _verdict(sweep, row),
        "-" if row.token_share is None else f"{row.token_share:.3f}",
    )


def _verdict(sweep: Sweep, row: Row) -> str:
    is_baseline = row.candidate == sweep.candidates[0]
    if row.diverged:
        words = f"diverged in {len(row.diverged)} of {len(row.losses) + len(row.diverged)}"
        return f"baseline, {words}" if is_baseline else words
    if is_baseline:
        return "baseline"
    return "-" if row.comparison is None else f"{row.comparison.word}{_how_many_more(row.comparison)}"


def _how_many_more(found: Comparison) -> str:
    """After "no difference shown": what would show one."""
    if found.word != "no difference shown":
        return ""
    if found.n == 1:
        return f" (at least {FEWEST} seeds are needed)"
    if not found.difference.mean:
        return ""
    needed = f"over {MOST_SEEDS}" if found.seeds_needed is None else f"about {found.seeds_needed}"
    return f" ({needed} seeds would show this one)"


def _notes(sweep: Sweep, rows: Sequence[Row], outcomes: Mapping[str, Mapping[int, Outcome]]) -> list[str]:
    baseline = sweep.candidates[0].name
    n_tests = sum(row.comparison is not None and row.comparison.n > 1 for row in rows)
    notes = [
        f"val_loss: mean over seeds of the loss after the last step, ± its standard error. difference: to {baseline}, "
        f"seed by seed, ± its standard error; p: paired t-test, adjusted by Holm's method for {n_tests} "
        f"comparison{'s' * (n_tests != 1)}. better or worse: p (Holm) < {ALPHA} and at least {FEWEST} seeds.",
        f"tokens: after which the mean curve has come down to the final loss of {baseline}, as a share of that run's "
        f"tokens. A run planned to end there would have lowered its learning rate by then, and need fewer.",
    ]
    all_runs = [(name, seed, found) for name, seeds in outcomes.items() for seed, found in seeds.items()]
    settings = [found.settings for _, _, found in all_runs if found.settings]
    differing = differences(settings)
    if of_text := [name for name in OF_THE_TEXT if name in differing]:
        notes.append(f"Candidates differ in {', '.join(of_text)}: their losses may be of different text.")
    if of_length := [name for name in OF_THE_LENGTH if name in differing]:
        notes.append(f"Candidates differ in {', '.join(of_length)}: they may have seen different numbers of tokens.")
    if rewound := [f"{name} seed {seed}" for name, seed, found in all_runs if found.n_rewinds]:
        notes.append(
            f"Training went back and passed over data on the way, which no other run did: {', '.join(rewound)}."
        )
    if failed := [f"{name} seed {seed} ({found.error})" for name, seed, found in all_runs if found.state == "failed"]:
        notes.append(f"Failed, and tried again by the next start: {', '.join(failed)}.")
    return notes


def verdict(sweep: Sweep, rows: Sequence[Row]) -> str:
    """In a sentence, whether the second of two candidates is better than the first."""
    a, b = (next(row for row in rows if row.candidate == candidate) for candidate in sweep.candidates)
    if a.diverged or b.diverged:
        n_a, n_b = (len(row.losses) + len(row.diverged) for row in (a, b))
        return (
            f"training diverged, of {a.candidate.name} in {len(a.diverged)} of {n_a} seeds, of {b.candidate.name} in "
            f"{len(b.diverged)} of {n_b}: there are no means to compare"
        )
    found = b.comparison
    if found is None:
        return f"nothing to compare yet: no seed has finished of both {a.candidate.name} and {b.candidate.name}"
    error = "" if math.isnan(found.difference.stderr) else f"standard error {found.difference.stderr:.4f}, "
    p = "" if math.isnan(found.p_adjusted) else f", p {show_p(found.p_adjusted, '= ')}"
    figures = f"({error}{found.n} seed{'s' * (found.n != 1)}{p})"
    size = abs(found.difference.mean)
    if found.word != "no difference shown":
        return f"{b.candidate.name} is {found.word} than {a.candidate.name} by {size:.4f} nats {figures}"
    if not size:
        return f"no difference shown: {a.candidate.name} and {b.candidate.name} have the same losses {figures}"
    lower = "lower" if found.difference.mean < 0 else "higher"
    return (
        f"no difference shown: {b.candidate.name} is {size:.4f} nats {lower} than {a.candidate.name} "
        f"{figures}{_how_many_more(found)}"
    )


def show_p(p: float | None, equals: str = "") -> str:
    """0.0312 -> "0.031"; with ``equals``, "= 0.031", and "< 0.0001" for less than that."""
    assert p is not None
    return f"{equals}{p:.2g}" if p >= 1e-4 else "< 0.0001"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
