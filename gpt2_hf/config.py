"""Every knob of a run on one page; cli.py says how a recipe and the command line set them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import yaml

from .knobs import ConfigError, Filled, Knobs, OneOf, OrWord, PathName, Range, knob_name
from .model.configuration_gpt import GPTConfig
from .schedules import SCHEDULES, in_stages, sum_before

Count = Annotated[int, Range(1)]
Interval = Annotated[int, Range(0)]  # in steps; 0 is never
Rate = Annotated[float, Range(above=0)]
Betas = tuple[Annotated[float, Range(0, below=1)], Annotated[float, Range(0, below=1)]]
Decay = Annotated[float, Range(0)]
BatchTokens = Annotated[int, Range(1, 10**12)]
VOCAB_SIZE = 50257  # of GPT-2

# Attention backends that can be told where documents end.
MASKS_DOCUMENTS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class ModelSection(Knobs):
    """The network.

    Args:
        preset: one of OpenAI's sizes (gpt2 is 124M); the other fields override it.
        n_layer: number of blocks.
        n_head: attention heads per block.
        n_embd: width of the residual stream.
        n_positions: longest context that the model can read.
        vocab_size: rows of the embedding; by default as many as the data's tokenizer has entries (50257, GPT-2's).
        dropout: probability, on embeddings, attention weights and residual branches alike.
        attn_implementation: auto, which on CUDA tries what is there and remembers the fastest; sdpa_cudnn or sdpa_fa,
            of PyTorch's kernels; or a name that transformers knows: sdpa, eager, flex_attention, flash_attention_2...
        init_from: begin with the weights of a gpt2 folder, a run or a model of the Hub, of the same shape, instead of
            random ones. A resumed run needs them no more.
        zero_init: begin with the projections that add to the residual stream at zero, so that each block begins as the
            identity, instead of small random ones.
    """

    _prefix: ClassVar[str] = "model."

    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    n_layer: Count | None = None
    n_head: Count | None = None
    n_embd: Count | None = None
    n_positions: Count | None = None
    vocab_size: Count | None = None
    dropout: Annotated[float, Range(0, below=1)] = 0.0
    attn_implementation: Annotated[str, Filled()] = "auto"
    init_from: Annotated[str, PathName()] | None = None
    zero_init: bool = False

    def gpt_config(self) -> GPTConfig:
        """The model's own configuration. Raises ConfigError for a shape that cannot be."""
        shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        given: dict[str, Any] = {name: getattr(self, name) for name in shape if getattr(self, name) is not None}
        given |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)
        if (
            self.vocab_size or VOCAB_SIZE
        ) < VOCAB_SIZE:  # which has no GPT-2's <|endoftext|>; the data says what it has
            given |= {"bos_token_id": None, "eos_token_id": None}
        try:
            return GPTConfig.preset(self.preset, **given)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None


