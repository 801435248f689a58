"""What is measured on the live model while it trains, and how often: validation loss, HellaSwag, samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..config import RunConfig
from ..data.documents import DocumentMask
from ..data.shards import ShardSet
from ..data.stream import TokenStream
from ..evaluation.generate import sample_text
from ..evaluation.hellaswag import HellaSwag, load_hellaswag
from ..evaluation.validation import validation_loss
from ..model import GPTForCausalLM
from .metrics import is_due


def build_document_mask(
    config: RunConfig, data: ShardSet, model: GPTForCausalLM, dtype: torch.dtype
) -> DocumentMask | None:
    """What keeps the documents of this split's windows apart; None where the recipe doesn't ask for it."""
    if not config.data.document_mask:
        return None
    return DocumentMask(data.eot, data.eot_first, model.config._attn_implementation, dtype)


class Measures:
    """The measurements that a recipe asks for; every rank must take them together.

    Args:
        model: the bare model; its parameters are those that the wrapped one trains.
        val_data: None where no validation loss is asked for.
        dtype: that the model computes in.
        safe_point: is called before each forward call, equally often on each rank; what it raises ends the measurement.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: GPTForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        val_data: ShardSet | None,
        dtype: torch.dtype,
        safe_point: Callable[[], None] = lambda: None,
    ):
        self._safe_point = safe_point
        self._config, self._accelerator, self._model, self._tokenizer = config, accelerator, model, tokenizer
        several = accelerator.num_processes > 1
        self._ranks: dict[str, Any] = {
            "device": accelerator.device,
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "reduce": (lambda tensor: accelerator.reduce(tensor, "sum")) if several else None,
            "autocast": accelerator.autocast,
        }
        self._kinds: list[tuple[int, Callable[[], dict[str, Any]]]] = []
        if val_data is not None:
            self._kinds.append((config.eval.val_every, self._validation(val_data, dtype)))
        self._n_before_training = len(self._kinds)
        if config.eval.hellaswag_every and (score := self._hellaswag()):
            self._kinds.append((config.eval.hellaswag_every, score))
        if config.eval.sample_every:
            self._kinds.append((config.eval.sample_every, self._samples))

    def any_due(self, step: int) -> bool:
        return any(is_due(every, step, self._config.train.steps) for every, _ in self._kinds)

    def take(self, step: int, only_loss: bool = False) -> dict[str, Any]:
        """The measurements that are due after ``step``, as one row.

        Before the first step that is the loss alone: an untrained model's answers are chance, and the run should start.
        """
        only_loss = only_loss or step == 0
        row: dict[str, Any] = {}
        hook = self._model.register_forward_pre_hook(lambda *_: self._safe_point(), prepend=True)
        try:
            for every, measure in self._kinds[: self._n_before_training] if only_loss else self._kinds:
                if is_due(every, step, self._config.train.steps):
                    row |= measure()
        finally:
            hook.remove()
        return row

    def _validation(self, data: ShardSet, dtype: torch.dtype) -> Callable[[], dict[str, Any]]:
        config, model = self._config, self._model
        stream = TokenStream(data, config.data.seq_len, seed=0, shuffle=False)
        n_windows = max(1, min(stream.n_windows, config.eval.val_tokens // config.data.seq_len))
        documents = build_document_mask(config, data, model, dtype)
        # On a GPU validation has compiled blocks, of training's shapes; on a CPU building them saves nothing.
        stance: Any = torch.compiler.set_stance if self._accelerator.device.type == "cpu" else nullcontext

        def validate() -> dict[str, Any]:
            with stance("force_eager"):
                return validation_loss(
                    model,
                    stream,
                    n_windows=n_windows,
                    batch_size=config.train.micro_batch_size,
                    documents=documents,
                    **self._ranks,
                )

        return validate

    def _hellaswag(self) -> Callable[[], dict[str, Any]] | None:
        items = load_hellaswag(self._config.eval.hellaswag_items)
        task = HellaSwag(items, self._tokenizer, n_positions=self._model.config.n_positions)
        if task.obstacle:
            self._accelerator.print(task.obstacle)
            return None
        tokens_per_batch = self._config.train.micro_batch_size * self._config.data.seq_len

        def score() -> dict[str, Any]:
            # Rows have many lengths, for which building takes longer than it saves; so do samples.
            with torch.compiler.set_stance("force_eager"):
                return task.score(self._model, tokens_per_batch=tokens_per_batch, **self._ranks).metrics

        return score

    def _samples(self) -> dict[str, Any]:
        settings, n_calls = self._config.eval, 0

        def count(*_: object) -> None:
            nonlocal n_calls
            n_calls += 1

        counter = self._model.register_forward_pre_hook(count)
        with torch.compiler.set_stance("force_eager"), self._accelerator.autocast():
            texts = sample_text(
                self._model,
                self._tokenizer,
                settings.sample_prompt,
                max_new_tokens=settings.sample_tokens,
                n_samples=settings.sample_count,
                device=self._accelerator.device,
            )
        counter.remove()
        # On another kind of processor a rank's samples may have other lengths.
        for _ in range(n_calls, settings.sample_tokens):
            self._safe_point()
        return {"samples": texts}
