"""What a run is made of: precision, Accelerate, model, optimizers, measurements and log, put together once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from .. import hardware
from ..config import RunConfig, flat
from ..data.documents import DocumentMask
from ..data.shards import ShardSet
from ..data.stream import training_stream
from ..files import mask
from ..knobs import ConfigError
from ..model import GPTForCausalLM
from ..model.loss import LossKernels
from ..model.modeling_gpt import ResidualProjection
from ..model.versions import check_first_step
from ..reference import find_curve
from . import checkpoint
from .attention import choose_attention
from .distributed import Host, distribute, hide_shards_from_accelerate, local, settle, sharding_mesh
from .heart import collective_timeout
from .initial import InitialWeights, find_initial_weights, load_initial_weights, model_config
from .kernels import KernelCheck
from .measures import Measures, build_document_mask
from .metrics import RunLog, Throughput, flops_per_token
from .micro_batch import MicroBatchTrial
from .optim import WeightAverage, build_optimizers
from .run_folder import RunFolder
from .start import MICRO_BATCH, Data, Start, identity
from .stop import Stop
from .track import Track, odd_weights
from .trackers import Trackers
from .watch import Watch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Parts:
    """All that the loop works with.

    Attributes:
        model: as Accelerate has prepared it, for training; ``bare_model`` is the same weights without its wrapper.
        host: the ranks' talk about small things.
        documents: keeps the documents of a window apart; None where the recipe doesn't ask for it.
        config: with the micro-batch as a number.
        identity: what a checkpoint of this run must say of it, and what of its micro-batch.
    """

    config: RunConfig
    data: Data
    start: Start
    folder: RunFolder
    host: Host
    accelerator: Accelerator
    model: nn.Module
    bare_model: GPTForCausalLM
    optimizers: Sequence[Optimizer]
    tokenizer: PreTrainedTokenizerBase
    documents: DocumentMask | None
    measures: Measures
    throughput: Throughput
    log: RunLog
    watch: Watch
    track: Track
    saver: checkpoint.Saver
    stop: Stop
    identity: dict[str, Any]


def build(
    config: RunConfig, data: Data, start: Start, folder: RunFolder, host: Host, state: PartialState, stop: Stop
) -> Parts:
    """Make the parts in the order in which they need each other, with the state of ``start`` in them."""
    transformers.utils.logging.disable_progress_bar()  # bars for saving and loading would break ours
    precision = set_precision(config, state.device)
    curve, why_not = host.first(lambda: find_curve(config))
    mesh = sharding_mesh(state)
    if mesh is not None and precision == "fp16":
        raise ConfigError("train.precision fp16 needs the whole model on each GPU: leave FSDP out, or use bf16 or fp32")
    accelerator = build_accelerator(config, precision)
    initial = None if start.checkpoint else host.first(lambda: find_initial_weights(config, data.train.tokenizer))
    bare_model = build_model(config, start.checkpoint, accelerator, precision, initial)
    end_documents_with(bare_model, data.train.eot)
    is_random = start.checkpoint is None and initial is None
    init = odd_weights(bare_model) if curve and is_random else ""
    tokenizer = data.train.tokenizer.hugging_face()
    model = distribute(bare_model, accelerator, mesh, DTYPES[precision])
    optimizers = build_optimizers(bare_model, config.optim, state.device)
    accelerator.prepare(*optimizers)
    if config.optim.ema:  # not for Accelerate, which would unscale each parameter's gradient twice
        optimizers.append(WeightAverage(bare_model.parameters(), config.optim.ema))
    watch = Watch(config, accelerator, bare_model)
    if start.checkpoint:
        load_trainer_state(start.checkpoint, host, accelerator, bare_model, optimizers, watch)
    stream = training_stream(config, data.train)
    found = {}
    if config.train.finds_micro_batch:
        documents = build_document_mask(config, data.train, bare_model, DTYPES[precision])
        trial = MicroBatchTrial(
            config, start, stream, accelerator, bare_model, precision, documents, host, stop.heart.moved
        )
        found = {MICRO_BATCH: trial.run()}
        config = replace(config, train=replace(config.train, micro_batch_size=found[MICRO_BATCH]["size"]))
    if start.step < config.train.steps:
        if bare_model.transformer.h[0]._compiled_call_impl is not None:
            accelerator.print("compiling the first step, which may take half a minute")
        if config.train.check_kernels:
            KernelCheck(config, start, stream, data.train, accelerator, bare_model, DTYPES[precision]).run()
        check_first_step(bare_model, has_checked_loss=config.train.check_kernels)
    if config.model.zero_init and is_random:  # behind projections at zero the checks would see no gradient
        zero_residuals(bare_model)
    measures = Measures(config, accelerator, bare_model, tokenizer, data.val, DTYPES[precision], stop.safe_point)
    documents = build_document_mask(config, data.train, bare_model, DTYPES[precision])
    throughput = build_throughput(config, accelerator, bare_model, precision)
    log = open_log(config, accelerator, folder, start, data.train, stream.tokens_an_epoch, precision, initial)
    folder.step, folder.newest = start.step, start.checkpoint  # now that there is a bar, for last words to stand below
    if why_not:
        log.say(f"no reference curve to compare with ({why_not}): name an earlier run with --eval.reference RUN")
    curve = curve if accelerator.is_main_process else None  # one rank's share of the data is enough
    track = Track(config, curve, log.say, data.train.eot, stream.tokens_an_epoch, init)
    # A host of its own, as its thread talks while training may.
    savers = Host(state, collective_timeout(config.train.timeout_s))
    saver = checkpoint.Saver(savers, bare_model, optimizers, tokenizer, warn=log.say, waiting=stop.heart.moved)
    return Parts(
        config=config,
        data=data,
        start=start,
        folder=folder,
        host=host,
        accelerator=accelerator,
        model=model,
        bare_model=bare_model,
        optimizers=optimizers,
        tokenizer=tokenizer,
        documents=documents,
        measures=measures,
        throughput=throughput,
        log=log,
        watch=watch,
        track=track,
        saver=saver,
        stop=stop,
        identity=identity(config, data.train) | found,
    )


def end_documents_with(model: GPTForCausalLM, eot: int) -> None:
    """Say in what is saved which token ends a document, after which the next one begins."""
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = eot


@torch.no_grad()
def zero_residuals(model: GPTForCausalLM) -> None:
    """Make each block the identity: nothing that its two branches compute is added to the residual stream."""
    settle(model)
    for module in model.modules():
        if isinstance(module, ResidualProjection):
            local(module.weight).zero_()


def load_trainer_state(
    folder: Path,
    host: Host,
    accelerator: Accelerator,
    model: GPTForCausalLM,
    optimizers: Sequence[Optimizer],
    watch: Watch,
) -> None:
    """Put into the parts what a checkpoint says of them, beside the weights."""
    saved = checkpoint.load_trainer_state(folder, model, optimizers, host)
    if accelerator.scaler is not None and saved["scaler"]:  # the last start may have had another precision
        accelerator.scaler.load_state_dict(saved["scaler"])
    watch.restart(saved)


def set_precision(config: RunConfig, device: torch.device) -> str:
    """Settle the precision, and PyTorch's switches that belong to it."""
    precision = hardware.default_precision(device) if config.train.precision == "auto" else config.train.precision
    if precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"train.precision fp16 needs CUDA, this is {device.type}; leave it at auto")
    if config.train.residual == "bf16" and precision != "bf16":
        raise ConfigError(
            f"train.residual bf16 needs train.precision bf16, and that is {precision} here: leave it at auto"
        )
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
    hide_shards_from_accelerate()
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
    config: RunConfig,
    resume_from: Path | None,
    accelerator: Accelerator,
    precision: str,
    initial: InitialWeights | None = None,
) -> GPTForCausalLM:
    """The model, new or from a checkpoint, in fp32 (fp64 when asked for), with its blocks compiled where possible.

    Args:
        initial: what a new model's weights are; random ones by default.
    """
    device = accelerator.device
    if config.train.compile == "tuned" and device.type != "cuda":
        raise ConfigError(f"train.compile tuned is for CUDA, this is {device.type}: leave it at auto")
    obstacle = {"off": "switched off", "on": None}.get(config.train.compile, hardware.compile_obstacle(device))
    attention, why_attention = choose_attention(config, accelerator, precision, is_compiled=obstacle is None)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    gpt_config = model_config(config, resume_from or (initial.source if initial else None))
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
        if initial:
            load_initial_weights(model, initial)
            accelerator.print(f"beginning with the weights of {initial.source}")
    model.to(device).train()
    model.transformer.drop.narrow = hardware.has_narrow_residual(config.train.residual, device.type, precision)
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
        if device.type == "cpu":
            hardware.keep_kernels_apart()
        if config.train.gradient_checkpointing and config.model.dropout:
            hardware.share_the_seeded_generator()
        # Each length is a graph of its own; the default leaves room for those of one length.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * (1 + len(config.data.seq_len_ramp)))
        options = {"mode": "max-autotune-no-cudagraphs"} if config.train.compile == "tuned" else {}
        # A CPU would take longer to compile both ends than they take in all.
        ends = [model.transformer.drop, model.transformer.ln_f] if device.type == "cuda" else []
        for module in (*model.transformer.h, *ends):
            module.compile(dynamic=False, **options)
        LossKernels.compile(dynamic=False, **options)
    accelerator.print(
        f"{model.num_parameters():,} parameters in {precision} on {accelerator.num_processes} x "
        f"{hardware.describe(device)}, attention {attention} ({why_attention}), "
        + (f"not compiled, so slower: {obstacle}" if obstacle else "compiled")
    )
    return model