@dataclass(frozen=True)
class DataSection(Knobs):
    """The tokens.

    Args:
        path: folder that scripts/prepare_data.py made, or token files of llm.c, build-nanogpt, nanoGPT or datatrove, as
            they are; also in object storage (s3://bucket/folder, or any URL that fsspec knows).
        tokenizer: of token files that are not GPT-2's and came without a manifest: a folder with a tokenizer.json, or a
            model of the Hub. Prepared folders bring their own.
        seq_len: tokens per training sample (T); a window holds one more, the last label.
        seq_len_ramp: shorter lengths to begin with, from short to long; each must divide seq_len. The order of the data
            stays the same: a window is cut in pieces of that length, so a step has as many tokens as ever.
        seq_len_ramp_steps: steps of each of these lengths; then seq_len.
        document_starts: let training's windows begin where documents do, not one where the last ended; documents that
            are shorter than seq_len then come more than once an epoch, as what follows another.
        document_mask: let tokens see only their own document, from position 0, in training and validation.
        verify: read all shards before training and compare them with their checksums.
        cache_dir: where files from object storage are kept (default: gpt2_hf in the Hugging Face cache folder).
        cache_gb: at most so many 10^9 bytes of them.
    """

    _prefix: ClassVar[str] = "data."

    path: Annotated[str, PathName(remote=True)] = "data/fineweb_edu_10bt"
    tokenizer: Annotated[str, PathName()] | None = None
    seq_len: Annotated[int, Range(1, 10**6)] = 1024
    seq_len_ramp: list[Count] = field(default_factory=list)
    seq_len_ramp_steps: Interval = 0
    document_starts: bool = False
    document_mask: bool = False
    verify: bool = False
    cache_dir: Annotated[str, PathName()] | None = None
    cache_gb: Annotated[float, Range(above=0)] = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        ramp = self.seq_len_ramp
        _check_ramp("data.seq_len_ramp", ramp, self.seq_len_ramp_steps, "data.seq_len", self.seq_len)
        if odd := [length for length in ramp if self.seq_len % length]:
            raise ConfigError(f"data.seq_len_ramp {odd[0]} does not divide data.seq_len {self.seq_len}: choose others")

    def seq_len_at(self, step: int) -> int:
        """Tokens per training sample in update ``step``, from 0."""
        return in_stages(step, self.seq_len_ramp, self.seq_len_ramp_steps, self.seq_len)

    def begins_seq_len(self, step: int) -> bool:
        """Whether update ``step``, from 0, is the first with samples of its length."""
        return step == 0 or self.seq_len_at(step) != self.seq_len_at(step - 1)


@dataclass(frozen=True)
class OptimSection(Knobs):
    """The update.

    Parameters have four roles: matrices (of the blocks), the token embedding (which is the head too), position
    embeddings, and vectors (biases, norms). What is not given for a role is as for the matrices under AdamW, but
    vectors do not decay.

    Args:
        name: adamw, or muon (Muon for the matrices inside blocks, AdamW for everything else).
        lr: peak learning rate of AdamW's parameters.
        embedding_lr: of the token embedding, instead of lr.
        position_lr: of the position embeddings, instead of lr.
        vector_lr: of biases and norms, instead of lr.
        muon_lr: peak learning rate of Muon's parameters, in spectral units: about the most by which a step changes
            a layer's output, for an input of size 1. Near 0.02 for models of any width.
        muon_momentum: momentum of Muon (Nesterov).
        muon_split_qkv: orthogonalise query, key and value apart, instead of the one matrix that holds them.
        betas: AdamW's averaging coefficients.
        embedding_betas: of the token embedding, instead of betas.
        position_betas: of the position embeddings, instead of betas.
        vector_betas: of biases and norms, instead of betas.
        eps: AdamW's denominator offset.
        weight_decay: decoupled decay of matrices and embeddings: a step takes lr x weight_decay of each weight.
        embedding_weight_decay: of the token embedding, instead of weight_decay.
        position_weight_decay: of the position embeddings, instead of weight_decay.
        vector_weight_decay: of biases and norms.
        cautious_decay: decay only weights that the update makes smaller too.
        decay_follows_lr: let weight decay rise and fall as the learning rate does (so their product as its square).
        max_grad_norm: gradients are scaled down to this global L2 norm.
        schedule: cosine, linear, or trapezoid (constant, then linear down over the last decay_ratio of the steps).
        warmup_steps: linear rise of the learning rate from step 0.
        decay_ratio: share of the steps in which trapezoid falls.
        min_lr_ratio: floor of the learning rate, as a share of its peak; it stays there after the last step.
        ema: final/ gets the exponential moving average of the weights with this decay a step, such as 0.99, instead of
            the last weights (0), and what is measured after the last step is measured with it.
    """

    _prefix: ClassVar[str] = "optim."

    name: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 6e-4
    embedding_lr: Rate | None = None
    position_lr: Rate | None = None
    vector_lr: Rate | None = None
    muon_lr: Rate = 0.02
    muon_momentum: Annotated[float, Range(0, below=1)] = 0.95
    muon_split_qkv: bool = True
    betas: Betas = (0.9, 0.95)
    embedding_betas: Betas | None = None
    position_betas: Betas | None = None
    vector_betas: Betas | None = None
    eps: Annotated[float, Range(above=0)] = 1e-8
    weight_decay: Decay = 0.1
    embedding_weight_decay: Decay | None = None
    position_weight_decay: Decay | None = None
    vector_weight_decay: Decay = 0.0
    cautious_decay: bool = False
    decay_follows_lr: bool = False
    max_grad_norm: Annotated[float, Range(above=0)] = 1.0
    schedule: Annotated[str, OneOf(tuple(SCHEDULES))] = "cosine"
    warmup_steps: Interval = 715
    decay_ratio: Annotated[float, Range(above=0, at_most=1)] = 0.3
    min_lr_ratio: Annotated[float, Range(0, 1)] = 0.1
    ema: Annotated[float, Range(0, below=1)] = 0.0


