"""What a sweep compares: recipes with values of their knobs, and seeds.

OUT/sweep.json                     what was asked for last
    demo,lr=1e-3/seed-1/           a run's folder, as any other
                 seed-1.log        what its process printed
    table.md, sweep.png            the result
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..cli import parse_cli
from ..config import RunConfig, flat
from ..files import mask, whole_file
from ..knobs import ConfigError, shown
from ..program import UserError
from ..reporting.diff import HARMLESS
from ..reporting.measured import flat as flat_settings
from ..reporting.measured import read_settings

PLAN = "sweep.json"
MOST_SEEDS = 100
# Settings that a sweep gives each run itself.
OWN = {"train.seed": "--seeds", "train.run_dir": "--out"}
# Settings that may differ from those that a run was made with, as no loss depends on them.
NO_MATTER = (
    *HARMLESS,
    "train.timeout_s",
    "publish.",
    "data.verify",
    "data.cache_",
    "eval.sample_",
    "eval.hellaswag_",
    "eval.reference",
)


@dataclass(frozen=True)
class Candidate:
    """A recipe, and the values that the grid gives its knobs, by dotted name and as they were written."""

    name: str
    recipe: str
    varied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Candidates, of which the first is the baseline, each to be run with every seed.

    Attributes:
        settings: name=value, of all runs.
    """

    out: Path
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...] = ()

    def run_dir(self, candidate: Candidate, seed: int) -> Path:
        return self.out / candidate.name / f"seed-{seed}"

    def log(self, candidate: Candidate, seed: int) -> Path:
        return self.out / candidate.name / f"seed-{seed}.log"

    def arguments(self, candidate: Candidate, seed: int) -> list[str]:
        """For scripts/pretrain.py."""
        varied = [f"{name}={value}" for name, value in candidate.varied.items()]
        own = [f"train.seed={seed}", f"train.run_dir={self.run_dir(candidate, seed)}"]
        return ["--config", candidate.recipe, *(f"--{setting}" for setting in (*self.settings, *varied, *own))]

    def write(self) -> None:
        """Keep what was asked for, so that the result can be shown without saying it again."""
        plan: dict[str, Any] = {"seeds": self.seeds, "settings": self.settings}
        with whole_file(self.out / PLAN) as file:
            file.write(json.dumps(plan | {"candidates": [asdict(c) for c in self.candidates]}, indent=1).encode())


def read_sweep(out: Path) -> Sweep:
    """What was asked for last in ``out``. Raises UserError when nothing was, or it cannot be read."""
    try:
        plan = json.loads((out / PLAN).read_text())
        candidates = tuple(Candidate(**candidate) for candidate in plan["candidates"])
        return Sweep(out, candidates, tuple(plan["seeds"]), tuple(plan["settings"]))
    except FileNotFoundError:
        raise UserError(f"{out} holds no sweep (no {PLAN}): name its folder with --out") from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{out / PLAN} cannot be read ({error}): give the sweep's recipes, and it is made anew"
        ) from None


def plan_sweep(
    recipes: Sequence[str], grid: Sequence[str], settings: Sequence[str], seeds: Sequence[int], out: Path
) -> Sweep:
    """Every recipe with every combination of the grid's values.

    Args:
        grid: knob=value,value,... each.
        settings: knob=value each.
        seeds: a single number N stands for 1 to N.

    Raises:
        ConfigError: for what cannot be compared or run, a run of other settings in its place among them.
        SystemExit: 2, after a line on stderr, for a setting that the recipe itself could not have.
    """
    axes = _read_grid(grid)
    for setting in settings:
        _check_name("--set", setting, "optim.lr=1e-3")
    if len(seeds) == 1 and seeds[0] > MOST_SEEDS:
        raise ConfigError(
            f"--seeds {seeds[0]} is a number of seeds, and at most {MOST_SEEDS}: list the seeds themselves, such as "
            f"{seeds[0]},{seeds[0] + 1}"
        )
    seeds = range(1, seeds[0] + 1) if len(seeds) == 1 else seeds
    if repeated := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ConfigError(f"--seeds has {repeated[0]} twice: give each seed once")
    if not recipes:
        raise ConfigError("no recipe is given: name one or several, the first is the baseline")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    candidates = [Candidate(_name(recipe, varied), recipe, varied) for recipe in recipes for varied in combinations]
    for name, count in Counter(candidate.name for candidate in candidates).items():
        if count > 1:
            raise ConfigError(f"{count} candidates are called {name}: give recipes different file names, values once")
    sweep = Sweep(out, tuple(candidates), tuple(seeds), tuple(settings))
    for candidate in candidates:
        _check(sweep, candidate)
    return sweep


def _read_grid(grid: Sequence[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    for text in grid:
        name, values = _check_name("--grid", text, "optim.lr=1e-3,2e-3")
        if name in axes:
            raise ConfigError(f"--grid has {name} twice: write all of its values behind one name")
        axes[name] = re.findall(r"\[[^]]*\]|[^,]+", values)  # a list in brackets is one value
        if not axes[name]:
            raise ConfigError(f"--grid {shown(text)} has no values: write them behind it, as in {name}=1e-3,2e-3")
    return axes


def _check_name(flag: str, text: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"{flag} {shown(text)} is no knob with a value: write it as in {flag} {example}")
    if name in OWN:
        raise ConfigError(f"{flag} {name}: a sweep sets that itself, by {OWN[name]}")
    return name, value


def _name(recipe: str, varied: dict[str, str]) -> str:
    knobs = [f"{name.rpartition('.')[2]}={value}" for name, value in varied.items()]
    return re.sub(r"[\s/\\:$~]", "_", ",".join([Path(recipe).stem, *knobs]))  # it is a folder's name


def _check(sweep: Sweep, candidate: Candidate) -> None:
    """Refuse settings that would make a sweep worthless, and runs in its place that have others."""
    config = parse_cli(RunConfig, sweep.arguments(candidate, sweep.seeds[0]))
    if not config.eval.val_every:
        raise ConfigError(f"{candidate.name}: eval.val_every is 0, so there is no loss to compare: set it")
    for name, value in (("checkpoint.mirror", config.checkpoint.mirror), ("publish.repo", config.publish.repo)):
        if value is not None:
            raise ConfigError(f"{candidate.name}: {name} is set, and all runs would share it: leave it out")
    for seed in sweep.seeds:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        _refuse_other(sweep.run_dir(candidate, seed), flat(mask(config.to_yaml())))


def _refuse_other(run_dir: Path, asked: dict[str, Any]) -> None:
    found = flat_settings(read_settings(run_dir))
    if not found:
        return
    found = flat(RunConfig().to_yaml()) | found  # what an older version did not know, it had by default
    for name, value in asked.items():
        if found[name] != value and not name.startswith(NO_MATTER):
            raise ConfigError(
                f"{run_dir} is a run with {name} {shown(str(found[name]))}, and {shown(str(value))} is asked for: "
                f"choose another --out, or move that folder away"
            )
