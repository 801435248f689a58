"""lm-evaluation-harness on a model that is in memory already, its items shared among the processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .evaluate import ALONE, Ranks

# Our tasks hellaswag_offline and hellaswag_offline_500, whose data ships with the package.
TASKS = resources.files("gpt2_hf") / "assets" / "lm_eval"


@dataclass(frozen=True)
class HarnessResults:
    """What the harness says of one model.

    Attributes:
        table: task -> its figures by metric ("acc", "acc_stderr", ...), "n", the number of items, and "version".
        outcomes: "task metric" -> what each item got, of the metrics that are means over items, in the items' order.
    """

    table: dict[str, dict[str, Any]]
    outcomes: dict[str, np.ndarray]


class Harness:
    """Tasks of lm-evaluation-harness, made ready once, for any number of models.

    Args:
        tasks: names of the harness's own tasks, of ours, or of YAML files in ``include_path``.
        limit: only the first items of each task, so many.

    Raises:
        ImportError: without lm_eval.
        ValueError: for a task that does not exist, or whose data cannot be had.
    """

    def __init__(self, tasks: Sequence[str], limit: int | None = None, include_path: str | Path | None = None):
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ImportError("--tasks needs lm-evaluation-harness: pip install 'lm-eval[hf]'") from None
        if limit is not None and limit < (n_ranks := int(os.environ.get("WORLD_SIZE", "1"))):
            raise ValueError(f"limit is {limit}, less than an item for each of {n_ranks} processes: raise it")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._limit = limit
        paths = [str(TASKS), *([str(include_path)] if include_path else [])]
        self._manager = TaskManager(include_path=paths, include_defaults=False)
        if not set(tasks) <= set(self._manager.all_tasks):  # the harness's own take seconds to find
            self._manager = TaskManager(include_path=paths)
        known = set(self._manager.all_tasks)
        if unknown := [task for task in tasks if task not in known]:
            raise ValueError(f"lm-evaluation-harness has no task {unknown[0]}: `lm_eval ls tasks` lists them")
        self._tasks = {}
        for task in tasks:
            try:
                self._tasks[task] = self._manager.load([task])
            except Exception as error:  # of the Hub, of the network, of the data's own loader: any kind
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise ValueError(
                    f"the data of task {task} cannot be had ({line}); without a network hellaswag_offline and "
                    "hellaswag_offline_500 work, and tasks that were evaluated before"
                ) from None

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        dtype: str = "float32",
        ranks: Ranks = ALONE,
        save_to: Path | None = None,
    ) -> HarnessResults:
        """Evaluate a model where it is; each rank takes its share of the items, and the first gets the results.

        Args:
            batch_size: of the harness's forward calls.
            dtype: what to compute in, a name of torch's.
            save_to: folder for the harness's own JSON, of results and of each item.
        """
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        was_training = model.training
        tracker = EvaluationTracker(output_path=str(save_to)) if save_to else None
        try:
            found: Any = simple_evaluate(
                _live(model, tokenizer, batch_size, None if dtype == "float32" else dtype, ranks),
                tasks=list(self._tasks),
                task_manager=self._manager,
                limit=self._limit,
                bootstrap_iters=1000,  # for the error of what is no mean; by default lambada's takes a minute
                evaluation_tracker=tracker,
                verbosity="ERROR",
            )
        finally:
            model.train(was_training)
        if found is None:  # another rank has the results
            return HarnessResults({}, {})
        samples = found.pop("samples")
        if tracker:
            tracker.general_config_tracker.model_name_sanitized = "."  # else a folder of a name that says nothing
            tracker.save_results_aggregated(results=found, samples=samples)
            for task, rows in samples.items():
                tracker.save_results_samples(task_name=task, samples=rows)
        return HarnessResults(_table(found), _outcomes(found, samples))


def _live(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, dtype: str | None, ranks: Ranks
) -> Any:
    """The harness's model of a live one. By itself it would have every rank score every item."""
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):
        rank = property(lambda self: ranks.rank)
        world_size = property(lambda self: ranks.world_size)

    if ranks.world_size > 1:
        Shared.accelerator = Accelerator()
    # Its softmax and sums would otherwise be of that precision too: in bf16 log-likelihoods of whole nats, and ties.
    options: dict[str, Any] = {"mixed_precision_dtype": dtype, "softmax_dtype": "float32"} if dtype else {}
    return Shared(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **options)


def _table(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    table = {}
    for task, values in found["results"].items():
        figures = {
            name.partition(",")[0]: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and "," in name
        }
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        table[task] = {**figures, "n": count, "version": found.get("versions", {}).get(task)}
    return table


def _outcomes(found: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Whatever is a number for each item and has the result for its mean; right and wrong as bool."""
    outcomes = {}
    for task, rows in samples.items():
        rows = sorted(rows, key=lambda row: row["doc_id"])
        for name, value in found["results"][task].items():
            metric = name.partition(",")[0]
            numbers = [row.get(metric) for row in rows]
            if "," not in name or not all(isinstance(number, int | float | np.number) for number in numbers):
                continue
            values = np.array(numbers, dtype=float)
            if isinstance(value, int | float) and abs(values.mean() - value) < 1e-9:
                is_answer = np.isin(values, (0, 1)).all()
                outcomes[f"{task} {metric}"] = values.astype(bool) if is_answer else values
    return outcomes