@dataclass(frozen=True)
class TrainSection(Knobs):
    """The loop.

    Args:
        run_dir: folder of this run; starting again with the same folder resumes.
        steps: optimizer updates in all.
        global_batch_tokens: tokens per update over all processes; accumulation is derived from it.
        batch_ramp: fewer tokens per update to begin with, from few to many. No sample is left out or comes twice, and
            the learning rate stays a function of the step.
        batch_ramp_steps: steps of each of these batches; then global_batch_tokens.
        micro_batch_size: samples per forward pass on one device; auto tries before the first step which number that
            divides the batch is fastest, of those that fit in its memory.
        seed: of the initialisation, the data order and dropout.
        precision: auto takes bf16 where the device has it, else fp16 with a gradient scaler on CUDA, else fp32.
        residual: precision of the sum that runs through all blocks, where precision is bf16; auto takes bf16 for it too
            on CUDA, where it saves an eighth of what blocks move in memory, and fp32 elsewhere.
        compile: torch.compile; auto uses it where it can work; tuned, on CUDA, times kernels against each other, which
            takes minutes at the first start (products with what follows them in one are among these).
        tf32: let fp32 matrix products run as TF32 on CUDA.
        deterministic: only deterministic kernels on CUDA too (slower); the CPU always uses them.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        overfit_batch: train on the first batch only, for debugging: the loss must go to zero.
        log_every: steps between rows of training metrics.
        timeout_s: seconds that training may stand still, or a process be waited for, before the run ends with an error.
        trackers: any of tensorboard, wandb, trackio, through Accelerate.
        check_kernels: before the first step, compare loss and gradients of the fast kernels with plain ones, and take
            others where they differ.
        max_bad_steps: so many steps in a row whose update was skipped (loss or gradients were not finite), or whose
            loss is far above those before, and training has diverged.
        on_divergence: rewind to the newest checkpoint from before and pass over the data since, or stop.
        max_rewinds: so many rewinds without a newer checkpoint in between; then the run stops.
    """

    _prefix: ClassVar[str] = "train."

    run_dir: Annotated[str, PathName()] = "runs/gpt2_124m"
    steps: Annotated[int, Range(1, 10**9)] = 19_073
    global_batch_tokens: BatchTokens = 524_288
    batch_ramp: list[BatchTokens] = field(default_factory=list)
    batch_ramp_steps: Interval = 0
    micro_batch_size: Annotated[int, Range(1, 10**6), OrWord("auto")] = 64
    seed: Annotated[int, Range(0)] = 1337
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    residual: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off", "tuned"] = "auto"
    tf32: bool = True
    deterministic: bool = False
    gradient_checkpointing: bool = False
    overfit_batch: bool = False
    log_every: Count = 10
    timeout_s: Annotated[float, Range(1)] = 600.0
    trackers: list[str] = field(default_factory=list)
    check_kernels: bool = True
    max_bad_steps: Count = 10
    on_divergence: Literal["rewind", "stop"] = "rewind"
    max_rewinds: Interval = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        last = self.global_batch_tokens
        _check_ramp("train.batch_ramp", self.batch_ramp, self.batch_ramp_steps, "train.global_batch_tokens", last)
        if self.batch_ramp and self.overfit_batch:
            raise ConfigError("train.overfit_batch trains on one batch only: leave train.batch_ramp out")

    @property
    def finds_micro_batch(self) -> bool:
        """Whether micro_batch_size is still auto: training makes a number of it (training/micro_batch.py)."""
        return isinstance(self.micro_batch_size, str)

    @property
    def batches(self) -> list[int]:
        """Tokens per update in each stage, from few to many."""
        return [*self.batch_ramp, self.global_batch_tokens]

    def tokens_of_step(self, step: int) -> int:
        """Tokens of update ``step``, from 0, over all processes."""
        return in_stages(step, self.batch_ramp, self.batch_ramp_steps, self.global_batch_tokens)

    def tokens_before(self, step: int) -> int:
        """Tokens of all updates before ``step``, from 0: of the first ``step`` updates."""
        return sum_before(step, self.batch_ramp, self.batch_ramp_steps, self.global_batch_tokens)


