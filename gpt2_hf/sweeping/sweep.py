"""sweep(...): make what is missing of a sweep's runs, and say what they show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import lock_folder, whole_file
from ..knobs import ConfigError
from ..program import UserError
from .candidates import Candidate, Sweep, plan_sweep, read_sweep
from .compare import need_scipy
from .outcomes import Outcome, read_all
from .results import rank, table, verdict
from .running import run_all


def sweep(
    recipes: Sequence[str],
    out: Path | None,
    command: Sequence[str],
    grid: Sequence[str] = (),
    settings: Sequence[str] = (),
    seeds: Sequence[int] = (2,),
    jobs: int = 1,
    ab: bool = False,
    again: bool = False,
    only_show: bool = False,
) -> None:
    """Make the runs that are not finished, then print the table, and write it and the picture into ``out``.

    Args:
        out: runs/sweeps/RECIPE by default, after the first recipe.
        command: that pretrains, such as python scripts/pretrain.py.
        grid, settings, seeds: as in `plan_sweep`.
        jobs: runs at a time.
        ab: end with one sentence on two candidates.
        again: make runs again in which training has diverged.
        only_show: make no run; without recipes, what was asked for last in ``out`` is shown.

    Raises:
        UserError: for what cannot be run or compared; also at the end, when a run has failed.
        ImportError: without scipy, before anything is run.
        KeyboardInterrupt: when told to stop; what was made is kept.
    """
    need_scipy()
    if out is None and not recipes:
        raise ConfigError("no recipe is given: name one or several, the first is the baseline; or a sweep, by --out")
    out = out or Path("runs/sweeps") / Path(recipes[0]).stem
    shows_last = only_show and not recipes and not grid
    plan = read_sweep(out) if shows_last else plan_sweep(recipes, grid, settings, seeds, out)
    if ab and len(plan.candidates) != 2:
        raise ConfigError(f"--ab compares two candidates, not {len(plan.candidates)}: see --help")
    failed = [] if only_show else _run(plan, command, jobs, again)
    _show(plan, ab)
    if failed:
        candidate, seed, outcome = failed[0]
        raise UserError(
            f"{len(failed)} of {len(plan.candidates) * len(plan.seeds)} runs failed, the first with: "
            f"{outcome.error or 'no word'} ({plan.log(candidate, seed)} has all it said); the same command tries again"
        )


def _run(plan: Sweep, command: Sequence[str], jobs: int, again: bool) -> list[tuple[Candidate, int, Outcome]]:
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(plan.out)
    except BlockingIOError as holder:
        raise ConfigError(
            f"{plan.out} is being worked on by {holder}: wait for it, look at it with --only_show, or choose "
            "another --out"
        ) from None
    with lock:
        plan.write()
        return run_all(plan, command, jobs, again)


def _show(plan: Sweep, ab: bool) -> None:
    outcomes = read_all(plan)
    rows = rank(plan, outcomes)
    text = table(plan, rows, outcomes)
    sentence = verdict(plan, rows) if ab else ""
    print(f"\n{text}")
    if plan.out.is_dir():
        with whole_file(plan.out / "table.md") as file:
            file.write("\n\n".join(filter(None, [text, sentence])).encode() + b"\n")
        try:
            from .picture import draw

            draw(plan, rows, outcomes, plan.out / "sweep.png")
            print(f"\n{plan.out / 'table.md'}, {plan.out / 'sweep.png'}")
        except ImportError as error:
            print(f"\n{plan.out / 'table.md'}; {error}")
    if sentence:
        print(f"\n{sentence}")
