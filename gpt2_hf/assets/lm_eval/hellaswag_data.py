"""The packaged HellaSwag file as lm-evaluation-harness wants its data. Needs nothing of gpt2_hf, only its place."""

import gzip
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

FILE = Path(__file__).parents[1] / "hellaswag_val.jsonl.gz"


def load(limit: int | None = None, **_: Any) -> dict[str, Dataset]:
    """All items, or `limit` spread evenly; the harness also passes its metadata, which does not matter here."""
    items = [json.loads(line) for line in gzip.decompress(FILE.read_bytes()).splitlines()]
    if limit is not None:
        items = [items[i * len(items) // limit] for i in range(limit)]
    return {"validation": Dataset.from_list(items)}


class NoShots(ContextSampler):
    """Refuses shots: the harness takes them from HellaSwag's training split, and only validation ships."""

    def sample(self, n: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        if n > 0:
            raise ValueError(
                f"num_fewshot is {n}, and hellaswag_offline holds only the items that are scored: leave it out, or "
                "use the task hellaswag, which downloads the training split"
            )
        return []
