"""train(config): build the parts in order, then one loop.

The state of a run is its step: the data order, the learning rate and dropout are functions of (config, step), and the
weights and the optimizer's state are in the checkpoint. So starting a run again resumes it.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from .. import hardware, runs
from ..config import RunConfig
from ..data.documents import DocumentMask
from ..data.remote import open_folder
from ..data.shards import ShardSet, open_split
from ..data.stream import StepLoader, TokenStream
from ..data.tokenizer import load_tokenizer, save_tokenizer
from ..evaluation.generate import sample_text
from ..evaluation.hellaswag import HellaSwag, load_hellaswag
from ..evaluation.validation import validation_loss
from ..knobs import ConfigError
from ..model import GPTForCausalLM
from ..model.loss import LossKernels
from ..model.versions import check_first_step
from ..program import last_words
from . import checkpoint
from .metrics import RunLog, Throughput, flops_per_token, peak_memory_gb
from .optim import build_optimizers, lr_at, set_lr, step_optimizers
from .preflight import check_environment, check_run
from .run_folder import RunFolder, agree, flat, mask
from .watch import Watch, advice_on_disk, advice_on_memory, advice_on_peers, check_launcher

SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def train(config: RunConfig) -> Path:
    """Run, or go on with, the run that ``config`` describes; returns the folder of the finished model.

    Raises:
        ConfigError, ShardError: before anything is allocated, when the settings or the data cannot work; ConfigError
            also when memory runs out, naming the micro-batch to try.
        UserError: when the disk is full, or the run's folder was taken away.
        FloatingPointError: when the model has diverged; nothing was saved of it.
    """
    check_environment()
    check_launcher()
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))
    check_run(config, state)
    with (
        RunFolder(Path(config.train.run_dir), state) as folder,
        last_words(lambda: ("" if folder.step is None else "\n") + f"terminated{folder.way_on()}"),  # below the bar
        advice_on_disk(folder),
        advice_on_peers(),
    ):
        return _train(config, state, folder)


def _train(config: RunConfig, state: PartialState, folder: RunFolder) -> Path:
    run_dir, total_steps = folder.path, config.train.steps
    train_data, val_data = open_data(config)
    resume_from, start_step = find_start(config, train_data, state)
    if is_finished(run_dir, resume_from, start_step >= total_steps):
        folder.is_finished = True
        state.print(
            f"{run_dir} is finished, its model is in {run_dir / 'final'}. To start over, delete {run_dir} or choose "
            f"another --train.run_dir; to train longer, raise --train.steps (from a checkpoint, if one was kept)."
        )
        return run_dir / "final"

    transformers.utils.logging.disable_progress_bar()  # bars for saving and loading would break ours
    precision = set_precision(config, state.device)
    accelerator = build_accelerator(config, precision)
    bare_model = build_model(config, resume_from, accelerator, precision)
    tokenizer = load_tokenizer()
    bare_optimizers = build_optimizers(bare_model, config.optim, state.device)
    model, *_ = accelerator.prepare(bare_model, *bare_optimizers)
    if resume_from:
        saved = checkpoint.load_trainer_state(resume_from, bare_model, bare_optimizers)
        if accelerator.scaler is not None and saved["scaler"]:  # the last start may have had another precision
            accelerator.scaler.load_state_dict(saved["scaler"])
    intervals = (config.eval.val_every, config.eval.hellaswag_every, config.eval.sample_every)
    measure = build_measures(config, accelerator, bare_model, tokenizer, val_data, precision)
    documents = build_document_mask(config, train_data, bare_model, precision)
    throughput = build_throughput(config, accelerator, bare_model, precision)
    log = open_log(config, accelerator, folder, start_step, train_data, precision)
    check_first_step(bare_model)
    watch = Watch(accelerator, bare_model, folder)
    folder.step, folder.newest = start_step, resume_from

    def save(step: int) -> None:
        optimizer_state = checkpoint.trainer_state(bare_model, bare_optimizers)
        weights = accelerator.get_state_dict(model)

        def write(path: Path) -> None:
            write_model(path, bare_model, weights, tokenizer)
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            progress = {"step": step, "scaler": scaler}
            checkpoint.write_trainer_state(path, optimizer_state, identity(config, train_data) | progress)

        place = run_dir / "checkpoints" / f"step-{step:08d}"
        if state.is_main_process:
            runs.write_folder(place, write)
            folder.newest = place
            runs.prune(place.parent, config.checkpoint.keep_last, config.checkpoint.keep_every)
        state.wait_for_everyone()
        folder.newest = place

    with (
        closing(log),
        advice_on_memory(config, state.num_processes),
        load_steps(config, train_data, start_step, state) as batches,
    ):
        if start_step == 0:
            log.write(0, measure(0))
        if start_step < total_steps and bare_model.transformer.h[0]._compiled_call_impl is not None:
            log.say("compiling in the first step, which may take half a minute")
        for step, batch in enumerate(batches, start_step + 1):
            lr_share = lr_at(step - 1, total_steps, config.optim)
            set_lr(bare_optimizers, lr_share)
            loss, grad_norm = train_step(accelerator, model, bare_optimizers, batch, step - 1, config, documents)
            watch.note(loss)
            folder.step = step
            log.bar.update()
            saving = is_due(config.checkpoint.save_every, step, total_steps)
            row: dict[str, Any] = {}
            if saving or is_due(config.train.log_every, step, total_steps):
                row = {"train_loss": float(accelerator.reduce(loss, "mean")), "lr": lr_share * config.optim.lr}
                row |= {"grad_norm": float(grad_norm), "peak_memory": round(peak_memory_gb(state.device), 3)}
                row |= throughput.measure(step)
                watch.look(step, row["train_loss"], row["grad_norm"])
            measuring = any(is_due(every, step, total_steps) for every in intervals)
            if saving or measuring or step == total_steps:
                watch.try_weights(step, bare_optimizers, batch, documents)
            measured = measure(step)
            folder.check()
            log.write(step, row | measured)
            if saving:
                save(step)
            if measuring or saving or step == start_step + 1:
                if state.device.type == "cuda":
                    torch.cuda.synchronize()
                throughput.restart(step)  # what took time here was not training, or was compilation

        if start_step == total_steps:
            watch.try_weights(start_step, bare_optimizers, None)
        weights = accelerator.get_state_dict(model)
        folder.check()
        if state.is_main_process:
            runs.write_folder(run_dir / "final", lambda path: write_model(path, bare_model, weights, tokenizer))
            folder.is_finished = True
    accelerator.end_training()
    return run_dir / "final"


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batch: Tensor,  # (grad_accum_steps, B, T + 1) int64
    step: int,
    config: RunConfig,
    documents: DocumentMask | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from this rank's share of the global batch; returns its mean loss and the gradient's global norm.

    The loss of each micro-batch is divided by the tokens of the rank's whole share, so gradients add up to that of
    the mean whatever the number of micro-batches. Ranks exchange gradients once, in the last micro-step.
    """
    n_micro_steps, micro_batch_size, _ = batch.shape
    first_sample = (step * accelerator.num_processes + accelerator.process_index) * n_micro_steps * micro_batch_size
    total = torch.zeros((), device=accelerator.device)
    for micro_step, on_host in enumerate(batch):
        windows = on_host.to(accelerator.device, non_blocking=True)
        input_ids, labels = windows[:, :-1], windows[:, 1:]
        apart = documents(input_ids, on_host[:, :-1]) if documents else {}
        if config.model.dropout:
            seed_dropout(config.train.seed, step, first_sample + micro_step * micro_batch_size)
        is_last = micro_step == n_micro_steps - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            n_items = n_micro_steps * labels.numel()
            loss = model(input_ids, shift_labels=labels, num_items_in_batch=n_items, **apart).loss
            accelerator.backward(loss)
        total = total + loss.detach()
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
    step_optimizers(optimizers, accelerator.scaler, grad_norm)
    return total, grad_norm


