"""Every knob of a run on one page; cli.py says how a recipe and the command line set them."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import yaml

from .cli import ConfigError
from .model.configuration_gpt import GPTConfig

ConfigT = TypeVar("ConfigT")

# Attention backends that can be told where documents end.
MASKS_DOCUMENTS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class ModelSection:
    """The network.

    Args:
        preset: one of OpenAI's sizes (gpt2 is 124M); the other fields override it.
        n_layer: number of blocks.
        n_head: attention heads per block.
        n_embd: width of the residual stream.
        n_positions: longest context that the model can read.
        vocab_size: rows of the embedding; must fit the data's tokenizer.
        dropout: probability, on embeddings, attention weights and residual branches alike.
        attn_implementation: auto, or a name that transformers knows: sdpa, eager, flex_attention, flash_attention_2...
    """

    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    n_positions: int | None = None
    vocab_size: int | None = None
    dropout: float = 0.0
    attn_implementation: str = "auto"

    def gpt_config(self) -> GPTConfig:
        """The model's own configuration. Raises ConfigError for a shape that cannot be."""
        shape = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        given = {name: getattr(self, name) for name in shape if getattr(self, name) is not None}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)
        try:
            return GPTConfig.preset(self.preset, **given, **dropout)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None


@dataclass(frozen=True)
class DataSection:
    """The tokens.

    Args:
        path: folder that scripts/prepare_data.py made, or token files of llm.c, build-nanogpt, nanoGPT or datatrove, as
            they are; also in object storage (s3://bucket/folder, or any URL that fsspec knows).
        seq_len: tokens per training sample (T); a window holds one more, the last label.
        document_mask: let tokens see only their own document, from position 0, in training and validation.
        verify: read all shards before training and compare them with their checksums.
        cache_dir: where files from object storage are kept (default: gpt2_hf in the Hugging Face cache folder).
        cache_gb: at most so many 10^9 bytes of them.
    """

    path: str = "data/fineweb_edu_10bt"
    seq_len: int = 1024
    document_mask: bool = False
    verify: bool = False
    cache_dir: str | None = None
    cache_gb: float = 50.0


@dataclass(frozen=True)
class OptimSection:
    """The update.

    Args:
        name: adamw, or muon (Muon for the matrices inside blocks, AdamW for everything else).
        lr: peak learning rate of AdamW's parameters.
        muon_lr: peak learning rate of Muon's parameters (updates are scaled to AdamW's size, so of lr's order).
        muon_momentum: momentum of Muon (Nesterov).
        betas: AdamW's averaging coefficients.
        eps: AdamW's denominator offset.
        weight_decay: decoupled decay of matrices and embeddings; vectors do not decay.
        max_grad_norm: gradients are scaled down to this global L2 norm.
        schedule: cosine, or trapezoid (constant, then linear down over the last decay_ratio of the steps).
        warmup_steps: linear rise of the learning rate from step 0.
        decay_ratio: share of the steps in which trapezoid falls.
        min_lr_ratio: floor of the learning rate, as a share of its peak; it stays there after the last step.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 6e-4
    muon_lr: float = 6e-4
    muon_momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "trapezoid"] = "cosine"
    warmup_steps: int = 715
    decay_ratio: float = 0.3
    min_lr_ratio: float = 0.1


@dataclass(frozen=True)
class TrainSection:
    """The loop.

    Args:
        run_dir: folder of this run; starting again with the same folder resumes.
        steps: optimizer updates in all.
        global_batch_tokens: tokens per update over all processes; accumulation is derived from it.
        micro_batch_size: samples per forward pass on one device.
        seed: of the initialisation, the data order and dropout.
        precision: auto takes bf16 where the device has it, else fp16 with a gradient scaler on CUDA, else fp32.
        compile: torch.compile; auto uses it where it can work.
        tf32: let fp32 matrix products run as TF32 on CUDA.
        deterministic: only deterministic kernels on CUDA too (slower); the CPU always uses them.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        overfit_batch: train on the first batch only, for debugging: the loss must go to zero.
        log_every: steps between rows of training metrics.
        trackers: any of tensorboard, wandb, trackio, through Accelerate.
    """

    run_dir: str = "runs/gpt2_124m"
    steps: int = 19_073
    global_batch_tokens: int = 524_288
    micro_batch_size: int = 64
    seed: int = 1337
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    tf32: bool = True
    deterministic: bool = False
    gradient_checkpointing: bool = False
    overfit_batch: bool = False
    log_every: int = 10
    trackers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EvalSection:
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
    """

    val_every: int = 250
    val_tokens: int = 10_485_760
    hellaswag_every: int = 250
    hellaswag_items: int = 10_042
    sample_every: int = 250
    sample_prompt: str = "Hello, I'm a language model,"
    sample_count: int = 4
    sample_tokens: int = 32


