"""What is done when training has diverged: back to a checkpoint from before, and past the data in between; or the end.

A rewind is made in an order in which a kill at any moment loses nothing: weights and optimizers are put back first,
which is undone by ending; then ``rewind.json`` is written, from which the next start would come to the same point; then
what was saved and measured since is dropped, which the next start would do too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

from .. import runs
from . import checkpoint
from .build import Parts, load_trainer_state
from .start import Rewind, Start, discard_untrusted, unusable
from .watch import Diverged


def rewind(parts: Parts, trouble: Diverged) -> Parts:
    """The parts as of the newest good checkpoint from before ``trouble``, to go on with. Every rank must call it.

    Raises:
        FloatingPointError: when there is none, or ``train`` asks for no more rewinds; it says what can be done.
    """
    config, folder, log = parts.config, parts.folder, parts.log
    parts.saver.wait()  # which may be writing the checkpoint to go back to
    came_to, before, last = folder.step or 0, trouble.step, parts.start.rewind
    # One batch over and over has no data to pass over.
    while config.train.on_divergence == "rewind" and not config.train.overfit_batch:
        place = parts.host.first(partial(_newest_whole, folder.checkpoints, before))
        if place is None:
            break
        step = checkpoint.read_state(place)["step"]
        times = last.times + 1 if last and step <= last.step else 1
        if times > config.train.max_rewinds:
            break
        checkpoint.load_model(place, parts.bare_model)
        load_trainer_state(place, parts.host, parts.accelerator, parts.bare_model, parts.optimizers, parts.watch)
        if not parts.watch.all_finite(parts.optimizers):
            log.say(f"checkpoint {place} is not used: its weights or optimizer state are not finite")
            before = step
            continue

        n_tokens = config.train.tokens_before(came_to) - config.train.tokens_before(step)
        data_offset = parts.start.data_offset + n_tokens // config.data.seq_len
        record = Rewind(step=step, rewound_from=came_to, data_offset=data_offset, times=times)
        log.say(f"{trouble}: going back to {place}, and passing over the data of steps {step + 1} to {came_to}")
        parts.host.first(partial(_record, folder.path, record, log.say))
        log.go_back(step, record.row())
        parts.throughput.restart(step)
        folder.step, folder.newest = step, place
        parts.accelerator.wait_for_everyone()
        return dataclasses.replace(parts, start=Start(place, step, data_offset, record))
    _stop(parts, trouble)


def _record(run: Path, record: Rewind, say: Callable[[str], None]) -> None:
    record.write(run)
    discard_untrusted(run / "checkpoints", record, say)


def _newest_whole(checkpoints: Path, below: int) -> Path | None:
    saved = reversed(runs.saved_steps(checkpoints).items())
    return next((path for step, path in saved if step < below and unusable(path) is None), None)


def _stop(parts: Parts, trouble: Diverged) -> NoReturn:
    """End the run with what happened and what can be done, and leave no checkpoint that would end it again."""
    folder, start = parts.folder, parts.start

    def look() -> Path | None:
        for step, path in runs.saved_steps(folder.checkpoints).items():
            if step >= trouble.step and path != start.checkpoint:
                runs.delete(path)
                parts.log.say(f"checkpoint {path} was made when training had begun to diverge, and is deleted")
        return runs.newest_whole(folder.checkpoints, parts.log.say)

    newest = parts.host.first(look)
    advice = (
        "lower learning rates (--optim.lr, and all others that the recipe sets), or look at the data near this step"
    )
    if newest is None:
        way_on = f"no checkpoint was saved: start again with {advice}"
    elif newest == start.checkpoint and trouble.step <= start.step + 1:
        way_on = f"so it was at the first step after {newest}: delete that one, and the run goes on from another"
    else:
        way_on = f"{newest} is good, and the next start goes on from it: start again with {advice}"
    raise FloatingPointError(f"{trouble}, {runs.NOT_SAVED}; {way_on}") from None