@dataclass(frozen=True)
class EvalSection(Knobs):
    """What is measured on the way. An interval of 0 turns a measurement off; each is also taken after the last step.

    Args:
        val_every: steps between validation losses.
        val_tokens: size of the fixed part of the validation split that is scored.
        hellaswag_every: steps between HellaSwag scores.
        hellaswag_items: items of HellaSwag's fixed subset; 10042 is all of it.
        sample_every: steps between printed samples.
        sample_prompt: what the samples continue.
        sample_count: number of samples.
        sample_tokens: new tokens per sample.
        reference: auto compares the run with the known loss curve of its recipe, where there is one, and says whether
            it is on track; or an earlier run (its folder, or its metrics.jsonl) to compare with; or none.
    """

    _prefix: ClassVar[str] = "eval."

    val_every: Interval = 250
    val_tokens: Count = 10_485_760
    hellaswag_every: Interval = 250
    hellaswag_items: Annotated[int, Range(1, 10_042)] = 10_042
    sample_every: Interval = 250
    sample_prompt: str = "Hello, I'm a language model,"
    sample_count: Annotated[int, Range(1, 1000)] = 4
    sample_tokens: Count = 32
    reference: Annotated[str, PathName()] = "auto"


@dataclass(frozen=True)
class CheckpointSection(Knobs):
    """What is kept.

    Args:
        save_every: steps between checkpoints (0: only the final model is written).
        keep_last: this many newest checkpoints stay.
        keep_every: checkpoints at multiples of this many steps stay for good (0: none).
        keep_best: the checkpoint with the lowest validation loss stays, of those that have one.
        mirror: a folder in object storage (s3://bucket/folder, or any URL that fsspec knows) to which a process of its
            own copies each checkpoint and the final model, and from which an empty run_dir goes on.
        mirror_wait_s: at most so many seconds a run waits at its end for what is not copied yet.
    """

    _prefix: ClassVar[str] = "checkpoint."

    save_every: Interval = 1000
    keep_last: Count = 2
    keep_every: Interval = 0
    keep_best: bool = True
    mirror: Annotated[str, PathName(remote=True)] | None = None
    mirror_wait_s: Annotated[float, Range(0)] = 60.0


@dataclass(frozen=True)
class PublishSection(Knobs):
    """What scripts/pretrain.py publishes on the Hub while it trains, by a process of its own.

    Args:
        repo: name on the Hub, me/my-gpt2, to which the final model goes; none publishes nothing.
        every_steps: steps between checkpoints that go there too, a multiple of checkpoint.save_every (0: none).
        public: let everybody see a new repository.
        license: the Hub's name of a licence, for the model card.
        wait_s: at most so many seconds the run waits at its end for what is not published yet.
    """

    _prefix: ClassVar[str] = "publish."

    repo: Annotated[str, Filled()] | None = None
    every_steps: Interval = 0
    public: bool = False
    license: Annotated[str, Filled()] | None = None
    wait_s: Annotated[float, Range(0)] = 300.0


