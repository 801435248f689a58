"""train(config): open the data, find the start, build the parts, then one loop.

The state of a run is its step, and how much data it has passed over: the data order, the learning rate and dropout are
functions of these and the config, and the weights and the optimizer's state are in the checkpoint. So starting a run
again resumes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import RunConfig
from ..data.documents import DocumentMask
from ..data.stream import cut
from .build import Parts, build
from .checkpoint import save, save_final
from .distributed import Host, clip, exchange
from .heart import advice_on_strangers, collective_timeout, meet
from .metrics import is_due, peak_memory_gb
from .mirror import mirroring
from .optim import averaged, lr_at, set_lr, step_optimizers
from .preflight import check_devices, check_environment, check_launcher, check_prompt, check_run
from .rewind import rewind
from .run_folder import RunFolder
from .start import find_start, fitted, is_finished, load_steps, open_data
from .stop import GONE, Stop, Stopping
from .watch import Diverged, advice_on_disk, advice_on_memory


@advice_on_strangers()
def train(config: RunConfig) -> Path:
    """Run, or go on with, the run that ``config`` describes; returns the folder of the finished model.

    Raises:
        ConfigError, ShardError: before anything is allocated, when the settings or the data cannot work; ConfigError
            also when memory runs out, naming the micro-batch to try.
        UserError: when the disk is full, or the run's folder was taken away.
        FloatingPointError: when the model has diverged, and rewinding is not wanted or did not help; nothing was saved
            of it.
    """
    check_environment()
    check_launcher()
    check_devices(torch.cuda.device_count())
    state = meet(os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"), config.train.timeout_s)
    check_run(config, state)
    host = Host(state, collective_timeout(config.train.timeout_s))
    with (
        RunFolder(Path(config.train.run_dir), host) as folder,
        Stop(folder, host, config.train.timeout_s) as stop,
        advice_on_disk(folder),
        stop.heart.advice_on_peers(),
    ):
        data = open_data(config)
        config = fitted(config, data.train)
        check_prompt(config, data.train.tokenizer)
        start = find_start(config, data.train, host)
        if is_finished(config, start):
            folder.is_finished = True
            state.print(folder.already_finished())
            with mirroring(folder.path, config.checkpoint, None, state.is_main_process):
                pass  # of which the last start may have left something
            return folder.final
        parts = build(config, data, start, folder, host, state, stop)
        is_found, config = config.train.finds_micro_batch, parts.config
        with (
            mirroring(folder.path, config.checkpoint, start.step, state.is_main_process),
            closing(parts.log),
            closing(parts.saver),
            advice_on_memory(config, state.num_processes, is_found),
        ):
            signal_number = train_and_rewind(config, parts)
            stop.heart.stop()  # what comes now is waiting, for the mirror
        accelerator = parts.accelerator
        # The model goes before the process group does. Were DDP the last to hold it, gloo's thread would be waited for
        # with Python's lock held, for which that thread may be waiting: the process would never end.
        del parts
        accelerator.free_memory()
        accelerator.end_training()
        if signal_number:
            stop.end(signal_number)
    return folder.final


def train_and_rewind(config: RunConfig, parts: Parts) -> int:
    """Make all steps and write the finished model; where training diverges, go back and pass over the data since.

    Returns:
        The number of the signal that ended this early, when what was done is saved; 0 for none.
    """
    while True:
        try:
            loop(config, parts)
            save_final(parts)
            return 0
        except Diverged as trouble:
            parts = rewind(parts, trouble)
        except Stopping as stopping:
            return save_stopped(parts, stopping)


def save_stopped(parts: Parts, stopping: Stopping) -> int:
    """Save the last finished step, unless it is saved already or not worth it. Every rank must call it.

    Returns:
        Why the run ends: a signal's number, or ``GONE``, also where a signal came at the same time.
    """
    folder, step = parts.folder, parts.folder.step
    for optimizer in parts.optimizers:
        optimizer.zero_grad()  # room for the copies
    parts.saver.wait()
    number = stopping.number
    if any(parts.host.gather(folder.is_gone())):
        folder.move_elsewhere()
        number = GONE
    if step is not None and not folder.has_saved(step):
        try:
            parts.watch.look(step)
            is_good = parts.watch.try_weights(step, parts.optimizers, None)
        except Diverged as trouble:
            parts.log.say(str(trouble))
            is_good = False
        if is_good:
            save(replace(parts, identity=parts.identity | {"owed": stopping.owed}), step)
            parts.saver.wait()
    parts.stop.mark(number)
    return number


def loop(config: RunConfig, parts: Parts) -> None:
    """Make the steps from the start to ``config.train.steps``; measure, log and save when each is due."""
    first, last = parts.start.step, config.train.steps
    log, watch, folder, throughput = parts.log, parts.watch, parts.folder, parts.throughput
    safe_point = parts.stop.safe_point
    with load_steps(config, parts.data.train, parts.start, parts.accelerator) as batches:
        if first == 0 or parts.start.owed is not None:
            log.write(first, (parts.start.owed or {}) | measure(parts, first))
        for step, batch in enumerate(batches, first + 1):
            lr_share = lr_at(step - 1, last, config.optim)
            set_lr(parts.optimizers, lr_share)
            loss, grad_norm = train_step(
                parts.accelerator, parts.model, parts.optimizers, batch, step - 1, config, parts.documents, safe_point
            )
            if step == first + 1 or config.data.begins_seq_len(step - 1):
                throughput.restart(step)  # what took time here was compilation
            watch.note(loss, grad_norm)
            parts.track.note(batch)
            folder.step = step
            log.bar.update()

            saving = is_due(config.checkpoint.save_every, step, last)
            logging = saving or is_due(config.train.log_every, step, last)
            measuring = parts.measures.any_due(step)
            row: dict[str, Any] = {}
            if logging or watch.must_look():
                watch.look(step)
            if logging:
                row = {"lr": lr_share * config.optim.lr, "peak_memory": round(peak_memory_gb(loss.device), 3)}
                row |= watch.figures() | throughput.measure(step)
            if saving or measuring or step == last:
                is_good = watch.try_weights(step, parts.optimizers, batch, parts.documents)
                if saving and not is_good:
                    log.say(f"step {step}: not saved, as the loss is far above that of the steps before, or not finite")
                saving = saving and is_good
            with parts.stop.owing(row):
                row = row | measure(parts, step)
            row |= parts.track.judge(step, row)
            if folder.is_gone():
                parts.stop.ask(GONE)
            log.write(step, row)
            if saving:
                save(parts, step)
            if saving or measuring:
                throughput.restart(step)  # what took time here was not training
            safe_point()
        parts.stop.last_step_made()


def measure(parts: Parts, step: int) -> dict[str, Any]:
    """What is to be measured after ``step``: after the last, of the weights that ``final/`` gets."""
    if step < parts.config.train.steps or not parts.config.optim.ema:
        return parts.measures.take(step)
    with averaged(parts.bare_model, parts.optimizers) as is_average:
        row = parts.measures.take(step)
    if is_average and "val_loss" in row:
        row["val_loss_raw"] = parts.measures.take(step, only_loss=True)["val_loss"]
    return row


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batch: Tensor,  # (grad_accum_steps, B, T + 1) int64
    step: int,
    config: RunConfig,
    documents: DocumentMask | None = None,
    safe_point: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """One update from this rank's share of the global batch; returns its mean loss and the gradient's global norm.

    Where ``data.seq_len_ramp`` has shorter windows for this step, those of the batch are cut in as many as they make.

    The loss of each micro-batch is divided by the tokens of the rank's whole share, so gradients add up to that of
    the mean whatever the number of micro-batches. Ranks exchange gradients once, in the last micro-step. Where one of
    these is not finite, the update is skipped, on all ranks alike, and the norm is not finite either. ``safe_point``
    is called between micro-steps, where the weights are still those of the last step.
    """
    n_micro_steps, micro_batch_size, _ = batch.shape
    first_sample = config.train.tokens_before(step) // config.data.seq_len
    first_sample += accelerator.process_index * n_micro_steps * micro_batch_size
    seq_len = config.data.seq_len_at(step)
    total = torch.zeros((), device=accelerator.device)
    for micro_step, on_host in enumerate(batch):
        if micro_step:
            safe_point()
        windows = cut(on_host.to(accelerator.device, non_blocking=True), seq_len)
        input_ids, labels = windows[:, :-1], windows[:, 1:]
        apart = documents(input_ids, cut(on_host, seq_len)[:, :-1]) if documents else {}
        if config.model.dropout:
            seed_dropout(config.train.seed, step, first_sample + micro_step * micro_batch_size)
        is_last = micro_step == n_micro_steps - 1
        with exchange(model, now=is_last):
            n_items = n_micro_steps * labels.numel()
            loss = model(input_ids, shift_labels=labels, num_items_in_batch=n_items, **apart).loss
            # A loss that is not finite makes the gradients so, and by their exchange those of all ranks.
            accelerator.backward(loss * (loss.detach() * 0 + 1))
        total = total + loss.detach()
    grad_norm = clip(accelerator, model, config.optim.max_grad_norm)
    step_optimizers(optimizers, accelerator.scaler, grad_norm)
    return total, grad_norm


def seed_dropout(seed: int, step: int, first_sample: int) -> None:
    """Make dropout a function of the place in the run, so that no generator's state needs saving."""
    bits = np.random.SeedSequence([seed, step, first_sample]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(bits >> np.uint64(1)))