def is_due(every: int, step: int, total_steps: int) -> bool:
    """Whether something with this interval (0: never) happens after ``step``; the last step has everything."""
    return bool(every) and (step % every == 0 or step == total_steps)


def open_data(config: RunConfig) -> tuple[ShardSet, ShardSet | None]:
    """The training and validation splits, checked against the model; no validation split where none is scored."""
    folder = open_folder(config.data.path, config.data.cache_dir, config.data.cache_gb)
    train_data = open_split(folder, "train")
    val_data = open_split(folder, "val") if config.eval.val_every else None
    vocab_size = config.model.gpt_config().vocab_size
    if train_data.vocab_size > vocab_size:
        raise ConfigError(
            f"{config.data.path} has a vocabulary of {train_data.vocab_size}, the model has {vocab_size} rows for it; "
            f"leave out model.vocab_size, or prepare the data with the model's tokenizer"
        )
    for data in (train_data, val_data):
        if data is not None and data.n_tokens <= config.data.seq_len:
            raise ConfigError(
                f"{config.data.path}: the {data.split} split has {data.n_tokens:,} tokens, less than one window of "
                f"data.seq_len + 1 = {config.data.seq_len + 1}; prepare more documents, lower data.seq_len"
                + (", or train without validation: --eval.val_every 0" if data.split == "val" else "")
            )
        if data is not None and config.data.verify:
            data.verify()
    return train_data, val_data