def build_throughput(config: RunConfig, accelerator: Accelerator, model: GPTForCausalLM, precision: str) -> Throughput:
    peak, source = hardware.peak_flops(accelerator.device, DTYPES[precision])

    def flops(step: int) -> int:
        return flops_per_token(model.num_parameters(), model.config, config.data.seq_len_at(step))

    accelerator.print(
        f"MFU is against {peak / 1e12:.3g} TFLOP/s a device ({source}), "
        f"{flops(config.train.steps) / 1e6:,.0f} MFLOPs a token"
    )
    settle = torch.cuda.synchronize if accelerator.device.type == "cuda" else None
    return Throughput(config.train.tokens_before, flops, accelerator.num_processes * peak, settle)


def open_log(
    config: RunConfig,
    accelerator: Accelerator,
    folder: RunFolder,
    start: Start,
    data: ShardSet,
    tokens_an_epoch: int,
    precision: str,
    initial: InitialWeights | None,
) -> RunLog:
    """Write down what the run is, start the trackers, and open metrics.jsonl."""
    run_dir = folder.path
    begun_with = {"init_from": asdict(initial)} if initial else {}
    folder.record(config.to_yaml(), environment(accelerator, data, precision) | begun_with, start.step)
    accelerator.wait_for_everyone()
    trackers = None
    if config.train.trackers and accelerator.is_main_process:
        settings = {name: str(value) for name, value in flat(mask(config.to_yaml())).items()}
        trackers = Trackers(accelerator, run_dir, settings, is_new=start.checkpoint is None)
    steps, batch, tokens_before = config.train.steps, config.train.global_batch_tokens, config.train.tokens_before
    if start.checkpoint:
        accelerator.print(f"resuming from {start.checkpoint}")
    epochs = tokens_before(steps) / tokens_an_epoch
    accelerator.print(
        f"{data.n_tokens:,} training tokens; steps {start.step:,} to {steps:,} of {batch:,} tokens = "
        f"{config.train.micro_batch_size} x {config.data.seq_len} x {accelerator.num_processes} processes x "
        f"{config.grad_accum_steps(accelerator.num_processes)} accumulated; {epochs:.2f} epochs"
    )
    for what, ramp, n_steps in (
        ("updates", config.train.batch_ramp, config.train.batch_ramp_steps),
        ("windows", config.data.seq_len_ramp, config.data.seq_len_ramp_steps),
    ):
        if ramp:
            sizes = ", then ".join(f"{size:,}" for size in ramp)
            accelerator.print(f"to begin with, {what} of {sizes} tokens, {n_steps:,} steps each")
    is_owed = start.owed is not None
    log = RunLog(run_dir, start.step, steps, tokens_before, accelerator.is_main_process, trackers, drops_start=is_owed)
    if start.rewind and start.rewind.step == start.step:
        log.go_back(start.step, start.rewind.row())
    if accelerator.is_main_process:
        folder.rows = log.rows
    return log


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