@dataclass(frozen=True)
class CheckpointSection:
    """What is kept.

    Args:
        save_every: steps between checkpoints (0: only the final model is written).
        keep_last: this many newest checkpoints stay.
        keep_every: checkpoints at multiples of this many steps stay for good (0: none).
    """

    save_every: int = 1000
    keep_last: int = 2
    keep_every: int = 0


@dataclass(frozen=True)
class RunConfig:
    """Pretrain GPT-2 by a recipe. (Raises ConfigError when the parts do not fit together.)"""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def __post_init__(self) -> None:
        positive = {
            "data.seq_len": self.data.seq_len,
            "train.steps": self.train.steps,
            "train.global_batch_tokens": self.train.global_batch_tokens,
            "train.micro_batch_size": self.train.micro_batch_size,
            "train.log_every": self.train.log_every,
            "optim.lr": self.optim.lr,
            "optim.max_grad_norm": self.optim.max_grad_norm,
            "checkpoint.keep_last": self.checkpoint.keep_last,
            "eval.val_tokens": self.eval.val_tokens,
            "eval.sample_count": self.eval.sample_count,
            "eval.sample_tokens": self.eval.sample_tokens,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ConfigError(f"{name} must be positive, not {value}")
        at_least_0 = {
            f"{section}.{name}": value
            for section in ("optim", "eval", "checkpoint")
            for name, value in dataclasses.asdict(getattr(self, section)).items()
            if isinstance(value, int | float)
        }
        for name, value in at_least_0.items():
            if value < 0:
                raise ConfigError(f"{name} must not be negative, is {value}")
        if not 0 <= self.model.dropout < 1:
            raise ConfigError(f"model.dropout must be in [0, 1), is {self.model.dropout}")
        if not 1 <= self.eval.hellaswag_items <= 10_042:
            raise ConfigError(f"eval.hellaswag_items must be 1 to 10042 (all), is {self.eval.hellaswag_items}")
        if self.data.document_mask and self.model.attn_implementation not in ("auto", *MASKS_DOCUMENTS):
            raise ConfigError(
                f"data.document_mask does not work with model.attn_implementation {self.model.attn_implementation}; "
                f"leave that at auto, or use one of {', '.join(MASKS_DOCUMENTS)}"
            )
        n_positions = self.model.gpt_config().n_positions
        if self.data.seq_len > n_positions:
            raise ConfigError(
                f"data.seq_len {self.data.seq_len} is longer than the model's {n_positions} positions; "
                f"lower data.seq_len or raise model.n_positions"
            )

    def grad_accum_steps(self, world_size: int) -> int:
        """Micro-steps per update on each of ``world_size`` processes.

        Raises:
            ConfigError: when the global batch does not divide, naming the nearest sizes that do.
        """
        train, seq_len = self.train, self.data.seq_len
        unit = train.micro_batch_size * seq_len * world_size
        if train.global_batch_tokens % unit == 0:
            return train.global_batch_tokens // unit
        below, above = (f(train.global_batch_tokens / unit) * unit for f in (math.floor, math.ceil))
        message = (
            f"train.global_batch_tokens {train.global_batch_tokens} is not a multiple of micro_batch_size x seq_len x "
            f"processes = {train.micro_batch_size} x {seq_len} x {world_size} = {unit}; the nearest that work are "
            + " and ".join(str(size) for size in (below, above) if size)
        )
        per_process, rest = divmod(train.global_batch_tokens, seq_len * world_size)
        if rest == 0:
            sizes = [b for b in range(1, per_process + 1) if per_process % b == 0]
            nearest = sorted(sizes, key=lambda b: abs(b - train.micro_batch_size))[:2]
            message += f"; or keep it and use train.micro_batch_size {' or '.join(map(str, sorted(nearest)))}"
        raise ConfigError(message)

    def to_yaml(self) -> str:
        return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(self))), sort_keys=False)