def identity(config: RunConfig, data: ShardSet) -> dict[str, Any]:
    """What must not change in the middle of a run, because its curve would then mean nothing."""
    return {
        **{f"model.{name}": getattr(config.model.gpt_config(), name) for name in SHAPE},
        "data": data.fingerprint,
        "data.seq_len": config.data.seq_len,
        "data.document_mask": config.data.document_mask,
        "train.seed": config.train.seed,
        "train.global_batch_tokens": config.train.global_batch_tokens,
        "train.overfit_batch": config.train.overfit_batch,
        "optim.name": config.optim.name,
    }


def find_start(config: RunConfig, data: ShardSet, state: PartialState) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step, or (None, 0): looked up by one rank, so that all agree."""

    def look() -> tuple[Path | None, int]:
        found = runs.newest_whole(Path(config.train.run_dir) / "checkpoints")
        if found is None:
            return None, 0
        saved = {"data.document_mask": False} | checkpoint.read_state(found)  # older checkpoints don't name it
        for name, now in identity(config, data).items():
            if saved.get(name, now) != now:
                raise ConfigError(
                    f"{config.train.run_dir} holds a run with another {name} ({saved[name]}, now {now}); choose "
                    f"another --train.run_dir, delete that folder, or set {name} back"
                )
        if saved["step"] > config.train.steps:
            raise ConfigError(
                f"train.steps is {config.train.steps}, and {found} is {saved['step']} steps along already: raise "
                f"train.steps, or choose another --train.run_dir"
            )
        return found, saved["step"]

    return agree(state, look)


def is_finished(run_dir: Path, newest: Path | None, has_all_steps: bool) -> bool:
    """Whether ``final`` is what the run would end with: the newest checkpoint's weights, or all that was kept."""
    return runs.final_problem(run_dir, newest) is None and (newest is None or has_all_steps)


def set_precision(config: RunConfig, device: torch.device) -> str:
    """Settle the precision, and PyTorch's switches that belong to it."""
    precision = hardware.default_precision(device) if config.train.precision == "auto" else config.train.precision
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"train.precision fp16 needs CUDA, this is {device.type}; leave it at auto")
    if device.type == "cpu":
        hardware.reuse_freed_memory()
        hardware.fit_threads()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.train.deterministic or device.type == "cpu":
        # On the CPU this costs nothing, and without it threads add up gradients in any order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    return precision


