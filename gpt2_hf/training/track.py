"""Whether a run is on track: its loss beside the reference curve of its recipe, and when it is not, why.

The loop hands over each batch, as it lies on the host, and each row of figures; nothing here waits for a device, or
speaks to other ranks. Only when the loss is off are the usual causes weighed, by what is known by then:

    initial weights     their spread, once, against GPT-2's
    data                16 tokens on end that were seen before; end-of-text tokens; how far steps differ beyond
                        what windows drawn at random would
    recipe              batch, learning rate, warm-up, ..., against those of the reference
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig, flat
from ..model import GPTForCausalLM
from ..reference import WINDOW, Curve
from .optim import lr_at

FIRST = 250  # before this step losses fall too fast to compare
SAID_AGAIN = 1.5  # a verdict that stays is repeated when the run has come so many times as far
MOST_TOKENS = 65_536  # of a rank's batch that are looked at in a step
# Initial weights of so many matrices' elements lie within this share of their standard deviation.
INIT_TOLERANCE = 0.1
NGRAM = 16  # tokens on end that hardly ever occur twice by chance in text
PICKED, MOST_KEPT = 32, 2**16  # one place in so many is looked at, fewer when there are more to remember
REPEATED = 0.5  # share of what is read that was read before which is too much: more than two epochs
BUCKETS = 64  # of tokens, in the profile of a window
BLOCK = 10  # steps whose windows are taken together: an order that drifts slowly shows over several
# Blocks of shuffled data differ as much as so many windows drawn at random; when more than ALIKE times as much, and by
# more than FELT of the variance of single windows, they are not shuffled.
ALIKE, FELT = 2.0, 0.005
ENOUGH_STEPS = 50
FEWEST_GAPS = 5  # rows whose training loss is averaged
LEARNED = 20_000  # tokens a document has at most, on average, in any text that was cut into documents


@dataclass
class DataSeen:
    """What the batches of this start looked like, from a rank's share of them.

    Args:
        eot: the token between documents.
    """

    eot: int
    n_steps: int = 0
    n_tokens: int = 0
    n_eot: int = 0
    _picked: float = 0.0
    _again: float = 0.0
    _seen: dict[int, int] = field(default_factory=dict)  # fingerprint -> what decides whether it is looked at
    _thin: int = 1  # one in PICKED times so many places is looked at
    # Of the present block, mean and variance of the share of each bucket in a window, and the variance of a mean of as
    # many random windows; of all blocks before, sums of their means, the squares of these, and the other two.
    _block: np.ndarray = field(default_factory=lambda: np.zeros((3, BUCKETS)))
    _sums: np.ndarray = field(default_factory=lambda: np.zeros((4, BUCKETS)))

    def note(self, batch: Tensor) -> None:
        """Take in a step's share, (grad_accum_steps, B, T + 1) int64 on the host."""
        windows = batch.view(-1, batch.shape[-1]).numpy()[:, :-1]  # (windows, T)
        windows = windows[: max(2, MOST_TOKENS // windows.shape[1])]
        self.n_steps += 1
        self.n_tokens += windows.size
        self.n_eot += int((windows == self.eot).sum())
        self._compare(windows)
        self._profile(windows)

    @property
    def repeated(self) -> float:
        """The share of what was read that had been read before."""
        return self._again / self._picked if self._picked else 0.0

    @property
    def drift(self) -> tuple[float, float]:
        """How far blocks of steps differ in their tokens beyond what windows drawn at random would.

        Returns:
            The variance between blocks, in units of that of random windows (shuffled: about 1); and what exceeds that,
            as a share of the variance of single windows. (1, 0) while too little was read.
        """
        n_blocks = self.n_steps // BLOCK
        if self.n_steps < ENOUGH_STEPS:
            return 1.0, 0.0
        mean, squares, single, random = self._sums / n_blocks
        between = float((squares - mean**2).sum()) * n_blocks / (n_blocks - 1)
        expected, within = float(random.sum()), float(single.sum())
        return (between / expected, (between - expected) / within) if within > 0 else (1.0, 0.0)

    def _compare(self, windows: np.ndarray) -> None:
        n = min(NGRAM, windows.shape[1])
        # Which places are looked at must depend on the tokens there alone: copies are found wherever they lie.
        last = windows.shape[1] - n + 1
        mixed = (windows[:, :last] * 40_503 + windows[:, n // 2 : last + n // 2]) * 2_654_435_761 >> 20
        rows, columns = np.nonzero(mixed % (PICKED * self._thin) == 0)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            mark = hash(windows[row, column : column + n].tobytes())
            self._picked += 1
            self._again += mark in self._seen
            self._seen[mark] = int(mixed[row, column])
        while len(self._seen) > MOST_KEPT:
            self._thin *= 2
            self._picked, self._again = self._picked / 2, self._again / 2  # as if it had been so from the start
            self._seen = {mark: mix for mark, mix in self._seen.items() if mix % (PICKED * self._thin) == 0}

    def _profile(self, windows: np.ndarray) -> None:
        n, length = windows.shape
        if n < 2:
            return
        places = (windows % BUCKETS) + np.arange(n)[:, None] * BUCKETS
        profiles = np.bincount(places.ravel(), minlength=n * BUCKETS).reshape(n, BUCKETS) / length
        variances = profiles.var(0, ddof=1)
        self._block += np.stack([profiles.mean(0), variances, variances / n / BLOCK]) / BLOCK
        if self.n_steps % BLOCK == 0:
            mean, single, random = self._block
            self._sums += np.stack([mean, mean**2, single, random])
            self._block[:] = 0


class Track:
    """A run's place beside its reference; silent where there is none.

    Args:
        curve: None switches everything off.
        eot: the token between documents.
        n_tokens: read in an epoch.
        init: a line for each kind of weights that does not begin as GPT-2's do, from ``odd_weights``.
    """

    def __init__(
        self,
        config: RunConfig,
        curve: Curve | None,
        say: Callable[[str], None],
        eot: int,
        n_tokens: int,
        init: str = "",
    ):
        self.config, self.curve, self._say, self._init, self._n_tokens = config, curve, say, init, n_tokens
        self._data = DataSeen(eot)
        self._gaps: deque[float] = deque(maxlen=WINDOW)  # of training losses
        self._norms: deque[float] = deque(maxlen=FEWEST_GAPS)
        self._step, self._train_due = 0, FIRST
        self._said: tuple[str, int] = ("", 0)
        self._recipe = flat(config.to_yaml())
        if curve is None:
            return
        theirs = curve.recipe.get("train.steps", config.train.steps)
        batch = curve.recipe.get("train.global_batch_tokens", config.train.global_batch_tokens)
        # Who makes as many steps as the reference means the same steps, whatever is in them.
        self._same_steps = abs(theirs / config.train.steps - 1) <= 0.1
        self._scale = 1.0 if self._same_steps else config.train.global_batch_tokens / batch
        by = "" if self._scale == 1 else ", at the same number of tokens"
        remark = f" ({curve.remark})" if curve.remark else ""
        differs = ", ".join(self._differences()) or "nothing in the recipe that matters"
        say(f"compared with {curve.name}{remark}{by}, from step {FIRST} on; different here: {differs}")
        if init:
            say(f"{init}: {CAUSES['init']}")

    def note(self, batch: Tensor) -> None:
        """Take in a step's batch, (grad_accum_steps, B, T + 1), which must be on the host."""
        if self.curve is not None:
            self._data.note(batch)

    def judge(self, step: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Compare what a row says of the loss after ``step``; returns what to add to it.

        Returns:
            ``reference_loss`` and ``reference_band``, in nats, and ``off_track``, 1 or 0; nothing where it is not time.
        """
        curve = self.curve
        if curve is None:
            return {}
        self._step, place = step, step * self._scale
        if "train_loss" in row:
            self._norms.append(row.get("grad_norm", math.nan))
            if (expected := curve.at("train_loss", place)) is not None:
                self._gaps.append(row["train_loss"] - expected)
        if step < FIRST or self._falls_otherwise(step, place):
            return {}
        if "val_loss" in row and (reference := curve.at("val_loss", place)) is not None:
            return self._verdict("val_loss", row["val_loss"] - reference, reference, curve.band("val_loss", place))
        validates = self.config.eval.val_every and curve.points.get("val_loss")
        reference = curve.at("train_loss", place)
        if validates or "train_loss" not in row or step < self._train_due or reference is None:
            return {}
        self._train_due = step // WINDOW * WINDOW + WINDOW
        gaps = list(self._gaps)[-max(FEWEST_GAPS, WINDOW // self.config.train.log_every) :]
        if len(gaps) < FEWEST_GAPS:
            return {}
        noise = 3 * float(np.std(gaps)) / math.sqrt(len(gaps))
        return self._verdict("train_loss", float(np.mean(gaps)), reference, curve.band("train_loss", place) + noise)

    def _verdict(self, figure: str, gap: float, reference: float, band: float) -> dict[str, Any]:
        name = {"val_loss": "validation", "train_loss": "training"}[figure]
        step, loss = self._step, reference + gap
        against = f"{loss:.2f} against {reference:.2f} +- {band:.2f}"
        if not gap <= band:  # nor when it is no number
            verdict, line = "behind", f"behind the reference by {gap:.2f} ({name}, {against}): {self._why()}"
        elif gap < -band and figure == "train_loss" and self._repeated > REPEATED:
            # Memorised text looks like progress where there is no validation.
            verdict, line = "memorised", f"below the reference by {-gap:.2f} ({name}, {against}): {self._why()}"
        else:
            verdict, line = "on track", f"on track ({name} {loss:.2f}, reference {reference:.2f} +- {band:.2f})"
        last, when = self._said
        if verdict != last or step >= when * SAID_AGAIN:
            self._say(f"step {step}: {line}")
            self._said = verdict, step
        is_off = int(verdict != "on track")
        return {"reference_loss": round(reference, 4), "reference_band": round(band, 4), "off_track": is_off}

    def _falls_otherwise(self, step: int, place: float) -> bool:
        """Whether the two rates are at other points of their schedules, because one of the runs is longer."""
        theirs = self._theirs()
        if theirs is None or theirs.train.steps == self.config.train.steps:
            return False
        warm = max(theirs.optim.warmup_steps, self.config.optim.warmup_steps)
        if place <= warm or step <= warm:
            return False
        share = lr_at(round(place), theirs.train.steps, theirs.optim)
        return abs(share - lr_at(step, self.config.train.steps, self.config.optim)) > 0.25

    def _theirs(self) -> RunConfig | None:
        """What the reference's recipe says of steps and rates, in place of ours; None where nobody wrote it down."""
        assert self.curve is not None
        recipe = self.curve.recipe
        if "train.steps" not in recipe:
            return None
        names = ("schedule", "warmup_steps", "decay_ratio", "min_lr_ratio")
        optim = replace(
            self.config.optim, **{name: recipe[f"optim.{name}"] for name in names if f"optim.{name}" in recipe}
        )
        return replace(self.config, optim=optim, train=replace(self.config.train, steps=recipe["train.steps"]))

    def _differences(self) -> list[str]:
        assert self.curve is not None
        theirs = self.curve.recipe
        return [
            f"{name} {self._recipe[name]} (there {theirs[name]})"
            for name in WATCHED
            if name in theirs and theirs[name] != self._recipe[name]
        ]

    @property
    def _repeated(self) -> float:
        """The share of what was read that had been read before: as seen, or by the size of the data."""
        epochs = self.config.train.tokens_before(self._step) / self._n_tokens
        seen = self._data.repeated if self._data.n_steps >= ENOUGH_STEPS else 0.0
        return max(seen, 1 - 1 / max(epochs, 1))

    def _why(self) -> str:
        """The causes that the evidence speaks for, the surest first; at most two."""
        found = [text for _, text in sorted(self._causes(), key=lambda cause: -cause[0])]
        if not found:
            return (
                "none of the usual causes fits (recipe, data and initial weights are as they should be): compare with "
                "--train.precision fp32 --train.compile off, and with another --train.seed"
            )
        also = f"; perhaps also {found[1]}" if len(found) > 1 else ""
        return f"the likely cause is {found[0]}{also}{self._on_gradients()}"

    def _on_gradients(self) -> str:
        assert self.curve is not None
        there = self.curve.at("grad_norm", self._step * self._scale)
        here = float(np.mean(self._norms)) if self._norms else math.nan
        if there is None or not max(here / there, there / here) > 2:
            return ""
        return f" (gradients have norms of {here:.2g}, there {there:.2g})"

    def _causes(self) -> list[tuple[float, str]]:
        """Pairs of how sure, and cause and remedy. What the data show outweighs a recipe, which may be meant so."""
        data, config = self._data, self.config
        found: list[tuple[float, str]] = []
        if self._init:
            found.append((9, f"{self._init}: {CAUSES['init']}"))
        if config.train.overfit_batch:
            found.append((9, "train.overfit_batch, which trains on one batch only: leave it out"))
        elif (share := self._repeated) > REPEATED:
            found.append((8, f"repeated data, {share:.0%} of what was read had been read before: {CAUSES['repeated']}"))
        if data.n_steps >= ENOUGH_STEPS and data.n_eot == 0 and data.n_tokens >= LEARNED:
            found.append((7, f"missing end-of-text, none in {data.n_tokens:,} tokens: {CAUSES['eot']}"))
        ratio, excess = data.drift
        if ratio > ALIKE and excess > FELT:
            text = f"unshuffled data, steps differ {ratio:.1f} times as much as random ones: {CAUSES['unshuffled']}"
            found.append((6, text))
        found += self._recipe_causes()
        return found

    def _recipe_causes(self) -> list[tuple[float, str]]:
        assert self.curve is not None
        found: list[tuple[float, str]] = []
        optimizer = self.config.optim.name
        other = self.curve.recipe.get("optim.name", optimizer)
        if other != optimizer:  # whose rates mean something else
            found.append((1, f"the optimizer (optim.name {optimizer}, there {other}): tune its learning rate"))
        for name, low, high, factor in FACTORS:
            ours, theirs = self._recipe[name], self.curve.recipe.get(name)
            if name == "optim.embedding_lr" and (ours or theirs):  # which is lr where it is not given
                ours, theirs = ours or self._recipe["optim.lr"], theirs or self.curve.recipe.get("optim.lr")
            if theirs is None or (name == "optim.muon_lr" and optimizer != "muon"):
                continue
            if other != optimizer and name.endswith("lr"):
                continue
            ratio = (ours + 1e-12) / (theirs + 1e-12)
            if max(ratio, 1 / ratio) < factor:
                continue
            text = high if ratio > 1 else low
            # A ratio of a warm-up of 0 is no measure: cap it.
            found.append((min(abs(math.log(ratio)), 5.0), f"{text} ({name} {ours:g}, there {theirs:g}): set it back"))
        return found


CAUSES = {
    "init": "begin with weights of this package's initialisation",
    "repeated": "prepare more text, or remove its duplicates",
    "eot": "prepare the data with a tokenizer step that closes each document with <|endoftext|>",
    "unshuffled": "shuffle the documents before they are cut into files",
}
# Setting, what it is when too small and when too large, and the factor from which on that matters.
FACTORS = [
    ("train.global_batch_tokens", "a batch that is too small", "a batch that is too large", 1.3),
    ("optim.lr", "a learning rate that is too low", "a learning rate that is too high", 1.5),
    ("optim.embedding_lr", "a learning rate that is too low", "a learning rate that is too high", 1.5),
    ("optim.muon_lr", "a learning rate that is too low", "a learning rate that is too high", 1.5),
    ("optim.warmup_steps", "a warm-up that is missing or too short", "a warm-up that is too long", 2.0),
    ("optim.max_grad_norm", "clipping that is too strong", "clipping that is too weak", 3.0),
    ("optim.weight_decay", "too little weight decay", "too much weight decay", 3.0),
]
# Settings that move a curve, of which a line at the start names those that differ.
WATCHED = [
    *(name for name, *_ in FACTORS),
    "optim.name",
    "optim.schedule",
    "optim.min_lr_ratio",
    "optim.decay_ratio",
    "model.dropout",
    "train.steps",
    "train.overfit_batch",
]


def odd_weights(model: GPTForCausalLM) -> str:
    """What of a new model's weights does not begin as GPT-2's do; empty when all do. Waits once for the device."""
    config = model.config
    std = config.initializer_range
    residual = std / math.sqrt(2 * config.n_layer)
    expected = {"c_attn": std, "c_fc": std, "c_proj": residual, "wte": std, "wpe": std / 2}
    kinds: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in expected and weight.ndim == 2:
            kinds.setdefault(kind, []).append(weight.detach())
    with torch.no_grad():
        found = torch.stack([torch.stack([w.float().std() for w in kinds[kind]]).mean() for kind in kinds]).tolist()
    odd = [
        f"{kind} {value:.2g} (GPT-2: {expected[kind]:.2g})"
        for kind, value in zip(kinds, found, strict=True)
        if abs(value / expected[kind] - 1) > INIT_TOLERANCE
    ]
    return f"initial weights with another standard deviation, {', '.join(odd)}" if odd else ""