@dataclass(frozen=True)
class ResumeSection(Knobs):
    """Where a start begins.

    Args:
        mode: auto goes on from the newest whole checkpoint; never begins at step 0, and moves what the run has so far
            to before-1, before-2, ... in run_dir. What the launcher or Slurm restarts goes on all the same.
        from: begin at this step of the run, and move what came later to before-1, ...; or the path of a checkpoint of
            the same recipe. The same command goes on from there when it is started again.
        force: settings that may differ from those the checkpoint was made with, although the curve then means less.
    """

    _prefix: ClassVar[str] = "resume."

    mode: Literal["auto", "never"] = "auto"
    from_: Annotated[str, PathName()] | None = None
    force: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "never" and self.from_ is not None:
            raise ConfigError("resume.mode is never, and resume.from names a checkpoint: keep one of the two")


@dataclass(frozen=True)
class RunConfig(Knobs):
    """Pretrain GPT-2 by a recipe.

    Raises:
        ConfigError: when the parts do not fit together.
    """

    ALIASES: ClassVar[dict[str, str]] = {"init_from": "model.init_from"}  # on the command line
    # Other programs' names, and what to say to them.
    HINTS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("learning_rate", "max_lr"), "use optim.lr"),
        **dict.fromkeys(
            ("batch_size", "device_batch_size", "per_device_train_batch_size"), "use train.micro_batch_size"
        ),
        **dict.fromkeys(("total_batch_size", "train_batch_size"), "use train.global_batch_tokens, in tokens"),
        **dict.fromkeys(
            ("gradient_accumulation_steps", "grad_accum_steps"), "it follows from train.global_batch_tokens"
        ),
        **dict.fromkeys(("max_steps", "max_iters", "num_iterations"), "use train.steps"),
        **dict.fromkeys(("epochs", "num_train_epochs"), "use train.steps; the epochs that makes are printed"),
        **dict.fromkeys(("block_size", "sequence_length", "max_seq_length", "context_length"), "use data.seq_len"),
        **dict.fromkeys(("out_dir", "output_dir"), "use train.run_dir"),
        **dict.fromkeys(("grad_clip", "gradient_clipping"), "use optim.max_grad_norm"),
        **dict.fromkeys(("wandb", "report_to", "wandb_log"), "use --train.trackers '[wandb]'"),
        **dict.fromkeys(
            ("resume", "resume_from_checkpoint"),
            "a run resumes by itself: start it again, or use resume.from for a checkpoint that is not its newest",
        ),
        **dict.fromkeys(("from_", "start_from", "resume_from"), "use resume.from"),
        **dict.fromkeys(("dtype", "mixed_precision", "bf16", "fp16"), "use train.precision"),
    }

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    publish: PublishSection = field(default_factory=PublishSection)
    resume: ResumeSection = field(default_factory=ResumeSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.document_mask and self.model.attn_implementation not in ("auto", *MASKS_DOCUMENTS):
            raise ConfigError(
                f"data.document_mask does not work with model.attn_implementation {self.model.attn_implementation}; "
                f"leave that at auto, or use one of {', '.join(MASKS_DOCUMENTS)}"
            )
        if self.model.zero_init and self.model.init_from:
            raise ConfigError("model.zero_init would undo some of model.init_from: keep one of the two")
        every, saved = self.publish.every_steps, self.checkpoint.save_every
        if every and (self.publish.repo is None or not saved or every % saved):
            raise ConfigError(
                f"publish.every_steps {every} needs publish.repo, and a checkpoint.save_every that divides it "
                f"(it is {saved})"
            )
        n_positions = self.model.gpt_config().n_positions
        if self.data.seq_len > n_positions:
            raise ConfigError(
                f"data.seq_len {self.data.seq_len} is longer than the model's {n_positions} positions; "
                f"lower data.seq_len or raise model.n_positions"
            )

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-steps per update on each of ``world_size`` processes, after ``train.batch_ramp``.

        While the micro-batch is still to be found, those of one window.

        Raises:
            ConfigError: when the batch of a stage does not divide, naming the nearest sizes that do.
        """
        train, seq_len = self.train, self.data.seq_len
        micro_batch_size = 1 if train.finds_micro_batch else train.micro_batch_size
        unit = micro_batch_size * seq_len * world_size
        batch = next((batch for batch in train.batches if batch % unit), None)
        if batch is None:
            return train.global_batch_tokens // unit
        below = batch // unit * unit
        name = "train.batch_ramp" if batch in train.batch_ramp else "train.global_batch_tokens"
        message = (
            f"{name} {batch} is not a multiple of micro_batch_size x seq_len x "
            f"processes = {micro_batch_size} x {seq_len} x {world_size} = {unit}; the nearest that work are "
            + " and ".join(str(size) for size in (below, below + unit) if size)
        )
        per_process, rest = divmod(batch, seq_len * world_size)
        if rest == 0:
            nearest = sorted(divisors(per_process), key=lambda b: abs(b - micro_batch_size))[:2]
            message += f"; or keep it and use train.micro_batch_size {' or '.join(map(str, sorted(nearest)))}"
        raise ConfigError(message)

    def micro_batch_sizes(self, world_size: int) -> list[int]:
        """Those that divide a process's share of every batch, from small to large."""
        return divisors(math.gcd(*self.train.batches) // (self.data.seq_len * world_size))

    def remarks(self) -> list[str]:
        """What is possible and odd, a line each."""
        found = []
        if self.optim.warmup_steps >= self.train.steps:
            found.append(
                f"optim.warmup_steps {self.optim.warmup_steps} is not below train.steps {self.train.steps}: the "
                f"learning rate only rises"
            )
        if self.optim.name == "muon" and self.optim.muon_lr < 0.005:
            found.append(
                f"optim.muon_lr {self.optim.muon_lr} is low: it is in spectral units, where about 0.02 suits all widths"
            )
        if self.optim.name == "muon" and not self.optim.weight_decay:
            found.append(
                "optim.weight_decay 0 lets Muon's matrices grow without end, which long runs are said to pay for"
            )
        if (first := self.optim.ema**self.train.steps) > 0.01:
            found.append(
                f"optim.ema {self.optim.ema} remembers too much for {self.train.steps} steps: {first:.0%} of the final "
                f"model would be the weights after the first step"
            )
        data, train = self.data, self.train
        for name, n_steps, unreached in (
            ("data.seq_len_ramp", len(data.seq_len_ramp) * data.seq_len_ramp_steps, f"data.seq_len {data.seq_len}"),
            (
                "train.batch_ramp",
                len(train.batch_ramp) * train.batch_ramp_steps,
                f"train.global_batch_tokens {train.global_batch_tokens}",
            ),
        ):
            if n_steps >= train.steps:
                found.append(f"{name} takes {n_steps} steps, and train.steps is {train.steps}: none has {unreached}")
        save, keep = self.checkpoint.save_every, self.checkpoint.keep_every
        if keep and (not save or keep % save):
            found.append(f"checkpoint.keep_every {keep} is no multiple of checkpoint.save_every {save}: it keeps less")
        return found

    def to_yaml(self) -> str:
        """The recipe, with every knob."""
        sections = json.loads(json.dumps(dataclasses.asdict(self)))
        named = {name: {knob_name(key): value for key, value in keys.items()} for name, keys in sections.items()}
        return yaml.safe_dump(named, sort_keys=False)


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _check_ramp(name: str, ramp: list[int], steps: int, then_name: str, then: int) -> None:
    """Refuse stages that do not lead up to the value that comes after them, or have no length. Raises ConfigError."""
    if steps and not ramp:
        raise ConfigError(f"{name}_steps is {steps}, and there is no {name}: set both, or neither")
    if ramp and not steps:
        raise ConfigError(f"{name} needs {name}_steps, the number of steps of each of its {len(ramp)} stages")
    if any(after <= before for before, after in pairwise([*ramp, then])):
        raise ConfigError(f"{name} {ramp} must increase, and stay below {then_name} {then}")


def flat(text: str) -> dict[str, Any]:
    """A recipe's text as dotted names and values."""
    sections = yaml.safe_load(text)
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