def build_accelerator(config: RunConfig, precision: str) -> Accelerator:
    """Accelerate's hold on devices and processes; precision and accumulation are ours, not its config file's."""
    missing = set(config.train.trackers) - {str(tracker) for tracker in get_available_trackers()}
    if missing:
        raise ConfigError(f"train.trackers: {', '.join(sorted(missing))} is unknown or not installed")
    accelerator = Accelerator(
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        gradient_accumulation_steps=1,  # train_step scales the loss itself
        log_with=config.train.trackers or None,
        project_dir=config.train.run_dir,
        dynamo_backend="no",  # build_model compiles block by block; around the whole model it would rename the weights
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    assert accelerator.gradient_accumulation_steps == 1
    return accelerator


def build_model(
    config: RunConfig, resume_from: Path | None, accelerator: Accelerator, precision: str
) -> GPTForCausalLM:
    """The model, new or from a checkpoint, in fp32 (fp64 when asked for), with its blocks compiled where possible."""
    device = accelerator.device
    obstacle = {"off": "switched off", "on": None}.get(config.train.compile, hardware.compile_obstacle(device))
    try:
        attention, why_attention = hardware.choose_attention(
            config.model.attn_implementation,
            device,
            precision,
            config.model.dropout,
            config.data.document_mask,
            compiled=obstacle is None,
        )
    except ValueError as error:
        raise ConfigError(f"model.attn_implementation: {error}") from None
    dtype = torch.float64 if precision == "fp64" else torch.float32
    gpt_config = config.model.gpt_config()
    if resume_from:  # with the present configuration: dropout may have changed since
        model = GPTForCausalLM.from_pretrained(
            resume_from, config=gpt_config, dtype=dtype, attn_implementation=attention
        )
    else:
        torch.manual_seed(config.train.seed)
        gpt_config._attn_implementation = attention
        model = GPTForCausalLM(gpt_config)
        if precision == "fp64":
            model.double()
    model.to(device).train()
    # The head's gradient covers the tied matrix already: add this batch's rows to it, not another whole matrix. (CUDA
    # would have to count the rows on the host; DDP takes "sparse" for the sum's form.)
    is_alone = device.type == "cpu" and accelerator.distributed_type == DistributedType.NO
    model.transformer.wte.sparse = is_alone and model.config.tie_word_embeddings
    if config.train.gradient_checkpointing:
        # Older versions of transformers know only the second name.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()

    if obstacle is None:
        # Block by block: all blocks share one compiled graph, and evaluation and saving see the plain module.
        # DDP's optimizer for compiled modules would cut each of these graphs at its buckets; a block is no larger.
        torch._dynamo.config.optimize_ddp = False
        if config.train.gradient_checkpointing and config.model.dropout:
            hardware.share_the_seeded_generator()
        for block in model.transformer.h:
            block.compile(dynamic=False)
        LossKernels.compile(dynamic=False)
    accelerator.print(
        f"{model.num_parameters():,} parameters in {precision} on {accelerator.num_processes} x "
        f"{hardware.describe(device)}, attention {attention} ({why_attention}), "
        + (f"not compiled, so slower: {obstacle}" if obstacle else "compiled")
    )
    return model


def build_document_mask(
    config: RunConfig, data: ShardSet, model: GPTForCausalLM, precision: str
) -> DocumentMask | None:
    """What keeps the documents of this split's windows apart; None where the recipe doesn't ask for it."""
    if not config.data.document_mask:
        return None
    return DocumentMask(data.eot, data.eot_first, model.config._attn_implementation, DTYPES[precision])


def build_measures(
    config: RunConfig,
    accelerator: Accelerator,
    model: GPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    val_data: ShardSet | None,
    precision: str,
) -> Callable[[int], dict[str, Any]]:
    """A function that takes, after a given step, the measurements that are due, and returns them as one row."""
    device = accelerator.device
    ranks: dict[str, Any] = {
        "device": device,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "reduce": (lambda tensor: accelerator.reduce(tensor, "sum")) if accelerator.num_processes > 1 else None,
        "autocast": accelerator.autocast,
    }

    # On a GPU validation has compiled blocks, of training's shapes. HellaSwag and samples have many shapes, for which
    # building takes longer than it saves; on a CPU it saves nothing.
    stance: Any = torch.compiler.set_stance if device.type == "cpu" else nullcontext
    measures: list[tuple[int, Callable[[], dict[str, Any]]]] = []

    if val_data is not None:
        stream = TokenStream(val_data, config.data.seq_len, seed=0, shuffle=False)
        n_windows = max(1, min(stream.n_windows, config.eval.val_tokens // config.data.seq_len))
        batch_size = config.train.micro_batch_size
        documents = build_document_mask(config, val_data, model, precision)

        def validate() -> dict[str, Any]:
            with stance("force_eager"):
                return validation_loss(
                    model, stream, n_windows=n_windows, batch_size=batch_size, documents=documents, **ranks
                )

        measures.append((config.eval.val_every, validate))
    if config.eval.hellaswag_every:
        items = load_hellaswag(config.eval.hellaswag_items)
        task = HellaSwag(items, tokenizer, n_positions=model.config.n_positions)
        tokens_per_batch = config.train.micro_batch_size * config.data.seq_len

        def hellaswag() -> dict[str, Any]:
            with torch.compiler.set_stance("force_eager"):
                return task.score(model, tokens_per_batch=tokens_per_batch, **ranks).metrics

        measures.append((config.eval.hellaswag_every, hellaswag))
    if config.eval.sample_every:

        def sample() -> dict[str, Any]:
            with torch.compiler.set_stance("force_eager"), accelerator.autocast():
                texts = sample_text(
                    model,
                    tokenizer,
                    config.eval.sample_prompt,
                    max_new_tokens=config.eval.sample_tokens,
                    n_samples=config.eval.sample_count,
                    device=device,
                )
            return {"samples": texts}

        measures.append((config.eval.sample_every, sample))

    def measure(step: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        # Before the first step only the loss: an untrained model's answers are chance, and the run should start.
        for every, take in measures if step else measures[: val_data is not None]:
            if is_due(every, step, config.train.steps):
                row |= take()
        return row

    return measure


def build_throughput(config: RunConfig, accelerator: Accelerator, model: GPTForCausalLM, precision: str) -> Throughput:
    peak, source = hardware.peak_flops(accelerator.device, DTYPES[precision])
    flops = flops_per_token(model.num_parameters(), model.config, config.data.seq_len)
    accelerator.print(
        f"MFU is against {peak / 1e12:.3g} TFLOP/s a device ({source}), {flops / 1e6:,.0f} MFLOPs a token"
    )
    return Throughput(config.train.global_batch_tokens, accelerator.num_processes * peak / flops)


def load_steps(config: RunConfig, data: ShardSet, start_step: int, state: PartialState) -> Any:
    """The batches of this rank for all steps to come; the first one over and over with ``overfit_batch``."""
    overfit = config.train.overfit_batch
    loader = StepLoader(
        TokenStream(data, config.data.seq_len, config.train.seed),
        0 if overfit else start_step,
        1 if overfit else config.train.steps,
        global_batch_size=config.train.global_batch_tokens // config.data.seq_len,
        micro_batch_size=config.train.micro_batch_size,
        rank=state.process_index,
        world_size=state.num_processes,
        pin_memory=state.device.type == "cuda",
    )
    return nullcontext(repeat(next(loader), config.train.steps - start_step)) if overfit else loader


def open_log(
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    start_step: int,
    data: ShardSet,
    precision: str,
) -> RunLog:
    """Write down what the run is, start the trackers, and open metrics.jsonl."""
    run_dir = folder.path
    folder.record(config.to_yaml(), environment(accelerator, data, precision), start_step)
    accelerator.wait_for_everyone()
    if config.train.trackers:
        settings = flat(mask(config.to_yaml()))
        accelerator.init_trackers("gpt2_hf", config={key: str(value) for key, value in settings.items()})
    steps, batch = config.train.steps, config.train.global_batch_tokens
    if start_step:
        accelerator.print(f"resuming from {run_dir / 'checkpoints' / f'step-{start_step:08d}'}")
    accelerator.print(
        f"{data.n_tokens:,} training tokens; steps {start_step:,} to {steps:,} of {batch:,} tokens = "
        f"{config.train.micro_batch_size} x {config.data.seq_len} x {accelerator.num_processes} processes x "
        f"{config.grad_accum_steps(accelerator.num_processes)} accumulated; {steps * batch / data.n_tokens:.2f} epochs"
    )
    track = accelerator.log if config.train.trackers else None
    return RunLog(run_dir, start_step, steps, batch, accelerator.is_main_process, track)


def environment(accelerator: Accelerator, data: ShardSet, precision: str) -> dict[str, Any]:
    """What a figure of this run must be read with: versions, code, data and machine."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    return {
        "command": sys.argv,
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": hardware.describe(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": precision,
        "data_fingerprint": data.fingerprint,
    }


def write_model(
    folder: Path, model: GPTForCausalLM, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """A stock gpt2 folder: weights, configurations, tokenizer."""
    model.save_pretrained(folder, state_dict=weights)
    save_tokenizer(tokenizer, folder, model.config.n_positions)


def seed_dropout(seed: int, step: int, first_sample: int) -> None:
    """Make dropout a function of the place in the run, so that no generator's state needs saving."""
    bits = np.random.SeedSequence([seed, step, first_sample]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(bits >> np.uint64(1)))
